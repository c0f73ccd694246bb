"""Pictures as SVG text, made by matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from thriftnet.text import printable, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

# Okabe & Ito: distinguishable for colour-blind readers
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("*", "o", "s", "^", "D", "v", "P")
LONGEST = 40  # characters of a label
NUMBERED = 20  # most classes of a confusion matrix that shows its counts


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, drawn without a screen."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "thriftnet",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.axisbelow": True,
        "svg.fonttype": "none",  # whoever shows it has letters of all scripts; matplotlib's font has not
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(drawn: Figure) -> str:
    """The figure as an SVG element; equal figures give equal text. Text from outside is made printable, and cut where it is long."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for label in drawn.findobj(Text):
        label.set_text(_label(label.get_text()))
    for axis in (axis for axes in drawn.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(formatter := axis.get_major_formatter(), FuncFormatter):  # names at ticks
            axis.set_major_formatter(partial(_safe_tick, formatter))
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that matplotlib has not, labels longer than the picture
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _safe_tick(formatter: Callable[[float, int | None], str], value: float, place: int | None) -> str:
    return _label(formatter(value, place))


def _label(text: str) -> str:
    return shortened(printable(text), LONGEST)


def accuracy_against_params(names: Sequence[str], params: Sequence[int], accuracies: Sequence[float]) -> str:
    """Test accuracy in percent over stored parameters, a marker for each network; the best place is top left."""
    with figure(7.2, 4.2) as drawn:
        axes = drawn.subplots()
        for i, (name, count, accuracy) in enumerate(zip(names, params, accuracies, strict=True)):
            style: Any = {"marker": MARKERS[i % 7], "color": COLOURS[i % 7], "s": 160 if i == 0 else 80}
            axes.scatter(count / 1000, accuracy, label=name, zorder=3, **style)
        axes.axhline(accuracies[0], color="#888888", linewidth=0.8, linestyle=":")
        axes.set_xlim(left=0)
        axes.set_xlabel("stored parameters, thousands")
        axes.set_ylabel("test accuracy, %")
        axes.margins(y=0.15)
        drawn.legend(loc="outside right upper", frameon=False)
        return svg(drawn)


def training_curves(names: Sequence[str], losses: Sequence[Sequence[float]], accuracies: Sequence[Sequence[float]]) -> str:
    """Training loss and test accuracy in percent over epochs, a line for each network."""
    with figure(9.2, 3.8) as drawn:
        left, right = drawn.subplots(1, 2)
        for i, (name, loss, accuracy) in enumerate(zip(names, losses, accuracies, strict=True)):
            epochs = range(1, len(loss) + 1)
            left.plot(epochs, loss, color=COLOURS[i % 7], label=name, linewidth=2 if i == 0 else 1.4)
            right.plot(epochs, accuracy, color=COLOURS[i % 7], linewidth=2 if i == 0 else 1.4)
        left.set_ylabel("training loss (with penalty)")
        left.set_yscale("log")
        right.set_ylabel("test accuracy, %")
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        drawn.legend(loc="outside right upper", frameon=False)
        return svg(drawn)


def run_curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss, accuracy and learning rate of one training.

    Args:
        rows: One for each epoch, with ``epoch`` and some of ``train_loss``, ``loss``, ``top1`` or ``agreement`` (percent) and ``lr``.
    """
    panels = (
        ("loss", (("training", "train_loss"), ("held out", "loss"))),
        ("top-1 accuracy, %", (("held out", "top1"), ("with the teacher", "agreement"))),
        ("learning rate", (("", "lr"),)),
    )
    with figure(7.2, 6.0) as drawn:
        stacked = drawn.subplots(len(panels), 1, sharex=True, height_ratios=(3, 3, 1.5))
        for axes, (title, lines) in zip(stacked, panels, strict=True):
            for i, (label, name) in enumerate(lines):
                points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[i + 1], label=label)
            axes.set_ylabel(title)
            if len(axes.lines) > 1:
                axes.legend(frameon=False)
        stacked[-1].set_xlabel("epoch")
        return svg(drawn)


def predictions(images: Tensor, labels: Sequence[int], names: Sequence[str], predicted: Sequence[Sequence[int]]) -> str:
    """Images over what each network takes them for; wrong answers are red."""
    count, rows = len(labels), len(names)
    with figure(0.62 * count + 2.2, 0.95 + 0.26 * rows) as drawn:
        axes = drawn.subplots()
        axes.axis("off")
        for column in range(count):
            axes.imshow(images[column, 0], cmap="gray_r", extent=(column + 0.08, column + 0.92, 0.08, 0.92), aspect="auto")
            for row, answers in enumerate(predicted):
                right = answers[column] == labels[column]
                axes.text(
                    column + 0.5,
                    -0.34 * row - 0.25,
                    str(answers[column]),
                    ha="center",
                    va="center",
                    color="#222222" if right else "#D50000",
                    weight="normal" if right else "bold",
                )
        for row, name in enumerate(names):
            axes.text(-0.15, -0.34 * row - 0.25, name, ha="right", va="center", color=COLOURS[row % 7])
        axes.set_xlim(-3.6, count)
        axes.set_ylim(-0.34 * rows - 0.25, 1)
        return svg(drawn)


def accuracy_against_macs(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Accuracy in percent over multiply-accumulates, a line for each way to choose; the best place is top left."""
    with figure(7.2, 4.4) as drawn:
        axes = drawn.subplots()
        for i, (name, points) in enumerate(curves.items(), 1):
            ordered = sorted(points)
            style: Any = {"marker": MARKERS[i % 7], "color": COLOURS[i % 7]}
            axes.plot([macs / 1e6 for macs, _ in ordered], [top1 for _, top1 in ordered], label=name, **style)
        axes.set_xlabel("multiply-accumulates per image, millions")
        axes.set_ylabel("top-1 accuracy, %")
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="lower right")
        return svg(drawn)


def decisions(counts: Sequence[Sequence[int]], classes: Sequence[str], widths: Sequence[str]) -> str:
    """What share of each class's images takes each width, narrowest first, a bar for each class."""
    with figure(7.2, 1.2 + 0.28 * len(classes)) as drawn:
        axes = drawn.subplots()
        totals = [max(sum(row), 1) for row in counts]
        left = [0.0] * len(classes)
        for place, width in enumerate(widths):
            shares = [100 * row[place] / total for row, total in zip(counts, totals, strict=True)]
            shade = 0.88 - 0.7 * place / max(len(widths) - 1, 1)
            axes.barh(range(len(classes)), shares, left=left, color=(shade * 0.8, shade * 0.95, shade), label=width)
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set_yticks(range(len(classes)), classes)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("images, %")
        axes.grid(visible=False)
        drawn.legend(loc="outside right upper", title="width", frameon=False)
        return svg(drawn)


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Share of each class (rows) taken for each class (columns), as shades of blue; with few classes also the counts."""
    count = len(classes)
    shares = [[100 * value / max(1, sum(row)) for value in row] for row in confusion]
    side = min(12.0, 2.6 + 0.42 * min(count, NUMBERED))
    with figure(side + 0.9, side) as drawn:
        axes = drawn.subplots()
        written = [[str(value) if value else "" for value in row] for row in confusion] if count <= NUMBERED else None
        image = _shades(axes, shares, 100, classes, written)
        axes.set_xlabel("taken for")
        axes.set_ylabel("class")
        drawn.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
        return svg(drawn)


def similarities(banks: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]]) -> str:
    """Magnitudes of cosines between layers, as shades of blue with their values, one matrix for each bank.

    Args:
        banks: For each bank's name: its layers, and the matrix.
    """
    sides = [1.9 + 0.36 * len(layers) for layers, _ in banks.values()]
    with figure(max(sides) + 1.6, sum(sides)) as drawn:
        stacked = list(drawn.subplots(len(banks), 1, squeeze=False, height_ratios=sides).flat)
        for axes, (bank, (layers, matrix)) in zip(stacked, banks.items(), strict=True):
            image = _shades(axes, matrix, 1, layers, [[f"{value:.2f}" for value in row] for row in matrix])
            axes.set_title(bank, fontsize=10, loc="left")
        drawn.colorbar(image, ax=stacked, label="|cosine| between coefficients", shrink=0.8)
        return svg(drawn)


def _shades(
    axes: Any, matrix: Sequence[Sequence[float]], top: float, names: Sequence[str], written: Sequence[Sequence[str]] | None
) -> Any:
    """A square matrix of values in [0, top] as shades of blue; names and the text in each cell if any is written."""
    axes.grid(visible=False)
    if written is not None:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for i, row in enumerate(written):
            for j, text in enumerate(row):
                colour = "#ffffff" if matrix[i][j] > 0.55 * top else "#222222"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    return axes.imshow(matrix, cmap="Blues", vmin=0, vmax=top)


def sweep(rows: Sequence[Mapping[str, Any]]) -> str:
    """Parameters and multiply-accumulates over the first argument, a line for each setting of the others.

    Args:
        rows: For each network its ``arguments``, ``params`` and ``macs``.
    """
    from matplotlib.ticker import EngFormatter

    first = next(iter(rows[0]["arguments"]))
    values: list[Any] = []
    values += (row["arguments"][first] for row in rows if row["arguments"][first] not in values)
    numeric = all(type(value) in (int, float) for value in values)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(setting({name: value for name, value in row["arguments"].items() if name != first}), []).append(row)
    with figure(9.6, 4.0) as drawn:
        for axes, (count, title) in zip(drawn.subplots(1, 2), {"params": "parameters", "macs": "MACs"}.items(), strict=True):
            for i, line in enumerate(lines.values()):
                places = [row["arguments"][first] if numeric else values.index(row["arguments"][first]) for row in line]
                points = sorted(zip(places, (row[count] for row in line), strict=True))
                axes.plot(*zip(*points, strict=True), marker=MARKERS[(i + 1) % 7], color=COLOURS[i % 7])
            if numeric and min(values) > 0 and max(values) >= 8 * min(values):
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.set_xticks(values if numeric else range(len(values)), map(str, values))
            if max(row[count] for row in rows) >= 20 * min(row[count] for row in rows) > 0:
                axes.set_yscale("log")
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlabel(first)
            axes.set_title(title, fontsize=10, loc="left")
        if len(lines) > 1:
            drawn.legend(axes.lines, lines, loc="outside right upper", frameon=False)
        return svg(drawn)


def setting(arguments: Mapping[str, Any]) -> str:
    """Arguments and their values, in one line."""
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def latencies(title: str, panels: Mapping[str, Mapping[str, tuple[float, float, float, str]]]) -> str:
    """Milliseconds as bars, a panel for each batch size and number of threads; the first bar is what others are compared with.

    Args:
        title: The network's name.
        panels: For each panel's title and each bar's name: median, quartiles and a label.
    """
    count = max(map(len, panels.values()))
    with figure(7.6, (0.9 + 0.3 * count) * len(panels) + 0.4) as drawn:
        for axes, (name, bars) in zip(drawn.subplots(len(panels), 1, squeeze=False).flat, panels.items(), strict=True):
            for place, (median, low, high, label) in enumerate(bars.values()):
                axes.barh(place, median, height=0.62, color="#9a9a9a" if place == 0 else COLOURS[6])
                axes.plot([low, high], [place, place], color="#000000", linewidth=1.5)
                axes.annotate(label, (max(median, high), place), (6, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set_yticks(range(len(bars)), bars, fontsize=9)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.35 * max(max(median, high) for median, _, high, _ in bars.values()))
            axes.grid(visible=False, axis="y")
            axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("ms per batch (black line: quartiles); x: times as fast as the first")
        drawn.suptitle(title, fontsize=10)
        return svg(drawn)


def suggestions(rows: Sequence[Mapping[str, Any]], params: int, macs: int) -> str:
    """Errors of plans, and what they leave of the network's parameters and multiply-accumulates, a bar for each plan.

    Args:
        rows: For each plan its ``technique``, ``error``, ``params`` and ``macs``.
        params: Of the network now.
        macs: Of the network now; 0 if they were not counted.
    """
    panels: list[tuple[str, list[float]]] = [("error of layers", [row["error"] for row in rows])]
    panels.append(("parameters, % of now", [100 * row["params"] / max(1, params) for row in rows]))
    if macs:
        panels.append(("MACs, % of now", [100 * row["macs"] / macs for row in rows]))
    with figure(10.4, 0.9 + 0.36 * len(rows)) as drawn:
        for i, (axes, (title, values)) in enumerate(zip(drawn.subplots(1, len(panels), sharey=True), panels, strict=True)):
            axes.barh(range(len(rows)), values, height=0.62, color=COLOURS[i + 1])
            for place, value in enumerate(values):
                text = f"{value:.3f}" if i == 0 else f"{value:.0f}"
                axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set_xlim(0, 1.18 * max([*values, 1e-6]))
            axes.set_title(title, fontsize=10, loc="left")
            axes.grid(visible=False, axis="y")
            axes.set_yticks(range(len(rows)), [row["technique"] for row in rows])
        axes.invert_yaxis()
        return svg(drawn)


def layer_errors(names: Sequence[str], errors: Sequence[float]) -> str:
    """The error of each converted layer, in the order of the network."""
    with figure(9.2, 0.8 + 0.2 * len(names)) as drawn:
        axes = drawn.subplots()
        axes.barh(range(len(names)), errors, height=0.7, color=COLOURS[1])
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("relative error")
        axes.grid(visible=False, axis="y")
        return svg(drawn)
