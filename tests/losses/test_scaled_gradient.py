"""scale_gradient: one launch that gives what torch's products do."""

from __future__ import annotations

import math

import pytest
import torch

from steppo_kernels.backends import choice, operators

_TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


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
