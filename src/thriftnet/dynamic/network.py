"""Networks that spend on each image what it needs: one front, a gate, and a tail for each width.

The images of a batch are grouped by what the gate says, and each group runs through a plain network of its width. What an
easy image does not need is never computed.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3. The authors compute every width and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.fold import freeze
from thriftnet.core.fold_norms import fold_norms
from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.probe import input_size as size_of
from thriftnet.core.sites import sites
from thriftnet.core.width import Width, WidthAware, format_width, width_index
from thriftnet.core.width import widths as widths_of
from thriftnet.dynamic.gate import Gate, decide, gate_of, gumbel_choice
from thriftnet.dynamic.micro_batch import MicroBatched
from thriftnet.dynamic.split import Front, Split, Tail, split_at
from thriftnet.errors import ConfigError, DataError, IncompatibleModelError
from thriftnet.kernels.pack import pack_layers
from thriftnet.measure import inspect


class DynamicNetwork(nn.Module):
    """A network with a gate, made ready to run: front and tails are frozen copies, the gate is the network's own.

    In eval mode each image runs through the one tail that the gate chooses, without noise. In training mode, for the gate's sake,
    all tails run, and the output is the chosen one's, by a straight-through Gumbel-softmax; only the gate has gradients.

    Shape: (N, C, H, W) -> (N, classes), for N of at least 1.

    Args:
        model: A network with a gate, trained; changes to its weights, other than the gate's, do not reach this one.
        fold_norms: Fold batch norms into the convolutions before them.
        compile: Compile front and tails, at first use, once for all numbers of images.
        input_size: Channels, height and width of an image, for counting multiply-accumulates. Left out, as the network says.
        cost: See `decide`: more than 0 saves multiply-accumulates. Left out, the gate's own, which is saved with the network. It
            can be set at any time, and `set_budget` finds it for a budget.
        temperature: Of the Gumbel-softmax in training mode.

    Raises:
        IncompatibleModelError: The network has no gate, or its widths differ before the gate.

    Example:
        >>> from thriftnet.models import create_model
        >>> from thriftnet.techniques import convert
        >>> model = convert(create_model("resnet20"), "slimmable(widths=(0.5, 1.0), gate=True)")
        >>> dynamic = DynamicNetwork(model).eval()
        >>> dynamic(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 10])
        >>> sum(dynamic.histogram.values())
        4
    """

    macs: Tensor
    counts: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        fold_norms: bool = True,
        compile: bool = False,
        input_size: Sequence[int] | None = None,
        cost: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise IncompatibleModelError(f"DynamicNetwork needs a network with a gate, got a {type(model).__name__}")
        name, gate = gate_of(model)
        holder = name.rpartition(".")[0]
        cut, self.reads = _join(holder, gate.cut), _join(holder, gate.reads)
        size = size_of(model, input_size)
        frozen = [freeze(model, width) for width in gate.widths]
        split = split_at(frozen[0], cut, size)
        _check_common(model, split.front, gate.widths)
        self.temperature = temperature
        self.gate, self.widths = gate, gate.widths
        self.cost = float(gate.cost) if cost is None else cost
        self.image_channels = size[0]
        own = [inspect(network, size).macs for network in frozen]
        made = DeployOptions(fold_norms, compile)
        self.kept = tuple(dict.fromkeys((*split.cuts, self.reads)))
        self.front = _front(freeze(model, gate.widths[0]), split, self.kept, size, made)
        self.tails = nn.ModuleList(_tail(network, split, size, made, self.front) for network in frozen)
        self.cuts = [self.kept.index(name) for name in split.cuts]
        spent = inspect(gate, self._read_shape(size)).macs
        self.register_buffer("macs", torch.tensor([macs + spent for macs in own], dtype=torch.float64), persistent=False)
        self.register_buffer("counts", torch.zeros(len(own), dtype=torch.int64), persistent=False)
        self.train(model.training)
        self._follow(next(gate.parameters()))

    def _follow(self, like: Tensor) -> None:
        """Multiply-accumulates stay in double precision, whatever the network is in."""
        self.macs, self.counts = self.macs.to(like.device), self.counts.to(like.device)

    def _read_shape(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of what the gate reads of an image."""
        like = next(self.gate.parameters())
        with torch.no_grad():
            read = self.front(torch.zeros(1, *size, dtype=like.dtype, device=like.device))[self.kept.index(self.reads)]
        return tuple(read.shape[1:])

    def _apply(self, fn: Any, recurse: bool = True) -> DynamicNetwork:
        macs = self.macs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.macs = macs.to(self.macs.device)
        return self

    @property
    def cost(self) -> float:
        """What multiply-accumulates cost in the gate's decisions."""
        return float(self.gate.cost)

    @cost.setter
    def cost(self, value: float) -> None:
        self.gate.cost.fill_(value)

    def train(self, mode: bool = True) -> DynamicNetwork:
        """Training mode is for the gate; front and tails stay as they are deployed."""
        super().train(mode)
        self.front.eval()
        self.tails.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            logits, outputs = self.every(images)
            choice, _ = gumbel_choice(logits, self.temperature)
            return mixture(choice, outputs)
        features, logits = self._looked_at(images)
        return self.route(features, decide(logits, self.macs, self.gate.cost), tuple(images.shape[1:]))

    def logits(self, images: Tensor) -> Tensor:
        """What the gate says, (N, choices); gradients reach the gate only."""
        return self._looked_at(images)[1]

    def decisions(self, images: Tensor) -> Tensor:
        """The choice of each image without noise, (N,) positions in ``widths``; nothing is counted."""
        with torch.no_grad():
            return decide(self.logits(images), self.macs, self.gate.cost)

    def _looked_at(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the front gives to the tails, and what the gate says."""
        if images.ndim != 4 or images.shape[1] != self.image_channels or not len(images):
            what = "a batch of zero images" if images.ndim == 4 and not len(images) else f"{tuple(images.shape)}"
            raise DataError(f"a dynamic network reads (N, {self.image_channels}, H, W) with N of at least 1, got {what}")
        with torch.no_grad():
            found = self.front(images)
        logits: Tensor = self.gate(found[self.kept.index(self.reads)])
        return [found[place] for place in self.cuts], logits

    @torch.no_grad()
    def route(self, features: list[Tensor], decisions: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Run each image through the tail that was decided on, and count.

        Args:
            features: What the front gives, each (N, ...).
            decisions: A position in ``widths`` for each image, (N,).
            shape: Of an image.
        """
        chosen = decisions.tolist()
        counts = [chosen.count(choice) for choice in range(len(self.widths))]
        self.counts += torch.tensor(counts, device=self.counts.device)
        used = [choice for choice, count in enumerate(counts) if count]
        if len(used) == 1:
            return self.tails[used[0]](features, shape)  # type: ignore[no-any-return]
        rows = [(decisions == choice).nonzero().flatten() for choice in used]
        groups = [[feature.index_select(0, members) for feature in features] for members in rows]
        outputs = torch.cat([self.tails[choice](group, shape) for choice, group in zip(used, groups, strict=True)])
        return outputs.index_select(0, torch.cat(rows).argsort())

    def forced(self, images: Tensor, decisions: Tensor) -> Tensor:
        """As `forward` in eval mode, with decisions from outside: (N,) positions in ``widths``."""
        features, _ = self._looked_at(images)
        chosen = decisions.tolist()
        if decisions.shape != images.shape[:1] or not all(0 <= choice < len(self.widths) for choice in chosen):
            raise ConfigError(f"decisions {chosen}: possible are {len(images)} positions, 0 to {len(self.widths) - 1}")
        return self.route(features, decisions, tuple(images.shape[1:]))

    def every(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the gate says, (N, choices), and what every tail gives, (choices, N, classes). Gradients reach the gate only."""
        features, logits = self._looked_at(images)
        with torch.no_grad():
            outputs = torch.stack([tail(features, tuple(images.shape[1:])) for tail in self.tails])
        return logits, outputs

    @property
    def histogram(self) -> dict[Width, int]:
        """How many images took each width since the last `reset`."""
        return dict(zip(self.widths, self.counts.tolist(), strict=True))

    @property
    def mean_macs(self) -> float:
        """Multiply-accumulates spent per image since the last `reset`, the gate's included; 0 where none ran."""
        total = int(self.counts.sum())
        return float((self.counts * self.macs).sum()) / total if total else 0.0

    def reset(self) -> None:
        """Forget what was counted."""
        self.counts.zero_()

    @torch.no_grad()
    def set_budget(self, macs: float, loader: Iterable[Any]) -> float:
        """Find the ``cost`` at which images spend on average at most ``macs``, as nearly as they can, and set it.

        Args:
            macs: Multiply-accumulates per image.
            loader: Yields ``images`` or ``(images, ...)`` like those to come; gone through once.

        Returns:
            The average that these images spend.

        Raises:
            ConfigError: A budget outside of what can be reached; the message says the range.
            DataError: The loader yields nothing.
        """
        least, most = float(self.macs.min()), float(self.macs.max())
        if not isinstance(macs, int | float) or not least <= macs <= most:
            raise ConfigError(
                f"a budget of {macs:,} multiply-accumulates is out of reach: possible are {least:,.0f} to {most:,.0f}"
            )
        said = [self.logits(batch[0] if isinstance(batch, list | tuple) else batch) for batch in loader]
        if not said:
            raise DataError("set_budget got a loader without batches: give it images")
        logits = torch.cat(said).double()
        macs_of = self.macs.to(logits.device)
        cost = torch.tensor(cheapest_cost(logits, macs_of, float(macs))[0]).to(self.gate.cost)
        self.gate.cost.copy_(torch.nextafter(cost, torch.full_like(cost, torch.inf)))  # never rounded to below the step
        return float(macs_of[decide(logits, macs_of, self.gate.cost)].mean())

    def extra_repr(self) -> str:
        return f"widths=({', '.join(map(format_width, self.widths))}), cost={self.cost:g}"


def mixture(choice: Tensor, outputs: Tensor) -> Tensor:
    """The chosen outputs: (N, choices) and (choices, N, classes) -> (N, classes).

    The gradient of a choice is the inner product of the loss's gradient with the output that this choice would have given.
    """
    return torch.einsum("nk,knc->nc", choice, outputs)


def cheapest_cost(logits: Tensor, macs: Tensor, budget: float) -> tuple[float, float]:
    """The cost at which the mean of ``macs`` is nearest below ``budget``, and that mean.

    What is spent falls as the cost rises, in steps at which one image changes its mind; all of them are looked at by bisection.
    """

    def spent(cost: float) -> float:
        return float(macs[decide(logits, macs, cost)].mean())

    relative = macs / macs.max()
    gaps = (relative[:, None] - relative[None, :]).abs()
    reach = float((logits.max() - logits.min()) / gaps[gaps > 0].min()) + 1.0 if bool((gaps > 0).any()) else 1.0
    low, high = -reach, reach  # at low everything is at its widest, at high at its narrowest
    if spent(low) <= budget:
        return low, spent(low)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high, spent(high)


def _compiled(part: nn.Module) -> Callable[..., Any]:
    """Compiled at first use. The compiler keeps what it made with the code that ran, up to a limit: each part has code of its own."""

    def run(*args: Any) -> Any:
        return part(*args)

    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    return torch.compile(own, dynamic=True)


def _join(holder: str, relative: str) -> str:
    return ".".join(part for part in (holder, relative) if part)


def _front(
    network: nn.Module, split: Split, kept: tuple[str, ...], size: tuple[int, int, int], made: DeployOptions
) -> MicroBatched:
    return made.streamlined(
        Front(network, split, kept), lambda ghost: [torch.empty(2, *size, device="meta", dtype=_dtype(ghost))]
    )


def _tail(
    network: nn.Module, split: Split, size: tuple[int, int, int], made: DeployOptions, front: MicroBatched
) -> MicroBatched:
    shapes = [tuple(feature.shape[1:]) for feature in _features(front, size)][: len(split.cuts)]
    return made.streamlined(
        Tail(network, split),
        lambda ghost: [[torch.empty(2, *s, device="meta", dtype=_dtype(ghost)) for s in shapes], size],
    )


@dataclass(frozen=True)
class DeployOptions:
    """How front and tails are made ready."""

    fold_norms: bool
    compile: bool

    def streamlined(self, part: nn.Module, inputs: Callable[[nn.Module], list[Any]]) -> MicroBatched:
        """Fewer layers and fewer tensors for the same function."""

        def run(ghost: nn.Module) -> None:
            ghost(*inputs(ghost))

        if self.fold_norms:
            fold_norms(part, run)
        pack_layers(part, run)
        return MicroBatched(part, run, _compiled(part) if self.compile else None)


@torch.no_grad()
def _features(front: MicroBatched, size: tuple[int, int, int]) -> list[Tensor]:
    like = next(front.parameters())
    outputs: list[Tensor] = front(torch.zeros(1, *size, dtype=like.dtype, device=like.device))
    return outputs


def _dtype(model: nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)


def _check_common(model: nn.Module, front: tuple[str, ...], chosen: Sequence[Width]) -> None:
    """Raise where a layer of the front differs between the sub-networks."""
    indices = [width_index(width, widths_of(model)) for width in chosen]
    for site in sites(model, lambda _, module: isinstance(module, WidthAware) and module.width_spec is not None):
        inner = [
            (f"{site.name}.{name}".rstrip("."), m) for name, m in site.module.named_modules() if isinstance(m, WidthAware)
        ]
        for name, layer in inner:
            width_spec = layer.width_spec
            if width_spec is None or not any(name == part or name.startswith(f"{part}.") for part in front):
                continue
            keeps = isinstance(layer, PlainBatchNorm2d)
            if len({(width_spec.ins[i], width_spec.outs[i], width_spec.bn_set(i) if keeps else 0) for i in indices}) > 1:
                raise IncompatibleModelError(
                    f"layer {name!r} runs before the gate and differs between the widths {', '.join(map(format_width, chosen))}: "
                    "a gate can choose among sub-networks that begin alike"
                )


__all__ = ["DynamicNetwork", "Gate", "cheapest_cost", "mixture"]
