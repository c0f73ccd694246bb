"""The zoo's backbones: names, arguments and stored facts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import thriftnet as tn
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS, model_kwargs
from zoo_groups import BACKBONES


@pytest.mark.parametrize("name", BACKBONES)
def test_stored_facts_are_what_is_counted(name: str):
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name), MODELS[name].input_size)
    assert (report.params, report.macs) == (MODELS[name].params, MODELS[name].macs)


def test_full_names_are_unambiguous_and_listed():
    owners: dict[str, list[str]] = {}
    for name, entry in MODELS.items():
        for alias in (name, *(alias for alias in entry.aliases if "_" in alias)):
            owners.setdefault(alias.lower(), []).append(name)
    assert [key for key, names in owners.items() if len(names) > 1] == []
    assert tn.list_models() == sorted(MODELS)
    assert tn.list_models("wrn*") == sorted(name for name in MODELS if name.startswith("wrn"))


def test_case_and_underscores_do_not_matter():
    assert type(tn.create_model("Shift_ResNet-20")) is type(tn.create_model("shiftresnet20"))


@pytest.mark.parametrize("name", ["resnet20", "wrn16_4"])
def test_models_offer_what_timm_users_expect(name: str):
    model = tn.create_model(name, num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 40, 24)
    features = model.forward_features(images)
    assert features.shape[1] == model.num_features
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == 7 == model.default_cfg["num_classes"]
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


def test_building_a_network_imports_its_own_family_only():
    code = """
import os, sys, thriftnet, torch
for name in sys.argv[1:]:
    if not os.fork():  # which imports what is missing here
        thriftnet.create_model(name)
        print(*(name.removeprefix('thriftnet.models.') for name in sys.modules if name.startswith('thriftnet.models.')))
        assert not {'timm', 'torchvision'} & set(sys.modules)
        break
    assert os.wait()[1] == 0
"""
    built_on = {"resnet20": set(), "shiftresnet20": {"resnet"}, "swrn16_1_2": {"wrn"}, "slimmable_mobilenetv1": set()}
    done = subprocess.run([sys.executable, "-c", code, *built_on], capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()
    assert len(imported) == len(built_on)
    for (name, allowed), modules in zip(built_on.items(), imported, strict=True):
        families = {entry.family for entry in MODELS.values()} - {MODELS[name].family}
        assert set(modules.split()) & families <= allowed, name


def test_fixed_arguments_are_not_offered():
    assert "depth" not in model_kwargs("resnet20")
    assert "depth" in model_kwargs("wrn")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet21", {}, "did you mean 'resnet"),
        ("resnet20", {"num_clases": 3}, "did you mean 'num_classes'"),
        ("resnet20", {"depth": 32}, "unknown kwarg"),
        ("resnet20", {"num_classes": -1}, "num_classes=-1"),
        ("resnet20", {"shortcut": "paid"}, "did you mean 'pad'"),
        ("resnet20", {"reduction": 1000.0}, "leaves no channel"),
        ("wrn", {"depth": 27}, "nearest are 22 and 28"),
        ("wrn", {"width": 0}, "width=0"),
    ],
)
def test_bad_names_and_arguments(name: str, kwargs: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        tn.create_model(name, **kwargs)


def test_he_initialisation_of_wide_resnets():
    torch.manual_seed(0)
    conv = tn.create_model("wrn16_4").layer3[1].conv1
    assert abs(conv.weight.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.02
