"""Wrong calls of the family of losses: bounds, combinations, log-ratios, rollout weights."""

from __future__ import annotations

import pytest
import torch
from wrong_calls import (
    CENTERED,
    LAYOUT,
    MASK,
    META,
    NAN,
    QUADRATIC,
    SOFT,
    STEPS,
    TOKENS,
    check,
    linear_loss,
    log_ratios,
    logits_loss,
    loss,
    mask_loss,
    of_config,
    of_step,
    of_token,
    rollout,
    with_one,
)

# The exception, how its message begins, and the call.
_CALLS = [
    # the family: bounds of steps, and what the head and logits report
    (ValueError, "clip_low: got shape (3,)", loss(clip_low=STEPS[:3].abs())),
    (ValueError, "clip_high: got shape (2, 6)", loss(clip_high=TOKENS.abs())),
    (ValueError, "clip_high: got shape ()", loss(clip_high=torch.tensor(0.1))),
    (TypeError, "clip_low: got float", loss(clip_low=0.1)),
    (TypeError, "clip_high: got list", loss(clip_high=[0.1] * 4)),
    (TypeError, "clip_low: got torch.int64", loss(clip_low=STEPS.long())),
    (TypeError, "clip_high: got torch.bool", loss(clip_high=STEPS > 0)),
    (ValueError, "clip_low: got a tensor on meta", loss(clip_low=STEPS.to("meta"))),
    (ValueError, "clip_high: got a tensor on meta", loss(clip_high=STEPS.to("meta"))),
    (
        ValueError,
        "clip_low: got -1.0, expected finite numbers of at least 0, at most 1",
        loss(clip_low=STEPS),
    ),
    (ValueError, "clip_low: got nan", loss(clip_low=of_step(NAN))),
    (ValueError, "clip_low: got 1.5", loss(clip_low=of_step(1.5))),
    (ValueError, "clip_low: got inf", loss(clip_low=of_step(float("inf")))),
    (ValueError, "clip_high: got -0.5", loss(clip_high=of_step(-0.5))),
    (ValueError, "clip_high: got nan", loss(clip_high=of_step(NAN))),
    (
        ValueError,
        "clip_high: got inf, expected finite numbers of at least 0",
        loss(clip_high=of_step(float("inf"))),
    ),
    (
        ValueError,
        "clip_low: got 0.0, expected finite numbers above 0",
        loss(clip_low=of_step(0.0), config=QUADRATIC),
    ),
    (
        ValueError,
        "clip_high: got 0.0, expected finite numbers above 0",
        loss(clip_high=of_step(0.0), config=QUADRATIC),
    ),
    (ValueError, "clip_low: got it with a mask", mask_loss(clip_low=of_step(0.5))),
    (ValueError, "clip_high: got it with a mask", mask_loss(clip_high=of_step(0.5))),
    (
        ValueError,
        "clip_low: got it with the surrogate 'soft'",
        loss(clip_low=of_step(0.5), config=SOFT),
    ),
    (
        ValueError,
        "clip_high: got it with the surrogate 'soft'",
        loss(clip_high=of_step(0.5), config=SOFT),
    ),
    (ValueError, "clip_low: got shape (3,)", logits_loss(clip_low=STEPS[:3].abs())),
    (ValueError, "clip_high: got nan", logits_loss(clip_high=of_step(NAN))),
    (
        ValueError,
        "clip_high: got it with a mask",
        logits_loss(clip_high=of_step(0.5), advantages=TOKENS, layout=MASK),
    ),
    (ValueError, "clip_low: got 1.5", linear_loss(clip_low=of_step(1.5))),
    (
        ValueError,
        "clip_high: got it with the surrogate 'soft'",
        linear_loss(clip_high=of_step(0.5), config=SOFT),
    ),
    (TypeError, "report_entropy: got int", logits_loss(report_entropy=1)),
    (TypeError, "report_entropy: got NoneType", linear_loss(report_entropy=None)),
    (TypeError, "report_entropy: got Tensor", linear_loss(report_entropy=torch.tensor(True))),
    # StepPOConfig; tests/ground/test_config.py has every combination
    (ValueError, "surrogate: got 'ppo'", of_config(surrogate="ppo")),
    (TypeError, "token_clip: got float", of_config(token_clip=0.1)),
    (ValueError, "token_clip: got 3 of them", of_config(token_clip=(0.1, 0.1, 0.1))),
    (
        ValueError,
        "soft_temperature: got 0.0",
        of_config(surrogate="soft", soft_temperature=(0.0, 1.0)),
    ),
    (ValueError, "ratio: got 'geometric' with the surrogate 'tv'", of_config(surrogate="tv")),
    (
        ValueError,
        "dual_clip: got 3.0 with the surrogate 'mask'",
        of_config(surrogate="mask", dual_clip=3.0),
    ),
    (
        ValueError,
        "clip_low: got 0.0 with the surrogate 'quadratic'",
        of_config(surrogate="quadratic", clip_low=0.0),
    ),
    # step_log_ratios
    (TypeError, "log_probs: got NoneType", log_ratios(log_probs=None)),
    (TypeError, "log_probs: got torch.int64", log_ratios(log_probs=TOKENS.long())),
    (ValueError, "log_probs: got shape (6, 2)", log_ratios(log_probs=TOKENS.t())),
    (ValueError, "log_probs: got a tensor on meta", log_ratios(log_probs=META)),
    (ValueError, "old_log_probs: got shape (13,)", log_ratios(old_log_probs=torch.zeros(13))),
    (TypeError, "old_log_probs: got float", log_ratios(old_log_probs=0.0)),
    (TypeError, "layout: got NoneType", log_ratios(layout=None)),
    (ValueError, "layout: got the value 2", log_ratios(layout=with_one(2.0))),
    (ValueError, "ratio: got 'mean'", log_ratios(ratio="mean")),
    (ValueError, "ratio: got StepPOConfig", log_ratios(ratio=CENTERED)),
    (ValueError, "ratio_center: got nan", log_ratios(ratio="centered", ratio_center=NAN)),
    (ValueError, "ratio_center: got shape (4,)", log_ratios(ratio_center=STEPS)),
    (ValueError, "backend: got 'numpy'", log_ratios(backend="numpy")),
    (RuntimeError, "backend: 'cuda' cannot run", log_ratios(backend="cuda")),
    # rollout_weights
    (TypeError, "old_log_probs: got NoneType", rollout(old_log_probs=None)),
    (ValueError, "old_log_probs: got shape (2, 5)", rollout(old_log_probs=TOKENS[:, :5])),
    (TypeError, "rollout_log_probs: got NoneType", rollout(rollout_log_probs=None)),
    (ValueError, "rollout_log_probs: got a tensor on meta", rollout(rollout_log_probs=META)),
    (ValueError, "rollout_log_probs: got shape (4,)", rollout(rollout_log_probs=STEPS)),
    (ValueError, "rollout_log_probs: got nan at", rollout(rollout_log_probs=of_token(NAN))),
    (
        ValueError,
        "rollout_log_probs: got -inf at",
        rollout(rollout_log_probs=of_token(-float("inf")), level="step"),
    ),
    (ValueError, "level: got 'row'", rollout(level="row")),
    (ValueError, "pool: got 'max'", rollout(pool="max")),
    (ValueError, "outside: got 'drop'", rollout(outside="drop")),
    (ValueError, "low: got -0.1", rollout(low=-0.1)),
    (ValueError, "low: got 2.0, expected at most high", rollout(low=2.0, high=1.0)),
    (ValueError, "high: got nan", rollout(high=NAN)),
    (TypeError, "high: got bool", rollout(high=True)),
    (TypeError, "low: got Tensor", rollout(low=torch.tensor(0.5))),
    (TypeError, "layout: got list", rollout(layout=[[1, 1]])),
    (ValueError, "layout: got the value nan", rollout(layout=with_one(NAN))),
    (RuntimeError, "backend: 'cuda' cannot run", rollout(backend="cuda")),
]


@pytest.mark.usefixtures("cuda_takes_gpus")
@pytest.mark.parametrize(("exception", "text", "call"), _CALLS, ids=[text for _, text, _ in _CALLS])
def test_wrong_call(exception, text, call):
    check(exception, text, call)


def test_the_calls_are_right_without_their_mistake():
    for call in (
        loss(clip_low=of_step(0.0), clip_high=of_step(9.0)),
        loss(clip_low=of_step(1.0), clip_high=of_step(0.5), config=QUADRATIC),
        logits_loss(clip_low=of_step(0.5), report_entropy=True),
        linear_loss(clip_high=of_step(0.5), report_entropy=True),
        log_ratios(),
        log_ratios(layout=MASK, ratio="centered", ratio_center=0.1),
        rollout(),
        rollout(rollout_log_probs=of_token(NAN, 0), low=0.5, high=2.0),
        rollout(layout=MASK, level="trajectory", pool="sum", outside="mask", low=0, high=0),
    ):
        assert call() is not None


@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
def test_bounds_of_empty_steps_may_be_anything(target, name):
    """They bound nothing."""
    if target.device != "cpu":
        pytest.skip("the calls hold CPU tensors")
    # The second step has no token left.
    kept = MASK.clone()
    kept[0, 4] = False
    layout = LAYOUT.keep(kept)
    assert layout.step_lengths.tolist() == [2, 0, 2, 1]
    losses = [
        loss(**{"layout": layout, name: of_step(bound), "backend": target.backend})().loss
        for bound in (0.5, NAN, -1.0, float("inf"))
    ]
    assert all(torch.equal(losses[0], other) for other in losses[1:])
    with pytest.raises(ValueError, match=f"^{name}: got nan"):
        loss(**{name: of_step(NAN), "backend": target.backend})()
