"""steppo_loss at the borders of its clips and clamps: which side keeps its gradient."""

from __future__ import annotations

import math
from importlib import metadata

import pytest
import torch
from batches import fp64, policy_results, random_batch, two_steps
from grids import grid
from methods import Method
from oracle.policy_loss import kl_penalty

from steppo_kernels import StepLayout, StepPOConfig, steppo_loss
from steppo_kernels.config import RATIOS
from steppo_kernels.outputs import POLICY_METRICS

pytestmark = pytest.mark.isa


def one_step(target, log_ratios, advantage, config, masked, dtype=torch.float32, **options):
    """Return the metrics and the gradient of a single step with these token log-ratios."""
    log_probs = torch.tensor(log_ratios, dtype=dtype, device=target.device).requires_grad_()
    mask = torch.ones(len(log_ratios), dtype=torch.bool, device=target.device)
    layout = StepLayout.from_mask(mask, backend="reference")
    advantages = torch.full((len(log_ratios) if masked else 1,), advantage, dtype=dtype)
    result = steppo_loss(
        log_probs,
        torch.zeros_like(log_probs),
        advantages.to(target.device),
        mask if masked else layout,
        config=config,
        backend=target.backend,
        **options,
    )
    result.loss.backward()
    return result.metrics.as_dict(), log_probs.grad


def needs_exact_numbers(target, dtype):
    """Skip where a number of the config does not reach the kernel as it is."""
    if target.backend == "triton" and dtype == torch.float64:
        release = tuple(map(int, metadata.version("triton").split(".")[:2]))
        if release < (3, 9):
            pytest.skip("Triton before 3.9 hands numbers to its kernels in fp32")


_DTYPES = [torch.float32, torch.float64]


@grid(dtype=_DTYPES, side=["high", "low"], length=[1, 3, 40])
def test_ratio_exactly_at_a_clip_border_keeps_its_gradient(target, masked, side, length, dtype):
    needs_exact_numbers(target, dtype)
    sign = 1.0 if side == "high" else -1.0
    z = [sign * 0.25 + 0.001 * k for k in range(length)]
    ratio = one_step(target, z, 1.0, StepPOConfig(), masked, dtype)[0]["ratio_mean"]
    # Both differences are exact, as is adding them to 1 again.
    at = StepPOConfig(clip_high=ratio - 1) if side == "high" else StepPOConfig(clip_low=1 - ratio)
    metrics, grad = one_step(target, z, sign, at, masked, dtype)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["dead_token_fraction"] == 0.0
    expected = torch.full_like(grad, -sign * ratio / length)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0.0)
    # One unit in the last place closer, it is clipped.
    closer = torch.nextafter(torch.tensor(ratio, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    inside = abs(float(closer) - 1)
    below = StepPOConfig(clip_high=inside) if side == "high" else StepPOConfig(clip_low=inside)
    metrics, grad = one_step(target, z, sign, below, masked, dtype)
    assert metrics["clip_fraction"] == metrics[f"clip_fraction_{side}"] == 1.0
    assert metrics["dead_token_fraction"] == 1.0
    assert torch.equal(grad, torch.zeros_like(grad))


_TIED = {
    f"{surrogate}-{ratio}": Method(surrogate, ratio)
    for surrogate in ("clip", "cispo", "mask", "quadratic", "tv")
    for ratio in ("geometric", "product", "token")
    if surrogate != "tv" or ratio == "token"
}


@grid(
    cover=1,
    method=_TIED,
    dtype=_DTYPES,
    side=["high", "low"],
    length=[1, 40],
    form=["layout", "mask", "bounds of steps"],
)
def test_ratio_exactly_at_a_bound(target, method, dtype, side, length, form):
    """At a bound, and one unit in the last place inside and outside of it: weight and counts.

    The old log-probs are 0, so that the probability of a token has moved by its ratio less 1.
    """
    masked, by_step = form == "mask", form == "bounds of steps"
    if not by_step:
        needs_exact_numbers(target, dtype)
    sign = 1.0 if side == "high" else -1.0
    z = [sign * 0.25 / (length if method.ratio == "product" else 1)] * length
    wide = {"clip_low": 0.9, "clip_high": 9.0}

    def at(advantage, bound=None):
        bounds = {} if bound is None else {f"clip_{side}": bound}
        if by_step:
            config = StepPOConfig(**method._asdict(), **wide)
            bounds = {
                k: torch.tensor([v], dtype=dtype).to(target.device) for k, v in bounds.items()
            }
        else:
            config, bounds = StepPOConfig(**method._asdict(), **{**wide, **bounds}), {}
        return one_step(target, z, advantage, config, masked, dtype, **bounds)

    metrics, plain = at(sign)
    assert plain.all()
    ratio = metrics["ratio_max"]
    if by_step and float(torch.tensor(ratio, dtype=dtype)) != ratio:
        pytest.skip("the ratio of a step is no number of the bounds' dtype")
    tie = abs(ratio - 1)
    inside, outside = (
        abs(
            float(torch.nextafter(torch.tensor(ratio, dtype=dtype), torch.tensor(to).to(dtype))) - 1
        )
        for to in (1.0, 1.0 + 9.0 * sign)
    )
    share = method.share(length)
    # The weight c of the bounds, and whether it counts as clipped.
    expected = {
        "clip": {inside: (0.0, True), tie: (ratio, False), outside: (ratio, False)},
        "cispo": {inside: (ratio, True), tie: (ratio, True), outside: (ratio, False)},
        "mask": {inside: (0.0, True), tie: (ratio, True), outside: (ratio, False)},
        "quadratic": {tie: (0.0, True)},
        "tv": {inside: (0.0, True), tie: (ratio, False), outside: (ratio, False)},
    }[method.surrogate]
    for bound, (weight, is_clipped) in expected.items():
        metrics, grad = at(sign, bound)
        wanted = torch.full_like(grad, -sign * weight * share)
        torch.testing.assert_close(grad, wanted, rtol=2e-6, atol=0.0)
        assert metrics["clip_fraction"] == metrics[f"clip_fraction_{side}"] == is_clipped
        assert metrics["token_clip_fraction"] == is_clipped
        assert metrics["dead_token_fraction"] == (weight == 0)
    if method.surrogate == "quadratic":
        # The weight goes through 0, and is counted there alone.
        for bound, direction in ((inside, -1.0), (outside, 1.0)):
            metrics, grad = at(sign, bound)
            assert (grad.sign() == -sign * direction).all()
            assert grad.abs().max() < 1e-4
            assert metrics["clip_fraction"] == 0.0
    # Without advantage there is no gradient; `cispo` and `mask` count both signs alike.
    for advantage in (0.0, -sign):
        metrics, grad = at(advantage, tie)
        both_signs = method.surrogate in ("cispo", "mask")
        by_the_upper = method.surrogate == "quadratic" and side == "high" and advantage == 0
        assert metrics["clip_fraction"] == (both_signs or by_the_upper)
        assert grad.any() == (advantage != 0)


@grid(
    ratio=[each for each in RATIOS if each != "token"],
    surrogate=["clip", "mask"],
    side=["high", "low"],
)
def test_a_near_tie_of_a_step_is_decided_in_fp64(kernel, masked, ratio, surrogate, side):
    """The ratio lies 2e-9 of itself beside its bound; an eps of the tokens, in fp32, is 1.2e-7.

    The reference is not asked, as it computes everything in the dtype of the tokens.
    """
    needs_exact_numbers(kernel, torch.float64)
    sign = 1.0 if side == "high" else -1.0
    log_probs = torch.tensor([sign * (0.06 + 0.01 * k) for k in range(5)], device=kernel.device)
    mask = torch.ones(5, dtype=torch.bool, device=kernel.device)
    layout = StepLayout.from_mask(mask, backend="reference")
    # Tokens on the side of the bound, of no advantage, and on the other side.
    advantages = torch.tensor([sign, 3 * sign, 0.0, -sign, -0.7 * sign], device=kernel.device)
    scale = {"geometric": 1 / 5, "product": 1.0, "centered": 5**-0.5}[ratio]
    rho = math.exp(scale * math.fsum(log_probs.tolist()))
    for is_outside in (False, True):
        at = rho * (1 - sign * 2e-9) if is_outside else rho * (1 + sign * 2e-9)
        bound = {"clip_high": at - 1} if side == "high" else {"clip_low": 1 - at}
        new = log_probs.clone().requires_grad_()
        result = steppo_loss(
            new,
            torch.zeros_like(new),
            advantages,
            mask if masked else layout,
            config=StepPOConfig(ratio=ratio, surrogate=surrogate, **bound),
            ratio_center=0.0 if ratio == "centered" else None,
            backend=kernel.backend,
        )
        result.loss.backward()
        # A clip acts on one sign of the advantage, the mask on both.
        dead = [is_outside and (surrogate == "mask" or a * sign > 0) for a in advantages.tolist()]
        flat = torch.tensor(dead, device=kernel.device) | (advantages == 0)
        expected = torch.where(flat, 0.0, -advantages * rho * scale)
        torch.testing.assert_close(new.grad, expected, rtol=1e-6, atol=0.0)
        metrics = result.metrics.as_dict()
        clipped = (1.0 if surrogate == "mask" else 2 / 5) if is_outside else 0.0
        assert metrics[f"clip_fraction_{side}"] == pytest.approx(clipped, rel=1e-12)
        assert metrics["clip_fraction"] == metrics[f"clip_fraction_{side}"]
        assert metrics["dead_token_fraction"] == pytest.approx(int(flat.sum()) / 5)


@grid(dtype=_DTYPES, ratio=RATIOS)
def test_ratio_one_without_room_keeps_its_gradient(target, masked, ratio, dtype):
    config = StepPOConfig(ratio=ratio, clip_low=0.0, clip_high=0.0)
    for advantage in (2.0, -2.0):
        metrics, grad = one_step(target, [0.0, 0.0, 0.0, 0.0], advantage, config, masked, dtype)
        slope = {"geometric": 0.25, "product": 1.0, "centered": 0.5, "token": 0.25}[ratio]
        assert grad.tolist() == [-advantage * slope] * 4
        assert metrics["clip_fraction"] == 0.0


@grid(dtype=_DTYPES)
def test_log_ratio_at_its_maximum_keeps_its_gradient(target, masked, dtype):
    needs_exact_numbers(target, dtype)
    z = torch.tensor(1.3, dtype=dtype)
    beyond = torch.nextafter(z, torch.tensor(2.0, dtype=dtype))
    config = StepPOConfig(log_ratio_max=float(z))
    # The advantage is negative, so that the clip does not act.
    at, grad = one_step(target, [float(z)], -1.0, config, masked, dtype)
    assert float(grad) == pytest.approx(math.exp(float(z)), rel=1e-6)
    past, grad = one_step(target, [float(beyond)], -1.0, config, masked, dtype)
    assert float(grad) == 0.0
    assert (at["dead_token_fraction"], past["dead_token_fraction"]) == (0.0, 1.0)
    assert past["policy_loss"] == at["policy_loss"] == pytest.approx(math.exp(1.3), rel=1e-6)


@grid(dtype=_DTYPES)
def test_dual_clip_border_keeps_its_gradient(target, masked, dtype):
    # Ratio and bound are powers of 2 times the advantage, so that their products are exact.
    ratio = one_step(target, [0.8], -2.0, StepPOConfig(), masked, dtype)[0]["ratio_mean"]
    at, grad = one_step(target, [0.8], -2.0, StepPOConfig(dual_clip=ratio), masked, dtype)
    assert float(grad) == pytest.approx(2 * ratio, rel=1e-6)
    inside = float(torch.nextafter(torch.tensor(ratio, dtype=dtype), torch.tensor(1.0).to(dtype)))
    past, grad = one_step(target, [0.8], -2.0, StepPOConfig(dual_clip=inside), masked, dtype)
    assert float(grad) == 0.0
    assert (at["dead_token_fraction"], past["dead_token_fraction"]) == (0.0, 1.0)
    # The dual clip bounds the loss; it is no clip of the ratio.
    assert past["clip_fraction"] == at["clip_fraction"] == 0.0
    assert past["policy_loss"] == 2 * inside


def test_no_advantage_no_gradient(target, masked):
    """Exactly 0, at any ratio, and no step counts as clipped."""
    batch = random_batch(2, device=target.device)
    batch.advantages.zero_()
    found = policy_results(batch, StepPOConfig(), target.backend, masked=masked)
    assert torch.equal(found["grad_log_probs"], torch.zeros_like(batch.log_probs))
    metrics = dict(zip(POLICY_METRICS, found["metrics"].tolist(), strict=False))
    assert metrics["clip_fraction"] == metrics["policy_loss"] == 0.0
    assert metrics["dead_token_fraction"] == 1.0


def test_penalties_are_clamped(target, masked):
    """d to +-20, the value to +-10; beyond either, the gradient is 0."""
    d = [0.5, 3.0, 25.0, -25.0, -15.0, 9.0, -9.0, 19.0]
    log_probs = torch.zeros(8, dtype=torch.float64, device=target.device)
    mask = torch.tensor([True] * 8, device=target.device)
    ref = torch.tensor(d, dtype=torch.float64, device=target.device)
    for estimator, slopes in {
        "k1": [1.0, 1.0, 0, 0, 0, 1.0, 1.0, 0],
        "k2": [-0.5, -3.0, 0, 0, 0, 0, 0, 0],
        "k3": [-math.expm1(0.5), 0, 0, 0, 0, 0, -math.expm1(-9.0), 0],
    }.items():
        new = log_probs.clone().requires_grad_()
        config = StepPOConfig(kl_coef=8.0, kl_estimator=estimator)
        result = steppo_loss(
            new,
            None,
            torch.zeros(8 if masked else 1, dtype=torch.float64, device=target.device),
            mask if masked else StepLayout.from_mask(mask, backend="reference"),
            config=config,
            ref_log_probs=ref,
            backend=target.backend,
        )
        result.loss.backward()
        expected_slope = [float(slope) for slope in slopes]
        if estimator == "k3":
            # e^-9 + 9 - 1 < 10, e^3 - 4 > 10.
            assert math.expm1(-9.0) + 9 < 10 < math.expm1(3.0) - 3
        assert new.grad.tolist() == pytest.approx(expected_slope, rel=1e-12, abs=0.0)
        values = [kl_penalty(x, estimator)[0] for x in d]
        assert result.loss.item() == pytest.approx(math.fsum(values), rel=1e-12)
        assert result.metrics.as_dict()["kl_loss"] == pytest.approx(math.fsum(values) / 8)


def test_kl_at_its_clamp_keeps_the_gradient(target):
    _, layout = two_steps(target)
    x = fp64([[-0.5] * 4], target.device, requires_grad=True)
    config = StepPOConfig(kl_coef=1.0, kl_estimator="k1")
    out = steppo_loss(
        x,
        x.detach(),
        fp64([0.0, 0.0], target.device),
        layout,
        config=config,
        ref_log_probs=x.detach() - 10.0,
        backend=target.backend,
    )
    out.loss.backward()
    assert x.grad.tolist() == [[0.25, 0.25, 0.0, 0.5]]
    assert out.metrics["dead_token_fraction"] == 0


@grid(dtype=_DTYPES, surrogate=["tv", "soft", "quadratic", "mask", "cispo"])
def test_a_weight_of_zero_is_clipped(target, masked, dtype, surrogate):
    """e^-inf is 0: no token of such a ratio can move, but for the constant weight of cispo."""
    bounds = {} if surrogate == "soft" else {"clip_low": 0.9, "clip_high": 9.0}
    config = StepPOConfig(ratio="token", surrogate=surrogate, **bounds)
    metrics, grad = one_step(target, [-math.inf, 0.0], 1.0, config, masked, dtype)
    assert metrics["token_clip_fraction"] == metrics["clip_fraction_low"] == 0.5
    assert metrics["clip_fraction_high"] == 0.0
    slope = -0.1 if surrogate == "cispo" else 0.0
    assert grad.tolist() == pytest.approx([slope / 2, -0.5], rel=1e-6)
    assert (grad[0] == 0) == (surrogate != "cispo")
