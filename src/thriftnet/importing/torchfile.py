"""Reads what torch.save wrote without running anything that the file contains.

A process of its own (`inert`, which imports no torch) describes the file as data: what was pickled, and where each storage lies.
Here that description is checked against the file, the weights are read, and tensors are put together. Every other class or
function that the file names stays an inert `StandIn`, so whole pickled networks can be looked through without their code.

Not read: sparse, quantized and complex tensors, expanded ones (more elements than stored), big-endian files, TorchScript.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from thriftnet.errors import CheckpointError
from thriftnet.files import open_regular
from thriftnet.importing import inert
from thriftnet.importing.inert import ORIGIN, StandIn

COMMAND = [sys.executable, "-I", "-S", inert.__file__]
SECONDS = 60  # for the process, which needs a fraction of one, on any system; processor time is limited further
MAX_DIMENSIONS, MAX_EXTENT = 32, 1 << 40
BYTES = {"Char": torch.int8, "Byte": torch.uint8}
DTYPES: dict[str, torch.dtype] = {kind: BYTES.get(kind) or getattr(torch, kind.lower()) for kind in inert.SIZES}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.autograd.variable.Variable",
)
NOT_READ = ("torch._utils._rebuild_", "torch._tensor._rebuild_")  # sparse, quantized, nested, on other devices, subclasses
NUMBERS = re.compile(r"[<|=](\?|b1|[iu][1248]|f[248])")
ADVICE = "Get it again from where it comes from, or save a state dict: torch.save(model.state_dict(), FILE)"


def read_torch(path: Path) -> tuple[Any, str]:
    """What torch.save wrote, and its format: ``"zip"`` or ``"legacy"``.

    Tensors are on the CPU and share memory as they did; tuples and sets are lists, keys are text, classes are stand-ins.

    Raises:
        CheckpointError: Whatever is wrong with the file, in one line.
    """
    try:
        with open_regular(path) as file:
            head, _, body = describe(file).partition(b"\n")
            facts = json.loads(head)
            if "error" in facts:
                _refuse(facts["error"])
            storages = _read_storages(file, facts["storages"])
        return json.loads(body, object_hook=partial(_rebuild, storages)), facts["format"]
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.strerror or error}. Check the path and that you may read it"
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"its parts do not fit each other ({type(error).__name__}: {error}). {ADVICE}"
    plain = "".join(char if char.isprintable() else "?" for char in reason)
    raise CheckpointError(f"cannot read {path}: {plain if len(plain) <= 600 else plain[:597] + '...'}")


def describe(file: BinaryIO) -> bytes:
    """What `inert.describe` says of a file, in a process of its own that is given nothing but the open file."""
    try:
        done = subprocess.run(COMMAND, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        _refuse(f"reading it takes more than {SECONDS} s")
    if done.returncode or len(done.stdout) > inert.MAX_TEXT:
        _refuse(f"the process that looks into it took too much time or memory, or crashed (exit code {done.returncode})")
    return done.stdout


def _refuse(reason: str) -> NoReturn:
    raise CheckpointError(f"{reason}. {ADVICE}")


def _read_storages(file: BinaryIO, entries: list[Any]) -> list[Tensor]:
    """Each storage as a flat tensor, copied out of the file, so that truncating it later cannot crash a process."""
    left = os.fstat(file.fileno()).st_size
    storages = []
    for kind, start, size, crc in entries:
        left -= size
        if left < 0 or start < 0 or size < 0 or size % DTYPES[kind].itemsize:
            _refuse("it describes more weights than it has bytes")
        raw = torch.empty(size, dtype=torch.uint8)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, which typeshed knows from 3.12 on
        file.seek(start)
        if file.readinto(view) != size:  # type: ignore[attr-defined]  # typeshed lacks it on BinaryIO
            _refuse("it ends before its weights do")
        if crc and zlib.crc32(view) != crc:
            _refuse("weights in its archive do not have the checksum that was written with them")
        if DTYPES[kind] is torch.bool:
            raw.clamp_(max=1)  # other bytes than 0 and 1 are no truth values
        storages.append(raw.view(DTYPES[kind]))
    return storages


def _rebuild(storages: list[Tensor], found: dict[str, Any]) -> Any:
    """The tensor, number or stand-in that a dict of the description means, or that very dict."""
    if ORIGIN not in found:
        return found
    made = StandIn(str(found[ORIGIN]), tuple(found.get("args", ())))
    made.state, made.items, made.elements = found.get("state"), found.get("items", {}), found.get("elements", [])
    match made.origin, made.args:
        case ("torch._tensor._rebuild_from_type_v2", (StandIn(origin=origin), _, [*args], *_)) if origin in TENSORS:
            return _tensor(storages, args)  # of a subclass, or with attributes
        case (origin, args) if origin in TENSORS:
            return _tensor(storages, args)
        case (origin, (Tensor() as tensor, *_)) if origin in PARAMETERS:
            return tensor
        case ("numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar", (StandIn() as dtype, str() as data)):
            return _number(dtype, data)
    if made.origin.startswith(NOT_READ):
        _refuse(f"it holds a tensor made by {made.origin}; dense tensors of common types are read only")
    return made


def _tensor(storages: list[Tensor], args: Sequence[Any]) -> Tensor:
    """A view of a storage, after a check that it stays inside."""
    match args:
        case (
            StandIn(origin="storage", args=(int() as index, int() as first, int() as held)),
            offset,
            [*size],
            [*stride],
            *_,
        ):
            numbers = (first, held, offset, *size, *stride)
        case _:
            _refuse("a tensor in it is described by something else than storage, offset, size and strides")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        _refuse(f"a tensor in it has {len(size)} dimensions and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < MAX_EXTENT for n in numbers) or prod(n or 1 for n in size) >= MAX_EXTENT:
        _refuse("a tensor in it has an offset, size or stride that is negative, huge or no integer")
    end = offset + (1 + sum((n - 1) * step for n, step in zip(size, stride)) if all(size) else 0)
    if end > held or first + held > storages[index].numel():
        _refuse(f"a tensor of shape {size}, strides {stride} and offset {offset} leaves its storage of {held} elements")
    if prod(size) > held:
        _refuse(f"it holds an expanded tensor, of shape {size} on a storage of {held} elements: save a copy of it")
    return storages[index].as_strided(size, stride, first + offset)


def _number(dtype: StandIn, data: str) -> Any:
    """A scalar of numpy as Python's number."""
    name = f"{dtype.state[1] if dtype.state else '='}{dtype.args[0]}"
    raw = data.encode("latin1")
    if not NUMBERS.fullmatch(name) or len(raw) != np.dtype(name).itemsize:
        _refuse(f"it holds a number of numpy's type {name!r} in {len(raw)} bytes")
    return np.frombuffer(raw, name)[0].item()
