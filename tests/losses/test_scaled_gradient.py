"""scale_gradient: one launch that gives what torch's products do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    linear_steppo_loss,
    linear_token_log_probs,
    step_value_loss,
    steppo_loss,
    token_log_probs,
)
from steppo_kernels.backends import choice, operators

_TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]

_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def device():
    """Where backend cuda runs; the others leave this to torch."""
    found = torch.device("cpu" if choice.cuda_on_host() else "cuda")
    if why := choice.unavailable("cuda", found):
        pytest.skip(f"cuda: {why}")
    return found


def run(grad, upstream, scale, dtype):
    out = torch.full_like(grad, math.nan, dtype=dtype)
    operators.call("scale_gradient", "cuda", out, grad, upstream, scale)
    return out


def expected(grad, upstream, scale, dtype):
    """Products in the dtype of the computation, rounded once."""
    factor = upstream.double() * (1.0 if scale is None else scale)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.where(grad == 0, 0.0, grad.to(wide) * factor.to(wide)).to(dtype)


@pytest.mark.parametrize("types", _TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 2049, 5000])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_agrees_with_torch(device, types, size, start, scale):
    """Also where addresses are no multiples of 16 bytes."""
    dtype, out_dtype = types
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size + start, generator=generator, dtype=torch.float64)
    values[::3] = 0
    grad = values.to(dtype).to(device)[start:]
    upstream = torch.tensor(-1.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = upstream.to(device)
    scale = None if scale is None else torch.tensor(scale).double().to(device)
    found = run(grad, upstream, scale, out_dtype)
    assert torch.equal(found, expected(grad, upstream, scale, out_dtype))


@pytest.mark.parametrize("upstream", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_0_stays_0(device, upstream, in_place):
    grad = torch.tensor([0.0, 2.0, -0.0, math.nan, -3.0] * 20, device=device)
    factor = torch.tensor(upstream, device=device)
    wanted = expected(grad, factor, None, torch.float32)
    if in_place:
        operators.call("scale_gradient", "cuda", grad, grad, factor, None)
    found = grad if in_place else run(grad, factor, None, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not found[::5].any()


@pytest.mark.parametrize(
    "types", sorted({*itertools.product(_DTYPES, _DTYPES)} - {*_TYPES}, key=str), ids=str
)
def test_what_is_not_written_is_refused(device, types):
    """More would be written than there is room for, or other numbers."""
    dtype, out_dtype = types
    grad, upstream = torch.ones(9, dtype=dtype, device=device), torch.ones((), device=device)
    with pytest.raises(ValueError, match="a gradient has a dtype"):
        run(grad, upstream, None, out_dtype)


@pytest.mark.parametrize("entropy_dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_log_probs_and_entropies_have_dtypes_of_their_own(target, dtype, entropy_dtype):
    """Each gradient comes back in the dtype of its tensor, whatever the loss was computed in."""
    layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1, 1]]))
    config = StepPOConfig(clip_low=0.2, clip_high=0.2, entropy_coef=0.1)

    def gradients(backend, device, *dtypes):
        leaves = [
            torch.full((1, 5), start, dtype=one).to(device).requires_grad_()
            for start, one in zip((-1.0, 0.5), dtypes, strict=True)
        ]
        loss = steppo_loss(
            leaves[0],
            None,
            torch.tensor([1.0, -2.0], device=device),
            layout.to(device),
            config=config,
            entropy=leaves[1],
            backend=backend,
        ).loss
        return torch.autograd.grad(loss, leaves)

    found = gradients(target.backend, target.device, dtype, entropy_dtype)
    wanted = gradients("reference", "cpu", torch.float64, torch.float64)
    for one, exact, own in zip(found, wanted, (dtype, entropy_dtype), strict=True):
        assert one.dtype == own
        torch.testing.assert_close(one.double().cpu(), exact, rtol=8e-3, atol=1e-6)


def test_an_upstream_gradient_with_the_negative_bit(target):
    """As autograd hands it over behind a complex conjugate: its memory holds the other sign."""
    log_probs = torch.zeros(1, 4, device=target.device, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1]], device=target.device)
    layout = StepLayout.from_mask(mask)
    loss = steppo_loss(
        log_probs,
        None,
        torch.tensor([1.0, -2.0], device=target.device),
        layout,
        backend=target.backend,
    ).loss
    values = torch.zeros(1, 4, device=target.device, requires_grad=True)
    value_loss = step_value_loss(
        values, torch.tensor([1.0, 3.0], device=target.device), layout, backend=target.backend
    ).loss
    logits = torch.zeros(1, 4, 5, device=target.device, requires_grad=True)
    ids = torch.tensor([[1, 2, 3, 4]], device=target.device)
    chosen = token_log_probs(logits, ids, mask=mask, backend=target.backend)
    numbers = torch.ones(2, device=target.device, requires_grad=True)
    spread = broadcast_to_tokens(numbers, layout, backend=target.backend)
    states = torch.ones(1, 4, 3, device=target.device, requires_grad=True)
    weight = torch.arange(15.0, device=target.device).view(5, 3)
    head = linear_token_log_probs(states, weight, ids, mask=mask, backend=target.backend)
    head_loss = linear_steppo_loss(
        states,
        weight,
        ids,
        None,
        torch.tensor([1.0, -2.0], device=target.device),
        layout,
        backend=target.backend,
    ).loss
    pairs = [
        (loss, log_probs),
        (value_loss, values),
        (chosen, logits),
        (spread, numbers),
        (head, states),
        (head_loss, states),
    ]
    for found, leaf in pairs:
        upstream = torch.full(found.shape, 2.0, device=target.device)
        (wanted,) = torch.autograd.grad(found, leaf, -upstream, retain_graph=True)
        (given,) = torch.autograd.grad(found, leaf, torch._neg_view(upstream))
        assert torch.equal(given, wanted)
        assert wanted.any()


@pytest.mark.parametrize("hook", [torch.Tensor.double, torch.Tensor.half, torch.Tensor.flatten])
def test_hooks_that_return_another_kind_of_tensor(kernel, hook):
    mask = torch.tensor([[1, 1, 0, 1]], device=kernel.device)
    values = torch.zeros(1, 4, device=kernel.device, requires_grad=True)
    two = torch.tensor([1.0, -2.0], device=kernel.device)
    layout = StepLayout.from_mask(mask)
    calls = [
        lambda: steppo_loss(values, None, two, layout, backend=kernel.backend).loss,
        lambda: step_value_loss(values, two, layout, backend=kernel.backend).loss,
    ]
    for call in calls:
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, hook):
            loss = call()
        with pytest.raises(RuntimeError, match="saved-tensor hooks return"):
            loss.backward()
