"""SPIN's ConvMixers against the recorded facts, and weight sharing on other isotropic networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thriftnet as tn
from laws import assert_close, law_plan_is_dry
from networks import perturb
from thriftnet.core.history import history
from thriftnet.core.tied import count_params
from thriftnet.importing.weight_sharing import layout as convmixer_layout
from thriftnet.models import MODELS
from thriftnet.techniques.weight_sharing import FusedConv2d, FusedLinear
from zoo_golden import check_logits, check_network, check_train_step, facts, recorded_networks
from zoo_groups import CONVMIXERS

SMALL = {"dim": 64, "depth": 8, "patch_size": 4, "kernel_size": 3, "num_classes": 10}
FUSIONS = ("mean", "choose_first", "scalar_weighted_mean", "channel_weighted_mean")


def like(case: dict[str, Any], **kwargs: Any) -> nn.Module:
    """Our network for a recorded one, by what its name and configuration say."""
    name, meta = case["model"], case["meta"]
    sizes = {**SMALL, "activation": "gelu" if meta.get("act") == "GELU" else "relu"} if name.startswith("small") else {}
    sharing = {"mapping": "strided" if "strided" in name else "sequential"}
    if meta["num_share"] == len(meta["mapping"]):
        return tn.create_model("convmixer", **sizes, **kwargs)
    sharing["rate"] = len(meta["mapping"]) // meta["num_share"]
    fusion = meta.get("fn") or meta.get("reduction_fn")
    if fusion is None:
        return tn.create_model("ws_convmixer", **sizes, **sharing, **kwargs)
    return tn.create_model("wfws_convmixer", **sizes, **sharing, fusion=fusion, **kwargs)


RECORDED = [name for name, case in facts("spin").items() if "state_dict" in case]
TRAINED = [name for name in facts("spin") if name.startswith("train_")]


@pytest.mark.parametrize("name", recorded_networks("spin"))
def test_recorded_network(name: str) -> None:
    case = facts("spin")[name]
    model = like(case)
    check_network(case, model, convmixer_layout(model))


def test_recorded_networks_are_all_here() -> None:
    assert len(RECORDED) >= 16
    assert len(TRAINED) == 5


@pytest.mark.parametrize("name", TRAINED)
def test_recorded_train_step(name: str) -> None:
    step = facts("spin")[name]
    case = next(
        facts("spin")[name]
        for name in RECORDED
        if name.removesuffix("_sequential") == step["model"].removesuffix("_sequential")
    )
    model = like(case, drop_rate=0.0)
    check_train_step(step, case, model, convmixer_layout(model))


@pytest.mark.parametrize("name", [n for n in RECORDED if n.startswith("small_wf2")])
def test_a_fused_network_folds_into_a_shared_one(name: str) -> None:
    case = facts("spin")[name]
    fused = like(case)
    check_logits(case["logits"], case, fused, convmixer_layout(fused))
    fused = fused.double().eval()
    shared = tn.create_model("ws_convmixer", **SMALL).double().eval()
    folded = tn.fold(fused)
    assert count_params(folded) == count_params(shared) == facts("spin")["small_ws2_sequential"]["params"]["total"]
    shared.load_state_dict(folded.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close(shared(x), fused(x), 1e-12, "shared network with folded weights")


@pytest.mark.parametrize("name", CONVMIXERS)
def test_stored_facts_are_what_is_counted(name: str) -> None:
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name), MODELS[name].input_size)
    assert (report.params, report.macs) == (MODELS[name].params, MODELS[name].macs)


def test_published_sizes_are_the_stored_tensors() -> None:
    """MiB of parameters and buffers, and under one more of the archive, give the 79MB and 43MB of the README."""
    for name, published in (("convmixer", 79), ("ws_convmixer", 43)):
        with torch.device("meta"):
            model = tn.create_model(name)
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        mebibytes = sum(t.numel() * t.element_size() for t in tensors) / 2**20
        assert 0 < published - mebibytes < 1
        assert MODELS[name].published.params == f"{published}MB"


@pytest.mark.parametrize("alias", ["ConvMixer_768_32", "WSConvMixer", "WFWS-ConvMixer", "WF-WSConvMixer"])
def test_authors_names(alias: str) -> None:
    with torch.device("meta"):
        model = tn.create_model(alias)
    assert model.num_features == 768
    assert not history(model), "what the zoo converts is no history: load would replay it"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("dim", "depth", "patch_size", "kernel_size"), [(8, 1, 7, 9), (12, 5, 1, 1), (6, 4, 2, 4)], ids=str)
def test_any_size_has_the_parameters_of_the_formula(dim: int, depth: int, patch_size: int, kernel_size: int) -> None:
    sizes = {"dim": dim, "depth": depth, "patch_size": patch_size, "kernel_size": kernel_size}
    model = tn.create_model("convmixer", **sizes, num_classes=7, in_chans=1, activation="gelu").eval()
    block = dim * (kernel_size**2 + 1) + dim * (dim + 1) + 4 * dim
    assert count_params(model) == dim * (patch_size**2 + 1) + 2 * dim + depth * block + 7 * (dim + 1)
    assert model(torch.randn(2, 1, 40, 56)).shape == (2, 7)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 6, 12])
def test_shared_networks_have_the_parameters_of_the_formula(rate: int) -> None:
    sizes = {"dim": 8, "depth": 12, "patch_size": 2, "num_classes": 3}
    plain = count_params(tn.create_model("convmixer", **sizes))
    spared = (12 - 12 // rate) * (8 * 8 + 8)
    for mapping in ("sequential", "strided", "random"):
        assert count_params(tn.create_model("ws_convmixer", **sizes, rate=rate, mapping=mapping)) == plain - spared
    extra = {"mean": 0, "choose_first": 0, "scalar_weighted_mean": 12, "channel_weighted_mean": 12 * 8}
    for fusion in FUSIONS:
        model = tn.create_model("wfws_convmixer", **sizes, rate=rate, fusion=fusion)
        assert count_params(model) == plain + extra[fusion]


def test_only_pointwise_convolutions_share() -> None:
    model = tn.create_model("ws_convmixer", dim=8, depth=4, patch_size=2, kernel_size=1)
    assert len({id(block.pointwise) for block in model.blocks}) == 2
    for part in ("depthwise", "norm1", "norm2"):
        assert len({id(getattr(block, part)) for block in model.blocks}) == 4


@pytest.mark.parametrize("name", ["convmixer", "ws_convmixer", "wfws_convmixer"])
def test_networks_offer_what_timm_users_expect(name: str) -> None:
    model = tn.create_model(name, dim=8, depth=4, patch_size=4, num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 40, 56)
    features = model.forward_features(images)
    assert features.shape == (2, 8, 10, 14)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, 8)
    assert model.get_classifier().out_features == 7 == model.default_cfg["num_classes"]
    model.reset_classifier(0)
    assert model(images).shape == (2, 8)


def test_saved_networks_come_back(tmp_path: Any) -> None:
    model = tn.create_model("wfws_convmixer", dim=8, depth=4, patch_size=4, fusion="channel_weighted_mean").eval()
    tn.save(perturb(model), tmp_path / "fused")
    x = torch.randn(1, 3, 8, 8)
    assert_close(tn.load(tmp_path / "fused").eval()(x), model(x), 1e-6, "loaded")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ws_convmixer", {"rate": 5}, "rate=5 does not divide the depth 32: expected one of 1, 2, 4, 8, 16, 32"),
        ("wfws_convmixer", {"rate": 9, "depth": 6}, "rate=9 does not divide the depth 6: expected one of 1, 2, 3, 6"),
        ("ws_convmixer", {"mapping": "stride"}, "did you mean 'strided'"),
        ("wfws_convmixer", {"fusion": "max"}, "unknown fusion 'max'"),
        ("convmixer", {"activation": "relo"}, "did you mean 'relu'"),
        ("convmixer", {"dim": 0}, "dim=0: expected an integer from 1 to"),
        ("convmixer", {"depth": 2.5}, r"depth=2\.5: expected an integer"),
        ("convmixer", {"patch_size": -1}, "patch_size=-1"),
        ("convmixer", {"drop_rate": 1.0}, r"drop_rate=1\.0: expected a number in \[0, 1\)"),
        ("convmixer", {"rate": 2}, "unknown kwarg"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message), torch.device("meta"):
        tn.create_model(name, **kwargs)


def test_initialisation() -> None:
    """Convolutions Kaiming's by fan-out with zero biases, norms at 1 and 0, the head normal with 0.01."""
    torch.manual_seed(0)
    model = tn.create_model("wfws_convmixer", dim=256, depth=4, patch_size=7, num_classes=400)
    fused = model.blocks[0].pointwise
    assert isinstance(fused, FusedConv2d)
    for member in fused.members:
        assert member.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert not fused.biases.any()
    assert model.blocks[1].depthwise.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)
    assert model.stem.weight.std().item() == pytest.approx((2 / (256 * 49)) ** 0.5, rel=0.02)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.fc.bias.any()
    assert not model.stem.bias.any()
    assert model.norm.weight.eq(1).all()
    assert not model.norm.bias.any()


def timm_network(name: str) -> nn.Module:
    """A tiny isotropic network of timm's parts."""
    import timm
    from timm.models.convmixer import ConvMixer
    from timm.models.convnext import ConvNeXtBlock

    torch.manual_seed(0)
    if name == "convmixer":
        return ConvMixer(dim=16, depth=4, kernel_size=3, patch_size=4, num_classes=7)
    if name == "convnext_isotropic":  # timm has no such name; this is how its authors stack the blocks
        blocks = [ConvNeXtBlock(16, ls_init_value=1.0) for _ in range(4)]
        return nn.Sequential(nn.Conv2d(3, 16, 4, 4), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7))
    sizes = {"img_size": 32, "patch_size": 8, "depth": 4, "num_classes": 7, "embed_dim": 48}
    return timm.create_model({"vit": "vit_tiny_patch16_224", "deit": "deit_tiny_patch16_224"}[name], **sizes)


# config, and the parameters that two of every four layers no longer have
VIT_LAYERS = 2 * (48 * 48 * (3 + 1 + 4 + 4) + 48 * (3 + 1 + 4 + 1))
PEERS: dict[str, tuple[tn.WeightSharing, int]] = {
    "convmixer": (tn.WeightSharing(), 2 * (16 * 16 + 16)),
    "convnext_isotropic": (tn.WeightSharing(linear=True), 2 * (2 * 16 * 64 + 64 + 16)),
    "vit": (tn.WeightSharing(linear=True, mapping="strided"), VIT_LAYERS),
    "deit": (tn.WeightSharing(linear=True), VIT_LAYERS),
}


@pytest.mark.parametrize("name", PEERS)
def test_isotropic_peers_share(name: str) -> None:
    config, spared = PEERS[name]
    model = timm_network(name).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    shared = tn.convert(model, config)
    assert count_params(shared) == count_params(model) - spared
    assert tn.inspect(shared, (3, 32, 32)).macs == tn.inspect(model, (3, 32, 32)).macs
    perturb(shared)
    folded = tn.fold(shared)
    assert_close(folded(x), shared(x), 1e-12, "fold")
    assert count_params(folded) == count_params(shared)
    fresh = tn.convert(model, config)
    fresh.load_state_dict(shared.state_dict(), strict=True)
    assert_close(fresh(x), shared(x), 1e-12, "loaded")
    names = {row.names[0] for row in tn.plan(model, config).rows}
    assert not any(n.startswith(("patch_embed", "stem", "head")) for n in names)
    law_plan_is_dry(model, config)


def test_the_large_peer_of_timm_shares() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("convmixer_768_32")
        shared = tn.convert(model, tn.WeightSharing(rate=2))
    assert count_params(model) - count_params(shared) == 16 * (768 * 768 + 768)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_linear_layers_are_fused_by_the_formula(fusion: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 6), *(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 2)).double().eval()
    model = tn.convert(dense, tn.WeightSharing(linear=True, fusion=fusion, trained=True, mapping="strided"))
    layer = model[1]
    assert isinstance(layer, FusedLinear)
    assert layer is model[3]
    assert model[2] is model[4]
    if fusion != "choose_first":
        mean = (dense[1].weight + dense[3].weight) / 2
        assert_close(layer.weight.detach(), mean.detach(), 1e-12, "mean of the layers")
    else:
        assert torch.equal(layer.weight, dense[1].weight)
    perturb(model).eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    folded = tn.fold(model)
    assert [type(module) for module in folded] == [nn.Linear] * 6
    assert folded[1] is folded[3]
    assert_close(folded(x), model(x), 1e-12, "fold")
    model(x).square().sum().backward()
    missing = layer.members.grad[1:].abs().max() == 0
    assert bool(missing) == (fusion == "choose_first")
    shared = tn.convert(TinyVision().eval(), tn.WeightSharing(linear=True, trained=True))
    assert tn.inspect(shared, (3, 32, 32)).generation_macs == 4 * 36


class TinyVision(nn.Module):
    """Images to two equal linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.stem(x).mean((2, 3))))
        return out


def test_linear_layers_share_unless_asked_not_to() -> None:
    with pytest.raises(tn.IncompatibleModelError, match="finds nothing to convert"):
        tn.convert(TinyVision(), tn.WeightSharing(linear=False))
    with pytest.raises(tn.IncompatibleModelError, match=r"takes .* and Linear \(unless linear=False\)"):
        tn.convert(TinyVision(), tn.WeightSharing(linear=False), select=["body.0"])
    shared = tn.convert(TinyVision(), tn.WeightSharing())
    assert shared.body[0] is shared.body[1]
    rows = tn.plan(TinyVision(), tn.WeightSharing(linear=True)).rows
    assert all(row.relative_error is not None and row.relative_error > 0 for row in rows)


def test_shared_linear_layers_keep_their_widths() -> None:
    width_spec = tn.convert(TinyVision().double().eval(), tn.Slimmable(widths=(0.5, 1.0)))
    shared = perturb(tn.convert(width_spec, tn.WeightSharing(linear=True, trained=True))).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for width in (0.5, 1.0):
        tn.set_width(shared, width)
        assert_close(tn.freeze(shared, width)(x), shared(x), 1e-12, f"width {width}")
