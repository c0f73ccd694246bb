"""Which channels of a network belong together, found by running it on the meta device.

Every parameter begins with axes of its own; the operations that run make them equal, see `channel_rules`. Channels of the image and of
the outputs, and those whose number the code fixes, stay whole.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thriftnet.core.channel_rules import RULES, SIZES_GIVEN, Axes, Call, pointwise, unknown
from thriftnet.core.probe import IgnoreOuterModes, Inputs, feed, hookable, tensors
from thriftnet.core.spaces import Axis, Space, keep_whole, leaves, length, mark_made, repeated, unify
from thriftnet.core.width import WidthAware, channels_of
from thriftnet.errors import IncompatibleModelError, first_line

COUNTS = re.compile(
    r"head|group|chan|dim|feature|chs|width|plane|hidden|embed|filter|^c$|^nc$"
)  # attributes that count channels

OnStep: TypeAlias = Callable[[str, bool, list[Tensor]], None]


class Step(NamedTuple):
    """The beginning or end of a module's forward."""

    name: str
    begins: bool
    shapes: list[list[tuple[int, Axis]]]  # length and channels of each axis of each tensor that enters or leaves


class ChannelTrace(TorchDispatchMode):
    """Follows the channels of a network, which is on the meta device, while it runs.

    Args:
        ghost: The network.
        front: Whether a module of this name runs before the gate, where all channels are kept.
        cut: Name of the module after which narrower networks read the first channels only.

    Attributes:
        params: Axes of the parameters and buffers that were read, by name of the module and of the tensor.
        counts: Channels that attributes of modules count, by name of the module and of the attribute.
        steps: What ran, in order.
        own: Axes in the operations of each class of modules itself; under (class, True) those of operations that are given sizes.
    """

    def __init__(self, ghost: nn.Module, front: Callable[[str], bool] = lambda _: False, cut: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ghost, self.front, self.cut = ghost, front, cut
        self.params: dict[tuple[str, str], Axes] = {}
        self.counts: dict[tuple[str, str], Axis] = {}
        self.steps: list[Step] = []
        self.own: dict[tuple[type, bool], list[Axis]] = defaultdict(list)
        self.stack: list[tuple[str, nn.Module]] = []
        self.modes: list[bool] = []  # whether it ran in training mode
        self.cut_axis: Axis = None
        self._arrived: Axes = []
        self._opaque = 0  # depth within layers whose weights are computed
        self._known: dict[int, tuple[Tensor, Axes]] = {}  # holds the tensors, so that no id is used twice
        self._owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for name, module in ghost.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                    self._owners[id(tensor)].append((name, key))

    @torch.no_grad()
    def run(self, inputs: Inputs) -> None:
        """Run the network: in eval mode, and where layers did not run, in training mode as well."""
        layers = {name for name, module in self.ghost.named_modules() if any(True for _ in module.parameters(recurse=False))}
        for training in (False, True):
            if training and layers <= {step.name for step in self.steps}:
                break
            self.modes.append(training)
            self.ghost.train(training)
            try:
                with running(self.ghost, self._step), self:
                    feed(self.ghost, inputs)
            except Exception as error:
                if not training:
                    raise
                idle = next(iter(layers - {step.name for step in self.steps}))
                raise IncompatibleModelError(
                    f"{type(self.ghost).__name__} runs on {_sizes(inputs)} in eval mode only, and {idle!r} does not run there: "
                    f"{first_line(error)}. Give what it is trained with: input_size=(C, H, W), or example=..."
                ) from None
            for axes in self.steps[-1].shapes:
                for _, axis in axes:
                    keep_whole(axis, "they reach the network's output")
        self.ghost.eval()
        of_steps = [axis for step in self.steps for shape in step.shapes for _, axis in shape]
        for axis in (*self.counts.values(), *of_steps, *(axis for axes in self.params.values() for axis in axes)):
            for space, each in leaves(axis or ()):
                if not space.made:
                    keep_whole([(space, each)], "no layer makes them")

    def axes(self, tensor: Tensor) -> Axes:
        """Channels of each axis of a tensor."""
        if id(tensor) not in self._known:
            owners = self._owners.get(id(tensor), [])
            axes: Axes = [[(Space(size), 1)] if owners and size > 1 else None for size in tensor.shape]
            for owner in owners:
                self.params[owner] = axes
                for axis in axes:
                    if self.front(owner[0]):
                        keep_whole(axis, "it runs before the gate")
                    if isinstance(self.ghost.get_submodule(owner[0]), torch.jit.ScriptModule):
                        keep_whole(axis, "it is scripted")
            self._known[id(tensor)] = tensor, axes
        return self._known[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not self._opaque and outputs and self._reads_channels((args, kwargs)):
            self._follow(func, args, kwargs or {}, outputs)
        return out

    def _reads_channels(self, given: object) -> bool:
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        return any(axis is not None for tensor in tensors for axis in self.axes(tensor))

    def _follow(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        schema = func._schema.arguments
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        name = func.__name__.partition(".")[0].rstrip("_")
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else unknown)
        where, module = self.stack[-1] if self.stack else ("", self.ghost)
        call = Call(given, outputs, self.axes, self._note, heads(module), f"{name} in {type(module).__name__} {where!r}")
        found = rule(call)
        for tensor, axes in zip(outputs, found, strict=True):
            fitting = len(axes) == tensor.ndim and all(
                axis is None or length(axis) == size for axis, size in zip(axes, tensor.shape, strict=True)
            )
            if not fitting:
                call.whole(*axes)
            self._known[id(tensor)] = tensor, axes if fitting else [None] * tensor.ndim
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        own = self.own[type(module), name in SIZES_GIVEN]
        own.extend(axis for tensor in (*tensors, *outputs) for axis in self.axes(tensor) if axis is not None)

    def _note(self, attribute: str, value: int, axis: Axis) -> None:
        """The running module's attribute, or those of this value that count channels, count these."""
        if axis is None or not self.stack:
            return
        name, module = self.stack[-1]
        held = vars(module)
        if attribute:
            found = [attribute] if held.get(attribute) in (value, (value,)) else []
        else:
            found = [key for key, each in held.items() if type(each) is int and each == value and COUNTS.search(key)]
        for key in found:
            unify(axis, self.counts.setdefault((name, key), axis), f"{type(module).__name__} {name!r} counts them as others")

    def _step(self, name: str, begins: bool, tensors: list[Tensor]) -> None:
        module = self.ghost.get_submodule(name)
        if begins:
            self.stack.append((name, module))
        if isinstance(module, WidthAware):
            self._opaque += 1 if begins else -1
        if self._opaque == 1 and begins and isinstance(module, WidthAware):
            self._arrived = [*self.axes(tensors[0])]
        if not self._opaque and not begins and isinstance(module, WidthAware):
            self._known[id(tensors[0])] = tensors[0], self._through(name, module, tensors[0])
        if not begins:
            self.stack.pop()
            if name == self.cut:
                axes, self.cut_axis = self.axes(tensors[0]), [(Space(tensors[0].shape[1]), 1)]
                mark_made(self.cut_axis)
                self._known[id(tensors[0])] = tensors[0], [axes[0], self.cut_axis, *axes[2:]]
        if not self._opaque or (self._opaque == 1 and begins and isinstance(module, WidthAware)):
            shapes = [list(zip(tensor.shape, self.axes(tensor), strict=True)) for tensor in tensors]
            self.steps.append(Step(name, begins, shapes))

    def _through(self, name: str, layer: WidthAware, out: Tensor) -> Axes:
        """Channels that leave a layer that can be narrowed itself, such as one whose weight is computed."""
        why = f"they pass {type(layer).__name__} {name!r}"
        ins, outs = channels_of(layer)
        groups = int(getattr(layer, "groups", getattr(layer, "num_groups", 1)))
        group: Axis = [(Space(groups), 1)]
        of_ins: Axis = [(Space(ins), 1)] if groups == 1 else repeated(group, 1, ins // groups)
        of_outs: Axis = [(Space(outs), 1)] if groups == 1 else repeated(group, 1, outs // groups)
        if groups == 1 and not layer.chooses_outs:
            of_outs = of_ins
        mark_made(of_outs)
        at, axes = layer.channel_axis % out.ndim, self._arrived
        unify(axes[at], of_ins, why)
        unify(of_ins, self.counts.setdefault((name, "ins"), of_ins), why)
        unify(of_outs, self.counts.setdefault((name, "outs"), of_outs), why)
        if self.front(name):
            keep_whole(of_ins, "it runs before the gate")
            keep_whole(of_outs, "it runs before the gate")
        return [
            of_outs if i == at else axis if size == out.shape[i] else None
            for i, (size, axis) in enumerate(self._sized(out, axes))
        ]

    @staticmethod
    def _sized(out: Tensor, axes: Axes) -> list[tuple[int, Axis]]:
        return [(out.shape[i] if axis is None else length(axis), axis) for i, axis in enumerate(axes)]


def _sizes(inputs: Inputs) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors(inputs))


def heads(module: nn.Module) -> int:
    """Number of attention heads of a module, 0 if it states none."""
    stated = (value for key, value in vars(module).items() if "head" in key and "dim" not in key and type(value) is int)
    return max(stated, default=0)


@contextmanager
def running(ghost: nn.Module, step: OnStep, known: Collection[str] | None = None) -> Iterator[None]:
    """Tells of the beginning and end of each module's forward, with the tensors that enter and leave; attention runs unfused.

    ``known`` limits it to modules of these names.
    """
    handles = []
    fused = torch.backends.mha.get_fastpath_enabled()

    for name, module in hookable(ghost):
        handles += (
            []
            if known is not None and name not in known
            else [
                module.register_forward_pre_hook(
                    lambda _, a, k, name=name: step(name, True, tensors((a, k))), with_kwargs=True
                ),
                module.register_forward_hook(lambda _, a, out, name=name: step(name, False, tensors(out))),
            ]
        )
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with IgnoreOuterModes(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
