"""Device helpers: where a chunk of a row or a kept set lies, and scans along a chunk."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def chunk(i_begin, i_chunk, length, ALIGNED: tl.constexpr, BT: tl.constexpr):
    """Return the flat position of a chunk of a row, its lanes, and which of them are in the row.

    With ALIGNED, `i_begin` and `length` are multiples of 16, which is what makes wide loads.
    """
    i_flat = tl.full((), 0, tl.int64) + i_begin + i_chunk
    left = tl.minimum(length - i_chunk, BT).to(tl.int32)
    if ALIGNED:
        i_flat = tl.multiple_of(i_flat, 16)
        left = tl.multiple_of(left, 16)
    b_lane = tl.arange(0, BT)
    return i_flat, b_lane, b_lane < left


@triton.jit
def kept_set(p_rows, p_offsets, i_row):
    """Return a row's token, the first pair of its set, and how many pairs that has."""
    token = tl.load(p_rows + i_row)
    first = tl.load(p_offsets + token)
    return token, first, tl.load(p_offsets + token + 1) - first


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_max(b_x):
    """Return the maximum of each lane and those before it."""
    return tl.associative_scan(b_x, 0, _larger)


@triton.jit
def _add_since_reset(a_sum, a_reset, b_sum, b_reset):
    return tl.where(b_reset > 0, b_sum, a_sum + b_sum), tl.maximum(a_reset, b_reset)


@triton.jit
def running_sum(b_x, b_reset):
    """Return sums that begin anew at lanes with `b_reset` > 0, and the largest of those so far.

    The latter is 0 where the sum goes on from before the chunk.
    """
    return tl.associative_scan((b_x, b_reset), 0, _add_since_reset)


@triton.jit
def last(b_x, b_lane, BT: tl.constexpr):
    """Return the value of the last lane."""
    return tl.sum(tl.where(b_lane == BT - 1, b_x, tl.zeros_like(b_x)), 0)


@triton.jit
def by_four(b_x, BT: tl.constexpr):
    """Return sums of four lanes each: a thread then keeps one number of its four."""
    return tl.sum(tl.reshape(b_x, [BT // 4, 4]), 1)


@triton.jit
def deviations(count, mean, spread, b_x, m_x):
    """Add the values at `m_x` to a count, mean and sum of squared deviations from it (Chan)."""
    added = tl.sum(m_x.to(tl.float64), 0)
    added_mean = tl.sum(tl.where(m_x, b_x, 0.0), 0) / tl.where(added > 0, added, 1.0)
    b_deviation = tl.where(m_x, b_x - added_mean, 0.0)
    total = count + added
    shift = added_mean - mean
    share = added / tl.where(total > 0, total, 1.0)
    spread = spread + tl.sum(b_deviation * b_deviation, 0) + shift * shift * count * share
    return total, mean + shift * share, spread


@triton.jit
def combine_deviations(b_count, b_mean, b_spread):
    """Return count, mean and sum of squared deviations of groups that have those."""
    count = tl.sum(b_count, 0)
    mean = tl.sum(b_count * b_mean, 0) / tl.where(count > 0, count, 1.0)
    b_shift = tl.where(b_count > 0, b_mean - mean, 0.0)
    return count, mean, tl.sum(b_spread + b_count * b_shift * b_shift, 0)
