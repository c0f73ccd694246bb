"""Check and time everything that runs differently on a GPU, in one command of under ten minutes; leaves JSON.

    python -m benchmarks.gpu results.json

First the Triton kernels are held against loops; then each variant is timed between events, in random order in every
round. Large maps do not fit into a GPU's cache, small ones do: both are there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import with_original_mixing
from benchmarks.measuring import Case, Ratio, Settings, Target, measure
from benchmarks.networks import batch, forward_backward, trained_step
from benchmarks.report import Results, conditions
from thriftnet.kernels import force
from thriftnet.kernels.shift import moved_channels
from thriftnet.kernels.triton_pointwise import shift_pointwise
from thriftnet.models import create_model
from thriftnet.techniques.filter_basis import FilterBasis
from thriftnet.techniques.shift import Shift2d
from thriftnet.text import table

P1G = Target("P1g", "shift forward + backward against two copies", 1.15)
P1G_FUSED = Target("P1g", "fused shift + 1 x 1 convolution against the plain 1 x 1", 1.15)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = ((128, 144, 32, 32), (128, 128, 56, 56), (64, 64, 8, 8))
CHECKS = Path(__file__).parent.parent / "tests" / "triton_cases.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="where the JSON goes")
    output = Path(parser.parse_args().output)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is at hand: this benchmark needs one")
    checked = subprocess.run(
        [sys.executable, str(CHECKS), "cuda"],
        env={**os.environ, "PYTHONPATH": str(CHECKS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode:
        raise SystemExit(f"the kernels are wrong; nothing was timed\n{checked.stderr[-3000:]}")
    settings = Settings(device="cuda")
    notes = conditions("CUDA caching allocator", quick=False)
    notes |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "date": f"{datetime.date.today()}"}
    results = Results(notes, fast_malloc=False)
    for case in cases():
        results.measured.append(measure(case, settings))
        output.write_text(json.dumps(results.to_dict(), indent=1))
    rows = [[row.case, row.what, f"{row.value:.3g}", row.quartiles, row.bound, row.verdict] for row in results.rows()]
    print(checked.stdout.strip())
    print(table(["case", "ratio", "value", "quartiles", "target", ""], rows))


def cases() -> Iterator[Case]:
    """One after the other, so that only one is in memory."""
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            for layout in LAYOUTS:
                yield shift_case(shape, layout, dtype)
        for stride in (1, 2):
            yield pointwise_case((128, 128, 56, 56), 128, stride, dtype)
            yield pointwise_case((128, 144, 32, 32), 16, stride, dtype)
    yield shift_network_case()
    yield soft_network_case()
    yield basis_network_case()


def tensors(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output."""
    x, grad = (torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    return x.requires_grad_(), grad


def shift_case(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Case:
    x, grad = tensors(shape, layout, dtype)
    layer = Shift2d(shape[1]).cuda()

    def variant(name: str) -> Callable[[Tensor], Tensor]:
        def run(given: Tensor) -> Tensor:
            with force(shift=name):
                return layer(given)

        return run

    variants = {"two copies": lambda: (x.detach().clone(), grad.clone())}
    variants |= {name: forward_backward(variant(name), x, grad) for name in ("triton", "depthwise", "planes")}
    target = P1G if x.numel() * x.element_size() > 2**24 else None  # of small maps a launch is all that there is to time
    ratios = [Ratio(name, "two copies", target if name == "triton" else None) for name in ("triton", "depthwise", "planes")]
    return Case(
        "shift", f"shift forward + backward, {shape}, {layout}, {dtype}", variants, ratios, 15, frozenset({"two copies"})
    )


def pointwise_case(shape: tuple[int, int, int, int], outs: int, stride: int, dtype: torch.dtype) -> Case:
    x, _ = tensors(shape, "channels_last", dtype)
    weight = torch.randn(outs, shape[1], 1, 1, device="cuda", dtype=dtype) / shape[1] ** 0.5
    layer, moved = Shift2d(shape[1]).cuda(), moved_channels(shape[1], 3)
    given = x.detach()
    variants = {
        "plain 1 x 1": lambda: F.conv2d(given, weight, stride=stride),
        "fused": lambda: shift_pointwise(given, weight, 3, 1, moved, stride),
        "shift, then 1 x 1": lambda: F.conv2d(layer(given), weight, stride=stride),
    }
    ratios = [Ratio("fused", "plain 1 x 1", P1G_FUSED), Ratio("shift, then 1 x 1", "plain 1 x 1")]
    name = f"shift + 1 x 1, {shape} to {outs}, stride {stride}, {dtype}"
    return Case("shift", name, variants, ratios, 15, frozenset({"plain 1 x 1"}), tolerance=0.02)


def shift_network_case() -> Case:
    x, labels = batch(128, 32, device="cuda")
    last = x.contiguous(memory_format=torch.channels_last)
    model = create_model("shiftresnet20").cuda().train().to(memory_format=torch.channels_last)

    def step(variant: str) -> Callable[[], Tensor]:
        run = trained_step(copy.deepcopy(model), last, labels, autocast=torch.bfloat16)

        def forced_step() -> Tensor:
            with force(shift=variant):
                return run()

        return forced_step

    variants = {name: step(name) for name in ("triton", "fused", "depthwise")}
    ratios = [Ratio("depthwise", "triton"), Ratio("depthwise", "fused")]
    return Case("shift", "ShiftResNet20 training step, batch 128, bf16", variants, ratios, 15, tolerance=0.05)


def soft_network_case() -> Case:
    x, labels = batch(32, 32, device="cuda")
    plain, ours = (create_model(name).cuda().train() for name in ("wrn28_10", "swrn28_10_6"))
    variants = {
        "plain": trained_step(plain, x, labels),
        "thriftnet": trained_step(ours, x, labels),
        "original": trained_step(with_original_mixing(copy.deepcopy(ours)), x, labels),
    }
    ratios = [Ratio("thriftnet", "plain"), Ratio("original", "plain")]
    name = "SWRN-28-10-6 training step, batch 32"
    return Case("soft-sharing", name, variants, ratios, 9, frozenset({"plain"}), tolerance=0.01)


def basis_network_case() -> Case:
    x, labels = batch(128, 32, device="cuda")
    import thriftnet

    plain = create_model("resnet56")
    ours = thriftnet.convert(plain, FilterBasis(shared_rank=16, rank_channels=16, bases=2, init="random"))
    networks: dict[str, nn.Module] = {"plain": plain.cuda().train(), "thriftnet": ours.cuda().train()}
    variants = {name: trained_step(network, x, labels) for name, network in networks.items()}
    name = "ResNet-56 with bases, training step, batch 128"
    return Case("filter-basis", name, variants, [Ratio("thriftnet", "plain")], 9, frozenset({"plain"}))


if __name__ == "__main__":
    main()
