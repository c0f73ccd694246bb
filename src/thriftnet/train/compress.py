"""Compression: from a trained network to a small one that is nearly as accurate, in one call.

A sequence of what can also be done step by step: plan, convert with a fit to data, short trainings that find a learning rate, a
training that distils from the network as it was, and folding. Each step ends in the folder, and the same call goes on after a stop.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from thriftnet import __version__
from thriftnet.arguments import Count, Epochs, PositiveWeight, Range, Seed, checked
from thriftnet.core.copied import copied
from thriftnet.core.fit import IMAGES
from thriftnet.core.fold import fold
from thriftnet.core.plan import Plan
from thriftnet.core.provenance import add_data_facts, data_facts, stated_input_size
from thriftnet.core.sites import Select
from thriftnet.core.spec import to_dict
from thriftnet.core.technique import Technique
from thriftnet.data.dataset import DataSource
from thriftnet.data.loaders import Loader, make_loader
from thriftnet.data.sources import open_data
from thriftnet.data.split import limited, train_validation
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.files import locked, write_atomically
from thriftnet.measure import inspect
from thriftnet.planning import plan, suggest
from thriftnet.planning.budget import Limit
from thriftnet.store.model_file import load, save
from thriftnet.store.sealed import read_json, sealed_json
from thriftnet.techniques import TechniqueLike, convert, resolve
from thriftnet.train.distributed import launched
from thriftnet.train.evaluate import evaluate
from thriftnet.train.loop import Progress
from thriftnet.train.prepare import augmentation_for, check_classes, input_size, weights_hash, with_classes_of
from thriftnet.train.recipe import Recipe, load_recipe
from thriftnet.train.run_folder import read_metrics
from thriftnet.train.trainer import TeacherLabels, train

STATE, LOCK = "compress.json", ".lock"
RATES = (0.003, 0.01, 0.03, 0.1)  # learning rates that are tried
PROBE = 0.08  # of the training's length, for each of them
LEAST_STEPS = 40  # of a probe
BATCHES = (1, 64)  # of images, whose times are compared
ROUNDS = 7  # of timing

Rates = Annotated[tuple[PositiveWeight, ...], Range(1, 20)]
OnStep = Callable[[str], object]


@dataclass(frozen=True)
class Measured:
    """A network after one of the steps.

    Args:
        name: "plain", "fitted", "trained" or "folded".
        top1: Test accuracy in percent; for images without labels, agreement with the plain network.
        params: Stored parameters, shared ones once.
        macs: Multiply-accumulates for one image.
        size_bytes: Of parameters and buffers, as they are saved.
        times: By batch size, the time of one batch divided by that of the plain network, both on the CPU.
    """

    name: str
    top1: float
    params: int
    macs: int
    size_bytes: int
    times: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`.

    Args:
        folder: Of all files: ``model`` is the network, ``folded`` the same in plain layers, ``report.html`` the report.
        plan: What was converted, and how.
        rows: The network before, and after each step.
        rates: The learning rates that were tried, and the accuracy on held-out images of each, in percent.
        rate: The best of them.
        seconds: Of each step, over all calls.
        labelled: Whether accuracies are those of labels.
    """

    folder: str
    plan: Plan
    rows: tuple[Measured, ...]
    rates: dict[float, float]
    rate: float
    seconds: dict[str, float]
    labelled: bool

    def __getitem__(self, name: str) -> Measured:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        planned = self.plan.to_dict()
        chosen = {"technique": planned["technique"], "name": self.plan.name, "error": self.plan.error}
        rest = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "plan"}
        rates = {f"{rate:g}": top1 for rate, top1 in self.rates.items()}
        return {**rest, "plan": chosen, "rows": [asdict(row) for row in self.rows], "rates": rates}


@checked
def compress(
    model: nn.Module,
    data: str | DataSource,
    output: str | Path,
    *,
    params: Limit = None,
    macs: Limit = None,
    bytes: Limit = None,
    technique: TechniqueLike | None = None,
    select: Select | None = None,
    exclude: Select | None = None,
    epochs: Epochs | None = None,
    minutes: PositiveWeight | None = None,
    rates: Rates = RATES,
    limit: Count | None = None,
    seed: Seed = 0,
    recipe: Recipe | None = None,
    device: str | None = None,
    on_step: OnStep = lambda name: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Compressed:
    """Make a trained network small, and win back the accuracy: one call from the network to a folder to deploy.

    The technique is the given one, or the best that `suggest` finds; its settings keep to the budget. The new layers are fitted to the
    outputs of the old ones, short trainings find the learning rate, and a training imitates the network as it was. Accuracies are those
    of the test images, which nothing else looks at; the learning rate and the epoch that is kept are chosen by held-out training images.

    A call that was stopped, by a signal or a power cut, goes on where it was when it is made again.

    Args:
        model: A trained classifier; it is left as it is.
        data: A data set, or its name as `thriftnet.data.sources.open_data` takes it. Images without labels do.
        output: Folder of all files.
        params: As in `plan`: at most so many stored parameters.
        macs: As in `plan`.
        bytes: As in `plan`.
        technique: Default: the best of all. Without a budget, it is taken as it is.
        select: Which layers, as in `convert`.
        exclude: Which of them to leave alone.
        epochs: Passes over the training images. Default: the recipe's.
        minutes: Instead: of training, in all.
        rates: Learning rates to try; one alone is taken as it is.
        limit: Only so many training images.
        seed: Of the training.
        recipe: How to train. Default: convert-and-recover.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
        on_step: Called with the name of each step, before it.
        on_progress: Called after each step of a training.

    Raises:
        ConfigError: Neither budget nor technique, a budget out of reach, or a folder that holds another compression.
        DataError: Images that cannot be read, or that the network does not run on.
        IncompatibleModelError: No technique fits the network.
        Interrupted: Stopped by a signal; the same call goes on.
    """
    config: Technique | None = None if technique is None else resolve(technique)
    budget = {"params": params, "macs": macs, "bytes": bytes}
    budget = {name: value for name, value in budget.items() if value is not None}
    if config is None and not budget:
        raise ConfigError("say how small: params=0.5, macs=0.5 or bytes='1MB', or give a technique with its settings")
    if epochs is not None and minutes is not None:
        raise ConfigError("say how long to train with either epochs or minutes")
    if launched()[1] > 1:
        raise ConfigError("compress runs in one process: start it without torchrun; thriftnet train takes several")
    source = open_data(data) if isinstance(data, str) else data
    how = _recipe(recipe or load_recipe("convert-and-recover"), model, source, seed, device, limit, epochs)
    job = _Job(copied(model).cpu().eval(), source, how, device)
    asked = {
        "model": f"{type(model).__name__} {weights_hash(job.plain)[:16]}",
        "data": source.spec,
        "budget": budget,
        "technique": None if config is None else to_dict(config),
        "layers": [repr(select), repr(exclude)],
        "minutes": minutes,
        "rates": list(rates),
        "recipe": how.to_dict(),
    }
    folder = Path(output)
    try:
        with locked(folder / LOCK):
            state = _State(folder, json.loads(json.dumps(asked, default=str)), on_step)
            state.step("plain", lambda: job.measure(job.plain, "plain"))
            state.step("plan", lambda: job.planned(config, budget, select, exclude, on_step))
            planned = _resolved(Plan.from_dict(state.done["plan"]["plan"]))
            state.step("fitted", lambda: job.fitted(planned, folder / "fitted"))
            for rate in rates if len(rates) > 1 else ():
                state.step(f"rate {rate:g}", lambda rate=rate: job.probe(folder, rate, minutes, len(rates), on_progress))  # type: ignore[misc]
            tried = {rate: state.done[f"rate {rate:g}"]["top1"] for rate in rates if len(rates) > 1}
            best = max(rates, key=lambda rate: (tried.get(rate, 0.0), -rate))
            state.step("trained", lambda: job.trained(folder, best, minutes, len(tried), on_progress))
            state.step("folded", lambda: job.folded(folder))
            rows = tuple(Measured(**state.done[name]["row"]) for name in ("plain", "fitted", "trained", "folded"))
            seconds = {name: entry["seconds"] for name, entry in state.done.items()}
            result = Compressed(str(folder), planned, rows, tried, best, seconds, source.labelled)
            _write_report(result, read_metrics(folder / "training"), folder)
    except BlockingIOError as error:
        raise ConfigError(
            f"another compression runs in {folder} ({error.strerror}): give another output, or stop it"
        ) from None
    return result


class _State:
    """The steps that are done, in a file."""

    def __init__(self, folder: Path, asked: Mapping[str, Any], on_step: OnStep) -> None:
        self.path, self.asked, self.on_step = folder / STATE, asked, on_step
        self.done: dict[str, dict[str, Any]] = {}
        try:
            stored = read_json(self.path)
        except FileNotFoundError:
            return
        except CheckpointError as error:
            raise ConfigError(f"{error}: give another output, or remove the folder") from None
        before = stored.get("asked", {})
        differing = [name for name in asked if before.get(name) != asked[name]]
        if differing:
            raise ConfigError(
                f"{folder} holds another compression: {', '.join(differing)} differ. Give another output, or what it began with"
            )
        self.done = stored["done"]

    def step(self, name: str, do: Callable[[], Mapping[str, Any]]) -> None:
        """Do a step, unless it is done."""
        if name in self.done:
            return
        self.on_step(name)
        start = time.perf_counter()
        self.done[name] = {**do(), "seconds": round(time.perf_counter() - start, 2)}
        write_atomically(self.path, sealed_json({"asked": self.asked, "done": self.done, "thriftnet": __version__}))


class _Job:
    """The steps of one compression."""

    def __init__(self, plain: nn.Module, source: DataSource, recipe: Recipe, device: str | None) -> None:
        self.plain, self.recipe = plain, recipe
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.source = with_classes_of(plain, source, [recipe])
        self.size = input_size(recipe, self.source)
        check_classes(plain, self.source, self.size, "the network")
        self.augmentation = augmentation_for(plain, recipe, self.source)
        add_data_facts(plain, {**self.augmentation.facts(), "input_size": self.size, "class_names": self.source.classes})
        train_images = limited(self.source.split("train"), recipe.data.limit)
        self.training, _ = train_validation(train_images, recipe.run.validation, recipe.seed)
        self.times: dict[str, list[float]] = {}

    def measure(self, network: nn.Module, name: str) -> dict[str, Any]:
        """The row of a network."""
        test = self._loader(self.source.split("test"), shuffle=False)
        batches = test if self.source.labelled else TeacherLabels(test, self.plain.to(self.device))
        top1 = evaluate(network.eval().to(self.device), batches).top1
        report = inspect(network.cpu(), self.size)
        self.plain.cpu()
        return {"row": asdict(Measured(name, top1, report.params, report.macs, report.size_bytes))}

    def images(self) -> Loader:
        """Training images to fit to."""
        return self._loader(limited(self.training, IMAGES), shuffle=True)

    def planned(
        self,
        technique: Technique | None,
        budget: Mapping[str, Any],
        select: Select | None,
        exclude: Select | None,
        on_step: OnStep,
    ) -> dict[str, Any]:
        """The plan, and those that were not chosen."""
        common: Any = {**budget, "select": select, "exclude": exclude, "data": self.images(), "input_size": self.size}
        if technique is not None:
            best, others = plan(self.plain, technique, **common), list[Plan]()
        else:
            best, *others = suggest(self.plain, progress=lambda name: on_step(f"plan: {name}"), **common)
        kept = [{"name": each.name, "error": each.error, "params": each.last.params_after} for each in others]
        return {"plan": best.to_dict(), "others": kept}

    def fitted(self, planned: Plan, place: Path) -> dict[str, Any]:
        """Convert and save."""
        network = convert(self.plain, planned, data=self.images(), input_size=self.size)
        save(network, place)
        return self.measure(network, "fitted")

    def probe(
        self, folder: Path, rate: float, minutes: float | None, count: int, on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """A short training."""
        length: dict[str, Any] = {"minutes": minutes * PROBE} if minutes else {"max_steps": self._probe_steps()}
        recipe = self.recipe.replace(lr=rate, trackers=(), warmup_epochs=0.0, checkpoint_every=0, **length)
        place = folder / "rates" / f"{rate:g}"
        self._train(recipe, folder, place, on_progress)
        return {"top1": _accuracy(read_metrics(place)[-1])}

    def trained(
        self, folder: Path, rate: float, minutes: float | None, probes: int, on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """The training itself."""
        recipe = self.recipe.replace(lr=rate, **({"minutes": minutes * (1 - PROBE * probes)} if minutes else {}))
        self._train(recipe, folder, folder / "training", on_progress)
        network = load(folder / "training" / "model", model=copied(self.plain))
        found = self.measure(network, "trained")
        save(network, folder / "model", metadata={"metrics": {"top1": found["row"]["top1"]}})
        found["row"]["times"] = self._times(network)
        return found

    def folded(self, folder: Path) -> dict[str, Any]:
        """The network in plain layers."""
        network = fold(load(folder / "model", model=copied(self.plain)).eval(), prefer="speed")
        found = self.measure(network, "folded")
        save(network, folder / "folded", metadata={"metrics": {"top1": found["row"]["top1"]}})
        found["row"]["times"] = self._times(network)
        return found

    def _train(self, recipe: Recipe, folder: Path, place: Path, on_progress: Callable[[Progress], None]) -> None:
        network = load(folder / "fitted", model=copied(self.plain))
        train(
            recipe,
            self.source,
            place,
            model=network,
            teacher=copied(self.plain),
            device=str(self.device),
            on_progress=on_progress,
        )

    def _probe_steps(self) -> int:
        steps = self.recipe.epochs * max(1, len(self.training) // self.recipe.data.batch_size)
        return max(LEAST_STEPS, round(PROBE * steps))

    def _loader(self, images: Any, *, shuffle: bool) -> Loader:
        return make_loader(
            images,
            min(256, len(images)),
            augmentation=self.augmentation,
            train=False,
            shuffle=shuffle,
            seed=self.recipe.seed,
            device=self.device,
            workers=self.recipe.data.workers,
        )

    def _times(self, network: nn.Module) -> dict[str, float]:
        """The time of a batch divided by that of the plain network, by batch size."""
        from thriftnet.measure.latency import Spread, time_rounds

        found = {}
        for batch in BATCHES:
            x = torch.randn(batch, *self.size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                seconds = time_rounds({"plain": lambda x=x: self.plain(x), "this": lambda x=x: network(x)}, ROUNDS)  # type: ignore[misc]
            found[str(batch)] = round(Spread.of_ratios(seconds["this"], seconds["plain"]).median, 3)
        return found


def _recipe(
    recipe: Recipe,
    model: nn.Module,
    source: DataSource,
    seed: int,
    device: str | None,
    limit: int | None,
    epochs: int | None,
) -> Recipe:
    """The recipe for these images, which become inputs as those that the network was trained on did, and for this device."""
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    fields: dict[str, Any] = {"technique": (), "seed": seed, "limit": limit}
    facts = data_facts(model)
    size = stated_input_size(model) if source.input_size is None else facts.input_size
    if size is not None and recipe.augmentation.image_size is None:
        known = {name: getattr(facts, name) for name in ("resize", "crop_pct", "eval_interpolation")}
        fields |= {name: value for name, value in known.items() if value is not None}
        fields |= {"image_size": size[1], "crop_padding": min(recipe.augmentation.crop_padding, size[1] // 8)}
    if on_cpu:  # where these are slower
        fields |= {"precision": "fp32", "memory_format": "contiguous"}
    if epochs is not None:
        fields |= {"epochs": epochs, "warmup_epochs": min(recipe.schedule.warmup_epochs, 0.1 * epochs)}
    if not source.labelled:
        fields |= {"distill_weight": 1.0}
    return recipe.replace(needs=(), **fields)


def _resolved(planned: Plan) -> Plan:
    """A plan that was read, with its techniques' configs."""
    then = None if planned.then is None else _resolved(planned.then)
    return dataclasses.replace(planned, technique=resolve(planned.technique), then=then)


def _accuracy(row: Mapping[str, Any]) -> float:
    """Of a row of metrics, in percent."""
    return float(row["top1"] if "top1" in row else row["agreement"])


def _write_report(result: Compressed, training: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from thriftnet.report.compress_page import compress_page
    from thriftnet.report.page import write_page

    write_page(compress_page(result.to_dict(), result.plan, training), folder / "report.html")
