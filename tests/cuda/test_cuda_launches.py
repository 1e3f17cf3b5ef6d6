"""How many kernels a call launches: that is what small batches take their time for."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_on_host
import pytest
import torch

import steppo_kernels as sk
from steppo_kernels.backends import choice

pytestmark = pytest.mark.skipif(
    not choice.cuda_on_host(), reason="a profiler counts those of a GPU (benchmarks/gpu/clock.py)"
)

_SHAPE = (3, 300)
_LONG = 1 << 14


def _leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def _mask(shape: tuple[int, int] = _SHAPE) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.8


def _policy(on_mask: bool, shape: tuple[int, int] = _SHAPE, **numbers: object):
    """Return a call of the loss on a layout or a mask."""
    steps = _mask(shape) if on_mask else sk.StepLayout.from_mask(_mask(shape), backend="cpu")
    config = sk.StepPOConfig(clip_low=0.2, clip_high=0.2, **numbers)
    new, old, of_tokens = _leaf(*shape), _leaf(*shape, seed=2).detach(), torch.ones(shape)
    advantages = of_tokens if on_mask else torch.ones(steps.num_steps)
    return lambda: (
        sk.steppo_loss(
            new, old, advantages, steps, config=config, ref_log_probs=old, backend="cuda"
        ).loss
    )


def _value(of_tokens: bool):
    layout = sk.StepLayout.from_mask(_mask(), backend="cpu")
    values = _leaf(*(_SHAPE if of_tokens else (layout.num_steps,)))
    returns = torch.ones(layout.num_steps)
    return lambda: sk.step_value_loss(values, returns, layout, backend="cuda").loss


def _gae(whiten: bool, shape: tuple[int, int] = _SHAPE):
    layout = sk.StepLayout.from_mask(_mask(shape), backend="cpu")
    rewards, values = torch.ones(shape), torch.ones(shape)
    return lambda: sk.step_gae(rewards, values, layout, whiten=whiten, backend="cuda").advantages


def _log_probs(**options: bool):
    logits, ids = _leaf(5, 70), torch.arange(5)
    return lambda: sk.token_log_probs(logits, ids, backend="cuda", **options)


def _from_logits():
    layout = sk.StepLayout.from_mask(_mask((1, 40)), backend="cpu")
    logits, ids = _leaf(1, 40, 70), torch.zeros(1, 40, dtype=torch.int64)
    old, advantages = torch.zeros(1, 40), torch.ones(layout.num_steps)
    return lambda: (
        sk.steppo_loss_from_logits(logits, ids, old, advantages, layout, backend="cuda").loss
    )


# Launches of the call, and of its backward pass.
_CASES = {
    "layout": (_policy(False), 1, 1),
    "layout, kl": (_policy(False, kl_coef=0.1), 1, 1),
    "layout, ratios of tokens": (_policy(False, ratio="token"), 1, 1),
    # The mean of all log-ratios comes first.
    "layout, centered": (_policy(False, ratio="centered"), 2, 1),
    "mask": (_policy(True), 1, 1),
    "mask, ratios of tokens": (_policy(True, ratio="token"), 1, 1),
    "mask, centered": (_policy(True, ratio="centered"), 2, 1),
    "mask, trajectory_mean": (_policy(True, reduction="trajectory_mean"), 1, 1),
    # Nobody else knows how many steps such a row has.
    "mask, trajectory_mean of long rows": (
        _policy(True, (1, 2 * _LONG), reduction="trajectory_mean"),
        2,
        1,
    ),
    "values of steps": (_value(False), 1, 1),
    # States may lie anywhere, and what is none has a gradient of 0.
    "values of tokens": (_value(True), 2, 1),
    "gae": (_gae(False), 1, None),
    # The last block whitens what is few.
    "gae, whitened": (_gae(True), 1, None),
    "gae, many whitened": (_gae(True, (5, _LONG)), 2, None),
    "log_probs": (_log_probs(), 1, 1),
    "log_probs, in place": (_log_probs(inplace_backward=True), 1, 1),
    "loss from logits": (_from_logits(), 2, 2),
}


@pytest.mark.parametrize("case", _CASES)
def test_launches_of_a_call(case):
    call, forward, backward = _CASES[case]
    count = cuda_on_host.launches_of(Path(os.environ["STEPPO_CUDA_ON_HOST"]))
    before = count()
    out = call()
    between = count()
    assert between - before == forward
    if backward is None:
        assert not out.requires_grad
        return
    out.sum().backward()
    assert count() - between == backward
