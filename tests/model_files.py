"""Model files changed by someone who also makes the checksum fit."""

from __future__ import annotations

import json

from thriftnet.store.sealed import CHECKSUM, ENTRY, checksum


def sealed(data: bytes) -> bytes:
    """The content with the checksum that fits it."""
    if len(data) < CHECKSUM.stop:
        return data
    return data[: CHECKSUM.start] + checksum(data).encode() + data[CHECKSUM.stop :]


def config_text(data: bytes) -> str:
    """The config in a model file."""
    length = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + length])["__metadata__"][ENTRY])


def with_config(data: bytes, text: str) -> bytes:
    """A model file with another config."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][ENTRY] = text
    written = json.dumps(header, separators=(",", ":")).encode()
    return sealed(len(written).to_bytes(8, "little") + written + data[8 + length :])
