"""Files with one checksum over all they hold: tensors with JSON, for networks and checkpoints, and JSON alone, for runs.

The first is a safetensors file. Its header's metadata has one entry, JSON that begins with the checksum, in which the checksum's own
place counts as zeros. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from thriftnet.errors import CheckpointError
from thriftnet.files import open_regular

SEAL = "sha256"
NO_CHECKSUM = "0" * 64  # while it is computed
ENTRY = "thriftnet"  # the JSON among the header's metadata
START = b'{"__metadata__":{"%s":"{\\"%s\\":\\"' % (ENTRY.encode(), SEAL.encode())  # of the header; the checksum follows
CHECKSUM = slice(8 + len(START), 8 + len(START) + len(NO_CHECKSUM))


def encode(facts: dict[str, Any], tensors: dict[str, Tensor], name: str) -> bytes:
    """The content of a file; its checksum is put into ``facts``, too, whose first entry it is.

    Raises:
        CheckpointError: Tensors of a kind that safetensors files cannot hold.
    """
    from safetensors.torch import save as serialized

    facts[SEAL] = NO_CHECKSUM
    try:
        data = bytearray(serialized(tensors, {ENTRY: json.dumps(facts, separators=(",", ":"))}))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{name} cannot hold these tensors: {error}") from error
    facts[SEAL] = checksum(data)
    data[CHECKSUM] = facts[SEAL].encode()
    return bytes(data)


def checksum(data: bytes | bytearray) -> str:
    """SHA-256 of a file in which the checksum itself is zeros."""
    view = memoryview(data)
    digest = hashlib.sha256(view[: CHECKSUM.start])
    digest.update(NO_CHECKSUM.encode())
    digest.update(view[CHECKSUM.stop :])
    return digest.hexdigest()


def verified(data: bytes | bytearray, path: Path) -> str:
    """The JSON in a file whose checksum fits, as text.

    Raises:
        CheckpointError: It is damaged, or not such a file.
    """
    if not data.startswith(START, 8):
        raise CheckpointError(f"{path} is not a model file or checkpoint of thriftnet, or damaged at its beginning")
    if checksum(data) != data[CHECKSUM].decode("latin1"):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit. Copy the file again")
    try:
        text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][ENTRY]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    if not isinstance(text, str):
        raise CheckpointError(f"{path} is not a safetensors file: its metadata is no text")
    return text


def tensors_in(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in the content of a file.

    Raises:
        CheckpointError: They do not lie in it as its header says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialized

    try:
        return deserialized(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


def sealed_json(facts: Mapping[str, Any]) -> str:
    """JSON text that begins with its checksum."""
    plain = json.loads(json.dumps(facts, default=str))
    return json.dumps({SEAL: _json_checksum(plain), **plain}, indent=1) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """What `sealed_json` wrote, without the checksum.

    Raises:
        OSError: It cannot be opened.
        CheckpointError: It is damaged.
    """
    with open_regular(path) as file:
        data = file.read()
    try:
        facts = json.loads(data)
        fits = facts.pop(SEAL) == _json_checksum(facts)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit")
    return dict(facts)


def _json_checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()
