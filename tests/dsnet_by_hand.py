"""A supernet of inverted residuals and separable blocks with shortcuts, written out one operation after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftnet.models.dsnet import DSNet
from thriftnet.models.dsnet_blocks import divisible

STAGES: tuple[Any, ...] = (
    ((8, 12), 2, 3, 1, "ir", False),
    ((8, 12, 16), 2, 3, 2, "ir", True),
    ((16, 20, 24), 2, 3, 1, "ds", False),
)


@torch.no_grad()
def run(model: DSNet, x: Tensor, which: int) -> Tensor:
    """A network of `STAGES` with shortcuts, written out for one sub-network, from the stored tensors."""
    state = model.state_dict()

    def conv(x: Tensor, key: str, outs: int, stride: int = 1) -> Tensor:
        weight, bias = state[f"{key}.weight"], state.get(f"{key}.bias")
        groups = outs if weight.shape[1] == 1 else 1
        weight = weight[:outs, : x.shape[1] // groups]
        return F.conv2d(x, weight, None if bias is None else bias[:outs], stride, weight.shape[-1] // 2, 1, groups)

    def norm(x: Tensor, key: str, store: str) -> Tensor:
        channels = x.shape[1]
        mean, var = state[f"{key}.running_mean{store}"], state[f"{key}.running_var{store}"]
        scale = state[f"{key}.weight"][:channels] / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{key}.bias"][:channels, None, None]

    def attention(x: Tensor, key: str) -> Tensor:
        reduced = conv(x.mean((2, 3), keepdim=True), f"{key}.reduce", len(state[f"{key}.reduce.bias"])).relu()
        return x * conv(reduced, f"{key}.expand", x.shape[1]).sigmoid()

    def shortcut(x: Tensor, key: str, stride: int) -> Tensor:
        if stride == 2:
            x = F.avg_pool2d(x, 2, 2, 0, ceil_mode=True, count_include_pad=False)
        place = f"{key}.shortcut.{int(stride == 2)}"
        return conv(x, place, outs) if f"{place}.weight" in state else x

    def store(last: bool, number: int) -> str:
        return "" if last else f"_{number}"

    ins, before = 8, store(False, 0)
    x = F.silu(norm(conv(x, "stem", 8, 2), "norm", before))
    for stage, (possible, blocks, _, stride, kind, _) in enumerate(STAGES):
        outs = possible[which if stage else 0]
        after = store(which == len(possible) - 1, which) if stage else before
        for block in range(blocks):
            key, step = f"stages.{stage}.{block}", stride if block == 0 else 1
            if kind == "ir":
                middle = divisible(6 * ins, 8)
                out = F.silu(norm(conv(x, f"{key}.expand", middle), f"{key}.norm1", before))
                out = F.silu(norm(conv(out, f"{key}.depthwise", middle, step), f"{key}.norm2", before))
                out = norm(conv(attention(out, f"{key}.se"), f"{key}.project", outs), f"{key}.norm3", after)
            else:
                out = F.silu(norm(conv(x, f"{key}.depthwise", ins, step), f"{key}.norm1", before))
                out = F.silu(norm(conv(attention(out, f"{key}.se"), f"{key}.pointwise", outs), f"{key}.norm2", after))
            x, ins, before = out + shortcut(x, key, step), outs, after
    return F.linear(x.mean((2, 3)), state["fc.weight"][:, :ins], state["fc.bias"])
