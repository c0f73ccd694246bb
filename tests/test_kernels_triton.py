"""The Triton kernels: by Triton's interpreter everywhere, on a GPU where there is one. Each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "triton_cases.py"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(device: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, str(SCRIPT), device], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_the_kernels_hold_in_the_interpreter() -> None:
    assert "12 cases hold on cpu" in run("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_the_kernels_hold_on_a_gpu() -> None:
    assert "12 cases hold on cuda" in run("cuda")
