"""How kernels take rows of a weight or of hidden states: which block, where, and how wide.

A program has some rows on their way at a time, 16 bytes of each row a thread where all of them
begin at multiples of that.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, all_registers, threads, warp_size

# A program has this many rows on their way at once. More would take more registers, and short sets
# would not fill them.
ROWS = 8
# Bytes of a row that a thread loads at once; loads of a row that it does where that cannot be.
_THREADS, _LOAD_BYTES, _MOST_LOADS = 128, 16, 4
_MOST_THREADS = 1024


@triton.jit
def block_of(num_blocks):
    """Return what a program is about, and which of its `num_blocks` blocks is the program's."""
    i_program = tl.program_id(0)
    i_whole = i_program // num_blocks
    return i_whole, (i_program - i_whole * num_blocks).to(tl.int64)


@triton.jit
def start(b_row, stride, ALIGNED: tl.constexpr):
    """Return where rows begin that are `stride` apart; with ALIGNED, that is a multiple of 16."""
    b_row = b_row.to(tl.int64)
    # A product is known to be one on every GPU. Hints are lost on some.
    return b_row * (stride // 16) * 16 if ALIGNED else b_row * stride


@triton.jit
def inside(b_lane, i_column, size, ALIGNED: tl.constexpr):
    """Return which columns from `i_column` on are in rows of this size."""
    # As a product, a multiple of 16 is known to be one.
    size = size // 16 * 16 if ALIGNED else size
    return b_lane < size - i_column


def options(rows: Tensor, *lengths: int, whole: int = 0) -> dict[str, int]:
    """Return how kernels are launched on rows of these sizes and strides.

    A program takes blocks of columns or, if their number is given, `whole` rows.
    """
    is_aligned = all(aligned(length) for length in lengths)
    most = _LOAD_BYTES // rows.element_size()
    block = _THREADS * (most if is_aligned else min(most, _MOST_LOADS))
    times = max(1, triton.next_power_of_2(whole) // block)
    launch = threads(_THREADS, 1)
    launch["num_warps"] = min(launch["num_warps"] * times, _MOST_THREADS // warp_size)
    return {
        "ALIGNED": is_aligned,
        # More threads have fewer registers each.
        "BR": ROWS // max(1, min(times // 2, ROWS // 2)),
        "BD": block * times,
        **launch,
        **({} if is_aligned or times > 1 else all_registers()),
    }
