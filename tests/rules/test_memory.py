"""What the fused loss allocates: no intermediate of the size of the batch but its gradient."""

from __future__ import annotations

import pytest
import torch
from batches import random_batch

from steppo_kernels import StepPOConfig, steppo_loss

# Loss, metrics and scalars, whatever the batch.
_CONSTANT_BYTES = 8192
# Step log-ratios and the partial sums of a step.
_BYTES_A_STEP = 64


def peak_of_allocations(function) -> int:
    """Bytes of CPU tensors that were live at once during `function`, beyond those before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    assert changes, "the profiler saw no allocation"
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def test_the_measure_sees_what_is_allocated():
    def function():
        first = torch.empty(1000)
        second = first + 1
        del first
        return second.exp_()

    assert 8000 <= peak_of_allocations(function) < 8000 + 2 * 64


@pytest.mark.unpoisoned
@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "weights"])
def test_two_numbers_a_token(kernel, masked, with_extras):
    """The gradient that forward leaves, and the one that backward returns."""
    if kernel.device != "cpu" or kernel.interpreted:
        pytest.skip("measured where the allocations of the kernel are those on the CPU")
    batch = random_batch(1, 50, 2000, mean_step=50.0)
    batch.log_probs.requires_grad_()
    advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    options = {"is_weights": batch.token_weights} if with_extras else {}

    def function():
        steppo_loss(
            batch.log_probs,
            batch.old_log_probs,
            advantages,
            batch.mask if masked else batch.layout,
            config=StepPOConfig(),
            backend=kernel.backend,
            **options,
        ).loss.backward()
        return batch.log_probs.grad

    function()
    batch.log_probs.grad = None
    tokens, steps = batch.mask.numel(), batch.layout.num_steps
    peak = peak_of_allocations(function)
    assert peak <= 2 * 4 * tokens + _BYTES_A_STEP * steps + _CONSTANT_BYTES
    # The gradient itself is there, so that the measure cannot have missed the call.
    assert peak >= 4 * tokens
