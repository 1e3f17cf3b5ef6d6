"""Every row of the table in docs/algorithms.md against its algorithm in plain loops, in fp64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from steppo_kernels import StepLayout, StepPOConfig, step_gae, steppo_loss

_PAGE = Path(__file__).parents[2] / "docs/algorithms.md"
_GAMMA, _LAM = 0.99, 1.0  # the defaults of step_gae
_LOW, _HIGH = 3e-4, 4e-4  # the papers' (StepPO's scripts, GSPO section 5)
_ROWS, _LENGTH = 6, 14


class Batch(NamedTuple):
    """Trajectories, one per row; what is masked is NaN."""

    mask: Tensor
    rewards: Tensor
    values: Tensor
    scores: Tensor
    old: Tensor
    new: Tensor


def draw(spread: float) -> Batch:
    generator = torch.Generator().manual_seed(11)

    def normal() -> Tensor:
        made = torch.randn(_ROWS, _LENGTH, generator=generator, dtype=torch.float64)
        return torch.where(mask, made, torch.nan)

    mask = torch.rand(_ROWS, _LENGTH, generator=generator) < 0.7
    mask[:, 3], mask[:, 4], mask[:, 5] = True, False, True
    old = normal() - 3.0
    scores = torch.rand(2, _ROWS // 2, generator=generator, dtype=torch.float64)
    rewards = torch.where(mask, normal(), 0.0)
    return Batch(mask, rewards, normal(), scores, old, old + spread * normal())


Action = list[tuple[int, int]]  # the places (row, column) of its tokens


def steps_of(batch: Batch) -> list[list[Action]]:
    """The runs of ones of each row."""
    rows: list[list[Action]] = []
    for row, flags in enumerate(batch.mask.tolist()):
        rows.append([])
        for column, is_action in enumerate(flags):
            if is_action and column > 0 and flags[column - 1]:
                rows[-1][-1].append((row, column))
            elif is_action:
                rows[-1].append([(row, column)])
    return rows


def tokens_of(batch: Batch) -> list[list[Action]]:
    return [[[place] for step in row for place in step] for row in steps_of(batch)]


def gae(batch: Batch, rows: list[list[Action]]) -> list[list[float]]:
    """Whitened advantages of the actions of each row."""
    advantages: list[list[float]] = []
    for actions in rows:
        rewards = [sum(batch.rewards[place].item() for place in action) for action in actions]
        values = [batch.values[action[0]].item() for action in actions] + [0.0]
        found = [0.0] * (len(actions) + 1)
        for k in reversed(range(len(actions))):
            delta = rewards[k] + _GAMMA * values[k + 1] - values[k]
            found[k] = delta + _GAMMA * _LAM * found[k + 1]
        advantages.append(found[:-1])
    every = [a for row in advantages for a in row]
    mean = sum(every) / len(every)
    spread = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1))
    return [[(a - mean) / (spread + 1e-8) for a in row] for row in advantages]


def group_advantages(scores: Tensor) -> Tensor:
    """The advantage of each sequence within the group of its prompt."""
    spread = scores.std(1, keepdim=True)
    return ((scores - scores.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()


def log_ratios(batch: Batch, action: Action) -> Tensor:
    return torch.stack([batch.new[place] - batch.old[place] for place in action])


def clipped(log_ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-advantage * ratio, -advantage * bounded)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def steppo_rows(batch: Batch) -> list[list[Tensor]]:
    """The losses of the steps of each row: clipped ratios exp(mean z)."""
    rows = steps_of(batch)
    return [
        [
            clipped(log_ratios(batch, action).mean(), advantage, _LOW, _HIGH)
            for action, advantage in zip(actions, advantages, strict=True)
        ]
        for actions, advantages in zip(rows, gae(batch, rows), strict=True)
    ]


def steppo(batch: Batch) -> Tensor:
    return mean([loss for row in steppo_rows(batch) for loss in row])


def steppo_equation(batch: Batch) -> Tensor:
    return mean([mean(row) for row in steppo_rows(batch)])


def capo(batch: Batch) -> Tensor:
    rows = steps_of(batch)
    every = [log_ratios(batch, action) for actions in rows for action in actions]
    center = torch.cat(every).mean().detach()
    advantages = [a for row in gae(batch, rows) for a in row]
    return mean(
        [
            clipped(center + (z - center).sum() / math.sqrt(len(z)), advantage, _LOW, _HIGH)
            for z, advantage in zip(every, advantages, strict=True)
        ]
    )


def ppo(batch: Batch) -> Tensor:
    rows = tokens_of(batch)
    return mean(
        [
            clipped(log_ratios(batch, action)[0], advantage, 0.2, 0.2)
            for actions, advantages in zip(rows, gae(batch, rows), strict=True)
            for action, advantage in zip(actions, advantages, strict=True)
        ]
    )


def gspo(batch: Batch) -> Tensor:
    losses = []
    for row, advantage in zip(steps_of(batch), group_advantages(batch.scores), strict=True):
        sequence = [place for step in row for place in step]
        losses.append(clipped(log_ratios(batch, sequence).mean(), advantage.item(), _LOW, _HIGH))
    return mean(losses)


PLAIN: dict[str, Callable[[Batch], Tensor]] = {
    "StepPO": steppo,
    "StepPO, as its equation": steppo_equation,
    "CAPO": capo,
    "PPO": ppo,
    "GSPO": gspo,
}


def table() -> dict[str, list[str]]:
    """The code of each row of the page's first table: layout, advantages, config."""
    rows = {}
    for line in _PAGE.read_text().split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        code = [found[1] for cell in cells if (found := re.fullmatch(r"`(.*)`", cell))]
        if len(code) == 3:
            rows[cells[0]] = code
    return rows


def test_every_algorithm_of_the_page_has_a_plain_form():
    assert set(table()) == set(PLAIN)


@pytest.mark.parametrize("name", table())
def test_algorithm_is_its_plain_form(target, name):
    of_layout, of_advantages, of_config = table()[name]
    shares = []
    # The spreads reach to both sides of the clip ranges of steps and of tokens.
    for spread in (1e-3, 0.3):
        plain, batch = (draw(spread) for _ in range(2))
        leaf, expected_leaf = batch.new.requires_grad_(), plain.new.requires_grad_()
        expected = PLAIN[name](plain)
        expected.backward()

        names = {"StepPOConfig": StepPOConfig, "group_advantages": group_advantages}
        names["step_gae"] = lambda *given: step_gae(*given, backend=target.backend).advantages
        names |= batch._asdict()
        names = {
            key: value.to(target.device) if isinstance(value, Tensor) else value
            for key, value in names.items()
        }
        names["layout"] = StepLayout.from_mask(names["mask"], backend=target.backend)
        names["layout"] = layout = eval(of_layout, names)
        advantages, config = eval(of_advantages, names), eval(of_config, names)
        out = steppo_loss(
            names["new"], names["old"], advantages, layout, config=config, backend=target.backend
        )
        out.loss.backward()
        torch.testing.assert_close(out.loss.cpu(), expected, rtol=1e-10, atol=1e-12)
        expected_grad = torch.where(plain.mask, expected_leaf.grad, 0.0)
        torch.testing.assert_close(leaf.grad.cpu(), expected_grad, rtol=1e-9, atol=1e-12)
        shares.append(out.metrics.as_dict()["clip_fraction"])
    assert any(0 < share < 1 for share in shares), shares
