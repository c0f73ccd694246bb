"""One technique on one network: everything that should hold, tried out."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import thriftnet as tn
from compat.meaning import without_meaning
from compat.sample import Inputs, Sample
from thriftnet.core.fold import is_foldable
from thriftnet.core.history import history
from thriftnet.core.probe import input_size
from thriftnet.core.spec import format_spec
from thriftnet.core.tied import count_params, first_names
from thriftnet.errors import ThriftnetError, first_line

VERDICTS = ("exact", "refused", "no meaning", "wrong", "late", "crash")
MEANING = {
    "exact": "every check holds",
    "refused": "`convert` refuses it, and says why",
    "no meaning": "the network has nothing for the technique",
    "wrong": "a check does not hold",
    "late": "converted, but another verb refuses the result",
    "crash": "an error that is not thriftnet's, the end of the process, or no end within the limit",
}


@dataclass
class Cell:
    """The result of one technique on one network.

    Args:
        network: Its name in the list.
        technique: The config as text.
        verdict: One of `VERDICTS`.
        step: What was tried when it ended.
        reason: The message of a refusal or an error, or what does not hold.
        before: Parameters of the plain network.
        after: Parameters of the converted one; of a slimmable one, at its smallest width.
        notes: What could not be checked.
        seconds: Processor time that it took.
    """

    network: str
    technique: str
    verdict: str = "exact"
    step: str = ""
    reason: str = ""
    before: int = 0
    after: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class UntrueError(Exception):
    """A check that does not hold."""


def check(holds: bool, otherwise: str) -> None:
    """Raise unless something is as it should be."""
    if not holds:
        raise UntrueError(otherwise)


class Plain:
    """A network before it is converted, with what it does by itself: a technique owes no more.

    Args:
        sample: Where it comes from.
    """

    def __init__(self, sample: Sample) -> None:
        model, self.inputs = sample.build()
        model = randomised(model)
        self.tolerance, self.notes = 1e-4, []
        dtypes = {t.dtype for t in model.parameters() if t.is_floating_point()}
        if dtypes == {torch.float32}:
            try:
                doubled = copy.deepcopy(model).double().eval()
                doubles = in_double(self.inputs)
                if all(t.dtype == torch.float64 for t in tensors(run(doubled, doubles)) if t.is_floating_point()):
                    model, self.inputs, self.tolerance = doubled, doubles, 1e-9
            except Exception:
                self.notes.append("not in float64")
        elif dtypes & {torch.float16, torch.bfloat16}:
            self.tolerance = 2e-2
        self.model = model.eval()
        self.output = run(self.model, self.inputs)
        if not all(bool(leaf.isfinite().all()) for leaf in tensors(self.output) if not leaf.is_meta):
            self.notes.append("its output is not finite")
        self.copies = attempt(lambda: copy.deepcopy(self.model)) is not None
        self.saves = attempt(self._saved) is not None
        traced = attempt(lambda: run(torch.fx.symbolic_trace(self._copy()), self.inputs))
        self.traces = traced is not None and equal(traced, self.output)
        self.ties_lost: int | None = attempt(self._assigned) if self.copies else None
        found = (
            attempt(lambda: without_gradient(self._copy(), self.inputs)) if self.copies else None
        )  # it changes statistics
        self.without_gradient: set[str] = {"all"} if found is None else found
        if "all" in self.without_gradient:
            self.notes.append("cannot be trained")

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.model) if self.copies else self.model

    def _assigned(self) -> int:
        """Parameters that load_state_dict(assign=True) adds, since it unties what modules share; an error if it fails."""
        return count_params(reassigned(self.model)) - count_params(self.model)

    def _saved(self) -> bool:
        with tempfile.TemporaryDirectory(prefix="thriftnet-compat-") as folder:
            tn.save(self.model, folder)
            tn.load(folder, model=self.model)
        return True


def measure(sample: Sample, plain: Plain, technique: Any, name: str) -> Cell:
    """Try a technique on a network.

    Args:
        sample: The network.
        plain: The same, built.
        technique: A config.
        name: The technique's name in the registry.
    """
    start = time.process_time()
    cell = Cell(sample.name, format_spec(technique), before=count_params(plain.model), notes=tuple(plain.notes))
    try:
        for step in steps(plain, technique, cell):
            cell.step = step
    except UntrueError as untrue:
        cell.verdict, cell.reason = "wrong", str(untrue)
    except ThriftnetError as error:
        cell.verdict, cell.reason = "refused" if cell.step == "convert" else "late", str(error)
    except Exception as error:
        cell.verdict, cell.reason = "crash", f"{type(error).__name__}: {first_line(error)}"
    if cell.verdict == "refused" and (why := without_meaning(name, plain.model)):
        cell.verdict, cell.reason = "no meaning", why
    cell.seconds = round(time.process_time() - start, 2)
    return cell


def steps(plain: Plain, technique: Any, cell: Cell) -> Iterator[str]:
    """Everything that should hold, as a sequence of steps; each is named before it is done."""
    yield "convert"
    converted = _converted(plain, technique)
    planned = history(converted)[-1]["plan"]
    cell.after = planned["params_after"]
    check(planned["params_before"] == cell.before, "the plan counts other parameters than the network has")
    check(cell.after == count_params(converted), "the plan counts other parameters than the converted network has")

    kept(plain.model, converted, planned["rows"])

    yield "run"
    if plain.copies:
        same(run(plain.model, plain.inputs), plain.output, 0.0, "the network given to convert computes something else since")
    before = run(converted, plain.inputs)
    errors = [row["relative_error"] for row in planned["rows"] if "Norm" not in row["layer"]]
    if errors and all(error is not None and error < 1e-12 for error in errors):
        same(before, plain.output, plain.tolerance, "all weights are as before, but the output is not")
    elif any(error is not None and error > 1e-3 for error in errors):
        check(not equal(before, plain.output), "weights have changed, but the output has not: the old layers run")
    check(
        shapes(before) == shapes(plain.output), f"the output has other shapes: {shapes(before)}, not {shapes(plain.output)}"
    )
    randomise_norms(converted)

    if "all" not in plain.without_gradient and plain.copies:
        yield "gradients"
        missing = without_gradient(copy.deepcopy(converted), plain.inputs) - plain.without_gradient
        missing = {name for name in missing if not _in_unused(name, plain)}
        check(not missing, f"no gradient reaches {len(missing)} parameters, such as {min(missing, default='')}")

    output = run(converted, plain.inputs)
    if plain.ties_lost is not None:
        yield "deepcopy and load_state_dict(assign=True)"
        twin = reassigned(converted)
        check(count_params(twin) - count_params(converted) <= plain.ties_lost, "a copy has lost ties")
        same(run(twin, plain.inputs), output, 0.0, "a copy computes something else")

    yield "fold"
    folded = tn.fold(copy.deepcopy(converted) if plain.copies else converted, inplace=True)
    check(not [m for m in folded.modules() if _ours(m)], "layers are left after folding")
    same(run(folded, plain.inputs), output, plain.tolerance, "the folded network computes something else")
    if not plain.copies:
        return

    available = tn.widths(converted)
    for index in range(len(available)):
        yield f"width {available[index]}"
        tn.set_width(converted, index=index)
        narrow = run(converted, plain.inputs)
        check(shapes(narrow) == shapes(output), f"the output has other shapes: {shapes(narrow)}, not {shapes(output)}")
        if index == 0:
            frozen = tn.freeze(converted, index=0)
            cell.after = count_params(frozen)
            same(run(frozen, plain.inputs), narrow, plain.tolerance, "the frozen network computes something else")

    if plain.traces:
        yield "torch.fx.symbolic_trace"
        same(
            run(torch.fx.symbolic_trace(converted), plain.inputs),
            output,
            plain.tolerance,
            "the traced network computes something else",
        )

    if plain.saves:
        yield "save and load"
        with tempfile.TemporaryDirectory(prefix="thriftnet-compat-") as folder:
            tn.save(converted, folder)
            loaded = tn.load(folder, model=plain.model)
        saved, read = first_names(converted), first_names(loaded)
        check(saved.keys() == read.keys(), "the loaded network has other tensors")
        check(all(equal(saved[key], read[key]) for key in saved), "the loaded network has other values")
        same(run(loaded, plain.inputs), output, 1e-12, "the loaded network computes something else")

    if (size := image_size(plain.inputs)) is not None and attempt(lambda: tn.inspect(plain.model, size)):
        yield "inspect"
        report = tn.inspect(converted, size)
        check(report.params == count_params(converted), f"inspect counts {report.params} parameters")


def _converted(plain: Plain, technique: Any) -> nn.Module:
    options: dict[str, Any] = {}
    if (size := image_size(plain.inputs)) is not None:
        options["input_size"] = None if attempt(lambda: input_size(plain.model)) else size
    else:
        args, kwargs = plain.inputs
        names = list(signature(plain.model.forward).parameters)
        options["example"] = {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args
    if not plain.copies:
        options["inplace"] = True
    return tn.convert(plain.model, technique, **options)


def _in_unused(name: str, plain: Plain) -> bool:
    """Whether a parameter without gradient is in place of a layer that got none before, either."""
    return any(name.startswith(f"{other.rpartition('.')[0]}.") for other in plain.without_gradient)


def _ours(module: nn.Module) -> bool:
    return is_foldable(module) and type(module).__module__.startswith("thriftnet.")


def kept(plain: nn.Module, converted: nn.Module, rows: list[dict[str, Any]]) -> None:
    """Raise if new layers lack something that the user had put on the old ones."""
    for name in (name for row in rows for name in row["names"]):
        old, new = plain.get_submodule(name), converted.get_submodule(name)
        for key, value in vars(old).items():
            if key.endswith("_hooks") and value:
                check(bool(vars(new).get(key)), f"the hooks of layer {name!r} are lost")
            elif not key.startswith("_") and key not in vars(standard(old)) and type(old).__module__.startswith("torch.nn"):
                check(hasattr(new, key), f"the attribute {key!r} of layer {name!r} is lost")
    names: dict[int, list[str]] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        for other in others:
            check(_tied(converted, first, other), f"{first!r} and {other!r} are one parameter no more")


def standard(layer: nn.Module) -> nn.Module:
    """A layer of the same kind as its class makes it."""
    known: dict[type[nn.Module], Callable[[], nn.Module]] = {
        nn.Conv2d: lambda: nn.Conv2d(1, 1, 1),
        nn.Linear: lambda: nn.Linear(1, 1),
    }
    return known.get(type(layer), lambda: layer)()


def _tied(model: nn.Module, first: str, other: str) -> bool:
    """Whether two parameters are one, or are made in modules that are one."""
    values = []
    for name in (first, other):
        module, _, leaf = name.rpartition(".")
        try:
            values.append(getattr(model.get_submodule(module), leaf, None))
        except AttributeError:
            values.append(None)
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in (first, other) if values[0] is not None]
    return values[0] is values[1] or (len(modules) == 2 and modules[0] is modules[1])


# -- running and comparing


def reassigned(model: nn.Module) -> nn.Module:
    """A copy, filled by load_state_dict(assign=True)."""
    twin = copy.deepcopy(model)
    twin.load_state_dict({key: clone(value) for key, value in model.state_dict().items()}, assign=True)
    return twin


def clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output of a network in eval mode."""
    torch.manual_seed(0)
    args, kwargs = tree_map(clone, inputs)
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


def leaves(output: Any) -> list[Any]:
    """Everything in an output, dataclasses opened."""
    found: list[Any] = []
    for leaf in tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [inner for field in dataclasses.fields(leaf) for inner in leaves(getattr(leaf, field.name))]
        elif isinstance(leaf, Mapping):
            found += leaves(dict(leaf))
        else:
            found.append(leaf)
    return found


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]


def shapes(output: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors(output)]


def equal(left: Any, right: Any) -> bool:
    """The same to the bit."""
    lefts, rights = tensors(left), tensors(right)
    return len(lefts) == len(rights) and all(
        a.shape == b.shape and (a.is_meta or bool(((a == b) | (a.isnan() & b.isnan())).all()))
        for a, b in zip(lefts, rights, strict=True)
    )


def same(got: Any, expected: Any, tolerance: float, otherwise: str) -> None:
    """Raise unless two outputs are equal but for rounding."""
    if equal(got, expected):
        return
    check(shapes(got) == shapes(expected), f"{otherwise}: shapes {shapes(got)}, not {shapes(expected)}")
    error = 0.0
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        if a.numel() and not a.is_meta:
            wide = torch.complex128 if a.is_complex() else torch.float64
            scale = max(float(b.to(wide).abs().max()), 1e-30)
            difference = float((a.to(wide) - b.to(wide)).abs().nan_to_num(nan=0.0).max()) / scale
            error = max(error, difference)
    check(error <= tolerance, f"{otherwise}: relative difference {error:.1e}")


def without_gradient(model: nn.Module, inputs: Inputs) -> set[str]:
    """Parameters that get no gradient in a step of training."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    torch.manual_seed(0)
    args, kwargs = tree_map(clone, inputs)
    model.zero_grad(set_to_none=True)
    total = sum(leaf.double().abs().sum() for leaf in tensors(model(*args, **kwargs)) if leaf.requires_grad)
    if not isinstance(total, Tensor):
        return {"all"}
    total.backward()  # type: ignore[no-untyped-call]
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def image_size(inputs: Inputs) -> tuple[int, int, int] | None:
    """Size of the images, if nothing but images goes in."""
    args, kwargs = inputs
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4 and args[0].is_floating_point():
        return tuple(args[0].shape[1:])  # type: ignore[return-value]
    return None


def in_double(inputs: Inputs) -> Inputs:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v, inputs)  # type: ignore[no-any-return]


def attempt(function: Callable[[], Any]) -> Any:
    """What a function gives; None if it fails."""
    try:
        return function()
    except Exception:
        return None


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Random values where a network begins with zeros or ones, which would hide errors; norms stay healthy."""
    generator = torch.Generator().manual_seed(1)
    for parameter in filter(_has_values, model.parameters()):
        constant = parameter.numel() < 2 or parameter.std() < 1e-4 * (parameter.abs().mean() + 1e-6)
        if constant or parameter.abs().max() < 1e-4:
            noise = torch.rand(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(0.5 + noise if parameter.flatten()[0] > 0.5 else 0.2 * noise + 0.05)
    return randomise_norms(model)


@torch.no_grad()
def randomise_norms(model: nn.Module) -> nn.Module:
    """Random running statistics in every norm."""
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        leaf = name.rpartition(".")[2]
        if not _has_values(buffer):
            continue
        if leaf.startswith("running_var"):
            buffer.copy_((0.5 + torch.rand(buffer.shape, generator=generator)).to(buffer))
        elif leaf.startswith("running_mean"):
            buffer.copy_((0.2 * torch.randn(buffer.shape, generator=generator)).to(buffer))
    return model


def _has_values(tensor: Tensor) -> bool:
    """Whether a parameter or buffer holds numbers that can be changed."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
        return False
    return tensor.is_floating_point() and tensor.numel() > 0
