"""Compile every GPU kernel for one generation of GPUs, which needs no GPU: the interpreter does not see what the compiler refuses."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thriftnet.kernels import triton_kernels
from thriftnet.kernels.triton_pointwise import INS, OUTS, ROWS

BLOCKS = {"ROWS": ROWS, "OUTS": OUTS, "INS": INS}
KERNELS = {
    "shift_kernel": (
        ("x", "gate", "out"),
        [{"GATED": gated, "LAST": last, "WIDE": last, "BLOCK": 1024} for gated, last in ((0, 0), (1, 1))],
    ),
    "pointwise_kernel": (("x", "weight", "out"), [BLOCKS]),
    "pointwise_input_kernel": (("grad", "weight", "out", "x"), [BLOCKS]),
    "pointwise_weight_kernel": (("grad", "x", "out"), [BLOCKS]),
}


def main() -> None:
    count = 0
    for name, (tensors, variants) in KERNELS.items():
        kernel = getattr(triton_kernels, name)
        for value_type in ("fp32", "bf16", "fp16"):
            for constants in variants:
                fixed = {
                    "K": 3,
                    "RELU": True,
                    **{key: value if value > 1 else bool(value) for key, value in constants.items()},
                }
                types = {
                    argument: "constexpr" if argument in fixed else f"*{value_type}" if argument in tensors else "i32"
                    for argument in kernel.arg_names
                }
                if name == "pointwise_weight_kernel":
                    types["out"] = "*fp32"
                triton.compile(ASTSource(kernel, types, fixed), target=GPUTarget("cuda", 90, 32))
                count += 1
    print(f"{count} kernels compile")


if __name__ == "__main__":
    main()
