"""How operations of torch pass channels on: one rule for each, by its name in the aten library.

A rule gets the call's arguments by name, the axes of a tensor by ``axes(tensor)`` and the outputs; it unifies what must be equal
and returns the axes of each output. Channels that enter or leave an operation without a rule stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from thriftnet.core.spaces import Axis, Space, is_whole, keep_whole, leaves, mark_made, part, repeated, unify

Axes: TypeAlias = list[Axis]
Rule: TypeAlias = Callable[["Call"], "list[Axes]"]


class Call:
    """One operation.

    Args:
        args: Its arguments by name.
        outputs: Its output tensors.
        axes: Gives the axes of a tensor.
        note: Tells that an attribute of the running module, or one with this value, counts these channels.
        heads: Number of attention heads of the running module, or 0.
        where: For reasons why channels stay whole.
    """

    def __init__(
        self,
        args: dict[str, Any],
        outputs: list[Tensor],
        axes: Callable[[Tensor], Axes],
        note: Callable[[str, int, Axis], None],
        heads: int,
        where: str,
    ) -> None:
        self.args, self.outputs, self.axes, self.note, self.heads, self.where = (
            SimpleNamespace(**args),
            outputs,
            axes,
            note,
            heads,
            where,
        )

    def unify(self, one: Axis, other: Axis) -> None:
        unify(one, other, f"{self.where} fixes them")

    def whole(self, *axes: Axis) -> None:
        for axis in axes:
            keep_whole(axis, f"{self.where} takes all of them")


def pointwise(call: Call) -> list[Axes]:
    """Element by element, with broadcasting."""
    tensors = [value for value in vars(call.args).values() if isinstance(value, Tensor)]
    (out, *others) = call.outputs
    return [broadcast(call, tensors, tuple(out.shape))] * (1 + len(others))


def broadcast(call: Call, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Axes:
    """Axes of what tensors of different axes are broadcast to."""
    found: Axes = [None] * len(shape)
    for i, size in enumerate(shape):
        met = []
        for tensor in tensors:
            own = i - len(shape) + tensor.ndim
            if own >= 0 and size > 1 and tensor.shape[own] == size:
                met.append(call.axes(tensor)[own])
        for axis in met[1:]:
            call.unify(met[0], axis)
        found[i] = next((axis for axis in met if axis is not None), None)
    return found


def same(call: Call) -> list[Axes]:
    """As many axes as the first tensor; those of another length are of fixed size."""
    x = first(call)
    return [[keep(call, axis, x.shape[i] == out.shape[i]) for i, axis in enumerate(call.axes(x))] for out in call.outputs]


def first(call: Call) -> Tensor:
    return next(value for value in vars(call.args).values() if isinstance(value, Tensor))


def keep(call: Call, axis: Axis, passes: bool) -> Axis:
    if not passes:
        call.whole(axis)
    return axis if passes else None


def convolution(call: Call) -> list[Axes]:
    args = call.args
    x, weight = call.axes(args.input), call.axes(args.weight)
    ins, outs, groups = args.input.shape[1], call.outputs[0].shape[1], args.groups
    of_ins, of_outs = (weight[0], weight[1]) if args.transposed else (weight[1], weight[0])
    if groups > 1:
        group: Axis = [(Space(groups), 1)]
        together = [repeated(group, 1, ins // groups), repeated(group, 1, outs // groups)]
        call.unify(weight[0], together[0] if args.transposed else together[1])
        call.unify(x[1], together[0])
        call.whole(weight[1])
        of_ins, of_outs = together
        call.note("groups", groups, group)
    call.unify(x[1], of_ins)
    if args.bias is not None:
        call.unify(of_outs, call.axes(args.bias)[0])
    call.whole(*weight[2:])
    mark_made(of_outs)
    call.note("in_channels", ins, of_ins)
    call.note("out_channels", outs, of_outs)
    out = call.outputs[0]
    beside = [keep(call, axis, args.input.shape[i] == out.shape[i]) for i, axis in enumerate(x[2:], 2)]
    return [[x[0], of_outs, *beside]]


def batch_norm(call: Call) -> list[Axes]:
    x = call.axes(call.args.input)
    for value in list(vars(call.args).values()):
        if isinstance(value, Tensor) and value is not call.args.input:
            call.unify(x[1], call.axes(value)[0])
    call.note("num_features", call.args.input.shape[1], x[1])
    rest: list[Axes] = [[None] for _ in call.outputs[1:]]
    return [x, *rest]


def layer_norm(call: Call) -> list[Axes]:
    args, x = call.args, call.axes(call.args.input)
    start = args.input.ndim - len(args.normalized_shape)
    for value in (args.weight, args.bias):
        for mine, its in zip(x[start:], call.axes(value) if value is not None else (), strict=False):
            call.unify(mine, its)
    if len(args.normalized_shape) == 1:
        call.note("normalized_shape", args.input.shape[-1], x[-1])
    else:
        call.whole(*x[start:])
    rest: list[Axes] = [[*x[:start], *[None] * (len(x) - start)] for _ in call.outputs[1:]]
    return [x, *rest]


def group_norm(call: Call) -> list[Axes]:
    args, x = call.args, call.axes(call.args.input)
    group: Axis = [(Space(args.group), 1)]
    call.unify(x[1], repeated(group, 1, args.C // args.group))
    for value in (args.weight, args.bias):
        if value is not None:
            call.unify(x[1], call.axes(value)[0])
    call.note("num_groups", args.group, group)
    call.note("num_channels", args.C, x[1])
    rest: list[Axes] = [[None] * out.ndim for out in call.outputs[1:]]
    return [x, *rest]


def matrix_product(call: Call) -> list[Axes]:
    """mm, bmm, mv and those that add something."""
    tensors = [value for value in vars(call.args).values() if isinstance(value, Tensor)]
    a, b = (call.axes(tensor) for tensor in tensors[-2:])
    call.unify(a[-1], b[0 if len(b) < 3 else 1])
    if len(a) == 3:
        call.unify(a[0], b[0])
    found = [*a[:-1], *b[1 if len(b) < 3 else 2 :]]
    mark_made(found[-1] if found else None)
    if len(a) == 2 and len(b) == 2:
        call.note("in_features", tensors[-2].shape[1], b[0])
        call.note("out_features", tensors[-1].shape[1], b[1])
    if len(tensors) == 3:
        of_bias = call.axes(tensors[0])
        for i, axis in enumerate(of_bias, len(found) - len(of_bias)):
            if tensors[0].shape[i - len(found)] > 1:
                call.unify(found[i], axis)
    return [found]


def cat(call: Call) -> list[Axes]:
    tensors = [tensor for tensor in call.args.tensors if tensor.ndim == call.outputs[0].ndim]
    dim, every = call.args.dim % call.outputs[0].ndim, [call.axes(tensor) for tensor in tensors]
    found = list(every[0])
    for axes in every[1:]:
        for i, axis in enumerate(axes):
            if i != dim:
                call.unify(found[i], axis)
                found[i] = found[i] or axis
    found[dim] = None
    if any(axes[dim] is not None for axes in every):
        pieces = zip(every, tensors, strict=True)
        found[dim] = [p for axes, x in pieces for p in axes[dim] or ([(Space(x.shape[dim], "of fixed size"), 1)])]
    return [found]


def stack(call: Call) -> list[Axes]:
    found = broadcast(call, call.args.tensors, tuple(call.args.tensors[0].shape))
    found.insert(call.args.dim % call.outputs[0].ndim, None)
    return [found]


def slices(call: Call) -> list[Axes]:
    """slice, narrow and split: neighbouring entries of one axis."""
    x, dim = first(call), call.args.dim % first(call).ndim
    axis, offset, found = call.axes(x)[dim], getattr(call.args, "start", 0) or 0, []
    offset += x.shape[dim] if offset < 0 else 0
    for out in call.outputs:
        size, axes = out.shape[dim], list(call.axes(x))
        if getattr(call.args, "step", 1) != 1:
            call.whole(axis)
            axes[dim] = None
        elif size != x.shape[dim]:
            axes[dim] = part(axis, offset, offset + size)
            call.note("", size, axes[dim])
        offset += size
        found.append(axes)
    return found


def select(call: Call) -> list[Axes]:
    """One entry of an axis, or each of them."""
    axes = list(call.axes(first(call)))
    call.whole(axes.pop(call.args.dim))
    return [axes] * len(call.outputs)


def index(call: Call) -> list[Axes]:
    x, indices = call.axes(call.args.self), list(call.args.indices)
    at = [i for i, each in enumerate(indices) if each is not None]
    call.whole(*(x[i] for i in at))
    out = call.outputs[0]
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in at):
        return unknown(call)
    new: Axes = [None] * (out.ndim - len(x) + len(at))
    if at == list(range(at[0], at[-1] + 1)):
        return [[*x[: at[0]], *new, *x[at[-1] + 1 :]]]
    return [[*new, *(axis for i, axis in enumerate(x) if i not in at)]]


def index_select(call: Call) -> list[Axes]:
    x = list(call.axes(call.args.self))
    call.whole(x[call.args.dim])
    x[call.args.dim] = None
    return [x]


def embedding(call: Call) -> list[Axes]:
    weight = call.axes(call.args.weight)
    call.whole(weight[0])
    return [[*[None] * (call.outputs[0].ndim - 1), weight[1]]]


def reduction(call: Call) -> list[Axes]:
    x, axes = first(call), call.axes(first(call))
    dims = getattr(call.args, "dim", None)
    dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % max(1, x.ndim) for dim in dims}
    if call.outputs[0].ndim == x.ndim:
        return [[None if i in gone else axis for i, axis in enumerate(axes)]] * len(call.outputs)
    return [[axis for i, axis in enumerate(axes) if i not in gone]] * len(call.outputs)


def pad(call: Call) -> list[Axes]:
    x, axes = call.args.self, list(call.axes(call.args.self))
    for number in range(len(call.args.pad) // 2):
        dim, (before, after) = x.ndim - 1 - number, call.args.pad[2 * number : 2 * number + 2]
        if axes[dim] is not None:
            inner = part(axes[dim], max(0, -before), x.shape[dim] + min(0, after))
            ends = [[(Space(extra), 1)] if extra > 0 else [] for extra in (before, after)]
            axes[dim] = [*ends[0], *(inner or ()), *ends[1]]
    return [axes]


def roll(call: Call) -> list[Axes]:
    axes = call.axes(call.args.self)
    call.whole(*(axes[dim] for dim in (call.args.dims or range(len(axes)))))
    return [axes]


def repeat(call: Call) -> list[Axes]:
    x, times = call.args.self, call.args.repeats
    new = len(times) - x.ndim
    found: Axes = [None] * new
    for i, axis in enumerate(call.axes(x), new):
        fresh = axis is None and x.shape[i - new] == 1 and times[i] > 1 and i > 0
        found.append([(Space(times[i]), 1)] if fresh else repeated(axis, times[i]))
    note_sizes(call, found)
    return [found]


def expand(call: Call) -> list[Axes]:
    x, out = call.args.self, call.outputs[0]
    new = out.ndim - x.ndim
    found: Axes = [None] * new
    for i, axis in enumerate(call.axes(x), new):
        fresh = x.shape[i - new] == 1 and out.shape[i] > 1 and i > 0
        found.append([(Space(out.shape[i]), 1)] if fresh else axis)
    note_sizes(call, found)
    return [found]


def note_sizes(call: Call, axes: Axes) -> None:
    for size, axis in zip(call.outputs[0].shape, axes, strict=True):
        call.note("", size, axis)


def permute(call: Call) -> list[Axes]:
    axes = call.axes(call.args.self)
    return [[axes[dim] for dim in call.args.dims]]


def transpose(call: Call) -> list[Axes]:
    axes = list(call.axes(call.args.self))
    a, b = getattr(call.args, "dim0", -2 % max(1, len(axes))), getattr(call.args, "dim1", -1)
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return [axes]


def unfold(call: Call) -> list[Axes]:
    axes = list(call.axes(call.args.self))
    call.whole(axes[call.args.dimension])
    axes[call.args.dimension] = None
    return [[*axes, None]]


def glu(call: Call) -> list[Axes]:
    x, dim = call.args.self, call.args.dim % call.args.self.ndim
    axes, half = list(call.axes(x)), x.shape[dim] // 2
    gates = part(axes[dim], half, 2 * half)
    axes[dim] = part(axes[dim], 0, half)
    call.unify(axes[dim], gates)
    return [axes]


def pixel_shuffle(call: Call) -> list[Axes]:
    axes, factor = list(call.axes(call.args.self)), call.args.upscale_factor
    space: Axis = [(Space(call.outputs[0].shape[-3]), 1)]
    call.unify(axes[-3], repeated(space, 1, factor * factor))
    return [[*axes[:-3], space, None, None]]


def pixel_unshuffle(call: Call) -> list[Axes]:
    axes, factor = call.axes(call.args.self), call.args.downscale_factor
    return [[*axes[:-3], repeated(axes[-3], 1, factor * factor), None, None]]


def fourier(call: Call) -> list[Axes]:
    axes = list(call.axes(call.args.self))
    for dim in call.args.dim:
        call.whole(axes[dim])
        axes[dim] = None
    return [axes]


def view_as_complex(call: Call) -> list[Axes]:
    axes = call.axes(call.args.self)
    call.whole(axes[-1])
    return [axes[:-1]]


def view_as_real(call: Call) -> list[Axes]:
    return [[*call.axes(call.args.self), None]]


def view(call: Call) -> list[Axes]:
    """Axes that are merged and divided, row by row."""
    x, sizes = call.args.self, call.outputs[0].shape
    rest = ((size, axis) for size, axis in zip(x.shape, call.axes(x), strict=True) if size != 1)
    found: Axes = []
    while len(found) < len(sizes):
        start = end = len(found)
        if sizes[start] == 1 or not x.numel():
            found.append(None)
            continue
        wanted, end = sizes[start], start + 1
        total, axis = next(rest)
        while total != wanted:
            if total < wanted:
                size, more = next(rest)
                axis, total = merged(call, axis, total, more, size), total * size
            else:
                wanted, end = wanted * sizes[end], end + 1
        found += divided(call, axis, sizes[start:end])
    note_sizes(call, found)
    return [found]


def merged(call: Call, one: Axis, ones: int, other: Axis, others: int) -> Axis:
    """Two neighbouring axes as one."""
    if one is not None and other is not None:
        call.whole(one, other)
        return None
    return repeated(one, 1, others) if other is None else repeated(other, ones)


def divided(call: Call, axis: Axis, sizes: Sequence[int]) -> Axes:
    """An axis as several. One of them has its channels: that which fits, the attention heads, or the longest."""
    if axis is None or len(sizes) == 1:
        return [axis, *[None] * (len(sizes) - 1)]
    if is_whole(axis):
        return [None] * len(sizes)
    before = [math.prod(sizes[:i]) for i in range(len(sizes))]
    after = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    chosen = next((i for i in range(len(sizes)) if fits(axis, before[i], after[i])), None)
    if chosen is None and call.heads in sizes[:-1]:
        chosen = max(i for i, size in enumerate(sizes[:-1]) if size == call.heads)
    if chosen is None:
        chosen = max(range(len(sizes)), key=lambda i: (sizes[i], i))
    space: Axis = [(Space(sizes[chosen]), 1)]
    call.unify(axis, repeated(space, before[chosen], after[chosen]))
    return [space if i == chosen else None for i in range(len(sizes))]


def fits(axis: Axis, times: int, each: int) -> bool:
    """Whether an axis already consists of a row that is repeated so often, of so many equal entries each."""
    pieces = leaves(axis or ())
    period, rest = divmod(len(pieces), times)
    if rest or any(own % each for _, own in pieces) or times * each == 1:
        return False
    return all(pieces[i] == pieces[i % period] for i in range(len(pieces)))


def unknown(call: Call) -> list[Axes]:
    """An operation without a rule."""
    tensors = [t for value in vars(call.args).values() for t in (value if isinstance(value, list | tuple) else [value])]
    for tensor in (*tensors, *call.outputs):
        if isinstance(tensor, Tensor):
            call.whole(*call.axes(tensor))
    return [[None] * out.ndim for out in call.outputs]


_NAMES: dict[str, Rule] = {
    "_to_copy clone alias detach copy _prelu_kernel hardswish masked_fill lift_fresh where": pointwise,
    "_softmax _safe_softmax _log_softmax cumsum cumprod logcumsumexp native_dropout sort bernoulli fill zero "
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool2d fractional_max_pool2d upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d zeros_like ones_like empty_like rand_like randn_like "
    "full_like new_empty_strided grid_sampler_2d tril triu": same,
    "convolution": convolution,
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
    "_batch_norm_no_update batch_norm cudnn_batch_norm": batch_norm,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "mm bmm addmm baddbmm mv addmv dot": matrix_product,
    "cat": cat,
    "stack": stack,
    "slice narrow split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk": slices,
    "select unbind": select,
    "index": index,
    "index_select": index_select,
    "embedding": embedding,
    "mean sum amax amin max min var std prod any all logsumexp argmax argmin linalg_vector_norm norm var_mean std_mean "
    "nansum median mode": reduction,
    "constant_pad_nd": pad,
    "roll flip": roll,
    "repeat": repeat,
    "expand": expand,
    "permute": permute,
    "transpose t": transpose,
    "unfold": unfold,
    "glu": glu,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "_fft_r2c _fft_c2c _fft_c2r": fourier,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    "view _unsafe_view _reshape_alias reshape squeeze unsqueeze": view,
}
RULES: dict[str, Rule] = {name: rule for names, rule in _NAMES.items() for name in names.split()}
# operations that are given sizes: where a network counts channels in its code
SIZES_GIVEN = {"view", "_unsafe_view", "_reshape_alias", "reshape", "expand", "repeat", "constant_pad_nd"}
SIZES_GIVEN |= {"slice", "split", "split_with_sizes"}
