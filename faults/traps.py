"""The hostile files and folders themselves."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import thriftnet as tn
from faults.samples import Sample, make_samples, python2_file
from model_files import config_text, with_config
from pickle_bytes import Entry, dict_of, legacy, storage, tensor, zipped
from test_torchfile_hostile import FLOATS, payloads

Change = Callable[[dict[str, Any]], object]
HUGE = 10**12
LIBRARIES = ("timm", "torchvision")


def write_traps(folder: Path, quick: bool) -> None:
    """Hostile files and folders by kind, each kind with sound ones, which come first."""
    samples = make_samples(_new(folder.parent / f"{folder.name}-samples"), quick=True)
    _pickles(folder, samples, quick)
    _headers(folder, samples)
    _configs(folder, quick)
    _links(folder)


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pickles(folder: Path, samples: list[Sample], quick: bool) -> None:
    """Those of the tests, in both formats, and beside a network that opens."""
    made = payloads(folder)
    place = _new(folder / "pickles")
    for index, sample in enumerate(samples):
        if sample.part is None:
            (place / f"0 sound {index}").write_bytes(sample.data)
    for case, payload in made.items():
        body = dict_of(state_dict=dict_of(weight=tensor(storage(4), [4], [1])), payload=payload)
        archived = dict_of(state_dict=dict_of(weight=tensor(storage(4, view=None), [4], [1])), payload=payload)
        (place / f"{case}, legacy").write_bytes(legacy(body, {"0": FLOATS}))
        if not quick or case == "os.system":
            (place / f"{case}, beside a network").write_bytes(python2_file(payload=payload))
        version = Entry("archive/version", b"3")
        (place / f"{case}, zip").write_bytes(zipped(archived, version, weights={"0": FLOATS}))
    links = _new(folder / "archives")
    sound = next(sample for sample in samples if sample.format == "torch zip")
    (links / "0 sound").write_bytes(sound.data)
    body = dict_of(weight=tensor(storage(4, view=None), [4], [1]))
    for case, entry in {
        "parent folder": Entry("archive/../../canary", b"x"),
        "absolute": Entry(f"{folder}/canary", b"x"),
        "backslash": Entry("archive/..\\canary", b"x"),
        "symbolic link": Entry("archive/data/1", b"/etc/passwd", attributes=0o120777 << 16),
        "nested pickle": Entry("archive/data/1", legacy(payloads(folder)["os.system"])),
        "bomb": Entry("archive/data/1", b"x", method=8, size=1 << 31),
        "twice": Entry("archive/data.pkl", legacy(payloads(folder)["os.system"])),
    }.items():
        (links / case).write_bytes(zipped(body, entry, weights={"0": FLOATS}))


def _headers(folder: Path, samples: list[Sample]) -> None:
    """Headers of safetensors files that promise what is not there."""
    place = _new(folder / "safetensors")
    (place / "0 sound").write_bytes(next(sample.data for sample in samples if sample.format == "safetensors"))

    def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    headers: dict[str, object] = {
        "huge shape": {"w": entry(shape=(HUGE, HUGE))},
        "overflowing shape": {"w": entry(shape=(1 << 63, 2))},
        "no numbers": {"w": entry(shape=(0, HUGE), offsets=(0, 0))},
        "negative": {"w": entry(shape=(-4,), offsets=(16, 0))},
        "overlapping": {"a": entry(), "b": entry()},
        "beyond the end": {"w": entry(shape=(HUGE,), offsets=(0, 4 * HUGE))},
        "unknown type": {"w": entry(dtype="os.system")},
        "code as a name": {"__import__('os').system('touch canary')": entry()},
        "metadata": {"w": entry(), "__metadata__": {"__reduce__": "os.system"}},
        "many": {f"w{index}": entry(shape=(0,), offsets=(0, 0)) for index in range(50_000)},
    }
    for case, header in headers.items():
        text = json.dumps(header).encode()
        (place / case).write_bytes(struct.pack("<Q", len(text)) + text + FLOATS)
    deep = b'{"w":' + b"[" * 100_000
    (place / "deep").write_bytes(struct.pack("<Q", len(deep)) + deep)
    (place / "long header").write_bytes(struct.pack("<Q", (1 << 63) - 1) + b"{" + FLOATS)


def _set(**fields: object) -> Change:
    return lambda config: config.update(fields)


def _model(name: str, **kwargs: object) -> Change:
    return _set(model={"name": name, "kwargs": kwargs})


def _step(**fields: object) -> Change:
    return _set(history=[fields])


def _technique(**fields: object) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["history"][0]["plan"]["technique"].update(fields)

    return change


CONFIGS: dict[str, Change] = {
    "os.system": _model("os:system", command="touch canary"),
    "eval": _model("builtins:eval", source="open('canary', 'w')"),
    "exec": _model("builtins:exec", source="open('canary', 'w')"),
    "subprocess": _model("subprocess:call", popenargs=["touch", "canary"]),
    "hubconf": _model("hubconf:entry"),
    "dotted": _model("torch.hub:load", repo_or_dir="evil/repository", model="m"),
    "timm from a hub": _model("timm:hf-hub:evil/model"),
    "timm from a hub, other form": _model("timm:hf_hub:evil/model", pretrained=True),
    "timm from a folder": _model("timm:local-dir:/tmp/evil"),
    "timm with weights": _model("timm:resnet10t", pretrained=True, checkpoint_path="/tmp/evil.pth", scriptable="x"),
    "torchvision with weights": _model("torchvision:resnet18", weights="DEFAULT", progress=True),
    "path as a name": _model("../../etc/passwd"),
    "hub as a name": _model("hf-hub:evil/model"),
    "code as a name": _model("__import__('os').system('touch canary')"),
    "huge depth": _model("convmixer", dim=8, depth=HUGE),
    "huge width": _model("convmixer", dim=HUGE, depth=1),
    "huge number of classes": _model("resnet20", num_classes=HUGE),
    "infinite": _model("convmixer", dim=float("inf"), depth=4),
    "negative": _model("convmixer", dim=-8, depth=-4),
    "many arguments": _model("resnet20", **{f"x{index}": index for index in range(10_000)}),
    "text for numbers": _model("convmixer", dim="__import__('os')", depth="4"),
    "unknown verb": _step(verb="__class__"),
    "verb of Python": _step(verb="system", groups=["touch canary"]),
    "many steps": lambda config: config.update(history=config["history"] * 500),
    "tie everything": _step(verb="tie", groups=[["__class__", "__init__"], ["..", "forward"]]),
    "tie attributes": _step(verb="tie", groups=[["conv1.forward", "fc.__dict__"]]),
    "technique of Python": _technique(name="os.system", type="os.system"),
    "technique with code": _technique(name="__import__('os').system('touch canary')"),
    "technique without end": _technique(templates=HUGE),
    "width": _set(width="__import__('os').system('touch canary')"),
    "huge width as selected": _set(width=1e308),
    "class": _set(**{"class": "os.system"}),
    "files elsewhere": _set(sha256={"../../../etc/passwd": "0" * 64}),
    "format of the future": _set(thriftnet_format=10**300),
}


def _configs(folder: Path, quick: bool) -> None:
    """A sound folder with another config."""
    plain = tn.create_model("resnet20", reduction=9.3, num_classes=3)
    place = folder / "folders"
    sound = tn.save(tn.convert(plain, "soft-sharing(templates=2)"), place / "0 sound")
    data = (sound / "model.safetensors").read_bytes()
    begin = '{"sha256":"' + "0" * 64 + '","a":'
    texts = {
        "deep": begin + "[" * 200_000,
        "deep object": begin + '{"a":' * 100_000,
        "digits": begin + "9" * 10_000 + "}",
    }
    for case, change in CONFIGS.items():
        if quick and case.startswith(LIBRARIES):
            continue
        config = json.loads(config_text(data))
        change(config)
        texts[case] = json.dumps(config, separators=(",", ":"))
    for case, text in texts.items():
        (place / case).mkdir()
        (place / case / "model.safetensors").write_bytes(with_config(data, text))


def _links(folder: Path) -> None:
    """Links and pipes in place of the model file."""
    place = folder / "folders with links"
    tn.save(tn.create_model("resnet20", reduction=9.3, num_classes=3), place / "0 sound")
    targets = {
        "a password file": "/etc/passwd",
        "endless": "/dev/zero",
        "in a circle": "model.safetensors",
        "a folder": "/etc",
        "nowhere": "nothing",
    }
    for case, target in targets.items():
        (place / case).mkdir()
        (place / case / "model.safetensors").symlink_to(target)
    (place / "a pipe").mkdir()
    os.mkfifo(place / "a pipe" / "model.safetensors")
