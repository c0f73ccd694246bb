"""Networks that spend on each image what it needs: one front, a gate, and a tail for each width.

The images of a batch are grouped by the gate's choice, and each group runs through a plain network of its width. What an easy
image does not need is never computed.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3. The authors compute every width and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.arguments import InputSize, PositiveWeight, Weight, checked
from thriftnet.core.fold import freeze
from thriftnet.core.fold_norms import fold_norms as fold_norms_of
from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.probe import IgnoreOuterModes, on_meta
from thriftnet.core.probe import input_size as size_of
from thriftnet.core.width import Width, WidthAware, format_width, width_index
from thriftnet.core.width import widths as widths_of
from thriftnet.dynamic.gate import check_budget, decide, gate_of, gumbel_choice
from thriftnet.dynamic.micro_batch import MicroBatched
from thriftnet.dynamic.split import Front, Tail, is_within, split_at
from thriftnet.errors import ConfigError, DataError, IncompatibleModelError
from thriftnet.kernels.pack import pack_layers
from thriftnet.measure import inspect


@checked
class DynamicNetwork(nn.Module):
    """A network with a gate, ready to run: front and tails are frozen copies, the gate is the network's own.

    In eval mode each image runs through the one tail that the gate chooses, without noise. Training mode is for the gate: all tails
    run, the output is the chosen one's, by a straight-through Gumbel-softmax, and only the gate has gradients.

    Shape: (N, C, H, W) -> (N, classes), N >= 1.

    Args:
        model: A trained network with a gate; later changes to its weights, other than the gate's, have no effect here.
        fold_norms: Fold batch norms into the convolutions before them.
        compile: Compile front and tails, at first use, once for all batch sizes.
        input_size: Channels, height and width of an image, for counting MACs. Default: the size the network states.
        cost: Price of MACs in decisions, see `decide`. Default: the gate's own, which is saved with the network. It
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

    macs: Tensor  # of each width, on images of the input size: what decisions weigh
    counts: Tensor  # images that took each width
    spent: Tensor  # multiply-accumulates on these images, at their own sizes

    def __init__(
        self,
        model: nn.Module,
        *,
        fold_norms: bool = True,
        compile: bool = False,
        input_size: InputSize | None = None,
        cost: Weight | None = None,
        temperature: PositiveWeight = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise IncompatibleModelError(f"DynamicNetwork needs a network with a gate, got a {type(model).__name__}")
        name, gate = gate_of(model)
        holder = name.rpartition(".")[0]
        after, self.reads = (".".join(filter(None, (holder, inner))) for inner in (gate.split_after, gate.reads))
        size = size_of(model, input_size)
        frozen = [freeze(model, width) for width in gate.widths]
        split = split_at(frozen[0], after, size)
        _check_common_front(model, split.front, gate.widths)
        self.temperature = temperature
        self.gate, self.widths = gate, gate.widths
        self.image_channels = size[0]
        if cost is not None:
            self.cost = cost
        self.kept = tuple(dict.fromkeys((*split.cuts, self.reads)))
        self.cuts = [self.kept.index(name) for name in split.cuts]
        front = Front(freeze(model, gate.widths[0]), split, self.kept)
        self.macs_at = _MacsAt(front, self.kept.index(self.reads), gate, frozen)
        self.front = _deployed(front, [size], fold_norms, compile)
        like = next(gate.parameters())
        with torch.no_grad():
            shapes = [tuple(out.shape[1:]) for out in self.front(like.new_zeros(1, *size))]
        inputs = [shapes[index] for index in self.cuts]
        self.tails = nn.ModuleList(_deployed(Tail(network, split), inputs, fold_norms, compile, size) for network in frozen)
        of_widths = torch.tensor(self.macs_at(size), dtype=torch.float64, device=like.device)
        self.register_buffer("macs", of_widths, persistent=False)
        self.register_buffer("counts", torch.zeros_like(of_widths, dtype=torch.int64), persistent=False)
        self.register_buffer("spent", self.counts.sum(), persistent=False)
        self.train(model.training)

    def _apply(self, fn: Any, recurse: bool = True) -> DynamicNetwork:
        """MACs stay in double precision, whatever the type of the network."""
        macs = self.macs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.macs = macs.to(self.macs.device)
        return self

    @property
    def cost(self) -> float:
        """Price of multiply-accumulates in the gate's decisions."""
        return float(self.gate.cost)

    @cost.setter
    def cost(self, value: float) -> None:
        self.gate.cost.fill_(value)

    def train(self, mode: bool = True) -> DynamicNetwork:
        """Training mode is for the gate; front and tails stay in eval mode."""
        super().train(mode)
        self.front.eval()
        self.tails.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            logits, outputs = self.every(images)
            return mixture(gumbel_choice(logits, self.temperature)[0], outputs)
        features, logits = self._run_front(images)
        return self.route(features, decide(logits, self.macs, self.gate.cost), tuple(images.shape[1:]))

    def logits(self, images: Tensor) -> Tensor:
        """The gate's output, (N, choices); gradients reach the gate only."""
        return self._run_front(images)[1]

    def decisions(self, images: Tensor) -> Tensor:
        """The choice of each image without noise, (N,) indices into ``widths``; not added to the counts."""
        with torch.no_grad():
            return decide(self.logits(images), self.macs, self.gate.cost)

    def _run_front(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The inputs of the tails, and the gate's logits."""
        if images.ndim != 4 or images.shape[1] != self.image_channels or not len(images):
            got = "a batch of zero images" if images.ndim == 4 and not len(images) else f"{tuple(images.shape)}"
            raise DataError(f"a dynamic network expects (N, {self.image_channels}, H, W) with N >= 1, got {got}")
        with torch.no_grad():
            outputs = self.front(images)
        logits: Tensor = self.gate(outputs[self.kept.index(self.reads)])
        return [outputs[index] for index in self.cuts], logits

    @torch.no_grad()
    def route(self, features: list[Tensor], decisions: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Run each image through its tail, and count.

        Args:
            features: Outputs of the front, each (N, ...).
            decisions: An index into ``widths`` for each image, (N,).
            shape: Of an image.
        """
        chosen = decisions.tolist()
        counts = [chosen.count(choice) for choice in range(len(self.widths))]
        self.counts += torch.tensor(counts, device=self.counts.device)
        self.spent += sum(count * macs for count, macs in zip(counts, self.macs_at(shape), strict=True))
        used = [choice for choice, count in enumerate(counts) if count]
        if len(used) == 1:
            return self.tails[used[0]](features, shape)  # type: ignore[no-any-return]
        rows = [(decisions == choice).nonzero().flatten() for choice in used]
        groups = [[feature.index_select(0, members) for feature in features] for members in rows]
        outputs = torch.cat([self.tails[choice](group, shape) for choice, group in zip(used, groups, strict=True)])
        return outputs.index_select(0, torch.cat(rows).argsort())

    def forced(self, images: Tensor, decisions: Tensor) -> Tensor:
        """As `forward` in eval mode, with given decisions: (N,) indices into ``widths``."""
        features, _ = self._run_front(images)
        chosen = decisions.tolist()
        if decisions.shape != images.shape[:1] or not all(0 <= choice < len(self.widths) for choice in chosen):
            raise ConfigError(f"decisions {chosen}: expected {len(images)} indices from 0 to {len(self.widths) - 1}")
        return self.route(features, decisions, tuple(images.shape[1:]))

    def every(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The gate's logits, (N, choices), and the outputs of all tails, (choices, N, classes). Gradients reach the gate only."""
        features, logits = self._run_front(images)
        with torch.no_grad():
            outputs = torch.stack([tail(features, tuple(images.shape[1:])) for tail in self.tails])
        return logits, outputs

    @property
    def histogram(self) -> dict[Width, int]:
        """Number of images that took each width since the last `reset`."""
        return dict(zip(self.widths, self.counts.tolist(), strict=True))

    @property
    def mean_macs(self) -> float:
        """Multiply-accumulates per image since the last `reset`, at the images' sizes and including the gate's; 0 without images."""
        return int(self.spent) / max(int(self.counts.sum()), 1)

    def reset(self) -> None:
        """Set the counts to zero."""
        self.counts.zero_()
        self.spent.zero_()

    @torch.no_grad()
    def set_budget(self, macs: float, loader: Iterable[Any]) -> float:
        """Find and set the ``cost`` at which images take at most ``macs`` on average, and as close to it as possible.

        Args:
            macs: Multiply-accumulates per image.
            loader: Yields ``images`` or ``(images, ...)`` like those to come; read once.

        Returns:
            The average over these images.

        Raises:
            ConfigError: A budget out of reach; the message says the range.
            DataError: The loader yields nothing.
        """
        check_budget(macs, float(self.macs.min()), float(self.macs.max()))
        logits = [self.logits(batch[0] if isinstance(batch, list | tuple) else batch) for batch in loader]
        if not logits:
            raise DataError("set_budget got a loader without batches: give it images")
        of_all = torch.cat(logits).double()
        macs_of = self.macs.to(of_all.device)
        cost = torch.tensor(cheapest_cost(of_all, macs_of, float(macs))[0]).to(self.gate.cost)
        self.gate.cost.copy_(torch.nextafter(cost, torch.full_like(cost, torch.inf)))  # never rounded to below the step
        return float(macs_of[decide(of_all, macs_of, self.gate.cost)].mean())

    def extra_repr(self) -> str:
        return f"widths=({', '.join(map(format_width, self.widths))}), cost={self.cost:g}"


class _MacsAt:
    """Multiply-accumulates of each width, the gate's included, for images of a size: counted once each, on the meta device."""

    def __init__(self, front: Front, read: int, gate: nn.Module, networks: Sequence[nn.Module]) -> None:
        self.front, self.read, self.gate = on_meta(front), read, on_meta(gate)
        self.networks = [on_meta(network) for network in networks]
        self.known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def __call__(self, size: tuple[int, ...]) -> tuple[int, ...]:
        if size not in self.known:
            self.known[size] = self._count(size)
        return self.known[size]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _count(self, size: tuple[int, ...]) -> tuple[int, ...]:
        with IgnoreOuterModes():
            read = self.front(next(self.gate.parameters()).new_empty(1, *size))[self.read]
            of_gate = inspect(self.gate, read.shape[1:]).macs
            channels, height, width = size
            return tuple(inspect(network, (channels, height, width)).macs + of_gate for network in self.networks)


def mixture(choice: Tensor, outputs: Tensor) -> Tensor:
    """The chosen outputs: (N, choices) and (choices, N, classes) -> (N, classes).

    The gradient of a choice is the inner product of the loss's gradient with the output of that choice.
    """
    return torch.einsum("nk,knc->nc", choice, outputs)


def cheapest_cost(logits: Tensor, macs: Tensor, budget: float) -> tuple[float, float]:
    """The cost at which the mean of ``macs`` is nearest below ``budget``, and that mean.

    The mean falls as the cost rises, in steps at which one image changes its choice; the step is found by bisection.
    """

    def spent(cost: float) -> float:
        return float(macs[decide(logits, macs, cost)].mean())

    relative = macs / macs.max()
    gaps = (relative[:, None] - relative[None, :]).abs()
    reach = float((logits.max() - logits.min()) / gaps[gaps > 0].min()) + 1.0 if bool((gaps > 0).any()) else 1.0
    low, high = -reach, reach  # all images at the widest, all at the narrowest
    if spent(low) <= budget:
        return low, spent(low)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high, spent(high)


def _deployed(
    part: Front | Tail, shapes: Sequence[tuple[int, ...]], fold_norms: bool, compile: bool, *arguments: object
) -> MicroBatched:
    """A front or tail, changed in place, with fewer layers and fewer tensors for the same function.

    ``shapes`` are those of its inputs, without the batch; ``arguments`` are further ones of its forward.
    """

    def run(ghost: nn.Module) -> None:
        dtype = next((t.dtype for t in ghost.parameters() if t.is_floating_point()), torch.float32)
        inputs = [torch.empty(2, *shape, device="meta", dtype=dtype) for shape in shapes]
        ghost(inputs[0] if isinstance(part, Front) else inputs, *arguments)

    if fold_norms:
        fold_norms_of(part, run)
    pack_layers(part, run)
    return MicroBatched(part, run, _compiled(part) if compile else None)


def _compiled(part: nn.Module) -> Callable[..., Any]:
    """Compiled at first use. The compiler caches by code object, up to a limit: each part gets its own."""

    def run(*args: Any) -> Any:
        return part(*args)

    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    return torch.compile(own, dynamic=True)


def _check_common_front(model: nn.Module, front: tuple[str, ...], chosen: Sequence[Width]) -> None:
    """Raise if a layer of the front differs between the sub-networks."""
    indices = [width_index(widths_of(model), width) for width in chosen]
    for name, layer in model.named_modules():
        spec = layer.width_spec if isinstance(layer, WidthAware) else None
        if spec is None or not is_within(name, front):
            continue
        has_statistics = isinstance(layer, PlainBatchNorm2d)
        if len({(spec.ins[i], spec.outs[i], spec.bn_set(i) if has_statistics else 0) for i in indices}) > 1:
            raise IncompatibleModelError(
                f"layer {name!r} runs before the gate and differs between the widths {', '.join(map(format_width, chosen))}: "
                "a gate can only choose among sub-networks with the same front"
            )
