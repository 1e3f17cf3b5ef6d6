"""The oracle's surrogates: gradients by differences, and single tokens worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from oracle import LossConfig, OracleLayout, policy_loss, rollout_weights, step_log_ratios

from fuzz.slopes import differences, floats

_SURROGATES = ["clip", "cispo", "mask", "soft", "quadratic", "tv"]
_RATIOS = ["geometric", "product", "centered", "token"]
_COMBINATIONS = [
    (surrogate, ratio, clips)
    for surrogate in _SURROGATES
    for ratio in _RATIOS
    for clips in (None, (0.2, 0.3))
    if (surrogate != "tv" or ratio == "token") and (clips is None or ratio != "token")
]
# Steps of 2, 4, 3 and 0 tokens, in rows of 6.
_LAYOUT = OracleLayout.from_step_ids([-1, 0, 0, -1, 1, 1, 2, 2, -1, 2, 3, 3], (2, 6)).keep(
    [True] * 12
)


def _spread(of_steps: Sequence[float]) -> list[float]:
    return [of_steps[step] if step >= 0 else math.nan for step in _LAYOUT.step_ids]


def _weight(surrogate: str, ratio: float, advantage: float, gap: float, bounds) -> float:
    """Return the constant weight of a unit, written once more."""
    low, high = bounds
    if surrogate == "cispo":
        return sorted([1 - low, ratio, 1 + high])[1]
    if advantage > 0:
        return ratio if gap <= high else 0.0
    return ratio if gap >= -low else 0.0


@pytest.mark.parametrize("by_step", [False, True], ids=["numbers", "bounds by step"])
@pytest.mark.parametrize(("surrogate", "ratio", "token_clip"), _COMBINATIONS)
def test_gradients_where_advantages_and_weights_are_constant_in_a_step(
    surrogate: str, ratio: str, token_clip: tuple[float, float] | None, by_step: bool
) -> None:
    config = LossConfig(
        ratio=ratio,
        surrogate=surrogate,
        clip_low=0.4,
        clip_high=0.6,
        token_clip=token_clip,
        soft_temperature=(1.5, 3.0),
        reduction="token_mean",
        log_ratio_max=0.9,
    )
    low, high = floats(6, 0.1, 0.6, 4), floats(7, 0.1, 0.9, 4)
    bounds = {"clip_low": low, "clip_high": high} if by_step else {}
    of_steps = [0.7, -0.8, 1.1, -0.4]
    advantages, weights = _spread(of_steps), _spread(floats(8, 0.5, 2, 4))
    old = floats(3, -2, 0)

    def loss(new: list[float]):
        return policy_loss(
            new,
            old,
            advantages,
            _LAYOUT,
            config=config,
            is_weights=weights,
            step_weights=floats(9, 0.5, 2, 4),
            normalizer=3.0,
            ratio_center=0.1,
            **bounds,
        )

    live = 0
    for seed in range(40, 48):
        new = [value + move for value, move in zip(old, floats(seed, -0.9, 0.9), strict=True)]
        found = loss(new)
        if found.margin < 1e-4:
            continue
        if surrogate in ("cispo", "tv"):
            # Their weight is a constant: the value that is differentiated is linear in x.
            scales = [
                own * weights[step[0]] / 3.0
                for own, step in zip(floats(9, 0.5, 2, 4), _LAYOUT.steps, strict=True)
            ]

            def coefficient(at: int, x: float, new: list[float] = new, scales=scales) -> float:
                step = _LAYOUT.step_ids[at]
                of_step = (low[step], high[step]) if by_step else (0.4, 0.6)
                gap = math.exp(new[at]) - math.exp(old[at])
                weight = _weight(surrogate, math.exp(min(x, 0.9)), advantages[at], gap, of_step)
                return -scales[step] * advantages[at] * weight

            if ratio == "token":
                slopes = [0.0] * 12
                for step in _LAYOUT.steps:
                    for at in step:
                        slopes[at] = coefficient(at, new[at] - old[at]) / len(step)
            else:
                factors = [
                    coefficient(step[0], x)
                    for step, x in zip(_LAYOUT.steps, found.step_log_ratio, strict=True)
                ]
                slopes = differences(
                    lambda at, factors=factors: sum(
                        factor * x
                        for factor, x in zip(factors, loss(at).step_log_ratio, strict=True)
                    ),
                    new,
                )
        else:
            slopes = differences(lambda at: loss(at).loss, new)
        assert found.of_log_probs == pytest.approx(slopes, rel=1e-6, abs=1e-8)
        live += sum(map(bool, found.of_log_probs))
    assert live > 10


@pytest.mark.parametrize(("surrogate", "ratio"), [c[:2] for c in _COMBINATIONS if c[2] is None])
def test_a_token_with_its_own_advantage_and_weight_has_the_gradient_of_a_step_of_such(
    surrogate: str, ratio: str
) -> None:
    config = LossConfig(
        ratio=ratio, surrogate=surrogate, clip_low=0.4, clip_high=0.6, reduction="step_mean"
    )
    new, old = floats(2, -2, 0), floats(3, -2, 0)
    advantages, weights = floats(4, -1, 1), floats(5, 0.5, 2)
    advantages[5] = 0.0

    def gradient(advantages: list[float], weights: list[float]) -> list[float]:
        return policy_loss(
            new, old, advantages, _LAYOUT, config=config, is_weights=weights
        ).of_log_probs

    found = gradient(advantages, weights)
    for at in range(12):
        alike = gradient([advantages[at]] * 12, [weights[at]] * 12)
        assert found[at] == alike[at]
    assert found[5] == 0.0
    assert any(found)


def _one_token(surrogate: str, x: float, advantage: float, **numbers: object):
    """Return the loss of one token whose old log-prob is 0, under a ratio of tokens."""
    layout = OracleLayout.from_mask([True], (1, 1))
    config = LossConfig(ratio="token", surrogate=surrogate, **numbers)
    return policy_loss([x], [0.0], [advantage], layout, config=config)


_HALF = math.log(0.5)


@pytest.mark.parametrize(
    ("surrogate", "x", "advantage", "numbers", "gradient", "clipped"),
    [
        # Ties: `clip` keeps its gradient, `mask` its weight, and both `mask` and `cispo` count.
        ("clip", _HALF, -1.0, {"clip_low": 0.5}, 0.5, "no"),
        ("mask", _HALF, 1.0, {"clip_low": 0.5}, -0.5, "low"),
        ("mask", _HALF, 0.0, {"clip_low": 0.5}, 0.0, "low"),
        ("mask", _HALF, 1.0, {"clip_low": 0.25}, 0.0, "low"),
        ("cispo", _HALF, 1.0, {"clip_low": 0.5}, -0.5, "low"),
        ("cispo", _HALF, 1.0, {"clip_low": 0.25}, -0.75, "low"),
        ("cispo", 0.0, 2.0, {"clip_low": 0.0, "clip_high": 0.0}, -2.0, "high"),
        ("cispo", 1.0, -2.0, {"clip_high": 9.0, "clip_low": 1.0}, 2 * math.e, "no"),
        # Beyond the largest log-ratio, constant weights keep the gradient of the clamped ratio.
        ("cispo", 9.0, -2.0, {"clip_high": 9.0, "clip_low": 1.0, "log_ratio_max": 1.0},
         2 * math.e, "no"),
        ("tv", 0.5, 1.0, {"clip_high": 0.9, "log_ratio_max": 0.25}, -math.exp(0.25), "high"),
        ("mask", 9.0, -2.0, {"clip_high": 9.0, "log_ratio_max": 1.0}, 0.0, "no"),
        ("quadratic", 9.0, -2.0, {"clip_low": 0.5, "log_ratio_max": 1.0}, 0.0, "no"),
        ("soft", 9.0, -2.0, {"log_ratio_max": 1.0}, 0.0, "no"),
        # Each advantage has its side.
        ("tv", 0.5, 1.0, {"clip_high": 0.1}, 0.0, "high"),
        ("tv", 0.5, -1.0, {"clip_high": 0.1}, math.exp(0.5), "no"),
        ("tv", -0.5, -1.0, {"clip_low": 0.1}, 0.0, "low"),
        ("tv", 0.5, 0.0, {"clip_high": 0.1}, 0.0, "high"),
        ("quadratic", _HALF, -1.0, {"clip_low": 0.5, "clip_high": 0.25}, 0.0, "low"),
        ("quadratic", _HALF, 1.0, {"clip_low": 0.5, "clip_high": 0.25}, -0.5 * 3.0, "no"),
        ("soft", 0.0, 3.0, {}, -3.0, "no"),
        ("soft", -math.inf, 3.0, {}, 0.0, "low"),
        ("soft", 9.0, 3.0, {}, 0.0, "high"),
    ],
)  # fmt: skip
def test_one_token(
    surrogate: str, x: float, advantage: float, numbers: dict, gradient: float, clipped: str
) -> None:
    found = _one_token(surrogate, x, advantage, **numbers)
    assert found.of_log_probs == pytest.approx([gradient], rel=1e-12)
    # What is 0 is exactly 0.
    assert (found.of_log_probs[0] == 0) == (gradient == 0)
    metrics = found.metrics
    for side in ("low", "high"):
        assert metrics[f"clip_fraction_{side}"] == float(clipped == side)
    assert metrics["clip_fraction"] == metrics["token_clip_fraction"] == float(clipped != "no")


@pytest.mark.parametrize("surrogate", _SURROGATES)
def test_an_unknown_ratio_shows_but_where_the_advantage_is_zero(surrogate: str) -> None:
    for advantage in (1.0, -1.0, 0.0):
        found = _one_token(surrogate, math.nan, advantage)
        assert math.isnan(found.loss)
        assert found.metrics["clip_fraction"] == 0.0
        assert found.of_log_probs[0] == 0.0 if advantage == 0 else math.isnan(found.of_log_probs[0])


@pytest.mark.parametrize("ratio", _RATIOS)
def test_gradients_of_step_log_ratios(ratio: str) -> None:
    new, old, upstream = floats(2, -2, 0), floats(3, -2, 0), floats(4, -1, 1, 4)

    def ratios(new: list[float]):
        return step_log_ratios(new, old, _LAYOUT, ratio=ratio, upstream=upstream, ratio_center=0.2)

    values, gradient = ratios(new)
    slopes = differences(
        lambda at: sum(u * x for u, x in zip(upstream, ratios(at)[0], strict=True)), new
    )
    assert gradient == pytest.approx(slopes, rel=1e-6, abs=1e-8)
    loss = policy_loss(
        new, old, [1.0] * 12, _LAYOUT, config=LossConfig(ratio=ratio), ratio_center=0.2
    )
    assert values == loss.step_log_ratio


def test_rollout_weights_by_hand() -> None:
    old = [math.log(value) for value in (0.5, 0.5, 0.2, 0.9)]
    rollout = [math.log(value) for value in (0.25, 0.25, 0.4, 0.9)]
    layout = OracleLayout.from_mask([True, True, False, True], (2, 2)).keep(
        [True, True, True, False]
    )

    def weights(level: str, pool: str = "sum", outside: str = "truncate"):
        return rollout_weights(
            old, rollout, layout, level=level, pool=pool, low=0.5, high=3.0, outside=outside
        )

    by_token = weights("token")
    assert by_token.weights == pytest.approx([2.0, 2.0, 0.0, 0.0])
    by_step = weights("step")
    assert by_step.weights == pytest.approx([3.0, 1.0])
    assert by_step.metrics == pytest.approx(
        {"mean": 4.0, "min": 4.0, "max": 4.0, "ess": 1.0, "outside_fraction": 1.0}
    )
    assert weights("step", outside="mask").weights == [0.0, 1.0]
    assert weights("trajectory", pool="mean").weights == pytest.approx([2.0, 1.0])
    far = rollout_weights(
        [0.0, 0.0],
        [-30.0, 30.0],
        OracleLayout.from_mask([True, True], (2, 1)),
        level="step",
        pool="sum",
        low=None,
        high=None,
        outside="truncate",
    )
    assert far.weights == pytest.approx([math.exp(20), math.exp(-20)])
    assert far.metrics["ess"] == pytest.approx(0.5)
