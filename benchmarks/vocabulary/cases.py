"""Inputs of the suites: logits, and hidden states with an output head.

Both are peaked as a trained model's are, not flat as random weights would make them: logits spread
by 2, and the token of a row stands between 3 below and 7 above what it needs for half of the
probability, next to a rival that is up to 6 lower. Flat rows have probabilities that vanish in bf16
and gradients that are almost zero, which flatters whoever rounds or skips.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import steppo_kernels as sk

VOCABULARY, HIDDEN = 151_936, 896
# Wide: bf16 logits move a step's ratio by half a percent, and must not decide what is clipped.
CONFIG = sk.StepPOConfig(clip_low=0.2, clip_high=0.2)
# What a clipped step's log-ratio is moved by.
_BEYOND = 0.5
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Rows of `length` tokens, each with one step of `actions` tokens; `live` are not clipped."""

    rows: int
    length: int
    actions: int
    live: int
    vocabulary: int = VOCABULARY

    @property
    def tokens(self) -> int:
        """All positions."""
        return self.rows * self.length

    @property
    def action_tokens(self) -> int:
        """Those in steps."""
        return self.rows * self.actions

    def __str__(self) -> str:
        clipped = "" if self.live == self.rows else f", {self.rows - self.live} steps clipped"
        return (
            f"{self.tokens} tokens, {self.rows} steps of {self.actions}, V {self.vocabulary}"
            f"{clipped}"
        )


@dataclass(frozen=True)
class Steps:
    """What the loss takes besides log-probs: ``[rows, length]``, and for action tokens alone."""

    mask: Tensor
    layout: sk.StepLayout
    token_ids: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    # The flat positions of the action tokens, and a layout in which there are no others.
    index: Tensor
    packed: sk.StepLayout

    def to(self, device: torch.device) -> Steps:
        """Return the steps on a device."""
        return Steps(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def loss(self, log_probs: Tensor) -> Tensor:
        """Return the reference's loss of log-probs of all tokens, or of the action tokens."""
        if log_probs.numel() == len(self.index):
            old = self.old_log_probs.view(-1)[self.index]
            layout = self.packed
        else:
            old, layout = self.old_log_probs, self.layout
        return sk.steppo_loss(
            log_probs.view(old.shape),
            old,
            self.advantages,
            layout,
            config=CONFIG,
            backend="reference",
        ).loss


@dataclass(frozen=True)
class HeadCase:
    """Hidden states ``[rows, length, d]`` and weight ``[V, d]``, both with gradients, in bf16."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    steps: Steps

    @property
    def gradient_bytes(self) -> int:
        """What the gradients that every variant returns take."""
        return self.hidden.nbytes + self.weight.nbytes

    def reset(self) -> None:
        """Forget the gradients."""
        self.hidden.grad = self.weight.grad = None


@functools.lru_cache(maxsize=3)
def head_case(shape: Shape) -> HeadCase:
    """Return hidden states that point at the weights of their tokens, and the steps of `shape`."""
    generator = torch.Generator().manual_seed(shape.rows)
    weight = _weight()[: shape.vocabulary]
    ids, rivals = torch.randint(shape.vocabulary, (2, shape.tokens), generator=generator)
    height, below = heights(shape.tokens, shape.vocabulary, generator)
    # Rows of the weight have length 1: hidden states with entries of 2 spread the logits by 2.
    hidden = 2 * torch.randn((shape.tokens, HIDDEN), generator=generator)
    hidden += height[:, None] * weight[ids] + (height - below)[:, None] * weight[rivals]
    hidden = hidden.to(_DTYPE)
    mask, index = step_mask(shape, generator)
    log_probs = torch.zeros(shape.tokens)
    with torch.no_grad():
        log_probs[index] = row_log_probs(hidden[index].float() @ weight.float().t(), ids[index])
    return HeadCase(
        shape,
        hidden.view(shape.rows, shape.length, -1).requires_grad_(),
        weight.detach().requires_grad_(),
        steps_of(shape, mask, ids, log_probs, generator),
    )


@functools.cache
def _weight() -> Tensor:
    """Return the largest head, of which smaller ones are the first rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((VOCABULARY, HIDDEN), generator=generator).mul_(HIDDEN**-0.5)
    return weight.to(_DTYPE)


@dataclass(frozen=True)
class LogitsCase:
    """Logits ``[rows, length, V]`` with a gradient, in bf16."""

    shape: Shape
    logits: Tensor
    steps: Steps


@functools.lru_cache(maxsize=1)
def logits_case(shape: Shape) -> LogitsCase:
    """Return logits with the steps of `shape`."""
    generator = torch.Generator().manual_seed(shape.rows)
    ids, rivals = torch.randint(shape.vocabulary, (2, shape.tokens, 1), generator=generator)
    height, below = heights(shape.tokens, shape.vocabulary, generator)
    logits = torch.empty((shape.tokens, shape.vocabulary), dtype=_DTYPE)
    for part in logits.split(64):
        part.copy_(2 * torch.randn(part.shape, generator=generator))
    logits.scatter_(1, rivals, (height - below)[:, None].to(_DTYPE))
    logits.scatter_(1, ids, height[:, None].to(_DTYPE))
    mask, index = step_mask(shape, generator)
    log_probs = torch.zeros(shape.tokens)
    log_probs[index] = row_log_probs(logits[index].float(), ids[index, 0])
    return LogitsCase(
        shape,
        logits.view(shape.rows, shape.length, -1).requires_grad_(),
        steps_of(shape, mask, ids[:, 0], log_probs, generator),
    )


def row_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return log-probs of tokens, in the dtype of the logits, as one writes it in PyTorch."""
    return torch.log_softmax(logits, -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def heights(count: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens, and how far their rivals are below."""
    # The log-sum-exp of logits that are spread by 2: log V + 2^2 / 2.
    middle = math.log(vocabulary) + 2
    height, below = torch.rand((2, count), generator=generator)
    return middle - 3 + 10 * height, 6 * below


def step_mask(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return where the steps stand in their rows, and the flat positions of their tokens."""
    room = shape.length - shape.actions + 1
    starts = torch.randint(room, (shape.rows, 1), generator=generator)
    at = torch.arange(shape.length)
    mask = (at >= starts) & (at < starts + shape.actions)
    return mask, mask.view(-1).nonzero().squeeze(1)


def steps_of(
    shape: Shape, mask: Tensor, ids: Tensor, log_probs: Tensor, generator: torch.Generator
) -> Steps:
    """Return steps whose ratios are close to 1, but those of the clipped ones."""
    advantages = torch.randn(shape.rows, generator=generator)
    old = log_probs.view(mask.shape) + 0.01 * torch.randn(mask.shape, generator=generator)
    # A better step is clipped above, a worse one below.
    old[shape.live :] -= _BEYOND * advantages.sign()[shape.live :, None]
    layout = sk.StepLayout.from_mask(mask)
    every = torch.ones(layout.num_tokens, dtype=torch.bool)
    borders = torch.arange(shape.rows + 1) * shape.actions
    return Steps(
        mask,
        layout,
        ids.view(mask.shape),
        old,
        advantages,
        layout.token_index,
        sk.StepLayout.from_mask(every, cu_seqlens=borders),
    )
