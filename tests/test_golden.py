"""Numbers that the original systems computed, on tensors that both sides can make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
import thriftnet as tn
from golden_rules import digest, fill_value, golden, golden_input
from thriftnet.kernels.shift import offsets
from thriftnet.techniques.filter_basis import SharedBasis
from thriftnet.techniques.weight_sharing import FusedConv2d, shared_index


def filled(key: str, shape: tuple[int, ...] | list[int], gain: float = 1.0) -> Tensor:
    """The golden fill in float64."""
    return torch.from_numpy(fill_value(key, tuple(shape), gain).astype(np.float64))


FILLS: dict[str, tuple[tuple[int, ...], list[float]]] = {
    "conv1.weight": ((4, 3, 3, 3), [0.03685, -0.560768]),
    "bn1.running_var": ((3,), [0.675241, 0.875656]),
    "bn1.running_mean": ((3,), [0.128069, 0.112389]),
    "bn1.weight": ((3,), [0.973467, 0.612609]),
    "fc.bias": ((3,), [-0.055565, -0.083044]),
    "coefficients": ((3, 1, 1, 1, 1), [-0.327477, 1.432991]),
    "bank.templates": ((2, 4, 4, 3, 3), [-0.145366, -0.125787]),
    "reduction_w.0": ((2,), [0.720449, 0.558003]),
    "bn1.num_batches_tracked": ((1,), [0.0]),
}


@pytest.mark.parametrize("key", FILLS)
def test_the_fill_is_the_one_the_values_were_made_with(key: str) -> None:
    """The first numbers of every rule, so that a slip in the rules is told from one in the library."""
    shape, first = FILLS[key]
    assert fill_value(key, shape).flatten()[:2].tolist() == pytest.approx(first, abs=1e-6)


def test_the_input_is_the_one_the_values_were_made_with() -> None:
    assert golden_input(2, 3, 4, 4).flatten()[:2].tolist() == pytest.approx([0.26575005, 0.714833], abs=1e-6)


@pytest.mark.parametrize(
    "case", golden("shift_op")["cases"], ids=lambda case: f"C{case['C']}k{case['kernel_size']}d{case['dilation']}"
)
def test_shift(case: dict[str, Any]) -> None:
    channels, height, width = case["C"], case["H"], case["W"]
    k, d = case["kernel_size"], case["dilation"]
    assert offsets(channels, k, d) == [tuple(pair) for pair in case["offsets_dh_dw"]]
    x = torch.arange(1, 1 + channels * height * width, dtype=torch.float64).view(1, channels, height, width)
    layer = tn.Shift2d(channels, k, d).double()
    for out in (layer(x), layer(x.contiguous(memory_format=torch.channels_last)), layer.fold()(x), reference.shift(x, k, d)):
        flat = out.detach().flatten()
        assert flat.sum().item() == case["output_sum"]
        places = torch.arange(len(flat), dtype=torch.float64)
        assert torch.dot(flat, places.cos()).item() == pytest.approx(case["output_dot_cos"], rel=1e-9, abs=1e-6)
        if "output" in case:
            assert flat.tolist() == case["output"]


def test_the_shift_file_has_cases_of_every_kind() -> None:
    cases = golden("shift_op")["cases"]
    assert {case["kernel_size"] for case in cases} >= {1, 2, 3, 5, 7}
    assert max(case["dilation"] for case in cases) > 1
    assert any(case["C"] % case["kernel_size"] ** 2 for case in cases)


def test_soft_shared_layer() -> None:
    facts = golden("layer_sconv2d")
    bank = tn.TemplateBank(3, 4, 4, 3)
    layer = tn.SConv2d(bank, stride=2, padding=1).double()
    shapes = dict(facts["state_dict"])
    with torch.no_grad():
        layer.coefficients.copy_(filled("coefficients", shapes["coefficients"]).flatten())
        bank.templates.copy_(filled("bank.templates", shapes["bank.templates"]))
    x = torch.from_numpy(golden_input(*facts["logits"]["input_shape"]).astype(np.float64))
    got, expected = digest(layer(x).detach().numpy()), facts["logits"]["float64"]
    assert got.keys() == expected.keys()
    assert got["shape"] == expected["shape"]
    assert got["argmax"] == expected["argmax"]
    for key in ("first10", "sum", "abs_sum", "dot_cos"):
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", golden("mappings"))
def test_mappings(name: str) -> None:
    mapping, rate, depth = name.split("_")
    assert shared_index(int(depth[1:]), int(rate[1:]), mapping) == golden("mappings")[name]
    assert reference.shared_index(int(depth[1:]), int(rate[1:]), mapping) == golden("mappings")[name]


@pytest.mark.parametrize("fusion", ["mean", "choose_first", "scalar_weighted_mean", "channel_weighted_mean"])
def test_fused_weights(fusion: str) -> None:
    """Sequential groups only: the original's strided export fuses neighbours, which its own mapping does not share."""
    facts = golden("fusion_export")
    channels, rate, gain = facts["channels"], facts["rate"], facts["fill_gain"]
    expected = facts["cases"][f"{fusion}_sequential"]
    for group in range(facts["depth"] // rate):
        convs = []
        for layer in range(group * rate, (group + 1) * rate):
            conv = nn.Conv2d(channels, channels, 1).double()
            conv.weight.data.copy_(filled(f"pwise_w.{layer}", (channels, channels, 1, 1), gain))
            conv.bias.data.copy_(filled(f"pwise_b.{layer}", (channels,), gain))
            convs.append(conv)
        fused = FusedConv2d(convs, fusion)
        for j in range(rate if fused.scales is not None else 0):
            shape = (1,) if fusion.startswith("scalar") else (channels,)
            fused.scales.data[j] = filled(f"reduction_w.{group * rate + j}", shape, gain)
        plain = fused.eval().fold()
        assert plain.weight.sum().item() == pytest.approx(expected["fused_w_sum"][group], abs=5e-7)  # recorded in float32
        assert plain.bias.sum().item() == pytest.approx(expected["fused_b_sum"][group], abs=5e-7)


def test_the_original_strided_export_is_the_sequential_one() -> None:
    """The known slip of the original, which keeps `test_fused_weights` from covering the strided mapping."""
    cases = golden("fusion_export")["cases"]
    for name in cases:
        assert cases[name] == cases[name.replace("strided", "sequential")]


def banks_of(model: dict[str, Any], include_unique: bool) -> tuple[nn.ModuleList, list[tuple[list[Tensor], list[Tensor]]]]:
    """Each stage's bank, filled as the original's tensors, and the same for the reference."""
    banks, plain = nn.ModuleList(), []
    for stage in model["stages"]:
        shared = torch.stack([filled(key, stage["shared_shape"]) for key in stage["shared"]])
        unique = shared.new_zeros(1, 0, *shared.shape[2:])
        if "unique" in stage:
            first, last = stage["blocks"]
            keys = [stage["unique"].format(block=b, conv=c) for b in range(first, last + 1) for c in (1, 2)]
            unique = torch.stack([filled(key, stage["unique_shape"]) for key in keys])
        banks.append(SharedBasis(shared, unique, lambda_r=10.0, unique_penalty=include_unique))
        plain.append((list(shared), list(unique) if include_unique and "unique" in stage else []))
    return banks, plain


@pytest.mark.parametrize(
    ("model", "value"),
    [(model, value) for model in golden("similarity") for value in model["values"]],
    ids=lambda part: part.get("model", "with-unique" if part.get("include_unique") else "shared-only"),
)
def test_similarity(model: dict[str, Any], value: dict[str, Any]) -> None:
    banks, plain = banks_of(model, value["include_unique"])
    assert tn.penalty(banks, scaled=False).item() == pytest.approx(value["avg_sim"], rel=1e-9)
    assert tn.penalty(banks).item() == pytest.approx(10 * value["avg_sim"], rel=1e-9)
    if model["model"] == "cifar10_ResNet32_SingleShared_S8U1":  # the loops are slow: once per kind
        assert reference.average_similarity(plain) == pytest.approx(value["avg_sim"], rel=1e-9)
