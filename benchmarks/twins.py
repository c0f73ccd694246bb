"""Every width of a slimmable ResNet-20 beside its twin: the same narrow network, trained alone.

One training gives all widths: the sandwich of the recipe slimmable-resnet-cifar, then fresh statistics. A twin has the
architecture that `freeze` gives at its width, starts from random weights and trains by the same recipe, for as many steps, but with the
plain loss. Data are the bundled digits, whose 450 test images make one image worth 0.22 points.

    python -m benchmarks.twins --write docs/results/slimmable-twins.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

import thriftnet
from thriftnet.cli.demo import held_out
from thriftnet.data.dataset import DataSource
from thriftnet.data.sources import open_data
from thriftnet.train.evaluate import evaluate
from thriftnet.train.recipe import Recipe, load_recipe
from thriftnet.train.trainer import train

WIDTHS = (0.25, 0.5, 0.75, 1.0)
SIZE = (1, 8, 8)
FIELDS = {
    "batch_size": 64,
    "warmup_epochs": 1.0,
    "augmentation": {"crop_padding": 1, "flip": False},
    "precision": "fp32",
    "memory_format": "contiguous",
    "trackers": (),
}
Scores = dict[float, list[float]]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    source = open_data("digits")
    start = time.perf_counter()
    together: Scores = {width: [] for width in WIDTHS}
    alone: Scores = {width: [] for width in WIDTHS}
    for seed in range(options.seeds):
        recipe = load_recipe("slimmable-resnet-cifar", **FIELDS, epochs=options.epochs, seed=seed)
        for width, score in slimmable(recipe, source).items():
            together[width].append(score)
        for width in WIDTHS:
            alone[width].append(twin(recipe, source, width))
        print(f"seed {seed}: {shown(together)} together, {shown(alone)} alone", file=sys.stderr)
    page = report(together, alone, options, time.perf_counter() - start)
    print(page)
    if options.write:
        Path(options.write).write_text(page + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a slimmable network and the twins of its widths; compare.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", metavar="FILE", help="also write the table there, as docs/results/slimmable-twins.md")
    options = parser.parse_args()
    if min(options.epochs, options.seeds) < 1:
        parser.error("--epochs and --seeds must be at least 1")
    return options


def slimmable(recipe: Recipe, source: DataSource) -> dict[float, float]:
    """Top-1 at each width of one network on the test images, in percent."""
    model = seeded(recipe, 1.0)
    for technique in recipe.technique:
        model = thriftnet.convert(model, technique)
    with tempfile.TemporaryDirectory() as run:
        train(recipe.replace(technique=()), source, run, model=model, device="cpu")
    test, scores = held_out(source), {}
    for width in WIDTHS:
        thriftnet.set_width(model, width)
        scores[width] = evaluate(model.eval(), test).top1
    return scores


def twin(recipe: Recipe, source: DataSource, width: float) -> float:
    """Top-1 of a network that has this width only."""
    with tempfile.TemporaryDirectory() as run:
        alone = recipe.replace(technique=(), stages=(), stage="standard")
        return train(alone, source, run, model=seeded(recipe, width), device="cpu").top1


def seeded(recipe: Recipe, width: float) -> nn.Module:
    """A ResNet-20 of this width with random weights, drawn as its authors draw them for its own channels."""
    torch.manual_seed(recipe.seed)
    model = thriftnet.create_model("resnet20", in_chans=1, num_classes=10, reduction=reduction(width))
    wide = thriftnet.convert(thriftnet.create_model("resnet20", in_chans=1, num_classes=10), recipe.technique[0])
    frozen = thriftnet.freeze(wide, width)
    if shapes(model) != shapes(frozen):
        raise SystemExit(f"the twin of width {width} is not the network that freeze gives")
    return model


def reduction(width: float) -> float:
    """How many times fewer parameters; a little less, so that channels are not rounded to below the width."""
    return width**-2 * (1 - 1e-9)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def shown(scores: Scores) -> str:
    return " ".join(f"{each[-1]:.2f}" for each in scores.values())


def report(together: Scores, alone: Scores, options: argparse.Namespace, seconds: float) -> str:
    """The page."""
    lines = [
        "# Widths and their twins",
        "",
        f"A slimmable ResNet-20 on the digits, and for each width the same narrow network trained alone: {options.epochs} epochs each,",
        f"{options.seeds} seeds, top-1 on the 450 test images in percent, mean and range. One image is 0.22 points.",
        "",
        "| width | params | MACs | slimmable | trained alone | difference of the means |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for width in WIDTHS:
        model = thriftnet.create_model("resnet20", in_chans=1, num_classes=10, reduction=reduction(width))
        counts = thriftnet.inspect(model, SIZE)
        gap = statistics.mean(together[width]) - statistics.mean(alone[width])
        cells = f"{counts.params:,} | {counts.macs:,} | {summary(together[width])} | {summary(alone[width])} | {gap:+.2f}"
        lines.append(f"| {width:g} | {cells} |")
    params = thriftnet.inspect(thriftnet.create_model("resnet20", in_chans=1, num_classes=10), SIZE).params
    lines += [
        "",
        f"The slimmable network stores {params:,} parameters for all widths; the twins are four networks. It takes four forwards a step,",
        "a twin one. The recipe is `slimmable-resnet-cifar` with a batch of 64, crops padded by 1, one epoch of warm-up and",
        "fp32; a twin has its plain loss.",
        "",
        f"Measured {date.today()} with thriftnet {thriftnet.__version__} and torch {torch.__version__.partition('+')[0]}, one CPU thread, "
        f"{seconds / 60:.0f} minutes:",
        "",
        f"    python -m benchmarks.twins --epochs {options.epochs} --seeds {options.seeds} --write docs/results/slimmable-twins.md",
    ]
    return "\n".join(lines)


def summary(scores: list[float]) -> str:
    return f"{statistics.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"


if __name__ == "__main__":
    main()
