"""SPIN's files: ConvMixers whose pointwise weights lie in lists beside the blocks.

``pwise_w.i`` and ``pwise_b.i`` are those of the i-th shared weight or, in a network that fuses in every forward, of the i-th
layer; then ``reduction_w.i`` is that layer's factor. Tensors do not tell which layers share a weight, nor the activation, nor how
weights of a training file are to be fused. The files carry the configuration as text; stripped ones do not, and need hints.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from thriftnet.errors import CheckpointError
from thriftnet.importing.evidence import IMAGENET_BICUBIC, Evidence, Recognised
from thriftnet.importing.layout import Layout, Slot, renamed
from thriftnet.models.convmixer import ConvMixer
from thriftnet.techniques.weight_sharing import FusedConv2d

HINTS = {
    "mapping": "which layers share a weight: sequential or strided",
    "activation": "relu or gelu",
    "rate": "layers per fused weight",
    "fusion": "how weights are fused in every forward: mean, choose_first, ...",
}
RULES = (
    (r"^stem\.", "patch_embed.conv."),
    (r"^norm\.", "patch_embed.bn."),
    (r"\.depthwise\.", ".dwise_blk.0."),
    (r"\.norm1\.", ".dwise_blk.2."),
    (r"\.norm2\.", ".bn2."),
    (r"^fc\.", "head.fc."),
)
LISTS = {"weight": "pwise_w", "bias": "pwise_b", "members": "pwise_w", "biases": "pwise_b", "scales": "reduction_w"}


def layout(model: ConvMixer, neighbours: bool = False) -> Layout:
    """The place of each of the authors' tensors in a ConvMixer, plain, sharing or fusing.

    Shared weights are numbered by their first use, as the authors' sequential and strided mappings number them. With ``neighbours``
    the i-th group has fused the i-th run of neighbours, whatever the mapping, as the authors' weight_fusion does.
    """
    slots = {theirs: slot for theirs, slot in renamed(model, RULES).items() if ".pointwise." not in slot.key}
    users: dict[int, list[int]] = {}
    for layer, block in enumerate(model.blocks):
        users.setdefault(id(block.pointwise), []).append(layer)
    for number, layers in enumerate(users.values()):
        prefix = f"blocks.{layers[0]}.pointwise"
        pointwise = model.get_submodule(prefix)
        if neighbours:
            layers = list(range(number * len(layers), (number + 1) * len(layers)))
        for name, _ in pointwise.named_parameters():
            if isinstance(pointwise, FusedConv2d):
                slots |= {f"{LISTS[name]}.{layer}": Slot(f"{prefix}.{name}", (j,)) for j, layer in enumerate(layers)}
            else:
                slots[f"{LISTS[name]}.{number}"] = Slot(f"{prefix}.{name}")
    return slots


def recognise(evidence: Evidence) -> Recognised | None:
    """A ConvMixer of SPIN's repository, or None."""
    if not evidence.has("patch_embed.conv.weight", "pwise_w.0", "head.fc.weight"):
        return None
    config = read_config(evidence.metadata.get("cfg"))
    dim, _, patch, _ = evidence.shape("patch_embed.conv.weight", 4)
    stride, padding = config.get("CONVMIXER.PATCH_STRIDE", str(patch)), config.get("CONVMIXER.PATCH_PADDING", "0")
    if (stride, padding) != (str(patch), "0"):
        raise CheckpointError(
            f"its patches of {patch} pixels have stride {stride} and padding {padding}: the zoo's ConvMixer has stride {patch} and 0"
        )
    stated = config.get("CONVMIXER.ACT_FUNC")
    depth = evidence.count(r"^blocks\.(\d+)\.")
    kwargs = {
        "dim": dim,
        "depth": depth,
        "patch_size": patch,
        "kernel_size": evidence.shape("blocks.0.dwise_blk.0.weight", 4)[2],
        "activation": evidence.hint("activation", stated and stated.lower(), "relu"),
        **evidence.classes_and_channels("head.fc.weight", "patch_embed.conv.weight"),
    }
    name, sharing = _sharing(evidence, depth, config)
    moved = name == "wfws_convmixer" and sharing["mapping"] == "strided"
    return evidence.network(name, kwargs | sharing, partial(layout, neighbours=moved), IMAGENET_BICUBIC)


def _sharing(evidence: Evidence, depth: int, config: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The name in the zoo, and the arguments of the sharing."""
    weights = evidence.count(r"^pwise_w\.(\d+)$")
    stated = config.get("CONVMIXER.WEIGHT_SHARE.SHARE_RATE", "")
    if weights > depth:
        raise CheckpointError(f"it has {weights} pointwise weights for {depth} blocks: expected at most one per block")
    if weights < depth:
        which = _mapping(evidence, config)
        if "distribution" in which:
            return "ws_convmixer", {"rate": int(stated) if stated.isdigit() else 2, **which}
        if depth % weights:
            raise CheckpointError(
                f"it has {weights} pointwise weights for {depth} blocks: expected a number that divides them"
            )
        _leave_out_fusion(evidence, config)
        return "ws_convmixer", {"rate": depth // weights, **which}
    fusion = _fusion(evidence, config)
    if fusion is None:
        return "convmixer", {}
    rate = evidence.hint("rate", int(stated) if stated.isdigit() else None, 2)
    which = _mapping(evidence, config)
    if which["mapping"] == "strided":
        evidence.notes.append(
            "The authors fuse neighbours under the strided mapping, too: the weights are placed so that it computes the same."
        )
    return "wfws_convmixer", {"rate": rate, "fusion": fusion, **which}


def _leave_out_fusion(evidence: Evidence, config: Mapping[str, str]) -> None:
    """Drop what fuse_weights.py leaves in a file whose weights are fused."""
    stray = [key for key in evidence.tensors if key.startswith("reduction_w.")]
    for key in stray:
        del evidence.tensors[key]
    if stray:
        evidence.notes.append(
            f"{len(stray)} tensors reduction_w.* were left out: the weights are fused already, and nothing uses them."
        )
    if config.get("CONVMIXER.WEIGHT_SHARE.REDUCTION_FN"):
        evidence.notes.append(
            "The file's configuration states a fusion, but its weights are fused already: it is a plain sharing network."
        )


def _fusion(evidence: Evidence, config: Mapping[str, str]) -> str | None:
    """How the weights of all layers are fused in every forward; None when each layer uses its own."""
    if evidence.count(r"^reduction_w\.(\d+)$"):
        factor = evidence.tensors["reduction_w.0"]
        return "scalar_weighted_mean" if factor.numel() == 1 and factor.ndim else "channel_weighted_mean"
    if "fusion" in evidence.hints:
        return None if evidence.hints["fusion"] is None else str(evidence.hints["fusion"])
    if config:
        enabled = config.get("CONVMIXER.WEIGHT_SHARE.ENABLE", "").lower() == "true"
        return (config.get("CONVMIXER.WEIGHT_SHARE.REDUCTION_FN") or None) if enabled else None
    if "rate" in evidence.hints or "mapping" in evidence.hints:
        return str(evidence.hint("fusion", None, "mean"))
    evidence.notes.append(
        "Each layer is taken to use its own weight, as the file states no configuration; for one that was saved while it "
        "fuses weights by their mean or by choose_first, give fusion=... and rate=..."
    )
    return None


def _mapping(evidence: Evidence, config: Mapping[str, str]) -> dict[str, Any]:
    """The mapping, and the distribution where it is not uniform."""
    share = "CONVMIXER.WEIGHT_SHARE.SHARING_"
    mapping = evidence.hint("mapping", config.get(f"{share}MAPPING"), "sequential")
    if mapping not in ("sequential", "strided"):
        raise CheckpointError(
            f"mapping={mapping!r}: expected sequential or strided; a random mapping cannot be recovered from a file"
        )
    distribution = config.get(f"{share}DISTRIBUTION", "uniform")
    return {"mapping": mapping} | ({} if distribution == "uniform" else {"distribution": distribution})


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
        if not colon or name.startswith(("-", "#")):
            continue
        indent = len(line) - len(line.lstrip())
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, name))
        key, plain = ".".join(part for _, part in path), value.strip().strip("'\"")
        if key.startswith("CONVMIXER.") and plain and plain not in ("null", "None", "~"):
            values[key] = plain
    return values
