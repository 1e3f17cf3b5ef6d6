"""What the launchers share on the host: grids, block sizes, alignment, scalars."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# Programs that leave partial sums. Fixed, not the number of processors: the order of a sum, and so
# its last bit, must not depend on the device.
MAX_PROGRAMS = 1024
# Tokens that one program of an element-wise kernel takes at a time.
FLAT_BLOCK = 2048
# Block sizes along a row: few, so that lengths share their compiled kernels.
_ROW_BLOCKS = (16, 128, 1024)
# Blocks of steps: mean number of tokens up to which, steps, tokens, warps.
_STEP_TILES = ((2, 1024, 1, 4), (32, 64, 16, 4), (256, 8, 128, 4))
_LONG_STEP_TILE = (1, 2048, 8)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def programs(blocks: int) -> int:
    """Return how many programs share `blocks` blocks, at least one."""
    return max(1, min(blocks, MAX_PROGRAMS))


def row_block(row_length: int) -> int:
    """Return the block size for rows of about `row_length` tokens."""
    return next((size for size in _ROW_BLOCKS if size >= row_length), _ROW_BLOCKS[-1])


def step_tile(num_tokens: int, num_steps: int) -> tuple[int, int, int]:
    """Return steps and tokens of a block, and its number of warps, by the mean step length."""
    for mean, *tile in _STEP_TILES:
        if num_tokens <= mean * num_steps:
            steps, tokens, count = tile
            return steps, tokens, count
    return _LONG_STEP_TILE


def warps(block: int) -> int:
    """Return the number of warps for `block` elements: 8 a thread where there are enough."""
    return max(1, min(8, block // 256))


def aligned(length: int) -> bool:
    """Return whether rows of this length all begin and end at multiples of 16 elements.

    Then four 32-bit words are loaded at once. This is the only property of a length that kernels
    are compiled for.
    """
    return length % 16 == 0


def scalar(value: Tensor | None, device: torch.device) -> tuple[Tensor | None, float]:
    """Return a 0-dim tensor as (pointer, number), of which the kernel reads one.

    One on the device goes by pointer, so that nothing waits for it.
    """
    if value is None:
        return None, 0.0
    if value.device == device:
        return value, 0.0
    return None, float(value)
