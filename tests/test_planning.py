"""Configs by pattern, choosing layers, budgets, and suggestions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thriftnet as tn
from networks import Chain, perturb
from thriftnet.cli import main
from thriftnet.core.by_pattern import ByPattern
from thriftnet.core.plan import Plan
from thriftnet.core.spec import format_spec
from thriftnet.planning.allocate import Adjustable, Option, least_error
from thriftnet.planning.budget import read_budget

ADJUSTABLE = [name for name in tn.TECHNIQUES if isinstance(tn.TECHNIQUES[name](), Adjustable)]
BOTH = {"convs.[01]": "soft-sharing(templates=1)", "convs": "shift(expansion=2.0)"}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return perturb(Chain()).eval()


def converted(model: nn.Module) -> dict[str, str]:
    """Class of each convolution of the body."""
    return {name: type(conv).__name__ for name, conv in model.convs.named_children()}  # type: ignore[union-attr,operator]


def test_each_pattern_has_its_technique(net: nn.Module, tmp_path: Path) -> None:
    planned = tn.plan(net, BOTH)
    for form in (BOTH, str(BOTH), planned, Plan.from_json(planned.to_json()), format_spec(planned.technique)):
        small = tn.convert(net, form).eval()
        assert converted(small) == {"0": "SConv2d", "1": "SConv2d", "2": "ShiftConv2d", "3": "ShiftConv2d"}
    assert sum(p.numel() for p in small.parameters()) == planned.params_after
    tn.save(small, tmp_path / "net")
    again = tn.load(tmp_path / "net", model=Chain().double()).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.to(images)(images), small.to(images)(images))
    assert planned.name == "soft-sharing + shift"


def test_a_pattern_without_a_technique_leaves_layers_as_they_are(net: nn.Module) -> None:
    small = tn.convert(net, {r"convs\.0": None, "convs": "shift(expansion=2.0)"})
    assert converted(small)["0"] == "Conv2d"
    assert converted(small)["1"] == "ShiftConv2d"


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        ({}, "at least one pattern"),
        ({"convs": None}, "at least one pattern"),
        ({"(": "shift"}, "not a regular expression"),
        ({"convs": "slimmable"}, "takes every layer"),
        ({"convs": "shifts"}, "did you mean 'shift'"),
        ({"convs": "shift(expansion=2.0)", "nowhere": "soft-sharing"}, "'nowhere' decides on no layer"),
        ("{'convs': 'shift'", "cannot read"),
        ("{1: 'shift'}", "cannot read"),
    ],
)
def test_patterns_that_make_no_sense(net: nn.Module, technique: Any, message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.convert(net, technique)


def test_exclude_and_presets(net: nn.Module) -> None:
    assert converted(tn.convert(net, "shift(expansion=2.0)", exclude=r"convs\.[13]"))["3"] == "Conv2d"
    assert converted(tn.convert(net, "shift(expansion=2.0)", select="convs", exclude=["convs.0"]))["0"] == "Conv2d"
    assert type(tn.convert(net, "shift(expansion=2.0)", exclude=["convs.0"]).stem).__name__ == "Conv2d"
    assert type(tn.convert(net, "shift(expansion=2.0)", select="preset:all").stem).__name__ == "ShiftConv2d"
    later = tn.plan(tn.create_model("resnet20"), "soft-sharing(templates=2)", select="preset:later-blocks")
    names = {row.names[0] for row in later.rows}
    assert names == {f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (1, 2) for c in (1, 2)}
    with pytest.raises(tn.ConfigError, match="did you mean 'preset:all'"):
        tn.convert(net, "shift", select="preset:al")
    with pytest.raises(tn.ConfigError, match="exclude='nothing' matches no layer"):
        tn.convert(net, "shift", exclude="nothing")


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (0.5, 500),
        ("0.5", 500),
        (300, 300),
        ("300", 300),
        ("0.25K", 250),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("2M", 2e6),
        (1, 1),
    ],
)
def test_budgets_are_shares_or_numbers(given: float | str, limit: float) -> None:
    budget = read_budget({"params": 1000}, params=given)
    assert budget is not None
    assert (budget.measure, budget.limit) == ("params", limit)


@pytest.mark.parametrize(
    "given", [0, -1, True, "many", "", "1e3", "-5", "nan", "inf", float("nan"), float("inf"), "9" * 30, [1], "1TB"]
)
def test_budgets_that_are_none(net: nn.Module, given: Any) -> None:
    with pytest.raises(tn.ConfigError, match="expected a share of what the network has"):
        tn.plan(net, "shift", params=given, input_size=(3, 8, 8))
    with pytest.raises(tn.ConfigError, match="one budget at a time"):
        tn.plan(net, "shift", params=0.5, macs="0.5", input_size=(3, 8, 8))


@pytest.mark.parametrize("name", ADJUSTABLE)
@pytest.mark.parametrize("measure", ["params", "macs", "bytes"])
def test_a_plan_keeps_to_its_budget_as_counted_afterwards(net: nn.Module, name: str, measure: str) -> None:
    plain = tn.inspect(net, (3, 8, 8))
    budgets = {"params": 0.6 * plain.params, "macs": 0.7 * plain.macs, "bytes": 0.6 * plain.size_bytes}
    budget: dict[str, Any] = {measure: budgets[measure]}
    if measure == "macs" and name in ("weight-sharing", "soft-sharing"):
        with pytest.raises(tn.ConfigError, match="does not lower MACs"):
            tn.plan(net, name, **budget, input_size=(3, 8, 8))
        return
    planned = tn.plan(net, name, **budget, input_size=(3, 8, 8))
    report = tn.inspect(tn.convert(net, planned).eval(), (3, 8, 8))
    assert (planned.params_after, planned.macs_after, planned.size_bytes) == (report.params, report.macs, report.size_bytes)
    assert {"params": report.params, "macs": report.macs, "bytes": report.size_bytes}[measure] <= budgets[measure]
    assert planned.macs_before == plain.macs


def test_a_larger_budget_has_no_larger_error_and_one_out_of_reach_says_what_is_possible(net: nn.Module) -> None:
    errors = [tn.plan(net, "soft-sharing", params=share, input_size=(3, 8, 8)).error for share in (0.4, 0.6, 0.8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]
    with pytest.raises(tn.ConfigError, match=r"out of reach: soft-sharing leaves .* \(\d+% to 100%\)"):
        tn.plan(net, "soft-sharing", params=0.01, input_size=(3, 8, 8))
    with pytest.raises(tn.ConfigError, match="more than the network has"):
        tn.plan(net, "soft-sharing", params=10**9, input_size=(3, 8, 8))
    with pytest.raises(tn.IncompatibleModelError, match="no settings that a budget could choose"):
        tn.plan(net, "slimmable", params=0.5, input_size=(3, 8, 8))


def test_the_allocation_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.rand(4, 4, 2, generator=generator, dtype=torch.float64).tolist()
        sets = [[Option(None, 100 * cost, error) for cost, error in options] for options in values]
        limit = 180.0
        possible = [combination for combination in itertools.product(*sets) if sum(o.cost for o in combination) <= limit]
        found = least_error(sets, limit)
        if not possible:
            assert found is None
            continue
        assert found is not None
        assert sum(o.cost for o in found) <= limit
        assert sum(o.error for o in found) == pytest.approx(min(sum(o.error for o in each) for each in possible), abs=1e-2)


def test_errors_of_outputs_are_those_for_the_images(net: nn.Module) -> None:
    net.float()
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    data = [(images[:20], None), images[20:]]
    planned = tn.plan(net, "soft-sharing(templates=1)", select="convs", data=data, input_size=(3, 8, 8))
    small = tn.convert(net, planned, data=data).eval()
    inputs: list[torch.Tensor] = []
    handle = net.convs[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))  # type: ignore[index]
    net(images[:32])
    handle.remove()
    with torch.no_grad():
        right, got = net.convs[0](inputs[0]), small.convs[0](inputs[0])  # type: ignore[index]
    # a norm follows: what remains of each channel at the best scale is what its correlation does not explain
    pairs = zip(got.transpose(0, 1).flatten(1), right.transpose(0, 1).flatten(1), strict=True)
    unexplained = [1 - torch.corrcoef(torch.stack(pair))[0, 1].clamp_min(0) ** 2 for pair in pairs]
    assert planned.rows[0].output_error == pytest.approx(float(torch.stack(unexplained).mean().sqrt()), rel=1e-4)
    assert tn.plan(net, "soft-sharing(templates=1)", select="convs").rows[0].output_error is None


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "without images"), (["text"], "needs batches of tensors"), ([torch.full((2, 3, 8, 8), torch.nan)], "NaN")],
)
def test_data_without_use(net: nn.Module, data: list[Any], message: str) -> None:
    with pytest.raises(tn.ThriftnetError, match=message):
        tn.plan(net.float(), "shift(expansion=2.0)", data=data, input_size=(3, 8, 8))


def test_suggestions_come_with_the_least_error_first_and_can_be_carried_out(net: nn.Module) -> None:
    plans = tn.suggest(net, params=0.6, input_size=(3, 8, 8))
    assert {plan.name.partition(",")[0] for plan in plans} <= set(ADJUSTABLE)
    assert any(plan.then for plan in plans)
    assert [plan.error for plan in plans] == sorted(plan.error for plan in plans)
    for plan in plans:
        again = Plan.from_json(plan.to_json())
        assert again.to_dict() == plan.to_dict()
        small = tn.convert(net, again)
        assert sum(p.numel() for p in small.parameters()) == plan.last.params_after <= 0.6 * plan.params_before
    alone = tn.suggest(net, params=0.6, techniques=["soft-sharing"], input_size=(3, 8, 8))
    assert [plan.name for plan in alone] == ["soft-sharing"]
    with pytest.raises(tn.ConfigError, match="exactly one budget"):
        tn.suggest(net)
    with pytest.raises(tn.ConfigError, match=r"no technique keeps to this budget.*soft-sharing: .* out of reach"):
        tn.suggest(net, params=0.001, input_size=(3, 8, 8))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.err if code else captured.out

    return call


def test_verbs_of_budgets(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    written, page, picture = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "s.svg"
    model = ("resnet20", "--select", "layer3", "--exclude", "layer3.0")
    code, text = run("suggest", *model, "--params", "0.7", "--technique", "soft-sharing", "--technique", "weight-sharing",
                     "--plot", str(picture), "--output", str(written), "--json")  # fmt: skip
    result = json.loads(text)
    assert code == 0
    assert {row["technique"] for row in result["suggestions"]} == {"soft-sharing", "weight-sharing"}
    assert Plan.from_json(written.read_text()).to_dict() == result["plans"][0]
    assert picture.read_text().startswith("<svg")
    assert run("convert", "resnet20", "--plan", str(written), "--output", str(tmp_path / "net"))[0] == 0
    assert tn.inspect(tn.load(tmp_path / "net")).params == result["suggestions"][0]["params"]
    assert run("plan", *model, "--technique", "soft-sharing", "--bytes", "700kB", "--output", str(page))[0] == 0
    assert "layer3.1.conv1" in page.read_text()
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--params", "lots"), "params='lots': expected a share"),
        (("plan", "--mean", "0.5,0.5,0.5"), "--mean says how --data is read"),
        (("plan", "--output", "plan.txt"), "ends in .json or .html"),
        (("suggest",), "exactly one budget"),
    ],
)
def test_wrong_use(run: Callable[..., tuple[int, str]], arguments: tuple[str, ...], message: str) -> None:
    verb, *rest = arguments
    code, text = run(verb, "resnet20", "--technique", "soft-sharing(templates=2)", *rest)
    assert code == 2
    assert message in text


def test_by_pattern_is_a_mapping() -> None:
    parts = ByPattern({"a": tn.Shift(), "b": None})
    assert (list(parts), len(parts), parts["b"]) == (["a", "b"], 2, None)
    assert repr(parts) == "ByPattern({'a': 'shift', 'b': None})"
    assert hash(parts) == hash(ByPattern({"a": tn.Shift(), "b": None}))
