"""The CUDA kernels of token_log_probs, on the host."""

from __future__ import annotations

import math

import pytest
import torch

from steppo_kernels.backends.compiled import token_log_probs as launcher
from steppo_kernels.backends.reference import token_log_probs as reference

# Shorter than a pack, of packs only, with ends, of several rounds of a block.
VOCABULARIES = [1, 2, 7, 8, 15, 16, 257, 2048, 8192, 9001]
# Rows and logits of each. Where rows are too few for all blocks, they are split: into 2 parts, 10
# and 13. Those of the last are as many as are not split.
FEW_ROWS = [(200, 4200), (1, 40000), (3, 50257), (257, 4200)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Errors of sums of thousands of numbers, as parts of the result.
ERRORS = {torch.float32: 4e-6, torch.float64: 1e-13}


def computed_in(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(rows, vocabulary, dtype, offset=0, seed=0, spread=4.0):
    """Return logits that begin `offset` numbers after an aligned address, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(offset + rows * vocabulary, generator=generator, dtype=torch.float64)
    logits = (memory * spread).to(dtype)[offset:].view(1, rows, vocabulary)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    return logits, ids


def exact(logits, ids, mask=None, temperatures=None, temperature=1.0, softcap=0.0):
    """What the reference gives in fp64 for flat ids, differentiable."""
    rows = torch.arange(len(ids)) if mask is None else mask.nonzero().squeeze(1)
    return reference.token_log_probs(
        logits.reshape(len(ids), -1),
        ids,
        rows,
        temperature if temperatures is None else temperatures,
        softcap,
        torch.float64,
    )


def forward(cuda, logits, ids, mask=None, temperatures=None, temperature=1.0, softcap=0.0):
    return launcher.token_log_probs(
        cuda, logits, ids, mask, temperatures, temperature, softcap, True
    )


def close(found, expected, error):
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error, equal_nan=True)


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_forward(cuda, vocabulary, dtype, softcap):
    """Rows of any length begin anywhere."""
    for offset in (0, 1, 3):
        logits, ids = draw(5, vocabulary, dtype, offset, seed=vocabulary)
        ids[0], ids[1] = 0, vocabulary - 1
        ids[2] = logits[0, 2].argmax()
        mask = torch.tensor([True, True, True, False, True])
        temperatures = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
        given = ids, mask, temperatures, 1.0, softcap
        log_probs, entropy, top, log_sum = forward(cuda, logits, *given)
        assert log_probs.dtype == entropy.dtype == computed_in(dtype)
        expected = exact(logits, *given)
        error = ERRORS[log_probs.dtype]
        close(log_probs, expected[0], error)
        close(entropy, expected[1], error)
        assert log_probs[3] == entropy[3] == top[3] == log_sum[3] == 0
        again = forward(cuda, logits, *given)
        assert all(map(torch.equal, again, (log_probs, entropy, top, log_sum)))
        bare, none, *_ = launcher.token_log_probs(cuda, logits, *given, False)
        assert none.numel() == 0
        close(bare, expected[0], error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_do_not_depend_on_the_order_of_threads(cuda, dtype):
    logits, ids = draw(2, 151_937, dtype, seed=3)
    found = forward(cuda, logits, ids, temperature=0.7)
    cuda.kernels.order(7, 2)
    again = forward(cuda, logits, ids, temperature=0.7)
    assert all(map(torch.equal, found, again))
    for value, expected in zip(found, exact(logits, ids, temperature=0.7), strict=False):
        close(value, expected, ERRORS[value.dtype])


# More than two turns of a block of the halves, and more of wider numbers. Tokens begin and end
# turns, or lie within one.
TURNS = 20_003
PLACES = [0, 5, 512, 4095, 4096, 8184, 8191, 8192, 8199, 12_288, 16_383, 16_384, 18_000, TURNS - 1]
# So many rows are not split. All but the last ones are masked, and not read.
MANY_ROWS = 257


def draw_turns(count, dtype, offset=0):
    """Return logits of many rows of several turns, tokens, and the mask of the last `count`."""
    logits, ids = draw(MANY_ROWS, TURNS, dtype, offset)
    return logits, ids, torch.arange(MANY_ROWS) >= MANY_ROWS - count


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_any_turn(cuda, dtype, softcap):
    """Sums leave the token out, wherever it is, though it is the largest."""
    for offset in (0, 3):
        logits, ids, mask = draw_turns(len(PLACES), dtype, offset)
        ids[mask] = torch.tensor(PLACES)
        logits[0, mask.nonzero().squeeze(1), ids[mask]] = 25.0
        found = forward(cuda, logits, ids, mask, softcap=softcap)
        exact_sums = exact(logits, ids, mask, softcap=softcap)
        for value, expected in zip(found, exact_sums, strict=False):
            close(value, expected, ERRORS[value.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turns_that_are_not_finite(cuda, dtype):
    """Of each row a word is larger than all before it, no word, infinite or NaN."""
    logits, ids, mask = draw_turns(6, dtype)
    values, tokens = logits[0, -6:], ids[-6:]
    values[0] = torch.linspace(-50, 60, TURNS).to(dtype)
    values[1, :17_000] = -torch.inf
    values[2, 1000:] = -torch.inf
    values[3, 4100] = torch.nan
    values[4, 12_000] = torch.inf
    values[5, TURNS - 1] = torch.nan
    tokens[1], tokens[2] = 19_000, 7
    log_probs, entropy, *_ = forward(cuda, logits, ids, mask)
    expected = exact(logits, ids, mask)
    close(log_probs, expected[0], ERRORS[log_probs.dtype])
    close(entropy, expected[1], ERRORS[log_probs.dtype])
    assert log_probs[-6:].isnan().tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_few_rows_are_split(cuda, shape):
    """Their tokens lie anywhere, also where parts begin and end; some rows are masked."""
    rows, vocabulary = shape
    logits, ids = draw(rows, vocabulary, torch.float32, 1, seed=rows)
    parts = min(512 // rows, -(-vocabulary // 4096))
    size = -(-vocabulary // parts // 16) * 16 if parts > 1 else vocabulary
    ids[: min(3, rows)] = torch.tensor([size % vocabulary, size - 1, vocabulary - 1])[:rows]
    mask = torch.arange(rows) % 7 != 3
    given = ids, mask, None, 0.8, 0.0
    found = forward(cuda, logits, *given)
    expected = exact(logits, *given)
    close(found[0], expected[0], ERRORS[torch.float32])
    close(found[1], expected[1], ERRORS[torch.float32])
    assert all(not x[~mask].any() for x in found)
    assert all(map(torch.equal, forward(cuda, logits, *given), found))


def test_strided_rows(cuda):
    """Slices of a batch are read as they are."""
    whole, _ = draw(6 * 5, 37, torch.bfloat16)
    logits = whole.view(6, 5, 37)[::2, 1:, :33]
    ids = torch.arange(12)
    for value, expected in zip(forward(cuda, logits, ids), exact(logits, ids), strict=False):
        close(value, expected, 1e-6)


def test_many_short_rows(cuda):
    logits, ids = draw(3000, 3, torch.float32)
    log_probs, entropy, *_ = forward(cuda, logits, ids)
    expected = exact(logits, ids)
    close(log_probs, expected[0], 1e-6)
    close(entropy, expected[1], 1e-6)


@pytest.mark.parametrize("need_entropy", [False, True])
def test_no_rows(cuda, need_entropy):
    logits = torch.empty(0, 3, 5)
    ids = torch.empty(0, dtype=torch.int64)
    found = launcher.token_log_probs(cuda, logits, ids, None, None, 1.0, 0.0, need_entropy)
    assert [value.numel() for value in found] == [0] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_confident_token_keeps_its_precision(cuda, dtype):
    logits = torch.zeros(1, 1, 5000, dtype=dtype)
    logits[0, 0, 4321] = 30
    ids = torch.tensor([4321])
    log_probs, entropy, *_ = forward(cuda, logits, ids)
    others = 4999 * math.exp(-30)
    error = 1e-5 if log_probs.dtype == torch.float32 else 1e-12
    assert log_probs.item() == pytest.approx(-math.log1p(others), rel=error)
    assert entropy.item() == pytest.approx(others * 31, rel=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite(cuda, dtype):
    """Words at -inf are none; a row with a NaN, +inf or nothing is NaN; others keep their sums."""
    logits, _ = draw(8, 300, dtype)
    values = logits[0]
    values[0, ::2] = -torch.inf
    values[1, 100] = torch.nan
    values[2, 7] = torch.inf
    values[3] = -torch.inf
    values[4, 1:] = -torch.inf
    values[5, 9] = -torch.inf
    values[6, 299] = torch.nan
    ids = torch.tensor([1, 5, 5, 5, 0, 9, 299, 7])
    expected = exact(logits, ids)
    log_probs, entropy, *_ = forward(cuda, logits, ids)
    error = ERRORS[log_probs.dtype]
    close(log_probs, expected[0], error)
    close(entropy, expected[1], error)
    assert log_probs[:6].isnan().tolist() == [False, True, True, True, False, False]
    assert log_probs[4] == entropy[4] == 0
    assert log_probs[5] == -torch.inf


def test_ties(cuda):
    """Equal logits have equal shares, to the last bit of their logarithm."""
    logits = torch.full((1, 3, 1000), 2.5)
    log_probs, entropy, top, log_sum = forward(cuda, logits, torch.tensor([0, 500, 999]))
    assert torch.equal(log_probs, torch.full((3,), -math.log(1000.0)))
    assert torch.equal(entropy, torch.full((3,), math.log(1000.0)))
    assert torch.equal(top, torch.full((3,), 2.5, dtype=torch.float64))
    close(log_sum, torch.full((3,), math.log(1000.0), dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("temperature", [1e-30, 1e-16, 1e-10, 1e10, 1e16, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_temperature(cuda, dtype, temperature):
    logits, ids = draw(4, 500, dtype)
    ids[0] = logits[0, 0].argmax()
    logits[0, :, 3] = -torch.inf
    expected = exact(logits, ids, temperature=temperature)
    log_probs, entropy, *_ = forward(cuda, logits, ids, temperature=temperature)
    error = ERRORS[log_probs.dtype]
    close(log_probs, expected[0], error)
    close(entropy, expected[1], error)


def test_huge_logits(cuda):
    """The sum of the two parts of a log-sum-exp would lose the smaller one."""
    logits, ids = draw(4, 500, torch.float32)
    logits = (logits * 4).round() + 2.0**22
    expected = exact(logits, ids)
    log_probs, entropy, top, _ = forward(cuda, logits, ids)
    close(log_probs, expected[0], 4e-6)
    close(entropy, expected[1], 4e-6)
    assert torch.equal(top, logits[0].amax(-1).double())


@pytest.mark.parametrize("bad", [-1, 40, 1 << 40, -(1 << 62)])
def test_a_row_whose_id_is_out_of_range_is_nan_unless_it_is_masked(cuda, bad):
    """An error would have to be waited for."""
    logits, ids = draw(700, 40, torch.float32)
    expected = forward(cuda, logits, ids)
    rows = [333, 600]
    ids[rows] = bad
    others = torch.ones(700, dtype=torch.bool)
    others[rows] = False
    found = forward(cuda, logits, ids)
    for value, exact in zip(found, expected, strict=True):
        assert torch.equal(value[others], exact[others])
    log_probs, entropy, _, log_sum = found
    assert all(value[rows].isnan().all() for value in (log_probs, entropy, log_sum))
    log_probs, *_ = forward(cuda, logits, ids, others)
    assert log_probs[rows].tolist() == [0, 0]
    assert log_probs.isfinite().all()
