"""Networks by name: the zoo, timm, torchvision, or your own code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn

from thriftnet.core.provenance import add_data_facts
from thriftnet.errors import ConfigError, ThriftnetError, first_line, unknown_name
from thriftnet.models import create_model
from thriftnet.models.table import IDENTITY

FETCHING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights_backbone")


def build(source: str, kwargs: dict[str, Any], *, trusted: bool) -> nn.Module:
    """The network that ``source`` names, remembering how it was made.

    Args:
        source: A name of the zoo, ``timm:NAME``, ``torchvision:NAME`` or ``package.module:callable``.
        kwargs: For the function that builds it.
        trusted: Whether ``source`` comes from the user and not from a file: only then is a callable run, and do arguments
            that fetch weights from elsewhere count.

    Raises:
        ConfigError: No such network, with close matches, or arguments that it refuses.
    """
    head, colon, name = source.partition(":")
    if not colon:
        return create_model(source, **kwargs)
    if not trusted:
        kwargs = {key: value for key, value in kwargs.items() if key not in FETCHING}
    if head == "timm":
        model = _timm(name, kwargs)
    elif head == "torchvision":
        model = _torchvision(name, kwargs)
    elif trusted:
        return _callable(head, name, kwargs)
    else:
        raise ConfigError(
            f"{source!r} names code, which a file cannot make us run: build the network and give it as model=..."
        )
    setattr(model, IDENTITY, {"name": source, "kwargs": kwargs})
    return model


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Names and arguments by which timm or torchvision may have built a network; neither is imported for others."""
    library, _, module = type(model).__module__.partition(".")
    if library == "timm":
        stated: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        kwargs = {"num_classes": getattr(model, "num_classes", None), "in_chans": _channels(model, stated.get("first_conv"))}
        if isinstance(stated.get("architecture"), str):
            known = {key: value for key, value in kwargs.items() if value is not None}
            yield {"name": f"timm:{stated['architecture']}", "kwargs": known}
    elif library == "torchvision" and module.startswith("models."):
        models = _imported("torchvision", "torchvision.models")
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        classes = layers and (layers[-1].out_features if isinstance(layers[-1], nn.Linear) else layers[-1].out_channels)
        for name in models.list_models():
            if models.get_model_builder(name).__module__ == type(model).__module__:
                yield {"name": f"torchvision:{name}", "kwargs": {"num_classes": classes or None}}


def _channels(model: nn.Module, first: object) -> int | None:
    """Input channels of the layer of that name."""
    try:
        channels = model.get_submodule(first).in_channels if isinstance(first, str) else None
    except AttributeError:
        return None
    return channels if isinstance(channels, int) else None


def _timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    timm = _imported("timm", "timm")
    if name.split(".")[0] not in timm.list_models():
        raise unknown_name("timm model", name, timm.list_models())
    return _built(f"timm:{name}", lambda: timm.create_model(name, **kwargs))


def _torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    models = _imported("torchvision", "torchvision.models")
    if name not in models.list_models():
        raise unknown_name("torchvision model", name, models.list_models())
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        kwargs = {"weights_backbone": None, **kwargs}  # torchvision's own default fetches weights
    model = _built(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **kwargs))
    for weights in islice(models.get_model_weights(name), 1):
        crop = getattr(weights.transforms(), "crop_size", ())
        if len(crop) == 1:  # classification of images; videos have two sides
            add_data_facts(model, {"input_size": (3, *crop, *crop)})
    return model


def _callable(module: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(
            f"cannot find {module}:{name} ({error}). Write it as package.module:callable, and have it on PYTHONPATH"
        ) from None
    return _built(f"{module}:{name}", lambda: function(**kwargs))


def _imported(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{package} is not installed: pip install 'thriftnet[train]'") from None


def _built(source: str, build: Callable[[], Any]) -> nn.Module:
    try:
        model = build()
    except TypeError as error:
        raise ConfigError(f"{source} refused its arguments: {error}") from None
    except ThriftnetError:
        raise
    except Exception as error:  # whatever code of others does
        raise ConfigError(f"{source} cannot be built: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{source} gave a {type(model).__name__}, not an nn.Module")
    return model
