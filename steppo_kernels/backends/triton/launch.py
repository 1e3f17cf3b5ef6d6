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
# Tiles by mean step length, each (largest mean length, steps per block, tokens per block). A thread
# then holds one or two steps and keeps a dozen sums of each.
_STEP_TILES = ((2, 256, 1), (32, 32, 16), (256, 4, 128))
_LONG_STEP_TILE = (1, 512)
STEP_THREADS = 256
# Threads of a warp: 32 on NVIDIA, 64 on the AMD GPUs that torch supports best (gfx9).
warp_size = 64 if torch.version.hip else 32


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


def step_tile(num_tokens: int, num_steps: int) -> tuple[int, int]:
    """Return the steps and tokens of a block, by the mean step length."""
    for mean, steps, tokens in _STEP_TILES:
        if num_tokens <= mean * num_steps:
            return steps, tokens
    return _LONG_STEP_TILE


def threads(block: int, elements: int = 4) -> dict[str, int]:
    """Return launch options for `block` elements: `elements` a thread, in at most 256 threads.

    Fused multiply-adds are asked for by name as Triton 3.9 warns where they are left open.
    """
    count = max(1, min(256, block // elements) // warp_size)
    return {"num_warps": count, "enable_fp_fusion": True}


def all_registers() -> dict[str, int]:
    """Return the launch option that stops ptxas from spilling to fit one more block."""
    return {} if warp_size == 64 else {"maxnreg": 255}


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
