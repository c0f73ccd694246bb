"""Fitting new layers to the outputs of the old ones, for images.

The nearest weights make not the nearest outputs: inputs are correlated, a batch norm takes any scale back, and some outputs matter more
than others. A fit minimises, for the layers of a group together, the expected damage to the network's prediction: the squared error of
each output, in units of its variance and weighted by its Fisher information.

Source of the objective without the weighting: Zhang et al., Accelerating Very Deep Convolutional Networks for Classification and
Detection, TPAMI 2016, section 3 (outputs instead of weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thriftnet.core.both import Both, adjust_norms
from thriftnet.core.kinds import kind_of
from thriftnet.core.moments import Influence, Layer, Moments, Sample, Seen, observe
from thriftnet.core.sites import Replacement
from thriftnet.core.width import eval_mode
from thriftnet.errors import DataError, first_line

ITERATIONS, ROUND = 160, 20  # of L-BFGS, in rounds after which it may stop
GAIN = 0.003  # share of the loss that a round must gain to go on
NEGLIGIBLE = 1e-5  # share of a layer's variance; less is rounding in float32
MEMORY = 1 << 30  # bytes of moments held at a time
IMAGES = 1024  # to fit to

Progress = Callable[[int, int], object]  # groups that are done, and all


def fitted(
    model: nn.Module, groups: Sequence[Sequence[Replacement]], images: Tensor, progress: Progress | None = None
) -> nn.Module:
    """The network with its new layers, fitted to the outputs of the old ones; statistics of norms are estimated again.

    First for the inputs that the old layers have in the plain network; then again with half a look at what the new layers read in the
    converted one, where the errors of earlier layers are in it.

    A class of layers may have two methods: ``start_on(inputs)`` prepares a layer that is fitted by running it; ``settle(layers)``, a
    static method, brings the fitted layers of a group into the form that training wants, at the same function.

    Args:
        model: The plain network, whose layers are replaced in place; on failure it is as before.
        groups: The old and new layers of each group.
        images: (N, C, H, W); some hundred.
        progress: Called after each group, in each round.

    Raises:
        DataError: The network does not run on the images, or computes NaN or infinity for them.
    """
    like = next(p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    images = images.to(like)
    _check_runs(model, images)
    both = Both(model, [pair for pairs in groups for pair in pairs])
    try:
        _fit(both, groups, images, progress)
        adjust_norms(both, images)
    except BaseException:
        both.plain()
        raise
    return both.new()


@torch.no_grad()
def _fit(both: Both, groups: Sequence[Sequence[Replacement]], images: Tensor, progress: Progress | None) -> None:
    """Fit all groups, in two rounds."""
    wanted = [[(old, new) for old, new in pairs if isinstance(old, Layer) and _can_fit(old, new)] for pairs in groups]
    influence = Influence(both.plain(), [old for pairs in wanted for old, _ in pairs], images)
    done = 0
    for chunk in _chunks(wanted):
        noted = [[(old, new, _seen_as(old, new)(old, *influence.of(old))) for old, new in pairs] for pairs in chunk]
        for of_new in (False, True):
            if of_new:
                adjust_norms(both, images)
            observe(both, [entry for group in noted for entry in group], images, of_new=of_new)
            for group in noted:
                problems = [(new, seen) for _, new, seen in group if seen.seen]
                if not all(bool(seen.importance.isfinite().all()) for _, seen in problems):
                    raise DataError(
                        "the network computes NaN or infinity for these images: its weights, or the data, are broken"
                    )
                if problems:
                    _solve(problems, start=not of_new)
                done += 1
                if progress is not None:
                    progress(done, 2 * len(groups))
    for pairs in wanted:
        _settle([new for _, new in pairs])


@torch.no_grad()
def _check_runs(model: nn.Module, images: Tensor) -> None:
    """Raise if a network does not run on images of this size."""
    try:
        with eval_mode(model):
            model(images[:1])
    except Exception as error:  # a network's own code may raise anything
        size = " x ".join(map(str, images.shape[1:]))
        raise DataError(
            f"{type(model).__name__} does not run on the images given, of {size}: {first_line(error)}. "
            "Give images of the size that it was trained on"
        ) from error


def _settle(layers: Sequence[nn.Module]) -> None:
    """Let each class of layers settle its own."""
    for kind in dict.fromkeys(map(type, layers)):
        if hasattr(kind, "settle"):
            kind.settle([layer for layer in layers if type(layer) is kind])


def _can_fit(old: Layer, new: nn.Module) -> bool:
    """Whether what replaces a layer has something to fit."""
    return old.weight.is_floating_point() and not old.weight.is_meta and any(p.ndim > 1 for p in new.parameters())


def _seen_as(old: Layer, new: nn.Module) -> type[Seen]:
    """Moments for a new layer that is as good as one weight, a sample for others."""
    weight = getattr(new, "weight", None)
    linear = kind_of(old) is None and isinstance(weight, Tensor) and weight.shape == old.weight.shape
    return Moments if linear else Sample


Pairs = Sequence[tuple[Layer, nn.Module]]


def _chunks(wanted: Sequence[Pairs]) -> Iterator[list[Pairs]]:
    """Groups, as many at a time as the moments of their layers fit into memory."""
    chunk: list[Pairs] = []
    held = 0
    for pairs in wanted:
        need = sum(2 * old.weight.element_size() * int(getattr(old, "groups", 1)) * _entries(old) ** 2 for old, _ in pairs)
        if chunk and held + need > MEMORY:
            yield chunk
            chunk, held = [], 0
        chunk.append(pairs)
        held += need
    if chunk:
        yield chunk


def _entries(layer: Layer) -> int:
    """Entries of one filter."""
    return layer.weight[0].numel()


def _solve(problems: Sequence[tuple[nn.Module, Seen]], *, start: bool) -> None:
    """Minimise the sum of the layers' losses over all their parameters."""
    for new, seen in problems:
        if start and isinstance(seen, Sample) and hasattr(new, "start_on"):
            new.start_on(seen.inputs)  # type: ignore[operator]
    parameters = _parameters(problems)

    def loss_now() -> Tensor:
        with eval_mode(nn.ModuleList([new for new, _ in problems])):
            losses = [
                seen.loss(new) if isinstance(seen, Sample) else seen.loss(new.weight, getattr(new, "bias", None))  # type: ignore[arg-type]
                for new, seen in problems
            ]
        return torch.stack(losses).sum()

    unit = float(loss_now())
    if not unit > NEGLIGIBLE * len(problems):
        return
    with _training(parameters, [new for new, _ in problems]), torch.enable_grad():
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=ROUND, history_size=ROUND, line_search_fn="strong_wolfe", tolerance_change=0.0
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_now() / unit
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        best, before = [p.detach().clone() for p in parameters], 1.0
        for _ in range(ITERATIONS // ROUND):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
            after = float(loss_now().detach()) / unit
            if not after < before:
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.data.copy_(value)
                return
            best = [p.detach().clone() for p in parameters]
            if before - after < GAIN * after:
                return
            before = after


def _parameters(problems: Sequence[tuple[nn.Module, Seen]]) -> list[nn.Parameter]:
    """What to fit: all parameters, each once; those of norms only where layers are run."""
    found: dict[int, nn.Parameter] = {}
    for new, seen in problems:
        for module in new.modules():
            if isinstance(seen, Sample) or not isinstance(module, _BatchNorm):
                found |= {id(parameter): parameter for parameter in module.parameters(recurse=False)}
    return list(found.values())


@contextmanager
def _training(parameters: Sequence[nn.Parameter], layers: Sequence[nn.Module]) -> Iterator[None]:
    """With gradients for these parameters and no others of the layers; afterwards none is left."""
    wanted = {id(parameter) for parameter in parameters}
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
