"""The clipped step objective and its gradient coefficients, in one kernel and one that finishes.

    total = sum_s w_s (l_s + kl_coef mean_i KL_i - entropy_coef mean_i H_i) / normalizer
    d total / d log pi_i = w_s (-A_s rho_s L_s^-p w_i + kl_coef / L_s dKL_i) / normalizer

The l_s, rho_s and their slope are in `objective.py`. The normalizer is known last: gradients are
written without it, and the finishing kernel returns 1 / normalizer next to the loss.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..outputs import POLICY_METRICS
from .launch import (
    FLAT_BLOCK,
    MAX_PROGRAMS,
    STEP_THREADS,
    aligned,
    all_registers,
    cdiv,
    device_guard,
    programs,
    row_block,
    scalar,
    step_tile,
    threads,
)
from .objective import (
    CENTERED,
    STEP_MEAN,
    TOKEN_MEAN,
    TRAJECTORY_MEAN,
    kl_k3,
    kl_terms,
    step_terms,
)
from .tiles import chunk, last, running_sum

# Partial sums of one program. The extremes of the ratio are not summed.
_FIELDS = tl.constexpr(16)
_RATIO_MIN = tl.constexpr(4)
_RATIO_MAX = tl.constexpr(5)

# Programs of the kernel that computes mu: every program of the next one adds up all of them.
_CENTER_PROGRAMS = 256

_LENGTHS = [
    "num_steps", "num_actions", "num_tokens", "num_rows", "row_length", "max_runs",
    "step_programs",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def log_ratio_sum_kernel(
    p_new, p_old, p_index, p_mask, p_partials, num_tokens,
    ALIGNED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Add up z and the number of tokens, of the tokens in `p_index` or of those in `p_mask`."""
    i_p = tl.program_id(0).to(tl.int64)
    length = num_tokens.to(tl.int64)
    total = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0, tl.int64)
    for i_block in range(i_p, tl.cdiv(length, BT), tl.num_programs(0)):
        i_flat, b_lane, m_token = chunk(0, i_block * BT, length, ALIGNED, BT)
        if p_index is not None:
            b_pos = tl.load(p_index + i_flat + b_lane, mask=m_token, other=0)
            b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
            b_old = tl.load(p_old + b_pos, mask=m_token, other=0.0)
        else:
            b_new = tl.load(p_new + i_flat + b_lane, mask=m_token, other=0.0)
            b_old = tl.load(p_old + i_flat + b_lane, mask=m_token, other=0.0)
            m_token = tl.load(p_mask + i_flat + b_lane, mask=m_token, other=0) != 0
            b_new = tl.where(m_token, b_new, 0.0)
            b_old = tl.where(m_token, b_old, 0.0)
        b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
        total += tl.sum(b_z, 0)
        count += tl.sum(m_token.to(tl.int64), 0)
    tl.store(p_partials + 2 * i_p, total)
    tl.store(p_partials + 2 * i_p + 1, count.to(tl.float64))


@triton.jit
def _center(p_center, center, num_partials: tl.constexpr):
    """Return mu: the number given, the one at `p_center`, or the mean of its partial sums."""
    if num_partials > 0:
        b_i = tl.arange(0, num_partials)
        total = tl.sum(tl.load(p_center + 2 * b_i), 0)
        count = tl.sum(tl.load(p_center + 2 * b_i + 1), 0)
        mu = total / tl.where(count > 0, count, 1.0)
    elif p_center is not None:
        mu = tl.load(p_center)
    else:
        mu = tl.full((), 0.0, tl.float64) + center
    return mu


@triton.jit
def _store_partials(
    p_out, policy, kl, entropy, ratio, ratio_min, ratio_max, low, high, clipped_tokens, z, k3,
    dead, steps, tokens, trajectories,
):  # fmt: skip
    """Write the partial sums in the order of POLICY_METRICS; the last is sum 1 / count."""
    tl.store(p_out, policy)
    tl.store(p_out + 1, kl)
    tl.store(p_out + 2, entropy)
    tl.store(p_out + 3, ratio)
    tl.store(p_out + 4, ratio_min)
    tl.store(p_out + 5, ratio_max)
    # A step that is clipped has an advantage.
    tl.store(p_out + 6, low + high)
    tl.store(p_out + 7, low)
    tl.store(p_out + 8, high)
    tl.store(p_out + 9, clipped_tokens)
    tl.store(p_out + 10, -z)
    tl.store(p_out + 11, k3)
    tl.store(p_out + 12, dead)
    tl.store(p_out + 13, steps)
    tl.store(p_out + 14, tokens)
    tl.store(p_out + 15, trajectories)


@triton.jit
def _zero_masked(
    p_step_ids, p_grad, p_grad_entropy, i_p, num_programs, num_tokens,
    ALIGNED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Write 0 as the gradient of every token without a step."""
    length = num_tokens.to(tl.int64)
    for i_block in range(i_p, tl.cdiv(length, BT), num_programs):
        i_flat, b_lane, m_token = chunk(0, i_block * BT, length, ALIGNED, BT)
        b_step = tl.load(p_step_ids + i_flat + b_lane, mask=m_token, other=0)
        m_masked = m_token & (b_step < 0)
        if p_grad is not None:
            b_zero = tl.zeros([BT], p_grad.dtype.element_ty)
            tl.store(p_grad + i_flat + b_lane, b_zero, mask=m_masked)
        if p_grad_entropy is not None:
            b_zero = tl.zeros([BT], p_grad_entropy.dtype.element_ty)
            tl.store(p_grad_entropy + i_flat + b_lane, b_zero, mask=m_masked)


@triton.jit(do_not_specialize=_LENGTHS)
def policy_loss_kernel(
    p_new, p_old, p_adv, p_ref, p_entropy, p_is, p_weights,
    p_step_ids, p_index, p_offsets, p_counts, p_center,
    p_log_ratio, p_grad, p_grad_entropy, p_partials,
    num_steps, num_actions, num_tokens, step_programs,
    center: tl.float64, low: tl.float64, high: tl.float64, dual_clip: tl.float64,
    log_ratio_max: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    NUM_CENTERS: tl.constexpr, RATIO: tl.constexpr, REDUCTION: tl.constexpr, KL: tl.constexpr,
    ADV_PER_TOKEN: tl.constexpr, IS_PER_TOKEN: tl.constexpr, TOKEN_PASS: tl.constexpr,
    ALIGNED: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """Programs before `step_programs` take blocks of BS steps, the others zero masked tokens."""
    i_p = tl.program_id(0).to(tl.int64)
    if i_p >= step_programs:
        _zero_masked(
            p_step_ids, p_grad, p_grad_entropy, i_p - step_programs,
            tl.num_programs(0) - step_programs, num_tokens, ALIGNED, BZ,
        )  # fmt: skip
    else:
        mu = _center(p_center, center, NUM_CENTERS)
        b_policy = tl.zeros([BS], tl.float64)
        b_kl = tl.zeros([BS], tl.float64)
        b_entropy = tl.zeros([BS], tl.float64)
        b_ratios = tl.zeros([BS], tl.float64)
        b_min = tl.full([BS], float("inf"), tl.float64)
        b_max = tl.full([BS], float("-inf"), tl.float64)
        b_low = tl.zeros([BS], tl.int32)
        b_high = tl.zeros([BS], tl.int32)
        b_clipped_tokens = tl.zeros([BS], tl.int64)
        b_z_all = tl.zeros([BS], tl.float64)
        b_k3_all = tl.zeros([BS], tl.float64)
        b_dead = tl.zeros([BS], tl.int64)
        b_steps = tl.zeros([BS], tl.int32)
        b_trajectories = tl.zeros([BS], tl.float64)
        b_lane = tl.arange(0, BT)[None, :]

        for i_block in range(i_p, tl.cdiv(num_steps, BS), step_programs):
            b_s = i_block * BS + tl.arange(0, BS)
            m_s = b_s < num_steps
            b_begin = tl.load(p_offsets + b_s, mask=m_s, other=0)
            b_len = tl.load(p_offsets + b_s + 1, mask=m_s, other=0) - b_begin
            longest = tl.max(b_len, 0)

            b_z_sum = tl.zeros([BS, BT], tl.float64)
            b_k3_sum = tl.zeros([BS, BT], tl.float64)
            for t in range(0, longest, BT):
                m_token = t + b_lane < b_len[:, None]
                p_pos = p_index + t + b_begin[:, None] + b_lane
                b_pos = tl.load(p_pos, mask=m_token, other=0)
                b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
                b_old = b_new
                if p_old is not None:
                    b_old = tl.load(p_old + b_pos, mask=m_token, other=0.0)
                b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
                b_z_sum += b_z
                b_k3_sum += kl_k3(b_z.to(b_new.dtype)).to(tl.float64)

            m_step = b_len > 0
            b_first = b_s
            if ADV_PER_TOKEN:
                b_first = tl.load(p_index + b_begin, mask=m_step, other=0)
            b_adv = tl.load(p_adv + b_first, mask=m_step, other=0.0).to(tl.float64)
            b_sum = tl.sum(b_z_sum, 1)
            b_inverse = 1.0 / tl.where(m_step, b_len, 1).to(tl.float64)
            b_log_ratio, b_ratio, b_loss, b_slope, m_clipped = step_terms(
                b_sum, b_len, b_inverse, b_adv, mu, low, high, dual_clip, log_ratio_max, RATIO
            )
            tl.store(p_log_ratio + b_s, b_log_ratio, mask=m_s)
            m_clipped = m_clipped & m_step
            b_ratios += tl.where(m_step, b_ratio, 0.0)
            m_seen = m_step & (b_ratio == b_ratio)
            b_min = tl.where(m_seen & (b_ratio < b_min), b_ratio, b_min)
            b_max = tl.where(m_seen & (b_ratio > b_max), b_ratio, b_max)
            b_low += (m_clipped & (b_adv < 0)).to(tl.int32)
            b_high += (m_clipped & (b_adv > 0)).to(tl.int32)
            b_clipped_tokens += tl.where(m_clipped, b_len, 0)
            b_z_all += b_sum
            b_k3_all += tl.sum(b_k3_sum, 1)
            b_steps += m_step.to(tl.int32)

            b_share = tl.where(m_step, 1.0, 0.0).to(tl.float64)
            if REDUCTION == TRAJECTORY_MEAN:
                b_count = tl.load(p_counts + b_s, mask=m_step, other=1)
                b_share = b_share / tl.where(b_count > 1, b_count, 1).to(tl.float64)
                b_trajectories += b_share
            b_w = b_share
            if p_weights is not None:
                b_w = tl.load(p_weights + b_s, mask=m_step, other=0.0).to(tl.float64)
            elif REDUCTION == TOKEN_MEAN:
                b_w = b_len.to(tl.float64)
            # w_s / L_s, the weight of a token in the means over the step.
            b_unit = b_w * b_inverse
            b_slope = b_slope * b_w
            if p_is is not None and not IS_PER_TOKEN:
                b_step_is = tl.load(p_is + b_s, mask=m_step, other=0.0).to(tl.float64)
                b_loss = b_loss * b_step_is
                b_slope = tl.where(b_slope != 0, b_slope * b_step_is, 0.0)

            if TOKEN_PASS:
                b_is_sum = tl.zeros([BS, BT], tl.float64)
                b_kl_sum = tl.zeros([BS, BT], tl.float64)
                b_entropy_sum = tl.zeros([BS, BT], tl.float64)
                b_dead_sum = tl.zeros([BS, BT], tl.int32)
                for t in range(0, longest, BT):
                    m_token = t + b_lane < b_len[:, None]
                    p_pos = p_index + t + b_begin[:, None] + b_lane
                    b_pos = tl.load(p_pos, mask=m_token, other=0)
                    b_grad = tl.broadcast_to(b_slope[:, None], [BS, BT])
                    if p_is is not None and IS_PER_TOKEN:
                        b_is = tl.load(p_is + b_pos, mask=m_token, other=0.0).to(tl.float64)
                        b_is_sum += b_is
                        b_grad = tl.where(b_grad != 0, b_grad * b_is, 0.0)
                    m_dead = m_token & (b_grad == 0)
                    if p_ref is not None:
                        b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
                        b_ref = tl.load(p_ref + b_pos, mask=m_token, other=0.0)
                        b_value, b_kl_slope = kl_terms(b_ref - b_new, KL)
                        b_kl_sum += b_value.to(tl.float64)
                        b_kl_grad = b_unit[:, None] * kl_coef * b_kl_slope.to(tl.float64)
                        b_grad += b_kl_grad
                        m_dead = m_token & (b_grad == 0)
                    if p_entropy is not None:
                        b_h = tl.load(p_entropy + b_pos, mask=m_token, other=0.0)
                        b_entropy_sum += b_h.to(tl.float64)
                        m_dead = m_dead & (b_unit * entropy_coef == 0)[:, None]
                    b_dead_sum += m_dead.to(tl.int32)
                    if p_grad is not None:
                        tl.store(p_grad + b_pos, b_grad, mask=m_token)
                    if p_grad_entropy is not None:
                        b_grad_entropy = tl.broadcast_to(
                            (-b_unit * entropy_coef)[:, None], [BS, BT]
                        )
                        tl.store(p_grad_entropy + b_pos, b_grad_entropy, mask=m_token)
                b_dead += tl.sum(b_dead_sum.to(tl.int64), 1)
                b_kl += b_unit * tl.sum(b_kl_sum, 1)
                b_entropy += b_unit * tl.sum(b_entropy_sum, 1)
                if p_is is not None and IS_PER_TOKEN:
                    b_loss = b_loss * tl.sum(b_is_sum, 1) * b_inverse
            else:
                b_dead += tl.where(b_slope == 0, b_len, 0)

            b_policy += tl.where(m_step, b_w * b_loss, 0.0)

        _store_partials(
            p_partials + i_p * _FIELDS,
            tl.sum(b_policy, 0), tl.sum(b_kl, 0), tl.sum(b_entropy, 0), tl.sum(b_ratios, 0),
            tl.min(b_min, 0), tl.max(b_max, 0), tl.sum(b_low, 0), tl.sum(b_high, 0),
            tl.sum(b_clipped_tokens, 0), tl.sum(b_z_all, 0), tl.sum(b_k3_all, 0),
            tl.sum(b_dead, 0), tl.sum(b_steps, 0), tl.where(i_p == 0, num_actions, 0),
            tl.sum(b_trajectories, 0),
        )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def policy_loss_masked_kernel(
    p_new, p_old, p_adv, p_ref, p_entropy, p_is, p_mask, p_center,
    p_runs, p_grad, p_grad_entropy, p_partials,
    num_rows, row_length, max_runs,
    center: tl.float64, low: tl.float64, high: tl.float64, dual_clip: tl.float64,
    log_ratio_max: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    NUM_CENTERS: tl.constexpr, RATIO: tl.constexpr, REDUCTION: tl.constexpr, KL: tl.constexpr,
    TOKEN_PASS: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Each program takes rows: sums of z by run, then the runs, then the tokens.

    `p_runs` is the program's scratch, three numbers a run: sum of z, first token and length; then
    slope, weight of a token and weighted loss of a token.
    """
    i_p = tl.program_id(0).to(tl.int64)
    length = row_length.to(tl.int64)
    p_a = p_runs + i_p * max_runs * 3
    p_b = p_a + max_runs
    p_c = p_b + max_runs

    mu = _center(p_center, center, NUM_CENTERS)
    b_policy = tl.zeros([BR], tl.float64)
    b_ratios = tl.zeros([BR], tl.float64)
    b_min = tl.full([BR], float("inf"), tl.float64)
    b_max = tl.full([BR], float("-inf"), tl.float64)
    b_low = tl.zeros([BR], tl.int32)
    b_high = tl.zeros([BR], tl.int32)
    b_clipped_tokens = tl.zeros([BR], tl.int64)
    b_z_all = tl.zeros([BR], tl.float64)
    b_dead = tl.zeros([BR], tl.int64)
    b_tokens = tl.zeros([BR], tl.int64)
    b_k3 = tl.zeros([BT], tl.float64)
    b_is_policy = tl.zeros([BT], tl.float64)
    b_kl = tl.zeros([BT], tl.float64)
    b_entropy = tl.zeros([BT], tl.float64)
    b_dead_tokens = tl.zeros([BT], tl.int32)
    steps = tl.full((), 0, tl.int64)
    trajectories = tl.full((), 0, tl.int64)

    for i_row in range(i_p, num_rows, tl.num_programs(0)):
        i_begin = i_row * length
        if ALIGNED:
            i_begin = tl.multiple_of(i_begin, 16)

        carry = tl.full((), 0.0, tl.float64)
        carry_start = tl.full((), 0, tl.int64)
        runs = tl.full((), 0, tl.int64)
        for t in range(0, length, BT):
            i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
            m_token = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) != 0
            m_next = t + 1 + b_lane < length
            m_last = m_token & (tl.load(p_mask + i_flat + 1 + b_lane, mask=m_next, other=0) == 0)
            b_new = tl.load(p_new + i_flat + b_lane, mask=m_row, other=0.0)
            b_new = tl.where(m_token, b_new, 0.0)
            b_old = b_new
            if p_old is not None:
                b_old = tl.load(p_old + i_flat + b_lane, mask=m_row, other=0.0)
                b_old = tl.where(m_token, b_old, 0.0)
            b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
            b_k3 += kl_k3(b_z.to(b_new.dtype)).to(tl.float64)
            b_sum, b_start = running_sum(b_z, tl.where(m_token, 0, b_lane + 1))
            b_sum = tl.where(b_start == 0, b_sum + carry, b_sum)
            b_first = tl.where(b_start == 0, carry_start, t + b_start)
            b_run = runs + tl.cumsum(m_last.to(tl.int32), 0) - 1
            tl.store(p_a + b_run, b_sum, mask=m_last)
            tl.store(p_b + b_run, b_first.to(tl.float64), mask=m_last)
            tl.store(p_c + b_run, (t + 1 + b_lane - b_first).to(tl.float64), mask=m_last)
            carry = last(b_sum, b_lane, BT)
            carry_start = last(b_first, b_lane, BT)
            runs += tl.sum(m_last.to(tl.int32), 0)
        # The threads of a program read what others of it wrote.
        tl.debug_barrier()

        for r in range(0, runs, BR):
            b_run = r + tl.arange(0, BR)
            m_step = b_run < runs
            b_sum = tl.load(p_a + b_run, mask=m_step, other=0.0)
            b_first = tl.load(p_b + b_run, mask=m_step, other=0.0).to(tl.int64)
            b_len = tl.load(p_c + b_run, mask=m_step, other=0.0).to(tl.int64)
            b_adv = tl.load(p_adv + i_begin + b_first, mask=m_step, other=0.0).to(tl.float64)
            b_inverse = 1.0 / tl.where(m_step, b_len, 1).to(tl.float64)
            _, b_ratio, b_loss, b_slope, m_clipped = step_terms(
                b_sum, b_len, b_inverse, b_adv, mu, low, high, dual_clip, log_ratio_max, RATIO
            )
            b_w = tl.full([BR], 1.0, tl.float64)
            if REDUCTION == TRAJECTORY_MEAN:
                b_w = b_w / runs.to(tl.float64)
            elif REDUCTION == TOKEN_MEAN:
                b_w = b_len.to(tl.float64)
            b_slope = b_slope * b_w
            m_clipped = m_clipped & m_step
            b_unit = b_w * b_inverse
            if TOKEN_PASS:
                tl.store(p_a + b_run, b_slope, mask=m_step)
                tl.store(p_b + b_run, b_unit, mask=m_step)
                tl.store(p_c + b_run, b_unit * b_loss, mask=m_step)
            else:
                b_dead += tl.where(b_slope == 0, b_len, 0)
            b_policy += tl.where(m_step, b_w * b_loss, 0.0)
            b_ratios += tl.where(m_step, b_ratio, 0.0)
            m_seen = m_step & (b_ratio == b_ratio)
            b_min = tl.where(m_seen & (b_ratio < b_min), b_ratio, b_min)
            b_max = tl.where(m_seen & (b_ratio > b_max), b_ratio, b_max)
            b_low += (m_clipped & (b_adv < 0)).to(tl.int32)
            b_high += (m_clipped & (b_adv > 0)).to(tl.int32)
            b_clipped_tokens += tl.where(m_clipped, b_len, 0)
            b_z_all += b_sum
            b_tokens += b_len
        steps += runs
        trajectories += tl.where(runs > 0, 1, 0)
        tl.debug_barrier()

        if TOKEN_PASS:
            done = tl.full((), 0, tl.int64)
            for t in range(0, length, BT):
                i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
                m_token = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) != 0
                m_next = t + 1 + b_lane < length
                b_last = (
                    m_token & (tl.load(p_mask + i_flat + 1 + b_lane, mask=m_next, other=0) == 0)
                ).to(tl.int32)
                b_run = done + tl.cumsum(b_last, 0) - b_last
                done += tl.sum(b_last, 0)
                b_grad = tl.load(p_a + b_run, mask=m_token, other=0.0)
                if p_is is not None:
                    b_is = tl.load(p_is + i_flat + b_lane, mask=m_row, other=0.0)
                    b_is = tl.where(m_token, b_is, 0.0).to(tl.float64)
                    b_is_policy += b_is * tl.load(p_c + b_run, mask=m_token, other=0.0)
                    b_grad = tl.where(b_grad != 0, b_grad * b_is, 0.0)
                m_dead = m_token & (b_grad == 0)
                if p_ref is not None or p_entropy is not None:
                    b_unit = tl.load(p_b + b_run, mask=m_token, other=0.0)
                if p_ref is not None:
                    b_new = tl.load(p_new + i_flat + b_lane, mask=m_row, other=0.0)
                    b_ref = tl.load(p_ref + i_flat + b_lane, mask=m_row, other=0.0)
                    b_d = tl.where(m_token, b_ref, 0.0) - tl.where(m_token, b_new, 0.0)
                    b_value, b_kl_slope = kl_terms(b_d, KL)
                    b_kl += b_unit * b_value.to(tl.float64)
                    b_kl_grad = b_unit * kl_coef * b_kl_slope.to(tl.float64)
                    b_grad += b_kl_grad
                    m_dead = m_token & (b_grad == 0)
                if p_entropy is not None:
                    b_h = tl.load(p_entropy + i_flat + b_lane, mask=m_row, other=0.0)
                    b_entropy += b_unit * tl.where(m_token, b_h, 0.0).to(tl.float64)
                    m_dead = m_dead & (b_unit * entropy_coef == 0)
                b_dead_tokens += m_dead.to(tl.int32)
                if p_grad is not None:
                    tl.store(p_grad + i_flat + b_lane, b_grad, mask=m_row)
                if p_grad_entropy is not None:
                    tl.store(p_grad_entropy + i_flat + b_lane, -b_unit * entropy_coef, mask=m_row)
            # The next row overwrites the scratch.
            tl.debug_barrier()

    policy = tl.sum(b_policy, 0)
    if p_is is not None:
        policy = tl.sum(b_is_policy, 0)
    _store_partials(
        p_partials + i_p * _FIELDS,
        policy, tl.sum(b_kl, 0), tl.sum(b_entropy, 0), tl.sum(b_ratios, 0), tl.min(b_min, 0),
        tl.max(b_max, 0), tl.sum(b_low, 0), tl.sum(b_high, 0), tl.sum(b_clipped_tokens, 0),
        tl.sum(b_z_all, 0), tl.sum(b_k3, 0),
        tl.sum(b_dead, 0) + tl.sum(b_dead_tokens.to(tl.int64), 0), steps, tl.sum(b_tokens, 0),
        trajectories,
    )  # fmt: skip


@triton.jit
def _field(b_sums, k: tl.constexpr):
    b_zero = tl.zeros_like(b_sums)
    return tl.sum(tl.where(tl.arange(0, _FIELDS) == k, b_sums, b_zero), 0)


@triton.jit(do_not_specialize=["num_partials"])
def finish_policy_loss_kernel(
    p_partials, p_normalizer, p_loss, p_metrics, p_scale, num_partials,
    normalizer: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    GIVEN: tl.constexpr, REDUCTION: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums in a fixed order: loss, metrics and 1 / normalizer."""
    b_k = tl.arange(0, _FIELDS)
    b_sums = tl.zeros([_FIELDS], tl.float64)
    b_min = tl.full([_FIELDS], float("inf"), tl.float64)
    b_max = tl.full([_FIELDS], float("-inf"), tl.float64)
    for i in range(0, num_partials, BP):
        b_row = i + tl.arange(0, BP)[:, None]
        m_row = b_row < num_partials
        p_tile = p_partials + b_row * _FIELDS + b_k[None, :]
        b_tile = tl.load(p_tile, mask=m_row, other=0.0)
        b_sums += tl.sum(b_tile, 0)
        m_extreme = m_row & (b_k == _RATIO_MIN)[None, :]
        b_least = tl.min(tl.where(m_extreme, b_tile, float("inf")), 0)
        b_min = tl.where(b_least < b_min, b_least, b_min)
        m_extreme = m_row & (b_k == _RATIO_MAX)[None, :]
        b_most = tl.max(tl.where(m_extreme, b_tile, float("-inf")), 0)
        b_max = tl.where(b_most > b_max, b_most, b_max)

    steps = _field(b_sums, 13)
    tokens = _field(b_sums, 14)
    total = steps
    if REDUCTION == TRAJECTORY_MEAN:
        # Every trajectory adds 1, up to rounding.
        total = tl.floor(_field(b_sums, 15) + 0.5)
    elif REDUCTION == TOKEN_MEAN:
        total = tokens
    elif REDUCTION != STEP_MEAN:
        total = tl.full((), 1.0, tl.float64)
    total = tl.where(total > 1.0, total, 1.0)
    if p_normalizer is not None:
        total = tl.load(p_normalizer)
    elif GIVEN:
        total = tl.zeros_like(total) + normalizer

    b_divisor = tl.where(b_k <= 2, total, 1.0)
    m_steps = (b_k == 3) | ((b_k >= 6) & (b_k <= 8))
    b_divisor = tl.where(m_steps, tl.where(steps > 0, steps, 1.0), b_divisor)
    m_tokens = (b_k >= 9) & (b_k <= 12)
    b_divisor = tl.where(m_tokens, tl.where(tokens > 0, tokens, 1.0), b_divisor)
    b_metrics = b_sums / b_divisor
    b_metrics = tl.where(b_k == _RATIO_MIN, b_min, b_metrics)
    b_metrics = tl.where(b_k == _RATIO_MAX, b_max, b_metrics)
    # Without a step, ratios are 1.
    m_ratios = (b_k >= 3) & (b_k <= _RATIO_MAX)
    b_metrics = tl.where(m_ratios & (tokens.to(tl.int64) == 0), 1.0, b_metrics)
    tl.store(p_metrics + b_k, b_metrics, mask=b_k < _FIELDS - 1)

    loss = _field(b_metrics, 0) + kl_coef * _field(b_metrics, 1)
    tl.store(p_loss, loss - entropy_coef * _field(b_metrics, 2))
    tl.store(p_scale, 1.0 / total)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor,
    ref_log_probs: Tensor | None, entropy: Tensor | None, is_weights: Tensor | None,
    step_weights: Tensor | None, advantages_per_token: bool, is_weights_per_token: bool,
    step_ids: Tensor, token_index: Tensor, step_offsets: Tensor, trajectory_counts: Tensor,
    ratio_center: Tensor | None, normalizer: Tensor | None, ratio: int, clip_low: float,
    clip_high: float, dual_clip: float, log_ratio_max: float, reduction: int, kl_coef: float,
    kl_estimator: int, entropy_coef: float, need_grad: bool, need_entropy_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return loss, metrics, step log-ratios, gradients and their scale: see `ops.policy_loss`."""
    num_steps, num_actions = step_offsets.numel() - 1, token_index.numel()
    num_tokens = log_probs.numel()
    block_steps, block_tokens = step_tile(num_actions, num_steps)
    step_programs = programs(cdiv(num_steps, block_steps))
    zero_programs = cdiv(num_tokens, FLAT_BLOCK) if need_grad or need_entropy_grad else 0
    step_log_ratio = log_probs.new_empty((num_steps,))
    grad, grad_entropy = _gradients(log_probs, need_grad, need_entropy_grad)
    partials = _partials(log_probs, step_programs)
    with device_guard(log_probs):
        p_center, center, num_centers = _centers(
            log_probs, old_log_probs, token_index, None, ratio_center, ratio
        )
        policy_loss_kernel[(step_programs + min(zero_programs, 8 * MAX_PROGRAMS),)](
            log_probs, old_log_probs, advantages, ref_log_probs, entropy, is_weights, step_weights,
            step_ids, token_index, step_offsets, trajectory_counts, p_center,
            step_log_ratio, grad, grad_entropy, partials,
            num_steps, num_actions, num_tokens, step_programs,
            center, 1.0 - clip_low, 1.0 + clip_high, dual_clip, log_ratio_max, kl_coef,
            entropy_coef,
            NUM_CENTERS=num_centers, RATIO=ratio, REDUCTION=reduction, KL=kl_estimator,
            ADV_PER_TOKEN=advantages_per_token, IS_PER_TOKEN=is_weights_per_token,
            TOKEN_PASS=_token_pass(
                grad, grad_entropy, ref_log_probs, entropy,
                is_weights if is_weights_per_token else None,
            ),
            ALIGNED=aligned(num_tokens), BS=block_steps, BT=block_tokens, BZ=FLAT_BLOCK,
            **threads(STEP_THREADS, 1), **all_registers(),
        )  # fmt: skip
        loss, metrics, scale = _finish(
            log_probs, partials, normalizer, reduction, kl_coef, entropy_coef
        )
    return (
        loss, metrics, step_log_ratio, _or_empty(grad, log_probs),
        _or_empty(grad_entropy, log_probs), scale,
    )  # fmt: skip


def policy_loss_masked(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor,
    ref_log_probs: Tensor | None, entropy: Tensor | None, is_weights: Tensor | None,
    mask: Tensor, row_length: int, ratio_center: Tensor | None, normalizer: Tensor | None,
    ratio: int, clip_low: float, clip_high: float, dual_clip: float, log_ratio_max: float,
    reduction: int, kl_coef: float, kl_estimator: int, entropy_coef: float, need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return loss, metrics, gradients and their scale: see `ops.policy_loss_masked`."""
    num_rows = log_probs.numel() // max(row_length, 1)
    num_programs = programs(num_rows)
    max_runs = row_length // 2 + 1
    block = row_block(row_length)
    mask = mask.contiguous().view(torch.uint8)
    grad, grad_entropy = _gradients(log_probs, need_grad, need_entropy_grad)
    partials = _partials(log_probs, num_programs)
    runs = log_probs.new_empty((num_programs * 3 * max_runs,), dtype=torch.float64)
    with device_guard(log_probs):
        p_center, center, num_centers = _centers(
            log_probs, old_log_probs, None, mask, ratio_center, ratio
        )
        policy_loss_masked_kernel[(num_programs,)](
            log_probs, old_log_probs, advantages, ref_log_probs, entropy, is_weights, mask,
            p_center, runs, grad, grad_entropy, partials, num_rows, row_length, max_runs,
            center, 1.0 - clip_low, 1.0 + clip_high, dual_clip, log_ratio_max, kl_coef,
            entropy_coef,
            NUM_CENTERS=num_centers, RATIO=ratio, REDUCTION=reduction, KL=kl_estimator,
            TOKEN_PASS=_token_pass(grad, grad_entropy, ref_log_probs, entropy, is_weights),
            ALIGNED=aligned(row_length), BR=min(block, 128), BT=block, **threads(block),
        )  # fmt: skip
        loss, metrics, scale = _finish(
            log_probs, partials, normalizer, reduction, kl_coef, entropy_coef
        )
    return (
        loss, metrics, _or_empty(grad, log_probs), _or_empty(grad_entropy, log_probs), scale,
    )  # fmt: skip


def _token_pass(*tensors: Tensor | None) -> bool:
    """Return whether anything is written or read by token once the steps are known."""
    return any(tensor is not None for tensor in tensors)


def _gradients(
    like: Tensor, need_grad: bool, need_entropy_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(like) if need_grad else None,
        torch.empty_like(like) if need_entropy_grad else None,
    )


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0,)) if grad is None else grad


def _partials(like: Tensor, num_programs: int) -> Tensor:
    return like.new_empty((num_programs, _FIELDS.value), dtype=torch.float64)


def _centers(
    log_probs: Tensor, old_log_probs: Tensor | None, index: Tensor | None, mask: Tensor | None,
    ratio_center: Tensor | None, ratio: int,
) -> tuple[Tensor | None, float, int]:  # fmt: skip
    """Return mu as (pointer, number, number of partial sums), launching a kernel if it must be."""
    if ratio != CENTERED.value:
        return None, 0.0, 0
    # On-policy, z is 0 and so is its mean.
    if ratio_center is not None or old_log_probs is None:
        return *scalar(ratio_center, log_probs.device), 0
    num_tokens = log_probs.numel() if index is None else index.numel()
    partials = log_probs.new_empty((_CENTER_PROGRAMS, 2), dtype=torch.float64)
    log_ratio_sum_kernel[(_CENTER_PROGRAMS,)](
        log_probs, old_log_probs, index, mask, partials, num_tokens,
        ALIGNED=index is None and aligned(num_tokens), BT=FLAT_BLOCK, **threads(FLAT_BLOCK),
    )  # fmt: skip
    return partials, 0.0, _CENTER_PROGRAMS


def _finish(
    like: Tensor, partials: Tensor, normalizer: Tensor | None, reduction: int, kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss, scale = like.new_empty(()), like.new_empty(())
    metrics = like.new_empty((len(POLICY_METRICS),), dtype=torch.float64)
    p_normalizer, number = scalar(normalizer, like.device)
    finish_policy_loss_kernel[(1,)](
        partials, p_normalizer, loss, metrics, scale, partials.shape[0],
        number, kl_coef, entropy_coef,
        GIVEN=normalizer is not None, REDUCTION=reduction, BP=64, **threads(512),
    )  # fmt: skip
    return loss, metrics, scale
