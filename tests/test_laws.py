"""Every law, for every technique, on every tiny network."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import data_parallel
import laws
import thriftnet as tn
from networks import LOOPED, NETWORKS, Network, perturb
from thriftnet.core.spec import format_spec
from thriftnet.core.tied import count_params
from thriftnet.core.width import set_width, widths

CONFIGS: dict[str, Any] = {
    "weight": tn.WeightSharing(),
    "weight-channel": tn.WeightSharing(fusion="channel_weighted_mean"),
    "weight-strided-scalar": tn.WeightSharing(mapping="strided", fusion="scalar_weighted_mean"),
    "soft": tn.SoftSharing(templates=2),
    "basis": tn.FilterBasis(shared_rank=4, unique_rank=1),
    "basis-double": tn.FilterBasis(shared_rank=4, unique_rank=1, bases=2),
    "basis-whole": tn.FilterBasis(whole=True),
    "shift": tn.Shift(expansion=2.0),
    "slimmable": tn.Slimmable(widths=(0.5, 1.0)),
    "slimmable-gate": tn.Slimmable(widths=(0.5, 1.0), gate=True),
}
FIVE = ("weight", "soft", "basis", "shift", "slimmable")
SHARING = [name for name in CONFIGS if name not in ("shift", "slimmable", "slimmable-gate")]

every_config = pytest.mark.parametrize("config", CONFIGS)
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def converted(network: Network, config: str, seed: int = 0) -> nn.Module:
    """The converted network with all its values moved away from where the conversion put them, in eval mode."""
    torch.manual_seed(11)
    return perturb(tn.convert(network.make(seed), CONFIGS[config])).eval()


def tied(config: str) -> Network:
    """A network in which the technique's layers have several names."""
    return NETWORKS["chain"] if config in SHARING else LOOPED


def test_the_technique_table_is_covered() -> None:
    assert {type(config) for config in CONFIGS.values()} == {*tn.TECHNIQUES.values()}


@every_network
@every_config
def test_01_input_untouched(config: str, network: Network) -> None:
    laws.law_input_untouched(network.make(), CONFIGS[config])
    laws.law_plan_is_dry(network.make(), CONFIGS[config])


@every_config
def test_01_inplace_gives_the_same_network(config: str) -> None:
    network = NETWORKS["residual"]
    model, outside = network.make(), network.make()
    torch.manual_seed(5)
    inside = tn.convert(model, CONFIGS[config], inplace=True)
    torch.manual_seed(5)
    outside = tn.convert(outside, CONFIGS[config])
    assert inside is model
    laws.assert_same_network(inside, outside, network.image())


def full_capacity(network: Network) -> dict[str, tuple[Any, str | None]]:
    """Configs with as much capacity as the dense network, and where they have it. A shift block never has."""
    layers, entries = network.equal_count, network.equal_channels * 9
    return {
        "weight": (tn.WeightSharing(rate=1), None),
        "weight-channel": (tn.WeightSharing(rate=1, fusion="channel_weighted_mean"), None),
        "soft": (tn.SoftSharing(templates=layers), network.equal_layers),
        "basis": (tn.FilterBasis(shared_rank=entries, unique_rank=0), network.equal_inputs),
        "basis-double": (tn.FilterBasis(shared_rank=entries, unique_rank=0, bases=2), network.equal_inputs),
        "basis-unique": (tn.FilterBasis(shared_rank=entries // 2, unique_rank=entries // 2), network.equal_inputs),
        "slimmable": (tn.Slimmable(widths=(1.0,)), None),
    }


@every_network
@pytest.mark.parametrize("config", full_capacity(NETWORKS["chain"]))
def test_02_full_capacity(config: str, network: Network) -> None:
    technique, select = full_capacity(network)[config]
    laws.law_full_capacity(network.make(), technique, network.image(), select)


def test_02_slimmable_at_its_widest_is_the_network_it_came_from() -> None:
    for network in NETWORKS.values():
        laws.law_full_capacity(network.make(), CONFIGS["slimmable"], network.image())


@every_network
@every_config
def test_03_fold_is_equal(config: str, network: Network) -> None:
    laws.law_fold_is_equal(converted(network, config), network.image())


@every_network
@every_config
def test_04_fold_is_plain(config: str, network: Network) -> None:
    laws.law_fold_is_plain(converted(network, config))


@every_network
@every_config
def test_05_every_parameter_gets_a_gradient(config: str, network: Network) -> None:
    laws.law_gradients(converted(network, config), network.image())
    laws.law_no_dense_leftover(network.make(), CONFIGS[config])


@every_network
@every_config
def test_05_penalty_counts_once(config: str, network: Network) -> None:
    laws.law_penalty_once(converted(network, config))


@every_network
@every_config
def test_06_state_dict(config: str, network: Network) -> None:
    laws.law_state_dict(converted(network, config), tn.convert(network.make(7), CONFIGS[config]).eval(), network.image())


@every_config
def test_06_state_dict_of_a_looped_network(config: str) -> None:
    laws.law_state_dict(converted(LOOPED, config), tn.convert(LOOPED.make(7), CONFIGS[config]).eval(), LOOPED.image())


@every_config
def test_06_save_and_load(config: str, tmp_path: Path) -> None:
    network = NETWORKS["residual"]
    laws.law_save_load(converted(network, config), network.make(7), network.image(), tmp_path / "model")


@every_config
def test_07_aliases(config: str) -> None:
    network = tied(config)
    fresh = tn.convert(network.make(7), CONFIGS[config]).eval()
    laws.law_aliases(converted(network, config), lambda: perturb(fresh, 9), network.image())


@every_config
def test_08_copies_keep_ties(config: str) -> None:
    network = tied(config)
    laws.law_copies_keep_ties(converted(network, config), network.image())


ON_TWO_NETWORKS = [(config, "chain") for config in CONFIGS] + [
    (config, "depthwise") for config in ("soft", "shift", "slimmable")
]


@pytest.mark.parametrize(("config", "network"), ON_TWO_NETWORKS)
def test_09_compiles(config: str, network: str) -> None:
    laws.law_compiles(converted(NETWORKS[network], config), NETWORKS[network].image())


# ------------------------------------------------------------------------------------------------ law 10: by hand
# The chain: a stem 3 -> 8 with bias, four equal 3 x 3 convolutions 8 -> 8 with bias, five norms, a head 8 -> 5,
# on images of 8 x 8. Written out as C = 8 channels, L = 4 layers, K = 9 kernel entries, A = 64 positions.
C, L, K, A = 8, 4, 9, 64
OTHERS = (3 * C * K + C) + (L + 1) * 2 * C + (C * 5 + 5)
OTHERS_MACS = A * 3 * C * K + C * 5
WEIGHT, CONV = C * C * K, C * C * K + C
PARAMS = {
    "weight": OTHERS + L // 2 * CONV,
    "weight-channel": OTHERS + L * CONV + L * C,
    "weight-strided-scalar": OTHERS + L * CONV + L,
    "soft": OTHERS + 2 * WEIGHT + L * (2 + C),
    "basis": OTHERS + (4 + L * 1) * C * K + L * (2 * 5 + C * 5 + C),
    "basis-double": OTHERS + (2 * 4 + L * 1) * C * K + L * (2 * 5 + C * 5 + C),
    "basis-whole": OTHERS + CONV,
    "shift": OTHERS + L * (C * 2 * C + 2 * 2 * C + 2 * C * C + C),
    "slimmable": OTHERS + L * CONV,
    "slimmable-gate": OTHERS + L * CONV + (4 * C + 4) + 2 * 4,
}
MACS = {
    "weight": OTHERS_MACS + L * A * WEIGHT,
    "weight-channel": OTHERS_MACS + L * A * WEIGHT,
    "weight-strided-scalar": OTHERS_MACS + L * A * WEIGHT,
    "soft": OTHERS_MACS + L * A * WEIGHT,
    "basis": OTHERS_MACS + L * A * (C * K * 5 + 5 * C),
    "basis-double": OTHERS_MACS + L * A * (C * K * 5 + 5 * C),
    "basis-whole": OTHERS_MACS + L * A * WEIGHT,
    "shift": OTHERS_MACS + L * A * (C * 2 * C + 2 * C * C),
    "slimmable": OTHERS_MACS + L * A * WEIGHT,
    "slimmable-gate": OTHERS_MACS + L * A * WEIGHT,  # at a fixed width the gate does not run
}
# Each use of a layer computes its weight: a bank of 2 templates in each of 4 layers; 2 members in each of 4 uses.
GENERATION_MACS = {"soft": L * 2 * WEIGHT, "weight-channel": L * 2 * WEIGHT, "weight-strided-scalar": L * 2 * WEIGHT}


@every_config
def test_10_parameters_are_what_the_formulas_say(config: str) -> None:
    model = converted(NETWORKS["chain"], config)
    assert sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values()) == PARAMS[config]
    assert count_params(model) == PARAMS[config]
    assert tn.plan(NETWORKS["chain"].make(), CONFIGS[config]).params_after == PARAMS[config]


@every_config
def test_10_inspect_agrees_with_the_formulas(config: str) -> None:
    report = tn.inspect(converted(NETWORKS["chain"], config), (3, 8, 8))
    assert report.params == PARAMS[config]
    assert report.macs == MACS[config]
    assert report.generation_macs == GENERATION_MACS.get(config, 0)
    assert report.to_dict()["params"] == PARAMS[config]
    assert report.to_dict()["macs"] == MACS[config]


def test_10_macs_shrink_with_the_width() -> None:
    model = converted(NETWORKS["chain"], "slimmable")
    set_width(model, 0.5)
    half = C // 2
    assert tn.inspect(model, (3, 8, 8)).macs == A * 3 * half * K + L * A * half * half * K + half * 5


# ------------------------------------------------------------------------------------------------ laws 11 to 16


@every_config
def test_11_spec(config: str) -> None:
    laws.law_spec(CONFIGS[config])
    laws.law_plan_json(NETWORKS["residual"].make(), CONFIGS[config], NETWORKS["residual"].image())


@every_config
def test_11_text_does_the_same_as_the_config(config: str) -> None:
    network = NETWORKS["chain"]
    torch.manual_seed(5)
    by_config = tn.convert(network.make(), CONFIGS[config])
    torch.manual_seed(5)
    by_text = tn.convert(network.make(), format_spec(CONFIGS[config]))
    laws.assert_same_network(by_text, by_config, network.image())


# What each technique leaves for the next: a shift block and a basis leave 1 x 1 convolutions, which weight sharing takes
# and the k x k techniques do not; a bank leaves nothing to tie or decompose; slimmable takes what any of them made.
COMPOSE = {
    ("weight", "soft"),
    ("weight", "basis"),
    ("weight", "shift"),
    ("shift", "weight"),
    ("basis", "weight"),
    *itertools.product(("weight", "soft", "basis", "shift"), ("slimmable",)),
    *itertools.product(("slimmable",), ("weight", "soft", "basis", "shift")),
}


@pytest.mark.parametrize("network", [NETWORKS["chain"], NETWORKS["residual"]], ids=lambda network: network.name)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FIVE, 2)), ids=lambda name: name)
def test_12_pairs(first: str, second: str, network: Network) -> None:
    torch.manual_seed(5)
    composes = laws.law_pair(network.make(), CONFIGS[first], CONFIGS[second], network.image())
    if network.name == "chain":  # in the other network some groups grow too small for a second technique
        assert composes == ((first, second) in COMPOSE)


@pytest.mark.parametrize("second", [name for name in CONFIGS if name not in (*FIVE, "slimmable-gate")])
def test_12_variants_compose_with_widths(second: str) -> None:
    network = NETWORKS["residual"]
    for one, other in (("slimmable", second), (second, "slimmable")):
        assert laws.law_pair(network.make(), CONFIGS[one], CONFIGS[other], network.image())


@pytest.mark.parametrize("network", [NETWORKS["chain"], NETWORKS["residual"]], ids=lambda network: network.name)
@pytest.mark.parametrize("other", [name for name in CONFIGS if name != "slimmable-gate"])
def test_12_pairs_with_a_gate(other: str, network: Network) -> None:
    """Behind a gate the same techniques compose; before it, where a layer would be on both sides of it, it refuses."""
    behind = laws.law_pair(network.make(), CONFIGS["slimmable-gate"], CONFIGS[other], network.image())
    before = laws.law_pair(network.make(), CONFIGS[other], CONFIGS["slimmable-gate"], network.image())
    if network.name == "residual":
        assert (behind, before) == GATE_COMPOSES.get(other, (True, True))


# a filter basis that is one layer for the whole network is on both sides of the gate
GATE_COMPOSES: dict[str, tuple[bool, bool]] = {"slimmable": (False, False), "basis-whole": (True, False)}


def test_12_three_techniques_compose() -> None:
    network = NETWORKS["residual"]
    shifted = tn.convert(network.make(), CONFIGS["shift"])
    assert laws.law_pair(shifted, CONFIGS["weight"], CONFIGS["slimmable"], network.image())
    assert laws.law_pair(shifted, CONFIGS["slimmable"], CONFIGS["weight"], network.image())


@every_config
def test_13_nothing_to_convert(config: str) -> None:
    laws.law_nothing_to_convert(CONFIGS[config])


@every_config
def test_14_average_moves_once(config: str) -> None:
    laws.law_average_moves_once(converted(tied(config), config))


def test_15_two_processes_equal_one(tmp_path: Path) -> None:
    network = NETWORKS["chain"]
    models = {config: converted(network, config) for config in CONFIGS}
    narrow = converted(network, "slimmable")
    set_width(narrow, index=0)
    models["slimmable-narrow"] = narrow
    x = torch.cat([network.image(0), network.image(1)])[:4]
    target = torch.arange(4) % 5
    one = {config: data_parallel.gradients(model, x, target) for config, model in models.items()}
    two = data_parallel.gradients_of_two_processes(models, x, target, tmp_path)
    assert two.keys() == one.keys()
    for config, grads in one.items():
        assert two[config].keys() == grads.keys()
        for name, grad in grads.items():
            laws.assert_close(two[config][name], grad, 1e-10, f"{config}: gradient of {name!r}")


@pytest.mark.parametrize(("config", "network"), ON_TWO_NETWORKS)
def test_16_exports(config: str, network: str) -> None:
    laws.law_exports(converted(NETWORKS[network], config), NETWORKS[network].image())


@every_config
def test_16_onnx(config: str, tmp_path: Path) -> None:
    laws.law_onnx(converted(NETWORKS["chain"], config), NETWORKS["chain"].image(), tmp_path / "model.onnx")


def test_networks_differ_with_their_seed_and_stay_with_it() -> None:
    for network in (*NETWORKS.values(), LOOPED):
        one, same, other = network.make(0), network.make(0), network.make(1)
        outs: list[Tensor] = [laws.output(model, network.image()) for model in (one, same, other)]
        assert torch.equal(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2])
    assert widths(NETWORKS["chain"].make()) == ()
    assert importlib.util.find_spec("torchvision") is not None
