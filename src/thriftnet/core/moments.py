"""What layers read while a network sees images: the moments of their inputs, and how much their outputs matter.

All that a fit of new weights to a layer's outputs needs to know of the data, in a matrix per layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from thriftnet.core.width import eval_mode

Layer: TypeAlias = nn.Conv2d | nn.Linear

ROWS = 32_768  # of inputs of each layer: more tell little
IMAGES_FOR_GRADIENTS = 128
BATCH = 32
RIDGE = 1e-4  # of the mean variance: directions that the images do not show cost a little, too
SAMPLE = 1 << 22  # numbers kept of the inputs of a layer that is fitted by running it


class Moments:
    """Mean and covariance of a layer's inputs: rows of G groups of n entries, one row for each output position.

    Attributes:
        covariance: (G, n, n).
        cross: (G, O/G, n): of the old layer's outputs and the inputs.
        power: (O,): variance of the old layer's outputs.
        means: Of inputs, (G, n), and of the old layer's outputs for them, (O,).
        importance: (O,): of the error of each output, in units of its variance, together 1.
        rescaled: Whether a batch norm follows, which takes any scale and shift of the outputs back.
    """

    seen = False  # whether the layer has run
    covariance: Tensor
    cross: Tensor
    power: Tensor
    means: list[tuple[Tensor, Tensor]]
    importance: Tensor

    def __init__(self, layer: Layer, gradients: Tensor, rescaled: bool) -> None:
        self.gradients, self.rescaled = gradients, rescaled
        self.shape = getattr(layer, "groups", 1), -1, layer.weight[0].numel()
        self.sums = _Sums()

    def add(self, layer: Layer, inputs: Tensor, outputs: Tensor, most: int, generator: torch.Generator) -> None:
        """Take note of what a layer or its successor reads, and of what the layer gives where it stands in the plain network."""
        rows = rows_of(layer, inputs)
        wanted = outputs.movedim(_axis(layer), -1).reshape(len(rows), self.shape[0], -1)
        if len(rows) > most:
            chosen = torch.randperm(len(rows), generator=generator)[:most].to(rows.device)
            rows, wanted = rows[chosen], wanted[chosen]
        self.sums.add(rows, wanted)

    def finish(self) -> None:
        """Make moments of what was noted; those of an earlier view stay as one half."""
        if not self.sums.count:
            return
        (mean, target), covariance, cross, power = self.sums.moments()
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True)
        first = not self.seen
        self.covariance = covariance if first else (self.covariance + covariance) / 2
        self.cross = cross if first else (self.cross + cross) / 2
        self.means = [(mean, target)] if first else [self.means[0], (mean, target)]
        if first:
            self.power = power
            self.importance = importance_of(self.gradients * power)
        self.sums, self.seen = _Sums(), True

    def loss(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """How much worse a layer with this weight is, in all its outputs: a scalar, differentiable."""
        new = weight.reshape(self.shape)
        across = (new * self.cross).sum(-1).flatten()
        power = ((new @ self.covariance) * new).sum(-1).flatten()
        floor = 1e-6 * self.power.mean() + 1e-30
        if self.rescaled:
            error = 1 - across * across.abs() / (power * self.power).clamp_min(floor**2)
        else:
            shifts = [(new * mean[:, None]).sum(-1).flatten() - target for mean, target in self.means]
            moved = [shift if bias is None else shift + bias for shift in shifts]
            offset = torch.stack(moved).square().mean(0)
            error = (self.power - 2 * across + power + offset) / self.power.clamp_min(floor)
        return (self.importance * error).sum()


class _Sums:
    """Sums over rows of inputs (rows, G, n) and outputs (rows, G, O/G)."""

    def __init__(self) -> None:
        self.count, self.sums = 0, list[Tensor]()

    def add(self, rows: Tensor, outputs: Tensor) -> None:
        x, y = rows.transpose(0, 1), outputs.transpose(0, 1)
        found = [x.sum(1), y.sum(1), x.mT @ x, y.mT @ x, y.square().sum(1)]
        self.sums = [one + other for one, other in zip(self.sums, found, strict=True)] if self.sums else found
        self.count += len(rows)

    def moments(self) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """Means of inputs and outputs, the covariance of inputs, that of outputs and inputs, and the variance of outputs."""
        mean, target, xx, yx, yy = (each / max(1, self.count) for each in self.sums)
        covariance, cross = xx - mean[:, :, None] * mean[:, None], yx - target[:, :, None] * mean[:, None]
        return (mean, target.flatten()), covariance, cross, (yy - target.square()).flatten().clamp_min(0)


class Sample:
    """Inputs of a layer and its outputs for them, for new layers that no single weight describes.

    Attributes:
        inputs: (N, ...), as the layer reads them.
        outputs: (O, positions), as it gives them.
        power: (O,): their variance.
        importance: As of `Moments`.
        rescaled: As of `Moments`.
    """

    seen = False
    importance: Tensor

    def __init__(self, layer: Layer, gradients: Tensor, rescaled: bool) -> None:
        self.axis = _axis(layer)
        self.gradients, self.rescaled = gradients, rescaled
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.room = SAMPLE

    def add(self, layer: Layer, inputs: Tensor, outputs: Tensor, most: int, generator: torch.Generator) -> None:
        """Take note of inputs and outputs, as long as there is room."""
        images = min(len(inputs), max(self.room // max(1, inputs[0].numel()), 0 if self.kept else 1))
        if images:
            self.kept.append((inputs[:images].clone(), outputs[:images].clone()))
            self.room -= images * inputs[0].numel()

    def finish(self) -> None:
        """From batches to tensors; those of an earlier view stay."""
        if not self.kept:
            return
        self.inputs, outputs = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        self.outputs = outputs.movedim(self.axis, 0).flatten(1)
        self.centred = self.outputs - self.outputs.mean(1, keepdim=True)
        self.power = self.centred.square().mean(1)
        self.importance = importance_of(self.gradients * self.power)
        self.room, self.seen = SAMPLE, True

    def loss(self, layer: nn.Module) -> Tensor:
        """How much worse a new layer is, in all its outputs: a scalar, differentiable."""
        got = layer(self.inputs).movedim(self.axis, 0).flatten(1)
        floor = 1e-6 * self.power.mean() + 1e-30
        if self.rescaled:
            got = got - got.mean(1, keepdim=True)
            across = (got * self.centred).mean(1)
            error = 1 - across * across.abs() / (got.square().mean(1) * self.power).clamp_min(floor**2)
        else:
            error = (got - self.outputs).square().mean(1) / self.power.clamp_min(floor)
        loss: Tensor = (self.importance * error).sum()
        return loss


def importance_of(damage: Tensor) -> Tensor:
    """The weight of each output's error, (O,), from the damage that losing it would do: 1 in all for every layer.

    Layers count alike, and outputs half by the damage, half alike: with weights over layers in proportion to the damage, too, layers of
    little influence each become so wrong that the layers after them read something else.
    """
    return (damage / damage.sum().clamp_min(1e-30) + 1 / len(damage)) / 2


Seen: TypeAlias = Moments | Sample


@torch.no_grad()
def observe(networks: Networks, wanted: Sequence[tuple[Layer, nn.Module, Seen]], images: Tensor, *, of_new: bool) -> None:
    """Take note of what layers read and what they should give when the networks see images.

    Args:
        networks: The plain one, and the converted one.
        wanted: Layers of the plain network, what they become, and where to take note.
        images: (N, C, H, W).
        of_new: Of what the new layers read, in the converted network: the errors of the layers before them are then in it.
    """
    generator = torch.Generator().manual_seed(0)
    most = max(1, ROWS * BATCH // max(BATCH, len(images)))
    waiting: dict[int, deque[tuple[Layer, Seen, Tensor]]] = {}  # of each new layer: its runs, in order

    def note_old(new: nn.Module, seen: Seen, layer: Layer, args: Any, kwargs: Any, output: Tensor) -> None:
        if of_new:
            waiting.setdefault(id(new), deque()).append((layer, seen, output.clone()))
        else:
            seen.add(layer, _input(args, kwargs), output, most, generator)

    def note_new(new: nn.Module, args: Any, kwargs: Any) -> None:
        layer, seen, output = waiting[id(new)].popleft()
        seen.add(layer, _input(args, kwargs), output, most, generator)

    handles = [old.register_forward_hook(partial(note_old, new, seen), with_kwargs=True) for old, new, seen in wanted]
    for new in {id(new): new for _, new, _ in wanted}.values() if of_new else ():
        handles.append(new.register_forward_pre_hook(note_new, with_kwargs=True))
    try:
        for batch in torch.split(images, BATCH):
            _run(networks.plain(), batch)
            if of_new:
                _run(networks.new(), batch)
    finally:
        for handle in handles:
            handle.remove()
    for *_, seen in wanted:
        seen.finish()


def _run(model: nn.Module, images: Tensor) -> None:
    with eval_mode(model):
        model(images)


def _input(args: Any, kwargs: Any) -> Tensor:
    """What a layer reads: its first argument."""
    return cast(Tensor, [*args, *kwargs.values()][0])


class Networks(Protocol):
    """A plain network and the converted one, which hold the same other layers, so that only one of them exists at a time."""

    def plain(self) -> nn.Module:
        """The plain one; the converted one is gone."""
        ...

    def new(self) -> nn.Module:
        """The converted one; the plain one is gone."""
        ...


def _axis(layer: Layer) -> int:
    """Where a layer's outputs have their channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def rows_of(layer: Layer, inputs: Tensor) -> Tensor:
    """What each output position of a layer reads: (rows, G, n)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, 1, inputs.shape[-1])
    if layer.padding_mode != "zeros":
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif isinstance(layer.padding, str):
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice)
    padding = layer.padding if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) else 0
    unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)  # (N, I * kh * kw, L)
    rows = unfolded.transpose(1, 2).flatten(0, 1)
    return rows.view(len(rows), layer.groups, -1)


class Influence:
    """How much each output of each layer matters: mean squares of the gradients of the network's outputs.

    The error of the network's prediction that a small error of a layer's output causes is, to second order, the product of its square
    with the Fisher information there. Labels are drawn from what the network predicts: none are needed.

    Source: Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, section 2.2 (the approximation).
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], images: Tensor) -> None:
        self.squares: dict[int, Tensor] = {}
        self.images = images[:IMAGES_FOR_GRADIENTS]
        with eval_mode(model), _without_gradients(model):
            self.rescaled = before_norms(model, layers, images[:2])
            self._measure(model, layers)

    def of(self, layer: Layer) -> tuple[Tensor, bool]:
        """Mean squares (O,), and whether the layer's output goes to a batch norm only."""
        return self.squares.get(id(layer), layer.weight.new_ones(len(layer.weight))), id(layer) in self.rescaled

    def _measure(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        generator = torch.Generator().manual_seed(0)

        def note(layer: Layer, output: Tensor) -> None:
            axes = [axis for axis in range(output.ndim) if axis != _axis(layer) % output.ndim]

            def add(gradient: Tensor) -> None:
                squares = gradient.detach().square().sum(axes) / len(self.images)
                self.squares[id(layer)] = self.squares.get(id(layer), 0) + squares

            output.register_hook(add)  # type: ignore[no-untyped-call]

        handles = [layer.register_forward_hook(lambda module, _, output: note(module, output)) for layer in layers]
        try:
            with torch.enable_grad():
                for batch in torch.split(self.images, BATCH):
                    outputs = [
                        leaf for leaf in tree_leaves(model(batch.clone().requires_grad_())) if isinstance(leaf, Tensor)
                    ]
                    _surprise([leaf for leaf in outputs if leaf.requires_grad], generator).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()


def _surprise(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A loss whose gradients tell what a change of the outputs means: of classes drawn from the prediction, or of random signs."""
    total = outputs[0].new_zeros(())
    for out in outputs:
        if out.ndim == 2 and out.shape[1] > 1:
            chances = out.detach().float().softmax(1).nan_to_num(1.0).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(out.device)
            total = total + F.cross_entropy(out, drawn, reduction="sum")
        else:
            signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
            total = total + (out * signs).sum() / max(1, out[0].numel()) ** 0.5
    return total


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Readers(TorchFunctionMode):
    """Counts, for some tensors, the functions that read them: batch norms, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, tuple[Tensor, int]] = {}
        self.norms: dict[int, int] = {}
        self.others: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} & self.watched.keys()
        out = func(*args, **(kwargs or {}))
        if read and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            counts = self.norms if func in (F.batch_norm, torch.batch_norm) else self.others
            for key in read:
                layer = self.watched[key][1]
                counts[layer] = counts.get(layer, 0) + 1
        return out


@torch.no_grad()
def before_norms(model: nn.Module, layers: Sequence[nn.Module], images: Tensor) -> frozenset[int]:
    """Ids of the layers whose output is read by a batch norm, and by nothing else."""
    readers = _Readers()
    handles = []
    for layer in layers:

        def watch(module: nn.Module, _: Any, output: Tensor) -> None:
            readers.watched[id(output)] = output, id(module)

        handles.append(layer.register_forward_hook(watch))
    try:
        with readers:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(layer for layer in readers.norms if not readers.others.get(layer))
