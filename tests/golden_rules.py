"""How the golden values were made: which numbers each tensor of an original network held, and what was kept of outputs.

Every tensor is drawn from a stream that its state-dict key seeds, so that values can be made again without any file.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    """One of the fact files."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def stream(text: str) -> np.random.RandomState:
    """The random stream that belongs to a text: seeded by its CRC-32."""
    return np.random.RandomState(zlib.crc32(text.encode()))


def fill_value(key: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """The float32 values of the tensor stored under the original key.

    Args:
        key: Original state-dict key; of several, the shortest, then the first by letter.
        shape: Original shape.
        gain: Standard deviation of filters, in units of ``fan_in ** -0.5``; the fact file names it.
    """
    *path, leaf = key.split(".")
    draws = stream(key)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    in_half_to_three_halves = leaf == "running_var" or path[-1:] == ["reduction_w"] or (leaf == "weight" and len(shape) == 1)
    if in_half_to_three_halves:
        values = draws.uniform(0.5, 1.5, shape)
    elif leaf == "coefficients":
        values = draws.standard_normal(shape) * 0.5
    elif len(shape) <= 1 or leaf == "running_mean":
        values = draws.standard_normal(shape) * 0.1
    elif leaf == "templates":
        values = draws.standard_normal(shape) / np.sqrt(np.prod(shape[2:]))
    else:
        if ".gate.conv_" in key:
            gain = 0.2
        elif ".gate.gate." in key:
            gain = 1.0
        values = gain * draws.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return np.asarray(values, np.float64).astype(np.float32)


def golden_input(*shape: int) -> np.ndarray:
    """The fixed batch of images of a shape (N, C, H, W), float32."""
    return stream("input:" + "x".join(map(str, shape))).standard_normal(shape).astype(np.float32)


def digest(output: np.ndarray) -> dict[str, Any]:
    """What was kept of an output: per image the first ten values, three sums and the largest entry's place."""
    rows = np.asarray(output, np.float64).reshape(len(output), -1)
    return {
        "shape": list(rows.shape),
        "first10": rows[:, :10].tolist(),
        "sum": rows.sum(1).tolist(),
        "abs_sum": np.abs(rows).sum(1).tolist(),
        "dot_cos": (rows * np.cos(np.arange(rows.shape[1]))).sum(1).tolist(),
        "argmax": rows.argmax(1).tolist(),
    }
