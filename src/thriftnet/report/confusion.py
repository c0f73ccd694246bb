"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.report.plots import figure, svg

NUMBERED = 20  # up to so many classes, each field shows its count


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Share of each class (rows) taken for each class (columns), as shades of blue.

    Args:
        confusion: Images of each class taken for each class.
        classes: Their names.
    """
    count = len(classes)
    shares = [[100 * value / max(1, sum(row)) for value in row] for row in confusion]
    side = min(12.0, 2.6 + 0.42 * min(count, NUMBERED))
    with figure(side + 0.9, side) as drawn:
        axes = drawn.subplots()
        axes.grid(visible=False)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        if count <= NUMBERED:
            axes.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), classes)
            for i, row in enumerate(confusion):
                for j, value in enumerate(row):
                    colour = "#ffffff" if shares[i][j] > 55 else "#222222"
                    axes.text(j, i, str(value) if value else "", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xlabel("taken for")
        axes.set_ylabel("class")
        drawn.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
        return svg(drawn)
