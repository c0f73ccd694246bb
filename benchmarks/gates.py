"""What trained gates are worth: the accuracy of their decisions beside as many decisions by chance.

For each data set and seed, the sub-networks are trained once; then a gate for each of the targets of `GateObjective` learns to
choose among them. The cost of decisions is found on training images for budgets within the reachable range; all accuracies
are of test images. Beside the gate's accuracy stand, for the very multiply-accumulates that it spends:

chance   as many images to each sub-network, but any images: the expectation, which is exact
mixture  the best that chance can do: the two fixed widths around, mixed
fixed    the best fixed width within the budget
oracle   the best assignment, which only labels can tell

    python -m benchmarks.gates --cifar parquet:cifar10-jpeg --weights resnet20-12fca82f.th --write docs/results

Trainings in the output folder are taken up again, so a second start only measures.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import thriftnet
from thriftnet.data.dataset import DataSource, Subset
from thriftnet.data.loaders import Loader, make_loader
from thriftnet.data.sources import open_data
from thriftnet.dynamic.gate import decide
from thriftnet.dynamic.network import DynamicNetwork, cheapest_cost
from thriftnet.dynamic.objective import TARGETS
from thriftnet.report.plots import accuracy_against_macs
from thriftnet.train.prepare import prepare_model
from thriftnet.train.recipe import Recipe, load_recipe
from thriftnet.train.trainer import CALIBRATION, train

SHARES = (1 / 6, 0.25, 0.5, 0.75)  # of the reachable range, for the table; the sixth was added after the pictures were seen
SWEEP = tuple(i / 12 for i in range(13))  # for the picture
COLUMNS = ("network", "targets", "budget", "gate", "chance", "mixture", "fixed", "oracle", "over chance", "over the mixture")
RESNET: dict[str, Any] = {
    "batch_size": 64,
    "precision": "fp32",
    "memory_format": "contiguous",
    "trackers": (),
}


GATE = {"lr": 0.05, "weight_decay": 0.0001, "warmup_epochs": 0}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the trained network
SLICE = 10_000  # training images of CIFAR-10; all of its test images are taken


@dataclass(frozen=True)
class Case:
    """Sub-networks, and the gate that is trained for them.

    Args:
        title: For people.
        data: As ``--data`` takes it; None for what ``--cifar`` says.
        seeds: How many, unless ``--seeds`` says.
        recipe: Of a seed; its last stage is the gate.
    """

    title: str
    data: str | None
    seeds: int
    recipe: Callable[[int], Recipe]


@dataclass(frozen=True)
class Point:
    """What a gate does at one budget: top-1 in percent, multiply-accumulates for an image."""

    share: float
    budget: float
    macs: float
    gate: float
    chance: float
    mixture: float
    fixed: float
    oracle: float


@dataclass(frozen=True)
class Said:
    """What a network with a gate says of N images: logits and whether each of K widths is right, each (N, K)."""

    logits: Tensor
    right: Tensor


def ds_net(seed: int) -> Recipe:
    return load_recipe("ds-net-digits", seed=seed, trackers=())


def resnet_digits(seed: int) -> Recipe:
    """From random weights, for so short that the widths differ."""
    fields = {**RESNET, "warmup_epochs": 1.0, "augmentation": {"crop_padding": 1, "flip": False}, "epochs": 6, "seed": seed}
    recipe = load_recipe("slimmable-resnet-cifar", **fields, technique=(slimmable(0.125, 0.25, 0.5, 1.0),))
    return recipe.replace(stages=(*recipe.stages, {"stage": "gate", "epochs": 24, **GATE}))


def resnet_cifar(seed: int) -> Recipe:
    """From a trained network; its narrow widths learn for some minutes."""
    stages = (
        {"stage": "widths", "max_steps": 200},
        {"recalibrate": {"batches": 30}},
        {"stage": "gate", "max_steps": 300, **GATE},
    )
    augmentation = {"crop_padding": 4, "flip": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    fields = {**RESNET, "warmup_epochs": 0.05, "evaluate_every": 100, "lr": 0.02, "seed": seed, "augmentation": augmentation}
    recipe = load_recipe("slimmable-resnet-cifar", **fields, technique=(slimmable(0.25, 0.5, 1.0),))
    return recipe.replace(stages=stages)


def slimmable(*widths: float) -> str:
    return f"slimmable(widths={widths}, gate=True)"


CASES: dict[str, Case] = {
    "digits-dsnet": Case("digits, DS-Net of ds-net-digits, 14 widths", "digits", 5, ds_net),
    "digits-resnet": Case("digits, ResNet-20 at 4 widths", "digits", 5, resnet_digits),
    "cifar-resnet": Case("CIFAR-10 (JPEG), trained ResNet-20 at 3 widths", None, 3, resnet_cifar),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in options.cases:
        case, start = CASES[name], time.process_time()
        if case.data is None and not (options.cifar and options.weights):
            print(f"{name}: left out, it needs --cifar and --weights")
            continue
        source, runs = open_data(case.data) if case.data else part_of(open_data(options.cifar)), []
        for seed in range(options.seeds or case.seeds):
            recipe = case.recipe(seed) if case.data else case.recipe(seed).replace(model=options.weights)
            runs.append(one_seed(recipe, source, Path(options.output) / f"{name}-{seed}"))
            print(f"{name}, seed {seed}: {time.process_time() - start:.0f} s CPU", flush=True)
        found[name] = {"title": case.title, "runs": runs}
        print(report({name: found[name]}), flush=True)
    if options.write:
        write(found, Path(options.write))


def part_of(source: DataSource) -> DataSource:
    """The same with fewer training images."""
    training = source.split("train")
    few = Subset(training, torch.linspace(0, len(training) - 1, SLICE).long())
    return replace(source, splits={"train": few, "test": source.split("test")})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train gates; compare their decisions with as many by chance.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which; all unless given")
    parser.add_argument("--cifar", metavar="DATA", help="CIFAR-10, as --data takes it; left out, without")
    parser.add_argument("--weights", metavar="FILE", help="a ResNet-20 trained on it, as --model takes it")
    parser.add_argument("--seeds", type=int, help="how many; 5 on the digits and 3 on CIFAR-10 unless given")
    parser.add_argument("--output", default="runs/gates", metavar="DIR", help="where trainings go")
    parser.add_argument(
        "--write", metavar="DIR", help="write DATE-gates-CASE.json there, and pictures to ../images beside it"
    )
    options = parser.parse_args()
    if options.seeds is not None and options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def one_seed(recipe: Recipe, source: DataSource, place: Path) -> dict[str, Any]:
    """Sub-networks of a seed, and for each of the targets what the gate does at each share of the range."""
    *before, gate = recipe.stages
    base = network(recipe, source)
    train(recipe.replace(technique=(), stages=tuple(before)), source, place / "widths", model=base, device="cpu")
    macs = DynamicNetwork(base, input_size=source.input_size).macs
    points = {}
    for targets in TARGETS:
        asked = {**gate.get("stage.options", {}), "targets": targets}
        if targets == "sandwich":  # it is trained for one budget, the middle one
            asked["budget"] = float(macs.min() + macs.max()) / 2
        how = recipe.for_stage({**gate, "stage.options": asked}).replace(technique=())
        model = copy.deepcopy(base)
        train(how, source, place / targets, model=model, device="cpu")
        points[targets] = measured(DynamicNetwork(model, input_size=source.input_size).eval(), source, recipe)
    alone = said(DynamicNetwork(base, input_size=source.input_size), loader_of(source, recipe, "test")).right
    widths = [[float(cost), 100 * float(top1)] for cost, top1 in zip(macs, alone.double().mean(0), strict=True)]
    return {"widths": widths, **{name: [asdict(point) for point in each] for name, each in points.items()}}


def network(recipe: Recipe, source: DataSource) -> nn.Module:
    """A new network for the data, with the widths and the gate of the recipe."""
    torch.manual_seed(recipe.seed)
    return prepare_model(recipe, source)


def loader_of(source: DataSource, recipe: Recipe, split: str, most: int | None = None) -> Loader:
    """Images without augmentation; of many, some evenly spread."""
    images = source.split(split)
    if most is not None:
        images = Subset(images, torch.linspace(0, len(images) - 1, min(len(images), most)).long())
    augmentation = recipe.augmentation.for_source(source)
    return make_loader(images, 256, augmentation=augmentation, train=False, device="cpu", workers=0)


@torch.no_grad()
def said(dynamic: DynamicNetwork, loader: Loader) -> Said:
    """Of all images, by all widths."""
    logits, right = [], []
    for images, labels in loader:
        some, outputs = dynamic.every(images)
        logits.append(some.double())
        right.append((outputs.argmax(2) == labels).T)
    return Said(torch.cat(logits), torch.cat(right))


def measured(dynamic: DynamicNetwork, source: DataSource, recipe: Recipe) -> list[Point]:
    """The gate at all budgets: the cost of each is found on training images."""
    known, test = (
        said(dynamic, loader_of(source, recipe, "train", CALIBRATION)),
        said(dynamic, loader_of(source, recipe, "test")),
    )
    least, most = float(dynamic.macs.min()), float(dynamic.macs.max())
    points = []
    for share in sorted({*SHARES, *SWEEP}):
        budget = least + share * (most - least)
        cost, _ = cheapest_cost(known.logits, dynamic.macs, budget)
        points.append(point(decide(test.logits, dynamic.macs, cost), test.right, dynamic.macs, share, budget))
    return points


def point(chosen: Tensor, right: Tensor, macs: Tensor, share: float, budget: float) -> Point:
    """What decisions are worth, (N,) positions among the widths, and what others that spend as much are worth."""
    alone, spent = right.double().mean(0), float(macs[chosen].mean())
    shares = torch.bincount(chosen, minlength=len(macs)).double() / len(chosen)
    within = alone[macs <= max(budget, float(macs.min()))]
    found = float(right.gather(1, chosen[:, None]).double().mean())
    others = (float(shares @ alone), mixture(spent, macs, alone), float(within.max()), oracle(spent, macs, right))
    return Point(share, budget, round(spent), *(round(100 * top1, 3) for top1 in (found, *others)))


def mixture(spent: float, macs: Tensor, alone: Tensor) -> float:
    """The best expected accuracy of two widths mixed at random that spend at most so much: the upper hull of the fixed ones."""
    best = 0.0
    for cheap, low in zip(macs.tolist(), alone.tolist(), strict=True):
        for dear, high in zip(macs.tolist(), alone.tolist(), strict=True):
            if cheap <= spent <= dear:
                part = 0.0 if cheap == dear else (spent - cheap) / (dear - cheap)
                best = max(best, low + part * (high - low))
            elif dear <= spent:
                best = max(best, high)
    return best


def oracle(spent: float, macs: Tensor, right: Tensor) -> float:
    """The best accuracy that any assignment spending so much can have: images take the cheapest width that is right."""
    extra = torch.where(right, macs - macs.min(), torch.inf).min(1).values
    extra = extra[extra.isfinite()].sort().values
    return float((extra.cumsum(0) <= (spent - float(macs.min())) * len(right) + 1e-6).sum()) / len(right)


def report(found: dict[str, Any]) -> str:
    """The table of gains, in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|--:" + "|--:" * (len(COLUMNS) - 3) + "|"]
    for each in found.values():
        rows = [row(each["runs"], targets, share) for targets in TARGETS for share in SHARES]
        lines += [f"| {each['title']}, {len(each['runs'])} seeds | {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines)


def row(runs: Sequence[dict[str, Any]], targets: str, share: float) -> list[str]:
    """Means over the seeds, and for the gains their standard error."""
    points = [next(p for p in run[targets] if p["share"] == share) for run in runs]
    means = [f"{statistics.mean(p[name] for p in points):.2f}" for name in ("gate", "chance", "mixture", "fixed", "oracle")]
    gains = [gain([p["gate"] - p[other] for p in points]) for other in ("chance", "mixture")]
    return [f"`{targets}`", f"{share:.0%}", *means, *gains]


def gain(values: Sequence[float]) -> str:
    """Mean, and the standard error of the mean over the seeds."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{error}"


def write(found: dict[str, Any], folder: Path) -> None:
    """The numbers of all runs and a picture, for each case."""
    versions = {"thriftnet": thriftnet.__version__, "torch": torch.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in found.items():
        text = json.dumps({"date": str(date.today()), "versions": versions, **each})
        (folder / f"{date.today()}-gates-{name}.json").write_text(text + "\n")
        (folder.parent / "images" / f"gates-{name}.svg").write_text(accuracy_against_macs(curves(each["runs"])))


def curves(runs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Means over the seeds: fixed widths, chance and the gates, each over multiply-accumulates."""

    def mean(pairs: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
        return [tuple(statistics.mean(values) for values in zip(*place, strict=True)) for place in zip(*pairs, strict=True)]

    def of(targets: str, name: str) -> list[tuple[float, float]]:
        return mean([[(p["macs"], p[name]) for p in run[targets]] for run in runs])

    gates = {f"gate, {targets}": of(targets, "gate") for targets in TARGETS}
    return {
        "fixed widths": mean([run["widths"] for run in runs]),
        "best mixture by chance": of("losses", "mixture"),
        **gates,
    }


if __name__ == "__main__":
    main()
