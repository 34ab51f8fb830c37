"""Compile the kernels for a Hopper device, which need not be present, and print their number; run as a script."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halovae.plane import triton_kernels as kernels


def compile_one(function: Any, *arguments: Any) -> None:
    """Compile a kernel.

    Args:
        function: the kernel.
        arguments: pointers by their types, integers, constants, or None.
    """
    kinds: dict[str, str] = {}
    constants = {}
    for index, (parameter, value) in enumerate(zip(function.params, arguments, strict=True)):
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        fixed = parameter.is_constexpr or value is None or is_one
        kinds[parameter.name] = "constexpr" if fixed else value if isinstance(value, str) else _integer(value)
        if fixed:
            constants[(index,)] = value
    triton.compile(ASTSource(function, kinds, constants), target=GPUTarget("cuda", 90, 32))


def _integer(value: int) -> str:
    return "i32" if value < 2**31 else "i64"


def main() -> None:
    """Compile each kernel for maps of ordinary and of odd sizes."""
    count = 0
    for dtype, wide, values in (("*bf16", tl.float32, "*fp32"), ("*fp64", tl.float64, "*fp64")):
        for cells, channels, size in ((1, 1, 1), (1, 4, 2), (100, 4, 2), (2**31 + 5, 8, 4)):
            width = triton.next_power_of_2(channels)
            block, own = 4096 // width, max(4096 // width, 100)
            group = triton.next_power_of_2(size)
            moments = (dtype, dtype, values, values, cells, own, channels)
            compile_one(kernels._count_moments, *moments, True, block, width, wide)
            sizes = (1, cells, own, channels, size, cells * size)
            compile_one(kernels._join_moments, *(values,) * 4, *sizes, 2048 // group, group, wide)
            count += 2
        for frames, height, cols in ((1, 1, 1), (3, 5, 7)):
            place = (frames, height, cols, 4)
            norm = (dtype, dtype, dtype, values, values, dtype, dtype, *place, 2, 100, 0, 1, 1e-6)
            compile_one(kernels._write_group_norm, *norm, True, True, True, True, 1024, 4, wide)
            plain = (dtype, None, dtype, None, *place, 100, 0, 1, False, 1e-12, 0.0, 1.0, True, False, True)
            compile_one(kernels._write_norm_of_cells, *plain, 1024, 4, wide)
            compile_one(kernels._write_upsampled, dtype, dtype, *place, 1, 2, 2, 1024, 4)
            count += 3
        for ranks in (1, 4):
            compile_one(kernels._join_parts, values, values, values, 64, ranks, 128)
        compile_one(kernels._write_sum, dtype, None, dtype, dtype, 100, 4, False, 4096, wide)
        compile_one(kernels._write_sum, *(dtype,) * 4, 100, 4, True, 4096, wide)
        count += 4
    for columns in (1, 100):
        compile_one(kernels._write_softmax, "*fp32", "*bf16", columns, "fp32", 128)
    print(count + 2)


if __name__ == "__main__":
    main()
