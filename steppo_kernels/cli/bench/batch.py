"""The batches that are timed: the same numbers in every run on a device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import StepPOConfig
from ...layout.broadcast import broadcast_to_tokens
from ...layout.step_layout import StepLayout
from ...log_probs.token_log_probs import token_log_probs
from ..validate.draw import ragged_mask
from .case import Size

# Every size on a CPU is one that plain PyTorch works through in a few tenths of a second on two
# cores. A GPU would only wait for launches there.
ON_TOKENS = {
    "cpu": (Size(8, 512), Size(64, 8192)),
    "cuda": (Size(64, 8192), Size(256, 16384)),
}
ON_LOGITS = {
    "cpu": (Size(4, 16, 32768), Size(4, 16, 151936)),
    "cuda": (Size(8, 128, 32768), Size(8, 128, 151936)),
}
ON_HIDDEN = {
    "cpu": (Size(4, 16, 32768, 256), Size(4, 32, 32768, 512)),
    "cuda": (Size(8, 128, 32768, 1024), Size(8, 128, 151936, 2048)),
}

# The bounds lie far from the ratios that are drawn: no rounding, also of logits to bf16, carries a
# ratio over one.
CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.2)
_NEAR, _BEYOND = 0.01, 0.5
_CLIPPED_SHARE = 0.125
# Mean lengths of steps, and of the gaps between them.
_MEAN_STEP, _SHORT_STEP = 47.0, 12.0


@dataclass(frozen=True, eq=False)
class Batch:
    """Log-probs, values and steps of a token shape, fp32.

    Attributes:
        mask: bool of the token shape: runs of action tokens, about half of all.
        layout: its runs as steps.
        log_probs, old_log_probs: an eighth of the steps is clipped, the others are far from it.
        values, rewards: of the token shape.
        advantages: per step.
        token_advantages: the same per token.
    """

    mask: Tensor
    layout: StepLayout
    log_probs: Tensor
    old_log_probs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    token_advantages: Tensor


class Draw:
    """Numbers on a device. Two of one seed draw the same."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, device=self._device, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers from 0 to 1."""
        return torch.rand(shape, device=self._device, generator=self._generator)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Return int64 from 0 up to `below`."""
        return torch.randint(below, shape, device=self._device, generator=self._generator)


@functools.lru_cache(maxsize=4)
def token_batch(size: Size, device: torch.device) -> Batch:
    """Return a batch of `size`, whose steps are shorter where it also has a vocabulary."""
    mean_step = _SHORT_STEP if size.vocabulary else _MEAN_STEP
    on_host = torch.Generator().manual_seed(0)
    mask = ragged_mask(size.rows, size.length, mean_step=mean_step, generator=on_host).to(device)
    layout = StepLayout.from_mask(mask, backend="reference")
    draw = Draw(0, device)
    log_probs = -2.0 * draw.normal(*mask.shape).abs() - 0.01
    advantages = draw.normal(layout.num_steps)
    return Batch(
        mask=mask,
        layout=layout,
        log_probs=log_probs,
        old_log_probs=_old(log_probs, layout, advantages, draw),
        values=draw.normal(*mask.shape),
        rewards=draw.normal(*mask.shape),
        advantages=advantages,
        token_advantages=broadcast_to_tokens(advantages, layout, backend="reference"),
    )


def _old(log_probs: Tensor, layout: StepLayout, advantages: Tensor, draw: Draw) -> Tensor:
    """Return log-probs of the policy that acted."""
    # A better step is clipped above, a worse one below.
    moved = _BEYOND * advantages.sign() * (draw.uniform(layout.num_steps) < _CLIPPED_SHARE)
    spread = broadcast_to_tokens(moved, layout, backend="reference")
    return log_probs - spread - _NEAR * draw.normal(*log_probs.shape)


@dataclass(frozen=True, eq=False)
class Rows:
    """What the functions on logits and on hidden states take beside them."""

    batch: Batch
    token_ids: Tensor
    old_log_probs: Tensor


@functools.lru_cache(maxsize=2)
def logits_batch(size: Size, device: torch.device) -> tuple[Tensor, Rows]:
    """Return bf16 logits, peaked at tokens as those of a trained model, and the rest."""
    batch, draw = token_batch(size, device), Draw(1, device)
    shape = batch.mask.shape
    ids = draw.integers(size.vocabulary, *shape)
    height = _height(draw.uniform(*shape), size.vocabulary)
    logits = (2.0 * draw.normal(*shape, size.vocabulary)).to(torch.bfloat16)
    logits.scatter_(-1, ids[..., None], height[..., None].to(logits.dtype))
    return logits, _rows(batch, ids, logits, draw)


@functools.lru_cache(maxsize=2)
def hidden_batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Rows]:
    """Return bf16 hidden states that point at their tokens, the weight of a head, and the rest."""
    batch, draw = token_batch(size, device), Draw(1, device)
    shape = batch.mask.shape
    ids = draw.integers(size.vocabulary, *shape)
    height = _height(draw.uniform(*shape), size.vocabulary)
    # Rows of the weight have length 1: hidden states with entries of 2 spread the logits by 2.
    weight = draw.normal(size.vocabulary, size.hidden) * size.hidden**-0.5
    hidden = 2.0 * draw.normal(*shape, size.hidden) + height[..., None] * weight[ids]
    hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    logits = hidden.float() @ weight.float().t()
    return hidden, weight, _rows(batch, ids, logits, draw)


def _height(uniform: Tensor, vocabulary: int) -> Tensor:
    """Return logits of the tokens: from 3 below to 7 above what gives half of the probability."""
    # The log-sum-exp of logits that are spread by 2.
    middle = math.log(vocabulary) + 2.0
    return middle - 3.0 + 10.0 * uniform


def _rows(batch: Batch, ids: Tensor, logits: Tensor, draw: Draw) -> Rows:
    log_probs = token_log_probs(logits, ids, backend="reference")
    assert isinstance(log_probs, Tensor)
    return Rows(batch, ids, _old(log_probs, batch.layout, batch.advantages, draw))
