"""Slimming networks of other libraries, and modules as people write them: exact at every width, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from laws import at_each_width
from networks import randomise_norms
from thriftnet.core import head
from thriftnet.core.spaces import Space, count, mark_made, part, repeated, runs, unify


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)


def same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert [each.shape for each in got] == [each.shape for each in expected]
    for one, other in zip(got, expected, strict=True):
        assert other.isfinite().all()
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1e-3)


def exact(plain: nn.Module, x: Tensor, tmp_path: Path, widths: tuple[float, ...] = (0.4, 1.0)) -> nn.Module:
    """All that a slimmable network promises; returns the frozen narrow one."""
    expected = outputs(plain, x)
    slim = randomise_statistics(tn.convert(plain, tn.Slimmable(widths=widths, input_size=tuple(x.shape[1:]))))
    fresh = copy.deepcopy(slim)
    fresh.load_state_dict({key: value.clone() for key, value in slim.state_dict().items()}, assign=True)
    tn.save(slim, tmp_path / "slim")
    loaded = tn.load(tmp_path / "slim", model=plain).eval()
    assert head.outputs(loaded) == head.outputs(plain)
    for index in at_each_width(slim):
        got = outputs(slim, x)
        assert [each.shape for each in got] == [each.shape for each in expected]
        for other in (fresh, loaded):
            tn.set_width(other, index=index)
            same(outputs(other, x), got, 0.0)
        frozen = tn.freeze(slim, index=index)
        same(outputs(frozen, x), got)
        same(outputs(tn.fold(slim), x), got)
        assert not [m for m in frozen.modules() if type(m).__module__.startswith("thriftnet")]
        assert [type(m) for m in frozen.modules() if m.__module__.startswith(("timm", "torchvision"))] == [
            type(m) for m in plain.modules() if m.__module__.startswith(("timm", "torchvision"))
        ]
    same(got, expected)
    tn.set_width(slim, index=0)
    out = slim(x)
    sum(each.square().sum() for each in ([out] if isinstance(out, Tensor) else out)).backward()
    assert not [name for name, p in slim.named_parameters() if p.grad is None]
    return tn.freeze(slim, index=0)


def randomise_statistics(model: nn.Module) -> nn.Module:
    """Narrow statistics differ from wide ones."""
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean_0", "running_var_0")):
            buffer.uniform_(0.5, 1.5)
    return model


def timm_network(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=7, **kwargs)


def torchvision_network(name: str, **kwargs: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=7, **kwargs)


def shuffled() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 48], num_classes=7)


def mixer() -> nn.Module:
    from timm.models import MlpMixer

    return MlpMixer(num_classes=7, img_size=32, patch_size=8, num_blocks=1, embed_dim=32)


def standardised() -> nn.Module:
    from timm.layers import BatchNormAct2d, StdConv2d
    from timm.models import ResNetV2

    return ResNetV2([1, 1], channels=[16, 32], stem_chs=8, num_classes=7, conv_layer=StdConv2d, norm_layer=BatchNormAct2d)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenetv3": (lambda: timm_network("tf_mobilenetv3_small_minimal_100"), 32),
    "standardised": (standardised, 32),
    "vit": (lambda: timm_network("vit_tiny_patch16_224", img_size=32, depth=2), 32),
    "convnext": (lambda: timm_network("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 32),
    "xcit": (lambda: timm_network("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1), 32),
    "mixer": (mixer, 32),
    "shufflenet": (shuffled, 32),
    "squeezenet": (lambda: torchvision_network("squeezenet1_1"), 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_libraries(name: str, tmp_path: Path) -> None:
    make, side = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = randomise_norms(make().double()).eval()
        x = torch.randn(2, 3, side, side, dtype=torch.float64)
    narrow = exact(plain, x, tmp_path)
    assert sum(p.numel() for p in narrow.parameters()) < 0.8 * sum(p.numel() for p in plain.parameters())


class Heads(nn.Module):
    """Two linear heads and a 3 x 3 output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.map = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3)
        self.aux, self.head = nn.Linear(8, 10), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norm(self.stem(x)).relu()
        return [self.map(x), self.aux(x.mean((2, 3))), self.head(x.amax((2, 3)))]


class Counted(nn.Module):
    """Reshapes to a number of channels that its code knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x).relu()).relu())
        return self.head(x.mean((2, 3)).reshape(-1, 8))


class Pieces(nn.Module):
    """Concatenation, halves, shuffled groups, flattened maps, scales per channel, and layers without a class of their own in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.scale, self.fixed = nn.Parameter(torch.rand(12) + 0.5), nn.InstanceNorm2d(12, affine=True)
        self.up, self.mix = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.one(x), x[:, :1], self.two(x)[:, 1:]], 1)
        x = self.fixed(x * self.scale[:, None, None])
        a, b = self.up(x).chunk(2, 1)
        n, c, h, w = a.shape
        x = (a * b.sigmoid()).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h * w)
        return self.head(self.mix(x).flatten(1))


def test_every_output_stays_whole(tmp_path: Path) -> None:
    narrow = exact(
        randomise_norms(Heads().double()).eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64), tmp_path, (0.5, 1.0)
    )
    assert (narrow.stem.out_channels, narrow.map.out_channels, narrow.aux.out_features) == (4, 10, 10)


def test_channels_that_the_code_counts_stay_whole_and_the_plan_says_so(tmp_path: Path) -> None:
    plain = Counted().double().eval()
    narrow = exact(plain, torch.randn(2, 3, 8, 8, dtype=torch.float64), tmp_path, (0.5, 1.0))
    assert [layer.out_channels for layer in (narrow.first, narrow.second, narrow.third)] == [6, 4, 8]
    planned = tn.plan(plain, tn.Slimmable(widths=(0.5, 1.0)))
    assert [name for name, _ in planned.left] == ["head"]
    assert "the code of Counted fixes their number" in planned.left[0][1]
    assert "they reach the network's output" in planned.left[0][1]


def test_pieces_of_axes(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    narrow = exact(Pieces().double().eval(), x, tmp_path, (0.5, 1.0))
    assert (narrow.one.out_channels, narrow.two.out_channels, narrow.up.in_channels, narrow.up.out_channels) == (4, 3, 7, 4)
    assert (narrow.scale.shape, narrow.fixed.num_features, narrow.head.in_features) == ((7,), 7, 128)


def test_axes_are_equal_piece_by_piece() -> None:
    """Spaces are split where pieces end; what is of fixed size stays whole."""
    long, short, pair = Space(8), Space(3), Space(2)
    unify([(long, 1)], [(short, 1), (Space(5, "fixed"), 1)], "")
    assert [count([(space, 1)], 0.5) for space in (long, short)] == [7, 2]
    assert runs([(long, 1)], 0.5) == ((0, 2), (3, 8))
    unify([(Space(6), 1)], (flat := repeated([(pair, 1)], 1, 3)), "")
    assert (count(flat, 0.5), runs(flat, 0.5)) == (3, ((0, 3),))
    first = part([(Space(8), 1)], 0, 4)
    assert count(first, 0.5) == 2
    odd = [(Space(4), 3)]
    assert part(odd, 0, 4) is None, "a slice through channels that belong together"
    assert count(odd, 0.5) == 12
    mark_made(odd)
    assert odd[0][0].made


@pytest.mark.parametrize("given", [{"input_size": (3, 40, 40)}, {"example": torch.zeros(1, 3, 40, 40)}])
def test_the_size_of_images_given_to_convert_reaches_a_technique_that_runs_the_network(
    given: dict[str, Any], tmp_path: Path
) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 40 * 40, 10)).eval()
    with pytest.raises(tn.IncompatibleModelError, match="input_size"):
        tn.convert(plain, "slimmable")
    planned = tn.plan(plain, "slimmable", **given)
    for what in ("slimmable", planned):
        slim = tn.convert(plain, what, **given)
        tn.save(slim, tmp_path / "slim")
        loaded = tn.load(tmp_path / "slim", model=plain)
        x = torch.rand(2, 3, 40, 40)
        assert torch.equal(loaded(x), slim(x))
    assert torch.equal(tn.convert(plain, planned)(x), slim(x))  # the plan keeps it


class LargerInTraining(nn.Module):
    """A head that only training runs, and only on larger images than the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.auxiliary, self.head = nn.Conv2d(8, 4, 20), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).relu()
        out = self.head(x.mean((2, 3)))
        return out + self.auxiliary(x).mean() if self.training else out


def test_a_size_for_training_is_found() -> None:
    model = tn.convert(LargerInTraining(), "slimmable(widths=(0.5, 1.0))").train()
    tn.set_width(model, 0.5)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
