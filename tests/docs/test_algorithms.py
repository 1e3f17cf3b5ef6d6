"""Every row of the table in docs/algorithms.md against its algorithm in plain loops, in fp64.

The plain forms are written from the equations of the methods. Autograd differentiates them.
"""

from __future__ import annotations

import functools
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
_PROMPTS = 2
_MAX_TOKENS = 32


class Batch(NamedTuple):
    """Trajectories, one per row; what is masked is NaN. `returns` to `gains` are per step."""

    mask: Tensor
    rewards: Tensor
    values: Tensor
    scores: Tensor
    turn_scores: Tensor
    returns: Tensor
    states: Tensor
    gains: Tensor
    token_advantages: Tensor
    old: Tensor
    new: Tensor
    ref: Tensor


def draw(spread: float) -> Batch:
    generator = torch.Generator().manual_seed(11)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def normal() -> Tensor:
        return torch.where(mask, drawn(_ROWS, _LENGTH), torch.nan)

    mask = torch.rand(_ROWS, _LENGTH, generator=generator) < 0.7
    mask[:, 3], mask[:, 4], mask[:, 5] = True, False, True
    # Probabilities of all sizes: thresholds of differences are met by large ones alone.
    old = -0.1 - normal().abs()
    moved = old + spread * normal()
    new = torch.where(moved < 0, moved, old / 2)
    steps = [len(row) for row in runs(mask)]
    # The steps of a prompt meet few states.
    states = [
        _ROWS * (row // (_ROWS // _PROMPTS)) + k // 2
        for row, n in enumerate(steps)
        for k in range(n)
    ]
    gains = [drawn(n) * (torch.arange(n) < n - 1) for n in steps]
    return Batch(
        mask=mask,
        rewards=torch.where(mask, normal(), 0.0),
        values=normal(),
        scores=drawn(_PROMPTS, _ROWS // _PROMPTS),
        turn_scores=drawn(_PROMPTS, _ROWS // _PROMPTS),
        returns=drawn(sum(steps)),
        states=torch.tensor(states),
        gains=torch.cat(gains),
        token_advantages=normal(),
        old=old,
        new=new,
        ref=(new + 0.3 * normal()).detach(),
    )


Action = list[tuple[int, int]]  # the places (row, column) of its tokens


def runs(mask: Tensor) -> list[list[Action]]:
    """The runs of ones of each row."""
    rows: list[list[Action]] = []
    for row, flags in enumerate(mask.tolist()):
        rows.append([])
        for column, is_action in enumerate(flags):
            if is_action and column > 0 and flags[column - 1]:
                rows[-1][-1].append((row, column))
            elif is_action:
                rows[-1].append([(row, column)])
    return rows


def steps_of(batch: Batch) -> list[list[Action]]:
    return runs(batch.mask)


def sequences_of(batch: Batch) -> list[Action]:
    return [[place for step in row for place in step] for row in steps_of(batch)]


def tokens_of(batch: Batch) -> list[list[Action]]:
    return [[[place] for place in sequence] for sequence in sequences_of(batch)]


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


def of_group(scores: Tensor) -> list[float]:
    """The normalized score of each sequence in the group of its prompt."""
    found = []
    for group in scores.tolist():
        mean = sum(group) / len(group)
        spread = math.sqrt(sum((score - mean) ** 2 for score in group) / (len(group) - 1))
        found += [(score - mean) / (spread + 1e-6) for score in group]
    return found


def log_ratios(batch: Batch, action: Action) -> Tensor:
    return torch.stack([batch.new[place] - batch.old[place] for place in action])


def clipped(log_ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    return clipped_ratio(log_ratio.exp(), advantage, low, high)


def clipped_ratio(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
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


def spo(batch: Batch) -> Tensor:
    rows, losses = tokens_of(batch), []
    for actions, advantages in zip(rows, gae(batch, rows), strict=True):
        for action, advantage in zip(actions, advantages, strict=True):
            ratio = log_ratios(batch, action)[0].exp()
            penalty = abs(advantage) / (2 * 0.2) * (ratio - 1) ** 2
            losses.append(-(advantage * ratio - penalty))
    return mean(losses)


# The loss of a token in the place of the batch, with the advantage of its sequence.
TokenLoss = Callable[[Batch, tuple[int, int], float], Tensor]


def of_tokens(batch: Batch, loss: TokenLoss, advantages: list[float]) -> list[list[Tensor]]:
    """The losses of the tokens of each sequence."""
    return [
        [loss(batch, place, advantage) for place in sequence]
        for sequence, advantage in zip(sequences_of(batch), advantages, strict=True)
    ]


def ratio_at(batch: Batch, place: tuple[int, int]) -> Tensor:
    return (batch.new[place] - batch.old[place]).exp()


def clip_of_token(low: float, high: float) -> TokenLoss:
    return lambda batch, place, advantage: clipped_ratio(
        ratio_at(batch, place), advantage, low, high
    )


def grpo(batch: Batch) -> Tensor:
    def loss(batch: Batch, place: tuple[int, int], advantage: float) -> Tensor:
        d = batch.ref[place] - batch.new[place]
        return clip_of_token(0.2, 0.2)(batch, place, advantage) + 0.04 * (d.exp() - d - 1)

    return mean([mean(losses) for losses in of_tokens(batch, loss, of_group(batch.scores))])


def dapo(batch: Batch) -> Tensor:
    losses = of_tokens(batch, clip_of_token(0.2, 0.28), of_group(batch.scores))
    return mean([loss for row in losses for loss in row])


def dr_grpo(batch: Batch) -> Tensor:
    advantages = [
        score - sum(group) / len(group) for group in batch.scores.tolist() for score in group
    ]
    losses = of_tokens(batch, clip_of_token(0.2, 0.2), advantages)
    return mean([torch.stack(row).sum() / _MAX_TOKENS for row in losses])


def gspo(batch: Batch) -> Tensor:
    losses = []
    for sequence, advantage in zip(sequences_of(batch), of_group(batch.scores), strict=True):
        losses.append(clipped(log_ratios(batch, sequence).mean(), advantage, _LOW, _HIGH))
    return mean(losses)


def gspo_token(batch: Batch) -> Tensor:
    losses = []
    for sequence in sequences_of(batch):
        of_sequence = log_ratios(batch, sequence).mean().exp().detach()
        parts = []
        for place in sequence:
            moving = (batch.new[place] - batch.new[place].detach()).exp()
            advantage = batch.token_advantages[place].item()
            parts.append(clipped_ratio(of_sequence * moving, advantage, _LOW, _HIGH))
        losses.append(mean(parts))
    return mean(losses)


def gmpo(batch: Batch) -> Tensor:
    losses = []
    for sequence, advantage in zip(sequences_of(batch), of_group(batch.scores), strict=True):
        sign = 1 if advantage >= 0 else -1
        z = sign * log_ratios(batch, sequence)
        # The pessimistic one of the ratio and of its clip, each token by itself.
        z = sign * torch.minimum(z, z.clamp(-0.4, 0.4))
        losses.append(-advantage * z.mean().exp())
    return mean(losses)


def cispo(batch: Batch) -> Tensor:
    def loss(batch: Batch, place: tuple[int, int], advantage: float) -> Tensor:
        weight = ratio_at(batch, place).detach().clamp(0.0, 5.0)
        return -weight * advantage * batch.new[place]

    losses = of_tokens(batch, loss, of_group(batch.scores))
    return mean([loss for row in losses for loss in row])


def sapo(batch: Batch) -> Tensor:
    def loss(batch: Batch, place: tuple[int, int], advantage: float) -> Tensor:
        temperature = 1.0 if advantage > 0 else 1.05
        gate = torch.sigmoid(temperature * (ratio_at(batch, place) - 1)) * 4 / temperature
        return -gate * advantage

    return mean([mean(losses) for losses in of_tokens(batch, loss, of_group(batch.scores))])


def icepop(batch: Batch) -> Tensor:
    def loss(batch: Batch, place: tuple[int, int], advantage: float) -> Tensor:
        ratio = ratio_at(batch, place)
        return -advantage * ratio * (0.5 <= ratio.item() <= 5.0)

    return mean([mean(losses) for losses in of_tokens(batch, loss, of_group(batch.scores))])


def dppo_tv(batch: Batch) -> Tensor:
    def loss(batch: Batch, place: tuple[int, int], advantage: float) -> Tensor:
        moved = (batch.new[place].exp() - batch.old[place].exp()).item()
        is_trusted = moved <= 0.15 if advantage > 0 else moved >= -0.15
        return -advantage * ratio_at(batch, place).detach() * batch.new[place] * is_trusted

    losses = of_tokens(batch, loss, of_group(batch.scores))
    return mean([loss for row in losses for loss in row])


def of_turns(batch: Batch, advantages: list[float]) -> Tensor:
    """PPO's loss of each token with the advantage of its turn, in the order of the turns."""
    turns = [step for row in steps_of(batch) for step in row]
    return mean(
        [
            clip_of_token(0.2, 0.2)(batch, place, advantage)
            for turn, advantage in zip(turns, advantages, strict=True)
            for place in turn
        ]
    )


def gigpo(batch: Batch) -> Tensor:
    episodes = [
        advantage
        for row, advantage in zip(steps_of(batch), of_group(batch.scores), strict=True)
        for _ in row
    ]
    returns, states = batch.returns.tolist(), batch.states.tolist()
    advantages = []
    for k, episode in enumerate(episodes):
        peers = [value for value, state in zip(returns, states, strict=True) if state == states[k]]
        center, step = sum(peers) / len(peers), 0.0
        if len(peers) > 1:
            variance = sum((value - center) ** 2 for value in peers) / (len(peers) - 1)
            step = (returns[k] - center) / (math.sqrt(variance) + 1e-6)
        advantages.append(episode + step)
    return of_turns(batch, advantages)


def mt_grpo(batch: Batch) -> Tensor:
    outcomes, calls = of_group(batch.scores), of_group(batch.turn_scores)
    return of_turns(
        batch,
        [
            outcomes[row] + (calls[row] if turn == 0 else 0.0)
            for row, turns in enumerate(steps_of(batch))
            for turn in range(len(turns))
        ],
    )


def a2tgpo(batch: Batch) -> Tensor:
    gains, losses = batch.gains.tolist(), []
    for turns, outcome in zip(steps_of(batch), of_group(batch.scores), strict=True):
        own, gains = gains[: len(turns)], gains[len(turns) :]
        for k, turn in enumerate(turns):
            later = own[k:-1]
            credit = sum(later) / math.sqrt(len(later)) if later else 0.0
            scale = 1 + 0.3 * (2 / (1 + math.exp(-own[k])) - 1) if later else 1.0
            loss = clipped(
                log_ratios(batch, turn).mean(),
                outcome + 0.3 * credit,
                scale * 0.003,
                scale * 0.004,
            )
            losses += [loss] * len(turn)
    return mean(losses)


PLAIN: dict[str, Callable[[Batch], Tensor]] = {
    "StepPO (v2 to v4)": steppo,
    "StepPO, as its equation": steppo_equation,
    "CAPO": capo,
    "GiGPO": gigpo,
    "MT-GRPO": mt_grpo,
    "A²TGPO": a2tgpo,
    "PPO": ppo,
    "SPO": spo,
    "GRPO": grpo,
    "DAPO": dapo,
    "Dr. GRPO": dr_grpo,
    "GSPO": gspo,
    "GSPO-token": gspo_token,
    "GMPO": gmpo,
    "CISPO": cispo,
    "SAPO": sapo,
    "IcePop": icepop,
    "DPPO-TV": dppo_tv,
}
# Their published loss has the log-prob as a factor; the gradient alone is that of the package.
OTHER_VALUE = ("CISPO", "DPPO-TV")


def table() -> dict[str, list[str]]:
    """The code of each row of the page's first table: layout, advantages, config, the rest."""
    rows = {}
    for line in _PAGE.read_text().split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        code = [found[1] for cell in cells if (found := re.fullmatch(r"`(.*)`", cell))]
        if len(code) >= 3:
            rows[cells[0]] = [*code, ""][:4]
    return rows


def functions() -> dict[str, object]:
    """What the first block of the page defines."""
    block = re.search(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    assert block is not None
    found: dict[str, object] = {}
    exec(block[1], found)
    return found


def test_every_algorithm_of_the_page_has_a_plain_form():
    assert set(table()) == set(PLAIN)


@pytest.mark.parametrize("name", table())
def test_algorithm_is_its_plain_form(target, name):
    of_layout, of_advantages, of_config, of_rest = table()[name]
    shares = []
    # The spreads reach to both sides of the clip ranges of steps and of tokens.
    for spread in (1e-3, 0.3, 1.5):
        plain, batch = (draw(spread) for _ in range(2))
        leaf, expected_leaf = batch.new.requires_grad_(), plain.new.requires_grad_()
        expected = PLAIN[name](plain)
        expected.backward()

        names = functions() | {"StepPOConfig": StepPOConfig, "max_tokens": _MAX_TOKENS}
        names["step_gae"] = functools.partial(step_gae, backend=target.backend)
        names |= {key: value.to(target.device) for key, value in batch._asdict().items()}
        names["layout"] = StepLayout.from_mask(names["mask"], backend=target.backend)
        names["layout"] = layout = eval(of_layout, names)
        advantages, config = eval(of_advantages, names), eval(of_config, names)
        out = steppo_loss(
            names["new"],
            names["old"],
            advantages,
            layout,
            config=config,
            backend=target.backend,
            **eval(f"dict({of_rest})", names),
        )
        out.loss.backward()
        if name not in OTHER_VALUE:
            torch.testing.assert_close(out.loss.cpu(), expected, rtol=1e-10, atol=1e-12)
        expected_grad = torch.where(plain.mask, expected_leaf.grad, 0.0)
        torch.testing.assert_close(leaf.grad.cpu(), expected_grad, rtol=1e-9, atol=1e-12)
        metrics = out.metrics.as_dict()
        shares.append(max(metrics["clip_fraction"], metrics["dead_token_fraction"]))
    # Some weights vanish nowhere; the others are seen on both sides of their bounds.
    is_smooth = config.surrogate in ("soft", "quadratic")
    assert any(0 < share < 1 for share in shares) == (not is_smooth), shares
