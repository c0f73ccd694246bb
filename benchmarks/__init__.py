"""What checks the project's targets: every technique against its floor and against what one would write without it. Not in the wheel.

    python -m benchmarks [TOPIC ...] [--check]   times the topics; `make bench`
    python -m benchmarks.page                    runs all of them with both allocators, writes docs/performance.md; `make performance`
    python -m benchmarks.gpu results.json        checks and times what runs differently on a GPU
    python -m benchmarks.gates                   accuracy of gates against fixed widths, writes docs/results/gates.md
    python -m benchmarks.twins                   accuracy of every width against its own network, writes docs/results/slimmable-twins.md

Topics, one file each, with a function ``cases(settings)`` that yields `Case` and `Fact`:
    shift, soft_sharing, filter_basis, weight_sharing, slimmable, data, train, deploy

What they share:
    measuring   cases, targets, and timing variants against each other
    report      results as rows, JSON and pictures
    networks    training steps and forwards
    baselines   what one writes without this library
    masked      the dynamic mode of DS-Net's authors
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measuring import Case, Fact, Settings

TOPICS = ("shift", "soft-sharing", "filter-basis", "weight-sharing", "slimmable", "data", "train", "deploy")


def cases(topic: str, settings: Settings) -> Iterator[Case | Fact]:
    """What one of `TOPICS` measures, one after the other, so that only one case is in memory."""
    found: Iterator[Case | Fact] = importlib.import_module(f"benchmarks.{topic.replace('-', '_')}").cases(settings)
    return found
