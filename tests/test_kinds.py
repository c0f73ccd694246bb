"""Layers of classes derived from `nn.Conv2d` and `nn.Linear`: what their class does with its weight, it does with the new one."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thriftnet as tn
from laws import assert_close, output
from networks import perturb
from thriftnet.core.conv import is_convolution, signature
from thriftnet.core.kinds import executed
from thriftnet.core.linear import is_linear


class Standardised(nn.Conv2d):
    """Its weight has mean 0 and variance 1, times a trained gain."""

    def __init__(self, *arguments: int, eps: float = 1e-5, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.eps = eps
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.gain * (self.weight - mean) / (std + self.eps), self.bias, self.stride, self.padding)


class SamePadded(nn.Conv2d):
    """Its output has ceil(size / stride) pixels, whatever the size."""

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (s, _) = self.kernel_size, self.stride
        rows, columns = (max(0, (math.ceil(size / s) - 1) * s + k - size) for size in x.shape[-2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


class StandardisedAndPadded(Standardised):
    """Both."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class Casting(nn.Linear):
    """As timm's Linear: does what its parent does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


KINDS = (Standardised, SamePadded, StandardisedAndPadded, nn.Conv2d)


def network(kind: type[nn.Conv2d]) -> nn.Module:
    torch.manual_seed(0)
    convs = [kind(8, 8, 3, padding=0 if "Padded" in kind.__name__ else 1) for _ in range(4)]
    head = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), Casting(8, 8), Casting(8, 8), nn.Linear(8, 3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *convs, *head).double().eval()
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # outputs that differ from image to image
    return model


def image() -> Tensor:
    return torch.randn(3, 3, 13, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


CONFIGS = (
    "weight-sharing",
    "weight-sharing(fusion='channel_weighted_mean')",
    "soft-sharing",
    "filter-basis(shared_rank=4)",
    "low-rank",
    "low-rank(form='channel')",
)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_techniques_take_them(kind: type[nn.Conv2d], config: str) -> None:
    plain, x = network(kind), image()
    if executed(plain[1]) is None and not config.startswith(("weight", "soft")):
        with pytest.raises(tn.IncompatibleModelError, match=r"layer '1' is StandardisedAndPadded"):
            tn.convert(plain, config, select=["1"])
        return
    model = perturb(tn.convert(plain, config)).eval()
    assert type(model[1]) is not kind
    folded = tn.fold(model)
    assert isinstance(folded[1], nn.Conv2d)
    assert_close(output(folded, x), output(model, x), 1e-12, "fold")
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own bytes
        assert torch.equal(output(copied, x), output(model, x))
        copied.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        assert torch.equal(output(copied, x), output(model, x))
    if kind is not SamePadded:  # cannot be traced as it is
        assert_close(output(torch.fx.symbolic_trace(model), x), output(model, x), 1e-12, "traced")
    if config in ("soft-sharing", "low-rank"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(output(compiled, x), output(model, x), 1e-12, "compiled")
        torch._dynamo.reset()


@pytest.mark.parametrize("config", ["weight-sharing(rate=1)", "soft-sharing(templates=4)", "low-rank(rank=1.0)"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_capacity(kind: type[nn.Conv2d], config: str) -> None:
    plain = network(kind)
    if executed(plain[1]) is None and config.startswith("low-rank"):
        return
    model = tn.convert(plain, config, select=["1", "2", "3", "4"])
    assert_close(output(model, image()), output(plain, image()), 1e-12, "full capacity")


def test_shared_layers_stay_of_their_class() -> None:
    model = tn.convert(network(Standardised), "weight-sharing")
    assert isinstance(model[1], Standardised)
    assert model[1] is model[2]
    assert {name for name, _ in model[1].named_parameters()} == {"weight", "bias", "gain"}
    assert type(tn.fold(model)[1]) is Standardised
    assert signature(Standardised(8, 8, 3)) != signature(Standardised(8, 8, 3, eps=1e-3))
    assert signature(Standardised(8, 8, 3)) != signature(nn.Conv2d(8, 8, 3))


def test_extra_attributes_are_kept() -> None:
    model = network(nn.Conv2d)
    for layer in (model[1], model[2]):
        layer.drop_rate = 0.5
        layer.register_buffer("steps", torch.ones(()))
    converted = tn.convert(model, "soft-sharing", select=["1", "2"])
    assert converted[1].drop_rate == 0.5
    assert converted[1].steps == 1
    assert tn.fold(converted)[1].drop_rate == 0.5


def test_classes_that_compute_several_things_have_no_executed_weight() -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight + torch.randn_like(self.weight), self.bias)

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Sparse(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * self.training, self.bias)

    for kind in (Noisy, Scaled, Sparse, StandardisedAndPadded):
        assert executed(kind(4, 4, 3)) is None
    assert executed(conv := SamePadded(4, 4, 2, 2)) is conv, "padding depends on the size"
    made = executed(Standardised(4, 4, 3))
    assert type(made) is nn.Conv2d
    assert made.weight.mean((1, 2, 3)).abs().max() < 1e-6


def test_layers_without_a_plain_weight_are_left_alone() -> None:
    complex_conv = nn.Conv2d(4, 4, 3, dtype=torch.complex64)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    replaced = nn.Conv2d(4, 4, 3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    for layer in (complex_conv, parametrized, replaced, nn.LazyConv2d(4, 3), nn.ConvTranspose2d(4, 4, 3)):
        assert not is_convolution(layer)
    assert not is_linear(nn.Linear(4, 4, dtype=torch.complex64))
    assert not is_linear(nn.Bilinear(4, 4, 4))


@pytest.mark.parametrize("config", ["weight-sharing", "soft-sharing", "filter-basis(shared_rank=2)"])
def test_layers_of_different_types_do_not_share(config: str) -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, dtype=dtype) for dtype in (torch.float32, torch.float64) for _ in range(3)))
    converted = tn.convert(model, config, select=r".*")
    assert [next(layer.parameters()).dtype for layer in converted] == [torch.float32] * 3 + [torch.float64] * 3
    assert {parameter.dtype for parameter in converted[:3].parameters()} == {torch.float32}
