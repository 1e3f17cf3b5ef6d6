"""broadcast_to_tokens and its transpose."""

from __future__ import annotations

import oracles
import pytest
import torch
from batches import Error, fp64, ragged_mask, random_batch, two_steps
from hypothesis import strategies as st
from properties import examples

from steppo_kernels import StepLayout, broadcast_to_tokens

_EPS = torch.finfo(torch.float32).eps


@pytest.mark.isa
@examples(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 30)),
    mean_step=st.sampled_from([1.0, 4.0, 30.0]),
    form=st.sampled_from(["steps", "per_token", "per_trajectory", "rows"]),
)
def test_loops(target, seed, shape, mean_step, form):
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask(*shape, mean_step=mean_step, generator=generator)
    layout = StepLayout.from_mask(mask, backend="reference")
    if form == "rows":
        rows = list(range(shape[0]))
        layout = StepLayout.from_rows(mask, rows, rows, backend="reference")
    elif form != "steps":
        layout = getattr(layout, form)()
    per_step = torch.randn(layout.num_steps, dtype=torch.float64, generator=generator)
    upstream = torch.randn(shape, dtype=torch.float64, generator=generator)
    leaf = per_step.to(target.device).requires_grad_()
    spread = broadcast_to_tokens(leaf, layout.to(target.device), backend=target.backend)
    spread.backward(upstream.to(target.device))
    expected, sums = torch.zeros(mask.numel(), dtype=torch.float64), []
    for step, tokens in enumerate(oracles.of_layout(layout).tokens):
        expected[tokens] = per_step[step]
        sums.append(float(upstream.view(-1)[tokens].sum()))
    assert torch.equal(spread.detach().cpu(), expected.reshape(shape))
    torch.testing.assert_close(
        leaf.grad.cpu(), torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


def test_gradcheck(target):
    batch = random_batch(3, 3, 20, dtype=torch.float64, device=target.device)
    for layout in (batch.layout, batch.layout.per_token(), batch.layout.per_trajectory()):
        per_step = torch.linspace(-1, 1, layout.num_steps, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, layout=layout: broadcast_to_tokens(x, layout, backend=target.backend),
            per_step.to(target.device).requires_grad_(),
            fast_mode=target.interpreted,
        )


def test_backward_takes_any_upstream_gradient(target):
    """Expanded, as from sum(), and transposed; and a second backward."""
    batch = random_batch(4, 5, 30, device=target.device)
    leaf = batch.advantages.requires_grad_()
    spread = broadcast_to_tokens(leaf, batch.layout, backend=target.backend)
    (first,) = torch.autograd.grad(spread.sum(), leaf, retain_graph=True)
    assert torch.equal(first, batch.layout.step_lengths.to(first.dtype))
    weights = torch.rand(30, 5, device=target.device).T
    (second,) = torch.autograd.grad(spread, leaf, weights, retain_graph=True)
    (third,) = torch.autograd.grad(spread, leaf, weights.contiguous())
    assert torch.equal(second, third)


@pytest.mark.isa
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel):
    """Long sums; the broadcast itself is exact."""
    rms = {"kernel": 0.0, "reference": 0.0}
    for seed in range(3 if kernel.interpreted else 12):
        batch = random_batch(seed, 4, 900, mean_step=300.0)
        upstream = torch.randn((4, 900), generator=torch.Generator().manual_seed(seed)) + 0.5

        def sums(dtype, backend, device, upstream=upstream, batch=batch):
            moved = batch.to(dtype, device)
            leaf = moved.advantages.requires_grad_()
            spread = broadcast_to_tokens(leaf, moved.layout, backend=backend)
            return torch.autograd.grad(spread, leaf, upstream.to(device, dtype))[0]

        exact = sums(torch.float64, "reference", "cpu")
        plain = Error.between(sums(torch.float32, "reference", "cpu"), exact)
        error = Error.between(sums(torch.float32, kernel.backend, kernel.device), exact)
        rms["kernel"] += error.rms**2
        rms["reference"] += plain.rms**2
    assert rms["kernel"] ** 0.5 <= 2 * rms["reference"] ** 0.5 + _EPS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(target, dtype):
    batch = random_batch(5, device=target.device)
    leaf = batch.advantages.to(dtype).requires_grad_()
    spread = broadcast_to_tokens(leaf, batch.layout, backend=target.backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert spread.dtype == wide
    assert torch.equal(spread[batch.mask], batch.on_tokens(leaf.detach().to(wide))[batch.mask])
    spread.sum().backward()
    assert leaf.grad.dtype == dtype


def test_the_broadcast_is_linear_twice_over(target):
    _, layout = two_steps(target)
    per_step = fp64([1.0, 2.0], target.device, requires_grad=True)

    def spread(x):
        return broadcast_to_tokens(x, layout, backend=target.backend)

    assert torch.autograd.gradgradcheck(spread, (per_step,))
