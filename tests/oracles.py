"""What the package must compute, as plain Python loops over steps: slow, and easy to believe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steppo_kernels import StepLayout, StepPOConfig


@dataclass
class Steps:
    """A layout in Python lists: flat positions of steps, steps of trajectories, state positions."""

    tokens: list[list[int]] = field(default_factory=list)
    trajectories: list[list[int]] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    def add(self, tokens: list[int], state: int | None = None) -> None:
        """Append a step to the last trajectory."""
        self.trajectories[-1].append(len(self.tokens))
        self.tokens.append(tokens)
        self.states.append(tokens[0] if state is None else state)


def of_layout(layout: StepLayout) -> Steps:
    """Read a layout back."""
    steps = [[] for _ in range(layout.num_steps)]
    for position, step in enumerate(layout.step_ids.reshape(-1).tolist()):
        if step >= 0:
            steps[step].append(position)
    offsets = layout.trajectory_offsets.tolist()
    order = layout.trajectory_steps.tolist()
    trajectories = [order[a:b] for a, b in itertools.pairwise(offsets)]
    return Steps(steps, trajectories, layout.state_index.tolist())


def of_mask(mask: Sequence[bool], rows: Sequence[int], opens: Sequence[bool]) -> Steps:
    """Every run of ones in a row is a step; `opens` cuts runs; `rows` are row offsets."""
    steps = Steps()
    for start, end in itertools.pairwise(rows):
        steps.trajectories.append([])
        run: list[int] = []
        for position in range(start, end):
            if run and (not mask[position] or opens[position]):
                steps.add(run)
                run = []
            if mask[position]:
                run = [*run, position]
        if run:
            steps.add(run)
    return steps


def of_ids(ids: Sequence[int], rows: Sequence[int]) -> Steps:
    """Equal ids of a row are a step."""
    steps = Steps()
    for start, end in itertools.pairwise(rows):
        steps.trajectories.append([])
        of_id: dict[int, list[int]] = {}
        for position in range(start, end):
            if ids[position] >= 0:
                of_id.setdefault(ids[position], []).append(position)
        for tokens in of_id.values():
            steps.add(tokens)
    return steps


def of_rows(
    mask: Sequence[Sequence[bool]],
    trajectory_ids: Sequence[object],
    indices: Sequence[int],
    valid: Sequence[bool],
) -> Steps:
    """Every row is a step; valid ones belong to trajectories."""
    length = len(mask[0]) if mask else 0
    steps = Steps()
    members: dict[object, list[int]] = {}
    for row, flags in enumerate(mask):
        tokens = [row * length + t for t in range(length) if flags[t] and valid[row]]
        steps.tokens.append(tokens)
        steps.states.append(row * length)
        if valid[row]:
            members.setdefault(trajectory_ids[row], []).append(row)
    steps.trajectories = [sorted(m, key=lambda row: indices[row]) for m in members.values()]
    return steps


def marked(ids: Sequence[int], rows: Sequence[int], start: Sequence[int], end: int) -> list[bool]:
    """Return the mask of tokens after `start` up to the first following `end`."""
    flags = [False] * len(ids)
    for first, last in itertools.pairwise(rows):
        is_open = False
        for position in range(first, last):
            flags[position] = is_open
            begin = position + 1 - len(start)
            if begin >= first and list(ids[begin : position + 1]) == list(start):
                is_open = True
            elif ids[position] == end:
                is_open = False
    return flags


def per_token(steps: Steps) -> Steps:
    """Every action token a step."""
    first = [0]
    for tokens in steps.tokens:
        first.append(first[-1] + len(tokens))
    tokens = [position for step in steps.tokens for position in step]
    trajectories = [
        [rank for step in members for rank in range(first[step], first[step + 1])]
        for members in steps.trajectories
    ]
    return Steps([[position] for position in tokens], trajectories, tokens)


def per_trajectory(steps: Steps) -> Steps:
    """Every trajectory a step."""
    return Steps(
        [[p for step in members for p in steps.tokens[step]] for members in steps.trajectories],
        [[group] if members else [] for group, members in enumerate(steps.trajectories)],
        [steps.states[members[0]] if members else 0 for members in steps.trajectories],
    )


def assert_layout(layout: StepLayout, shape: Sequence[int], steps: Steps) -> None:
    """Compare every field of a layout, dtypes included."""
    numel = math.prod(shape)
    step_ids = [-1] * numel
    for step, tokens in enumerate(steps.tokens):
        for position in tokens:
            step_ids[position] = step
    counts = [0] * len(steps.tokens)
    for members in steps.trajectories:
        for step in members:
            counts[step] = sum(bool(steps.tokens[other]) for other in members)
    lengths = [len(tokens) for tokens in steps.tokens]
    expected = {
        "token_index": [position for tokens in steps.tokens for position in tokens],
        "step_offsets": _prefix(lengths),
        "step_lengths": lengths,
        "trajectory_steps": [step for members in steps.trajectories for step in members],
        "trajectory_offsets": _prefix([len(members) for members in steps.trajectories]),
        "trajectory_counts": counts,
        "state_index": steps.states,
    }
    assert layout.shape == torch.Size(shape)
    assert layout.step_ids.reshape(-1).tolist() == step_ids
    for name, values in expected.items():
        found = getattr(layout, name)
        assert found.tolist() == values, name
        narrow = name in ("step_lengths", "trajectory_counts")
        assert found.dtype == (torch.int32 if narrow else torch.int64), name
        assert found.device == layout.step_ids.device, name
    assert layout.step_ids.dtype == torch.int32
    assert layout.num_steps == len(steps.tokens)
    assert layout.num_tokens == sum(lengths)
    assert layout.num_trajectories == len(steps.trajectories)


def step_rewards(rewards: Sequence[float], rows: Sequence[int], steps: Steps) -> list[float]:
    """Token rewards go to their step, others to the latest step before them in the row.

    In front of the first step they go to this one.
    """
    owner = {position: step for step, tokens in enumerate(steps.tokens) for position in tokens}
    total = [0.0] * len(steps.tokens)
    for start, end in itertools.pairwise(rows):
        actions = [position for position in range(start, end) if position in owner]
        for position in range(start, end):
            before = [action for action in actions if action <= position]
            if actions:
                total[owner[before[-1] if before else actions[0]]] += rewards[position]
    return total


def gae(
    rewards: Sequence[float],
    values: Sequence[float],
    trajectories: Sequence[Sequence[int]],
    gamma: float,
    lam: float,
    bootstrap: Sequence[float],
) -> tuple[list[float], list[float]]:
    """Raw advantages and returns of the steps, from rewards and values of the steps."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for members, after in zip(trajectories, bootstrap, strict=True):
        states = [values[step] for step in members] + [after]
        deltas = [rewards[s] + gamma * states[t + 1] - states[t] for t, s in enumerate(members)]
        for t, step in enumerate(members):
            advantages[step] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            returns[step] = advantages[step] + values[step]
    return advantages, returns


def policy_loss(
    steps: Steps,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Sequence[float],
    config: StepPOConfig,
    *,
    ref_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    step_is_weights: Sequence[float] | None = None,
    token_is_weights: Tensor | None = None,
    step_weights: Sequence[float] | None = None,
    normalizer: float | None = None,
    ratio_center: float | None = None,
) -> dict[str, Tensor]:
    """Return what `batches.policy_results` returns with a layout, in fp64."""
    new, old = log_probs.reshape(-1).tolist(), old_log_probs.reshape(-1).tolist()
    ref = None if ref_log_probs is None else ref_log_probs.reshape(-1).tolist()
    bonus = None if entropy is None else entropy.reshape(-1).tolist()
    own = None if token_is_weights is None else token_is_weights.reshape(-1).tolist()
    tokens = [position for step in steps.tokens for position in step]
    z = {position: new[position] - old[position] for position in tokens}
    counts = {
        step: sum(bool(steps.tokens[other]) for other in members)
        for members in steps.trajectories
        for step in members
    }
    used = [step for step, positions in enumerate(steps.tokens) if positions]
    power = {"geometric": 1.0, "product": 0.0, "centered": 0.5}[config.ratio]
    mu = 0.0
    if config.ratio == "centered":
        mean = math.fsum(z.values()) / max(len(z), 1)
        mu = mean if ratio_center is None else ratio_center
    total = {
        "step_mean": len(used),
        "trajectory_mean": sum(any(steps.tokens[s] for s in m) for m in steps.trajectories),
        "token_mean": len(tokens),
        "sum": 1,
    }[config.reduction]
    total = max(total, 1) if normalizer is None else normalizer

    grad, grad_entropy = [0.0] * len(new), [0.0] * len(new)
    log_ratios = [0.0] * len(steps.tokens)
    ratios, policy, kl, spread = [], 0.0, 0.0, 0.0
    clipped_low = clipped_high = clipped_tokens = clipped = 0
    for step in used:
        positions, advantage = steps.tokens[step], advantages[step]
        length = len(positions)
        scale = length**-power
        log_ratio = mu + scale * math.fsum(z[position] - mu for position in positions)
        log_ratios[step] = log_ratio
        ratio = math.exp(min(log_ratio, config.log_ratio_max))
        ratios.append(ratio)
        plain = -advantage * ratio
        bounded = -advantage * min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        slope = -advantage * ratio * scale if log_ratio <= config.log_ratio_max else 0.0
        if bounded > plain:
            clipped += 1
            clipped_tokens += length
            clipped_low += advantage < 0
            clipped_high += advantage > 0
            slope = 0.0
        value = max(plain, bounded)
        if config.dual_clip and advantage < 0 and value > -config.dual_clip * advantage:
            value, slope = -config.dual_clip * advantage, 0.0
        weight = {
            "step_mean": 1.0,
            "trajectory_mean": 1.0 / counts.get(step, 1),
            "token_mean": float(length),
            "sum": 1.0,
        }[config.reduction]
        weight = weight if step_weights is None else step_weights[step]
        weight = weight / total
        factor = 1.0 if step_is_weights is None else step_is_weights[step]
        factors = [factor if own is None else own[position] for position in positions]
        policy += weight * value * math.fsum(factors) / length
        for position, own_factor in zip(positions, factors, strict=True):
            grad[position] += weight * slope * own_factor
            if ref is not None:
                penalty, derivative = _kl(ref[position] - new[position], config.kl_estimator)
                kl += weight * penalty / length
                grad[position] += config.kl_coef * weight * derivative / length
            if bonus is not None:
                spread += weight * bonus[position] / length
                grad_entropy[position] = -config.entropy_coef * weight / length
    dead = sum(grad[position] == 0 and grad_entropy[position] == 0 for position in tokens)
    per_step, per_token_ = max(len(used), 1), max(len(tokens), 1)
    metrics = {
        "policy_loss": policy,
        "kl_loss": kl,
        "entropy": spread,
        "ratio_mean": math.fsum(ratios) / len(ratios) if ratios else 1.0,
        "ratio_min": min(ratios, default=1.0),
        "ratio_max": max(ratios, default=1.0),
        "clip_fraction": clipped / per_step,
        "clip_fraction_low": clipped_low / per_step,
        "clip_fraction_high": clipped_high / per_step,
        "token_clip_fraction": clipped_tokens / per_token_,
        "approx_kl": -math.fsum(z.values()) / per_token_,
        "approx_kl_k3": math.fsum(_kl(d, "k3")[0] for d in z.values()) / per_token_,
        "dead_token_fraction": dead / per_token_,
        "num_steps": len(used),
        "num_tokens": len(tokens),
    }
    loss = policy + config.kl_coef * kl - config.entropy_coef * spread
    found = {
        "loss": loss,
        "metrics": list(metrics.values()),
        "grad_log_probs": grad,
        "step_log_ratio": log_ratios,
    }
    if bonus is not None and config.entropy_coef:
        found["grad_entropy"] = grad_entropy
    made = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    for name in ("grad_log_probs", "grad_entropy"):
        if name in made:
            made[name] = made[name].reshape(log_probs.shape)
    return made


def _kl(d: float, estimator: str) -> tuple[float, float]:
    """Return the clamped penalty and its derivative with respect to log pi = log pi_ref - d."""
    inside = abs(d) <= 20
    d = min(max(d, -20.0), 20.0)
    value, derivative = {
        "k1": (-d, 1.0),
        "k2": (0.5 * d * d, -d),
        "k3": (math.expm1(d) - d, -math.expm1(d)),
    }[estimator]
    if abs(value) > 10:
        return math.copysign(10.0, value), 0.0
    return value, derivative if inside else 0.0


def _prefix(counts: Sequence[int]) -> list[int]:
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums
