"""The zoo: every network by name, as a plain backbone. `create_model` imports only the family it needs."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from thriftnet.arguments import checked
from thriftnet.core.history import HISTORY
from thriftnet.errors import unknown_name
from thriftnet.models.table import IDENTITY, MODELS, ModelEntry, builder, model_kwargs, zoo_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "ModelEntry", "create_model", "list_models", "model_kwargs", "zoo_name"]


@checked
def list_models(pattern: str = "*") -> list[str]:
    """Names in the zoo that match a shell pattern, sorted.

    Example:
        >>> list_models("wrn*")
        ['wrn', 'wrn16_4', 'wrn28_10', 'wrn40_2', 'wrn40_4']
    """
    return sorted(name for name in MODELS if fnmatch(name, pattern))


@checked
def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a network of the zoo.

    Args:
        name: One of `list_models()`, or an author's name that means only one of them (`thriftnet.models.table.zoo_name` says
            how); case, hyphens and underscores do not matter.
        kwargs: What the network's function takes, as ``num_classes`` (0 for none: pooled features) and ``in_chans``.

    Raises:
        ConfigError: Unknown name or kwarg, with close matches; a name of several networks; or a value that the network refuses.
    """
    name = zoo_name(name, kwargs=kwargs)
    entry, expected = MODELS[name], model_kwargs(name)
    for key in kwargs:
        if key not in expected:
            raise unknown_name(f"kwarg of {name}", key, expected)
    headless = type(kwargs.get("num_classes")) is int and kwargs["num_classes"] == 0
    given = {key: value for key, value in kwargs.items() if not (headless and key == "num_classes")}
    from thriftnet.core.allocation import build_within_memory

    model: Any = build_within_memory(lambda: builder(entry)(**{**entry.kwargs, **given}), name)
    if headless:
        model.reset_classifier(0)
    setattr(model, IDENTITY, {"name": name, "kwargs": kwargs})
    setattr(model, HISTORY, [])  # conversions so far are part of the network: what `load` replays comes on top of it
    built: nn.Module = model
    return built
