"""Corners of the public functions that once went wrong in one backend or another."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from batches import random_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    linear_steppo_loss,
    linear_token_log_probs,
    step_gae,
    step_value_loss,
    steppo_loss,
    token_log_probs,
)
from steppo_kernels.backends import choice
from steppo_kernels.outputs import POLICY_METRICS

_WIDE = StepPOConfig(clip_low=0.9, clip_high=9.0)


def tensor(values, device, **options):
    return torch.tensor(values, device=device, dtype=torch.float64, **options)


def two_steps(target):
    mask = torch.tensor([[1, 1, 0, 1]], device=target.device, dtype=torch.bool)
    return mask, StepLayout.from_mask(mask, backend=target.backend)


@pytest.mark.parametrize("view", ["last", "columns", "expanded"])
def test_masks_of_any_strides(target, view):
    wide = torch.rand(4, 8, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = {
        "last": wide[..., 0],
        "columns": wide[:, ::2, 1],
        "expanded": wide[:1, :1, 0].expand(4, 8),
    }
    mask = mask[view].to(target.device)
    x = -torch.rand(mask.shape, device=target.device)
    found, wanted = (
        steppo_loss(x, x - 0.1, torch.ones_like(x), m, config=_WIDE, backend=target.backend)
        for m in (mask, mask.clone(memory_format=torch.contiguous_format))
    )
    assert torch.equal(found.metrics.values, wanted.metrics.values)
    assert found.metrics["num_tokens"] == mask.sum()


def test_a_nan_on_an_action_token_reaches_its_step_and_the_loss(target):
    mask, layout = two_steps(target)
    for steps, advantages in ((layout, [1.0, 1.0]), (mask, [[1.0] * 4])):
        x = tensor([[-1.0, torch.nan, 0.0, -1.0]], target.device, requires_grad=True)
        out = steppo_loss(
            x,
            tensor([[-1.0] * 4], target.device),
            tensor(advantages, target.device),
            steps,
            config=_WIDE,
            backend=target.backend,
        )
        out.loss.backward()
        assert out.loss.isnan()
        assert x.grad.isnan().tolist() == [[True, True, False, False]]
        assert out.metrics["dead_token_fraction"] == 0


@pytest.mark.parametrize("ratio", ["geometric", "centered"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
def test_what_is_not_finite_shows_on_policy(target, value, ratio):
    """In its step and in the loss; other steps have the ratio 1 that they have without it."""
    mask, layout = two_steps(target)
    config = StepPOConfig(ratio=ratio)
    for steps, advantages in ((layout, [1.0, 1.0]), (mask, [[1.0] * 4])):
        x = tensor([[-1.0, value, 0.0, -1.0]], target.device, requires_grad=True)
        out = steppo_loss(
            x,
            None,
            tensor(advantages, target.device),
            steps,
            config=config,
            backend=target.backend,
        )
        out.loss.backward()
        assert out.loss.isnan()
        assert out.metrics["ratio_mean"].isnan()
        assert x.grad.isnan().tolist() == [[True, True, False, False]]
        assert x.grad[0, 3] == -0.5


@pytest.mark.parametrize("ratio", ["geometric", "centered"])
def test_what_is_not_finite_shows_on_policy_from_hidden_states(target, ratio):
    _, layout = two_steps(target)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn((1, 4, 3), generator=generator, dtype=torch.float64).to(target.device)
    weight = torch.randn((7, 3), generator=generator, dtype=torch.float64).to(target.device)
    ids = torch.tensor([[1, 2, 3, 4]], device=target.device)
    broken = clean.clone()
    broken[0, 1, 0] = torch.nan
    found = []
    for hidden in (clean, broken):
        leaf = hidden.requires_grad_()
        out = linear_steppo_loss(
            leaf,
            weight,
            ids,
            None,
            tensor([1.0, -2.0], target.device),
            layout,
            config=StepPOConfig(ratio=ratio),
            backend=target.backend,
        )
        out.loss.backward()
        found.append((out.loss, leaf.grad))
    assert found[0][0].isfinite()
    assert found[1][0].isnan()
    assert found[1][1][0, :2].isnan().all()
    torch.testing.assert_close(found[1][1][0, 2:], found[0][1][0, 2:], rtol=1e-12, atol=0)


def test_an_impossible_token(target):
    """log pi = -inf: the ratio is 0, the loss is finite."""
    _, layout = two_steps(target)
    x = tensor([[0.0, -torch.inf, 0.0, -1.0]], target.device, requires_grad=True)
    out = steppo_loss(
        x,
        tensor([[-1.0] * 4], target.device),
        tensor([1.0, 1.0], target.device),
        layout,
        config=_WIDE,
        backend=target.backend,
    )
    out.loss.backward()
    assert out.loss.item() == -0.5
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


def test_kl_at_its_clamp_keeps_the_gradient(target):
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device, requires_grad=True)
    config = StepPOConfig(kl_coef=1.0, kl_estimator="k1")
    out = steppo_loss(
        x,
        x.detach(),
        tensor([0.0, 0.0], target.device),
        layout,
        config=config,
        ref_log_probs=x.detach() - 10.0,
        backend=target.backend,
    )
    out.loss.backward()
    assert x.grad.tolist() == [[0.25, 0.25, 0.0, 0.5]]
    assert out.metrics["dead_token_fraction"] == 0


def test_a_token_is_dead_if_its_whole_coefficient_is_zero(target):
    """Policy -A and KL +1 cancel."""
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device, requires_grad=True)
    config = StepPOConfig(kl_coef=1.0, kl_estimator="k1")
    out = steppo_loss(
        x,
        None,
        tensor([1.0, 1.0], target.device),
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
    x = tensor([[-0.5] * 4], target.device)
    out = steppo_loss(
        x,
        None,
        tensor([1.0, 1.0], target.device),
        layout,
        ratio_center=0.5,
        config=StepPOConfig(ratio="centered"),
        backend=target.backend,
    )
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1


def test_an_infinite_weight_does_not_wake_a_dead_step(target):
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device, requires_grad=True)
    out = steppo_loss(
        x,
        x.detach(),
        tensor([0.0, 1.0], target.device),
        layout,
        is_weights=tensor([torch.inf, 1.0], target.device),
        backend=target.backend,
    )
    out.loss.backward()
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


def test_equal_advantages_whiten_to_zero(target):
    mask = torch.ones(7, 1, device=target.device, dtype=torch.bool)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    rewards = torch.full((7,), 0.1, device=target.device)
    found = step_gae(rewards, torch.zeros_like(rewards), layout, backend=target.backend)
    assert found.advantages.abs().max() < 1e-6


def test_an_empty_response_keeps_its_reward(target):
    mask = torch.tensor([[1, 1], [0, 0], [1, 1]], device=target.device, dtype=torch.bool)
    layout = StepLayout.from_rows(mask, [0, 0, 0], [0, 1, 2], backend=target.backend)
    rewards = tensor([[0.0, 0.0], [5.0, torch.nan], [0.0, 0.0]], target.device)
    found = step_gae(
        rewards,
        torch.zeros(3, device=target.device, dtype=torch.float64),
        layout,
        gamma=1.0,
        whiten=False,
        backend=target.backend,
    )
    assert found.returns.tolist() == [5.0, 5.0, 0.0]


def test_a_nan_old_value_reaches_the_loss(target):
    _, layout = two_steps(target)
    values = tensor([1.0, 2.0], target.device, requires_grad=True)
    out = step_value_loss(
        values,
        torch.zeros_like(values.detach()),
        layout,
        backend=target.backend,
        old_values=tensor([torch.nan, 0.0], target.device),
    )
    assert out.loss.isnan()


def test_the_broadcast_is_linear_twice_over(target):
    _, layout = two_steps(target)
    per_step = tensor([1.0, 2.0], target.device, requires_grad=True)

    def spread(x):
        return broadcast_to_tokens(x, layout, backend=target.backend)

    assert torch.autograd.gradgradcheck(spread, (per_step,))


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


def test_default_device_of_torch_is_not_that_of_the_inputs(target):
    batch = random_batch(4, 3, 12, device=target.device)
    backend, layout, mask = target.backend, batch.layout, batch.mask
    logits = torch.randn((*batch.log_probs.shape, 7), device=target.device)
    ids = torch.zeros(mask.shape, dtype=torch.int64, device=target.device)
    head = torch.randn((7, 7), device=target.device)
    rows = list(range(len(mask)))
    tokens = batch.log_probs, batch.old_log_probs

    def everything():
        found = [
            StepLayout.from_mask(mask, backend=backend).step_offsets,
            StepLayout.from_rows(mask, rows, rows, backend=backend).step_offsets,
            StepLayout.from_markers(ids + mask, [1], 0, backend=backend).step_offsets,
            layout.per_token().step_offsets,
            layout.per_trajectory().step_offsets,
            step_gae(batch.rewards, batch.values, layout, backend=backend).advantages,
            broadcast_to_tokens(batch.advantages, layout, backend=backend),
            token_log_probs(logits, ids, backend=backend),
            linear_token_log_probs(logits, head, ids, backend=backend),
        ]
        losses = [
            steppo_loss(*tokens, batch.advantages, layout, normalizer=4, backend=backend),
            steppo_loss(*tokens, batch.values, mask, backend=backend),
            step_value_loss(batch.values, batch.returns, layout, backend=backend),
            linear_steppo_loss(logits, head, ids, None, batch.advantages, layout, backend=backend),
        ]
        return [*found, *(one.loss for one in losses)]

    expected = everything()
    with torch.device("meta"):
        found = everything()
    again = everything()
    for values in (found, again):
        assert all(map(torch.equal, values, expected))


class _Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, _Wrapper) else value

        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        return tree_map(
            lambda value: _Wrapper(value) if isinstance(value, torch.Tensor) else value,
            func(*args, **kwargs),
        )


@pytest.mark.parametrize("how", ["fake", "wrapper"])
def test_tensors_without_memory_raise(how):
    if why := choice.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    mode = FakeTensorMode() if how == "fake" else nullcontext()
    ids = torch.zeros(3, dtype=torch.int64)
    with mode:
        logits = torch.zeros(3, 5)
        ids = torch.zeros(3, dtype=torch.int64)
        if how == "wrapper":
            logits = _Wrapper(logits)
        with pytest.raises(TypeError, match=r"^logits: got a \w+, expected a dense torch.Tensor"):
            token_log_probs(logits, ids, backend="cpu")


def test_distributed_tensors_raise(target):
    class DTensor(torch.Tensor):
        def full_tensor(self):
            return self.as_subclass(torch.Tensor)

    logits = torch.zeros((3, 5), device=target.device)
    ids = torch.zeros(3, dtype=torch.int64, device=target.device)
    for call in (
        lambda: token_log_probs(logits.as_subclass(DTensor), ids, backend=target.backend),
        lambda: linear_token_log_probs(
            logits, logits.as_subclass(DTensor), ids, backend=target.backend
        ),
    ):
        with pytest.raises(TypeError, match=r"^(logits|weight): got a DTensor, expected a whole"):
            call()


def test_forward_mode_raises(kernel):
    """The tangent would be lost."""
    batch = random_batch(5, 3, 12, device=kernel.device)
    layout, backend = batch.layout, kernel.backend
    ids = torch.zeros(3, dtype=torch.int64, device=kernel.device)

    def policy(x):
        return steppo_loss(x, batch.old_log_probs, batch.advantages, layout, backend=backend)

    def value(x):
        return step_value_loss(x, batch.returns, layout, backend=backend)

    def log_probs(x):
        return token_log_probs(x, ids, backend=backend)

    for call, x in (
        (policy, batch.log_probs),
        (value, batch.values),
        (log_probs, torch.randn((3, 5), device=kernel.device)),
    ):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="forward-mode differentiation: got a dual"):
                call(dual)
        call(x)
