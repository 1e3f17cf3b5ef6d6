"""Tensors and modes that a kernel cannot read raise; torch's default device is not looked at."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from batches import random_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from steppo_kernels import (
    StepLayout,
    broadcast_to_tokens,
    linear_steppo_loss,
    linear_token_log_probs,
    step_gae,
    step_value_loss,
    steppo_loss,
    token_log_probs,
)
from steppo_kernels.backends import choice


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


# torch 2.15 imports formulas for it that it deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
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


def test_a_mode_of_the_first_call_leaves_nothing_behind():
    """What is allocated once and kept, by the module and by a layout, is real."""
    if why := choice.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from steppo_kernels import StepLayout, step_gae, step_value_loss, steppo_loss
mask = torch.tensor([[1, 1, 0, 1]])
x, per_step = torch.zeros(1, 4), torch.ones(2)
layout = StepLayout.from_mask(mask, backend="reference")
calls = [
    lambda: steppo_loss(x, x, per_step, layout, backend="cpu").loss,
    lambda: steppo_loss(x, x, x, mask, backend="cpu").loss,
    lambda: step_value_loss(per_step, per_step, layout, backend="cpu").loss,
    lambda: step_gae(per_step, per_step, layout, backend="cpu").returns,
]
refused = 0
for call in calls:
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            call()
        except (RuntimeError, TypeError, ValueError):
            refused += 1
print(refused, *(type(call()).__name__ for call in calls))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["4", *["Tensor"] * 4]
