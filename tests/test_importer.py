"""Authors' files become networks of the zoo: recognised by their tensors, filled strictly, with the authors' outputs."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from golden_rules import digest, fill_value, golden_input
from thriftnet.core.tied import unique_tensors
from thriftnet.importing import dsnet, filter_basis, shiftresnet, soft_sharing, weight_sharing
from thriftnet.importing.extract import contents
from thriftnet.importing.importer import build, import_checkpoint
from thriftnet.importing.layout import read
from thriftnet.importing.systems import recognise
from thriftnet.models.table import IDENTITY
from zoo_golden import facts, recorded_networks

SHARED = Path(__file__).parent.parent.parent / "shared"
# what the records of the originals are called -> the system whose files they are
SYSTEMS = {
    "shiftresnet": "shiftresnet",
    "softsharing": "soft-sharing",
    "netrl2": "filter-basis",
    "spin": "weight-sharing",
    "dsnet": "dsnet",
}
FUSED_IN_FORWARD = ("wf2_", "wfws2_")
FLOAT32 = 5e-6  # of float32 outputs, relative to the largest
SMALL = {"dim": 8, "depth": 4, "patch_size": 2, "kernel_size": 3, "num_classes": 5}
SUPERNET = (((8, 12), 1, 3, 1, "ds", False), ((12, 16, 24), 2, 3, 2, "ds", True), ((16, 20, 32), 1, 5, 2, "ds", False))
INVERTED = (((8, 12), 1, 3, 1, "ir", False), ((12, 16, 24), 2, 3, 2, "ir", True))


def stirred(model: nn.Module) -> nn.Module:
    """The network with other numbers in every tensor, norms' statistics included."""
    for name, tensor in unique_tensors(model).items():
        if "running_var" in name or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.75)
        elif tensor.ndim == 1:
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def theirs(model: nn.Module, layout: Any) -> OrderedDict[str, Tensor]:
    """The network's tensors under the authors' keys."""
    return OrderedDict((key, tensor.clone()) for key, tensor in read(unique_tensors(model), layout(model)).items())


def recorded(system: str, name: str) -> dict[str, Tensor]:
    """All tensors of a recorded network as a file has them: shared ones under each of their keys."""
    case = facts(system)[name]
    origin = {key: alias[0].removeprefix("= ") for key, _, *alias in case["state_dict"] if alias}
    values: dict[str, Tensor] = {}
    for key, shape, *alias in case["state_dict"]:
        if not alias:
            values[key] = torch.from_numpy(fill_value(key, tuple(shape), case["fill_gain"])).reshape(shape)
    return {key: values[origin.get(key, key)] for key, *_ in case["state_dict"]}


def hints_for(system: str, name: str) -> dict[str, Any]:
    """What the recorded tensors do not tell."""
    meta = facts(system)[name].get("meta", {})
    hints: dict[str, Any] = {}
    if system == "spin":
        hints |= {"activation": "gelu"} if meta.get("act") == "GELU" else {}
        hints |= {"mapping": "strided"} if "strided" in name else {}
        fused = name.partition("2_")[2] if any(mark in name for mark in FUSED_IN_FORWARD) else ""
        fusion = fused.partition("_sequential")[0].partition("_convmixer")[0]
        hints |= {"fusion": fusion, "rate": 2} if fusion in ("mean", "choose_first") else {}
    return hints


def check(model: nn.Module, expected: dict[str, Any], tolerance: float = FLOAT32) -> None:
    """Outputs are the recorded ones."""
    images = torch.from_numpy(golden_input(*expected["input_shape"]))
    with torch.no_grad():
        output = model(images).double().numpy()
    got = digest(output)
    wanted = expected["float64"]
    assert got["shape"] == wanted["shape"]
    scale = np.abs(np.array(wanted["abs_sum"])).max()
    for key in ("first10", "sum", "dot_cos"):
        size = np.abs(output).max() if key == "first10" else scale
        assert np.abs(np.array(got[key]) - np.array(wanted[key])).max() <= tolerance * size, key


# -- the authors' files


def files() -> list[Any]:
    found = []
    for system in SYSTEMS:
        place = SHARED / "checkpoints" / system
        if (place / "expected.json").is_file():
            names = json.loads((place / "expected.json").read_text())
            found += [pytest.param(place / name, id=name) for name in names]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="needs the shared material beside the checkout"))]


@pytest.mark.shared
@pytest.mark.parametrize("path", files())
def test_files_of_the_authors_compute_what_theirs_did(path: Path, tmp_path: Path) -> None:
    expected = json.loads((path.parent / "expected.json").read_text())[path.name]["expected"]
    imported = import_checkpoint(path)
    assert imported.source.system == SYSTEMS[path.parent.name]
    assert not imported.model.training
    json.dumps(dict(imported.metadata), allow_nan=False)
    again = tn.load(tn.save(imported.model, tmp_path / "saved"))
    if path.parent.name == "dsnet":
        check_widths(imported.model, expected["state_dict_ema"])
        check_widths(import_checkpoint(path, ema=False).model, expected["state_dict"])
        assert imported.metadata["args"]["num_choice"] == 14
    else:
        check(imported.model, expected)
        check(again, expected)
    renamed = tmp_path / "anything.txt"
    renamed.write_bytes(path.read_bytes())
    assert import_checkpoint(renamed).architecture == imported.architecture


def check_widths(model: nn.Module, expected: dict[str, Any]) -> None:
    for mode, of_mode in expected.items():
        tn.set_width(
            model, **({"index": int(mode.removeprefix("uniform_"))} if mode.startswith("uniform") else {"width": mode})
        )
        check(model, of_mode)


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the shared material beside the checkout")
def test_a_resnet20_of_the_wider_world() -> None:
    imported = import_checkpoint(SHARED / "data" / "weights" / "resnet20-12fca82f.th")
    assert imported.source.system == "resnet"
    identity = getattr(imported.model, IDENTITY)
    assert (identity["name"], identity["kwargs"]["shortcut"]) == ("resnet20", "pad")
    assert imported.metadata["best_prec1"] == pytest.approx(91.78)


# -- recorded key lists


@pytest.mark.parametrize("name", [name for system in SYSTEMS for name in recorded_networks(system)])
def test_every_recorded_network_is_recognised(name: str) -> None:
    """From nothing but its tensors; outputs are the authors'."""
    (system,) = (system for system in SYSTEMS if name in facts(system))
    case, tensors = facts(system)[name], recorded(system, name)
    found = contents({f"module.{key}": tensor for key, tensor in tensors.items()}, {})
    recognised_as, recognised = recognise(found.tensors, {}, hints_for(system, name))
    assert recognised_as == SYSTEMS[system]
    model, _ = build(recognised)
    dead = sum(t.numel() for key, t in tensors.items() if key not in recognised.tensors and is_dead(key, name))
    assert sum(p.numel() for p in model.parameters()) == case["params"]["total"] - dead
    if system == "dsnet":
        for mode, of_mode in ((mode, of) for mode, of in case["modes"].items() if not mode.startswith(("dynamic", "gate"))):
            tn.set_width(
                model, **({"index": int(mode.removeprefix("uniform_"))} if mode.startswith("uniform") else {"width": mode})
            )
            check(model, {"input_shape": case["input_shape"], **of_mode["logits"]}, 4e-5)
    else:
        check(model, {"input_shape": case.get("input_shape"), **case["logits"]})


def is_dead(key: str, name: str) -> bool:
    return (key == "shared_basis_4.weight" and "DenseNet" in name) or (key.startswith("bank_") and "swrn10-" in name)


# -- files made here, for a clone without the shared material

MADE: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "shift": ("shiftresnet20", {"expansion": 1.5, "num_classes": 3}, shiftresnet.layout, {}),
    "block": (
        "resnet20_projection",
        {"reduction": 7.5, "reduction_mode": "block", "num_classes": 3},
        shiftresnet.layout,
        {},
    ),
    "net": ("resnet20_projection", {"reduction": 9.3, "num_classes": 3}, shiftresnet.layout, {}),
    "depthwise": ("depthwiseresnet20", {"reduction": 3.7, "num_classes": 3}, shiftresnet.layout, {}),
    "swrn": ("swrn", {"depth": 16, "width": 1, "templates": 3, "num_classes": 3}, soft_sharing.layout, {}),
    "wrn": ("wrn", {"depth": 10, "width": 2, "num_classes": 3}, soft_sharing.layout, {}),
    "grey": ("swrn", {"depth": 16, "width": 1, "templates": 1, "in_chans": 1}, soft_sharing.layout, {}),
    "double": ("resnet32_double_shared", {"depth": 14, "shared_rank": 5, "unique_rank": 2}, filter_basis.layout, {}),
    "single": ("resnet56_single_shared", {"depth": 20, "shared_rank": 3, "unique_rank": 0}, filter_basis.layout, {}),
    "only": ("resnet32_shared_only", {"depth": 14, "shared_rank": 5}, filter_basis.layout, {}),
    "non": ("resnet56_non_shared", {"depth": 14, "unique_rank": 3}, filter_basis.layout, {}),
    "mobile": ("cifar_mobilenetv2_shared_double", {"num_classes": 3}, filter_basis.layout, {}),
    "eca": ("mobilenetv2_shared_double", {"num_classes": 3, "eca": True}, filter_basis.layout, {}),
    "mixer": ("convmixer", {**SMALL, "kernel_size": 4}, weight_sharing.layout, {}),
    "gelu": ("convmixer", {**SMALL, "activation": "gelu"}, weight_sharing.layout, {"activation": "gelu"}),
    "shared": ("ws_convmixer", {**SMALL, "rate": 2, "mapping": "strided"}, weight_sharing.layout, {"mapping": "strided"}),
    "scalar": ("wfws_convmixer", {**SMALL, "rate": 4, "fusion": "scalar_weighted_mean"}, weight_sharing.layout, {"rate": 4}),
    "first": (
        "wfws_convmixer",
        {**SMALL, "rate": 2, "fusion": "choose_first"},
        weight_sharing.layout,
        {"rate": 2, "fusion": "choose_first"},
    ),
    "supernet": ("dsnet", {"stem": (6, 8), "stages": SUPERNET, "num_classes": 3}, dsnet.layout, {}),
    "residual": (
        "dsnet",
        {"stem": (6, 8), "stages": SUPERNET, "num_classes": 3, "skip": True, "head": 16},
        dsnet.layout,
        {},
    ),
    "inverted": (
        "dsnet",
        {"stem": (6, 8), "stages": INVERTED, "num_classes": 3, "skip": True, "se_ratio": 0.3},
        dsnet.layout,
        {},
    ),
    "relu": (
        "dsnet",
        {"stem": (6, 8), "stages": SUPERNET, "num_classes": 3, "activation": "relu"},
        dsnet.layout,
        {"activation": "relu"},
    ),
}


def images_for(model: nn.Module) -> Tensor:
    side = 64 if type(model).__name__ == "DSNet" else 32
    return torch.randn(2, model.default_cfg["input_size"][0], side, side)  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "module"])
@pytest.mark.parametrize("made", MADE)
def test_a_state_dict_comes_back_bit_by_bit(made: str, form: str, tmp_path: Path) -> None:
    name, kwargs, layout, hints = MADE[made]
    model = stirred(tn.create_model(name, **kwargs))
    state, path = theirs(model, layout), tmp_path / "weights"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(dict(state), path)
    elif form == "module":
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    imported = import_checkpoint(path, **hints)
    images = images_for(model)
    with torch.no_grad():
        assert torch.equal(imported.model(images), model(images))
        assert torch.equal(tn.load(tn.save(imported.model, tmp_path / "saved"))(images), model(images))
    assert imported.source.format == {"safetensors": "safetensors", "legacy": "torch legacy"}.get(form, "torch zip")
    assert imported.metadata == ({"epoch": 3} if form == "module" else {})
    assert name.rstrip("0123456789") in imported.architecture or made in ("double", "single", "only", "non")
    assert str(imported).startswith(f"from    {path}")
