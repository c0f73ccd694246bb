"""Soft sharing: a training step and a forward against the plain wide ResNet, and the mixing by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.baselines import with_original_mixing
from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from benchmarks.networks import batch, forward, settled, trained_step
from thriftnet.core.fold import fold
from thriftnet.models import create_model
from thriftnet.techniques.soft_sharing import SConv2d, TemplateBank

TOPIC = "soft-sharing"
P2_LARGE = Target("P2", "training step against the plain network, default malloc", 1.15)
P2_FAST = Target("P2m", "training step against the plain network, with mallopt", 1.05)
P2F = Target("P2f", "folded forward against the plain network: equal, within what two runs differ by", 1.05)


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        yield from (mixing_case(layers, 160, size=layers) for layers in (2, 3, 4, 6, 8, 12, 16))
        return
    yield mixing_case(6, 64 if settings.quick else 320)
    yield step_case(settings)
    yield forward_case(settings)


def networks(settings: Settings) -> tuple[nn.Module, nn.Module]:
    """The plain wide ResNet and the one with banks."""
    torch.manual_seed(0)
    depth, width = (16, 2) if settings.quick else (28, 10)
    templates = 2 if settings.quick else 6
    return create_model("wrn", depth=depth, width=width), create_model("swrn", depth=depth, width=width, templates=templates)


def step_case(settings: Settings) -> Case:
    """Plain, ours, and the authors' variant, at batch 4, where computing weights weighs most."""
    plain, ours = networks(settings)
    x, labels = batch(4, 32)
    variants = {
        "plain network": trained_step(plain.train(), x, labels),
        "thriftnet": trained_step(ours.train(), x, labels),
        "original mixing": trained_step(with_original_mixing(copy.deepcopy(ours)).train(), x, labels),
    }
    name = "training step, batch 4, " + ("SWRN-16-2-2" if settings.quick else "SWRN-28-10-6")
    ratios = [
        Ratio("thriftnet", "plain network", P2_LARGE, "no mallopt"),
        Ratio("thriftnet", "plain network", P2_FAST, "mallopt"),
        Ratio("original mixing", "plain network"),
    ]
    return Case(TOPIC, name, variants, ratios, rounds=7, apart=frozenset({"plain network"}), tolerance=1e-4)


def forward_case(settings: Settings) -> Case:
    """Folded, plain, and unfolded, for one image."""
    plain, ours = (settled(model).eval() for model in networks(settings))
    x, _ = batch(1, 32)
    variants = {
        "plain network": forward(plain, x),
        "thriftnet, folded": forward(fold(ours), x),
        "thriftnet": forward(ours, x),
        "original mixing": forward(with_original_mixing(copy.deepcopy(ours)), x),
    }
    ratios = [
        Ratio("thriftnet, folded", "plain network", P2F),
        Ratio("thriftnet", "plain network"),
        Ratio("original mixing", "plain network"),
    ]
    name = "forward, batch 1, " + ("SWRN-16-2-2" if settings.quick else "SWRN-28-10-6")
    return Case(TOPIC, name, variants, ratios, 11, frozenset({"plain network"}), tolerance=1e-4)


def mixing_case(layers: int, channels: int, size: float | None = None) -> Case:
    """Computing the weights of all layers, forward and backward, with as many templates as layers."""
    torch.manual_seed(0)
    bank = TemplateBank(layers, channels, channels, 3)
    convs = [SConv2d(bank) for _ in range(layers)]
    grads = [torch.randn(channels, channels, 3, 3) for _ in range(layers)]
    floor = torch.empty_like(bank.templates)

    def run(weight: Callable[[SConv2d], Tensor]) -> Callable[[], object]:
        def forward_backward() -> object:
            weights = [weight(conv) for conv in convs]
            sources = [bank.templates, *(conv.coefficients for conv in convs)]
            return [w.detach()[:1] for w in weights], torch.autograd.grad(weights, sources, grads)

        return forward_backward

    variants: dict[str, Callable[[], object]] = {
        "two copies": lambda: (floor.copy_(bank.templates.detach()), floor.clone()),
        "thriftnet": run(lambda conv: conv.weight),
        "one product per layer": run(lambda conv: bank.mix(conv.coefficients)),
        "original": run(lambda conv: (bank.templates * conv.coefficients.view(-1, 1, 1, 1, 1)).sum(0)),
    }
    ratios = [Ratio(name, "two copies") for name in list(variants)[1:]]
    name = f"mixing forward + backward, {layers} layers and templates of {channels} x {channels} x 3 x 3"
    return Case(TOPIC, name, variants, ratios, 9, frozenset({"two copies"}), tolerance=1e-3, size=size)
