"""Figure 7: data sets that are damaged or odd give one error that names the file, or the right images and labels."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
from PIL import Image

from faults.data_damages import BYTES, CONTENT, FILES, Damage
from faults.figure import Figure, Length
from faults.watch import FAILED, LONGEST, REFUSED, Judgement, in_workers, memory_within
from images import cifar_files, class_folders, parquet_files
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.dataset import DataSource, ImageDataset, Subset
from thriftnet.data.decode import EncodedImages
from thriftnet.data.loaders import make_loader
from thriftnet.data.sources import open_data
from thriftnet.errors import DataError

SAME, FEWER, OTHER = "as before", "without what is damaged", "other values in what is damaged"
COLUMNS = (SAME, FEWER, OTHER, REFUSED, FAILED)
MEMORY = 256 << 20  # bytes that one of them may take
EVALUATION = Augmentation(image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)

Images = dict[str, tuple[int, str]]  # file, or file and row -> label, and hash of the pixels


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure("Damaged data sets", ["data", "damage", "data sets", *COLUMNS])
    with ExitStack() as patched:

        def patch(owner: Any, name: str, value: Any) -> None:
            patched.enter_context(mock.patch.object(owner, name, value))

        patch(socket, "getaddrinfo", _offline)
        _fill(figure, Damaged(folder, seed, patch), folder, length)
    return figure


def _fill(figure: Figure, damaged: Damaged, folder: Path, length: Length) -> None:
    count = length.pick(24, 1000, 10_000)
    (folder / "results").mkdir()
    workers = 1 if length is Length.QUICK else os.cpu_count() or 1
    rows: dict[str, Counter[str]] = {}
    for found in in_workers(count, damaged.one, folder / "results", workers):
        rows.setdefault(found.format, Counter())[found.outcome] += 1
        figure.expect(found.outcome != FAILED, found.reason)
    for name, outcomes in sorted(rows.items()):
        figure.rows.append([*name.partition("; ")[::2], outcomes.total(), *(outcomes[column] for column in COLUMNS)])
    figure.notes.append(
        "Every image that is not in a damaged file has the label and pixels that it had. Failures would be: an image that is missing, or "
        "has another label or other pixels, without an error that names it; any exception but DataError, or one that lacks the damaged "
        f"file's name or has several lines; no answer after {LONGEST} s; more than {MEMORY >> 20} MiB of memory; a crash. Half of them "
        "are opened with `on_corrupt='skip'`."
    )


class UnexpectedError(Exception):
    """What should not happen to a data set that is opened."""


def check(right: bool, otherwise: str) -> None:
    """Raise unless something is as it should be."""
    if not right:
        raise UnexpectedError(otherwise)


def _offline(*_: object, **__: object) -> Any:
    raise OSError("no network here")


class Damaged:
    """Makes damaged data sets, always the same ones for a seed, and judges them."""

    def __init__(self, folder: Path, seed: int, patch: Callable[[Any, str, Any], None]) -> None:
        self.folder, self.seed, self.names = folder / "own", seed, ["cat", "dog", "owl"]
        sound = folder / "sound"
        sets: dict[str, Callable[[Path], object]] = {
            "folder, splits": self._splits,
            "folder, no splits": lambda root: class_folders(root, 6, ("cat", "dog", "owl")),
            "parquet": lambda root: parquet_files(root, {"train": 12, "test": 7}, self.names),
            "parquet, several files": self._several,
            "cifar10": lambda root: cifar_files(root, "cifar10", patch),
        }
        self.sound: dict[str, tuple[str, Path, dict[str, Images]]] = {}
        for name, make in sets.items():
            root = sound / name.replace(", ", "-").replace(" ", "-")
            root.mkdir(parents=True)
            make(root)
            kind = name.partition(",")[0]
            images, problems = contents(open_data(f"{kind}:{root}"), root)
            check(bool(images) and not problems, f"{name}: {problems}")
            self.sound[name] = kind, root, images

    @staticmethod
    def _splits(root: Path) -> None:
        class_folders(root / "train", 4)
        class_folders(root / "val", 3)
        for path in sorted(root.rglob("*.png"))[::3]:
            Image.open(path).save(path.with_suffix(".jpg"), quality=95)
            path.unlink()

    def _several(self, root: Path) -> None:
        for number in range(3):
            parquet_files(root / "data", {"train": 6 + number}, None if number else self.names, checksums=True)
            (root / "data" / "train-00000-of-00001.parquet").rename(root / "data" / f"train-{number:05}-of-00003.parquet")
        parquet_files(root / "data", {"validation": 5}, checksums=True)

    def one(self, index: int) -> list[Judgement]:
        """Damage number so and so."""
        chance = random.Random(f"{self.seed}/datasets/{index}")
        name = list(self.sound)[index % len(self.sound)]
        kind, sound, before = self.sound[name]
        root = self.folder / f"of{os.getpid()}" / "set"
        shutil.rmtree(root.parent, ignore_errors=True)
        shutil.copytree(sound, root)
        how, ways = chance.choice([("bytes", BYTES), ("files", FILES), ("content", CONTENT[kind])])
        damage = chance.choice(ways)(root, chance)
        skip = bool(index // len(self.sound) % 2)
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve address space ahead
        pyarrow.set_cpu_count(1)
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        try:
            with memory_within(MEMORY) as used:
                outcome, reason = judge(f"{kind}:{root}", root, before, damage, skip)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if used and used[0] > MEMORY:
            outcome, reason = FAILED, f"it took {used[0]:,} bytes of memory"
        about = f"{name}, number {index}{' (skip)' if skip else ''}, {damage.said} {sorted(damage.files)}: "
        return [Judgement(f"{name}; {how}", outcome, about + reason if reason else "")]


def judge(spec: str, root: Path, before: Images, damage: Damage, skip: bool) -> tuple[str, str]:
    """What became of a damaged data set, and why where that should not be."""
    try:
        source = open_data(spec, on_corrupt="skip" if skip else "error")
        now, problems = contents(source, root)
        problems += source.skipped
        for images in source.splits.values():
            problems += _used(images, skip)
    except DataError as error:
        return (FAILED, problem) if (problem := _not_clear(str(error), root, damage, before)) else (REFUSED, "")
    except Exception as error:
        return FAILED, f"it raised {type(error).__name__}: {error}"
    for text in problems:
        if problem := _not_clear(text, root, damage, before):
            return FAILED, problem
    if damage.refused:
        return FAILED, "it was opened"
    changed = {name for name in before if now.get(name) != before[name]}
    if wrong := sorted(name for name in changed if not damage.covers(name)):
        return FAILED, f"{wrong[0]} was {before[wrong[0]]}, is {now.get(wrong[0])}"
    missing = [name for name in changed if name not in now]
    said = [name for name in missing if any(name.partition(", row ")[0] in text for text in problems)]
    if silent := sorted(set(missing) - set(said) if not damage.lost else ()):
        return FAILED, f"{silent[0]} is missing without a word"
    if new := sorted(name for name in now if name not in before and not damage.covers(name)):
        return FAILED, f"{new[0]} is new"
    return (FEWER if missing else OTHER if changed or len(now) > len(before) else SAME), ""


def contents(source: DataSource, root: Path) -> tuple[Images, list[str]]:
    """Label and pixels of each image by its name, and what is said of those that cannot be read."""
    found: Images = {}
    problems: list[str] = []
    for split, images in source.splits.items():
        for index, label in enumerate(images.labels.tolist()):
            name = _name(images, index, split, root)
            check(name not in found, f"{name} is there twice")
            try:
                image = images.image(index)
            except DataError as error:
                problems.append(str(error))
                continue
            check(image.mode == "RGB", f"{name} is {image.mode}")
            found[name] = label, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
    return found, problems


def _name(images: ImageDataset, index: int, split: str, root: Path) -> str:
    while isinstance(images, Subset):
        images, index = images.base, int(images.indices[index])
    if not isinstance(images, EncodedImages):
        return f"{split}, {index}"
    try:
        return images.encoded(index)[1].removeprefix(f"{root}/").removesuffix(",")
    except DataError:  # a row group that cannot be read
        return f"{split}, unreadable {index}"


def _used(images: ImageDataset, skip: bool) -> list[str]:
    """Look the images over, and count those that a loader gives; what is said."""
    try:
        images.look_over()
        batches = make_loader(images, 4, augmentation=EVALUATION, train=False, resident=False)
        seen = sum(len(labels) for _, labels in batches)
        check(seen == len(images), f"a loader gives {seen} of {len(images)} images")
    except DataError as error:
        check(not skip, f"after skipping: {error}")
        return [str(error)]
    return []


def _not_clear(said: str, root: Path, damage: Damage, before: Images) -> str:
    """Why a message is no help; "" if it is."""
    sound = {name.partition(", row ")[0] for name in before if not damage.covers(name)}
    named = any(Path(file).name in said for file in damage.files)
    blamed = any(f"{root / file} " in said for file in sound)
    if str(root) in said and (named or not blamed) and "\n" not in said and len(said.replace(str(root), "")) < 700:
        return ""
    return f"it was refused with {said[:300]!r}"
