"""Sound files of every format and layout, small, and the files of the authors where the shared material lies beside the checkout."""

from __future__ import annotations

import argparse
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import thriftnet as tn
from faults import ROOT
from model_files import config_text, sealed, with_config
from pickle_bytes import call, dict_of, integer, legacy, list_of, name, text2, tuple_of
from pickle_bytes import saved as torch_saved
from test_importer import SMALL, SUPERNET, stirred, theirs
from thriftnet.importing.dsnet import layout as dsnet_layout
from thriftnet.importing.filter_basis import layout as resnet_layout
from thriftnet.importing.shiftresnet import layout as shiftresnet_layout
from thriftnet.importing.soft_sharing import layout as swrn_layout
from thriftnet.importing.weight_sharing import layout as convmixer_layout
from thriftnet.store.config import CONFIG, MODEL

SHARED = ROOT.parent / "shared" / "checkpoints"
SHARED_FILES = (
    "shiftresnet/shiftresnet20_1.0_py2_2017layout.t7",
    "shiftresnet/depthwiseresnet20.t7",
    "shiftresnet/shiftresnet20_1.0_zip.t7",
    "spin/WFWS-mean-ConvMixer_64_8_4_3-Fused.pyth",
    "spin/WS-ConvMixer_64_8_4_3-Stripped.pyth",
    "dsnet/checkpoint-149-legacy.pth.tar",
    "netrl2/DataParallel-ResNet32_SingleShared-S8-U1.pth",
    "softsharing/swrn16-1-2_cifar10.py2.checkpoint.pth.tar",
)
CFG = "CONVMIXER:\n  ACT_FUNC: RELU\n  PATCH_STRIDE: 2\n  WEIGHT_SHARE:\n    ENABLE: false\n"


@dataclass(frozen=True)
class Sample:
    """A sound file, and how it is opened.

    Args:
        name: What it is.
        format: Its row in the table.
        data: Its bytes.
        checked: Whether a checksum covers the weights, so that they come back as they were or not at all.
        part: Of a model file of ours: `MODEL`, all of it, or `CONFIG`, the config in it.
        whole: The sound model file whose config this is.
        sealed: Whether the checksum is made to fit, as someone who means harm would do.
    """

    name: str
    format: str
    data: bytes
    checked: bool = False
    part: str | None = None
    whole: bytes = b""
    sealed: bool = False

    def put(self, data: bytes, folder: Path) -> Path:
        """Write the file with other content; gives the path to open."""
        if self.part is None:
            path = folder / "file.pth"
            path.write_bytes(data)
            return path
        if self.part == CONFIG:
            data = with_config(self.whole, data.decode("utf-8", "replace"))
        place = folder / "model"
        place.mkdir(exist_ok=True)
        (place / MODEL).write_bytes(sealed(data) if self.sealed else data)
        return place

    @property
    def open(self) -> Callable[[Path], nn.Module]:
        return (lambda path: tn.import_checkpoint(path).model) if self.part is None else tn.load


def make_samples(folder: Path, quick: bool) -> list[Sample]:
    """All of them, or those of small networks only."""
    torch.manual_seed(0)
    made = [*_state_dicts(quick), *_around(), _python2(), *_folders(folder)]
    if not quick:
        made += [_whole(archived=True), _whole(archived=False), *_shared()]
    return made


def _state(network: str, layout: Any, **kwargs: Any) -> OrderedDict[str, Tensor]:
    return theirs(stirred(tn.create_model(network, **kwargs)), layout)


def _mixer() -> OrderedDict[str, Tensor]:
    return _state("convmixer", convmixer_layout, **SMALL)


def _state_dicts(quick: bool) -> list[Sample]:
    """Bare state dicts of each system in each format."""
    from safetensors.torch import save

    states = {"SPIN": _mixer()}
    if not quick:
        states |= {
            "ShiftResNet": _state("shiftresnet20", shiftresnet_layout, expansion=1, num_classes=3),
            "DS-Net": _state("dsnet", dsnet_layout, stem=(6, 8), stages=SUPERNET, num_classes=3),
            "soft sharing": _state("swrn", swrn_layout, depth=10, width=1, templates=1, num_classes=3),
            "Net_RL2": _state("resnet32_double_shared", resnet_layout, depth=14, shared_rank=2, unique_rank=1),
        }
    made = []
    for system, state in states.items():
        made += [
            Sample(f"{system}, state dict", "torch zip", torch_saved(state), checked=True),
            Sample(f"{system}, state dict", "torch zip without checksums", without_checksums(state)),
            Sample(f"{system}, state dict", "torch legacy", torch_saved(state, archived=False)),
            Sample(f"{system}, state dict", "safetensors", save(dict(state))),
        ]
    return made


def _around() -> list[Sample]:
    """What the authors put around their state dicts."""
    spin = {"model_state": _mixer(), "cfg": CFG, "epoch": 3, "optimizer_state": {"state": {}, "param_groups": []}}
    state = _state("dsnet", dsnet_layout, stem=(6, 8), stages=SUPERNET, num_classes=3)
    twice = {"state_dict": state, "state_dict_ema": OrderedDict((key, tensor.clone()) for key, tensor in state.items())}
    dsnet = {**twice, "args": argparse.Namespace(lr=0.1, width=[1, 2]), "epoch": 149, "metric": 70.5, "arch": "dsnet"}
    return [
        Sample("SPIN .pyth with cfg", "torch zip without checksums", without_checksums(spin)),
        Sample("SPIN .pyth with cfg", "torch legacy", torch_saved(spin, archived=False)),
        Sample("DS-Net .pth.tar with arguments and averaged weights", "torch legacy", torch_saved(dsnet, archived=False)),
    ]


def without_checksums(content: Any) -> bytes:
    """An archive whose records have no checksums, as torch can write it: what is changed is not noticed by them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return torch_saved(content)
    finally:
        torch.serialization.set_crc32_options(before)


def _whole(*, archived: bool) -> Sample:
    """A whole pickled network."""
    model = stirred(tn.create_model("resnet20", shortcut="projection", reduction=9.3, num_classes=3))
    model._modules["linear"] = model._modules.pop("fc")  # as the authors call it
    content = torch_saved({"net": model, "acc": 91.5, "epoch": 3}, archived=archived)
    return Sample("a whole network", "torch zip" if archived else "torch legacy", content, checked=archived)


def _python2() -> Sample:
    recorder = b"(iutils\nRecorderMeter\n" + dict_of(total_epoch=b"K\x05") + b"b"
    data = python2_file(recorder=recorder, arch=text2(b"caf\xe9"))
    return Sample("a Python 2 state dict with recorder", "torch legacy, Python 2", data)


def python2_file(**around: bytes) -> bytes:
    """A state dict as Python 2 pickled it, with pickled values beside it."""
    state, weights = {f"module.{key}": tensor for key, tensor in _mixer().items()}, dict[str, bytes]()
    pairs = []
    for index, (key, tensor) in enumerate(state.items()):
        kind = "Long" if tensor.dtype == torch.int64 else "Float"
        place = [text2(b"storage"), name(f"torch.{kind}Storage"), text2(str(index).encode()), text2(b"cuda:0")]
        source = tuple_of(*place, integer(tensor.numel()), b"N") + b"Q"
        shape, strides = (tuple_of(*map(integer, numbers)) for numbers in (tensor.shape, tensor.stride()))
        pairs.append(list_of(text2(key.encode()), call("torch._utils._rebuild_tensor", source, b"K\x00", shape, strides)))
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        weights[str(index)] = struct.pack("<q", tensor.numel()) + raw
    body = dict_of(state_dict=call("collections.OrderedDict", list_of(*pairs)), **around)
    keys = b"\x80\x02" + list_of(*(text2(key.encode()) for key in weights)) + b"."
    return legacy(body).removesuffix(b"\x80\x02](e.") + keys + b"".join(weights.values())


def _folders(folder: Path) -> list[Sample]:
    """A model file of ours as it is, with a checksum that fits what was changed, and with another config."""
    plain = stirred(tn.create_model("resnet20", reduction=9.3, num_classes=3))
    model = tn.convert(plain, "soft-sharing(templates=2)")
    place = tn.save(model, folder / "sound", metadata={"class_names": ["a", "b", "c"], "metrics": {"top1": 91.5}})
    data = (place / MODEL).read_bytes()
    text = config_text(data).encode()
    return [
        Sample("config", "our file: config, checksum made to fit", text, True, CONFIG, data),
        Sample(MODEL, "our file", data, True, MODEL),
        Sample(MODEL, "our file, checksum made to fit", data, False, MODEL, sealed=True),
    ]


def _shared() -> list[Sample]:
    """Files that the authors' code wrote."""
    made = []
    for path in SHARED_FILES:
        if (SHARED / path).is_file():
            data = (SHARED / path).read_bytes()
            kind = "torch zip" if data.startswith(b"PK") else "torch legacy"
            kind += ", Python 2" if "py2" in path else ""
            made.append(Sample(path, kind, data, checked=kind == "torch zip"))
    return made
