"""The networks of timm and torchvision that are tried: the smallest of every family.

A family is what has a file of its own and a common first word in its name: ``timm.models.resnet`` has resnet, seresnet, resnext and
others. `choose` builds all of them on the meta device and writes the smallest into ``networks.txt``, which is what is tried.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compat.sample import Inputs, Sample
from thriftnet.core import probe

LISTED = Path(__file__).with_name("networks.txt")
LARGEST = 320  # side of images for networks that state none, and do not run on 224
LIMIT = 90_000_000  # parameters; larger ones take too long
SIDES = (64, 96, 128, 160, 192, 224, 240, 256)  # sides of images to try: the smallest that runs is the quickest
VIDEOS = {  # videos, channels, frames, height and width by what a name begins with: the quickest that runs
    "mc3": (2, 3, 8, 32, 32),
    "r3d": (2, 3, 8, 32, 32),
    "r2plus1d": (2, 3, 8, 32, 32),
    "s3d": (1, 3, 14, 224, 224),
    "mvit": (1, 3, 16, 224, 224),
    "swin3d": (2, 3, 4, 32, 32),
}


def samples() -> list[Sample]:
    """What `choose` chose."""
    names = [line.split()[0] for line in LISTED.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return [Sample(name, partial(_sample, name), kind=name.partition(":")[0]) for name in names]


def _sample(name: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = build(name)
    return model, inputs(name, model)


def build(name: str) -> nn.Module:
    """A network by its name in the list, with random weights."""
    library, _, name = name.partition(":")
    if library == "timm":
        import timm

        return timm.create_model(name)  # type: ignore[no-any-return]
    from torchvision import models

    name, _, body = name.partition("/")
    kwargs: dict[str, Any] = {} if "weights_backbone" not in _arguments(name) else {"weights_backbone": None}
    model: nn.Module = models.get_model(name, weights=None, **kwargs)
    return model.get_submodule(body) if body else model


def _arguments(name: str) -> Any:
    import inspect

    from torchvision import models

    return inspect.signature(models.get_model_builder(name)).parameters


def inputs(name: str, model: nn.Module) -> Inputs:
    """Two inputs of the smallest size that a network takes."""
    if name.startswith("torchvision:"):
        for beginning, size in VIDEOS.items():
            if name.startswith(f"torchvision:{beginning}"):
                return (torch.randn(size),), {}
        if "raft" in name:
            return (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)), {"num_flow_updates": 2}
    return (torch.randn(2, *image_size(model)),), {}


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """The smallest size of images that a network takes."""
    config: Any = getattr(model, "pretrained_cfg", {})
    stated = tuple(config.get("input_size", (3, 224, 224)))
    ghost = probe.on_meta(model)
    smaller = [(stated[0], side, side) for side in SIDES if side < stated[-1]]
    for channels, height, width in (*smaller, stated, (stated[0], LARGEST, LARGEST)):
        size = (int(channels), int(height), int(width))
        if probe.failure(ghost, size) is None:
            return size
    return int(stated[0]), int(stated[1]), int(stated[2])


# -- choosing


def choose() -> None:
    """Write the list anew."""
    families: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for library, family, name, make in (*_timm(), *_torchvision()):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in make().parameters())
        except Exception as error:  # it computes with numbers while it is built
            print(f"{name}: {type(error).__name__} on the meta device, built on the CPU", file=sys.stderr)
            size = sum(parameter.numel() for parameter in make().parameters())
        families[(library, *family)].append((size, name))
    smallest = {family: min(found) for family, found in sorted(families.items())}
    lines = [f"{name} {size / 1e6:.1f}M" for size, name in smallest.values() if size <= LIMIT]
    left = [f"# {name} {size / 1e6:.0f}M" for size, name in smallest.values() if size > LIMIT]
    head = "# The smallest network of every family; written by `python -m compat --choose`."
    tail = f"# Left out, as the smallest of the family has more than {LIMIT / 1e6:.0f} million parameters:"
    LISTED.write_text("\n".join([head, *lines, tail, *left]) + "\n", encoding="utf-8")


Found = Iterator[tuple[str, tuple[str, ...], str, Callable[[], nn.Module]]]


def _timm() -> Found:
    import timm

    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            family = re.match("[a-z]+", name)
            if family and family[0] != "test":
                yield "timm", (module, family[0]), f"timm:{name}", partial(build, f"timm:{name}")


BODIES = {"detection": "/backbone"}  # boxes of random weights say nothing


def _torchvision() -> Found:
    from torchvision import models

    for name in models.list_models():
        module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if module.startswith("quantization"):
            continue
        family = re.match("[a-z]+", name)
        whole = f"torchvision:{name}{BODIES.get(module.partition('.')[0], '')}"
        yield "torchvision", (module, family[0] if family else name), whole, partial(build, whole)


def first_tensor(inputs: Inputs) -> Tensor:
    """The first tensor that a network is fed."""
    return next(value for value in (*inputs[0], *inputs[1].values()) if isinstance(value, Tensor))
