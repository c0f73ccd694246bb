"""DS-Net's supernets against the recorded facts: every sub-network, its statistics, and what is taken out of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.masked import MaskedNetwork
from torch import nn

import dsnet_by_hand
import thriftnet as tn
from golden_rules import golden_input
from laws import assert_close
from networks import perturb, randomise_norms
from thriftnet.core.tied import count_params, unique_tensors
from thriftnet.core.width import WidthSpec, width, widths
from thriftnet.dynamic.network import DynamicNetwork, mixture
from thriftnet.dynamic.objective import GateObjective, decision_of, sparsification_targets
from thriftnet.importing.dsnet import layout as dsnet_layout
from thriftnet.importing.layout import fill, read
from thriftnet.models import MODELS
from thriftnet.models.dsnet_blocks import SqueezeExcite, WidthGate
from zoo_golden import FLOAT32, FLOAT64, check_digests, check_keys, check_output, facts, gradients, their_tensors
from zoo_groups import SUPERNETS

# published millions of multiply-adds and our multiply-accumulates of sub-networks 0 to 13
SUBNETWORKS = (
    (133, 132004224),
    (153, 151995200),
    (175, 174193920),
    (200, 198600384),
    (226, 225214592),
    (255, 254036544),
    (286, 285066240),
    (319, 318303680),
    (355, 353748864),
    (393, 391401792),
    (433, 431262464),
    (475, 473330880),
    (519, 517607040),
    (565, 564090944),
)

STAGES = (((8, 12), 1, 3, 1, "ds", False), ((12, 16, 24), 2, 3, 2, "ds", True), ((16, 20, 32), 1, 5, 2, "ds", False))
EVERY = [*map(str, range(14)), "smallest", "largest"]


def recorded(name: str) -> nn.Module:
    """Our network for a recorded one."""
    meta = facts("dsnet")[name]["meta"]
    if name != "tiny":
        return tn.create_model(name)
    stem, *stages, _ = meta["choices_cfg"]
    return tn.create_model("dsnet", stem=stem[0], stages=stages, num_classes=meta["num_classes"])


def mode(which: str) -> str:
    return f"uniform_{which}" if which.isdigit() else which


def check_sub_networks(name: str, float32: float) -> None:
    """Counts and outputs of all sub-networks; ``float32`` is the tolerance for the widest."""
    case, model = facts("dsnet")[name], recorded(name).eval()
    layout = dsnet_layout(model)
    check_keys(case, layout)
    assert count_params(model) == case["params"]["total"]
    for which in EVERY:
        tn.set_width(model, which)
        report = tn.inspect(model, tuple(case["mac_input_shape"][1:]))
        assert report.macs == case["modes"][mode(which)]["macs"]
        assert report.width == {"smallest": "0"}.get(which, which)
    images = torch.from_numpy(golden_input(*case["input_shape"]))
    for dtype in (torch.float64, torch.float32):
        fill(model.to(dtype), their_tensors(case, dtype), layout)
        for which in EVERY:
            tn.set_width(model, which)
            tolerance = FLOAT64 if dtype is torch.float64 else float32 if which == "largest" else FLOAT32
            check_output(model, images.to(dtype), case["modes"][mode(which)]["logits"]["float64"], tolerance)


def test_tiny_recorded_network() -> None:
    check_sub_networks("tiny", FLOAT32)


@pytest.mark.slow
def test_recorded_network() -> None:
    """With the golden fill "largest" magnifies rounding, in the authors' own float32, too."""
    check_sub_networks("slimmable_mbnet_v1_bn_uniform", 4e-5)


def test_the_state_of_one_forward_does_not_reach_the_next() -> None:
    """The original must be told its width again before every forward."""
    model = perturb(recorded("tiny").double()).eval()
    x = torch.from_numpy(golden_input(2, 3, 64, 64)).double()
    tn.set_width(model, index=3)
    first = model(x)
    assert torch.equal(model(x), first)
    tn.set_width(model, "largest")
    model(x)
    tn.set_width(model, index=3)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("by_verb", [False, True])
def test_recorded_recalibration(by_verb: bool) -> None:
    """Fresh statistics, then three batches through all numbered sub-networks in training mode."""
    step, case = facts("dsnet")["train_bn_recalibration_tiny"], facts("dsnet")["tiny"]
    model = recorded("tiny").double().train()
    layout = dsnet_layout(model)
    fill(model, their_tensors(case | {"fill_gain": step["fill_gain"]}), layout)
    for name, buffer in model.named_buffers():
        buffer.fill_("running_var" in name)
    x = torch.from_numpy(golden_input(*step["input_shape"])).double()
    batches = [x * (1 + 0.1 * batch) + 0.05 * batch for batch in range(3)]
    if by_verb:
        tn.recalibrate(model, batches, indices=range(14), momentum=0.1)
    for batch in [] if by_verb else batches:
        for which in range(14):
            tn.set_width(model, index=which)
            model(batch)
    expected = {key: value for key, value in step["buffers_after"].items() if "num_batches" not in key}
    assert expected
    check_digests(read(unique_tensors(model), layout), expected)


def test_recorded_sandwich_step() -> None:
    """Largest, two numbered ones and smallest: losses, outputs, summed gradients and statistics of one training step.

    The largest learns the labels, the others what the untouched network says at its largest.
    """
    step, case = facts("dsnet")["train_sandwich_tiny"], facts("dsnet")["tiny"]
    model = recorded("tiny").double()
    layout = dsnet_layout(model)
    fill(model, their_tensors(case | {"fill_gain": step["fill_gain"]}), layout)
    x = torch.from_numpy(golden_input(*step["input_shape"])).double()
    teacher = copy.deepcopy(model).eval()
    tn.set_width(teacher, "largest")
    with torch.no_grad():
        taught = teacher(x).softmax(1)
    model.train()
    for each in step["passes"]:
        tn.set_width(model, **({"index": each["choice"]} if each["mode"] == "uniform" else {"width": each["mode"]}))
        logits = model(x)
        largest = each["mode"] == "largest"
        target = torch.arange(len(x)) % logits.shape[1] if largest else taught
        loss = F.cross_entropy(logits, target, label_smoothing=0.1 if largest else 0.0)
        assert loss.item() == pytest.approx(each["loss"], rel=1e-9)
        loss.backward()
    check_digests(read(gradients(model), layout), step["grad"])
    after = {key: value for key, value in step["buffers_after"].items() if "num_batches" not in key}
    check_digests(read(unique_tensors(model), layout), after)


def filled(fill_gain: float) -> tuple[nn.Module, Any]:
    case, model = facts("dsnet")["tiny"], recorded("tiny").double().eval()
    layout = dsnet_layout(model)
    fill(model, their_tensors(case | {"fill_gain": fill_gain}), layout)
    return model, layout


def test_recorded_gate_logits() -> None:
    case = facts("dsnet")["tiny"]
    model, _ = filled(case["fill_gain"])
    images = torch.from_numpy(golden_input(*case["input_shape"])).double()
    with torch.no_grad():
        logits = DynamicNetwork(model).logits(images)
    assert_close(logits, torch.tensor(case["modes"]["gate_logits_float64"], dtype=torch.float64), 1e-10, "gate")


@pytest.mark.parametrize("fold_norms", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2, 3, "mixed"])
def test_recorded_decisions(which: int | str, fold_norms: bool) -> None:
    """The routed network, and the masked one, against the authors' dynamic mode with decisions from outside."""
    case = facts("dsnet")["tiny"]
    model, _ = filled(case["fill_gain"])
    mode = case["modes"][f"dynamic_{which}"]
    batch = mode["logits"]["float64"]["shape"][0]
    decisions = torch.tensor(mode.get("decisions", [which] * batch))
    images = torch.from_numpy(golden_input(batch, *case["input_shape"][1:])).double()
    dynamic = DynamicNetwork(model, fold_norms=fold_norms, input_size=case["input_shape"][1:])
    masked = MaskedNetwork(model)
    check_output(lambda x: dynamic.forced(x, decisions), images, mode["logits"]["float64"], FLOAT64)
    check_output(lambda x: masked(x, F.one_hot(decisions, 4).to(x)), images, mode["logits"]["float64"], FLOAT64)
    assert list(dynamic.histogram.values()) == torch.bincount(decisions, minlength=4).tolist()
    if "true_macs" in mode:
        assert dynamic.mean_macs == mode["true_macs"] + dynamic.gate.conv.weight.numel(), "theirs are biased"


def test_recorded_gate_step() -> None:
    """Stage II with zero noise: decisions, both losses, outputs and the gate's gradient, in the authors' forms by name."""
    step = facts("dsnet")["train_gate_tiny"]
    model, layout = filled(step["fill_gain"])
    images = torch.from_numpy(golden_input(*step["input_shape"])).double()
    labels = torch.arange(len(images)) % 10
    dynamic = DynamicNetwork(model)
    gate = dynamic.gate.requires_grad_(True)
    logits, outputs = dynamic.every(images)
    targets = sparsification_targets(outputs, labels)
    assert targets.tolist() == step["gate_target"]
    decision = decision_of(logits, noise=False)
    assert decision.soft.argmax(1).tolist() == step["decisions"]
    assert_close(decision.soft.detach(), torch.tensor(step["gate_soft"], dtype=torch.float64), 1e-10, "softmax")
    masked = MaskedNetwork(model)
    output = masked(images, decision.choice)
    assert_close(output.detach(), mixture(decision.choice, outputs).detach(), 1e-12, "masked and routed")
    check_output(lambda x: output.detach(), images, step["logits"], FLOAT64)
    loss = GateObjective(original=True)(decision, output, labels, targets, dynamic.macs)
    assert loss.sparsification.item() == pytest.approx(step["gate_loss"], rel=1e-10)
    assert loss.task.item() == pytest.approx(step["ce_loss"], rel=1e-10)
    (loss.task + loss.sparsification).backward()
    assert gate is dynamic.gate
    check_digests(read(gradients(model), layout), step["grad_gate"])


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(perturb(recorded("tiny").double())).eval()


@pytest.mark.parametrize("which", EVERY, ids=str)
def test_each_sub_network_comes_out_plain(tiny: nn.Module, which: str) -> None:
    x = torch.from_numpy(golden_input(2, 3, 64, 64)).double()
    model = copy.deepcopy(tiny)
    tn.set_width(model, which)
    frozen = tn.freeze(tiny, which)
    assert_close(frozen(x), model(x), 1e-12, f"sub-network {which}")
    layers = [module for module in frozen.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert {type(layer) for layer in layers} == {nn.Conv2d, nn.Linear}
    used = sum(p.numel() for layer in layers for p in layer.parameters())
    assert used == facts("dsnet")["tiny"]["modes"][mode(which)]["used_conv_linear_params"]


def test_largest_is_no_numbered_sub_network(tiny: nn.Module) -> None:
    model = copy.deepcopy(tiny)
    assert width(model) == "largest"
    assert widths(model) == (*map(str, range(14)), "largest")
    for number in (13, -1):
        tn.set_width(model, index=number)
        assert width(model) == "13"
    macs = {which: tn.inspect(tn.freeze(model, which), (3, 64, 64)).macs for which in ("12", "13", "largest")}
    assert macs["12"] < macs["13"] < macs["largest"]
    tn.set_width(model, "smallest")
    assert width(model) == "0"


@pytest.mark.parametrize(
    "bad",
    [{"width": bad} for bad in (3, 1.0, 14, 0.5, "14", "widest")] + [{"index": bad} for bad in (14, -15)],
    ids=str,
)
def test_widths_that_it_does_not_have(tiny: nn.Module, bad: dict[str, Any]) -> None:
    with pytest.raises(tn.ConfigError, match=r"expected 'smallest', 'largest', or an index: index=0 to 13"):
        tn.set_width(tiny, **bad)


def test_a_number_is_no_width_of_a_network_without_ratios(tiny: nn.Module) -> None:
    for verb in (tn.set_width, tn.freeze):
        with pytest.raises(tn.ConfigError, match=r"no width 3: .*Did you mean index=3\?"):
            verb(tiny, 3)


def test_statistics_exist_once_for_each_distinct_width(tiny: nn.Module) -> None:
    buffers = dict(tiny.named_buffers())
    assert {key: value.numel() for key, value in buffers.items() if key.startswith("norm.running_mean")} == {
        "norm.running_mean": 12,
        "norm.running_mean_0": 8,
    }
    means = [key for key in buffers if key.startswith("stages.3.0.norm2.running_mean")]
    assert len(means) == 14
    model = copy.deepcopy(tiny).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    tn.set_width(model, index=5)
    model(torch.randn(4, 3, 64, 64, dtype=torch.float64))
    changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert "norm.running_mean_0" in changed
    assert "stages.3.0.norm2.running_mean_5" in changed
    assert not [key for key in changed if key.endswith(("running_mean", "running_var"))], "the widest statistics moved"


def test_bn_sets_of_a_norm() -> None:
    width_spec = WidthSpec(("0", "1", "2", "largest"), (4, 4, 4, 8), (4, 4, 4, 8), (0, 0, 0, 1))
    assert [width_spec.bn_set(index) for index in (0, 2, 3, -1)] == [0, 0, 1, 1]
    assert width_spec.narrower_bn_sets() == {0: 2}, "the index of a sub-network that uses the set"
    assert WidthSpec((0.5, 1.0), (2, 4), (2, 4)).narrower_bn_sets() == {0: 0}


def test_recalibration_reaches_all_sub_networks(tiny: nn.Module) -> None:
    model = copy.deepcopy(tiny)
    batches = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    tn.recalibrate(model, batches, indices=range(14))
    assert width(model) == "largest"
    assert int(model.stages[3][0].norm2.num_batches_tracked_4) == 2
    assert torch.equal(model.norm.running_mean, tiny.norm.running_mean), "of 'largest', which was not asked for"
    assert not torch.equal(model.norm.running_mean_0, tiny.norm.running_mean_0)


@pytest.mark.parametrize("name", SUPERNETS)
def test_stored_facts_are_what_is_counted(name: str) -> None:
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name), MODELS[name].input_size)
    assert (report.params, report.macs) == (MODELS[name].params, MODELS[name].macs)


def test_published_multiply_adds_count_what_is_pooled() -> None:
    """MACs and the inputs of all average pooling, in millions, are the README's 14 figures."""
    case = facts("dsnet")["slimmable_mbnet_v1_bn_uniform"]
    with torch.device("meta"):
        model = tn.create_model("slimmable_mbnet_v1_bn_uniform").eval()
    pooled: list[int] = []
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.register_forward_pre_hook(lambda _, args: pooled.append(args[0].numel()))
    for which, (published, macs) in enumerate(SUBNETWORKS):
        tn.set_width(model, index=which)
        pooled.clear()
        features = model.forward_features(torch.empty(1, 3, 224, 224, device="meta"))
        stated = macs + sum(pooled) + features.numel()
        assert macs == case["modes"][f"uniform_{which}"]["macs"]
        assert stated == case["modes"][f"uniform_{which}"]["original_add_flops"]
        assert round(stated / 1e6) == published


@pytest.mark.parametrize("which", [0, 1, 2])
def test_inverted_residuals_and_shortcuts_by_hand(which: int) -> None:
    torch.manual_seed(0)
    model = tn.create_model("dsnet", stem=(8, 12), stages=dsnet_by_hand.STAGES, skip=True, num_classes=5).double()
    model = randomise_norms(perturb(model)).eval()
    x = torch.randn(2, 3, 30, 34, dtype=torch.float64)
    tn.set_width(model, index=which)
    assert_close(model(x), dsnet_by_hand.run(model, x, which), 1e-12, f"sub-network {which}")
    assert_close(tn.freeze(model, index=which)(x), model(x), 1e-12, "frozen")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("head", [0, 40])
@pytest.mark.parametrize("kind", ["ds", "ir"])
def test_any_stages_run_at_every_width(skip: bool, head: int, kind: str) -> None:
    stages = [(w, n, k, s, kind, gate) for w, n, k, s, _, gate in STAGES]
    arguments: dict[str, Any] = {"stem": (8, 16), "stages": stages, "head": head, "skip": skip, "num_classes": 7}
    model = perturb(tn.create_model("dsnet", **arguments, in_chans=1).double()).eval()
    x = torch.randn(2, 1, 40, 56, dtype=torch.float64)
    last = None
    for which in widths(model):
        tn.set_width(model, which)
        out = model(x)
        assert out.shape == (2, 7)
        assert last is None or not torch.equal(out, last)
        assert_close(tn.freeze(model, which)(x), out, 1e-12, f"frozen at {which}")
        last = out


def test_parameters_are_those_of_the_formula() -> None:
    model = tn.create_model("dsnet", stem=(8, 16), stages=STAGES, se_ratio=0.5, skip=True, num_classes=7, in_chans=2)
    blocks = [(16, 12, 3, False), (12, 24, 3, True), (24, 24, 3, False), (24, 32, 5, False)]
    expected = 16 * 2 * 9 + 2 * 16 + 7 * (32 + 1)
    for ins, outs, kernel_size, gate in blocks:
        reduced = ins // 2
        expected += ins * kernel_size**2 + 2 * ins + 2 * ins * reduced + reduced + ins + ins * outs + 2 * outs
        expected += ins * outs if ins != outs else 0
        expected += 3 * reduced if gate else 0
    assert count_params(model) == expected


def test_without_a_gate_every_stage_narrows() -> None:
    stages = [(w, 1, 3, 2, "ds", False) for w in ((12, 24), (16, 32))]
    model = tn.create_model("dsnet", stem=(8, 16), stages=stages, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    seen = {}
    for which in widths(model):
        tn.set_width(model, which)
        seen[which] = (model.forward_features(x).shape[1], tn.inspect(model).macs)
    assert [seen[which][0] for which in ("0", "1", "largest")] == [16, 32, 32]
    assert seen["1"] == seen["largest"]


def test_networks_offer_what_timm_users_expect() -> None:
    model = tn.create_model("dsnet", stem=(8, 16), stages=STAGES, num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 40, 56)
    features = model.forward_features(images)
    assert features.shape[:2] == (2, 32)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.get_classifier().out_features == 7 == model.default_cfg["num_classes"]
    tn.set_width(model, index=1)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 20)
    tn.set_width(model, "largest")
    assert model(images).shape == (2, 3)
    frozen = tn.freeze(model, index=0)
    frozen.reset_classifier(5)
    assert frozen(images).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images).shape == (2, 32)


def test_copies_and_saved_networks_are_the_same(tmp_path: Any) -> None:
    model = perturb(tn.create_model("dsnet", stem=(8, 16), stages=STAGES, num_classes=3)).eval()
    tn.save(model, tmp_path / "supernet")
    images = torch.randn(1, 3, 32, 32)
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301
    others = [tn.load(tmp_path / "supernet").eval(), copy.deepcopy(model), pickled]
    for which in widths(model):
        for network in (model, *others):
            tn.set_width(network, which)
        for other in others:
            assert_close(other(images), model(images), 1e-6, f"copy at {which}")


def test_dropout_acts_in_the_widest_network_only() -> None:
    model = tn.create_model("dsnet", stem=(8, 16), stages=STAGES, num_classes=3, drop_rate=0.5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    tn.set_width(model, index=2)
    assert torch.equal(model(x), model(x))


def test_the_gate_is_stored_and_left_out_of_what_is_frozen() -> None:
    model = tn.create_model("slimmable_mobilenetv1").eval()
    gates = [name for name, module in model.named_modules() if isinstance(module, WidthGate)]
    assert gates == ["stages.3.0.se.gate"]
    gate = model.get_submodule(gates[0])
    assert gate.conv.weight.shape == (4, 66, 1, 1)
    assert gate(torch.randn(2, 66, 1, 1)).shape == (2, 4)
    frozen = tn.freeze(model, index=3)
    assert type(frozen.get_submodule(gates[0])) is nn.Identity


def test_initialisation() -> None:
    """Normal by fan-out without the groups, the classifier uniform, the last norm before each shortcut at 0."""
    torch.manual_seed(0)
    model = tn.create_model("slimmable_mobilenetv1")
    block = model.stages[4][1]
    assert block.pointwise.weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.01)
    assert block.depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)
    assert block.se.expand.weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.01)
    assert not block.se.expand.bias.any()
    assert not model.fc.bias.any()
    limit = 1000**-0.5
    assert model.fc.weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert model.fc.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)
    assert block.norm2.weight.eq(1).all()
    assert model.norm.weight.eq(1).all()
    with_shortcuts = tn.create_model("dsnet", stem=(8, 12), stages=dsnet_by_hand.STAGES, skip=True)
    assert not with_shortcuts.stages[0][1].norm3.weight.any()
    assert not with_shortcuts.stages[2][0].norm2.weight.any()
    assert with_shortcuts.stages[2][0].norm1.weight.eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": (16, 8)}, r"widths \(16, 8\) of stem: expected integers >= 1 in ascending order"),
        ({"stem": ()}, "of stem: expected"),
        ({"stages": [*STAGES[:2], ((16, 20), 1, 3, 2, "ds", False)]}, "stage 2 has 2 widths, but .* 3 sub-networks"),
        ({"stages": [STAGES[1], STAGES[1]]}, "2 stages with 2 gates"),
        ({"stages": []}, "0 stages with 0 gates"),
        ({"stages": [((8, 12), 1, 3)]}, "stage 0 is .*write it as"),
        ({"stages": [((8, 12), 0, 3, 1, "ds", False)]}, "blocks of stage 0=0"),
        ({"stages": [((8, 12), 1, 4, 1, "ds", False)]}, "expected an odd number, such as 3 or 5"),
        ({"stages": [((8, 12), 1, 3, 1, "dw", False)]}, "unknown kind of stage 0 'dw'"),
        ({"activation": "swich"}, "did you mean 'swish'"),
        ({"drop_rate": 1.0}, r"drop_rate=1\.0: expected a number in \[0, 1\)"),
        ({"se_ratio": 0}, "se_ratio=0"),
        ({"skip": "yes"}, "skip"),
        ({"head": -1}, "head=-1"),
        ({"widths": 3}, "unknown kwarg"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.create_model("dsnet", **arguments)
