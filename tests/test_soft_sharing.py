"""Template banks, the layers that mix them, and what the network discovers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
import thriftnet as tn
from laws import assert_close, law_fold_is_equal, output, ties
from networks import NETWORKS, perturb
from thriftnet.cli import main
from thriftnet.techniques.soft_sharing import agreement, best_fit

SNIPPET = Path(__file__).parent / "data" / "soft_sharing_readme.txt"


def seed_class(name_space: dict[str, object]) -> type[nn.Module]:
    """The class of the authors' README, run as it is printed, but for the parenthesis too many in its forward."""
    text = SNIPPET.read_text()
    assert text.count("(x)))") == 4
    exec(text.replace("(x)))", "(x))"), name_space)  # a fixture of our own
    return name_space["CNN"]  # type: ignore[return-value]


def test_the_readme_of_the_authors_runs() -> None:
    model = seed_class({"nn": nn, "F": F, "TemplateBank": tn.TemplateBank, "SConv2d": tn.SConv2d})().double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    out = x
    for number in range(1, 5):
        layer = model.get_submodule(f"conv{number}")
        weight = layer.weight if number == 1 else reference.mix_templates(layer.coefficients, model.bank.templates)
        bias = layer.bias if number == 1 else None
        out = reference.conv2d(out, weight, bias, padding=0 if number == 1 else 1).clamp_min(0)
    assert_close(model(x).detach(), out.detach(), 1e-12, "the README's network")
    assert list(model.state_dict()) == [
        "conv1.weight",
        "conv1.bias",
        "bank.templates",
        *(f"conv{number}.coefficients" for number in (2, 3, 4)),
    ]
    assert model.bank.templates.shape == (3, 10, 10, 3, 3)
    assert len(list(model.parameters())) == 6
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    law_fold_is_equal(model.eval(), x)


def test_the_readme_network_gets_its_weight_decay_groups() -> None:
    model = seed_class({"nn": nn, "F": F, "TemplateBank": tn.TemplateBank, "SConv2d": tn.SConv2d})()
    decay, spared = tn.param_groups(model, 5e-4)
    assert decay["weight_decay"] == 5e-4
    assert spared["weight_decay"] == 0
    assert {id(p) for p in spared["params"]} == {id(model.get_submodule(f"conv{n}").coefficients) for n in (2, 3, 4)}
    assert {id(p) for p in decay["params"]} | {id(p) for p in spared["params"]} == {id(p) for p in model.parameters()}
    assert len(decay["params"]) + len(spared["params"]) == len(list(model.parameters()))
    with pytest.raises(tn.ConfigError, match=r"weight_decay=-1: expected a number >= 0"):
        tn.param_groups(model, -1)


def test_plain_networks_have_one_group() -> None:
    groups = tn.param_groups(NETWORKS["chain"].make(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1]


@given(templates=st.integers(1, 5), ins=st.integers(1, 3), outs=st.integers(1, 4), seed=st.integers(0, 99))
def test_mixing_equals_the_loops(templates: int, ins: int, outs: int, seed: int) -> None:
    torch.manual_seed(seed)
    bank = tn.TemplateBank(templates, ins, outs, 3).double()
    layer = tn.SConv2d(bank)
    assert layer.coefficients.dtype == torch.float64
    expected = reference.mix_templates(layer.coefficients, bank.templates)
    assert_close(layer.weight.detach(), expected.detach(), 1e-12, "mixed weight")
    assert layer.weight.shape == (outs, ins, 3, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 0},
        {"padding": 2, "dilation": 2},
        {"groups": 2, "bias": True},
        {"stride": 2, "padding": 1, "groups": 2},
    ],
    ids=str,
)
def test_layer_equals_the_loops(arguments: dict[str, int]) -> None:
    bank = tn.TemplateBank(3, 2, 4, 3).double()
    layer = tn.SConv2d(bank, **{"padding": 1, **arguments}).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 2 * arguments.get("groups", 1), 7, 7, dtype=torch.float64)
    loops = {name: value for name, value in {"padding": 1, **arguments}.items() if name != "bias"}
    expected = reference.conv2d(x, reference.mix_templates(layer.coefficients, bank.templates), layer.bias, **loops)
    assert_close(layer(x).detach(), expected.detach(), 1e-12, "layer")
    assert_close(layer.fold()(x).detach(), expected.detach(), 1e-12, "folded layer")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
def test_layer_pads_as_a_plain_convolution(mode: str, padding: int | str | tuple[int, int]) -> None:
    layer = tn.SConv2d(tn.TemplateBank(2, 3, 4, 3), padding=padding, padding_mode=mode, bias=True)
    conv = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(layer(x), conv(x), atol=1e-6)
    assert torch.allclose(layer.fold()(x), conv(x), atol=1e-6)


def test_rectangular_kernels() -> None:
    layer = tn.SConv2d(tn.TemplateBank(2, 3, 4, (3, 1)), padding=(1, 0))
    assert layer.kernel_size == (3, 1)
    assert layer(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 5, 5)


def test_new_layers_start_at_the_variance_of_the_templates() -> None:
    layer = tn.SConv2d(tn.TemplateBank(8, 64, 64, 3))
    assert layer.coefficients.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert layer.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_bad_banks(value: object) -> None:
    with pytest.raises(tn.ConfigError, match=r"num_templates=.*: expected an integer from 1 to"):
        tn.TemplateBank(value, 3, 3, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"templates": 0}, "templates=0: expected an integer from 1 to"),
        ({"templates": 2.0}, r"templates=2\.0: expected a"),
        ({"init": "randon"}, "unknown init 'randon': did you mean 'random'"),
    ],
)
def test_bad_configs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.SoftSharing(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        tn.SoftSharing(3)  # type: ignore[misc]


def test_too_many_templates_are_refused_with_what_is_possible() -> None:
    with pytest.raises(
        tn.IncompatibleModelError,
        match=r"templates=5 is too many: the largest group of equal layers has 4 \('convs\.0'.*templates < 4",
    ):
        tn.convert(NETWORKS["chain"].make(), tn.SoftSharing(templates=5))


def test_unsuitable_layers_are_named_when_listed() -> None:
    model = NETWORKS["depthwise"].make()
    with pytest.raises(
        tn.IncompatibleModelError, match=r"layer 'pointwise\.0' is Conv2d\(8, 8, kernel_size=\(1, 1\).*Exclude it"
    ):
        tn.convert(model, tn.SoftSharing(templates=2, pointwise=False), select=["plain", "pointwise.0"])
    with pytest.raises(tn.ConfigError, match=r"unknown layer in select 'plane': did you mean 'plain'"):
        tn.convert(model, tn.SoftSharing(templates=2), select=["plane"])
    with pytest.raises(tn.ConfigError, match=r"select='nowhere' matches no layer of Depthwise"):
        tn.convert(model, tn.SoftSharing(templates=2), select="nowhere")
    with pytest.raises(tn.ConfigError, match=r"'\(' is not a regular expression"):
        tn.convert(model, tn.SoftSharing(templates=2), select="(")


def test_pointwise_layers_can_be_left_alone() -> None:
    model = NETWORKS["depthwise"].make()
    names = {row.names[0] for row in tn.plan(model, tn.SoftSharing(templates=2, pointwise=False)).rows}
    assert not any(name.startswith("pointwise") for name in names)
    more = {row.names[0] for row in tn.plan(model, tn.SoftSharing(templates=2)).rows}
    assert more - names == {"pointwise.0", "pointwise.1"}


def test_a_ratio_gives_every_group_its_number_of_templates() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)), *(nn.Conv2d(8, 8, 1) for _ in range(3)), nn.Linear(8, 2)
    )
    banks = [m for m in tn.convert(model, tn.SoftSharing()).modules() if isinstance(m, tn.TemplateBank)]
    assert [len(bank.templates) for bank in banks] == [2, 1]  # of 5 and 3 layers: the first is the stem
    gates = nn.Sequential(*(nn.Conv2d(4, 1, 1, groups=1) for _ in range(8)), nn.Linear(1, 2))  # coefficients cost more
    with pytest.raises(tn.IncompatibleModelError, match=r"templates=0\.5"):
        tn.convert(gates, tn.SoftSharing())


def test_linear_layers_mix_a_bank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12) for _ in range(5)), nn.Linear(12, 2)).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    exact = tn.convert(model, tn.SoftSharing(templates=4))
    assert_close(output(exact, x), output(model, x), 1e-12, "full capacity")
    assert exact[2].bank.templates.shape == (4, 12, 12)
    small = perturb(tn.convert(model, tn.SoftSharing())).eval()
    assert_close(output(tn.fold(small), x), output(small, x), 1e-12, "fold")
    assert type(tn.fold(small)[2]) is nn.Linear
    assert len(tn.param_groups(small, 0.1)[1]["params"]) == 4  # the coefficients


@given(layers=st.integers(1, 6), size=st.integers(2, 40), data=st.data(), seed=st.integers(0, 99))
def test_best_fit_is_the_best_of_its_rank(layers: int, size: int, data: st.DataObject, seed: int) -> None:
    """Eckart and Young: the error is the norm of the singular values left out."""
    rank = data.draw(st.integers(1, layers))
    weights = torch.randn(layers, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    templates, coefficients = best_fit(weights, rank)
    error = (coefficients @ templates - weights).norm()
    values = torch.linalg.svdvals(weights)
    assert error.item() == pytest.approx(values[rank:].norm().item(), abs=1e-9 * values[0].item() + 1e-12)
    assert torch.allclose(coefficients.T @ coefficients, torch.eye(rank, dtype=torch.float64), atol=1e-9)


def test_the_plan_shows_the_error_of_each_layer() -> None:
    model = NETWORKS["chain"].make()
    errors = {}
    for templates in (1, 2, 3, 4):
        plan = tn.plan(model, tn.SoftSharing(templates=templates))
        converted = tn.convert(model, plan)
        for row in plan.rows:
            layers = model.get_submodule(row.names[0]), converted.get_submodule(row.names[0])
            old, new = (torch.cat([layer.weight.flatten(), layer.bias]) for layer in layers)
            assert row.relative_error == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-9, abs=1e-12)
        errors[templates] = sum(row.relative_error**2 for row in plan.rows)
        assert f"{plan.params_before:,} -> {plan.params_after:,}" in str(plan)
    assert errors[1] > errors[2] > errors[3] > errors[4]
    assert errors[4] < 1e-20


def test_random_start_is_the_papers() -> None:
    model = tn.convert(NETWORKS["chain"].make(), tn.SoftSharing(templates=3, init="random"))
    rows = torch.stack([conv.coefficients.detach() for conv in model.convs])  # (L, T): orthogonal columns
    assert torch.allclose(rows.T @ rows, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert torch.equal(model.convs[0].bias, NETWORKS["chain"].make().convs[0].bias)
    template = model.convs[0].bank.templates.detach()
    assert template.std().item() == pytest.approx((2 / 72) ** 0.5, rel=0.1)


def test_similarity_is_the_magnitude_of_the_cosine() -> None:
    model = perturb(tn.convert(NETWORKS["chain"].make(), tn.SoftSharing(templates=2)))
    ((name, found),) = tn.similarity(model).items()
    assert name == "convs.0.bank"
    assert found.layers == ("convs.0", "convs.1", "convs.2", "convs.3")
    for i, one in enumerate(model.convs):
        for j, other in enumerate(model.convs):
            cosine = F.cosine_similarity(one.coefficients, other.coefficients, dim=0).abs().item()
            assert found.matrix[i, j].item() == pytest.approx(cosine, abs=1e-12)
    with pytest.raises(tn.IncompatibleModelError, match=r"Chain has no template bank: convert it with SoftSharing"):
        tn.similarity(NETWORKS["chain"].make())


def looping() -> nn.Module:
    """A chain whose layers 0 and 2 have learned the same mix, 1 and 3 nearly so."""
    model = perturb(tn.convert(NETWORKS["chain"].make(), tn.SoftSharing(templates=2))).eval()
    rows = torch.tensor([[1.0, 0.2], [-0.3, 0.9], [1.0, 0.2], [-0.3, 0.9001]], dtype=torch.float64)
    with torch.no_grad():
        for conv, row in zip(model.convs, rows, strict=True):
            conv.coefficients.copy_(row)
            conv.bias.copy_(model.convs[0].bias)
    return model


def test_recurrence_is_folded() -> None:
    model, x = looping(), NETWORKS["chain"].image()
    assert tn.recurrences(model, threshold=0.999) == [["convs.0", "convs.2"], ["convs.1", "convs.3"]]
    assert tn.recurrences(model, threshold=1.0) == [["convs.0", "convs.2"]]
    before = model(x)
    folded = tn.fold_recurrence(model, threshold=0.999)
    assert folded.convs[0] is folded.convs[2]
    assert folded.convs[1] is folded.convs[3]
    assert folded.convs[0] is not folded.convs[1]
    assert model.convs[0] is not model.convs[2], "the network given stays as it was"
    assert_close(folded(x).detach(), before.detach(), 1e-4, "folded recurrence")
    assert folded.convs[1].coefficients.tolist() == pytest.approx([-0.3, 0.90005], abs=1e-12)
    exact = tn.fold_recurrence(model, threshold=1.0)
    assert exact.convs[0] is exact.convs[2]
    assert exact.convs[1] is not exact.convs[3]
    assert_close(exact(x).detach(), before.detach(), 1e-12, "exact recurrence")
    assert ties(exact)[0] < ties(model)[0]
    law_fold_is_equal(exact, x)


def test_scaled_copies_are_no_recurrence() -> None:
    """The cosine of a mix and its double is 1, but their functions differ."""
    model = looping()
    with torch.no_grad():
        model.convs[2].coefficients.mul_(2)
        model.convs[3].coefficients.mul_(-1)
    assert agreement(model.convs[0], model.convs[2]) == pytest.approx(0.8)
    with pytest.raises(
        tn.IncompatibleModelError, match=r"no two layers agree to threshold=0\.9: the closest pair reaches 0\.8"
    ):
        tn.fold_recurrence(model, threshold=0.9)
    assert tn.recurrences(model, threshold=0.9) == []


def test_layers_of_another_stride_are_no_recurrence() -> None:
    model = looping()
    model.convs[2].stride = (2, 2)
    assert agreement(model.convs[0], model.convs[2]) == 0


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_bad_thresholds(threshold: float) -> None:
    with pytest.raises(tn.ConfigError, match=r"threshold=.*: expected a number in \(0, 1\]"):
        tn.fold_recurrence(looping(), threshold=threshold)


def loops_saved(folder: Path) -> tuple[str, nn.Module]:
    """A ResNet whose first two layers of the first bank have learned the same mix, but the other two not, and its folder."""
    torch.manual_seed(0)
    model = tn.convert(tn.create_model("resnet20"), tn.SoftSharing(templates=2))
    layers = [module for module in model.modules() if isinstance(module, tn.SConv2d)]
    with torch.no_grad():
        for angle, layer in enumerate(layers):
            layer.coefficients.copy_(torch.tensor([angle, 1.0 - angle]).sin())
        layers[1].coefficients.copy_(layers[0].coefficients * 1.01)
    return str(tn.save(model, folder / "model")), model


def test_the_command_shows_and_ties_what_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, model = loops_saved(tmp_path)
    picture, looped = tmp_path / "similarity.svg", str(tmp_path / "looped")
    options = ["--plot", str(picture), "--output", looped, "--threshold", "0.9999"]
    assert main(["similarity", place, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for bank, expected in tn.similarity(model).items():
        assert tuple(found["banks"][bank]["layers"]) == expected.layers
        assert torch.equal(torch.tensor(found["banks"][bank]["similarity"]), expected.matrix)
        assert bool((expected.matrix <= 1).all())
    first, second = found["recurrences"][0]
    assert (first, second) == ("layer1.0.conv1", "layer1.0.conv2")
    tied = tn.load(looped)
    assert tied.get_submodule(first) is tied.get_submodule(second)
    assert (found["params_before"], found["params"]) == tuple(tn.inspect(net).params for net in (model, tied))
    assert found["params"] < found["params_before"]
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert all(f">{layer}</text>" in drawn for bank in found["banks"].values() for layer in bank["layers"])
    assert main(["similarity", place, "--threshold", "0.9999"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer1.0.conv1.bank"
    assert lines[2].split()[:4] == ["1", "layer1.0.conv1", "1.00", "1.00"]
    assert "one layer at threshold 0.9999: layer1.0.conv1, layer1.0.conv2" in lines


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = loops_saved(tmp_path)
    looped = str(tmp_path / "looped")
    for arguments, expected in (
        (["resnet20"], "no template bank"),
        ([place, "--threshold", "2"], "threshold 2: expected a number in (0, 1]"),
        ([place, "--threshold", "1", "--output", looped], "no two layers agree to threshold=1.0"),
        ([place, "--plot", "x.png"], "ends in .svg"),
    ):
        assert main(["similarity", *arguments]) == 2
        assert expected in capsys.readouterr().err
    assert not Path(looped).exists()
    assert main(["similarity", place, "--threshold", "1"]) == 0
    assert "no two layers agree at threshold 1" in capsys.readouterr().out


def test_layers_print_their_geometry() -> None:
    layer: Tensor | nn.Module = tn.SConv2d(tn.TemplateBank(3, 4, 8, 3), groups=2, stride=2)
    assert "8, 8, kernel_size=(3, 3), stride=(2, 2), groups=2" in repr(layer)
    assert "TemplateBank(3, 4, 8, kernel_size=(3, 3))" in repr(layer)


@pytest.mark.parametrize("arguments", [{"stride": 0}, {"stride": (1, 0)}, {"dilation": -1}, {"groups": 0}], ids=str)
def test_a_step_of_zero_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(tn.ConfigError, match=rf"{next(iter(arguments))}=.*: expected an integer from 1 to"):
        tn.SConv2d(tn.TemplateBank(2, 4, 4, 3), **arguments)
    if "stride" in arguments:
        with pytest.raises(tn.ConfigError, match=r"stride=.*: expected an integer from 1 to"):
            tn.ShiftConv2d(4, 4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"stride": 0}, "stride=0: expected an integer from 1 to"),
        ({"padding": -1}, "padding=-1: expected one of 'valid', 'same', an integer from 0 to"),
        ({"padding": "sam"}, "unknown padding 'sam': did you mean 'same'"),
        ({"dilation": (1, 0)}, "dilation=.*: expected an integer from 1 to"),
    ],
)
def test_geometry_without_a_meaning_is_refused(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(tn.ConfigError, match=problem):
        tn.SConv2d(tn.TemplateBank(2, 3, 4, 3), **arguments)  # type: ignore[arg-type]
    with pytest.raises(tn.ConfigError, match="kernel_size=0: expected an integer from 1 to"):
        tn.TemplateBank(2, 3, 4, 0)
