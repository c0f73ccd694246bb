"""The options that several verbs take, and the types of options; a type's error follows the option's name."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thriftnet.arguments import (
    BatchSize,
    Count,
    Deviations,
    Index,
    InputSize,
    Means,
    Operations,
    PositiveShare,
    Side,
    Threads,
    Workers,
    check,
    expected,
    shown,
)

MODEL_HELP = (
    "a name of the zoo, timm:NAME, torchvision:NAME, package.module:callable, hf-hub:OWNER/NAME, a saved folder, a run, "
    "or a checkpoint file"
)
PLAIN_HELP = "what builds the plain network of a saved one that is not in the zoo, as package.module:callable"
DATA_HELP = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, parquet:DIR or hf:OWNER/NAME"


def reads(hint: Any) -> Callable[[str], Any]:
    """What reads an option's text as an annotation says: a number, or numbers with commas between them.

    Example:
        >>> reads(Threads)("4"), reads(InputSize)("3,32,32")
        (4, (3, 32, 32))
    """
    kind = float if "float" in str(hint) else int
    is_list = "tuple" in str(hint)

    def read(text: str) -> Any:
        try:
            values = tuple(kind(part) for part in text.split(","))
            return check("", values if is_list or len(values) > 1 else values[0], hint)
        except ValueError:  # not a number, one of thousands of digits, or a ConfigError
            raise ArgumentTypeError(f"{shown(text)[1:-1]}: expected {expected(hint)}") from None

    return read


def quantity(text: str) -> float:
    """A number of operations that may end in K, M or G.

    Example:
        >>> quantity("1.5M")
        1500000.0
    """
    factor = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 0.0)
    try:
        return check("", float(text[:-1]) * factor if factor else float(text), Operations)
    except ValueError:  # also ConfigError
        problem = f"{shown(text)[1:-1]}: expected {expected(Operations)}, as 300000000 or 300M"
        raise ArgumentTypeError(problem) from None


def svg_file(text: str) -> Path:
    """A file to draw to."""
    if not text.endswith(".svg"):
        raise ArgumentTypeError(f"{text}: give a name that ends in .svg")
    return Path(text)


def width_from(text: str) -> float | str:
    """A width: a ratio, or a name.

    Example:
        >>> width_from("0.5"), width_from("largest")
        (0.5, 'largest')
    """
    try:
        return float(text)
    except ValueError:
        return text.strip()


# The options that several verbs take, with the arguments of `add_argument`
MACHINE_OPTIONS: dict[str, dict[str, Any]] = {
    "--threads": {
        "type": reads(Threads),
        "metavar": "N",
        "help": "threads within an operation; default: 1 for single images",
    },
    "--fast-malloc": {
        "action": "store_true",
        "help": "let glibc keep freed memory (Linux): faster steps, memory stays at its peak",
    },
}
IMAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {"metavar": "D", "required": True, "help": DATA_HELP},
    "--plain": {"metavar": "MODEL", "help": PLAIN_HELP},
    "--batch-size": {"type": reads(BatchSize), "default": 256, "metavar": "N", "help": "images at a time"},
    "--device": {"metavar": "cpu|cuda", "help": "default: a GPU where there is one"},
    "--mean": {"type": reads(Means), "metavar": "M,M,M", "help": "each in [0, 1]; default: the network's, else the data's"},
    "--std": {"type": reads(Deviations), "metavar": "S,S,S", "help": "the same"},
    "--image-size": {"type": reads(Side), "metavar": "PIXELS", "help": "default: the network's, else as stored"},
    "--resize": {"type": reads(Side), "metavar": "PIXELS", "help": "shorter side before the centre crop to the image size"},
    "--crop-pct": {
        "type": reads(PositiveShare),
        "metavar": "SHARE",
        "help": "instead: image size as a share of that side, as 0.875",
    },
    "--interpolation": {"choices": ["nearest", "bilinear", "bicubic"], "help": "of resizing; default: the network's"},
    "--limit": {"type": reads(Count), "metavar": "N", "help": "only N images, evenly spread over the split"},
    "--workers": {"type": reads(Workers), "default": 0, "metavar": "N", "help": "processes that decode images"},
    "--on-corrupt": {"choices": ["error", "skip"], "default": "error", "help": "stop at a broken image, or skip it"},
    **MACHINE_OPTIONS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": MODEL_HELP},
    "--technique": {
        "metavar": "T",
        "help": "as 'soft-sharing(templates=2)', or \"{'layer4': 'soft-sharing', 'layer3': 'shift'}\" by patterns on names; "
        "docs/techniques lists the fields",
    },
    "--select": {"metavar": "REGEX", "help": "which layers, by name; default: all but the stem and the classifier"},
    "--exclude": {"metavar": "REGEX", "help": "which of them to leave alone"},
    "--params": {"metavar": "N", "help": "at most so many stored parameters: a share of what it has, as 0.5, or 300K"},
    "--macs": {"metavar": "N", "help": "at most so many multiply-accumulates for one image: 0.5, or 300M"},
    "--bytes": {"metavar": "N", "help": "at most so many bytes of parameters and buffers: 0.5, or 1MB"},
    "--output": {"metavar": "FOLDER", "required": True, "help": "where to save the network"},
    "--input-size": {
        "type": reads(InputSize),
        "metavar": "C,H,W",
        "help": "of images, as 3,32,32; default: the network's own",
    },
    "--width": {"type": width_from, "metavar": "W", "help": "one of the network's ratios, as 0.5, or smallest or largest"},
    "--width-index": {"type": reads(Index), "metavar": "I", "help": "instead: index into its list of widths, from 0"},
    **IMAGE_OPTIONS,
}
