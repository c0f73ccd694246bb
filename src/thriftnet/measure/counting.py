"""Counting the parameters of a network and the cost of one forward.

Operations are counted by torch's own counter as they run, and charged to the running layer: a weight used four times costs
four times, a layer that never runs costs nothing, and a function called in a block is charged to the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from thriftnet.arguments import InputSize, checked
from thriftnet.core.conv import GeneratedConv
from thriftnet.core.linear import GeneratedLinear
from thriftnet.core.module import ThriftyModule
from thriftnet.core.provenance import input_size_of
from thriftnet.core.untouched import untouched
from thriftnet.core.width import width, widths
from thriftnet.core.wrappers import unwrapped
from thriftnet.errors import IncompatibleModelError, first_line
from thriftnet.measure.layers import LayerCost, layer_costs, saved_tensors
from thriftnet.measure.report import Report

Purpose = Literal["execution", "generated layer", "weight", "shift"]


@checked
def inspect(model: nn.Module, input_size: InputSize | None = None) -> Report:
    """Parameters of a network and the cost of one image, with shared parts counted correctly.

    Counted are convolutions, linear layers and matrix products (attention's, too), each time they run. Computing weights
    is counted separately, and shifts as bytes. Norms, activations, additions and pooling are not counted; the report names
    the operations that ran without a formula. The network runs once, in eval mode on zeros; its modes, buffers, hooks and
    width, and the random state, are restored even if it fails.

    Args:
        model: Any network, on any device; it must accept one batch of images.
        input_size: Channels, height and width of an image. By default, the size that the network states: networks of the
            zoo, of timm and of model files do.

    Returns:
        Totals and one row per layer; prints as a table.

    Raises:
        ConfigError: ``input_size`` is not three integers >= 1, or is left out and the network does not state one.
        IncompatibleModelError: The network does not run on such an input, or has lazy layers that never ran.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        >>> report = inspect(nn.Sequential(conv, nn.ReLU()), input_size=(3, 16, 16))
        >>> report.params, report.macs
        (216, 55296)
    """
    network = unwrapped(model)
    size = input_size_of(network, input_size)
    _refuse_lazy(network)
    with untouched(network):
        found = layer_costs(network)
        uncounted = _run(network, size, found)
    rows = tuple(row for cost in found.values() if (row := cost.row()).matters or cost.is_leaf)
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved_tensors(network))
    return Report(type(network).__name__, size, rows, uncounted, width(network) if widths(network) else None, size_bytes)


def layer_macs(layer: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of one run of a layer, on one input of this shape (without the batch)."""
    found = layer_costs(layer)
    _run(layer, tuple(shape), found)
    return sum(cost.macs for cost in found.values())


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise IncompatibleModelError(
                f"parameter {name!r} of {type(model).__name__} has no shape yet: run the network on one batch first"
            )


def _run(model: nn.Module, size: tuple[int, ...], found: dict[int, LayerCost]) -> dict[str, int]:
    """Run ``model`` once and charge its layers; returns the operations without a formula."""
    tensors = [*model.parameters(), *model.buffers()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()] or [torch.zeros(())]
    images = torch.zeros(1, *size, device=(tensors or floating)[0].device, dtype=floating[0].dtype)
    counter = FlopCounterMode(display=False, custom_mapping=VECTOR_PRODUCTS)
    meter = _Meter(counter, found, found[id(model)])
    uncounted = _Uncounted(meter)
    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # those take no hooks
                stack.callback(module.register_forward_pre_hook(meter.enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(meter.leave, always_call=True).remove)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            stack.callback(
                parameter.requires_grad_(False).requires_grad_
            )  # torch's counter trips over views of what needs them
        try:
            with uncounted, counter:
                model(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise IncompatibleModelError(
                f"{type(model).__name__} does not run on input_size={size}: {first_line(error).rstrip('.')}. "
                "Give the size it was made for: inspect(model, input_size=(C, H, W))"
            ) from error
        meter.settle()
    return dict(sorted(uncounted.ops.items()))


class _Meter:
    """Hooks that charge operations to the running layer."""

    def __init__(self, counter: FlopCounterMode, found: dict[int, LayerCost], root: LayerCost) -> None:
        self.counter, self.found = counter, found
        self.convolutions = {op for op in counter.flop_registry if "conv" in str(op)}
        self.running: list[tuple[LayerCost, Purpose]] = [(root, "execution")]  # modules: what they are charged to, and why
        self.settled = (0, 0)

    def _counts(self) -> tuple[int, int]:
        """Operations so far: all, and those of convolutions."""
        ops = self.counter.flop_counts["Global"]
        return sum(ops.values()), sum(flops for op, flops in ops.items() if op in self.convolutions)

    def settle(self) -> None:
        """Charge the operations since the last call to the innermost running module."""
        before, self.settled = self.settled, self._counts()
        macs, convolution_macs = ((now - then) // 2 for now, then in zip(self.settled, before, strict=True))
        cost, purpose = self.running[-1]
        if purpose == "execution":
            cost.macs += macs
        elif purpose == "generated layer":
            cost.macs += convolution_macs  # the rest computes the weight, whose cost the layer states
        elif purpose == "weight":
            cost.generation_macs += macs

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a module runs."""
        self.settle()
        (outer, purpose), own = self.running[-1], self.found.get(id(module))
        cost = outer if own is None or outer.is_leaf else own
        cost.calls += cost is own
        self.running.append((cost, _purpose(module) if purpose == "execution" else purpose))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a module ran, or failed (an error that the network may handle itself); then ``output`` is None."""
        self.settle()
        cost, _ = self.running.pop()
        if isinstance(module, GeneratedConv | GeneratedLinear):
            cost.generation_macs += module.generation_macs
        if _purpose(module) == "shift" and output is not None:
            cost.shift_bytes += module.moved_bytes(output)  # type: ignore[operator]
        if cost.module is module and cost.output is None:
            cost.output = next((tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        self.settled = self._counts()


def _purpose(module: nn.Module) -> Purpose:
    """The purpose of the operations inside a module."""
    if isinstance(module, ThriftyModule) and callable(getattr(module, "moved_bytes", None)):
        return "shift"  # some implementations are depthwise convolutions, but multiply nothing
    if isinstance(module, ParametrizationList):
        return "weight"
    return "generated layer" if isinstance(module, GeneratedConv) else "execution"


class _Uncounted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations without a formula, except those that compute nothing, and those of shifts, counted in bytes."""

    supports_higher_order_operators = True

    def __init__(self, meter: _Meter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meter = meter
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = getattr(func, "overloadpacket", func)
        in_shift = self.meter.running[-1][1] == "shift"
        computes = not getattr(func, "is_view", False) and str(op) not in BOOKKEEPING
        if op not in self.meter.counter.flop_registry and not in_shift and computes:
            self.ops[str(op)] += 1
        return func(*args, **(kwargs or {}))


def _matrix_vector_flops(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


ALLOCATING = (
    "empty empty_like empty_strided full full_like new_empty new_full new_zeros ones ones_like resize_ zeros zeros_like"
)
COPYING = "_to_copy _unsafe_view arange clone contiguous copy_ detach_ fill_ lift_fresh reshape scalar_tensor zero_"
BOOKKEEPING = {f"aten.{name}" for name in (*ALLOCATING.split(), *COPYING.split())}
VECTOR_PRODUCTS = {  # matrix products that torch's table lacks
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.addmv: lambda _, matrix, *args, **kwargs: _matrix_vector_flops(matrix),
    torch.ops.aten.dot: lambda left, *args, **kwargs: 2 * left[0],
}
