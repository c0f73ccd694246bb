"""The Triton kernels: by Triton's interpreter everywhere, on a GPU where there is one. Each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, script: str = "triton_cases.py", **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_the_kernels_hold_in_the_interpreter() -> None:
    assert "8 cases hold on cpu" in run("cpu", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA GPUs comes with its Linux packages")
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    assert "15 kernels compile" in run(script="triton_compiles.py", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_the_kernels_hold_on_a_gpu() -> None:
    assert "8 cases hold on cuda" in run("cuda")
