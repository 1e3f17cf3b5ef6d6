"""StepPOConfig: defaults, and values that it refuses."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from steppo_kernels import StepPOConfig
from steppo_kernels.config import RATIOS, SURROGATES


def test_defaults():
    assert dataclasses.asdict(StepPOConfig()) == {
        "ratio": "geometric",
        "surrogate": "clip",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": None,
        "token_clip": None,
        "soft_temperature": (1.0, 1.05),
        "log_ratio_max": 10.0,
        "reduction": "step_mean",
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "entropy_coef": 0.0,
    }


def test_the_fields_stand_in_the_order_of_the_documentation():
    """Positional arguments and saved states read it."""
    assert [field.name for field in dataclasses.fields(StepPOConfig)] == [
        "ratio",
        "surrogate",
        "clip_low",
        "clip_high",
        "dual_clip",
        "token_clip",
        "soft_temperature",
        "log_ratio_max",
        "reduction",
        "kl_coef",
        "kl_estimator",
        "entropy_coef",
    ]


def test_as_kernels_take_it():
    """Numbers alone; names are positions, and what is off never acts."""
    assert StepPOConfig().kernel == (
        *(0.0, 0.0, 3e-4, 4e-4, 0.0, math.inf, math.inf, 1.0, 1.05, 10.0, 0.0, 0.0, 2.0, 0.0),
    )
    config = StepPOConfig(
        ratio="product",
        surrogate="mask",
        clip_low=0.1,
        clip_high=0.2,
        token_clip=(0.3, 0.4),
        log_ratio_max=5,
        reduction="sum",
        kl_coef=0.5,
        kl_estimator="k2",
        entropy_coef=-0.6,
    )
    assert config.kernel == (1, 2, 0.1, 0.2, 0, 0.3, 0.4, 1, 1.05, 5, 3, 0.5, 1, -0.6)
    assert all(type(number) is float for number in config.kernel)
    soft = StepPOConfig(surrogate="soft", soft_temperature=(2, 3)).kernel
    assert (soft.surrogate, soft.soft_positive, soft.soft_negative) == (3, 2, 3)
    assert StepPOConfig(dual_clip=7).kernel.dual_clip == 7
    assert config.kernel.clips_tokens
    assert StepPOConfig(token_clip=(0.3, 0.0)).kernel.clips_tokens
    assert not StepPOConfig().kernel.clips_tokens


def test_a_pair_may_be_a_list_and_hold_numbers_of_any_type():
    config = StepPOConfig(token_clip=[np.float32(0.5), Fraction(1, 4)])
    assert config.token_clip == (0.5, 0.25)
    assert all(type(number) is float for number in config.token_clip)
    assert hash(config) == hash(StepPOConfig(token_clip=(0.5, 0.25)))


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
        ("token_clip", (0, 0)),
        ("token_clip", (1e9, 0.0)),
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
        ("surrogate", "ppo"),
        ("surrogate", None),
        ("surrogate", 1),
        ("token_clip", (-1e-9, 0.1)),
        ("token_clip", (0.1, -1e-9)),
        ("token_clip", (0.1, math.nan)),
        ("token_clip", (math.inf, 0.1)),
        ("token_clip", (0.1,)),
        ("token_clip", (0.1, 0.1, 0.1)),
        ("soft_temperature", (0.0, 1.0)),
        ("soft_temperature", (1.0, -1.0)),
        ("soft_temperature", (1.0, math.nan)),
        ("soft_temperature", (math.inf, 1.0)),
        ("soft_temperature", ()),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        StepPOConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("ratio", {"surrogate": "tv"}, "'geometric' with the surrogate 'tv'"),
        ("ratio", {"surrogate": "tv", "ratio": "product"}, "'product' with the surrogate 'tv'"),
        ("ratio", {"surrogate": "tv", "ratio": "centered"}, "'centered' with the surrogate 'tv'"),
        *(
            ("dual_clip", {"surrogate": name, "dual_clip": 3.0}, f"3.0 with the surrogate {name!r}")
            for name in ("cispo", "mask", "soft", "quadratic")
        ),
        (
            "dual_clip",
            {"surrogate": "tv", "ratio": "token", "dual_clip": 3.0},
            "3.0 with the surrogate 'tv'",
        ),
        *(
            (
                "token_clip",
                {"ratio": "token", "surrogate": name, "token_clip": (0.1, 0.1)},
                r"\(0.1, 0.1\) with the ratio 'token'",
            )
            for name in SURROGATES
        ),
        *(
            (
                "soft_temperature",
                {"ratio": "token", "surrogate": name, "soft_temperature": (2.0, 1.05)},
                rf"\(2.0, 1.05\) with the surrogate {name!r}",
            )
            for name in SURROGATES
            if name != "soft"
        ),
        ("clip_low", {"surrogate": "soft", "clip_low": 0.2}, "0.2 with the surrogate 'soft'"),
        ("clip_high", {"surrogate": "soft", "clip_high": 0.2}, "0.2 with the surrogate 'soft'"),
        ("clip_low", {"surrogate": "quadratic", "clip_low": 0.0}, "0.0 with the surrogate"),
        ("clip_high", {"surrogate": "quadratic", "clip_high": 0}, "0 with the surrogate"),
    ],
)
def test_values_that_mean_nothing_together(name, values, words):
    with pytest.raises(ValueError, match=f"^{name}: got {words}.*, expected "):
        StepPOConfig(**values)


@pytest.mark.parametrize(
    ("ratio", "surrogate"),
    # "tv" compares probabilities of single tokens.
    [(r, s) for r in RATIOS for s in SURROGATES if s != "tv" or r == "token"],
)
def test_every_other_combination_is_one(ratio, surrogate):
    """With bounds, what a surrogate alone reads, and tokens clipped where they are pooled."""
    config = StepPOConfig(
        ratio=ratio,
        surrogate=surrogate,
        dual_clip=3.0 if surrogate == "clip" else None,
        token_clip=None if ratio == "token" else (0.1, 0.2),
        **(
            {"soft_temperature": (2.0, 3.0)}
            if surrogate == "soft"
            else {"clip_low": 0.1, "clip_high": 0.2}
        ),
    )
    kernel = config.kernel
    assert RATIOS[int(kernel.ratio)] == ratio
    assert SURROGATES[int(kernel.surrogate)] == surrogate


@pytest.mark.parametrize("name", ["token_clip", "soft_temperature"])
@pytest.mark.parametrize("value", [0.1, "ab", True, {1.0, 2.0}, torch.ones(2)], ids=repr)
def test_pairs_of_bad_types(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got .*, expected two numbers"):
        StepPOConfig(**{name: value})


@pytest.mark.parametrize("name", ["token_clip", "soft_temperature"])
@pytest.mark.parametrize("value", [(0.1, "0.1"), (True, 0.1), (None, 0.1)], ids=repr)
def test_pairs_of_no_numbers(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got .*, expected a number in "):
        StepPOConfig(**{name: value})


@pytest.mark.parametrize("value", [True, "0.1", [0.1]], ids=repr)
@pytest.mark.parametrize("name", _NUMBERS)
def test_bad_types(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got "):
        StepPOConfig(**{name: value})
