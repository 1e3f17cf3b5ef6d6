"""The oracle's gradients are those of its values, by differences."""

from __future__ import annotations

import math

import pytest
from oracle import (
    LossConfig,
    OracleLayout,
    head_gradients,
    head_logits,
    log_prob_gradients,
    log_probs,
    policy_loss,
    value_loss,
)

from fuzz.slopes import differences, floats


def _layout(kind: str) -> OracleLayout:
    if kind == "mask":
        mask = [False, True, True, False, True, True, True, True, False, True, True, True]
        return OracleLayout.from_mask(mask, (2, 6))
    mask = [True, True, True, False, True, True, False, False, True, True, True, False]
    rows = OracleLayout.from_rows(mask, (6, 2), "abaabb", [0, 0, 2, 1, 5, 3])
    return rows.per_trajectory() if kind == "trajectories" else rows


@pytest.mark.parametrize("ratio", ["geometric", "product"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("reduction", ["step_mean", "trajectory_mean", "token_mean", "sum"])
@pytest.mark.parametrize("kind", ["mask", "rows", "trajectories"])
def test_gradients_of_the_policy_loss(ratio: str, kl: str, reduction: str, kind: str) -> None:
    layout = _layout(kind)
    config = LossConfig(
        ratio=ratio, clip_low=0.1, clip_high=0.2, dual_clip=1.5, reduction=reduction,
        kl_coef=0.3, kl_estimator=kl, entropy_coef=0.2,
    )  # fmt: skip
    of_steps = floats(1, -1, 1)
    advantages = [of_steps[step] if step >= 0 else math.nan for step in layout.step_ids]

    def loss(new: list[float], entropy: list[float]):
        return policy_loss(
            new, floats(3, -2, 0), advantages, layout, config=config,
            ref_log_probs=floats(4, -2, 0), entropy=entropy,
        )  # fmt: skip

    new, entropy = floats(2, -2, 0), floats(5, 0, 2)
    found = loss(new, entropy)
    by_new = differences(lambda at: loss(at, entropy).loss, new)
    by_entropy = differences(lambda at: loss(new, at).loss, entropy)
    assert found.of_log_probs == pytest.approx(by_new, rel=1e-6, abs=1e-8)
    assert found.of_entropy == pytest.approx(by_entropy, rel=1e-6, abs=1e-8)
    assert any(found.of_log_probs)


def test_the_center_of_the_centered_ratio_carries_no_gradient() -> None:
    layout, config = _layout("mask"), LossConfig(ratio="centered", clip_low=0.9, clip_high=9.0)

    new, old = floats(2, -2, 0), floats(3, -2, 0)
    actions = layout.actions
    center = sum(new[at] - old[at] for at in actions) / len(actions)
    advantages = [1.0] * 12
    found = policy_loss(new, old, advantages, layout, config=config)
    fixed = policy_loss(new, old, advantages, layout, config=config, ratio_center=center)
    slopes = differences(
        lambda at: (
            policy_loss(at, old, advantages, layout, config=config, ratio_center=center).loss
        ),
        new,
    )
    assert found.loss == pytest.approx(fixed.loss)
    assert found.of_log_probs == pytest.approx(slopes, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("clips", [False, True])
def test_gradients_of_the_value_loss(clips: bool) -> None:
    layout = _layout("rows")
    old = dict(enumerate(floats(2, -1, 1))) if clips else None

    def loss(values: list[float]):
        return value_loss(
            dict(enumerate(values)), floats(1, -1, 1), layout,
            old_values=old, clip=0.3, reduction="trajectory_mean",
        )  # fmt: skip

    values = floats(3, -1, 1, 6)
    found = loss(values)
    slopes = differences(lambda at: loss(at).loss, values)
    assert found.gradient == pytest.approx(slopes, rel=1e-6, abs=1e-8)
    assert clips == (found.metrics["clip_fraction"] > 0)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_of_a_head(softcap: float | None) -> None:
    hidden, flat, bias = floats(1, -1, 1, 3), floats(2, -1, 1, 12), floats(3, -1, 1, 4)

    def value(hidden: list[float], flat: list[float], bias: list[float]) -> float:
        weight = [flat[v * 3 : v * 3 + 3] for v in range(4)]
        logits = head_logits(hidden, weight, bias, softcap)
        log_prob, entropy = log_probs(logits, 2, 0.7)
        return 1.3 * log_prob - 0.4 * entropy

    weight = [flat[v * 3 : v * 3 + 3] for v in range(4)]
    logits = head_logits(hidden, weight, bias, softcap)
    weight_sums, bias_sums = [[0.0] * 3 for _ in range(4)], [0.0] * 4
    of_logits = log_prob_gradients(logits, 2, 0.7, 1.3, -0.4)
    of_hidden = head_gradients(hidden, weight, logits, softcap, of_logits, weight_sums, bias_sums)
    for found, slopes in (
        (of_hidden, differences(lambda at: value(at, flat, bias), hidden)),
        (
            [slope for row in weight_sums for slope in row],
            differences(lambda at: value(hidden, at, bias), flat),
        ),
        (bias_sums, differences(lambda at: value(hidden, flat, at), bias)),
    ):
        assert found == pytest.approx(slopes, rel=1e-6, abs=1e-8)
