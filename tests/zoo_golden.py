"""The recorded facts of the authors' networks, held against ours: keys, counts, logits and one training step."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_rules import GOLDEN, digest, fill_value, golden_input
from thriftnet import inspect, penalty
from thriftnet.core.tied import unique_tensors
from thriftnet.importing.layout import Layout, fill, read

FLOAT64, FLOAT32 = 1e-9, 3e-6  # relative to the largest output
LARGE = 1_000_000  # parameters, from which most recorded networks are run in `make test-slow` only
KEPT = {  # one of each kind that has no small network
    "cifar10_ResNet110",
    "cifar100_DenseNet121",
    "cifar100_DenseNet121_SingleShared_S16U1",
    "cifar100_MobileNetV2",
    "cifar100_MobileNetV2_Shared",
    "cifar100_ResNet18",
    "cifar100_ResNet34_NonShared_U16",
    "cifar100_ResNet34_SharedOnly_S8",
    "cifar100_ResNet34_SingleShared_S8U1",
    "cifar100_ResNext50_SingleShared_s16u4",
    "ilsvrc_MobileNetV2_SharedDouble_noECA",
    "ilsvrc_ResNet18",
    "ilsvrc_ResNet34_DoubleShared_S32U1",
    "ilsvrc_ResNet50_Shared",
    "ilsvrc_ResNet101_SharedSingle",
    "swrn16-4-2_c10",
    "swrn28-4-6_c10",
    "swrn40-4-2_c100",
}


@cache
def facts(system: str) -> dict[str, Any]:
    """All recorded networks of one system, by name; those called train_* are one training step."""
    return json.loads(gzip.decompress((GOLDEN / f"{system}.json.gz").read_bytes()))


def recorded_networks(system: str, names: Iterable[str] | None = None) -> list[Any]:
    """Parameters of a test: all recorded networks of one system, or those named; large ones are slow."""
    cases = facts(system)
    found = [name for name, case in cases.items() if "state_dict" in case] if names is None else list(names)
    slow = {name for name in found if cases[name]["params"]["total"] > LARGE} - KEPT
    return [pytest.param(name, id=name, marks=pytest.mark.slow if name in slow else ()) for name in found]


def their_tensors(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tensors of the original network under its own keys, each stored tensor once."""
    tensors = {}
    for key, shape, *alias in case["state_dict"]:
        if not alias:
            value = torch.from_numpy(fill_value(key, tuple(shape), case["fill_gain"])).reshape(shape)
            tensors[key] = value.to(dtype) if value.is_floating_point() else value
    return tensors


def check_keys(case: dict[str, Any], layout: Layout) -> None:
    """The layout has exactly the original's stored tensors."""
    stored = {key for key, _, *alias in case["state_dict"] if not alias}
    assert stored == set(layout), (sorted(stored - set(layout))[:5], sorted(set(layout) - stored)[:5])


def check_network(case: dict[str, Any], model: nn.Module, layout: Layout, float32: float = FLOAT32) -> None:
    """Parameters, MACs and logits in both precisions."""
    check_keys(case, layout)
    assert sum(p.numel() for p in model.parameters()) == case["params"]["total"]
    assert inspect(model, tuple(case["macs"]["input_shape"][1:])).macs == case["macs"]["total"]
    check_logits(case["logits"], case, model, layout, float32)


def check_logits(
    logits: dict[str, Any], case: dict[str, Any], model: nn.Module, layout: Layout, float32: float = FLOAT32
) -> None:
    """Outputs in eval mode, in both precisions."""
    images = torch.from_numpy(golden_input(*logits.get("input_shape", case.get("input_shape"))))
    theirs = their_tensors(case)
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, float32)):
        model = model.to(dtype).eval()
        fill(model, theirs, layout)
        check_output(model, images.to(dtype), logits["float64"], tolerance)


@torch.no_grad()
def check_output(model: nn.Module, images: Tensor, expected: dict[str, Any], tolerance: float) -> None:
    """The output of a filled network."""
    output = model(images).double().numpy()
    got, scale = digest(output), np.abs(output).max()
    for key in ("first10", "sum", "abs_sum", "dot_cos"):
        size = scale if key == "first10" else max(scale, np.abs(expected["abs_sum"]).max())
        difference = np.abs(np.array(got[key]) - np.array(expected[key])).max()
        assert difference <= tolerance * size, (images.dtype, key, difference / size)
    assert got["shape"] == expected["shape"]


def check_train_step(step: dict[str, Any], case: dict[str, Any], model: nn.Module, layout: Layout) -> None:
    """One step in train mode, float64: loss, penalty, logits, gradient of every tensor, statistics afterwards."""
    model = model.double().train()
    fill(model, their_tensors({**case, "fill_gain": step["fill_gain"]}), layout)
    images = torch.from_numpy(golden_input(*step["input_shape"])).double()
    logits = model(images)
    loss = F.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1])
    extra = penalty(model)
    (loss + extra).backward()
    assert abs(loss.item() - step["cross_entropy"]) <= 1e-9 * abs(step["cross_entropy"])
    if step["extra_loss"] is not None:
        assert abs(extra.item() - step["extra_loss"]) <= 1e-9 * abs(step["extra_loss"])
    check_digests(read(gradients(model), layout), step["grad"])
    check_digests(read(unique_tensors(model), layout), step["buffers_after"])


def check_digests(got: dict[str, Tensor], expected: dict[str, Any], tolerance: float = 1e-8) -> None:
    """[sum, sum of magnitudes, dot with cos(arange)] of each tensor, relative to the sum of magnitudes."""
    for key, facts_of in expected.items():
        value = got.get(key)
        if facts_of is None:
            assert value is None or not value.abs().sum(), f"{key} should have no gradient"
            continue
        assert value is not None, key
        flat = value.detach().double().flatten()
        ours = [flat.sum(), flat.abs().sum(), flat.dot(torch.arange(len(flat), dtype=torch.float64).cos())]
        for one, other in zip(ours, facts_of, strict=True):
            assert abs(float(one) - other) <= tolerance * max(1e-6, facts_of[1]), (key, float(one), other)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by our keys; zeros where a tensor has none."""
    own = model.state_dict(keep_vars=True)
    tensors = {name: own[name] for name in unique_tensors(model)}
    return {
        name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items() if isinstance(t, nn.Parameter)
    }
