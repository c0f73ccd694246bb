"""A paper's network is a plain backbone and a technique's config, never a second copy of the backbone."""

from __future__ import annotations

from torch import nn

from thriftnet.core.convert import convert
from thriftnet.core.history import HISTORY
from thriftnet.core.sites import Select
from thriftnet.core.technique import Technique


def apply_technique(backbone: nn.Module, technique: Technique, *, select: Select | None = None) -> nn.Module:
    """A network of the zoo: ``backbone``, converted in place by ``technique``.

    Its history ends empty, because `create_model` repeats the conversion: what `load` replays comes on top of it.

    Args:
        backbone: A plain network; it is changed.
        technique: A technique's config.
        select: Which layers, as in `convert`.

    Raises:
        ConfigError, IncompatibleModelError: As `convert`.
    """
    model = convert(backbone, technique, select=select, inplace=True)
    setattr(model, HISTORY, [])
    return model
