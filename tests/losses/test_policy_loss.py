"""steppo_loss: gradcheck, fp32 error, metrics, and what is given per token."""

from __future__ import annotations

import math

import pytest
import torch
from batches import Error, fp64, policy_results, random_batch, two_steps
from grids import grid

from steppo_kernels import StepPOConfig, broadcast_to_tokens, steppo_loss
from steppo_kernels.config import KL_ESTIMATORS, RATIOS, REDUCTIONS
from steppo_kernels.outputs import POLICY_METRICS

_EPS = torch.finfo(torch.float32).eps


@grid(
    cover=1,
    ratio=RATIOS,
    reduction=REDUCTIONS,
    dual_clip={"no-dual-clip": None, "dual-clip": 1.5},
    estimator=KL_ESTIMATORS,
)
def test_gradcheck(target, masked, ratio, reduction, dual_clip, estimator):
    # Element by element where that is fast, else along random directions.
    fast_mode = target.backend != "cpu"
    batch = random_batch(
        11,
        2,
        7,
        ratio=ratio,
        mean_step=2.0,
        log_ratios=(-0.9, 0.9),
        dtype=torch.float64,
        device=target.device,
    )
    config = StepPOConfig(
        ratio=ratio,
        reduction=reduction,
        dual_clip=dual_clip,
        kl_estimator=estimator,
        clip_low=0.2,
        clip_high=0.3,
        kl_coef=0.4,
        entropy_coef=0.1,
    )

    def loss(log_probs, entropy):
        # The default center has no gradient, but finite differences would see it move.
        return steppo_loss(
            log_probs,
            batch.old_log_probs,
            batch.on_tokens(batch.advantages) if masked else batch.advantages,
            batch.mask if masked else batch.layout,
            config=config,
            ref_log_probs=batch.ref_log_probs,
            entropy=entropy,
            ratio_center=0.03,
            backend=target.backend,
        ).loss

    inputs = batch.log_probs.requires_grad_(), batch.entropy.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=fast_mode)


def away_from_borders(batch, config):
    """Take the steps out, by A = 0, whose ratio is so near a border that fp32 may err on it.

    There the value is continuous but the gradient jumps: which side is right is a matter of the
    last bit.
    """
    log_ratio = policy_results(batch.to(torch.float64), config, "reference")["step_log_ratio"]
    borders = [1 - config.clip_low, 1 + config.clip_high, math.exp(config.log_ratio_max)]
    if config.dual_clip:
        borders.append(config.dual_clip)
    near = torch.zeros_like(log_ratio, dtype=torch.bool)
    for border in borders:
        near |= (log_ratio - math.log(border)).abs() < 1e-5
    batch.advantages[near] = 0.0
    assert int(near.sum()) <= 1


@pytest.mark.isa
@grid(cover=1, ratio=RATIOS, reduction=REDUCTIONS)
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel, masked, ratio, reduction):
    """Against fp64, over batches with ratios from 1e-4 to e^8: the house rule on accuracy."""
    config = StepPOConfig(
        ratio=ratio,
        reduction=reduction,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=20.0,
        kl_coef=0.1,
        entropy_coef=0.05,
    )
    sums, largest = {}, {}
    for seed in range(3 if kernel.interpreted else 24):
        batch = random_batch(seed, 6, 64, ratio=ratio, mean_step=8.0)
        away_from_borders(batch, config)
        weights = {} if masked else {"is_weights": batch.is_weights}
        if ratio == "centered":
            # Given, as its own error would be common to every step.
            weights["ratio_center"] = 0.0
        on_target = {k: v.to(kernel.device) if k == "is_weights" else v for k, v in weights.items()}
        moved = batch.to(torch.float32, kernel.device)
        found = {
            "reference": policy_results(batch, config, "reference", masked=masked, **weights),
            "kernel": policy_results(moved, config, kernel.backend, masked=masked, **on_target),
        }
        exact = policy_results(
            batch.to(torch.float64), config, "reference", masked=masked, **weights
        )
        del exact["metrics"]
        for who, results in found.items():
            for name, value in exact.items():
                error = Error.between(results[name], value)
                sums[who, name] = sums.get((who, name), 0.0) + error.rms**2
                largest[who, name] = max(largest.get((who, name), 0.0), error.largest)
    for name in exact:
        rms = [sums[who, name] ** 0.5 for who in ("kernel", "reference")]
        top = [largest[who, name] for who in ("kernel", "reference")]
        # A result that is right to its last bit has an error of up to half an eps of itself.
        assert rms[0] <= 2 * rms[1] + _EPS, name
        assert top[0] <= 2 * top[1] + _EPS, name
        assert top[1] < 1e-4, name


def token_form(batch, config, weights):
    """The step ratio on each token, with a gradient to this token's log-prob alone."""
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    loss = 0.0
    layout = batch.layout
    for step, index in enumerate(layout.token_index.tensor_split(layout.step_offsets[1:-1].cpu())):
        new = log_probs.reshape(-1)[index]
        z = new - batch.old_log_probs.reshape(-1)[index]
        ratio = z.mean().detach().exp() * (new - new.detach()).exp()
        a = batch.advantages[step]
        each = torch.maximum(
            -a * ratio, -a * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        )
        loss = loss + (weights.reshape(-1)[index] * each).mean()
    loss = loss / layout.num_steps
    loss.backward()
    return loss.detach(), log_probs.grad


def test_token_weights_are_the_token_form(target, masked):
    """Value l_s mean(w); the gradient of a token is scaled by its own w."""
    batch = random_batch(4, log_ratios=(-0.5, 0.5), dtype=torch.float64, device=target.device)
    config = StepPOConfig(clip_low=0.2, clip_high=0.2)
    found = policy_results(
        batch, config, target.backend, masked=masked, is_weights=batch.token_weights
    )
    loss, grad = token_form(batch, config, batch.token_weights)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["grad_log_probs"], grad, rtol=1e-12, atol=1e-16)


@grid(
    dtype=[torch.float32, torch.float64],
    kl=[None, *KL_ESTIMATORS],
    entropy_coef={"no-entropy": 0.0, "entropy": 0.1},
)
def test_dead_tokens_are_those_without_a_gradient(target, masked, dtype, kl, entropy_coef):
    batch = random_batch(9, 7, 40, log_ratios=(-0.5, 0.5), dtype=dtype, device=target.device)
    batch.advantages[::3] = 0.0
    # Beyond the clamp of a penalty it has no gradient.
    batch.ref_log_probs[:, ::2] += 30.0
    config = StepPOConfig(
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.0 if kl is None else 0.1,
        kl_estimator=kl or "k3",
        entropy_coef=entropy_coef,
    )
    weights = batch.on_tokens(torch.ones_like(batch.is_weights))
    weights[1::2] = 0.0
    found = policy_results(batch, config, target.backend, masked=masked, is_weights=weights)
    dead = found["grad_log_probs"] == 0
    if entropy_coef:
        dead &= found["grad_entropy"] == 0
    share = int(dead[batch.mask].sum()) / int(batch.mask.sum())
    assert float(found["metrics"][POLICY_METRICS.index("dead_token_fraction")]) == share
    # With an entropy bonus every token is alive; else some are and some are not.
    assert share == 0.0 if entropy_coef else 0.0 < share < 1.0


def test_on_policy_ratios_are_exactly_one(target, masked):
    batch = random_batch(5, device=target.device)
    log_probs = batch.log_probs.requires_grad_()
    result = steppo_loss(
        log_probs,
        None,
        batch.on_tokens(batch.advantages) if masked else batch.advantages,
        batch.mask if masked else batch.layout,
        config=StepPOConfig(clip_low=0.0, clip_high=0.0),
        backend=target.backend,
    )
    result.loss.backward()
    metrics = result.metrics.as_dict()
    assert metrics["ratio_min"] == metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    assert metrics["clip_fraction"] == metrics["approx_kl"] == metrics["approx_kl_k3"] == 0.0
    lengths = broadcast_to_tokens(batch.layout.step_lengths.float(), batch.layout)
    slope = -batch.on_tokens(batch.advantages) / lengths / batch.layout.num_steps
    expected = torch.where(batch.mask, slope, 0.0)
    torch.testing.assert_close(log_probs.grad, expected, rtol=4 * _EPS, atol=0.0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_layout_and_mask_agree(target, ratio):
    """Two kernels, one definition: equal but for the order of sums."""
    config = StepPOConfig(ratio=ratio, clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.1)
    batch = random_batch(6, ratio=ratio, dtype=torch.float64, device=target.device)
    by_layout, by_mask = (
        policy_results(batch, config, target.backend, masked=masked) for masked in (False, True)
    )
    for name, value in by_mask.items():
        torch.testing.assert_close(by_layout[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
def test_masks_of_every_dtype_and_one_dimension(target, dtype):
    batch = random_batch(7, rows=1, length=40, device=target.device)
    config = StepPOConfig(clip_low=0.2, clip_high=0.2)
    expected = policy_results(batch, config, target.backend, masked=True)
    for mask in (batch.mask.to(dtype), batch.mask.to(dtype)[0]):
        result = steppo_loss(
            batch.log_probs,
            batch.old_log_probs,
            batch.on_tokens(batch.advantages),
            mask,
            config=config,
            backend=target.backend,
        )
        assert torch.equal(result.loss, expected["loss"])
        assert result.step_log_ratio is None


def test_each_token_has_its_own_advantage(target, masked):
    """Under the ratio of its step; the gradient of a token is that of its own advantage."""
    mask, layout = two_steps(target)
    z = fp64([[0.1, 0.3, torch.nan, -0.5]], target.device)
    x = z.clone().requires_grad_()
    advantages = fp64([[2.0, -1.0, torch.nan, 3.0]], target.device)
    out = steppo_loss(
        x,
        torch.zeros_like(z),
        advantages,
        mask if masked else layout,
        config=StepPOConfig(clip_low=0.1, clip_high=0.1),
        backend=target.backend,
    )
    out.loss.backward()
    # The ratio e^0.2 of the first step is above its bound: a positive advantage is clipped there,
    # a negative one is not. That of the second step, e^-0.5, is below: 3 is not clipped.
    first, second = math.exp(0.2), math.exp(-0.5)
    assert out.loss.item() == pytest.approx(((-2 * 1.1 + first) / 2 - 3 * second) / 2, rel=1e-12)
    expected = fp64([[0.0, first / 4, 0.0, -3 * second / 2]], target.device)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=0.0)
    metrics = out.metrics.as_dict()
    assert metrics["clip_fraction"] == metrics["clip_fraction_high"] == 0.25
    assert metrics["token_clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["dead_token_fraction"] == pytest.approx(1 / 3)


@grid(ratio=RATIOS)
def test_advantages_of_a_step_on_its_tokens_are_those_of_the_step(target, masked, ratio):
    batch = random_batch(8, ratio=ratio, dtype=torch.float64, device=target.device)
    config = StepPOConfig(ratio=ratio, clip_low=0.2, clip_high=0.2)
    spread = batch.on_tokens(batch.advantages)
    found = policy_results(batch, config, target.backend, masked=masked, advantages=spread)
    expected = policy_results(batch, config, target.backend)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_metrics_do_not_touch_the_host_until_asked(target):
    batch = random_batch(1, device=target.device)
    result = steppo_loss(
        batch.log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.layout,
        backend=target.backend,
    )
    assert result.metrics.names == POLICY_METRICS
    assert result.metrics.values.device.type == target.device
    assert result.metrics.values.dtype == torch.float64
    assert not result.metrics.values.requires_grad
    as_dict = result.metrics.as_dict()
    assert list(as_dict) == list(POLICY_METRICS)
    for name, value in as_dict.items():
        assert isinstance(value, float)
        assert float(result.metrics[name]) == value
    assert result.step_log_ratio.shape == (batch.layout.num_steps,)


def test_needs_no_gradient(target, masked):
    """Without a gradient to compute, or under no_grad, the loss has no graph and one value."""
    batch = random_batch(3, device=target.device)
    expected = policy_results(batch, StepPOConfig(), target.backend, masked=masked)["loss"]
    advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    steps = batch.mask if masked else batch.layout
    plain = steppo_loss(
        batch.log_probs, batch.old_log_probs, advantages, steps, backend=target.backend
    )
    with torch.no_grad():
        inside = steppo_loss(
            batch.log_probs.requires_grad_(),
            batch.old_log_probs,
            advantages,
            steps,
            backend=target.backend,
        )
    for result in (plain, inside):
        assert not result.loss.requires_grad
        assert torch.equal(result.loss, expected)


def test_a_token_is_dead_if_its_whole_coefficient_is_zero(target):
    """Policy -A and KL +1 cancel."""
    _, layout = two_steps(target)
    x = fp64([[-0.5] * 4], target.device, requires_grad=True)
    config = StepPOConfig(kl_coef=1.0, kl_estimator="k1")
    out = steppo_loss(
        x,
        None,
        fp64([1.0, 1.0], target.device),
        layout,
        config=config,
        ref_log_probs=x.detach(),
        backend=target.backend,
    )
    out.loss.backward()
    assert not x.grad.any()
    assert out.metrics["dead_token_fraction"] == 1


def test_on_policy_ratios_are_one_whatever_the_center(target):
    _, layout = two_steps(target)
    x = fp64([[-0.5] * 4], target.device)
    out = steppo_loss(
        x,
        None,
        fp64([1.0, 1.0], target.device),
        layout,
        ratio_center=0.5,
        config=StepPOConfig(ratio="centered"),
        backend=target.backend,
    )
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1


def test_metrics_by_name():
    batch = random_batch(3, 2, 9)
    metrics = steppo_loss(
        batch.log_probs, batch.old_log_probs, batch.advantages, batch.layout, backend="reference"
    ).metrics
    assert list(metrics) == list(POLICY_METRICS)
    values = dict(metrics)
    assert {name: value.item() for name, value in values.items()} == metrics.as_dict()
    with pytest.raises(KeyError, match="'clip', expected one of policy_loss, kl_loss"):
        metrics["clip"]
