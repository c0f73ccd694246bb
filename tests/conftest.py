"""What every test of the suite has in common: two threads in all, a fixed seed, reproducible examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # `make test` has two workers: two threads in all; tiny networks gain nothing from more
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same random state and leaves no default behind."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() is torch.float32, "a test left another default dtype behind"
    assert torch.is_grad_enabled(), "a test left gradients switched off"
