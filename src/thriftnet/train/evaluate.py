"""Evaluation of a classifier: top-k accuracy, loss, per-class accuracy and confusion matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, checked
from thriftnet.core.processes import failing_together, largest, total
from thriftnet.core.width import eval_mode
from thriftnet.data.loaders import Batch, Loader
from thriftnet.errors import ConfigError, DataError, IncompatibleModelError


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`, over all processes.

    Args:
        accuracies: k -> top-k accuracy, in percent; 100 with k classes or fewer.
        loss: Mean cross entropy.
        images: Number of images.
        seconds: Of the slowest process, loading included.
        per_class: Per-class accuracy, in percent; None for a class without images.
        classes: Names of the classes.
        confusion: Images of each class (rows) predicted as each class (columns), without those for which the network gives NaN; None
            unless asked for.
    """

    accuracies: dict[int, float]
    loss: float
    images: int
    seconds: float
    per_class: tuple[float | None, ...]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None

    @property
    def top1(self) -> float:
        """Accuracy, in percent."""
        return self.accuracies[1]

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy, in percent; None if not asked for."""
        return self.accuracies.get(5)

    @property
    def images_per_second(self) -> float:
        """Over all processes."""
        return self.images / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready dict; accuracies in percent, a loss that is NaN as None."""
        result: dict[str, Any] = {f"top{k}": accuracy for k, accuracy in self.accuracies.items()}
        result |= {
            "loss": self.loss if self.loss == self.loss else None,
            "images": self.images,
            "images_per_second": round(self.images_per_second, 1),
            "per_class": dict(zip(self.classes, self.per_class, strict=True)),
        }
        if self.confusion is not None:
            result["confusion"] = [list(row) for row in self.confusion]
        return result


@checked
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    topk: Sequence[Classes] = (1, 5),
    confusion: bool = False,
    classes: Sequence[str] | None = None,
    on_batch: Callable[[int], None] = lambda seen: None,
) -> Evaluation:
    """Evaluate a network on labelled images; its modes are restored afterwards.

    Under ``torch.distributed`` each process evaluates its part of the images, and all return the result for all images. The
    parts may differ in size. An error of one process, as an image that it cannot read, is raised on all.

    Args:
        model: Gives logits (B, classes); on the loader's device.
        loader: Batches of ``(images, labels)``.
        topk: The k of top-k accuracies; 1 is always included.
        confusion: Whether to count the confusion matrix.
        classes: Names of the data's classes; left out, their numbers.
        on_batch: Called after each batch with the number of images that this process has seen.

    Raises:
        ConfigError: A k below 1, or two classes of the same name.
        IncompatibleModelError: Outputs that are not logits, or not one for each class of the data.
        DataError: No images, batches that are not images and labels, or a label outside the network's classes.
    """
    if not topk or min(topk) < 1:
        raise ConfigError(f"topk={tuple(topk)}: expected integers >= 1, as (1, 5)")
    if classes is not None and len(set(classes)) < len(classes):
        raise ConfigError(f"classes={tuple(classes)!r}: two have the same name, and results are listed by name")
    # the wrapper of distributed training shares buffers in each forward, and waits for processes that have no batch left
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    start = time.perf_counter()
    counts = _Counts(sorted({1, *topk}), confusion, None if classes is None else len(classes), _device(network, loader))
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    with failing_together(), torch.no_grad(), eval_mode(network):
        for batch in loader:
            images, labels = _checked(batch)
            counts.add(network(images.to(dtype)), labels)
            on_batch(counts.seen)
    return counts.result(classes, time.perf_counter() - start)


def _device(network: nn.Module, loader: Iterable[Batch]) -> torch.device:
    """The device to count on; a process without images needs the same kind as the others."""
    if isinstance(loader, Loader):
        return loader.device
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _checked(batch: Any) -> Batch:
    """Images, and int64 labels, one for each."""
    pair = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise DataError(f"a batch is ({kinds}): expected (images, labels), two tensors")
    images, labels = pair
    if labels.dim() != 1 or len(labels) != len(images) or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels {labels.dtype} {tuple(labels.shape)} for images {tuple(images.shape)}: expected an integer for each image, its class"
        )
    return images, labels.long()


class _Counts:
    """Sums over images, kept on the device until the end."""

    def __init__(self, ks: list[int], confusion: bool, classes: int | None, device: torch.device) -> None:
        self.ks, self.confusion, self.classes, self.device = ks, confusion, classes, device
        self.seen = 0
        self.outputs = 0
        precise = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.loss = torch.zeros((), dtype=precise, device=device)
        self.right = torch.zeros(len(ks), dtype=torch.int64, device=device)
        self.by_class = torch.zeros(0, dtype=torch.int64, device=device)  # images of each class that are wrong, and right
        self.pairs = torch.zeros(0, dtype=torch.int64, device=device)  # of class and prediction
        self.extremes = torch.full((2,), -1, dtype=torch.int64, device=device)  # the highest label, and minus the lowest

    def add(self, logits: Tensor, labels: Tensor) -> None:
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
            got = f"outputs {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise IncompatibleModelError(
                f"the network gives {got} for {len(labels)} images; expected one row of logits for each"
            )
        self._open(logits.shape[1])
        if not len(labels):
            return
        labels = labels.to(logits.device)
        self.extremes = torch.maximum(self.extremes, torch.stack([labels.max(), -labels.min()]))
        labels = labels.clamp(0, self.outputs - 1)  # one outside raises at the end: no synchronisation per batch
        logits = logits if logits.dtype == torch.float64 else logits.float()
        self.loss += F.cross_entropy(logits, labels, reduction="sum").to(self.loss.dtype)
        best = logits.topk(min(self.ks[-1], self.outputs), dim=1).indices
        numbers = ~logits.isnan().any(1)
        found = (best == labels[:, None]) & numbers[:, None]
        self.right += torch.stack([found[:, :k].sum() for k in self.ks])
        self.by_class += torch.bincount(2 * labels + found[:, 0], minlength=len(self.by_class))
        if self.confusion:
            pairs = labels * self.outputs + best[:, 0]
            self.pairs += torch.bincount(pairs[numbers], minlength=len(self.pairs))
        self.seen += len(labels)

    def _open(self, outputs: int) -> None:
        """Allocate the counts for a number of classes."""
        if self.outputs == outputs:
            return
        if self.classes is not None and outputs != self.classes:
            raise IncompatibleModelError(
                f"the network has {outputs} classes, the data has {self.classes}: evaluate on the data that it was "
                "trained for, or build it with num_classes"
            )
        if self.outputs:
            raise IncompatibleModelError(
                f"the network gives {self.outputs} outputs for some images and {outputs} for others"
            )
        self.outputs = outputs
        self.by_class = torch.zeros(2 * outputs, dtype=torch.int64, device=self.device)
        self.pairs = torch.zeros(outputs**2 if self.confusion else 0, dtype=torch.int64, device=self.device)

    def result(self, names: Sequence[str] | None, seconds: float) -> Evaluation:
        """Sums over processes, checked, as the evaluation."""
        outputs = int(largest(torch.tensor(self.outputs, device=self.device)))
        if not self.outputs:  # this process had no images
            self._open(outputs)
        self.loss, self.right = total(self.loss), total(self.right)
        self.by_class, self.pairs = total(self.by_class), total(self.pairs)
        self.seen = int(total(torch.tensor(self.seen, device=self.device)))
        if self.seen == 0:
            raise DataError("there are no images to evaluate on")
        highest, lowest = (largest(self.extremes) * torch.tensor([1, -1], device=self.device)).tolist()
        if lowest < 0 or highest >= self.outputs:
            raise DataError(
                f"an image has the label {lowest if lowest < 0 else highest}, the network has {self.outputs} classes "
                f"(0 to {self.outputs - 1}): evaluate on the data that it was trained for"
            )
        seconds = float(largest(torch.tensor(seconds, device=self.device)))
        by_class = self.by_class.view(-1, 2).cpu()
        shares = zip(by_class[:, 1].tolist(), by_class.sum(1).tolist(), strict=True)
        return Evaluation(
            accuracies={k: 100 * count / self.seen for k, count in zip(self.ks, self.right.tolist(), strict=True)},
            loss=float(self.loss) / self.seen,
            images=self.seen,
            seconds=max(seconds, 1e-9),
            per_class=tuple(100 * count / total if total else None for count, total in shares),
            classes=tuple(names) if names is not None else tuple(map(str, range(self.outputs))),
            confusion=tuple(map(tuple, self.pairs.view(self.outputs, -1).tolist())) if self.confusion else None,
        )
