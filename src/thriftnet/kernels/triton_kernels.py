"""The GPU kernels themselves, in Triton. Imported only where one of them runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def shift_kernel(  # type: ignore[no-untyped-def]
    x, gate, out, total, channels, height, width, moved, dilation, direction,
    sn, sc, sh, sw, gn, gc, gh, gw, yn, yc, yh, yw,
    K: tl.constexpr, RELU: tl.constexpr, GATED: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One output value per lane, in the order in which the output lies in memory (LAST: channels_last; WIDE: places need 64 bits)."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
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


@triton.jit  # type: ignore[untyped-decorator]
def pointwise_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, rows, ins, outs, height, width, out_height, out_width, moved, dilation, stride,
    sn, sc, sh, sw, yn, yc, yh, yw,
    K: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """``out[m, o] = sum_c shifted[m, c] * weight[o, c]``: the shifted map is read where it lies and never written."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    n = (m // (out_height * out_width)).to(tl.int64)
    h, w = m // out_width % out_height, m % out_width
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(0, ins, INS):
        c = start + tl.arange(0, INS)
        step = tl.where(c < moved, dilation, 0)
        from_h = (h * stride)[:, None] + (step * ((c // K) % K - K // 2))[None, :]
        from_w = (w * stride)[:, None] + (step * (c % K - K // 2))[None, :]
        inside = (from_h >= 0) & (from_h < height) & (from_w >= 0) & (from_w < width)
        mask = inside & (m < rows)[:, None] & (c < ins)[None, :]
        value = tl.load(x + n[:, None] * sn + c[None, :] * sc + from_h * sh + from_w * sw, mask=mask, other=0.0)
        if RELU:
            value = tl.where(value < 0, 0.0, value)
        factor = tl.load(weight + o[None, :] * ins + c[:, None], mask=(o < outs)[None, :] & (c < ins)[:, None], other=0.0)
        total = tl.dot(value, factor.to(value.dtype), total, input_precision="ieee")
    place = out + n[:, None] * yn + o[None, :] * yc + h[:, None] * yh + w[:, None] * yw
    tl.store(place, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (o < outs)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def pointwise_input_kernel(  # type: ignore[no-untyped-def]
    grad, weight, out, x, rows, ins, outs, height, width, out_height, out_width, moved, dilation, stride,
    gn, gc, gh, gw, yn, yc, yh, yw, sn, sc, sh, sw,
    K: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Gradient of the input: ``grad @ weight``, each value stored where the forward read it. ``out`` starts as zeros."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * INS + tl.arange(0, INS)
    n = (m // (out_height * out_width)).to(tl.int64)
    h, w = m // out_width % out_height, m % out_width
    total = tl.zeros((ROWS, INS), tl.float32)
    for start in range(0, outs, OUTS):
        o = start + tl.arange(0, OUTS)
        value = tl.load(
            grad + n[:, None] * gn + o[None, :] * gc + h[:, None] * gh + w[:, None] * gw,
            mask=(m < rows)[:, None] & (o < outs)[None, :],
            other=0.0,
        )
        factor = tl.load(weight + o[:, None] * ins + c[None, :], mask=(o < outs)[:, None] & (c < ins)[None, :], other=0.0)
        total = tl.dot(value, factor.to(value.dtype), total, input_precision="ieee")
    step = tl.where(c < moved, dilation, 0)
    to_h = (h * stride)[:, None] + (step * ((c // K) % K - K // 2))[None, :]
    to_w = (w * stride)[:, None] + (step * (c % K - K // 2))[None, :]
    inside = (to_h >= 0) & (to_h < height) & (to_w >= 0) & (to_w < width) & (m < rows)[:, None] & (c < ins)[None, :]
    if RELU:
        passed = tl.load(x + n[:, None] * sn + c[None, :] * sc + to_h * sh + to_w * sw, mask=inside, other=0.0)
        total = tl.where(passed <= 0, 0.0, total)
    place = out + n[:, None] * yn + c[None, :] * yc + to_h * yh + to_w * yw
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def pointwise_weight_kernel(  # type: ignore[no-untyped-def]
    grad, x, out, rows, share, ins, outs, height, width, out_height, out_width, moved, dilation, stride,
    gn, gc, gh, gw, sn, sc, sh, sw,
    K: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight over one share of the rows, (parts, O, C): ``sum_m grad[m, o] * shifted[m, c]``."""
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    c = tl.program_id(1) * INS + tl.arange(0, INS)
    part = tl.program_id(2)
    step = tl.where(c < moved, dilation, 0)
    dh, dw = step * ((c // K) % K - K // 2), step * (c % K - K // 2)
    total = tl.zeros((OUTS, INS), tl.float32)
    for start in range(0, share, ROWS):
        local = start + tl.arange(0, ROWS)
        m = part * share + local
        valid = (local < share) & (m < rows)
        n = (m // (out_height * out_width)).to(tl.int64)
        h, w = m // out_width % out_height, m % out_width
        left = tl.load(
            grad + n[None, :] * gn + o[:, None] * gc + h[None, :] * gh + w[None, :] * gw,
            mask=(o < outs)[:, None] & valid[None, :],
            other=0.0,
        )
        from_h, from_w = (h * stride)[:, None] + dh[None, :], (w * stride)[:, None] + dw[None, :]
        inside = (from_h >= 0) & (from_h < height) & (from_w >= 0) & (from_w < width)
        mask = inside & valid[:, None] & (c < ins)[None, :]
        right = tl.load(x + n[:, None] * sn + c[None, :] * sc + from_h * sh + from_w * sw, mask=mask, other=0.0)
        if RELU:
            right = tl.where(right < 0, 0.0, right)
        total = tl.dot(left, right.to(left.dtype), total, input_precision="ieee")
    place = out + part * outs * ins + o[:, None] * ins + c[None, :]
    tl.store(place, total, mask=(o < outs)[:, None] & (c < ins)[None, :])
