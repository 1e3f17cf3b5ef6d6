"""Step-level generalized advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t ;  A_t = delta_t + gamma lambda A_{t+1} ;  R_t = A_t + V_t

The recurrence is a scan of affine maps x -> a x + b over a trajectory read from its end. Token
rewards are first added up by step; advantages are whitened last.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Timeline, record
from .launch import MAX_PROGRAMS, cdiv, device_guard, programs, row_block, threads
from .tiles import combine_deviations, deviations, last, running_max, running_sum

_LENGTHS = ["num_rows", "num_steps", "num_trajectories", "num_entries", "num_partials"]
# Blocks of trajectories: mean number of steps up to which, trajectories, steps.
_TRAJECTORY_TILES = ((8, 64, 4), (128, 8, 32))
_LONG_TRAJECTORY_TILE = (1, 1024)
_WHITEN_BLOCK = 1024


@triton.jit(do_not_specialize=_LENGTHS)
def step_rewards_kernel(
    p_rewards,
    p_step_ids,
    p_row_offsets,
    p_state_index,
    p_totals,
    p_away,
    p_away_sum,
    num_rows,
    num_steps,
    BT: tl.constexpr,
):
    """Add up each row's rewards by the step that owns them.

    A step owns the tokens of a row from its first one there to the next step's, and the first step
    also those before it. Sums go to `p_totals` where the row holds the step's state, so that each
    entry has one writer. A row that continues a step of another row holds only that one: its sum
    goes to `p_away_sum`, to be added to entry `p_away`, which is beyond the steps if there is none.
    """
    for i_row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        i_begin = tl.load(p_row_offsets + i_row)
        i_end = tl.load(p_row_offsets + i_row + 1)
        carry_step = tl.full((), -1, tl.int32)
        carry = tl.full((), 0.0, tl.float64)
        away = tl.full((), -1, tl.int32)
        away_sum = tl.full((), 0.0, tl.float64)
        for t in range(i_begin, i_end, BT):
            b_lane = tl.arange(0, BT)
            b_pos = t + b_lane
            m_row = b_pos < i_end
            m_before = m_row & (b_pos > i_begin)
            b_step = tl.load(p_step_ids + b_pos, mask=m_row, other=-1)
            b_before = tl.load(p_step_ids + b_pos - 1, mask=m_before, other=-1)
            b_next = tl.load(p_step_ids + b_pos + 1, mask=b_pos + 1 < i_end, other=-1)
            b_before = tl.maximum(running_max(b_before), carry_step)
            b_owner = tl.maximum(b_before, b_step)
            m_first = (b_step > b_before) & (b_before >= 0)

            b_reward = tl.load(p_rewards + b_pos, mask=m_row, other=0.0).to(tl.float64)
            # A slot outside of actions may hold anything.
            m_counts = (b_step >= 0) | (tl.abs(b_reward) < float("inf"))
            b_reward = tl.where(m_counts, b_reward, 0.0)
            b_sum, b_reset = running_sum(b_reward, m_first.to(tl.int32))
            b_sum = tl.where(b_reset == 0, b_sum + carry, b_sum)

            m_last = m_row & (b_owner >= 0) & ((b_pos + 1 == i_end) | (b_next > b_owner))
            b_state = tl.load(p_state_index + b_owner, mask=m_last, other=0)
            m_home = (b_state >= i_begin) & (b_state < i_end)
            tl.store(p_totals + b_owner, b_sum, mask=m_last & m_home)
            b_away = tl.where(m_last & ~m_home, b_owner, -1)
            newest = tl.max(b_away, 0)
            if newest >= 0:
                away_sum = tl.sum(tl.where(b_away == newest, b_sum, 0.0), 0)
                away = newest
            carry = last(b_sum, b_lane, BT)
            carry_step = tl.max(b_owner, 0)
        i_away = tl.where(away >= 0, away.to(tl.int64), num_steps + i_row)
        tl.store(p_away + i_row, i_away)
        tl.store(p_away_sum + i_row, away_sum)


@triton.jit
def _compose(a_slope, a_shift, b_slope, b_shift):
    return a_slope * b_slope, b_slope * a_shift + b_shift


@triton.jit(do_not_specialize=_LENGTHS)
def gae_kernel(
    p_rewards,
    p_values,
    p_state_index,
    p_steps,
    p_offsets,
    p_bootstrap,
    p_raw,
    p_returns,
    p_partials,
    num_trajectories,
    gamma: tl.float64,
    decay: tl.float64,
    VALUES_PER_TOKEN: tl.constexpr,
    WHITEN: tl.constexpr,
    BG: tl.constexpr,
    BT: tl.constexpr,
):
    """Each program takes blocks of BG trajectories, from their ends."""
    i_p = tl.program_id(0).to(tl.int64)
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    spread = tl.full((), 0.0, tl.float64)
    for i_block in range(i_p, tl.cdiv(num_trajectories, BG), tl.num_programs(0)):
        b_g = i_block * BG + tl.arange(0, BG)
        m_g = b_g < num_trajectories
        b_begin = tl.load(p_offsets + b_g, mask=m_g, other=0)
        b_end = tl.load(p_offsets + b_g + 1, mask=m_g, other=0)
        b_len = b_end - b_begin
        b_after = tl.zeros([BG], tl.float64)
        if p_bootstrap is not None:
            b_after = tl.load(p_bootstrap + b_g, mask=m_g, other=0.0).to(tl.float64)
        b_carry = tl.zeros([BG], tl.float64)
        for t in range(0, tl.max(b_len, 0), BT):
            # Steps before the trajectory's end.
            b_back = t + tl.arange(0, BT)[None, :]
            m_step = b_back < b_len[:, None]
            p_step = p_steps + b_end[:, None] - 1 - b_back
            b_s = tl.load(p_step, mask=m_step, other=0)
            m_next = m_step & (b_back > 0)
            b_next_at = tl.load(p_step + 1, mask=m_next, other=0)
            b_at = b_s
            if VALUES_PER_TOKEN:
                b_at = tl.load(p_state_index + b_s, mask=m_step, other=0)
                b_next_at = tl.load(p_state_index + b_next_at, mask=m_next, other=0)
            b_v = tl.load(p_values + b_at, mask=m_step, other=0.0).to(tl.float64)
            b_next = tl.load(p_values + b_next_at, mask=m_next, other=0.0).to(tl.float64)
            b_next = tl.where(b_back > 0, b_next, b_after[:, None])
            b_r = tl.load(p_rewards + b_s, mask=m_step, other=0.0).to(tl.float64)
            b_delta = tl.where(m_step, b_r + gamma * b_next - b_v, 0.0)
            b_slope = tl.zeros([BG, BT], tl.float64) + decay
            b_slope, b_shift = tl.associative_scan((b_slope, b_delta), 1, _compose)
            b_adv = b_shift + b_slope * b_carry[:, None]
            m_carry = tl.broadcast_to(tl.arange(0, BT)[None, :] == BT - 1, [BG, BT])
            b_carry = tl.sum(tl.where(m_carry, b_adv, 0.0), 1)
            tl.store(p_returns + b_s, b_adv + b_v, mask=m_step)
            tl.store(p_raw + b_s, b_adv, mask=m_step)
            if WHITEN:
                count, mean, spread = deviations(
                    count,
                    mean,
                    spread,
                    tl.reshape(b_adv, [BG * BT]),
                    tl.reshape(m_step, [BG * BT]),
                )
    if WHITEN:
        tl.store(p_partials + 3 * i_p, count)
        tl.store(p_partials + 3 * i_p + 1, mean)
        tl.store(p_partials + 3 * i_p + 2, spread)


@triton.jit(do_not_specialize=_LENGTHS)
def whiten_kernel(
    p_raw,
    p_steps,
    p_partials,
    p_advantages,
    num_entries,
    num_partials,
    BP: tl.constexpr,
    BT: tl.constexpr,
):
    """Write (A - mean) / (std + 1e-8); every program adds up the partial sums for itself."""
    b_p = tl.arange(0, BP)
    m_p = b_p < num_partials
    count, mean, spread = combine_deviations(
        tl.load(p_partials + 3 * b_p, mask=m_p, other=0.0),
        tl.load(p_partials + 3 * b_p + 1, mask=m_p, other=0.0),
        tl.load(p_partials + 3 * b_p + 2, mask=m_p, other=0.0),
    )
    deviation = tl.sqrt(spread / tl.where(count > 1, count - 1, 1.0)) + 1e-8
    scale = tl.where(count > 1, deviation, 1.0)
    b_k = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_k = b_k < num_entries
    b_s = tl.load(p_steps + b_k, mask=m_k, other=0)
    b_raw = tl.load(p_raw + b_s, mask=m_k, other=0.0)
    tl.store(p_advantages + b_s, (b_raw - mean) / scale, mask=m_k)


def step_gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap_values: Tensor | None,
    timeline: Sequence[Tensor],
    config: Sequence[float],
    rewards_per_token: bool,
    values_per_token: bool,
    along_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``[S]``: see `operators.step_gae`."""
    line = record(Timeline, timeline)
    gamma, lam, whiten = config
    num_steps, num_entries = line.state_index.numel(), line.trajectory_steps.numel()
    num_trajectories = line.trajectory_offsets.numel() - 1
    # A step of no trajectory gets 0.
    make = values.new_empty if num_entries == num_steps else values.new_zeros
    advantages, returns = make((num_steps,)), make((num_steps,))
    if num_entries == 0:
        return advantages, returns
    if values_per_token and values.numel() == 0:
        values, values_per_token = values.new_zeros((num_steps,)), False
    block_rows, block_steps = _trajectory_tile(num_entries, num_trajectories)
    num_programs = programs(cdiv(num_trajectories, block_rows))
    raw = torch.empty_like(advantages, dtype=torch.float64) if whiten else advantages
    partials = values.new_empty((num_programs, 3), dtype=torch.float64)
    with device_guard(values):
        if rewards_per_token:
            rewards = _step_rewards(rewards, line.step_ids, line.row_offsets, line.state_index)
        gae_kernel[(num_programs,)](
            rewards,
            values,
            line.state_index,
            line.trajectory_steps,
            line.trajectory_offsets,
            bootstrap_values,
            raw,
            returns,
            partials,
            num_trajectories,
            gamma,
            gamma * lam,
            VALUES_PER_TOKEN=values_per_token,
            WHITEN=bool(whiten),
            BG=block_rows,
            BT=block_steps,
            **threads(block_rows * block_steps),
        )
        if whiten:
            whiten_kernel[(cdiv(num_entries, _WHITEN_BLOCK),)](
                raw,
                line.trajectory_steps,
                partials,
                advantages,
                num_entries,
                num_programs,
                BP=MAX_PROGRAMS,
                BT=_WHITEN_BLOCK,
                **threads(_WHITEN_BLOCK),
            )
    return advantages, returns


def _step_rewards(
    rewards: Tensor, step_ids: Tensor, row_offsets: Tensor, state_index: Tensor
) -> Tensor:
    """Add up ``[N]`` token rewards by step, fp64 ``[S]`` and more behind."""
    num_steps, num_rows = state_index.numel(), row_offsets.numel() - 1
    totals = rewards.new_zeros((num_steps + num_rows,), dtype=torch.float64)
    if rewards.numel() == 0:
        return totals
    away = step_ids.new_empty((num_rows,), dtype=torch.int64)
    away_sum = totals.new_empty((num_rows,))
    block = row_block(cdiv(rewards.numel(), num_rows))
    step_rewards_kernel[(programs(num_rows),)](
        rewards,
        step_ids,
        row_offsets,
        state_index,
        totals,
        away,
        away_sum,
        num_rows,
        num_steps,
        BT=block,
        **threads(block),
    )
    # Steps span rows only where there are fewer steps than rows. Adding in the order of rows, as
    # `index_put_` does on a GPU, keeps runs equal.
    if num_steps < num_rows:
        totals.index_put_((away,), away_sum, accumulate=True)
    return totals


def _trajectory_tile(num_entries: int, num_trajectories: int) -> tuple[int, int]:
    """Return the trajectories and steps of a block, by the mean length of a trajectory."""
    for mean, trajectories, steps in _TRAJECTORY_TILES:
        if num_entries <= mean * num_trajectories:
            return trajectories, steps
    return _LONG_TRAJECTORY_TILE
