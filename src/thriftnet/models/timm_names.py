"""The zoo under timm's `create_model`, for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from thriftnet.errors import ConfigError
from thriftnet.models import MODELS, create_model

__all__: list[str] = []  # timm's registry appends what it registers from here

TIMM_ONLY = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable")


def register_timm() -> list[str]:
    """Make the zoo's networks known to ``timm.create_model``; names that timm has already keep timm's meaning.

    Returns:
        The names registered, by this or an earlier call.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        import timm
        from timm.models import register_model
    except ImportError:
        raise ConfigError("timm is not installed: pip install 'thriftnet[train]'") from None
    for name in MODELS:
        if name not in __all__ and not timm.is_model(name):
            register_model(_entrypoint(name))
    return [name for name in MODELS if name in __all__]


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ConfigError(f"{name} has no pretrained weights here: load a saved folder with thriftnet.load")
        return create_model(name, **{key: value for key, value in kwargs.items() if key not in TIMM_ONLY})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} of thriftnet's zoo."
    return build
