"""Calls of the package's functions on drawn inputs, each held to the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import (
    OracleLayout,
    policy_loss,
    rollout_weights,
    step_gae,
    step_log_ratios,
    value_loss,
)

import steppo_kernels as package
from fuzz.compare import near
from fuzz.draws import Draw, Numbers
from fuzz.layouts import Pair
from fuzz.loss_inputs import REDUCTIONS, draw_inputs, moved
from fuzz.policies import draw_policy


def check_gae(draw: Draw, pair: Pair, backend: str) -> tuple[Numbers, Numbers]:
    """Compare advantages and returns; return them."""
    oracle = pair.oracle
    steps = len(oracle.steps)
    members = [step for own in oracle.trajectories for step in own]
    token_rewards, token_values = _per_token(draw, oracle), _per_token(draw, oracle)
    if token_rewards:
        rewards = draw.floats(oracle.size, -1, 1)
        if draw.chance(0.3):
            others = [at for at in range(oracle.size) if at not in set(oracle.actions)]
            for at in draw.rng.sample(others, len(others) // 2):
                rewards[at] = draw.rng.choice([math.nan, math.inf, -math.inf])
        given_rewards = draw.numbers(rewards, oracle.shape)
    else:
        given_rewards = draw.uniform((steps,), -1, 1)
    if token_values:
        used = [oracle.states[step] for step in members]
        values = draw.spoiled(draw.floats(oracle.size, -1, 1), used)
        given_values = draw.numbers(values, oracle.shape)
    else:
        given_values = draw.uniform((steps,), -1, 1)
    bootstrap = draw.uniform((len(oracle.trajectories),), -1, 1) if draw.chance(0.5) else None
    gamma, lam = draw.rng.choice([(0.99, 1.0), (1.0, 0.95), (0.0, 0.0), (0.9, 0.7)])
    whiten = draw.named("whiten", [True, False])
    got = package.step_gae(
        given_rewards.tensor,
        given_values.tensor,
        pair.layout,
        gamma=gamma,
        lam=lam,
        bootstrap_values=None if bootstrap is None else bootstrap.tensor,
        whiten=whiten,
        backend=backend,
    )
    want = step_gae(
        given_rewards.flat,
        given_values.flat,
        oracle,
        gamma=gamma,
        lam=lam,
        bootstrap_values=None if bootstrap is None else bootstrap.flat,
        whiten=whiten,
        per_token_rewards=token_rewards,
        per_token_values=token_values,
    )
    size = 1.0 + oracle.size
    # What is left of equal numbers after their mean is rounding, which nobody can compare.
    if want.spread > 1e-6:
        near(
            "advantages", got.advantages, want.advantages,
            dtype=draw.dtype, scale=1.0 / want.spread, condition=size,
        )  # fmt: skip
    near("returns", got.returns, want.returns, dtype=draw.dtype, scale=1.0, condition=size)
    assert got.advantages.dtype == got.returns.dtype == draw.dtype
    advantages = got.advantages if want.spread > 1e-6 else draw.uniform((steps,), -1, 1).tensor
    if steps and draw.chance(0.3):
        advantages = advantages.clone()
        advantages[draw.rng.randrange(steps)] = 0
    return (
        Numbers(advantages, advantages.double().tolist()),
        Numbers(got.returns, got.returns.double().tolist()),
    )


def check_broadcast(draw: Draw, pair: Pair, backend: str, per_step: Numbers) -> Numbers:
    """Compare the broadcast and its gradient; return the broadcast."""
    oracle = pair.oracle
    leaf = per_step.leaf()
    got = package.broadcast_to_tokens(leaf, pair.layout, backend=backend)
    want = [per_step.flat[step] if step >= 0 else 0.0 for step in oracle.step_ids]
    assert tuple(got.shape) == oracle.shape
    near("broadcast", got, want, dtype=draw.dtype, zeros=True)
    upstream = draw.numbers(
        draw.spoiled(draw.floats(oracle.size, -1, 1), oracle.actions), oracle.shape
    )
    got.backward(upstream.tensor)
    sums = [math.fsum(upstream.flat[at] for at in step) for step in oracle.steps]
    near("gradient of the broadcast", leaf.grad, sums, dtype=draw.dtype, scale=1.0, zeros=True)
    return Numbers(got.detach(), want)


def check_value_loss(draw: Draw, pair: Pair, backend: str, returns: Numbers) -> None:
    """Compare the value loss, its metrics and its gradient."""
    oracle = pair.oracle
    token_values = _per_token(draw, oracle)
    shape = oracle.shape if token_values else (len(oracle.steps),)
    full = [step for step, tokens in enumerate(oracle.steps) if tokens]
    places = {step: oracle.states[step] if token_values else step for step in full}
    count = math.prod(shape)
    reduction = draw.named("reduction", REDUCTIONS)
    normalizer = draw.number(0.5, 9) if draw.chance(0.3) else None
    steps = len(oracle.steps)
    weights = draw.numbers(draw.floats(steps, 0.5, 2), (steps,)) if draw.chance(0.3) else None
    returns_on_tokens = returns.tensor
    if draw.chance(0.3) and _per_token(draw, oracle):
        # The return of a step is read where its value is.
        flat = draw.spoiled(draw.floats(oracle.size, -1, 1), [oracle.states[s] for s in full])
        for step in full:
            flat[oracle.states[step]] = returns.flat[step]
        returns_on_tokens = draw.numbers(flat, oracle.shape).tensor

    def drawn(dtype: torch.dtype) -> tuple[Numbers, dict[int, float]]:
        flat = draw.spoiled(draw.floats(count, -1, 1), places.values())
        numbers = draw.numbers(flat, shape, dtype)
        return numbers, {step: numbers.flat[at] for step, at in places.items()}

    for _ in range(20):
        (values, of_steps), (old, old_of_steps) = drawn(draw.half), drawn(draw.dtype)
        clips = draw.chance(0.7)
        clip = draw.number(0.1, 1.0)
        want = value_loss(
            of_steps,
            returns.flat,
            oracle,
            old_values=old_of_steps if clips else None,
            clip=clip,
            reduction=reduction,
            normalizer=normalizer,
            step_weights=None if weights is None else weights.flat,
        )
        if want.margin > _MARGINS[draw.dtype]:
            break
    else:
        return
    leaf = values.leaf()
    got = package.step_value_loss(
        leaf,
        returns_on_tokens,
        pair.layout,
        old_values=old.tensor if clips else None,
        clip=clip,
        reduction=reduction,
        step_weights=None if weights is None else weights.tensor,
        normalizer=normalizer,
        backend=backend,
    )
    condition = 4.0 * (1 + len(full))
    near("value loss", got.loss, [want.loss], dtype=draw.dtype, scale=want.size)
    _check_metrics(draw, got, want.metrics, want.size, condition)
    factor = draw.number(-2, 2)
    (got.loss * factor).backward()
    slopes = [0.0] * count
    for step, at in places.items():
        slopes[at] += factor * want.gradient[step]
    near("gradient of values", leaf.grad, slopes, dtype=draw.half, scale=want.size, zeros=True)


_MARGINS = {torch.float64: 1e-9, torch.float32: 2e-4}


def check_policy_loss(
    draw: Draw, pair: Pair, backend: str, advantages: Numbers, per_token: Numbers | None
) -> None:
    """Compare loss, metrics, step log-ratios and every gradient, from one of three depths."""
    masked = pair.mask is not None and per_token is not None and draw.chance(0.3)
    if masked:
        draw.words.append("mask for a layout")
    drawn = len(draw.words)
    for _ in range(20):
        del draw.words[drawn:]
        policy = draw_policy(draw, pair.oracle)
        inputs = draw_inputs(draw, pair.oracle, policy, advantages, per_token, masked)
        want = policy_loss(
            policy.log_probs, config=inputs.plain_config, layout=pair.oracle, **inputs.plain
        )
        if want.margin > _MARGINS[draw.dtype]:
            break
    else:
        return
    given = pair.mask if masked else pair.layout
    leaves = policy.leaves()
    got = policy.loss(leaves, given, inputs.config, inputs.arguments, backend)
    # A product's ratio is e to a sum over its tokens.
    length = max((len(step) for step in pair.oracle.steps), default=0)
    condition = 4.0 * (1 + length)
    near("loss", got.loss, [want.loss], dtype=draw.dtype, scale=want.size, condition=condition)
    metrics = dict(want.metrics)
    if policy.depth != "log_probs" and not inputs.plain_config.entropy_coef:
        del metrics["entropy"]
    _check_metrics(draw, got, metrics, want.size, condition)
    if got.step_log_ratio is not None:
        near(
            "step_log_ratio", got.step_log_ratio, want.step_log_ratio,
            dtype=draw.dtype, scale=1.0 + length, condition=4,
        )  # fmt: skip
    else:
        assert masked
    if draw.chance(0.05):
        upstream = draw.named("upstream", [math.nan, math.inf])
        got.loss.backward(torch.full_like(got.loss, upstream))
        policy.check_masked(leaves)
        return
    factor = draw.number(-2, 2)
    times = 1 if policy.in_place else draw.rng.choice([1, 1, 2])
    for _ in range(times):
        (got.loss * factor).backward(retain_graph=times > 1)
    policy.check_gradients(
        leaves,
        [times * factor * slope for slope in want.of_log_probs],
        [times * factor * slope for slope in want.of_entropy],
        condition,
        times * abs(factor) * want.slope_size,
    )


def check_step_log_ratios(draw: Draw, pair: Pair, backend: str) -> None:
    """Compare the log-ratios of steps and their gradient."""
    oracle = pair.oracle
    flat = draw.spoiled(draw.floats(oracle.size, -3, 0), oracle.actions)
    new = draw.numbers(flat, oracle.shape, draw.half)
    old = moved(draw, new.flat, oracle) if draw.chance(0.8) else None
    ratio = draw.named("ratio", ["geometric", "product", "centered", "token"])
    center = draw.rng.randint(-8, 8) / 16 if ratio == "centered" and draw.chance(0.4) else None
    full = [step for step, tokens in enumerate(oracle.steps) if tokens]
    steps = len(oracle.steps)
    upstream = draw.numbers(draw.spoiled(draw.floats(steps, -1, 1), full), (steps,))
    leaf = new.leaf()
    got = package.step_log_ratios(
        draw.view(oracle.shape)(draw.strided(leaf)),
        None if old is None else old.tensor,
        pair.layout,
        ratio=ratio,
        ratio_center=center,
        backend=backend,
    )
    values, gradient = step_log_ratios(
        new.flat,
        None if old is None else old.flat,
        oracle,
        ratio=ratio,
        upstream=upstream.flat,
        ratio_center=center,
    )
    assert got.dtype == draw.dtype
    length = max((len(step) for step in oracle.steps), default=0)
    near("step log-ratios", got, values, dtype=draw.dtype, scale=1.0 + length, condition=4)
    got.backward(upstream.tensor)
    assert leaf.grad.dtype == draw.half
    near("gradient of step log-ratios", leaf.grad, gradient, dtype=draw.half, zeros=True)


def check_rollout_weights(draw: Draw, pair: Pair, backend: str) -> None:
    """Compare the weights of a rollout and their metrics."""
    oracle = pair.oracle
    options = {
        "level": draw.named("level", ["token", "step", "trajectory"]),
        "pool": draw.named("pool", ["mean", "sum"]),
        "low": draw.named("low", [None, 0.2, 0.8]),
        "high": draw.named("high", [None, 1.1, 4.0]),
        "outside": draw.named("outside", ["truncate", "mask"]),
    }
    for _ in range(20):
        flat = draw.spoiled(draw.floats(oracle.size, -3, 0), oracle.actions)
        old = draw.numbers(flat, oracle.shape)
        noise = draw.rng.choice([1e-3, 0.3, 2.0, 30.0])
        flat = [value + draw.number(-noise, noise) for value in old.flat]
        rollout = draw.numbers(draw.spoiled(flat, oracle.actions), oracle.shape)
        want = rollout_weights(old.flat, rollout.flat, oracle, **options)
        if want.margin > _MARGINS[draw.dtype]:
            break
    else:
        return
    given = draw.view(oracle.shape)
    arguments = given(draw.strided(old.tensor)), given(draw.strided(rollout.tensor)), pair.layout
    got = package.rollout_weights(*arguments, **options, backend=backend)
    by_token = options["level"] == "token"
    assert tuple(got.weights.shape) == (oracle.shape if by_token else (len(oracle.steps),))
    assert got.weights.dtype == draw.dtype
    assert not got.weights.requires_grad
    places = sorted(oracle.actions) if by_token else range(len(oracle.steps))
    # Each weight is as exact as its own size asks: e to a sum over the tokens of its unit.
    condition = 8.0 * (1 + len(oracle.actions))
    near(
        "rollout weights", got.weights.flatten()[list(places)], [want.weights[at] for at in places],
        dtype=draw.dtype, scale=0.0, condition=condition,
    )  # fmt: skip
    metrics = got.metrics.as_dict()
    assert set(metrics) == set(want.metrics)
    for name, value in want.metrics.items():
        found = torch.tensor(metrics[name], dtype=torch.float64)
        near(f"metric {name}", found, [value], dtype=draw.dtype, scale=0.0, condition=condition)
    if oracle.actions and draw.device == "cpu" and draw.chance(0.1):
        # The engine had no log-prob for a token.
        unknown = rollout.tensor.clone()
        unknown.view(-1)[draw.rng.choice(oracle.actions)] = draw.rng.choice([math.nan, math.inf])
        with pytest.raises(ValueError, match="rollout_log_probs"):
            package.rollout_weights(old.tensor, unknown, pair.layout, backend=backend)


def check_log_probs(draw: Draw, pair: Pair, backend: str) -> None:
    """Compare log-probs, entropies and gradients of the functions below the losses."""
    policy = draw_policy(draw, pair.oracle, ["logits", "head"])
    actions = set(pair.oracle.actions)
    flags = torch.tensor([at in actions for at in range(pair.oracle.size)], dtype=torch.bool)
    mask = flags.reshape(pair.oracle.shape).to(draw.device)
    leaves = policy.leaves()
    got, entropy = policy.values(leaves, mask, backend)
    assert tuple(got.shape) == tuple(entropy.shape) == tuple(policy.token_ids.shape)
    near("log-probs", got, policy.log_probs_or_zero, dtype=draw.dtype, scale=4.0, condition=4)
    near("entropies", entropy, policy.entropies_or_zero, dtype=draw.dtype, scale=4.0, condition=4)
    first, second = (
        draw.numbers(draw.spoiled(draw.floats(pair.oracle.size, -1, 1), actions), got.shape)
        for _ in range(2)
    )
    torch.autograd.backward([got, entropy], [first.tensor, second.tensor])
    live = [at in actions for at in range(pair.oracle.size)]
    policy.check_gradients(
        leaves,
        [slope if real else 0.0 for slope, real in zip(first.flat, live, strict=True)],
        [slope if real else 0.0 for slope, real in zip(second.flat, live, strict=True)],
        4.0,
    )


def _per_token(draw: Draw, oracle: OracleLayout) -> bool:
    """Choose between per step and per token where the shapes differ."""
    return oracle.shape != (len(oracle.steps),) and draw.chance(0.5)


def _check_metrics(
    draw: Draw,
    got: package.StepPOOutput,
    want: dict[str, float],
    size: float,
    condition: float,
) -> None:
    metrics = got.metrics.as_dict()
    for name, value in want.items():
        counted = name.endswith("fraction") or "fraction_" in name or name.startswith("num_")
        near(
            f"metric {name}", torch.tensor(metrics[name], dtype=torch.float64), [value],
            dtype=draw.dtype, scale=1.0 if counted else max(size, 1.0), condition=condition,
        )  # fmt: skip
    if not want.get("num_steps"):
        assert all(math.isfinite(value) for value in metrics.values()), metrics
