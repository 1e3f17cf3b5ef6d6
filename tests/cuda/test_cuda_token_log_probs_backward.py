"""The CUDA kernel of the gradient of token_log_probs, on the host."""

from __future__ import annotations

import pytest
import torch
from test_cuda_token_log_probs import (
    DTYPES,
    FEW_ROWS,
    MANY_ROWS,
    PLACES,
    TURNS,
    VOCABULARIES,
    computed_in,
    draw,
    draw_turns,
    exact,
    forward,
)

from steppo_kernels.backends.compiled import token_log_probs as launcher

HALVES = [torch.bfloat16, torch.float16]
# Rounding of a number of the gradient, and what sums and powers of fp32 add to it.
ERRORS = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def upstream(rows, dtype):
    """Return gradients of log-probs and entropies; those of row 1 are 0."""
    grads = torch.randn((2, rows), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads[:, 1:2] = 0
    return grads.to(computed_in(dtype))


def backward(cuda, grad_logits, logits, targets, sums, grads, rows=None):
    """Run the operator; without `grads[1]`, entropies have no gradient."""
    entropy, top, log_sum = sums
    launcher.token_log_probs_backward(
        cuda,
        grad_logits,
        logits,
        *targets,
        top,
        log_sum,
        None if grads[1] is None else entropy,
        *grads,
        rows,
    )
    return grad_logits


def exact_gradient(logits, targets, grads):
    """Return what the reference gives in fp64, ``[1, N, V]``."""
    wide = logits.double().clone().requires_grad_()
    found = exact(wide, *targets)
    given = [torch.zeros_like(found[0]) if grad is None else grad.double() for grad in grads]
    return torch.autograd.grad(found, wide, given)[0]


def empty_like(logits, offset, dtype=None):
    """Return NaN of the shape of contiguous logits, `offset` numbers after an aligned address."""
    memory = torch.full((offset + logits.numel(),), torch.nan, dtype=dtype or logits.dtype)
    return memory[offset:].view(logits.shape)


def close(found, expected):
    error = ERRORS[found.dtype]
    torch.testing.assert_close(
        found.double(), expected, rtol=error, atol=error / 100 + 1e-7 * (error > 1e-9)
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradient(cuda, vocabulary, dtype, softcap):
    """In place or apart, wherever rows of the two begin; no entry beside them is touched."""
    offset = vocabulary % 4
    logits, ids = draw(5, vocabulary, dtype, offset, seed=vocabulary)
    ids[0], ids[4] = 0, vocabulary - 1
    ids[2] = logits[0, 2].argmax()
    mask = torch.tensor([True, True, True, False, True])
    temperatures = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    targets = ids, mask, temperatures, 1.0, softcap
    _, *sums = forward(cuda, logits, *targets)
    # Neither row 1, without gradients, nor row 3, masked, is read.
    logits[0, 1] = logits[0, 3] = torch.nan
    both = upstream(5, dtype)
    for grads in ((both[0], None), (both[0], both[1])):
        clean = logits.nan_to_num()
        expected = exact_gradient(clean, targets, grads)
        found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
        close(found, expected)
        assert not found[0, [1, 3]].any()
        for place in (1, 2, 3):
            apart = backward(cuda, empty_like(logits, place), logits, targets, sums, grads)
            assert torch.equal(apart, found)
        memory = torch.full((logits.numel() + 64,), 77.0, dtype=dtype)
        inside = memory[32 + offset :][: logits.numel()].view(logits.shape)
        inside.copy_(logits)
        assert torch.equal(backward(cuda, inside, inside, targets, sums, grads), found)
        assert memory[: 32 + offset].eq(77).all()
        assert memory[32 + offset + logits.numel() :].eq(77).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 257, 2048, 4099, 9002])
def test_half_gradients_in_the_first_half_of_rows_of_fp32(cuda, vocabulary, half, softcap):
    for offset in (0, 1, 3):
        logits, ids = draw(4, vocabulary, torch.float32, offset, seed=vocabulary)
        temperatures = torch.tensor([0.7, 1.0, 1e-16, 1.3], dtype=torch.float64)
        targets = ids, None, temperatures, 1.0, softcap
        _, *sums = forward(cuda, logits, *targets)
        grads = tuple(upstream(4, torch.float32))
        full = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
        apart = backward(cuda, empty_like(logits, offset, half), logits, targets, sums, grads)
        assert torch.equal(apart, full.to(half))
        halved = logits.view(half)[..., :vocabulary]
        assert halved.data_ptr() == logits.data_ptr()
        assert torch.equal(backward(cuda, halved, logits, targets, sums, grads), apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_any_turn(cuda, dtype):
    """The token's own gradient is where it belongs, and nowhere else."""
    logits, ids, mask = draw_turns(len(PLACES), dtype, offset=3)
    ids[mask] = torch.tensor(PLACES)
    targets = ids, mask, None, 0.8, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = tuple(upstream(MANY_ROWS, dtype))
    expected = exact_gradient(logits, targets, grads)
    found = backward(cuda, empty_like(logits, 1), logits, targets, sums, grads)
    close(found, expected)
    if dtype == torch.float32:
        halved = logits.view(torch.bfloat16)[..., :TURNS]
        backward(cuda, halved, logits, targets, sums, grads)
        assert torch.equal(halved, found.bfloat16())
    else:
        backward(cuda, logits, logits, targets, sums, grads)
        assert torch.equal(logits, found)


@pytest.mark.parametrize("is_halved", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_rows_move_to_the_front(cuda, is_shared, is_halved):
    logits, ids = draw(8, 4101, torch.float32)
    targets = ids, None, None, 0.8, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = tuple(upstream(8, torch.float32))
    every = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)[0]
    rows = torch.tensor([7, 1, 5])
    out = logits if is_shared else empty_like(logits, 0)
    if is_halved:
        every, out = every.bfloat16(), out.view(torch.bfloat16)[..., :4101]
    rest = out[0, 3:].clone()
    found = backward(cuda, out, logits, targets, sums, grads, rows)[0]
    assert torch.equal(found[:3], every[rows])
    if not is_shared:
        assert torch.equal(found[3:].isnan(), rest.isnan())
    elif not is_halved:
        assert torch.equal(found[3:], rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_do_not_depend_on_the_order_of_threads(cuda, dtype):
    logits, ids = draw(2, 151_937, dtype, seed=3)
    targets = ids, None, None, 0.7, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = tuple(upstream(2, dtype).flip(1))
    found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    close(found, exact_gradient(logits, targets, grads))
    cuda.kernels.order(7, 2)
    assert torch.equal(backward(cuda, logits, logits, targets, sums, grads), found)


@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_few_rows_are_split(cuda, shape):
    """In place, one block alone reads the token's logit: another may have been written already."""
    rows, vocabulary = shape
    logits, ids = draw(rows, vocabulary, torch.bfloat16, 1, seed=rows)
    ids[0] = vocabulary - 1
    targets = ids, torch.arange(rows) % 7 != 3, None, 0.8, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = tuple(upstream(rows, torch.bfloat16))
    expected = exact_gradient(logits, targets, grads)
    found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    close(found, expected)
    assert torch.equal(backward(cuda, logits, logits, targets, sums, grads), found)


def test_strided_rows(cuda):
    whole, _ = draw(6 * 5, 37, torch.bfloat16)
    logits = whole.view(6, 5, 37)[::2, 1:, :33]
    targets = torch.arange(12), None, None, 1.0, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = tuple(upstream(12, torch.bfloat16))
    out = torch.full((3, 7, 40), torch.nan, dtype=torch.bfloat16)
    found = backward(cuda, out[:, 2:6, 3:36], logits, targets, sums, grads)
    close(found.reshape(1, 12, 33), exact_gradient(logits.reshape(1, 12, 33), targets, grads))
    assert out.isnan().sum() == out.numel() - logits.numel()


@pytest.mark.parametrize("temperature", [1e-30, 1e-16, 1e-10, 1e10, 1e16, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_temperature(cuda, dtype, temperature):
    logits, ids = draw(4, 500, dtype)
    ids[0] = logits[0, 0].argmax()
    logits[0, :, 3] = -torch.inf
    targets = ids, None, None, temperature, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = tuple(upstream(4, dtype))
    found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    # The gradient is of the size of 1 / temperature.
    expected = exact_gradient(logits, targets, grads)
    close((found.double() * temperature).to(dtype), expected * temperature)


def test_a_factor_beyond_fp32_is_0_where_the_probability_is(cuda):
    logits = torch.tensor([[[0.0, 0.0, -500.0, -torch.inf]]])
    targets = torch.tensor([0]), None, None, 1e-3, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = torch.tensor([1e37]), None
    found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    assert found[0, 0].tolist() == [torch.inf, -torch.inf, 0, 0]


def test_a_row_with_a_nan_is_nan(cuda):
    logits, ids = draw(3, 300, torch.float32)
    logits[0, 1, 77] = torch.nan
    targets = ids, None, None, 1.0, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = torch.ones(3), torch.ones(3)
    found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    assert found[0, 1].isnan().all()
    assert found[0, [0, 2]].isfinite().all()


def test_a_row_whose_id_is_out_of_range_is_nan_if_it_has_a_gradient(cuda):
    logits, ids = draw(5, 40, torch.float32)
    targets = ids, None, None, 1.0, 0.0
    _, *sums = forward(cuda, logits, *targets)
    grads = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), None
    expected = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    ids[2], ids[3] = 40, -1
    found = backward(cuda, empty_like(logits, 0), logits, targets, sums, grads)
    assert found[0, 2].isnan().all()
    assert not found[0, 3].any()
    assert torch.equal(found[0, [0, 1, 4]], expected[0, [0, 1, 4]])


@pytest.mark.parametrize("has_rows", [False, True])
def test_no_rows(cuda, has_rows):
    logits = torch.full((1, 4 if has_rows else 0, 5), 7.0)
    ids = torch.zeros(logits.shape[1], dtype=torch.int64)
    targets = ids, None, None, 1.0, 0.0
    _, *sums = forward(cuda, logits, *targets)
    rows = torch.empty(0, dtype=torch.int64) if has_rows else None
    grads = torch.ones(len(ids)), None
    found = backward(cuda, logits, logits, targets, sums, grads, rows)
    assert found.eq(7).all()
