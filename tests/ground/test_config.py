"""StepPOConfig: defaults, and values that it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest

from steppo_kernels import StepPOConfig


def test_defaults():
    assert dataclasses.asdict(StepPOConfig()) == {
        "ratio": "geometric",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": None,
        "log_ratio_max": 10.0,
        "reduction": "step_mean",
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "entropy_coef": 0.0,
    }


def test_is_frozen_and_hashable():
    config = StepPOConfig(clip_low=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clip_low = 0.2
    assert hash(config) == hash(StepPOConfig(clip_low=0.1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_low", 0),
        ("clip_low", 1),
        ("clip_high", 0),
        ("clip_high", 1e9),
        ("dual_clip", 1.0001),
        ("dual_clip", 3),
        ("log_ratio_max", 80.0),
        ("log_ratio_max", 1e-3),
        ("kl_coef", 7),
        ("entropy_coef", -1.5),
    ],
)
def test_values_at_the_ends_of_their_ranges(name, value):
    assert getattr(StepPOConfig(**{name: value}), name) == value


_NUMBERS = ("clip_low", "clip_high", "dual_clip", "log_ratio_max", "kl_coef", "entropy_coef")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in _NUMBERS for value in (math.nan, math.inf, -math.inf)),
        ("clip_low", -1e-9),
        ("clip_low", 1.001),
        ("clip_high", -0.1),
        ("dual_clip", 1.0),
        ("dual_clip", 0.5),
        ("log_ratio_max", 0.0),
        ("log_ratio_max", 80.5),
        ("kl_coef", -0.1),
        ("ratio", "arithmetic"),
        ("ratio", None),
        ("reduction", "mean"),
        ("kl_estimator", "k4"),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        StepPOConfig(**{name: value})


@pytest.mark.parametrize("value", [True, "0.1", [0.1]], ids=repr)
@pytest.mark.parametrize("name", _NUMBERS)
def test_bad_types(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got "):
        StepPOConfig(**{name: value})
