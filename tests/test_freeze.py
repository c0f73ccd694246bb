"""Plain networks taken out of slimmable ones: at one width, at several, with norms folded; stored and made again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thriftnet as tn
from laws import assert_close, output
from networks import NETWORKS, perturb, randomise_norms
from thriftnet.core.history import history
from thriftnet.core.width_slots import groups, width_slots

WIDTHS = (0.25, 0.5, 1.0)
STAGES = (((8, 12), 1, 3, 1, "ds", False), ((12, 16, 24), 2, 3, 2, "ds", True), ((16, 20, 32), 1, 5, 2, "ir", False))


def supernet() -> nn.Module:
    model = tn.create_model("resnet20", shortcut="projection").double()
    return perturb(tn.convert(model, tn.Slimmable(widths=WIDTHS))).eval()


def ds_net(**kwargs: Any) -> nn.Module:
    model = tn.create_model("dsnet", stem=(8, 16), stages=STAGES, num_classes=5, **kwargs).double()
    return randomise_norms(perturb(model)).eval()


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_copies_in_one_piece(width: float) -> None:
    model = supernet()
    frozen = tn.freeze(model, width)
    held = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for parameter in frozen.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        assert parameter.untyped_storage()._cdata not in held


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [supernet, ds_net])
def test_norms_fold_into_the_convolutions_before_them(make: Any, width: float) -> None:
    model = make()
    chosen = {"width": width} if make is supernet else {"index": WIDTHS.index(width)}
    tn.set_width(model, **chosen)
    folded = tn.freeze(model, **chosen, fold_norms=True)
    assert_close(output(folded, IMAGES), output(model, IMAGES), 1e-12, f"norms folded at {width}")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in tn.freeze(model, **chosen).modules())


class Reads(nn.Module):
    """Convolutions whose outputs are read by a norm, and in other ways, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.alone, self.twice, self.looped = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.stem(x)).relu()
        x = self.norms[1](self.alone(x)).relu()
        y = self.twice(x)
        x = self.norms[2](y) + y
        x = self.norms[3](self.looped(x).relu())
        x = self.norms[4](self.looped(x))
        return self.head(x.mean((2, 3)))


def test_norms_that_cannot_be_folded_stay() -> None:
    model = perturb(tn.convert(Reads().double(), tn.Slimmable(widths=(0.5, 1.0)))).eval()
    for width in (0.5, 1.0):
        tn.set_width(model, width)
        folded = tn.freeze(model, width, fold_norms=True)
        assert_close(folded(IMAGES), model(IMAGES), 1e-12, "norms folded where possible")
        left = [isinstance(norm, nn.BatchNorm2d) for norm in folded.norms]
        assert left == [False, False, True, True, True]


def test_parts_of_a_network() -> None:
    """Stages where shapes change by a projection; the insides of blocks where a shortcut ties their ends."""
    projection = groups(supernet(), (3, 32, 32))
    assert [part[0] for part in projection] == [
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer1.2.conv1",
        "layer2.0.conv1",
        "layer3.0.conv1",
        "conv1",
    ]
    assert all(name.startswith("layer2.") for name in projection[3])
    padded = tn.convert(tn.create_model("resnet20"), tn.Slimmable(widths=(0.5, 1.0)))
    assert [len(part) for part in groups(padded, (3, 32, 32))] == [1] * 9 + [10]
    assert groups(ds_net(), (3, 32, 32)) == [("stem",), ("stages.0",), ("stages.1",), ("stages.2",)]
    assert width_slots(ds_net())["stages.1"] == [12, 16, 24, 24]


def test_a_layer_that_runs_twice_has_one_width() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.last(self.twice(self.twice(self.stem(x)).relu()).relu()).mean((2, 3)))

    model = tn.convert(Loop().eval(), tn.Slimmable(widths=(0.5, 1.0)))
    assert groups(model, (3, 8, 8)) == [("last",), ("stem", "twice")]
    frozen = tn.freeze(model, {"last": 0.5}, input_size=(3, 8, 8))
    assert [frozen.get_submodule(name).weight.shape[0] for name in ("stem", "twice", "last")] == [8, 8, 4]
    with pytest.raises(tn.ConfigError, match=r"do not fit together: PlainConv2d reads \[8\] channels, got 4"):
        tn.freeze(model, {"twice": 0.5}, input_size=(3, 8, 8))


def test_widths_by_name_written_out() -> None:
    """A chain with a width for each layer, computed from slices of the stored tensors."""
    model = perturb(tn.convert(NETWORKS["chain"].make(), tn.Slimmable(widths=(0.25, 0.5, 1.0)))).eval()
    x, outs = NETWORKS["chain"].image(), {"stem": 4, "0": 2, "1": 8, "2": 4, "3": 2}
    names = {8: "", 4: "_1", 2: "_0"}

    def norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
        c, key = x.shape[1], names[x.shape[1]]
        mean, var = layer.get_buffer(f"running_mean{key}"), layer.get_buffer(f"running_var{key}")
        return F.batch_norm(x, mean[:c], var[:c], layer.weight[:c], layer.bias[:c])

    out = norm(model.stem_norm, F.conv2d(x, model.stem.weight[:4], model.stem.bias[:4], padding=1)).relu()
    for number, (conv, layer) in enumerate(zip(model.convs, model.norms, strict=True)):
        c = outs[str(number)]
        out = norm(layer, F.conv2d(out, conv.weight[:c, : out.shape[1]], conv.bias[:c], padding=1)).relu()
    expected = F.linear(out.mean((2, 3)), model.head.weight[:, : out.shape[1]], model.head.bias).detach()
    by_name = {"stem": 0.5, r"convs\.0": 0.25, r"convs\.2": 0.5, r"convs\.3": "smallest"}
    frozen = tn.freeze(model, by_name, input_size=(3, 8, 8))
    assert_close(output(frozen, x), expected, 1e-12, "widths by name")
    assert_close(output(tn.freeze(model, (0.5, 0.25, 1.0, 0.5, 0.25)), x), expected, 1e-12, "widths in order")


@pytest.mark.parametrize("make", [supernet, ds_net])
def test_one_width_for_all_parts_is_that_width(make: Any) -> None:
    model = make()
    count = len(groups(model, (3, 32, 32)))
    for key, width in (("index", 0), ("index", 1), ("width", "largest")):
        same = tn.freeze(model, **{key: [width] * count})
        assert_close(output(same, IMAGES), output(tn.freeze(model, **{key: width}), IMAGES), 1e-12, f"all at {width}")


def test_stages_of_ds_net_have_widths_of_their_own() -> None:
    model = ds_net()
    frozen = tn.freeze(model, index={"stem": 0, r"stages\.0": 0, r"stages\.1": 2, r"stages\.2": 0})
    assert frozen.stages[1][1].pointwise.out_channels == 24
    assert frozen.stages[2][0].project.out_channels == 16
    assert frozen.stages[2][0].se.expand.out_channels == frozen.stages[2][0].depthwise.out_channels
    assert frozen(IMAGES).shape == (3, 5)
    macs = {w: tn.inspect(tn.freeze(model, index=w), (3, 32, 32)).macs for w in (0, 2)}
    assert macs[0] < tn.inspect(frozen, (3, 32, 32)).macs < macs[2]


@pytest.mark.parametrize(
    "choice",
    [
        {"width": 0.5},
        {"width": {"layer2": 0.5, "layer3": "smallest"}},
        {"index": [1, 0, 2, 0, 1, 2]},
        {"index": 1},
    ],
    ids=["one", "names", "parts", "index"],
)
@pytest.mark.parametrize("fold_norms", [False, True])
def test_frozen_networks_come_back(choice: Any, fold_norms: bool, tmp_path: Path) -> None:
    model = supernet()
    frozen = tn.freeze(model, **choice, fold_norms=fold_norms)
    step = {"verb": "freeze", **choice, **({"fold_norms": True} if fold_norms else {})}
    assert history(frozen)[-1] == json.loads(json.dumps(step))
    tn.save(frozen, tmp_path / "model")
    loaded = tn.load(tmp_path / "model")
    assert torch.equal(output(loaded, IMAGES), output(frozen, IMAGES))
    assert list(loaded.state_dict()) == list(frozen.state_dict())


def test_what_does_not_fit_together_is_refused() -> None:
    model, before = supernet(), None
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(tn.ConfigError, match=r"do not fit together.*need one width: .*layer2\.0\.conv1, layer2\.0\.conv2"):
        tn.freeze(model, {r"layer2\.1\.conv2": 0.5})
    with pytest.raises(
        tn.ConfigError, match=r"'layer9' matches no layer with a width of its own; expected one of conv1, layer1\.0\.conv1"
    ):
        tn.freeze(model, {"layer9": 0.5})
    with pytest.raises(
        tn.ConfigError, match=r"got 2 widths, expected 6, one for each part that can have its own: 0: layer1\.0\.conv1"
    ):
        tn.freeze(model, (0.5, 1.0))
    with pytest.raises(tn.ConfigError, match=r"no width 0\.3: expected 0\.25, 0\.5, 1, 'smallest'"):
        tn.freeze(model, {"layer2": 0.3})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_networks_that_were_frozen_are_refused() -> None:
    frozen = tn.freeze(supernet(), 0.5, fold_norms=True)
    with pytest.raises(
        tn.IncompatibleModelError, match=r"one width only, since it was frozen\. Freeze the network that it was"
    ):
        tn.freeze(frozen, 0.25)
    with pytest.raises(
        tn.IncompatibleModelError, match=r"they were folded into convolutions\. Recalibrate the network that"
    ):
        tn.recalibrate(frozen, [IMAGES])


def test_computed_weights_have_one_width() -> None:
    model = tn.convert(tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4)), tn.Slimmable(widths=(0.5, 1.0)))
    with pytest.raises(
        tn.IncompatibleModelError, match=r"layer 'convs\.0' is BasisConv2d: only plain layers can have widths of"
    ):
        tn.freeze(model, {"stem": 0.5})
    folded = tn.freeze(copy.deepcopy(model), 0.5, fold_norms=True)
    tn.set_width(model, 0.5)
    assert_close(output(folded, NETWORKS["chain"].image()), output(model.eval(), NETWORKS["chain"].image()), 1e-12, "basis")
