"""The laws that every technique keeps, each a plain function that raises AssertionError when it is broken.

They know no technique: what they need is a network, a technique's config, and the verbs. The verbs are arguments where a
test of the laws themselves replaces them by broken ones.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import reference
import thriftnet as tn
from networks import perturb
from thriftnet.core.conv import GeneratedConv2d
from thriftnet.core.fold import is_foldable
from thriftnet.core.history import history
from thriftnet.core.spec import format_spec, to_dict
from thriftnet.core.tied import Tied, count_params
from thriftnet.core.width import WidthAware, set_width, widths
from thriftnet.dynamic.gate import SplitPoint, gates
from thriftnet.techniques import resolve
from thriftnet.techniques.filter_basis import SharedBasis, SharedBasisConv2d

Verb = Callable[..., nn.Module]


def at_each_width(model: nn.Module) -> Iterator[int | None]:
    """Select one width of the network after the other; a network of one width is left as it is, once."""
    if not widths(model):
        yield None
    for index in range(len(widths(model))):
        set_width(model, index=index)
        yield index


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """What the network computes, checked to be an output that a wrong network could not give by chance."""
    out: Tensor = model(x)
    assert out.isfinite().all(), "the output is not finite"
    assert out.abs().max() > 0.1, "the output is near 0: comparing it with another would prove nothing"
    assert (out - out[:1]).abs().max() > 1e-3 * out.abs().max(), "the output does not depend on the input"
    return out


def assert_close(got: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Largest difference against the largest magnitude."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= relative, f"{what}: relative error {error:.2e} is above {relative:.0e}"


def storages(tensors: Sequence[Tensor]) -> list[int]:
    """Which memory each tensor lives in."""
    return [tensor.untyped_storage()._cdata for tensor in tensors]


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every tensor that belongs into a state dict, by the tensor's id."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                names.setdefault(id(tensor), []).append(f"{prefix}.{key}" if prefix else key)
    return names


def tensors_by_id(model: nn.Module) -> dict[int, Tensor]:
    """The parameters and buffers of a network."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def everything_about(model: nn.Module) -> list[Any]:
    """A record of a network by which any change to it shows."""
    modules = [
        (name, id(module), type(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, id(tensor), tensor.requires_grad, tensor.dtype, tensor.detach().clone().numpy().tobytes())
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    ]
    return [modules, tensors, history(model), widths(model)]


def law_input_untouched(model: nn.Module, technique: Any, *, convert: Verb = tn.convert) -> None:
    """1: converting leaves the network it was given as it was, and shares no memory with it."""
    before = everything_about(model)
    converted = convert(model, technique)
    assert everything_about(model) == before, "convert changed the network it was given"
    common = {*storages([*model.parameters(), *model.buffers()])} & {
        *storages([*converted.parameters(), *converted.buffers()])
    }
    assert not common, "the converted network shares memory with the one it came from"


def law_plan_is_dry(model: nn.Module, technique: Any) -> None:
    """1: planning changes neither the network nor the random state, and tells what converting will do."""
    before, state = everything_about(model), torch.get_rng_state()
    planned = tn.plan(model, technique)
    assert everything_about(model) == before, "plan changed the network it was given"
    assert torch.equal(torch.get_rng_state(), state), "plan moved the random state"
    assert planned.rows, "the plan is empty"
    assert planned.params_before == count_params(model)
    assert planned.params_after == count_params(tn.convert(model, planned)) == count_params(tn.convert(model, technique))


def law_full_capacity(
    model: nn.Module, technique: Any, x: Tensor, select: str | None = None, *, convert: Verb = tn.convert
) -> None:
    """2: with as much capacity as the dense network has, the converted one computes the same."""
    converted = convert(model, technique, select=select)
    assert any(isinstance(m, Tied | WidthAware | GeneratedConv2d) for m in converted.modules()), "nothing was converted"
    assert_close(output(converted, x), output(model, x), 1e-10, "full capacity")


def law_fold_is_equal(model: nn.Module, x: Tensor, *, fold: Verb = tn.fold) -> None:
    """3: the folded network computes the same at every width, and folding leaves the converted one as it was."""
    for width in at_each_width(model):
        before = everything_about(model)
        folded = fold(model)
        assert_close(output(folded, x), output(model, x), 1e-12, f"fold at width {width}")
        assert everything_about(model) == before, "fold changed the network it was given"


def law_fold_is_plain(model: nn.Module, *, fold: Verb = tn.fold) -> None:
    """4: after folding nothing converted is left, and folding again changes nothing."""
    for _ in at_each_width(model):
        folded = fold(model)
        for name, module in folded.named_modules():
            what = f"{name!r} is still {type(module).__name__} after fold"
            assert not isinstance(module, Tied | WidthAware), what
            assert not is_foldable(module), what
            assert type(module).__module__.partition(".")[0] != "thriftnet", what
        again = fold(folded)
        assert [type(m) for m in again.modules()] == [type(m) for m in folded.modules()]
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), folded.state_dict().values(), strict=True))


def law_gradients(model: nn.Module, x: Tensor) -> None:
    """5: every parameter gets a gradient that is not zero, in training and in eval mode; there is no dense leftover.

    Gates are left out: at a fixed width they do not run, and they do not train until they are told to.
    """
    idle = {id(parameter) for gate in gates(model).values() for parameter in gate.parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) in idle)
    for training in (True, False):
        model.train(training).zero_grad(set_to_none=True)
        out = model(x)
        (out * torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        for name, parameter in model.named_parameters():
            if id(parameter) in idle:
                continue
            assert parameter.grad is not None, f"{name!r} gets no gradient"
            assert parameter.grad.isfinite().all(), f"the gradient of {name!r} is not finite"
            if not training:  # in training mode a norm takes away the gradient of a bias before it
                assert parameter.grad.abs().max() > 0, f"the gradient of {name!r} is 0"
    model.zero_grad(set_to_none=True)


def law_no_dense_leftover(model: nn.Module, technique: Any, *, convert: Verb = tn.convert) -> None:
    """5: what was converted is gone: no old layer, no old weight beside the new one."""
    planned = tn.plan(model, technique)
    old = dict(model.named_modules(remove_duplicate=False))
    converted = convert(model, planned)
    new = {_before_cut(name, converted): m for name, m in converted.named_modules(remove_duplicate=False)}
    for row in planned.rows:
        for name in row.names:
            assert new[name] is new[row.names[0]], f"{name!r} and {row.names[0]!r} were one layer and are two now"
            assert type(new[name]) is not nn.Conv2d, f"{name!r} is still a plain convolution"
            held = {key for key, _ in new[name].named_parameters(recurse=False)}
            generated = isinstance(getattr(type(new[name]), "weight", None), property)
            assert not (generated and "weight" in held), f"{name!r} computes its weight and stores a dense one, too"
            assert old[name] is not new[name]
    assert count_params(converted) == planned.params_after


def _before_cut(name: str, model: nn.Module) -> str:
    """The name that a layer had before the end of the front was put around it."""
    for cut in (name for name, module in model.named_modules() if isinstance(module, SplitPoint)):
        if name == f"{cut}.body" or name.startswith(f"{cut}.body."):
            return cut + name.removeprefix(f"{cut}.body")
    return name


def unscaled_penalty(model: nn.Module) -> Tensor:
    """The penalty without the technique's own factor."""
    return tn.penalty(model, scaled=False)


def law_penalty_once(model: nn.Module, *, penalty: Callable[[nn.Module], Tensor] = unscaled_penalty) -> None:
    """5: the penalty is a scalar, counts every shared part once, and is what the loops of the reference give."""
    value = penalty(model)
    assert value.shape == ()
    stages = []
    for bank in {id(m): m for m in model.modules() if isinstance(m, SharedBasis)}.values():
        if bank.shared is not None:
            unique = [] if bank.unique is None or not bank.unique_penalty else list(bank.unique.detach())
            stages.append((list(bank.shared.detach()), unique))
    whole = {id(m): m for m in model.modules() if isinstance(m, SharedBasisConv2d)}.values()
    stages += [([conv.weight.detach()], []) for conv in whole]
    terms = [m.penalty_term() for m in {id(m): m for m in model.modules() if hasattr(m, "penalty_term")}.values()]
    if not any(term.count for term in terms):
        assert value.item() == 0, "a network without penalty terms has a penalty"
        return
    assert value.requires_grad, "the penalty is not differentiable"
    if stages:
        expected = reference.average_similarity(stages)
    else:  # of a technique that the reference does not know
        totals = {term.family: [t for t in terms if t.family == term.family] for term in terms}
        expected = sum(sum(t.total.item() for t in family) / sum(t.count for t in family) for family in totals.values())
    assert abs(value.item() - expected) <= 1e-12 * expected, f"penalty {value.item()}, expected {expected}"


def law_state_dict(model: nn.Module, fresh: nn.Module, x: Tensor) -> None:
    """6: one key per tensor, safetensors takes it, and a freshly converted network loaded with it is bit-identical."""
    state = model.state_dict()
    held = storages(list(state.values()))
    assert len(held) == len({*held}), "two entries of the state dict share their memory"
    names = aliases(model)
    assert len(state) == len(names), f"{len(state)} keys for {len(names)} tensors"
    tensors = tensors_by_id(model)
    for key, every in names.items():
        assert every[0] in state, f"{every[0]!r} is not stored under its first name"
        assert storages([state[every[0]]]) == storages([tensors[key]]), f"{every[0]!r} holds another tensor"
    fresh.load_state_dict(safetensors.load(safetensors.save(state)), strict=True)
    assert_same_network(fresh, model, x)


def law_save_load(model: nn.Module, plain: nn.Module, x: Tensor, folder: Path) -> None:
    """6: a saved network comes back bit-identical, with the same keys and the same ties."""
    tn.save(model, folder)
    loaded = tn.load(folder, model=plain).eval()
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert ties(loaded) == ties(model)
    assert widths(loaded) == widths(model)
    assert_same_network(loaded, model, x)


def assert_same_network(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Two networks give the same bits at every width."""
    for position in at_each_width(other):
        if position is not None:
            set_width(one, index=position)
        assert torch.equal(output(one, x), output(other, x)), f"the outputs differ at width {position}"


def law_aliases(model: nn.Module, fresh: Callable[[], nn.Module], x: Tensor) -> None:
    """7: duplicated keys load, one alias alone loads, and what is missing under every name is reported once."""
    names, tensors = aliases(model), tensors_by_id(model)
    shared = {key: alias for key, alias in names.items() if len(alias) > 1}
    assert shared, "no tensor of this network has two names: the law would hold for nothing"
    duplicated = {alias: tensors[key].detach().clone() for key, every in names.items() for alias in every}
    last_only = {every[-1]: tensors[key].detach().clone() for key, every in names.items()}
    for written in (duplicated, last_only):
        loaded = fresh()
        loaded.load_state_dict(written, strict=True)
        assert_same_network(loaded, model, x)
    for every in shared.values():
        if every[0].endswith("num_batches_tracked"):
            continue  # torch itself fills this one in, for files older than it
        for written in (duplicated, model.state_dict()):
            rest = {key: value for key, value in written.items() if key not in every}
            result = fresh().load_state_dict(rest, strict=False)
            assert result.missing_keys == every[:1], (
                f"{every} taken out: reported as missing should be the first, once, but are {result.missing_keys}"
            )
            assert not result.unexpected_keys


def ties(model: nn.Module) -> tuple[int, int]:
    """How many parameters there are, and under how many names."""
    return len(list(model.parameters())), len(list(model.named_parameters(remove_duplicate=False)))


def law_copies_keep_ties(model: nn.Module, x: Tensor) -> None:
    """8: a deep copy, a pickled copy and a copy in another type have the same ties and compute the same."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),  # noqa: S301  # our own bytes
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for how, made in copies.items():
        assert ties(made) == ties(model), f"{how} changed the ties: {ties(made)}, before {ties(model)}"
        assert not {*storages(list(made.parameters()))} & {*storages(list(model.parameters()))}, f"{how} shares memory"
        assert list(made.state_dict()) == list(model.state_dict()), f"{how} changed the keys of the state dict"
        assert_same_network(made, model, x)
    single = copy.deepcopy(model).to(torch.float32)
    assert ties(single) == ties(model), "`.to` changed the ties"
    assert list(single.state_dict()) == list(model.state_dict())
    for position in at_each_width(model):
        if position is not None:
            set_width(single, index=position)
        assert_close(output(single, x.float()).double(), output(model, x), 1e-4, "`.to(float32)`")


def law_compiles(model: nn.Module, x: Tensor) -> None:
    """9: the compiled network, in one graph, computes the same, forward and backward, at every width."""
    for width in at_each_width(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        compiled(x).square().sum().backward()
        assert_close(output(compiled, x), output(model, x), 1e-12, f"compiled at width {width}")
        for (name, parameter), grad in zip(model.named_parameters(), expected, strict=True):
            assert (parameter.grad is None) == (grad is None)
            if grad is not None and parameter.grad is not None:
                assert_close(parameter.grad, grad, 1e-10, f"compiled, gradient of {name!r}")
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)


def law_spec(technique: Any) -> None:
    """11: a config survives being written as text, as JSON, and inside a plan."""
    assert resolve(format_spec(technique)) == technique, f"{format_spec(technique)} is read as another config"
    written = json.loads(json.dumps(to_dict(technique)))
    assert resolve(written) == technique, f"{written} is read as another config"
    assert hash(resolve(written)) == hash(technique)
    assert resolve(technique) is technique


def law_plan_json(model: nn.Module, technique: Any, x: Tensor) -> None:
    """11: a plan survives being written as JSON: converting by it gives the same network."""
    planned = tn.plan(model, technique)
    read = tn.Plan.from_json(planned.to_json())
    assert read.to_json() == planned.to_json()
    assert read.groups == planned.groups
    assert str(read) == str(planned)
    torch.manual_seed(3)
    by_config = tn.convert(model, technique)
    torch.manual_seed(3)
    by_plan = tn.convert(model, read)
    assert list(by_plan.state_dict()) == list(by_config.state_dict())
    assert_same_network(by_plan, by_config, x)


def law_pair(
    model: nn.Module, first: Any, second: Any, x: Tensor, *, convert: Verb = tn.convert, fold: Verb = tn.fold
) -> bool:
    """12: two techniques in order either compose exactly at every width, or the second refuses; nothing else happens.

    Returns:
        Whether they compose.
    """
    one = convert(model, first)
    before = everything_about(one)
    try:
        both = convert(one, second)
    except tn.IncompatibleModelError:
        assert everything_about(one) == before, "a refused conversion changed the network it was given"
        return False
    assert (
        [type(m) for m in both.modules()] != [type(m) for m in one.modules()]
        or ties(both) != ties(one)
        or (widths(both) != widths(one))
    ), "the second technique changed nothing and did not say so"
    perturb(both).eval()
    law_fold_is_equal(both, x, fold=fold)
    law_fold_is_plain(both, fold=fold)
    return True


def law_nothing_to_convert(technique: Any, *, convert: Verb = tn.convert) -> None:
    """13: where there is nothing to convert, converting raises and says for which technique and network."""
    for model in (nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Embedding(4, 4))):
        try:
            convert(model, technique)
        except tn.IncompatibleModelError as error:
            text = str(error)
            assert format_spec(technique) in text, f"the message does not name the technique: {text}"
            assert "Sequential" in text or "Embedding" in text, f"the message names neither network nor layer: {text}"
        else:
            raise AssertionError(f"{technique} converted nothing, silently")


def law_average_moves_once(model: nn.Module) -> None:
    """14: an exponential average moves every parameter exactly once per step, tied ones too, and keeps the ties."""
    average = AveragedModel(model, avg_fn=lambda old, new, _: old + (new - old) / 4)
    assert ties(average.module) == ties(model)
    average.update_parameters(model)  # the first step copies
    start = [parameter.detach().clone() for parameter in average.module.parameters()]
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(1.0)
    average.update_parameters(moved)
    for (name, parameter), before in zip(average.module.named_parameters(), start, strict=True):
        assert_close(parameter.detach() - before, torch.full_like(before, 0.25), 1e-12, f"step of the average of {name!r}")


def law_exports(model: nn.Module, x: Tensor) -> None:
    """16: the exported program computes the same at every width, and holds every tensor once."""
    for width in at_each_width(model):
        with torch.no_grad():
            program = torch.export.export(model, (x,))
        assert_close(program.module()(x).detach(), output(model, x), 1e-12, f"exported at width {width}")
        held = {tensor.untyped_storage()._cdata for tensor in program.state_dict.values()}
        assert len(held) <= len(aliases(model)), "the exported program unties what was tied"


def law_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """16: the ONNX file computes the same in onnxruntime, in float32."""
    import onnxruntime

    model, x = copy.deepcopy(model).float(), x.float()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(got), output(model, x), 1e-4, "ONNX")
