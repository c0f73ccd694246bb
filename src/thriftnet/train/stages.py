"""What one training step does. A stage is given to the loop, which knows none of them.

A stage gives one loss after the other; the loop computes the gradients of each before it asks for the next, adds them up, and
takes one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from thriftnet.core.width import set_width, widths
from thriftnet.errors import ConfigError, unknown

if TYPE_CHECKING:
    from thriftnet.train.loss import Criterion


@dataclass
class Step:
    """What a stage sees of the loop.

    Args:
        model: The network, to be called; with several processes it sums gradients.
        plain: The same network without what the processes need.
        average: Average of its weights over steps, or None.
        criterion: Compares outputs with targets.
        number: Of the optimizer step, from 0; the same on all processes.
        seed: Of the run.
    """

    model: nn.Module
    plain: nn.Module
    average: nn.Module | None
    criterion: Criterion
    number: int
    seed: int


class Stage(Protocol):
    """One kind of training step."""

    @property
    def passes(self) -> int:
        """How many losses a step has."""

    @property
    def partial(self) -> bool:
        """Whether a pass leaves parameters without a gradient."""

    def prepare(self, model: nn.Module) -> None:
        """Choose what is trained: before the optimizer is made."""

    def train_mode(self, model: nn.Module) -> None:
        """Put the network into the mode in which it is trained: at the start of each epoch."""

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """The losses whose gradients are added up, one for each pass."""

    def evaluated(self, model: nn.Module) -> None:
        """Put the network into the form in which its accuracy is measured."""


@dataclass(frozen=True)
class Standard:
    """The loss of one forward."""

    passes: int = 1
    partial: bool = False

    def prepare(self, model: nn.Module) -> None:
        """All parameters are trained."""

    def train_mode(self, model: nn.Module) -> None:
        model.train()

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        yield step.criterion(step.model(images), targets, images)

    def evaluated(self, model: nn.Module) -> None:
        """As it is."""


@dataclass(frozen=True)
class AllWidths(Standard):
    """The mean loss over all widths of a slimmable network.

    Source: Yu et al., Slimmable Neural Networks, ICLR 2019, algorithm 1.
    """

    widths: tuple[Any, ...] = ()
    partial: bool = True

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for width in self.widths:
            set_width(step.plain, width)
            yield step.criterion(step.model(images), targets, images) / len(self.widths)

    def evaluated(self, model: nn.Module) -> None:
        """At the widest."""
        set_width(model, self.widths[-1])


def _all_widths(model: nn.Module) -> Stage:
    available = widths(model)
    if not available:
        raise ConfigError("stage='widths' trains slimmable networks: convert it first, as --technique 'slimmable'")
    return AllWidths(passes=len(available), widths=tuple(available))


STAGES: dict[str, Callable[..., Stage]] = {
    "standard": lambda model: Standard(),
    "widths": _all_widths,
}


def make_stage(name: str, model: nn.Module, options: dict[str, Any]) -> Stage:
    """The stage of that name for a network; ``auto`` trains all widths of a slimmable one.

    Raises:
        ConfigError: No such stage, options that it does not take, or a network that it cannot train.
    """
    if name == "auto":
        name = "widths" if widths(model) else "standard"
    if name not in STAGES:
        raise unknown("stage", name, ["auto", *STAGES])
    try:
        return STAGES[name](model, **options)
    except TypeError as error:
        raise ConfigError(f"stage {name!r} does not take {options}: {error}") from None
