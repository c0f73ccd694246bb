"""SPIN's files: ConvMixers whose pointwise weights lie in lists beside the blocks.

Tensors do not tell which layers share a weight, nor the activation, nor how weights of a training file are to be fused. The
files carry the configuration as text; stripped ones do not, and need hints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thriftnet.errors import CheckpointError
from thriftnet.importing.layout import Layout, Slot
from thriftnet.importing.recognised import (
    IMAGENET,
    Recognised,
    Tensors,
    count,
    positive_int,
    resolve_hint,
    shape,
    shared_arguments,
)
from thriftnet.importing.weight_sharing_layout import convmixer_layout
from thriftnet.models.convmixer import ConvMixer

HINTS = {
    "mapping": "which layers share a weight: sequential or strided",
    "activation": "relu or gelu",
    "rate": "layers per fused weight",
    "fusion": "how weights are fused in every forward: mean, choose_first, ...",
}
LISTED = ("pwise_w.", "pwise_b.", "reduction_w.")


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A ConvMixer of SPIN's repository, or None."""
    if not {"patch_embed.conv.weight", "pwise_w.0", "head.fc.weight"} <= set(tensors):
        return None
    notes: list[str] = []
    config = read_config(metadata.get("cfg"))
    dim, channels, patch, _ = shape(tensors, "patch_embed.conv.weight", 4)
    _check_stride(patch, config)
    stated = config.get("CONVMIXER.ACT_FUNC")
    kwargs = {
        "dim": dim,
        "depth": count(tensors, r"^blocks\.(\d+)\."),
        "patch_size": patch,
        "kernel_size": shape(tensors, "blocks.0.dwise_blk.0.weight", 4)[2],
        "activation": resolve_hint("activation", stated and stated.lower(), hints, "relu", notes),
        **shared_arguments(shape(tensors, "head.fc.weight", 2)[0], channels),
    }
    name, sharing, left_out = _sharing(tensors, kwargs["depth"], config, hints, notes)
    kept = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    layout = neighbours_layout if sharing.get("mapping") == "strided" and name == "wfws_convmixer" else convmixer_layout
    return Recognised(name, kwargs | sharing, layout, kept, tuple(notes), IMAGENET)


def _sharing(
    tensors: Tensors, depth: int, config: Mapping[str, str], hints: Mapping[str, Any], notes: list[str]
) -> tuple[str, dict[str, Any], set[str]]:
    """Name in the zoo, arguments of the sharing, and keys that nothing uses."""
    weights, scales = count(tensors, r"^pwise_w\.(\d+)$"), count(tensors, r"^reduction_w\.(\d+)$")
    stated = config.get("CONVMIXER.WEIGHT_SHARE.SHARE_RATE", "")
    if weights > depth:
        raise CheckpointError(f"it has {weights} pointwise weights for {depth} blocks: possible is at most one for each")
    if weights < depth:
        which = _which(config, hints, notes)
        if "distribution" in which:
            return "ws_convmixer", {"rate": int(stated) if stated.isdigit() else 2, **which}, set()
        if depth % weights:
            raise CheckpointError(f"it has {weights} pointwise weights for {depth} blocks: one must serve equally many")
        stray = {key for key in tensors if key.startswith("reduction_w.")}
        if stray:
            notes.append(
                f"{len(stray)} tensors reduction_w.* were left out: the weights are fused already, and nothing uses them."
            )
        if config.get("CONVMIXER.WEIGHT_SHARE.REDUCTION_FN"):
            notes.append(
                "The file's configuration states a fusion, but its weights are fused already: it is a plain sharing network."
            )
        return "ws_convmixer", {"rate": depth // weights, **which}, stray
    fusion = _fusion(tensors, scales, config, hints, notes)
    if fusion is None:
        return "convmixer", {}, set()
    rate = positive_int("rate", resolve_hint("rate", int(stated) if stated.isdigit() else None, hints, 2, notes))
    which = _which(config, hints, notes)
    if which["mapping"] == "strided":
        notes.append(
            "The authors fuse neighbours under the strided mapping, too: the weights are placed so that it computes the same."
        )
    return "wfws_convmixer", {"rate": rate, "fusion": fusion, **which}, set()


def _fusion(
    tensors: Tensors, scales: int, config: Mapping[str, str], hints: Mapping[str, Any], notes: list[str]
) -> str | None:
    """How the weights of all layers are fused in every forward; None when each layer uses its own."""
    if scales:
        dims = tuple(tensors["reduction_w.0"].shape)
        return "scalar_weighted_mean" if tensors["reduction_w.0"].numel() == 1 and dims != () else "channel_weighted_mean"
    if "fusion" in hints:
        return None if hints["fusion"] is None else str(hints["fusion"])
    if config:
        enabled = config.get("CONVMIXER.WEIGHT_SHARE.ENABLE", "").lower() == "true"
        return (config.get("CONVMIXER.WEIGHT_SHARE.REDUCTION_FN") or None) if enabled else None
    if "rate" in hints or "mapping" in hints:
        return str(resolve_hint("fusion", None, hints, "mean", notes))
    notes.append(
        "Each layer is taken to use its own weight, as the file states no configuration; for one that was saved while it "
        "fuses weights by their mean or by choose_first, give fusion=... and rate=..."
    )
    return None


def _which(config: Mapping[str, str], hints: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The mapping, and the distribution where it is not uniform."""
    share = "CONVMIXER.WEIGHT_SHARE.SHARING_"
    which = {"mapping": resolve_hint("mapping", config.get(f"{share}MAPPING"), hints, "sequential", notes)}
    if which["mapping"] not in ("sequential", "strided"):
        raise CheckpointError(
            f"mapping={which['mapping']!r}: possible are sequential and strided; a random one cannot be told from a file"
        )
    distribution = config.get(f"{share}DISTRIBUTION", "uniform")
    return which if distribution == "uniform" else which | {"distribution": distribution}


def _check_stride(patch: int, config: Mapping[str, str]) -> None:
    stride, padding = config.get("CONVMIXER.PATCH_STRIDE", str(patch)), config.get("CONVMIXER.PATCH_PADDING", "0")
    if (stride, padding) != (str(patch), "0"):
        raise CheckpointError(
            f"its patches of {patch} pixels have stride {stride} and padding {padding}: the zoo's ConvMixer has stride {patch} and 0"
        )


def neighbours_layout(model: ConvMixer) -> Layout:
    """Of a network that fuses under the strided mapping: the i-th group has fused the i-th run of neighbours.

    Source: the authors' weight_fusion, which takes the weights i * rate + j whatever the mapping.
    """
    slots = convmixer_layout(model)
    groups: dict[str, int] = {}
    moved = {}
    for key, slot in slots.items():
        if key.startswith(LISTED):
            place = slot.key.rpartition(".")[0]
            group = groups.setdefault(place, len(groups))
            rate = len(model.get_parameter(slot.key))
            moved[f"{key.partition('.')[0]}.{group * rate + slot.index[0]}"] = Slot(slot.key, slot.index)
        else:
            moved[key] = slot
    return moved


def read_config(text: object) -> dict[str, str]:
    """The values in the section CONVMIXER of a configuration as text, by their path.

    Example:
        >>> read_config("CONVMIXER:\\n  DEPTH: 8\\n  WEIGHT_SHARE:\\n    ENABLE: true\\nDATA:\\n  MEAN: 1\\n")
        {'CONVMIXER.DEPTH': '8', 'CONVMIXER.WEIGHT_SHARE.ENABLE': 'true'}
    """
    values: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines() if isinstance(text, str) else ():
        name, colon, value = line.strip().partition(":")
        if not colon or line.lstrip().startswith(("-", "#")):
            continue
        indent = len(line) - len(line.lstrip())
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, name))
        whole_name = ".".join(part for _, part in path)
        plain = value.strip().strip("'\"")
        if whole_name.startswith("CONVMIXER.") and plain and plain not in ("null", "None", "~"):
            values[whole_name] = plain
    return values
