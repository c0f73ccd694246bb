"""The base of what thriftnet puts into networks."""

from __future__ import annotations

from torch import nn


class ThriftyModule(nn.Module):
    """Base of all modules that converted networks have and plain ones lack.

    The verbs look for ``fold``, ``penalty_term``, ``no_decay``, ``dense_params``, ``moved_bytes`` and ``kernel_choice`` on these only: a
    module of the user's may have methods of the same names.
    """

    kept: tuple[str, ...] = ()  # attributes of the layer that it replaced, which the folded one gets in turn
