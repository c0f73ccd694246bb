"""Files whose form is right and whose content is not, drawn by hypothesis: headers, configs, state dicts, archives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from faults.samples import Sample, without_checksums
from pickle_bytes import Entry, archive, saved
from thriftnet.importing.files import read_file
from thriftnet.store.config import CONFIG

Draw = Callable[[st.SearchStrategy[Any]], Any]

SIZES = st.sampled_from([0, 1, -1, 2, 3, 8, 1 << 16, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 70]) | st.integers()
SCALARS = (
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=8) | st.sampled_from(["convert", "os:system", "NaN"])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = ("dtype", "shape", "data_offsets")
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F4", "F8_E4M3", "C64", "X", "")
ODD = (
    lambda tensor: tensor.to(torch.float64),
    lambda tensor: tensor.to(torch.bool),
    lambda tensor: tensor.to(torch.int8),
    lambda tensor: tensor[None],
    lambda tensor: tensor.reshape(-1),
    lambda tensor: tensor[:0] if tensor.ndim else tensor,
    lambda tensor: torch.zeros(1).expand(1000, 1000),
    lambda tensor: torch.full((3,), float("nan")),
    lambda tensor: tensor.mT.contiguous() if tensor.ndim > 1 else tensor,
    lambda tensor: [tensor],
    lambda tensor: {"nested": tensor},
    lambda tensor: None,
    lambda tensor: "text",
)


def states_of(samples: list[Sample], folder: Path) -> list[dict[str, Any]]:
    """The state dict in each sample that has one, as it is stored."""
    found = []
    for sample in samples:
        content = read_file(sample.put(sample.data, folder))[0] if sample.part is None else None
        inner = [content, *content.values()] if isinstance(content, dict) else []
        found.append(next((value for value in inner if isinstance(value, dict) and _is_state(value)), {}))
    return found


def draw(samples: list[Sample], states: list[dict[str, Any]], number: int, batch: int, size: int) -> list[tuple[int, bytes]]:
    """So many changed files, and the samples that they were made from; always the same for a seed and batch."""
    made: list[tuple[int, bytes]] = []
    kinds = sorted({sample.format for sample in samples})

    @seed(1000 * number + batch)
    @settings(
        max_examples=size, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(kinds))
        which = data.draw(st.sampled_from([index for index, sample in enumerate(samples) if sample.format == kind]))
        made.append((which, _changed(samples[which], states[which], data.draw)))

    one()
    return made[:size]


def _changed(sample: Sample, state: dict[str, Any], draw: Draw) -> bytes:
    if sample.part == CONFIG:
        return _config(sample.data, draw)
    if sample.part is not None or sample.format == "safetensors":
        return _safetensors(sample.data, draw)
    if draw(st.integers(0, 3)) == 0:
        return _records(draw)
    return _state_dict(state, draw)


def _config(data: bytes, draw: Draw) -> bytes:
    """Some values of a config replaced, removed or added, at any depth."""
    content = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = content
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(JSON)
            break
    return json.dumps(content).encode()


def _safetensors(data: bytes, draw: Draw) -> bytes:
    """A header with other types, shapes and places, or of another length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(header)))
        entry = header[key]
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del header[key]
            header[draw(st.sampled_from([key + "x", "", "__metadata__", key.upper()]))] = entry
        elif kind == 1:
            header[key] = draw(JSON)
        elif isinstance(entry, dict):
            values = {
                "dtype": st.sampled_from(DTYPES) | SCALARS,
                "shape": st.lists(SIZES, max_size=5) | JSON,
                "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
            }
            name = draw(st.sampled_from(NAMES))
            entry[name] = draw(values[name])
        if not header:
            break
    head = json.dumps(header).encode()
    stated = len(head) if draw(st.integers(0, 4)) else draw(st.integers(0, (1 << 64) - 1))
    return stated.to_bytes(8, "little") + head + data[8 + length :]


def _state_dict(state: dict[str, Any], draw: Draw) -> bytes:
    """Tensors renamed, removed, doubled, or of another kind or shape, or put into something else."""
    state = dict(state)
    for _ in range(draw(st.integers(0, 2))):
        if not state:
            break
        key = draw(st.sampled_from(sorted(state)))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            parts = key.split(".")
            parts[draw(st.integers(0, len(parts) - 1))] = draw(
                st.sampled_from(["0", "1", "99999999999", "weight", "", "x", "-1"])
            )
            state[".".join(parts)] = state.pop(key)
        elif kind == 1:
            del state[key]
        elif isinstance(state[key], torch.Tensor):
            state[key] = draw(st.sampled_from(ODD))(state[key])
    around: Any = draw(
        st.sampled_from(
            [state, {"state_dict": state}, {"net": state, "acc": float("nan")}, [state], {"module": {"state_dict": state}}]
        )
    )
    if isinstance(around, dict) and draw(st.booleans()):
        around = {**around, "cfg": draw(st.text(max_size=30) | JSON), "epoch": draw(SCALARS)}
    return without_checksums(around) if draw(st.booleans()) else saved(around, archived=False)


def _is_state(value: dict[Any, Any]) -> bool:
    return (
        bool(value)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(t, torch.Tensor) for t in value.values())
    )


def _records(draw: Draw) -> bytes:
    """An archive whose directory says something else than its headers."""
    numbers = st.none() | SIZES.map(lambda value: value % (1 << 32))
    entries = []
    for name in draw(
        st.lists(st.sampled_from(["data.pkl", "data/0", "version", "../x", "/x", "byteorder", ""]), min_size=1, max_size=4)
    ):
        stated = {
            field: draw(numbers)
            for field in draw(st.sets(st.sampled_from(["size", "header_size", "offset", "crc", "packed"])))
        }
        method, wide = draw(st.sampled_from([0, 0, 0, 8, 99])), draw(st.booleans())
        entries.append(Entry(f"archive/{name}", draw(st.binary(max_size=40)), method=method, wide=wide, **stated))
    return archive(*entries, more=draw(st.binary(max_size=4)), comment=draw(st.sampled_from([b"", b"", b"c"])))
