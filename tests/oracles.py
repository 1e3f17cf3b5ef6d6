"""What the package must compute, as plain Python loops over steps: slow, and easy to believe."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import oracle
import torch
from oracle import LossConfig, OracleLayout, PolicyLoss
from torch import Tensor

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.outputs import POLICY_METRICS


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

    In front of the first step they go to this one. A row whose step has no token keeps its own.
    """
    owner = {position: step for step, tokens in enumerate(steps.tokens) for position in tokens}
    empty = {state: step for step, state in enumerate(steps.states) if not steps.tokens[step]}
    total = [0.0] * len(steps.tokens)
    for start, end in itertools.pairwise(rows):
        actions = [position for position in range(start, end) if position in owner]
        for position in range(start, end):
            before = [action for action in actions if action <= position]
            if actions:
                total[owner[before[-1] if before else actions[0]]] += rewards[position]
            elif start in empty:
                total[empty[start]] += rewards[position]
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
    layout: OracleLayout,
    config: StepPOConfig,
    *,
    normalizer: float | None = None,
    ratio_center: float | None = None,
    **given: Tensor,
) -> tuple[dict[str, Tensor], PolicyLoss]:
    """Return what `batches.policy_results` returns with a layout, and what the loops say of it.

    The tensors of `given` have an entry a token, masked or not; step weights and bounds one a step.
    """
    found = oracle.policy_loss(
        layout=layout,
        config=LossConfig(**dataclasses.asdict(config)),
        normalizer=normalizer,
        ratio_center=ratio_center,
        **{name: value.reshape(-1).tolist() for name, value in given.items()},
    )
    metrics = {"ratio_mean": 1.0, "ratio_min": 1.0, "ratio_max": 1.0, **found.metrics}
    results = {
        "loss": torch.tensor(found.loss, dtype=torch.float64),
        "metrics": torch.tensor([metrics[name] for name in POLICY_METRICS], dtype=torch.float64),
        "step_log_ratio": torch.tensor(found.step_log_ratio, dtype=torch.float64),
        "grad_log_probs": torch.tensor(found.of_log_probs, dtype=torch.float64).view(layout.shape),
    }
    if config.entropy_coef:
        of_entropy = torch.tensor(found.of_entropy, dtype=torch.float64)
        results["grad_entropy"] = of_entropy.view(layout.shape)
    return results, found


def _prefix(counts: Sequence[int]) -> list[int]:
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums
