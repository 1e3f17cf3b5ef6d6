"""What a policy loss is given beside the policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from oracle import LossConfig, OracleLayout

from fuzz.draws import Draw, Numbers
from fuzz.policies import Policy
from steppo_kernels import StepPOConfig

REDUCTIONS = ["step_mean", "trajectory_mean", "token_mean", "sum"]
_SURROGATES = ["clip", "clip", "clip", "cispo", "mask", "soft", "quadratic", "tv"]
_RATIOS = ["geometric", "product", "centered", "token"]
_BOUNDS = [(3e-4, 4e-4), (0.2, 0.3), (0.9, 9.0), (0.05, 0.02)]
# Bounds that other surrogates read: a parabola's is no 0, and those of tv are probabilities.
_OTHER_BOUNDS = {
    "cispo": [*_BOUNDS, (0.0, 0.0)],
    "mask": [*_BOUNDS, (0.0, 0.5)],
    "quadratic": _BOUNDS[1:],
    "tv": [(0.1, 0.15), (0.2, 0.2), (0.02, 0.01), (0.0, 0.0)],
}
_NOT_FINITE = [math.nan, math.inf, -math.inf]


class Inputs(NamedTuple):
    """Arguments of a policy loss beside the policy, as tensors and as the oracle's lists."""

    arguments: dict[str, object]
    config: StepPOConfig
    plain_config: LossConfig
    plain: dict[str, object]


def moved(draw: Draw, log_probs: list[float], oracle: OracleLayout) -> Numbers:
    """Return log-probs of an older policy, near or far from those of a newer one."""
    noise = draw.rng.choice([1e-3, 0.1, 1.0])
    flat = [
        (value + draw.number(-noise, noise)) if math.isfinite(value) else draw.number(-3, 0)
        for value in log_probs
    ]
    flat = draw.spoiled(flat, oracle.actions)
    if oracle.actions and draw.chance(0.06):
        # A sampler could not give it. It reaches its step and no other.
        flat[draw.rng.choice(oracle.actions)] = draw.named("old log-prob", _NOT_FINITE)
    return draw.numbers(flat, oracle.shape)


def draw_numbers(draw: Draw) -> dict[str, object]:
    """Draw the hyper-parameters."""
    surrogate = draw.named("surrogate", _SURROGATES)
    ratio = draw.named("ratio", ["token"] if surrogate == "tv" else _RATIOS)
    low, high = draw.rng.choice(_OTHER_BOUNDS.get(surrogate, _BOUNDS))
    numbers = {
        "ratio": ratio,
        "surrogate": surrogate,
        **({} if surrogate == "soft" else {"clip_low": low, "clip_high": high}),
        "log_ratio_max": draw.rng.choice([10.0, 10.0, 0.3]),
        "reduction": draw.named("reduction", REDUCTIONS),
        "kl_coef": draw.rng.choice([0.0, 0.0, 0.3]),
        "kl_estimator": draw.named("kl", ["k1", "k2", "k3"]),
        "entropy_coef": draw.rng.choice([0.0, 0.0, 0.2]),
    }
    if surrogate == "clip":
        numbers["dual_clip"] = draw.rng.choice([None, None, 1.5, 3.0])
    if surrogate == "soft":
        numbers["soft_temperature"] = draw.rng.choice([(1.0, 1.05), (1.5, 3.0), (10.0, 0.5)])
    if ratio != "token" and draw.chance(0.3):
        numbers["token_clip"] = draw.rng.choice([(0.4, 0.4), (0.02, 0.03), (0.0, 0.3), (0.2, 0.0)])
    named = ("surrogate", "ratio", "reduction", "kl_estimator")
    draw.words += [f"{n}={value}" for n, value in numbers.items() if value and n not in named]
    return numbers


def _bounds(draw: Draw, oracle: OracleLayout, surrogate: str, name: str) -> Numbers:
    """Draw a bound for each step; those of steps without tokens may be anything."""
    largest = {"tv": 0.3}.get(surrogate, 0.9 if name == "clip_low" else 1.5)
    flat = draw.floats(len(oracle.steps), 0.02, largest)
    if surrogate != "quadratic":
        flat = [0.0 if draw.chance(0.1) else bound for bound in flat]
    full = [step for step, tokens in enumerate(oracle.steps) if tokens]
    return draw.numbers(draw.spoiled(flat, full), (len(oracle.steps),))


def draw_inputs(
    draw: Draw,
    oracle: OracleLayout,
    policy: Policy,
    advantages: Numbers,
    per_token: Numbers | None,
    masked: bool,
) -> Inputs:
    """Draw what a policy loss is given beside the policy.

    Args:
        draw: the source of chance.
        oracle: the steps.
        policy: what the loss is taken of.
        advantages: of each step.
        per_token: those at the tokens; None where the token shape is that of the steps.
        masked: whether the mask is given, so that nothing is by step.
    """
    actions, ids, steps = oracle.actions, oracle.step_ids, len(oracle.steps)

    def tokens(low: float, high: float) -> Numbers:
        flat = draw.spoiled(draw.floats(oracle.size, low, high), actions)
        return draw.numbers(flat, oracle.shape)

    def spread(per_step: Numbers) -> list[float]:
        return [per_step.flat[step] if step >= 0 else math.nan for step in ids]

    arguments: dict[str, object] = {"advantages": advantages.tensor}
    plain: dict[str, object] = {"advantages": spread(advantages)}
    if per_token is not None and (masked or draw.chance(0.5)):
        flat = per_token.flat
        if draw.chance(0.6):
            draw.words.append("advantages of tokens")
            flat = [0.0 if draw.chance(0.1) else value for value in draw.floats(oracle.size, -1, 1)]
        given = draw.numbers(draw.spoiled(flat, actions), oracle.shape)
        arguments["advantages"], plain["advantages"] = given.tensor, given.flat
    arguments["old_log_probs"] = plain["old_log_probs"] = None
    if draw.chance(0.8):
        old = moved(draw, policy.log_probs, oracle)
        arguments["old_log_probs"], plain["old_log_probs"] = old.tensor, old.flat
    numbers = draw_numbers(draw)
    if numbers["kl_coef"] or draw.chance(0.2):
        ref = tokens(*draw.rng.choice([(-3, 0), (-9, 0), (-30, 0)]))
        arguments["ref_log_probs"], plain["ref_log_probs"] = ref.tensor, ref.flat
    if policy.depth != "log_probs":
        plain["entropy"] = policy.entropies if numbers["entropy_coef"] else None
    elif numbers["entropy_coef"] or draw.chance(0.2):
        plain["entropy"] = policy.entropies
        arguments["entropy"] = "leaf"
    if draw.chance(0.3):
        if masked or (oracle.shape != (steps,) and draw.chance(0.5)):
            flat = tokens(0, 2).flat
            if actions and policy.depth == "log_probs" and draw.chance(0.1):
                # A gradient that is 0 stays 0 under it.
                flat[draw.rng.choice(actions)] = draw.named("weight", _NOT_FINITE)
            weights = draw.numbers(flat, oracle.shape)
            plain["is_weights"] = weights.flat
        else:
            weights = draw.numbers(draw.some_zero(steps), (steps,))
            plain["is_weights"] = spread(weights)
        arguments["is_weights"] = weights.tensor
    if not masked and draw.chance(0.3):
        own = draw.numbers(draw.some_zero(steps), (steps,))
        arguments["step_weights"], plain["step_weights"] = own.tensor, own.flat
    if not masked and numbers["surrogate"] != "soft" and draw.chance(0.3):
        for name in draw.named(
            "bounds by step", [["clip_low"], ["clip_high"], ["clip_low", "clip_high"]]
        ):
            bound = _bounds(draw, oracle, numbers["surrogate"], name)
            arguments[name], plain[name] = bound.tensor, bound.flat
    if draw.chance(0.3):
        plain["normalizer"] = arguments["normalizer"] = float(draw.rng.randint(1, 9))
        if draw.chance(0.5):
            arguments["normalizer"] = torch.tensor(plain["normalizer"], device=draw.device)
    if numbers["ratio"] == "centered" and draw.chance(0.4):
        plain["ratio_center"] = arguments["ratio_center"] = draw.rng.randint(-8, 8) / 16
    return Inputs(arguments, StepPOConfig(**numbers), LossConfig(**numbers), plain)
