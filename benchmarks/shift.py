"""How long the shift takes, forward and backward, against other ways to write it.

Every form is first checked to give the same output and gradient. Then all forms run once per round, in an order drawn
anew for each round (what ran before a form decides how much memory it finds warm), in one process on one thread. A ratio
is the median over the rounds of (time of the form / time of two tensor copies of the same layout in that round). Two
copies are the floor: forward and backward each read and write the tensor once. Times are CPU times of this process. Trust
the ratios; absolute times depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftnet.kernels.shift import moved_channels, offsets, one_hot, shift
from thriftnet.text import table

KERNEL_SIZE = 3
FLOOR = "two copies"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

Form = Callable[[Tensor], Tensor]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (options.batch, options.channels, options.size, options.size)
    results = [row for layout in LAYOUTS for row in measure(shape, layout, options.rounds)]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), "shape": shape, "results": results}))
        return
    print(f"shift 3 x 3, forward + backward, {shape} float32, 1 thread, {options.rounds} rounds, torch {torch.__version__}")
    print()
    print(table(["layout", "form", "ms (median)", "/ two copies"], [list(row.values()) for row in results]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the shift against other ways to write it.")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=144)
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if min(options.batch, options.channels, options.size, options.rounds) < 1:
        parser.error("--batch, --channels, --size and --rounds must be at least 1")
    return options


def measure(shape: tuple[int, int, int, int], layout: str, rounds: int) -> list[dict[str, str | float]]:
    """One row per form, in this layout."""
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    grad = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    forms = make_forms(shape[1])
    check_equal(forms, x, grad)
    runs: dict[str, Callable[[], object]] = {FLOOR: lambda: (x.detach().clone(), grad.clone())}
    runs |= {name: partial(forward_backward, form, x, grad) for name, form in forms.items()}
    for run in runs.values():
        run()  # warm up
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(cpu_time(runs[name]))
    return [
        {
            "layout": layout,
            "form": name,
            "ms": 1e3 * statistics.median(spent),
            "ratio": statistics.median(t / floor for t, floor in zip(spent, times[FLOOR], strict=True)),
        }
        for name, spent in times.items()
    ]


def make_forms(channels: int) -> dict[str, Form]:
    """The library's shift, and what one would write without it."""
    kernel = one_hot(channels, KERNEL_SIZE)
    moved = moved_channels(channels, KERNEL_SIZE)
    return {
        "thriftnet": lambda x: shift(x, kernel, KERNEL_SIZE, 1, moved),
        "one-hot depthwise convolution": lambda x: F.conv2d(x, kernel, padding=KERNEL_SIZE // 2, groups=channels),
        "slices per channel": slices_per_channel,
    }


def slices_per_channel(x: Tensor) -> Tensor:
    """One slice assignment per channel, differentiated by autograd."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    for channel, (dh, dw) in enumerate(offsets(x.shape[1], KERNEL_SIZE)):
        top, bottom = max(0, -dh), min(height, height - dh)
        left, right = max(0, -dw), min(width, width - dw)
        out[:, channel, top:bottom, left:right] = x[:, channel, top + dh : bottom + dh, left + dw : right + dw]
    return out


def forward_backward(form: Form, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient with respect to the input."""
    out = form(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def check_equal(forms: dict[str, Form], x: Tensor, grad: Tensor) -> None:
    """Stop unless all forms give the same numbers."""
    wanted = forward_backward(slices_per_channel, x, grad)
    for name, form in forms.items():
        for got, want, what in zip(forward_backward(form, x, grad), wanted, ("output", "gradient"), strict=True):
            if not torch.equal(got, want):
                raise SystemExit(f"{name}: the {what} differs by up to {(got - want).abs().max():.2e}; nothing was timed")


def cpu_time(run: Callable[[], object]) -> float:
    """Seconds of CPU time for one call; its result is freed within."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
