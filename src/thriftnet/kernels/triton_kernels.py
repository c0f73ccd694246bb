"""The GPU kernels themselves, in Triton. Imported only where one of them runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def shift_kernel(  # type: ignore[no-untyped-def]
    x, gate, out, total, channels, height, width, moved, dilation, direction,
    sn, sc, sh, sw, gn, gc, gh, gw, yn, yc, yh, yw,
    K: tl.constexpr, RELU: tl.constexpr, GATED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One output value per lane, in the order in which the output lies in memory (LAST: channels_last)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    if LAST:
        c = i % channels
        w = (i // channels) % width
        h = (i // channels // width) % height
    else:
        w = i % width
        h = (i // width) % height
        c = (i // width // height) % channels
    n = i // channels // width // height
    step = tl.where(c < moved, dilation * direction, 0)
    from_h = h + step * ((c // K) % K - K // 2)
    from_w = w + step * (c % K - K // 2)
    readable = inside & (from_h >= 0) & (from_h < height) & (from_w >= 0) & (from_w < width)
    value = tl.load(x + n * sn + c * sc + from_h * sh + from_w * sw, mask=readable, other=0.0)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # keeps NaN, as torch does
    if GATED:
        passed = tl.load(gate + n * gn + c * gc + h * gh + w * gw, mask=inside, other=0.0)
        value = tl.where(passed <= 0, 0.0, value)
    tl.store(out + n * yn + c * yc + h * yh + w * yw, value, mask=inside)
