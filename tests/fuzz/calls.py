"""Calls of the package's functions on drawn inputs, each held to the oracle."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from oracle import LossConfig, OracleLayout, policy_loss, step_gae, value_loss

import steppo_kernels as package
from fuzz.compare import near
from fuzz.draws import Draw, Numbers
from fuzz.layouts import Pair
from fuzz.policies import Policy, draw_policy
from steppo_kernels import StepPOConfig


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
        )
        if want.margin > _MARGINS[draw.dtype]:
            break
    else:
        return
    leaf = values.leaf()
    got = package.step_value_loss(
        leaf,
        returns.tensor,
        pair.layout,
        old_values=old.tensor if clips else None,
        clip=clip,
        reduction=reduction,
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


REDUCTIONS = ["step_mean", "trajectory_mean", "token_mean", "sum"]
_MARGINS = {torch.float64: 1e-9, torch.float32: 2e-4}


class Inputs(NamedTuple):
    """Arguments of a policy loss beside the policy, as tensors and as the oracle's lists."""

    arguments: dict[str, object]
    config: StepPOConfig
    plain_config: LossConfig
    plain: dict[str, object]


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
        inputs = _inputs(draw, pair.oracle, policy, advantages, per_token, masked)
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
    )


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


def _inputs(
    draw: Draw,
    oracle: OracleLayout,
    policy: Policy,
    advantages: Numbers,
    per_token: Numbers | None,
    masked: bool,
) -> Inputs:
    """Draw what a policy loss is given beside the policy."""
    actions, ids = oracle.actions, oracle.step_ids

    def tokens(low: float, high: float) -> Numbers:
        flat = draw.spoiled(draw.floats(oracle.size, low, high), actions)
        return draw.numbers(flat, oracle.shape)

    def spread(per_step: Numbers) -> list[float]:
        return [per_step.flat[step] if step >= 0 else math.nan for step in ids]

    arguments: dict[str, object] = {"advantages": advantages.tensor}
    plain: dict[str, object] = {"advantages": spread(advantages)}
    if per_token is not None and (masked or draw.chance(0.4)):
        poisoned = draw.numbers(draw.spoiled(per_token.flat, actions), oracle.shape)
        arguments["advantages"], plain["advantages"] = poisoned.tensor, poisoned.flat
    arguments["old_log_probs"] = plain["old_log_probs"] = None
    if draw.chance(0.8):
        noise = draw.rng.choice([1e-3, 0.1, 1.0])
        moved = [
            (value + draw.number(-noise, noise)) if math.isfinite(value) else draw.number(-3, 0)
            for value in policy.log_probs
        ]
        moved = draw.spoiled(moved, actions)
        if actions and draw.chance(0.06):
            # A sampler could not give it. It reaches its step and no other.
            moved[draw.rng.choice(actions)] = draw.named(
                "old log-prob", [math.nan, math.inf, -math.inf]
            )
        old = draw.numbers(moved, oracle.shape)
        arguments["old_log_probs"], plain["old_log_probs"] = old.tensor, old.flat
    low, high = draw.rng.choice([(3e-4, 4e-4), (0.2, 0.3), (0.9, 9.0), (0.05, 0.02)])
    numbers = {
        "ratio": draw.named("ratio", ["geometric", "product", "centered"]),
        "clip_low": low,
        "clip_high": high,
        "dual_clip": draw.rng.choice([None, None, 1.5, 3.0]),
        "log_ratio_max": draw.rng.choice([10.0, 10.0, 0.3]),
        "reduction": draw.named("reduction", REDUCTIONS),
        "kl_coef": draw.rng.choice([0.0, 0.0, 0.3]),
        "kl_estimator": draw.named("kl", ["k1", "k2", "k3"]),
        "entropy_coef": draw.rng.choice([0.0, 0.0, 0.2]),
    }
    if numbers["kl_coef"] or draw.chance(0.2):
        ref = tokens(*draw.rng.choice([(-3, 0), (-9, 0), (-30, 0)]))
        arguments["ref_log_probs"], plain["ref_log_probs"] = ref.tensor, ref.flat
    if policy.depth != "log_probs":
        plain["entropy"] = policy.entropies if numbers["entropy_coef"] else None
    elif numbers["entropy_coef"] or draw.chance(0.2):
        plain["entropy"] = policy.entropies
        arguments["entropy"] = "leaf"
    if draw.chance(0.3):
        if masked or (oracle.shape != (len(oracle.steps),) and draw.chance(0.5)):
            weights = tokens(0, 2)
            plain["is_weights"] = weights.flat
        else:
            weights = draw.numbers(draw.some_zero(len(oracle.steps)), (len(oracle.steps),))
            plain["is_weights"] = spread(weights)
        arguments["is_weights"] = weights.tensor
    if not masked and draw.chance(0.3):
        own = draw.numbers(draw.some_zero(len(oracle.steps)), (len(oracle.steps),))
        arguments["step_weights"], plain["step_weights"] = own.tensor, own.flat
    if draw.chance(0.3):
        plain["normalizer"] = arguments["normalizer"] = float(draw.rng.randint(1, 9))
        if draw.chance(0.5):
            arguments["normalizer"] = torch.tensor(plain["normalizer"], device=draw.device)
    if numbers["ratio"] == "centered" and draw.chance(0.4):
        plain["ratio_center"] = arguments["ratio_center"] = draw.rng.randint(-8, 8) / 16
    draw.words += [f"{name}={value}" for name, value in numbers.items() if value != 0.0]
    return Inputs(arguments, StepPOConfig(**numbers), LossConfig(**numbers), plain)


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
        near(
            f"metric {name}", torch.tensor(metrics[name], dtype=torch.float64), [value],
            dtype=draw.dtype, scale=max(size, 1.0), condition=condition,
        )  # fmt: skip
    if not want.get("num_steps"):
        assert all(math.isfinite(value) for value in metrics.values()), metrics
