"""A sixth technique, written here in one screen, keeps the same laws and is called by the same verbs.

Scaled signs (Rastegari et al., XNOR-Net, ECCV 2016, section 3.1): every filter is its signs times its mean magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import laws
import thriftnet as tn
from networks import LOOPED, NETWORKS, Network, perturb
from thriftnet.core.conv import Convolution, GeneratedConv2d, is_convolution
from thriftnet.core.sites import Replacement, Site
from thriftnet.errors import ConfigError
from thriftnet.techniques import TECHNIQUES


class ScaledSignConv2d(GeneratedConv2d):
    """A convolution whose filters are signs times a scale; gradients pass the sign as if it were not there."""

    def __init__(self, like: Convolution) -> None:
        super().__init__(like)
        self.latent = nn.Parameter(like.weight.detach().clone())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        scale = self.latent.detach().abs().mean((1, 2, 3), keepdim=True)
        return self.latent + (scale * self.latent.detach().sign() - self.latent.detach())


@dataclass(frozen=True, kw_only=True)
class ScaledSign:
    """Replace filters by their scaled signs. With ``twins`` pairs of equal layers share them."""

    takes: ClassVar[str] = "convolutions with groups=1 and a weight of their own"

    twins: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.twins, bool):
            raise ConfigError(f"twins={self.twins!r}: possible are True and False")

    def accepts(self, module: nn.Module) -> bool:
        return is_convolution(module) and module.groups == 1

    def group(self, sites: Sequence[Site[nn.Conv2d]]) -> list[list[Site[nn.Conv2d]]]:
        if not self.twins:
            return [[site] for site in sites]
        equal: dict[str, list[Site[nn.Conv2d]]] = {}
        for site in sites:
            equal.setdefault(site.module.extra_repr(), []).append(site)
        return [sites[i : i + 2] for sites in equal.values() for i in range(0, len(sites) - 1, 2)]

    def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
        layer = ScaledSignConv2d(group[0].module)
        return [(site.module, layer) for site in group]


CONFIGS = {"single": ScaledSign(), "twins": ScaledSign(twins=True)}
FIVE: list[Any] = [
    tn.WeightSharing(),
    tn.SoftSharing(templates=2),
    tn.FilterBasis(shared_rank=4),
    tn.Shift(expansion=2.0),
    tn.Slimmable(widths=(0.5, 1.0)),
]


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one line in the table."""
    monkeypatch.setitem(TECHNIQUES, "scaled-sign", ScaledSign)


def converted(network: Network, technique: Any, seed: int = 0) -> nn.Module:
    return perturb(tn.convert(network.make(seed), technique)).eval()


@pytest.mark.parametrize("network", [NETWORKS["residual"], NETWORKS["depthwise"], LOOPED], ids=lambda network: network.name)
@pytest.mark.parametrize("technique", CONFIGS.values(), ids=CONFIGS)
def test_the_laws_hold(technique: ScaledSign, network: Network) -> None:
    if technique.twins and network is LOOPED:
        technique = ScaledSign()  # its ties are in the network already
    laws.law_input_untouched(network.make(), technique)
    laws.law_plan_is_dry(network.make(), technique)
    model, x = converted(network, technique), network.image()
    laws.law_fold_is_equal(model, x)
    laws.law_fold_is_plain(model)
    laws.law_gradients(model, x)
    laws.law_no_dense_leftover(network.make(), technique)
    laws.law_penalty_once(model)
    laws.law_state_dict(model, tn.convert(network.make(7), technique).eval(), x)
    laws.law_copies_keep_ties(model, x)
    laws.law_average_moves_once(model)
    laws.law_plan_json(network.make(), technique, x)
    if technique.twins:
        assert laws.ties(model)[0] < laws.ties(model)[1]


def test_its_aliases_load() -> None:
    network, technique = NETWORKS["chain"], ScaledSign(twins=True)
    model = converted(network, technique)
    fresh = tn.convert(network.make(7), technique).eval()
    laws.law_aliases(model, lambda: perturb(fresh, 9), network.image())


def test_it_compiles_and_exports(tmp_path: Path) -> None:
    network = NETWORKS["chain"]
    model = converted(network, ScaledSign(twins=True))
    laws.law_compiles(model, network.image())
    laws.law_exports(model, network.image())
    laws.law_onnx(model, network.image(), tmp_path / "model.onnx")


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    network = NETWORKS["residual"]
    model = converted(network, ScaledSign(twins=True))
    laws.law_save_load(model, network.make(7), network.image(), tmp_path / "model")


@pytest.mark.parametrize("other", FIVE, ids=lambda other: type(other).__name__)
def test_it_pairs_with_the_five(other: Any) -> None:
    network = NETWORKS["chain"]
    then_toy = laws.law_pair(network.make(), other, ScaledSign(), network.image())
    toy_then = laws.law_pair(network.make(), ScaledSign(), other, network.image())
    if isinstance(other, tn.Slimmable):
        assert then_toy
        assert toy_then
    if isinstance(other, tn.WeightSharing | tn.Shift):
        assert then_toy  # plain weights are left for it


def test_it_has_a_text_name() -> None:
    for technique in CONFIGS.values():
        laws.law_spec(technique)
        laws.law_nothing_to_convert(technique)
    network = NETWORKS["chain"]
    by_text = tn.convert(network.make(), "scaled-sign(twins=True)")
    laws.assert_same_network(by_text, tn.convert(network.make(), ScaledSign(twins=True)), network.image())
    assert tn.plan(network.make(), "ScaledSign").technique == ScaledSign()
    with pytest.raises(tn.ConfigError, match=r"unknown technique 'scaled-sgn': did you mean 'scaled-sign'\?"):
        tn.convert(network.make(), "scaled-sgn")
    with pytest.raises(tn.ConfigError, match=r"unknown field of scaled-sign 'twin': did you mean 'twins'\?"):
        tn.convert(network.make(), "scaled-sign(twin=True)")
    with pytest.raises(tn.ConfigError, match="twins=1: possible are True and False"):
        tn.convert(network.make(), "scaled-sign(twins=1)")


def test_what_it_computes() -> None:
    conv = nn.Conv2d(2, 3, 3)
    layer = ScaledSignConv2d(conv)
    expected = torch.stack([row.abs().mean() * row.sign() for row in conv.weight.detach()])
    laws.assert_close(layer.weight.detach(), expected, 1e-6, "scaled signs")
    assert tn.inspect(tn.convert(NETWORKS["chain"].make(), ScaledSign()), (3, 8, 8)).params == 2685
