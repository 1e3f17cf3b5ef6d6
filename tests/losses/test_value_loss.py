"""step_value_loss: against loops, gradcheck, fp32 error, metrics and ties."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from batches import Error, ragged_mask, random_batch
from grids import grid
from hypothesis import strategies as st
from properties import examples

from steppo_kernels import StepLayout, step_value_loss
from steppo_kernels.config import REDUCTIONS
from steppo_kernels.outputs import VALUE_METRICS

_EPS = torch.finfo(torch.float32).eps


def run(values, returns, layout, backend, **options):
    values = values.detach().clone().requires_grad_()
    result = step_value_loss(values, returns, layout, backend=backend, **options)
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "grad_values": values.grad,
        "metrics": result.metrics.values,
    }


def loops(values, returns, layout, *, old_values, clip, reduction, normalizer, weights=None):
    """The same in plain Python; values and old values are lists of per-step numbers."""
    steps = oracles.of_layout(layout)
    used = [step for step, tokens in enumerate(steps.tokens) if tokens]
    members = {step: group for group in steps.trajectories for step in group}
    groups = sum(any(steps.tokens[step] for step in group) for group in steps.trajectories)
    total = {
        "step_mean": len(used),
        "trajectory_mean": groups,
        "token_mean": layout.num_tokens,
        "sum": 1,
    }[reduction]
    total = max(total, 1) if normalizer is None else normalizer
    loss, clipped, grad = 0.0, 0, [0.0] * len(values)
    for step in used:
        v, target = values[step], returns[step]
        weight = {
            "step_mean": 1.0,
            "trajectory_mean": 1 / sum(bool(steps.tokens[s]) for s in members.get(step, [step])),
            "token_mean": len(steps.tokens[step]),
            "sum": 1.0,
        }[reduction]
        weight = (weight if weights is None else weights[step]) / total
        plain, slope = (v - target) ** 2, v - target
        if old_values is not None:
            old = old_values[step]
            bounded = (old + min(max(v - old, -clip), clip) - target) ** 2
            # Inside the range the clipped value is the value.
            if abs(v - old) > clip and bounded > plain:
                plain, slope = bounded, 0.0
                clipped += 1
        loss += weight * 0.5 * plain
        grad[step] = weight * slope
    count = max(len(used), 1)

    def mean(numbers):
        return math.fsum(numbers) / count

    def variance(numbers):
        return mean((x - mean(numbers)) ** 2 for x in numbers)

    spread = variance([returns[s] for s in used])
    left = variance([returns[s] - values[s] for s in used])
    metrics = [
        loss,
        clipped / count,
        mean(values[s] for s in used),
        mean(returns[s] for s in used),
        1 - left / spread if spread > 0 else 0.0,
        len(used),
    ]
    return loss, grad, metrics


@pytest.mark.isa
@examples(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    reduction=st.sampled_from(REDUCTIONS),
    clip=st.sampled_from([None, 0.1, 0.5, 3.0]),
    per_token=st.booleans(),
    old_per_token=st.booleans(),
    returns_per_token=st.booleans(),
    weighted=st.booleans(),
    by_rows=st.booleans(),
    normalizer=st.sampled_from([None, 3.5]),
)
def test_loops(
    target,
    seed,
    shape,
    reduction,
    clip,
    per_token,
    old_per_token,
    returns_per_token,
    weighted,
    by_rows,
    normalizer,
):
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask(*shape, generator=generator)
    layout = StepLayout.from_mask(mask, backend="reference")
    if by_rows:
        valid = torch.rand(shape[0], generator=generator) < 0.7
        groups = (torch.arange(shape[0]) % 2).tolist()
        layout = StepLayout.from_rows(
            mask, groups, list(range(shape[0])), valid=valid, backend="reference"
        )

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    values, old, returns = normal(*shape), normal(*shape), normal(*shape)
    weights = normal(layout.num_steps) if weighted else None

    def at_states(on_tokens):
        return on_tokens.reshape(-1)[layout.state_index]

    found = run(
        (values if per_token else at_states(values)).to(target.device),
        (returns if returns_per_token else at_states(returns)).to(target.device),
        layout.to(target.device),
        target.backend,
        old_values=(
            None if clip is None else (old if old_per_token else at_states(old)).to(target.device)
        ),
        clip=clip or 0.5,
        reduction=reduction,
        step_weights=None if weights is None else weights.to(target.device),
        normalizer=normalizer,
    )
    loss, grad, metrics = loops(
        at_states(values).tolist(),
        at_states(returns).tolist(),
        layout,
        old_values=None if clip is None else at_states(old).tolist(),
        clip=clip,
        reduction=reduction,
        normalizer=normalizer,
        weights=None if weights is None else weights.tolist(),
    )
    expected = torch.tensor(grad, dtype=torch.float64)
    if per_token:
        spread = torch.zeros(mask.numel(), dtype=torch.float64)
        expected = spread.index_add(0, layout.state_index, expected).reshape(shape)
    assert found["loss"].item() == pytest.approx(loss, rel=1e-12, abs=1e-13)
    torch.testing.assert_close(found["grad_values"].cpu(), expected, rtol=1e-11, atol=1e-13)
    shown = found["metrics"].tolist()[: len(metrics)]
    assert shown == pytest.approx(metrics, rel=1e-9, abs=1e-11)


@grid(
    reduction=REDUCTIONS,
    per_token={"steps": False, "tokens": True},
    clipped={"plain": False, "clipped": True},
    weighted={"own": False, "weights": True},
)
def test_gradcheck(target, reduction, per_token, clipped, weighted):
    batch = random_batch(3, 2, 14, mean_step=2.0, dtype=torch.float64, device=target.device)
    values = batch.values
    if not per_token:
        values = values.view(-1)[batch.layout.state_index]

    def loss(values):
        return step_value_loss(
            values,
            batch.returns,
            batch.layout,
            old_values=batch.old_values if clipped else None,
            reduction=reduction,
            step_weights=batch.step_weights if weighted else None,
            backend=target.backend,
        ).loss

    # Element by element where that is fast, else along random directions.
    fast_mode = target.backend != "cpu"
    assert torch.autograd.gradcheck(loss, values.requires_grad_(), fast_mode=fast_mode)


@pytest.mark.isa
@grid(reduction=REDUCTIONS)
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel, reduction):
    sums, largest = {}, {}
    for seed in range(2 if kernel.interpreted else 24):
        batch = random_batch(seed, 6, 64)
        # Take out the steps so near the border that fp32 may err on it: their value is the old.
        state = batch.layout.state_index
        moved = (batch.values - batch.old_values).abs().view(-1)[state]
        near = state[(moved - 0.5).abs() < 1e-5]
        batch.old_values.view(-1)[near] = batch.values.view(-1)[near]

        def compute(batch, backend):
            return run(
                batch.values,
                batch.returns,
                batch.layout,
                backend,
                old_values=batch.old_values,
                reduction=reduction,
            )

        exact = compute(batch.to(torch.float64), "reference")
        del exact["metrics"]
        found = {
            "reference": compute(batch, "reference"),
            "kernel": compute(batch.to(torch.float32, kernel.device), kernel.backend),
        }
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


@pytest.mark.isa
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["above", "below"])
def test_border_of_the_clip_keeps_its_gradient(target, sign):
    """At |v - v_old| = clip exactly, both branches are the same number."""
    layout = StepLayout.from_mask(torch.ones((1, 1), device=target.device), backend="reference")
    old = torch.tensor([0.25], device=target.device)
    at = old + sign * 0.5
    beyond = torch.nextafter(at, at + sign)
    returns = -sign * torch.ones(1, device=target.device)
    # Farther from the target than the clipped value, the value itself is the larger: no clip.
    found = run(beyond, returns, layout, target.backend, old_values=old, clip=0.5)
    assert found["metrics"][VALUE_METRICS.index("clip_fraction")] == 0.0
    assert found["grad_values"].item() == pytest.approx((beyond - returns).item())
    # Nearer to it, the clipped value is the larger.
    returns = 3 * sign * torch.ones(1, device=target.device)
    found = run(at, returns, layout, target.backend, old_values=old, clip=0.5)
    assert found["metrics"][VALUE_METRICS.index("clip_fraction")] == 0.0
    assert found["grad_values"].item() == (at - returns).item()
    found = run(at + sign, returns, layout, target.backend, old_values=old, clip=0.5)
    assert found["metrics"][VALUE_METRICS.index("clip_fraction")] == 1.0
    assert found["grad_values"].item() == 0.0
    assert found["loss"].item() == 0.5 * (at - returns).item() ** 2


def test_explained_variance(target):
    """1 for the returns themselves and for any shift of them; 0 where they do not vary."""
    layout = StepLayout.from_mask(torch.ones((3, 1), device=target.device), backend="reference")
    place = VALUE_METRICS.index("explained_variance")
    returns = torch.tensor([1.0, 2.0, 4.0], device=target.device)
    for values, expected in ((returns, 1.0), (returns + 3, 1.0), (returns * 0, 0.0)):
        found = run(values, returns, layout, target.backend)
        assert found["metrics"][place].item() == pytest.approx(expected, abs=1e-12)
    found = run(returns, torch.ones_like(returns), layout, target.backend)
    assert found["metrics"][place].item() == 0.0


def test_needs_no_gradient(target):
    batch = random_batch(3, device=target.device)
    result = step_value_loss(batch.values, batch.returns, batch.layout, backend=target.backend)
    assert not result.loss.requires_grad
    assert result.step_log_ratio is None
    assert result.metrics.names == VALUE_METRICS
    with_grad = run(batch.values, batch.returns, batch.layout, target.backend)
    assert torch.equal(result.loss, with_grad["loss"])


def test_returns_of_tokens_are_read_where_values_are(target):
    """At the first token of each step; every other place may hold anything."""
    batch = random_batch(5, 3, 20, device=target.device)
    states = batch.layout.state_index
    returns = torch.full_like(batch.values, math.nan)
    returns.view(-1)[states] = batch.returns
    found = run(batch.values, returns, batch.layout, target.backend, old_values=batch.old_values)
    for flat in (returns, returns.view(-1), returns[None]):
        same = run(batch.values, flat, batch.layout, target.backend, old_values=batch.old_values)
        assert torch.equal(same["loss"], found["loss"])
    expected = run(
        batch.values, batch.returns, batch.layout, target.backend, old_values=batch.old_values
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_weights_of_a_reduction_given_by_hand_change_nothing(target):
    batch = random_batch(6, 3, 20, dtype=torch.float64, device=target.device)
    for reduction in REDUCTIONS:
        weights, normalizer = batch.layout.reduction_weights(reduction)
        own = run(batch.values, batch.returns, batch.layout, target.backend, reduction=reduction)
        given = run(
            batch.values,
            batch.returns,
            batch.layout,
            target.backend,
            step_weights=weights,
            normalizer=normalizer,
        )
        torch.testing.assert_close(given["loss"], own["loss"], rtol=1e-13, atol=0)
        torch.testing.assert_close(given["grad_values"], own["grad_values"], rtol=1e-13, atol=0)


def test_a_step_of_weight_0_is_not_trained(target):
    batch = random_batch(7, 2, 20, device=target.device)
    weights = torch.ones(batch.layout.num_steps, device=target.device)
    weights[1] = 0
    found = run(batch.values, batch.returns, batch.layout, target.backend, step_weights=weights)
    at = batch.layout.state_index
    assert found["grad_values"].view(-1)[at[1]] == 0.0
    assert bool((found["grad_values"].view(-1)[at[2:]] != 0.0).all())
