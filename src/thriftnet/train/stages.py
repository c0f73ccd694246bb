"""Stages: what one training step does. The loop is given one and knows none.

A stage yields its losses one by one; the loop adds up their gradients, each before it asks for the next loss, and takes one
optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Range, checked
from thriftnet.core.probe import Size
from thriftnet.core.width import Width, set_width, widths
from thriftnet.dynamic.network import DynamicNetwork, mixture
from thriftnet.dynamic.objective import GateObjective, decision_of
from thriftnet.errors import ConfigError, unknown_name
from thriftnet.train.distributed import total_counts

if TYPE_CHECKING:
    from thriftnet.train.loss import Criterion


@dataclass
class Step:
    """What the loop passes to a stage."""

    model: nn.Module  # the module of Stage.trained, wrapped by DDP on several processes
    plain: nn.Module  # the same without DDP
    average: nn.Module | None  # of its weights over steps
    criterion: Criterion
    number: int  # of the optimizer step, from 0; the same on all processes
    seed: int  # of the run


@dataclass(frozen=True)
class Stage:
    """One kind of training step; by itself the standard one, with the loss of one forward."""

    @property
    def passes(self) -> int:
        """Losses of a step; where there are several, each may leave parameters without a gradient."""
        return 1

    def trained(self, model: nn.Module) -> nn.Module:
        """The module whose forward the losses call; freezes what is not trained. Called before the optimizer is made."""
        return model

    def train_mode(self, module: nn.Module) -> None:
        """Set the modes for training; at the start of each epoch."""
        module.train()

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """The losses whose gradients are added up, one for each pass."""
        yield step.criterion(step.model(images), targets, images)

    def saved(self, module: nn.Module) -> nn.Module:
        """The network to save."""
        return module

    def measured(self, module: nn.Module, images: Iterable[Any]) -> nn.Module:
        """The network to evaluate, calibrated on training images without augmentation."""
        return module

    def facts(self, measured: nn.Module) -> dict[str, Any]:
        """Further metrics of the network that was evaluated."""
        return {}


@dataclass(frozen=True)
class AllWidths(Stage):
    """The mean loss over all widths of a slimmable network.

    Source: Yu et al., Slimmable Neural Networks, ICLR 2019, algorithm 1.
    """

    widths: tuple[Width, ...]

    @property
    def passes(self) -> int:
        return len(self.widths)

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for width in self.widths:
            set_width(step.plain, width)
            yield step.criterion(step.model(images), targets, images) / len(self.widths)

    def measured(self, module: nn.Module, images: Iterable[Any]) -> nn.Module:
        """At the largest width."""
        set_width(module, "largest")
        return module


@checked
@dataclass(frozen=True)
class Supernet(AllWidths):
    """The sandwich rule: the largest width learns the labels; some random widths and the smallest learn its outputs.

    Args:
        drawn: Widths between largest and smallest drawn for each step, the same on all processes.
        teacher: Targets of the narrower widths: the outputs of the network's ``average`` over steps at its largest ("in-place
            bootstrapping"), of the ``largest`` in the same step ("in-place distillation"), or the ``labels``.
        ensemble: Train the smallest with the mean of the teacher's outputs at the largest and at the drawn widths.

    Source: Yu & Huang, Universally Slimmable Networks, ICCV 2019, sections 3.2 and 3.3; Li et al., Dynamic Slimmable
    Network, CVPR 2021, section 3.2.
    """

    drawn: Annotated[int, Range(0, 1000)] = 2
    teacher: Literal["average", "largest", "labels"] = "average"
    ensemble: bool = False

    @property
    def passes(self) -> int:
        return self.drawn + 2

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        outputs = self._outputs(step, "largest", images)
        yield step.criterion(outputs, targets, images)
        teachers = self._soft_targets(step, "largest", images, outputs)
        ensemble = [*teachers]
        for width in self.between(step.seed, step.number):
            outputs = self._outputs(step, width, images)
            yield self._narrow_loss(step, outputs, targets, images, teachers)
            if self.ensemble:
                ensemble += self._soft_targets(step, width, images, outputs)
        outputs = self._outputs(step, "smallest", images)
        yield self._narrow_loss(step, outputs, targets, images, ensemble)

    def between(self, seed: int, number: int) -> list[Width]:
        """The widths drawn for a step; with two widths, any."""
        possible = self.widths[1:-1] or self.widths
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return [possible[int(index)] for index in torch.randint(len(possible), (self.drawn,), generator=random)]

    @staticmethod
    def _outputs(step: Step, width: Width, images: Tensor) -> Tensor:
        set_width(step.plain, width)
        out: Tensor = step.model(images)
        return out

    @torch.no_grad()
    def _soft_targets(self, step: Step, width: Width, images: Tensor, outputs: Tensor) -> list[Tensor]:
        """The teacher's probabilities at a width; none where labels are learned."""
        if self.teacher == "labels":
            return []
        if self.teacher == "largest":
            return [outputs.detach().double().softmax(1).to(outputs.dtype)]
        if step.average is None:
            raise ConfigError("teacher='average' needs an average of the weights: set ema_decay, as 0.997")
        set_width(step.average, width)
        logits: Tensor = step.average(images)
        return [logits.softmax(1)]

    @staticmethod
    def _narrow_loss(step: Step, outputs: Tensor, targets: Tensor, images: Tensor, soft: list[Tensor]) -> Tensor:
        if not soft:
            return step.criterion(outputs, targets, images)
        return F.cross_entropy(outputs, torch.stack(soft).mean(0).to(outputs.dtype))


class GateTraining(nn.Module):
    """A gate, with its network hidden from optimizers and checkpoints.

    Shape: (N, C, H, W) and (N,) -> a scalar, the loss.
    """

    def __init__(self, model: nn.Module, size: Size, objective: GateObjective, temperature: float) -> None:
        super().__init__()
        dynamic = DynamicNetwork(model, input_size=size)
        objective.check_budget(dynamic.macs)
        self.gate = dynamic.gate.requires_grad_(True)
        self.hidden = (model, dynamic)
        self.objective, self.temperature = objective, temperature

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        _, dynamic = self.hidden
        logits, outputs = dynamic.every(images)
        decision = decision_of(logits, self.temperature)
        mixed = mixture(decision.choice, outputs)
        targets = self.objective.wanted(outputs, labels)
        return self.objective(decision, mixed, labels, targets, dynamic.macs).total


@dataclass(frozen=True)
class GateStage(Stage):
    """Only the gate learns: the narrowest width that is right, within a budget.

    Args:
        size: Channels, height and width of an image, for counting.
        objective: The gate's loss.
        temperature: Of the Gumbel-softmax.

    Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3.
    """

    size: Size = (3, 224, 224)
    objective: GateObjective = field(default_factory=GateObjective)
    temperature: float = 1.0

    def trained(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        return GateTraining(model.eval(), self.size, self.objective, self.temperature)

    def losses(self, step: Step, images: Tensor, targets: Tensor) -> Iterator[Tensor]:
        yield step.model(images, targets)

    def saved(self, module: nn.Module) -> nn.Module:
        return cast(GateTraining, module).hidden[0]

    def measured(self, module: nn.Module, images: Iterable[Any]) -> nn.Module:
        """With the cost of decisions calibrated on training images to the budget; the gate keeps it."""
        dynamic = cast(GateTraining, module).hidden[1].eval()
        if self.objective.budget is not None:
            dynamic.set_budget(self.objective.budget, images)
        dynamic.reset()
        return dynamic

    def facts(self, measured: nn.Module) -> dict[str, Any]:
        dynamic = cast(DynamicNetwork, measured)
        total_counts(dynamic)
        decisions = {str(width): count for width, count in dynamic.histogram.items()}
        return {"macs": round(dynamic.mean_macs), "decisions": decisions}


def _gate(model: nn.Module, size: Size, temperature: float = 1.0, **objective: Any) -> Stage:
    known = [each.name for each in fields(GateObjective)]
    for name in objective:
        if name not in known:
            raise unknown_name("option of the stage gate", name, ["temperature", *known])
    return GateStage(size=size, objective=GateObjective(**objective), temperature=temperature)


def _widths(model: nn.Module, stage: str) -> tuple[Width, ...]:
    available = widths(model)
    if not available:
        raise ConfigError(f"stage={stage!r} trains slimmable networks: convert it first, as --technique 'slimmable'")
    return available


STAGES: dict[str, Callable[..., Stage]] = {
    "standard": lambda model, size: Stage(),
    "widths": lambda model, size: AllWidths(_widths(model, "widths")),
    "supernet": lambda model, size, **options: Supernet(_widths(model, "supernet"), **options),
    "gate": _gate,
}


def make_stage(name: str, model: nn.Module, options: dict[str, Any], size: Size = (3, 224, 224)) -> Stage:
    """The stage of that name for a network; ``auto`` trains all widths of a slimmable one.

    Raises:
        ConfigError: No such stage, options that it does not take, or a network that it cannot train.
    """
    if name == "auto":
        name = "widths" if widths(model) else "standard"
    if name not in STAGES:
        raise unknown_name("stage", name, ["auto", *STAGES])
    try:
        return STAGES[name](model, size, **options)
    except TypeError as error:
        raise ConfigError(f"stage {name!r} does not take {options}: {error}") from None
