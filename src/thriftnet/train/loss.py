"""The loss: cross entropy with labels, smoothed or mixed, and the distance to a teacher's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from thriftnet.train.recipe import LossFields


class Criterion:
    """Cross entropy, and the distance to a teacher (in eval mode) where there is one."""

    def __init__(self, fields: LossFields, teacher: nn.Module | None = None) -> None:
        self.smoothing, self.temperature = fields.label_smoothing, fields.distill_temperature
        self.teacher, self.share = teacher, fields.distill_weight if teacher is not None else 0.0

    def __call__(self, outputs: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss, in float32 or wider; the teacher gets the images.

        Shape: logits (N, classes); labels (N,), or probabilities (N, classes) that are smoothed already.
        """
        outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        soft = None if self.teacher is None or not self.share else self._distance(self.teacher, outputs, images)
        if soft is not None and self.share == 1.0:  # labels are not looked at: there may be none
            return soft
        smoothing = self.smoothing if targets.ndim == 1 else 0.0
        loss = F.cross_entropy(
            outputs, targets.to(outputs.dtype) if targets.ndim == 2 else targets, label_smoothing=smoothing
        )
        return loss if soft is None else (1.0 - self.share) * loss + self.share * soft

    def _distance(self, teacher: nn.Module, outputs: Tensor, images: Tensor) -> Tensor:
        """From the teacher's outputs."""
        with torch.no_grad():
            wanted = teacher(images).to(outputs.dtype)
        return distillation(outputs, wanted, self.temperature)


def distillation(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened outputs, times the squared temperature.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    ours, theirs = F.log_softmax(outputs / temperature, 1), F.log_softmax(wanted / temperature, 1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def make_mixup(fields: LossFields, classes: int) -> Any:
    """timm's mixup and CutMix on batches, which also smooths the labels; None if the recipe has neither."""
    if not fields.mixup and not fields.cutmix:
        return None
    from timm.data.mixup import Mixup

    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=fields.mixup,
        cutmix_alpha=fields.cutmix,
        switch_prob=fields.mixup_switch,
        label_smoothing=fields.label_smoothing,
        num_classes=classes,
    )
