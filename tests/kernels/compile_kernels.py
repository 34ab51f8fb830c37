"""Compile the kernels for a Hopper device, which need not be present, and print their number; run as a script."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halovae.kernels.triton_kernels import copies, norms, softmax


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
    """Compile each kernel for maps of ordinary and of odd sizes and layouts."""
    count = 0

    def compile_all(*calls: tuple[Any, ...]) -> None:
        nonlocal count
        for one in calls:
            compile_one(*one)
            count += 1

    for dtype, wide, values in (("*bf16", tl.float32, "*fp32"), ("*fp64", tl.float64, "*fp64")):
        for cells, channels, size in ((1, 1, 1), (1, 4, 2), (100, 4, 2), (2**31 + 5, 8, 4)):
            width = triton.next_power_of_2(channels)
            block, own = 4096 // width, max(4096 // width, 100)
            group = triton.next_power_of_2(size)
            counted = (values, values, cells, own, channels, cells * channels)
            sizes = (1, cells, own, channels, size, cells * size)
            compile_all(
                (norms._count_moments, dtype, None, dtype, *counted, channels, 1, False, True, block, width, wide),
                (norms._count_moments, *(dtype,) * 3, *counted, 1, cells, True, True, block, width, wide),
                (norms._join_moments, *(values,) * 4, *sizes, 2048 // group, group, wide),
            )
        for frames, height, cols in ((1, 1, 1), (3, 5, 7)):
            place = (frames, height, cols, 4)
            for steps in ((420, 4, 1, 800, 1, 0, 40, 4), (420, 1, 105, 800, 200, 60, 8, 1)):
                norm = (dtype, dtype, dtype, values, values, dtype, dtype, *place, 2, *steps, 1e-6)
                cell = (*place, *steps)
                flags = (1e-12, 0.0, 1.0, True, False, True, 1024, 4, wide)
                compile_all(
                    (norms._write_group_norm, *norm, True, True, True, True, 1024, 4, wide),
                    (norms._write_norm_of_cells, dtype, None, None, dtype, None, *cell, False, False, False, *flags),
                    (norms._write_norm_of_cells, *(dtype,) * 4, None, *cell, True, True, True, *flags),
                    (copies._write_upsampled, dtype, dtype, *cell, 1, 2, 2, 1024, 4),
                    (copies._write_bytes, dtype, "*u8", 420, 4, *place[:3], *steps[3:], 1024),
                )
                for blank in (False, True):
                    sides = (*(dtype,) * 4, 420, 4, *place[:3], *steps[3:], 420, 105, 35, 7, 1)
                    compile_all((copies._copy_sides, *sides, blank, False, 1024))
        for ranks in (1, 4):
            compile_all((norms._join_parts, values, values, values, 64, ranks, 128))
        compile_all(
            (norms._write_sum, dtype, None, dtype, dtype, 100, 4, 1, False, 4096, wide),
            (norms._write_sum, *(dtype,) * 4, 100, 4, 25, True, 4096, wide),
        )
    for columns in (1, 100):
        compile_all((softmax._write_softmax, "*fp32", "*bf16", columns, "fp32", 128))
    print(count)


if __name__ == "__main__":
    main()
