"""What is fast, measured: every technique against its floor and against what one would write without it.

A topic is a module with a function ``cases(settings)`` that yields `Case` and `Fact`. It is imported when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from thriftnet.errors import unknown_name

if TYPE_CHECKING:
    from benchmarks.measuring import Case, Fact, Settings

TOPICS = {
    "shift": "benchmarks.shift",
    "soft-sharing": "benchmarks.soft_sharing",
    "filter-basis": "benchmarks.filter_basis",
    "weight-sharing": "benchmarks.weight_sharing",
    "slimmable": "benchmarks.slimmable",
    "data": "benchmarks.data",
    "train": "benchmarks.train",
    "deploy": "benchmarks.deploy",
}


def cases(topic: str, settings: Settings) -> Iterator[Case | Fact]:
    """What a topic measures, one after the other, so that only one case is in memory.

    Raises:
        ConfigError: There is no such topic.
    """
    if topic not in TOPICS:
        raise unknown_name("topic", topic, TOPICS)
    found: Iterator[Case | Fact] = importlib.import_module(TOPICS[topic]).cases(settings)
    return found
