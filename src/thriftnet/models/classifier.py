"""What every network of the zoo offers beside `forward`, under the names that timm users expect."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from thriftnet.errors import ConfigError
from thriftnet.models.entry import IDENTITY


class Classifier(nn.Module):
    """A network with features, global average pooling and a linear head called ``fc``.

    Subclasses define `forward_features`: (N, C, H, W) images -> (N, D, h, w).
    """

    fc: nn.Module
    num_features: int
    num_classes: int
    default_cfg: dict[str, Any]

    def forward_features(self, x: Tensor) -> Tensor:
        """The maps before pooling."""
        raise TypeError(f"{type(self).__name__} defines no forward_features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the maps, and classify them unless ``pre_logits``."""
        pooled = x.mean((2, 3))
        if pre_logits:
            return pooled
        logits: Tensor = self.fc(pooled)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        channels = self.default_cfg["input_size"][0]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ConfigError(
                f"layer {self.default_cfg['first_conv']!r} of {type(self).__name__} reads images (N, {channels}, H, W), "
                f"got {tuple(x.shape)}. Build the network with in_chans=..., or give images with {channels} channels"
            )
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for this many classes; 0 removes it."""
        like = next(self.parameters())
        self.num_classes = check_classes(num_classes, least=0)
        head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        self.fc = head.train(self.training)
        identity = getattr(self, IDENTITY, None)
        if identity is not None:
            setattr(self, IDENTITY, {**identity, "kwargs": {**identity["kwargs"], "num_classes": num_classes}})


def check_classes(num_classes: object, least: int = 1) -> int:
    """``num_classes`` when it is a whole number of at least ``least``."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < least:
        raise ConfigError(f"num_classes={num_classes!r}: possible is a whole number of at least {least}")
    return num_classes


def config(input_size: tuple[int, int, int], num_classes: int, first_conv: str, classifier: str) -> dict[str, Any]:
    """A network's ``default_cfg``."""
    return {
        "input_size": input_size,
        "num_classes": num_classes,
        "first_conv": first_conv,
        "classifier": classifier,
        "pool_size": None,
        "interpolation": "bilinear",
    }
