"""Ties survive what PyTorch does to networks beyond the laws (deepcopy, pickle, `.to`, DDP and EMA are there)."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import fully_sharded
import laws
import thriftnet as tn
from networks import NETWORKS
from test_laws import CONFIGS, converted, every_config, tied


@every_config
def test_loading_with_assign_keeps_ties(config: str) -> None:
    network = tied(config)
    model = converted(network, config)
    fresh = tn.convert(network.make(7), CONFIGS[config]).eval()
    before = laws.ties(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh.load_state_dict(state, assign=True)
    assert laws.ties(fresh) == before
    held = set(laws.storages(list(fresh.state_dict().values())))
    assert held == set(laws.storages(list(state.values()))), "a tensor was copied, or one that was not given is still in use"
    laws.assert_same_network(fresh, model, network.image())
    fresh.load_state_dict({alias: state[names[0]] for names in laws.aliases(model).values() for alias in names}, assign=True)
    assert laws.ties(fresh) == before
    laws.assert_same_network(fresh, model, network.image())


@every_config
def test_the_meta_device_keeps_ties(config: str) -> None:
    network = tied(config)
    model = converted(network, config)
    empty = copy.deepcopy(model).to("meta")
    assert laws.ties(empty) == laws.ties(model)
    assert list(empty.state_dict()) == list(model.state_dict())
    with torch.device("meta"):
        there = tn.convert(network.build(), CONFIGS[config]).double().eval()
    for hollow in (empty.to_empty(device="cpu"), there):
        assert laws.ties(hollow) == laws.ties(model)
        hollow.load_state_dict(model.state_dict(), assign=True)
        assert laws.ties(hollow) == laws.ties(model)
        laws.assert_same_network(hollow, model, network.image())


def test_parts_on_two_processes_keep_ties(tmp_path: Path) -> None:
    models = {config: converted(tied(config), config) for config in CONFIGS}
    x = NETWORKS["chain"].image()
    for config, (first, out, doubled) in fully_sharded.gathered(models, x, tmp_path).items():
        state = models[config].state_dict()
        assert list(first) == list(state), f"{config}: other keys"
        assert all(torch.equal(first[name], state[name]) for name in state), f"{config}: other values"
        laws.assert_close(out, models[config](x).detach(), 1e-12, f"{config} in two processes")
        for name, tensor in doubled.items():
            assert torch.equal(tensor, state[name] * 2), f"{config}: {name} was not loaded back"
        laws.assert_same_network(loaded(models[config], first), models[config], x)


def loaded(like: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model = copy.deepcopy(like)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(state, strict=True)
    return model


def test_sharing_the_tensor_would_not_survive() -> None:
    """Why modules are shared and not tensors."""
    layers = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    layers[1].weight = layers[0].weight
    assert len(list(layers.parameters())) == 3
    layers.load_state_dict(copy.deepcopy(layers).state_dict(), assign=True)
    assert len(list(layers.parameters())) == 4
