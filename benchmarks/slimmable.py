"""How long a network that chooses its width takes, against computing everything and masking.

The network is DS-Net's supernet with a gate over the sub-networks 0, 4, 9 and 13; decisions are forced, alike in all forms. Every
form is first checked to give the same output per image. Then all forms run once per round, in an order drawn anew for each round,
in one process on one thread. A ratio is the median over the rounds of the ratio within a round. Times are CPU times of this
process. Trust the ratios; absolute times depend on the machine and on what else it does.

The allocator matters: large temporaries are given back to the system and faulted in again unless `--keep-memory` tells glibc
not to. Both sides of a ratio always run with the same.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from baselines import MaskedNetwork
from torch import Tensor

from thriftnet.models import create_model
from thriftnet.models.dynamic import DynamicNetwork
from thriftnet.text import table

CHOICES = (0, 4, 9, 13)  # sub-networks of 132, 225, 391 and 564 million multiply-accumulates
TOLERANCE = 1e-5  # of the largest output, float32

# (what, numerator, denominator, which way is better, target)
RATIOS = (
    ("P5 mixed decisions: masking / grouped", "masking, mixed", "grouped, mixed", ">=", 7.0),
    ("P5b batch 1: masking / smallest", "masking, one", "smallest, one", ">=", 8.0),
    ("largest / smallest, batch 1", "largest, one", "smallest, one", ">=", 2.2),
    ("largest / smallest, batch", "largest", "smallest", ">=", 2.2),
    ("grouping: mixed / mean of its members", "grouped, mixed", "members", "<=", 1.05),
)

Run = Callable[[], Tensor]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept = keep_memory() if options.keep_memory else False
    runs = make_runs(options.batch, options.size, options.compile)
    times = measure(runs, options.rounds)
    times["members"] = [statistics.mean(each) for each in zip(*(times[member(k)] for k in range(len(CHOICES))), strict=True)]
    rows = [
        {
            "ratio": what,
            "value": statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)),
            "target": f"{way} {t:g}",
        }
        for what, one, other, way, t in RATIOS
    ]
    medians = {name: 1e3 * statistics.median(spent) for name, spent in times.items()}
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "batch": options.batch,
        "keep_memory": kept,
        "compile": options.compile,
    }
    if options.json:
        print(json.dumps(facts | {"rounds": options.rounds, "ratios": rows, "ms": medians}))
        return
    memory, form = "kept" if kept else "given back", "compiled" if options.compile else "eager"
    print(f"slimmable_mobilenetv1, {options.size} px, batch {options.batch}, {form}, 1 thread, memory {memory}\n")
    print(table(["ratio", "value", "target"], [[row["ratio"], f"{row['value']:.2f}", row["target"]] for row in rows]))
    print()
    print(table(["form", "ms (median)"], [[name, f"{spent:.1f}"] for name, spent in medians.items()]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a gated network against masking.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc to keep freed memory (Linux)")
    parser.add_argument("--compile", action="store_true", help="compile front and tails")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if min(options.batch, options.rounds) < 1 or options.size < 32:
        parser.error("--batch and --rounds must be at least 1, --size at least 32")
    return options


def keep_memory() -> bool:
    """Large blocks come from the heap, and the heap is not trimmed; whether that was possible."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return bool(hasattr(libc, "mallopt") and libc.mallopt(-4, 0) and libc.mallopt(-1, -1))  # M_MMAP_MAX, M_TRIM_THRESHOLD


def member(place: int) -> str:
    """What the whole batch at one width is called."""
    return {0: "smallest", len(CHOICES) - 1: "largest"}.get(place, f"sub-network {CHOICES[place]}")


def make_runs(batch: int, size: int, compile: bool) -> dict[str, Run]:
    """All forms, checked to give equal outputs."""
    model = create_model("slimmable_mobilenetv1", gate_choices=CHOICES).eval()
    masking = MaskedNetwork(model).eval()
    dynamic = DynamicNetwork(model, input_size=(3, size, size), compile=compile).eval().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size)
    one = images[:1].clone()
    mixed = torch.arange(batch) % len(CHOICES)
    rows = F.one_hot(mixed, len(CHOICES)).float()
    ours, its = images.contiguous(memory_format=torch.channels_last), one.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Run] = {
        "masking, mixed": partial(masking, images, rows),
        "grouped, mixed": partial(dynamic.forced, ours, mixed),
        "masking, one": partial(masking, one, rows[:1]),
        "smallest, one": partial(dynamic.forced, its, torch.zeros(1, dtype=torch.int64)),
        "largest, one": partial(dynamic.forced, its, torch.tensor([len(CHOICES) - 1])),
    }
    for place in range(len(CHOICES)):
        runs[member(place)] = partial(dynamic.forced, ours, torch.full((batch,), place))
    check_equal(runs["masking, mixed"], runs["grouped, mixed"])
    check_equal(runs["masking, one"], runs["smallest, one"])
    return runs


@torch.no_grad()
def check_equal(one: Run, other: Run) -> None:
    """Stop unless both give the same output for every image."""
    wanted, got = one(), other()
    error = ((got - wanted).abs().amax(1) / wanted.abs().amax(1)).max().item()
    if error > TOLERANCE:
        raise SystemExit(f"the outputs differ by {error:.1e} of their size; nothing was timed")


@torch.no_grad()
def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of every form in every round; forms for one image run five times in each, and the median counts."""
    for run in runs.values():
        run()  # warm up
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            repeats = 5 if name.endswith("one") else 1
            times[name].append(statistics.median(cpu_time(runs[name]) for _ in range(repeats)))
    return times


def cpu_time(run: Run) -> float:
    """Seconds of CPU time for one call; its result is freed within."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
