"""`thriftnet bench`: time a network as it is, converted, folded, packed and compiled, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from thriftnet.arguments import BatchSize, Count
from thriftnet.cli.common import Parser, open_network, parse_with_kwargs
from thriftnet.cli.machine import use_allocator, use_threads
from thriftnet.cli.options import reads, svg_file
from thriftnet.cli.output import emit, write_text
from thriftnet.errors import ConfigError, IncompatibleModelError, ThriftnetError, first_line
from thriftnet.memory import needs
from thriftnet.text import table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from thriftnet.measure.latency import Spread

DESCRIPTION = (
    "Time a network as it is, converted by each --technique, and each of these folded, packed and compiled. Everything runs in "
    "rounds, in random order; speedups are against the network as it is and are taken within each round."
)
COLUMNS = ("batch", "threads", "network", "implementation", "ms", "quartiles", "speedup", "quartiles", "note")
TOLERANCE = 1e-3  # of outputs that should be equal, relative to the largest
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Row:
    """One time, or the reason why there is none."""

    network: str  # the technique that converted it, or "as it is"
    implementation: str  # one of `IMPLEMENTATIONS`
    batch_size: int | None = None
    threads: int | None = None  # within an operation
    ms: Spread | None = None  # wall-clock time of one batch
    speedup: Spread | None = None  # time of the network as it is, divided by this one
    note: str = ""  # the reason

    def cells(self) -> list[object]:
        """The row of the table."""
        if self.ms is None or self.speedup is None:
            return [None, None, self.network, self.implementation, None, "", None, "", self.note]
        times = [self.ms.median, self.ms.quartiles, self.speedup.median, self.speedup.quartiles]
        return [self.batch_size, self.threads, self.network, self.implementation, *times, self.note]


def run(arguments: Sequence[str]) -> None:
    parser = Parser("bench", DESCRIPTION, "model", "--input-size", "--device")
    add = parser.add_argument
    technique = "as 'shift()'; each one given makes a network of its own"
    add("--technique", action="append", default=[], metavar="T", help=technique)
    sizes = "images at a time; every number given is timed"
    add("--batch-size", type=reads(BatchSize), nargs="+", default=[1], metavar="N", help=sizes)
    add("--rounds", type=reads(Count), default=11, metavar="N", help="turns of each implementation")
    add("--svg", type=svg_file, metavar="FILE.svg", help="draw the times, an SVG")
    parser.add_shared("--threads", nargs="+")
    parser.add_shared("--fast-malloc")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.core.provenance import input_size_of
    from thriftnet.measure.latency import conditions
    from thriftnet.train.distributed import process_group

    allocator = use_allocator(fast_malloc=options.fast_malloc)
    with process_group(options.device) as device:
        model = open_network(options.model, kwargs).eval().to(device)
        size = input_size_of(model, options.input_size)
        rows = measured(model, options.technique, size, device, options)
    facts = {**conditions(str(device)), "allocator": allocator, "input_size": list(size)}
    if options.svg:
        write_text(options.svg, picture(options.model, rows))
    head = "  ".join(f"{key}: {value}" for key, value in facts.items())
    text = f"{head}\n\n{table(COLUMNS, [row.cells() for row in rows])}"
    emit(text, {"model": options.model, "conditions": facts, "rows": [asdict(row) for row in rows]}, as_json=options.json)


def measured(
    model: nn.Module, techniques: Sequence[str], size: tuple[int, int, int], device: torch.device, options: Any
) -> list[Row]:
    """Every implementation at every batch size and number of threads; those that cannot run come last, with the reason."""
    import torch

    from thriftnet.measure.latency import Spread, time_rounds

    networks, left_out = converted(model, techniques)
    default, rows = torch.get_num_threads(), []
    for wanted in options.threads or [None]:
        for batch_size in options.batch_size:
            torch.set_num_threads(default)
            threads = use_threads(batch_size, wanted)
            needs(8 * batch_size * prod(size), f"a batch of {batch_size:,} images and what is computed of it")
            images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(device)
            with torch.no_grad():
                runs = dict(runnable(networks, images, left_out))
                seconds = time_rounds(runs, options.rounds, device=device.type)
            base = seconds[AS_IT_IS, "eager"]
            for key, spent in seconds.items():
                ms = Spread.of([1e3 * value for value in spent])
                rows.append(Row(*key, batch_size, threads, ms, Spread.of_ratios(base, spent)))
    return rows + [Row(*key, note=reason) for key, reason in left_out.items()]


Key = tuple[str, str]  # network and implementation


def converted(model: nn.Module, techniques: Sequence[str]) -> tuple[dict[str, nn.Module], dict[Key, str]]:
    """The network as it is and converted by each technique, and the reasons of techniques that do not apply."""
    from thriftnet.techniques import convert

    networks, left_out = {AS_IT_IS: model}, {}
    for technique in techniques:
        try:
            networks[technique] = convert(model, technique).eval()
        except IncompatibleModelError as error:
            left_out[technique, "eager"] = str(error)
    return networks, left_out


def runnable(
    networks: dict[str, nn.Module], images: Tensor, left_out: dict[Key, str]
) -> Iterator[tuple[Key, Callable[[], object]]]:
    """Every implementation whose outputs equal its network's; the others go to ``left_out``, with the reason."""
    import torch

    torch.compiler.reset()  # compiled code is made for one number of threads
    for network, model in networks.items():
        try:
            expected = model(images)
        except RuntimeError as error:
            raise ConfigError(
                f"the network does not run on images {tuple(images.shape[1:])}: {first_line(error)}. Give --input-size C,H,W"
            ) from None
        for implementation, prepare in IMPLEMENTATIONS.items():
            key = network, implementation
            try:
                function = prepare(model, images)
                difference = float((function(images) - expected).abs().max() / expected.abs().max())
            except (ThriftnetError, RuntimeError) as error:  # torch's compiler raises RuntimeErrors
                left_out[key] = first_line(error)
                continue
            if difference <= TOLERANCE or implementation == "eager":  # the reference itself
                yield key, partial(function, images)
            else:
                left_out[key] = f"its outputs differ by {difference:.1e} of the largest"


def folded(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Plain layers."""
    from thriftnet.core.fold import fold, is_foldable

    if not any(is_foldable(module) for module in model.modules()):
        raise IncompatibleModelError("plain layers only: nothing to fold")
    return fold(model)


def packed(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Folded, norms merged, weights laid out for oneDNN."""
    from thriftnet.kernels.pack import pack

    if images.device.type != "cpu":
        raise IncompatibleModelError("packing is for CPUs")
    _, channels, height, width = images.shape
    return pack(model, input_size=(channels, height, width))


def compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Folded, and compiled by torch for this batch size."""
    import torch

    from thriftnet.core.fold import fold

    return torch.compile(fold(model), dynamic=False)


# Each takes a network and a batch, and returns a function with the same outputs.
IMPLEMENTATIONS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model, images: model,
    "folded": folded,
    "packed": packed,
    "compiled": compiled,
}


def picture(model: str, rows: Sequence[Row]) -> str:
    """An SVG: a panel for each batch size and number of threads, a bar for each implementation."""
    from thriftnet.report.plots import latencies

    panels: dict[str, dict[str, tuple[float, float, float, str]]] = {}
    for row in rows:
        if row.ms is not None and row.speedup is not None:
            panel = f"batch {row.batch_size}, {row.threads} thread{'s' if row.threads != 1 else ''}"
            name = row.implementation if row.network == AS_IT_IS else f"{row.network}, {row.implementation}"
            label = f"{row.ms.median:.3g} ms, {row.speedup.median:.2f} x"
            panels.setdefault(panel, {})[name] = (row.ms.median, row.ms.low, row.ms.high, label)
    return latencies(model, panels)
