"""Importing what is special: repeated keys, dead weights, two sets of weights, plain networks, whole pickled ones."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from test_importer import MADE, SMALL, SUPERNET, stirred, theirs
from thriftnet.cli.common import open_network
from thriftnet.cli.inputs import augmentation_of
from thriftnet.core.tied import unique_tensors
from thriftnet.data.transforms import eval_transform
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing import dsnet, filter_basis, shiftresnet, soft_sharing, weight_sharing
from thriftnet.importing.importer import build, folder_facts, import_checkpoint
from thriftnet.importing.layout import read
from thriftnet.importing.systems import recognise
from thriftnet.models.table import IDENTITY


def test_repeated_keys_must_be_equal() -> None:
    state = theirs(tn.create_model("resnet32_double_shared", depth=14, shared_rank=2), filter_basis.layout)
    state["layer1.1.shared_basis_2.weight"] = state["shared_basis_1_2.weight"].clone()
    assert recognise(state, {}, {})[0] == "filter-basis"
    state["layer1.1.shared_basis_2.weight"] += 1
    with pytest.raises(CheckpointError, match=r"shared_basis_1_2.weight and layer1.1.shared_basis_2.weight are one tensor"):
        recognise(state, {}, {})


def test_a_shared_tensor_under_a_users_name_only() -> None:
    """As files have it whose writer removed repeated tensors."""
    model = stirred(tn.create_model("swrn16_1_2"))
    state = theirs(model, soft_sharing.layout)
    state["stage_2.1.conv2.bank.templates"] = state.pop("bank_2.templates")
    again, _ = build(recognise(state, {}, {})[1])
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("original", [True, False])
def test_which_basis_the_last_dense_block_uses_is_seen_by_its_repeated_key(original: bool) -> None:
    model = stirred(tn.create_model("cifar_densenet121_single_shared", shared_rank=2, original_sharing=original))
    state = theirs(model, filter_basis.layout)
    if original:
        state["shared_basis_4.weight"] = torch.randn_like(state["shared_basis_3.weight"])
    used = state[f"shared_basis_{3 if original else 4}.weight"]
    state["features.dense_block_layer_3.bottle_neck_layer_7.shared_basis.weight"] = used
    recognised = recognise(state, {}, {})[1]
    assert recognised.kwargs["original_sharing"] is original
    assert bool(recognised.notes) is original
    again, _ = build(recognised)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    del state["features.dense_block_layer_3.bottle_neck_layer_7.shared_basis.weight"]
    assert recognise(state, {}, {"original_sharing": original})[1].kwargs["original_sharing"] is original
    assert any("original_sharing=True is assumed" in note for note in recognise(state, {}, {})[1].notes)


def fused_by_hand(state: dict[str, Tensor], rate: int) -> dict[str, Tensor]:
    """Their weight_fusion by the mean: neighbours, whatever the mapping."""
    fused = {key: tensor for key, tensor in state.items() if not key.startswith("pwise_")}
    number = sum(key.startswith("pwise_w.") for key in state)
    for kind in ("pwise_w", "pwise_b"):
        for i in range(number // rate):
            fused[f"{kind}.{i}"] = torch.stack([state[f"{kind}.{i * rate + j}"] for j in range(rate)]).mean(0)
    return fused


def test_fusion_under_the_strided_mapping_takes_neighbours_as_the_authors_do() -> None:
    state = theirs(stirred(tn.create_model("convmixer", **SMALL)), weight_sharing.layout)
    hints = {"mapping": "strided", "rate": 2, "fusion": "mean", "activation": "relu"}
    recognised = recognise(state, {}, hints)[1]
    assert any("neighbours" in note for note in recognised.notes)
    fusing, _ = build(recognised)
    shared, _ = build(recognise(fused_by_hand(state, 2), {}, {"mapping": "strided"})[1])
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fusing(images), shared(images), rtol=1e-5, atol=1e-5)


def test_the_configuration_of_the_file_tells_mapping_activation_and_fusion() -> None:
    state = theirs(
        stirred(tn.create_model("ws_convmixer", **SMALL, mapping="strided", activation="gelu")), weight_sharing.layout
    )
    share = "  WEIGHT_SHARE:\n    ENABLE: true\n    REDUCTION_FN: mean\n    SHARE_RATE: 2\n    SHARING_MAPPING: strided\n"
    config = f"BN:\n  X: 1\nCONVMIXER:\n  ACT_FUNC: GELU\n  PATCH_STRIDE: 2\n{share}DATA:\n  MEAN:\n  - 0.1\n"
    recognised = recognise(state, {"cfg": config}, {})[1]
    assert (recognised.name, recognised.kwargs["mapping"], recognised.kwargs["activation"]) == (
        "ws_convmixer",
        "strided",
        "gelu",
    )
    assert all("assumed" not in note for note in recognised.notes)
    assert any("fused already" in note for note in recognised.notes)
    asked = recognise(state, {"cfg": config}, {"mapping": "sequential"})[1]
    assert asked.kwargs["mapping"] == "sequential"
    assert any("as asked" in note for note in asked.notes)
    dense = theirs(tn.create_model("convmixer", **SMALL), weight_sharing.layout)
    assert recognise(dense, {"cfg": config}, {})[1].name == "wfws_convmixer"
    with pytest.raises(CheckpointError, match="stride 1"):
        recognise(state, {"cfg": config.replace("STRIDE: 2", "STRIDE: 1")}, {})


def test_a_supernet_without_its_gate() -> None:
    model = stirred(tn.create_model("dsnet", stem=(6, 8), stages=SUPERNET, num_classes=3))
    state = theirs(model, dsnet.layout)
    del state["blocks.1.first_block.gate.gate.0.weight"]
    recognised = recognise(state, {}, {})[1]
    assert any("gate" in note for note in recognised.notes)
    again, _ = build(recognised)
    images = torch.randn(1, 3, 64, 64)
    for width in ("0", "2", "largest"):
        tn.set_width(model, width)
        tn.set_width(again, width)
        assert torch.equal(again(images), model(images))


def test_weights_or_their_moving_average(tmp_path: Path) -> None:
    one = theirs(stirred(tn.create_model("dsnet", stem=(6, 8), stages=SUPERNET, num_classes=3)), dsnet.layout)
    other = OrderedDict((key, tensor * 2 if tensor.is_floating_point() else tensor) for key, tensor in one.items())
    path = tmp_path / "c.pth.tar"
    torch.save({"state_dict": one, "state_dict_ema": other, "optimizer": {"state": {}}}, path)
    for ema, expected, words in (
        (None, other, "moving average"),
        (True, other, "moving average"),
        (False, one, "as trained"),
    ):
        imported = import_checkpoint(path, ema=ema)
        got = read(unique_tensors(imported.model), dsnet.layout(imported.model))
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
        assert words in imported.notes[0]
    torch.save({"state_dict": one}, path)
    with pytest.raises(ConfigError, match="no state_dict_ema"):
        import_checkpoint(path, ema=True)


@pytest.mark.parametrize("everywhere", [True, False])
def test_extra_shortcuts_of_november_2017_are_kept(everywhere: bool) -> None:
    """In every block, as reduced networks had them, or in some: then the network is none of the zoo."""
    model = tn.create_model("resnet20_projection", reduction=3, reduction_mode="block")
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage if everywhere else list(stage)[:2]:
            outs = block.conv2.out_channels
            if isinstance(block.shortcut, nn.Identity):
                block.shortcut = nn.Sequential(nn.Conv2d(outs, outs, 1, bias=False), nn.BatchNorm2d(outs))
    recognised = recognise(theirs(stirred(model), shiftresnet.layout), {}, {})[1]
    again, _ = build(recognised)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    assert any("November 2017" in note for note in recognised.notes)
    assert hasattr(again, IDENTITY) == everywhere


def test_banks_that_nothing_uses_are_left_out() -> None:
    state = theirs(tn.create_model("swrn", depth=10, width=1, templates=2), soft_sharing.layout)
    state |= {f"bank_{s}.templates": torch.zeros(2, 16 * 2 ** (s - 1), 16 * 2 ** (s - 1), 3, 3) for s in (1, 2, 3)}
    recognised = recognise(state, {}, {})[1]
    assert (recognised.name, recognised.kwargs["templates"]) == ("swrn", 2)
    assert "96,768 parameters" in recognised.notes[0]
    build(recognised)


# -- how images are prepared


@pytest.mark.parametrize(
    ("made", "size", "shorter_side", "interpolation"),
    [
        ("mixer", 224, 256, "bicubic"),
        ("supernet", 224, 256, "bicubic"),
        ("eca", 224, 256, "bilinear"),
        ("swrn", 32, 32, "bilinear"),
    ],
)
def test_evaluation_prepares_images_as_the_authors_do(
    made: str, size: int, shorter_side: int, interpolation: str, tmp_path: Path
) -> None:
    """The same for the file and for the network saved from it."""
    name, kwargs, layout, hints = MADE[made]
    path = tmp_path / "weights.pth"
    torch.save(theirs(tn.create_model(name, **kwargs), layout), path)
    imported = import_checkpoint(path, **hints)
    folder = tn.save(imported.model, tmp_path / "saved", metadata=folder_facts(imported))
    unset = dict.fromkeys(("mean", "std", "image_size", "resize", "crop_pct", "interpolation"))
    options = SimpleNamespace(**unset, data="folder:images")
    for place in (path, folder):
        model = open_network(str(place), {})
        images: Any = SimpleNamespace(input_size=None, mean=(0.1,) * 3, std=(0.2,) * 3)
        augmentation = augmentation_of(options, images, images, model)  # type: ignore[arg-type]
        resize, crop = eval_transform(augmentation).transforms[:2]  # type: ignore[attr-defined]
        assert (resize.size, resize.interpolation.value, crop.size) == (shorter_side, interpolation, (size, size))
        known = imported.preprocessing.get("normalisation", {"mean": (0.1,) * 3})
        assert augmentation.mean == tuple(known["mean"])
        assert (augmentation.mean == (0.485, 0.456, 0.406)) == (size == 224)


# -- plain networks and our own keys


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet18", "resnet50"])
def test_keys_of_torchvision(name: str) -> None:
    model = stirred(tn.create_model(name, num_classes=7))
    state = {key: tensor for key, tensor in model.state_dict().items() if "num_batches" not in key}
    system, recognised = recognise(state, {}, {})
    assert (system, recognised.name, recognised.kwargs) == ("resnet", name, {"num_classes": 7})
    again, notes = build(recognised)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert "start at 0" in notes[0]


@pytest.mark.parametrize(("head", "shortcut"), [("linear", None), ("fc", "downsample"), ("fc", "shortcut")])
def test_small_resnets_of_others(head: str, shortcut: str | None) -> None:
    model = stirred(tn.create_model("resnet32", shortcut="projection" if shortcut else "pad"))
    changes = (("fc.", f"{head}."), ("shortcut", shortcut or "shortcut"))
    state = {}
    for key, tensor in model.state_dict().items():
        for ours, their in changes:
            key = key.replace(ours, their)
        state[key] = tensor
    system, recognised = recognise(state, {}, {})
    assert (system, recognised.name) == ("resnet", "resnet32")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(build(recognised)[0](images), model(images))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet20", {}),
        ("shiftresnet20", {"expansion": 2}),
        ("swrn", {"depth": 16, "width": 1, "templates": 2}),
        ("resnet32_double_shared", {}),
        ("ws_convmixer", {"dim": 8, "depth": 4, "mapping": "strided"}),
    ],
)
def test_our_own_keys_with_the_networks_name(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = stirred(tn.create_model(name, num_classes=4, in_chans=1, **kwargs))
    path = tmp_path / "own.pth"
    torch.save(model.state_dict(), path)
    imported = import_checkpoint(path, model=name, **kwargs)
    images = torch.randn(1, 1, 32, 32)
    assert torch.equal(imported.model(images), model(images))
    assert imported.source.system == "thriftnet"
    if kwargs:
        with pytest.raises(ConfigError, match="depht"):
            import_checkpoint(path, model=name, depht=3)


# -- whole pickled networks


def test_whole_networks_are_walked_as_data(tmp_path: Path) -> None:
    """Ours are pickled under our class names; only the names of their parts matter."""
    model = stirred(tn.create_model("wrn", depth=10, width=1))
    renames = {
        "conv1": "conv_3x3",
        "fc": "classifier",
        "bn": "lastact",
        "layer1": "stage_1",
        "layer2": "stage_2",
        "layer3": "stage_3",
    }
    model._modules = {renames.get(name, name): module for name, module in model._modules.items()}  # type: ignore[assignment]
    model.lastact = nn.Sequential(model.lastact)
    for stage in (model.stage_2, model.stage_3):
        stage[0]._modules = {{"shortcut": "convShortcut"}.get(name, name): m for name, m in stage[0]._modules.items()}
    path = tmp_path / "net.t7"
    torch.save({"net": model, "acc": np.float64(70.5), "epoch": 3}, path)
    imported = import_checkpoint(path)
    assert imported.architecture == "create_model('wrn', depth=10, width=1, num_classes=10)"
    assert imported.metadata["acc"] == 70.5
    assert imported.metadata["net"]["class"] == "thriftnet.models.wrn.WideResNet"
    assert torch.equal(imported.model.fc.weight, model.classifier.weight)
    torch.save(nn.DataParallel(model), path)
    assert torch.equal(import_checkpoint(path).model.fc.weight, model.classifier.weight)
