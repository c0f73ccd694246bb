"""The zoo under timm's names."""

from __future__ import annotations

import pytest
import torch

import thriftnet as tn
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS
from thriftnet.models.timm_names import register_timm


@pytest.fixture(scope="module")
def registered() -> list[str]:
    return register_timm()


def test_timm_builds_our_networks(registered: list[str]):
    timm = pytest.importorskip("timm")
    model = timm.create_model("shiftresnet20", expansion=3.0, num_classes=7)
    assert sum(p.numel() for p in model.parameters()) == 95642 - 3 * 65
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert timm.is_model("swrn28_10_6")


def test_names_that_timm_has_keep_its_meaning(registered: list[str]):
    timm = pytest.importorskip("timm")
    assert "resnet18" not in registered
    assert type(timm.create_model("resnet18")).__module__.startswith("timm.")
    assert set(registered) <= set(MODELS)


def test_registering_twice_changes_nothing(registered: list[str], recwarn: pytest.WarningsRecorder):
    assert register_timm() == registered
    assert not [warning for warning in recwarn if "Overwriting" in str(warning.message)]


def test_pretrained_is_refused_with_what_to_do(registered: list[str]):
    timm = pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"thriftnet\.load"):
        timm.create_model("shiftresnet20", pretrained=True)


def test_the_public_names_are_unchanged(registered: list[str]):
    assert type(tn.create_model("resnet18")).__module__.startswith("thriftnet.")
