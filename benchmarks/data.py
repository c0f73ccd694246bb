"""How many images per second the resident loader gives, against the per-image pipeline of the papers' code.

The baseline is what their CIFAR training does for each image: a PIL image, torchvision's RandomCrop(32, 4),
RandomHorizontalFlip, ToTensor and Normalize, and torch's DataLoader without workers. Ours is `ResidentLoader` with the same
augmentation. Cutout, after Normalize, is timed for both as well. All forms take a pass over the same random images in each
round, in an order drawn anew, in one process on one thread. Times are CPU times of this process; a ratio is the median over the
rounds of (baseline's time per image / form's time per image) in that round. Trust the ratios; images per second depend on the
machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from thriftnet.data.dataset import ArrayImages
from thriftnet.data.loaders import Loader, make_loader
from thriftnet.data.transforms import Augmentation, Cutout
from thriftnet.text import table

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BASELINE = "PIL, image by image"
SLOW = 10  # the resident loader gets as many times more images per round, so that both are timed about as long


class PilImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """CIFAR as torchvision keeps it: an array (N, H, W, C), made an image when it is asked for."""

    def __init__(self, images: ArrayImages, cutout: int) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        steps += [transforms.Normalize(MEAN, STD), *([Cutout(cutout)] if cutout else [])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = [row for cutout in (0, 16) for row in measure(options.images, options.batch, options.rounds, cutout)]
    if options.json:
        facts = {"torch": torch.__version__, "machine": platform.machine(), "batch": options.batch}
        print(json.dumps({**facts, "results": results}))
        return
    print(f"{options.images} images of 3 x 32 x 32, batch {options.batch}, 1 thread, {options.rounds} rounds")
    print()
    print(table(["augmentation", "pipeline", "images/s (median)", "x baseline"], [list(row.values()) for row in results]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the resident loader against the per-image pipeline.")
    parser.add_argument("--images", type=int, default=2000, help="per round, for the slow pipeline")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if min(options.images, options.batch, options.rounds) < 1:
        parser.error("--images, --batch and --rounds must be at least 1")
    return options


def measure(count: int, batch: int, rounds: int, cutout: int) -> list[dict[str, str | float]]:
    """One row per pipeline, with this cutout."""
    images = random_images(count * SLOW)
    few = ArrayImages(images.images[:count], images.labels[:count])
    pil = torch.utils.data.DataLoader(PilImages(few, cutout), batch, shuffle=True)
    pipelines: dict[str, tuple[Callable[[], object], int]] = {BASELINE: (lambda: exhaust(iter(pil)), count)}
    for resident, used in ((True, images), (False, few)):
        loader = ours(used, batch, cutout, resident=resident)
        name = "thriftnet ResidentLoader" if resident else "thriftnet ImageLoader"
        pipelines[name] = (partial(next_epoch, loader), len(used))
    spent: dict[str, list[float]] = {name: [] for name in pipelines}
    order = random.Random(0)
    for run, _ in pipelines.values():
        run()  # warm up
    for _ in range(rounds):
        for name in order.sample(list(pipelines), len(pipelines)):
            run, number = pipelines[name]
            spent[name].append(cpu_time(run) / number)
    return [
        {
            "augmentation": f"crop, flip{', cutout' if cutout else ''}",
            "pipeline": name,
            "images_per_second": round(1 / statistics.median(times)),
            "ratio": statistics.median(base / own for base, own in zip(spent[BASELINE], times, strict=True)),
        }
        for name, times in spent.items()
    ]


def random_images(count: int) -> ArrayImages:
    """In memory, as CIFAR is."""
    return ArrayImages(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10)


def ours(images: ArrayImages, batch: int, cutout: int, *, resident: bool) -> Loader:
    """One of our loaders with the baseline's augmentation."""
    augmentation = Augmentation(crop_padding=4, flip=True, cutout=cutout, mean=MEAN, std=STD)
    return make_loader(images, batch, augmentation=augmentation, train=True, resident=resident)


def next_epoch(loader: Loader) -> None:
    """A pass over the next epoch."""
    loader.set_epoch(loader.epoch + 1)
    exhaust(iter(loader))


def exhaust(batches: Iterator[object]) -> None:
    """Take all batches."""
    for _ in batches:
        pass


def cpu_time(run: Callable[[], object]) -> float:
    """Seconds of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
