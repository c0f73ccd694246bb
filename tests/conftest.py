"""What every test of the suite has in common: two threads in all, a fixed seed, reproducible examples."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from thriftnet.train import run_folder

# compilers of two workers must not write one cache
CACHE = Path(tempfile.gettempdir()) / f"thriftnet-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that a shell started in the background would ignore it
torch.set_num_threads(1)  # `make test` has two workers: two threads in all; tiny networks gain nothing from more
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What thousands of collected tests and the libraries made stays: garbage collections need not look at it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def no_curves() -> Iterator[None]:
    """Drawing the curves of a tiny training takes longer than the training: tests/test_train.py does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "run_curves", lambda rows: "<svg></svg>")
        yield


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same random state and leaves no default behind."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() is torch.float32, "a test left another default dtype behind"
    assert torch.is_grad_enabled(), "a test left gradients switched off"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads bytes as a file of torch.save, without the process around the reader."""
    from thriftnet.importing import inert, torchfile

    monkeypatch.setattr(torchfile, "describe", lambda file: inert.describe(file).encode())

    def read_bytes(data: bytes) -> Any:
        path = tmp_path / "file.pt"
        path.write_bytes(data)
        return torchfile.read_torch(path)[0]

    return read_bytes
