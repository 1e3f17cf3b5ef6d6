"""A NaN shows wherever it stands, alike on all backends, and nowhere it has nothing to do with."""

from __future__ import annotations

import math

import pytest
import torch
from grids import grid
from methods import FEW, METHODS

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
)

NAN, INF = math.nan, math.inf
# Steps at 1-2, 4-5 and 7; 0, 3 and 6 are masked.
_MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
_STEPS = torch.tensor([[-1, 0, 0, -1], [1, 1, -1, 2]])
_CONFIG = StepPOConfig(clip_low=0.5, clip_high=0.5)


def full(value, target, shape=(2, 4)):
    return torch.full(shape, value, dtype=torch.float64, device=target.device)


def call(target, masked, advantages=(1.0, -2.0, 0.5), config=_CONFIG, x=None, old=None, **options):
    """Return the output and the leaf: log-ratios are 0.1, masked positions hold NaN."""
    mask = _MASK.to(target.device)
    x = full(-1.0, target) if x is None else x.clone()
    x[~mask] = NAN
    old = full(-1.1, target) if old is None else old
    layout = StepLayout.from_mask(mask)
    per_step = torch.tensor(advantages, dtype=torch.float64, device=target.device)
    if masked:
        on_tokens = torch.where(mask, per_step[_STEPS.to(target.device)], NAN)
        out = steppo_loss(
            x.requires_grad_(), old, on_tokens, mask, config=config, backend=target.backend,
            **options,
        )  # fmt: skip
    else:
        out = steppo_loss(
            x.requires_grad_(), old, per_step, layout, config=config, backend=target.backend,
            **options,
        )  # fmt: skip
    return out, x


def at(value, position, others, target):
    """A [2, 4] tensor of `others` with `value` at one flat position."""
    made = full(others, target)
    made.view(-1)[position] = value
    return made


@pytest.mark.parametrize("position", [1, 5, 7])
def test_the_ratio_metrics_show_a_nan_in_any_step(target, masked, position):
    out, _ = call(target, masked, old=at(NAN, position, -1.1, target))
    metrics = out.metrics.as_dict()
    for name in ("ratio_min", "ratio_max", "ratio_mean", "policy_loss", "approx_kl"):
        assert math.isnan(metrics[name]), name
    assert metrics["clip_fraction"] == 0.0
    assert out.loss.isnan()


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.999], ids=str)
def test_the_ratio_metrics_show_a_nan_in_any_part_of_a_call(kernel, masked, place):
    """Programs and tasks keep extremes of their own, which are compared last."""
    # The interpreter takes a row at a time, or 256 steps.
    count = (100 if masked else 600) if kernel.interpreted else 70_000
    mask = torch.ones(count // 10, 20, dtype=torch.bool, device=kernel.device)
    mask[:, 1::2] = False
    x = torch.zeros(mask.shape, device=kernel.device)
    x.view(-1)[2 * int(place * count)] = NAN
    layout = mask if masked else StepLayout.from_mask(mask)
    out = steppo_loss(x, torch.zeros_like(x), torch.ones_like(x), layout, backend=kernel.backend)
    assert out.metrics["ratio_min"].isnan()
    assert out.metrics["ratio_max"].isnan()


@grid(
    cover=1,
    method=METHODS,
    where=["log_probs", "old_log_probs", "weight", "token weight"],
    value=[NAN, INF, -INF],
    interpreted={"method": FEW},
)
def test_a_step_without_advantage_has_no_gradient_whatever_else_is_there(
    target, masked, method, where, value
):
    options = {}
    if where == "log_probs":
        options["x"] = at(value, 4, -1.0, target)
    elif where == "old_log_probs":
        options["old"] = at(value, 4, -1.1, target)
    elif where == "token weight" or masked:
        options["is_weights"] = at(value, 4, 1.0, target)
    else:
        options["is_weights"] = torch.tensor([1.0, value, 1.0], device=target.device)
    # Bounds beyond the first step of a product, whose ratio is e^0.2.
    config = method.config(clip_high=0.5)
    out, x = call(target, masked, (1.0, 0.0, 0.5), config, **options, **method.center())
    out.loss.backward()
    assert x.grad.view(-1)[[0, 3, 4, 5, 6]].tolist() == [0.0] * 5
    assert x.grad.view(-1)[[1, 2, 7]].isfinite().all()
    assert x.grad.view(-1)[[1, 2, 7]].all()
    assert out.loss.isnan() == (math.isnan(value) or "weight" in where)


@grid(cover=1, method=METHODS, value=[NAN, INF], interpreted={"method": FEW})
def test_a_step_weight_reaches_no_step_without_advantage(target, method, value):
    weights = torch.tensor([1.0, value, 1.0], device=target.device)
    out, x = call(target, False, (1.0, 0.0, 0.5), method.config(), step_weights=weights)
    out.loss.backward()
    assert x.grad.view(-1)[4:6].tolist() == [0.0, 0.0]
    assert x.grad.isfinite().all()
    assert out.loss.isnan()


def test_token_weights_and_a_log_ratio_beyond_all_bounds(target, masked):
    """The step is clipped: its value is the clipped ratio times the mean weight."""
    for old, ratio in ((-INF, 1.5), (INF, 0.0)):
        weights = full(1.0, target)
        weights.view(-1)[5] = 3.0
        advantage = 1.0
        out, x = call(
            target,
            masked,
            (0.0, advantage, 0.0),
            old=at(old, 4, -1.0, target),
            is_weights=weights,
        )
        out.loss.backward()
        assert out.loss.item() == pytest.approx(-ratio * 2.0 / 3.0, abs=1e-15)
        assert not x.grad.any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_nan_of_the_reference_policy_reaches_its_token(target, masked, estimator):
    config = StepPOConfig(clip_low=0.5, clip_high=0.5, kl_coef=0.1, kl_estimator=estimator)
    out, x = call(target, masked, (1.0, 0.0, 0.5), config, ref_log_probs=at(NAN, 4, -1.2, target))
    out.loss.backward()
    assert out.loss.isnan()
    assert out.metrics["kl_loss"].isnan()
    assert out.metrics["policy_loss"].isfinite()
    # The slope of k1 is the same everywhere, so that it does not need the penalty.
    assert x.grad.view(-1)[4].isnan() == (estimator != "k1")
    assert x.grad.view(-1)[[1, 2, 5, 7]].isfinite().all()
    assert x.grad.view(-1)[[0, 3, 6]].tolist() == [0.0] * 3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_penalty_that_only_reports_changes_no_gradient(target, masked, estimator):
    config = StepPOConfig(clip_low=0.5, clip_high=0.5, kl_estimator=estimator)
    out, x = call(target, masked, config=config)
    out.loss.backward()
    other, y = call(target, masked, config=config, ref_log_probs=at(NAN, 4, -1.2, target))
    other.loss.backward()
    assert other.metrics["kl_loss"].isnan()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-15, atol=0)


@pytest.mark.parametrize("upstream", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_an_upstream_gradient_that_is_not_finite_reaches_live_tokens_only(
    target, masked, upstream, twice
):
    whole = StepPOConfig(clip_low=0.5, clip_high=0.5, kl_coef=0.1, entropy_coef=0.1)
    for config, has_bonus in ((whole, True), (_CONFIG, False)):
        bonus = torch.where(_MASK.to(target.device), 1.0, NAN).double().requires_grad_()
        # The second step has no advantage, the third one is clipped.
        out, x = call(
            target,
            masked,
            (1.0, 0.0, 0.5),
            config,
            old=at(-9.0, 7, -1.1, target),
            ref_log_probs=full(-1.0 if has_bonus else NAN, target),
            entropy=bonus,
        )
        for _ in range(1 + twice):
            x.grad = bonus.grad = None
            out.loss.backward(full(upstream, target, ()), retain_graph=twice)
        grad = x.grad.view(-1)
        assert grad[[0, 3, 4, 5, 6, 7]].tolist() == [0.0] * 6
        assert not grad[1:3].isfinite().any()
        masked_bonus = bonus.grad[~_MASK.to(target.device)]
        assert masked_bonus.tolist() == [0.0] * 3
        live_bonus = bonus.grad[_MASK.to(target.device)]
        assert not live_bonus.isfinite().any() if has_bonus else not live_bonus.any()


@pytest.mark.parametrize("upstream", [NAN, INF], ids=str)
def test_such_an_upstream_gradient_from_logits_and_hidden_states(target, masked, upstream):
    device = target.device
    mask = _MASK.to(device)
    layout = mask if masked else StepLayout.from_mask(mask)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (2, 4), generator=generator).to(device)
    advantages = torch.tensor([1.0, 0.0, 0.5], device=device)
    on_tokens = torch.where(mask, advantages[_STEPS.to(device)], NAN)
    old = torch.full((2, 4), -2.0, device=device)
    config = StepPOConfig(clip_low=0.99, clip_high=99.0)
    given = on_tokens if masked else advantages
    live = (_STEPS == 0) | (_STEPS == 2)

    logits = torch.randn(2, 4, 7, generator=generator).to(device).requires_grad_()
    loss = steppo_loss_from_logits(
        logits, ids, old, given, layout, config=config, backend=target.backend
    ).loss
    loss.backward(torch.tensor(upstream, device=device))
    assert not logits.grad[~live.to(device)].any()
    assert not logits.grad[live.to(device)].isfinite().any()

    hidden = torch.randn(2, 4, 3, generator=generator).to(device).requires_grad_()
    weight = torch.randn(7, 3, generator=generator).to(device).requires_grad_()
    loss = linear_steppo_loss(
        hidden, weight, ids, old, given, layout, config=config, backend=target.backend
    ).loss
    loss.backward(torch.tensor(upstream, device=device))
    assert not hidden.grad[~live.to(device)].any()
    assert not hidden.grad[live.to(device)].isfinite().any()


def value_loss(target, values, returns=(0.1, 0.2, 0.3), old=None, clip=0.5):
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool, device=target.device)
    layout = StepLayout.from_mask(mask)
    v = full(NAN, target)
    v.view(-1)[layout.state_index] = torch.tensor(values, dtype=torch.float64).to(v)
    v.requires_grad_()
    out = step_value_loss(
        v,
        torch.tensor(returns, dtype=torch.float64, device=target.device),
        layout,
        old_values=None if old is None else torch.tensor(old, dtype=torch.float64).to(v.device),
        clip=clip,
        backend=target.backend,
    )
    return out, v, layout.state_index


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("old", [None, (0.0, 0.0, 0.0), (9.0, 9.0, 9.0)], ids=str)
@pytest.mark.parametrize("where", ["value", "return"])
def test_the_value_loss_shows_a_nan(target, step, old, where):
    values, returns = [0.4, 0.4, 0.4], [0.1, 0.2, 0.3]
    (values if where == "value" else returns)[step] = NAN
    out, v, states = value_loss(target, values, returns, old)
    out.loss.backward()
    assert out.loss.isnan()
    assert out.metrics["value_loss"].isnan()
    assert out.metrics["explained_variance"].isnan()
    assert out.metrics[f"{where}_mean"].isnan()
    grad = v.grad.view(-1)
    assert grad[states].isnan().tolist() == [k == step for k in range(3)]
    grad[states] = 0.0
    assert not grad.any()


def test_the_value_loss_shows_a_nan_of_the_old_values(target):
    out, v, states = value_loss(target, [0.4, 0.4, 0.4], old=[0.0, NAN, 9.0])
    out.loss.backward()
    assert out.loss.isnan()
    assert out.metrics["clip_fraction"].item() == pytest.approx(1 / 3)
    grad = v.grad.view(-1)[states]
    assert grad.isnan().tolist() == [False, True, False]
    assert grad[2] == 0.0


@pytest.mark.parametrize("upstream", [NAN, INF], ids=str)
def test_such_an_upstream_gradient_reaches_trained_values_only(target, upstream):
    """The second value is clipped, and the third one is what it should be."""
    out, v, states = value_loss(target, [0.4, 0.4, 0.3], old=[0.4, 9.0, 0.3])
    out.loss.backward(full(upstream, target, ()))
    grad = v.grad.view(-1)
    assert not grad[states[0]].isfinite()
    grad[states[0]] = 0.0
    assert not grad.any()
