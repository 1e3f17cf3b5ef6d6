"""Log-probs in half precision beside a clip range that is smaller than their rounding."""

from __future__ import annotations

import warnings

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    steppo_loss,
    steppo_loss_from_logits,
)

_LAYOUT = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]), backend="reference")
_ADVANTAGES = torch.tensor([1.0, -1.0])
_WIDE = StepPOConfig(ratio="token", clip_low=0.2, clip_high=0.2)


def texts(log_probs, old, config=None, **options):
    """Return what the loss warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options |= {} if config is None else {"config": config}
        steppo_loss(log_probs, old, _ADVANTAGES, _LAYOUT, backend="reference", **options)
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_the_default_range_and_half_precision():
    full = torch.full((1, 5), -1.5)
    for dtype, error in ((torch.bfloat16, "0.0039"), (torch.float16, "0.00049")):
        half = full.to(dtype)
        found = texts(full, half)
        assert len(found) == 1
        assert f"old_log_probs: got {dtype} with clip_low=0.0003" in found[0]
        assert f"by up to {error}" in found[0]
        assert [text.split(":")[0] for text in texts(half, half)] == ["log_probs", "old_log_probs"]
    assert not texts(full, full)
    assert not texts(full.double(), full)


def test_where_rounding_decides_nothing():
    half = torch.full((1, 5), -1.5, dtype=torch.bfloat16)
    # On-policy, every ratio is 1.
    assert not texts(half, None)
    assert not texts(half, half, _WIDE)
    soft = StepPOConfig(surrogate="soft", ratio="token")
    assert not texts(half, half, soft)
    # Without a range the weight is a constant.
    assert not texts(half, half, StepPOConfig(surrogate="cispo", clip_low=0.0, clip_high=0.0))
    bounds = {"clip_low": torch.full((2,), 0.2), "clip_high": torch.full((2,), 0.2)}
    assert not texts(half, half, **bounds)


def test_one_bound_is_enough():
    half = torch.full((1, 5), -1.5, dtype=torch.bfloat16)
    found = texts(half, half, StepPOConfig(clip_low=0.2, clip_high=1e-3))
    assert all("with clip_high=0.001" in text for text in found)
    assert len(found) == 2
    assert texts(half, half, clip_low=torch.full((2,), 0.2))


def test_the_error_that_it_names_is_that_of_rounding():
    exact = -1 - torch.rand(10000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        largest = float((exact.to(dtype).double() - exact).abs().max())
        limit = torch.finfo(dtype).eps / 2
        # On its way to fp16 it is rounded to fp32 too.
        assert 0.9 * limit < largest <= limit * (1 + 1e-3)


@pytest.mark.parametrize("depth", ["logits", "hidden"])
def test_logits_and_states_may_be_halves(depth):
    """Their log-probs are formed in fp32; only the old ones may have been rounded."""
    ids, old = torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), -1.5)
    states = torch.randn(1, 5, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))

    def loss(old):
        given = (ids, old, _ADVANTAGES, _LAYOUT)
        if depth == "logits":
            return steppo_loss_from_logits(states, *given, backend="reference")
        return linear_steppo_loss(states, states[0], *given, backend="reference")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(old)
    with pytest.warns(UserWarning, match="old_log_probs: got torch.bfloat16") as caught:
        loss(old.bfloat16())
    assert caught[0].filename == __file__


def test_it_is_said_once():
    """Python's own filter shows a warning of a line once."""
    half = torch.full((1, 5), -1.5, dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            steppo_loss(half, None, _ADVANTAGES, _LAYOUT)
            steppo_loss(half.float(), half, _ADVANTAGES, _LAYOUT)
    assert len(caught) == 1


def test_the_default_range_and_single_tokens():
    full = torch.full((1, 5), -1.5)
    (found,) = texts(full, full, StepPOConfig(ratio="token"))
    assert "config: got ratio='token' with the default clip range (0.0003, 0.0004)" in found
    for surrogate in ("mask", "tv", "quadratic"):
        assert len(texts(full, full, StepPOConfig(ratio="token", surrogate=surrogate))) == 1
    assert texts(full, full, _WIDE) == []
    assert texts(full, full) == []
    assert texts(full, full, StepPOConfig(ratio="token", surrogate="cispo")) == []
    # Nothing is clipped on-policy, and bounds of steps take the place of the range.
    assert texts(full, None, StepPOConfig(ratio="token")) == []
    assert texts(full, full, StepPOConfig(ratio="token", surrogate="soft")) == []
    bounds = torch.full((2,), 0.2)
    assert texts(full, full, StepPOConfig(ratio="token"), clip_low=bounds) == []


def test_the_default_range_and_steps_of_single_tokens():
    full = torch.full((1, 5), -1.5)
    layout = _LAYOUT.per_token()
    advantages = torch.ones(layout.num_steps)

    def found(config=StepPOConfig(), layout=layout, advantages=advantages):  # noqa: B008
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steppo_loss(full, full, advantages, layout, config=config)
        return [str(one.message) for one in caught]

    (text,) = found()
    assert text.startswith("config: got as many steps as tokens with the default clip range")
    assert "without a gradient" in text
    (text,) = found(StepPOConfig(surrogate="quadratic"))
    assert "pulls tokens back harder than their advantages push them" in text
    assert found(StepPOConfig(clip_low=0.2, clip_high=0.2)) == []
    assert found(StepPOConfig(surrogate="cispo")) == []
    # One step of one token says nothing of the others.
    single = StepLayout.from_mask(torch.tensor([[0, 1, 0, 0, 0]]))
    assert found(layout=single, advantages=torch.ones(1)) == []
