"""The result of `inspect`: totals and one row per layer, as a table or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from thriftnet.arguments import checked
from thriftnet.text import table

NAMED_OPS = 6  # uncounted operations named in the printed report; `to_dict` has them all


@dataclass(frozen=True)
class LayerRow:
    """Parameters and cost of one layer. Costs are totals over its runs, at batch 1.

    Args:
        names: Every name of the layer in the network; the empty name is the network itself.
        kind: Class of the layer.
        params: Stored parameters; shared ones are counted at the first layer that has them.
        dense_params: Parameters of the plain layers it replaces, one for each of its names.
        macs: Multiply-accumulates of the convolutions, linear layers and matrix products it ran.
        generation_macs: Multiply-accumulates of computing its weights.
        shift_bytes: Bytes read and written by its shifts.
        output: Shape of the first output tensor of its first run; None if it never ran, or returned no tensor.
        calls: Number of runs.
    """

    names: tuple[str, ...]
    kind: str
    params: int
    dense_params: int
    macs: int
    generation_macs: int
    shift_bytes: int
    output: tuple[int, ...] | None
    calls: int

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def matters(self) -> bool:
        """Whether it stores or replaces parameters, or costs anything."""
        return any((self.params, self.dense_params, self.macs, self.generation_macs, self.shift_bytes))

    def to_dict(self) -> dict[str, Any]:
        """The row as a JSON-ready dict."""
        return {**asdict(self), "names": list(self.names), "output": None if self.output is None else list(self.output)}


@checked
@dataclass(frozen=True)
class Report:
    """Parameters and cost of a network; prints as a table. The totals are sums over the rows.

    Args:
        model: Class name of the network.
        input_size: Channels, height and width of the input it was measured on, at batch 1.
        rows: All layers, in registration order.
        uncounted: Number of runs of each operation without a formula (norms, activations, additions, ...); views, copies and
            allocations are left out, and shifts, whose bytes are counted.
        width: The width it was measured at; None for a network of one width.
        size_bytes: Of its parameters and buffers as they are saved, shared ones once.

    Example:
        >>> print(Report("Net", (3, 16, 16), (LayerRow(("conv",), "Conv2d", 216, 216, 55296, 0, 0, (1, 8, 16, 16), 1),)))
        Net on 3x16x16, batch 1
        parameters: 216
        MACs: 55,296
        <BLANKLINE>
        layer  kind    output     params  dense    MACs  calls
        conv   Conv2d  1x8x16x16     216    216  55,296      1
    """

    model: str
    input_size: tuple[int, int, int]
    rows: tuple[LayerRow, ...]
    uncounted: Mapping[str, int] = field(default_factory=dict)
    width: float | int | str | None = None
    size_bytes: int = 0

    @property
    def params(self) -> int:
        """Stored parameters, shared ones once."""
        return sum(row.params for row in self.rows)

    @property
    def dense_params(self) -> int:
        """Parameters of the plain network with nothing shared."""
        return sum(row.dense_params for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of executed convolutions, linear layers and matrix products; shared weights at each use."""
        return sum(row.macs for row in self.rows)

    @property
    def generation_macs(self) -> int:
        """Multiply-accumulates of computing weights from what is stored; not in `macs`."""
        return sum(row.generation_macs for row in self.rows)

    @property
    def shift_bytes(self) -> int:
        """Bytes read and written by shifts, which cost no multiply-accumulates."""
        return sum(row.shift_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON-ready dict; costs in multiply-accumulates and bytes."""
        totals = ("params", "dense_params", "macs", "generation_macs", "shift_bytes")
        return {
            "model": self.model,
            "input_size": list(self.input_size),
            "width": self.width,
            **{name: getattr(self, name) for name in totals},
            "size_bytes": self.size_bytes,
            "rows": [row.to_dict() for row in self.rows],
            "uncounted": dict(self.uncounted),
        }

    def __str__(self) -> str:
        width = self.width if isinstance(self.width, str | None) else f"{self.width:g}"
        at_width = "" if width is None else f", width {width}"
        lines = [
            f"{self.model} on {'x'.join(map(str, self.input_size))}, batch 1{at_width}",
            f"parameters: {self.params:,}{self._explained()}",
            *([f"size: {self.size_bytes / 2**20:.1f} MiB as saved, with buffers"] if self.size_bytes else []),
            f"MACs: {self.macs:,}"
            + (f", and {self.generation_macs:,} for computing weights" if self.generation_macs else "")
            + (f"; shifts move {self.shift_bytes:,} bytes" if self.shift_bytes else ""),
            "",
            self._table(),
        ]
        return "\n".join(lines + (["", self._uncounted_line()] if self.uncounted else []))

    def _explained(self) -> str:
        """What the parameters are compared with, if layers are converted or shared."""
        if self.params in (0, self.dense_params):
            return ""
        factor = f"{self.dense_params / self.params:.2f}x"
        return f" stored; {self.dense_params:,} if every converted layer were the plain layer that it replaces ({factor})"

    def _table(self) -> str:
        """The rows that matter, without columns of zeros."""
        rows = [row for row in self.rows if row.matters]
        columns: dict[str, list[Any]] = {
            "layer": [(row.name or "(network)") + (f" +{len(row.names) - 1}" if len(row.names) > 1 else "") for row in rows],
            "kind": [row.kind for row in rows],
            "output": ["-" if row.output is None else "x".join(map(str, row.output)) for row in rows],
            "params": [row.params for row in rows],
            "dense": [row.dense_params for row in rows],
            "MACs": [row.macs for row in rows],
            "generation": [row.generation_macs for row in rows],
            "shift bytes": [row.shift_bytes for row in rows],
            "calls": [row.calls for row in rows],
        }
        shown = {head: cells for head, cells in columns.items() if any(cells) or head not in ("generation", "shift bytes")}
        return table(list(shown), zip(*shown.values(), strict=True))

    def _uncounted_line(self) -> str:
        often = sorted(self.uncounted.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{name.removeprefix('aten.')} {count}x" for name, count in often[:NAMED_OPS])
        more = f" and {len(often) - NAMED_OPS} more" if len(often) > NAMED_OPS else ""
        return f"not counted (no formula): {named}{more}"
