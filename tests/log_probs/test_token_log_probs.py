"""token_log_probs: values and gradients by gradcheck, the error rule, and at hard logits."""

from __future__ import annotations

import math

import pytest
import torch
from batches import Error
from grids import grid
from logit_cases import DTYPES, HALVES, draw, fused, on, plain, results, upstream

from steppo_kernels import token_log_probs

_EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("per_token", [False, True], ids=["number", "per_token"])
def test_gradcheck(target, per_token):
    logits, ids = on(target, *draw(1, 6, 5))
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], device=target.device)
    temperature = torch.linspace(0.5, 2.0, 6, device=target.device).double() if per_token else 0.7

    def compute(logits):
        return token_log_probs(
            logits,
            ids.view(2, 3),
            temperature=temperature,
            return_entropy=True,
            mask=mask,
            backend=target.backend,
        )

    # Element by element where that is fast, else along random directions.
    fast_mode = target.backend != "cpu"
    logits = logits.view(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(compute, logits, fast_mode=fast_mode)


# Rows, vocabulary, scale, shift, temperature.
_CASES = {
    "tiny": (200, 7, 2.0, 0.0, 1.0),
    "one": (20, 1, 2.0, 0.0, 1.0),
    "flat": (40, 257, 0.5, 0.0, 1.0),
    "usual": (40, 257, 3.0, 0.0, 0.7),
    "peaked": (40, 257, 15.0, 0.0, 1.3),
    "around 300": (40, 257, 2.0, 300.0, 1.0),
    "around -300": (40, 257, 2.0, -300.0, 0.9),
    "around -10000": (40, 257, 20.0, -1e4, 1.0),
    "large": (2, 152064, 8.0, 0.0, 1.0),
    "large and odd": (2, 100003, 3.0, 0.0, 1.2),
}


@pytest.mark.isa
@grid(cover=1, case=list(_CASES), dtype=[torch.float32, *HALVES])
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel, case, dtype):
    """In half precision it is at most that of a softmax in that precision."""
    rows, vocabulary, scale, shift, temperature = _CASES[case]
    rows = min(rows, 20) if kernel.interpreted else rows
    sums, largest = {}, {}
    seeds = 4 if rows > 2 and not kernel.interpreted else 1
    for seed in range(seeds):
        logits, ids = draw(seed, rows, vocabulary, scale, shift, temperature)
        logits = logits.to(dtype)
        grads = upstream(rows, seed=seed).to(dtype).double()
        exact = results(plain, logits.double(), ids, temperature, grads=grads)
        found = {
            "plain": results(plain, logits, ids, temperature, grads=grads),
            "kernel": results(
                fused(kernel.backend), *on(kernel, logits, ids), temperature, grads=grads
            ),
        }
        for who, values in found.items():
            for name, value in exact.items():
                error = Error.between(values[name], value)
                sums[who, name] = sums.get((who, name), 0.0) + error.rms**2
                largest[who, name] = max(largest.get((who, name), 0.0), error.largest)
    factor = 2 if dtype == torch.float32 else 1
    for name in exact:
        rms = [(sums[who, name] / seeds) ** 0.5 for who in ("kernel", "plain")]
        top = [largest[who, name] for who in ("kernel", "plain")]
        # A result that is right to its last bit has an error of up to half an eps of itself.
        rounding = factor * torch.finfo(found["kernel"][name].dtype).eps / 2
        if case == "one" and name != "log_probs":
            # Everything is exactly 0.
            assert found["kernel"][name].count_nonzero() == 0
            continue
        assert rms[0] <= factor * rms[1] + _EPS, (name, rms)
        assert top[0] <= max(factor * top[1], rounding) + _EPS, (name, top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confident_tokens(target, dtype):
    """log p near 0 and p - 1 are not differences of numbers near 1, nor of large ones."""
    margins = torch.tensor([5.0, 12.0, 18.0, 40.0], dtype=torch.float64)
    logits = draw(3, 4, 33, scale=1.0)[0].clamp(-2, 2).to(dtype).double()
    ids = torch.tensor([0, 32, 13, 16])
    # Numbers of every dtype.
    logits.scatter_(1, ids[:, None], 20.0 + margins[:, None])
    grads = torch.stack([torch.ones(4), torch.zeros(4)]).double()
    exact = results(plain, logits, ids, grads=grads)
    # The reference of the reference, where even fp64 rounds 1 + sum.
    others = logits.scatter(1, ids[:, None], -math.inf).logsumexp(-1)
    exact["log_probs"] = -torch.log1p((others - 20.0 - margins).exp())
    at_target = exact["grad_of_log_probs"].gather(1, ids[:, None])
    at_target.copy_(-torch.expm1(exact["log_probs"])[:, None])
    exact["grad_of_log_probs"].scatter_(1, ids[:, None], at_target)
    found = results(fused(target.backend), *on(target, logits.to(dtype), ids), grads=grads)
    for name in ("log_probs", "grad_of_log_probs"):
        error = (found[name].cpu().double() - exact[name]).abs()
        if target.backend == "reference":
            assert error.max() < 2 * torch.finfo(found[name].dtype).eps, name
        else:
            # The log-sum-exp is kept in fp64, without the token's own logit in the sum.
            rounding = max(1e-5, torch.finfo(found[name].dtype).eps)
            assert (error <= rounding * exact[name].abs() + 1e-14).all(), name
    assert (found["log_probs"] <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [300.0, -300.0, -1e4, 0.0, 6e4])
def test_equal_logits(target, level, dtype):
    vocabulary = 1000
    logits = torch.full((2, vocabulary), level, dtype=dtype, device=target.device)
    ids = torch.tensor([0, 999], device=target.device)
    found = results(fused(target.backend), logits, ids, grads=torch.ones(2, 2))
    uniform = math.log(vocabulary)
    rtol = 1e-6 if dtype != torch.float64 else 1e-12
    expected = torch.full((2,), uniform, dtype=found["entropy"].dtype, device=target.device)
    torch.testing.assert_close(found["log_probs"], -expected, rtol=rtol, atol=0)
    torch.testing.assert_close(found["entropy"], expected, rtol=rtol, atol=0)
    slope = torch.full((2, vocabulary), -1 / vocabulary, dtype=torch.float64, device=target.device)
    slope.scatter_add_(1, ids[:, None], torch.ones_like(slope))
    torch.testing.assert_close(
        found["grad_of_log_probs"].double(), slope, rtol=max(rtol, torch.finfo(dtype).eps), atol=0
    )
    assert found["grad_of_entropy"].abs().max() <= 1e-8


_INF = math.inf


_NOT_FINITE = {
    "some": ([1.0, -_INF, 3.0, -_INF, 0.5], 0),
    "the token": ([1.0, -_INF, 3.0, -_INF, 0.5], 1),
    "all but the token": ([-_INF, -_INF, 3.0, -_INF, -_INF], 2),
    "all but another": ([-_INF, -_INF, 3.0, -_INF, -_INF], 1),
    "all": ([-_INF] * 5, 2),
    "nan": ([1.0, math.nan, 2.0, 0.0, 0.0], 0),
    "nan at the token": ([1.0, math.nan, 2.0, 0.0, 0.0], 1),
    "inf": ([1.0, _INF, 2.0, 0.0, 0.0], 0),
    "inf at the token": ([1.0, _INF, 2.0, 0.0, 0.0], 1),
}


@grid(cover=1, case=list(_NOT_FINITE), dtype=DTYPES, padding={"short": 0, "long": 300})
def test_logits_that_are_not_finite(target, case, dtype, padding):
    """The results are torch's. Where p is 0, p log p and the gradient are 0."""
    row, token = _NOT_FINITE[case]
    row = [-_INF if math.isinf(row[0]) else -1.0] * padding + row
    logits = torch.tensor([row, [0.5] * len(row)], dtype=dtype, device=target.device)
    ids = torch.tensor([token + padding, 1], device=target.device)
    grads = torch.tensor([[2.0, 1.0], [-0.5, 1.0]])
    found = results(fused(target.backend), logits, ids, grads=grads)
    exact = results(plain, logits.double(), ids, grads=grads)
    p = logits.double().softmax(-1)
    log_p = p.log().masked_fill(p == 0, 0.0)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    exact["entropy"] = entropy.squeeze(1)
    exact["grad_of_entropy"] = -p * (log_p + entropy) * grads[1].to(p)[:, None]
    for name, value in exact.items():
        rtol = 2 * torch.finfo(found[name].dtype).eps
        atol = rtol if name == "grad_of_entropy" else 1e-7
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=rtol, atol=atol, equal_nan=True
        )
        if name.startswith("grad"):
            assert not found[name][0][(p == 0)[0] & (logits != logits[0, token + padding])[0]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_at_the_lowest_number_count_nothing(target, dtype):
    """Trainers ban words so. Under any upstream gradient they are as words at -inf."""
    row = [1.0, torch.finfo(dtype).min, 3.0, torch.finfo(dtype).min, 0.5]
    logits = torch.tensor([row], dtype=dtype, device=target.device)
    ids = torch.tensor([0], device=target.device)
    factor = 1.0 if dtype == torch.float16 else 2.0**16
    grads = torch.tensor([[1.0], [-factor]])
    found = results(fused(target.backend), logits, ids, grads=grads)
    banned = logits.masked_fill(logits < -1.0, -_INF)
    expected = results(fused(target.backend), banned, ids, grads=grads)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        assert value.isfinite().all()


def test_temperatures_by_token(target):
    logits, ids = on(target, *draw(11, 6, 50))
    temperature = torch.linspace(0.3, 4.0, 6, device=target.device)
    found = results(fused(target.backend), logits.float(), ids, temperature)
    exact = results(plain, logits.float().double(), ids, temperature.double()[:, None])
    for name, value in exact.items():
        assert Error.between(found[name], value).largest < 1e-5, name
    one = results(fused(target.backend), logits.float(), ids, torch.full_like(temperature, 0.25))
    number = results(fused(target.backend), logits.float(), ids, 0.25)
    for name, value in number.items():
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wanted", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize("expanded", [False, True], ids=["drawn", "one_number"])
def test_upstream_gradients(target, wanted, expanded):
    """One result has them or both, different in every row or one number for all."""
    logits, ids = on(target, *draw(12, 7, 23))
    weights = torch.ones((2, 7)) * 0.5 if expanded else upstream(7).float()
    weights = weights.to(target.device)

    def gradient(compute, logits):
        logits = logits.clone().requires_grad_()
        values = dict(zip(("log_probs", "entropy"), compute(logits, ids), strict=True))
        loss = 0.0
        for (name, value), weight in zip(values.items(), weights, strict=True):
            if wanted in (name, "both"):
                loss = loss + (value.sum() * weight[0] if expanded else (value * weight).sum())
        return torch.autograd.grad(loss, logits)[0]

    found = gradient(fused(target.backend), logits.float())
    exact = gradient(plain, logits.float().double())
    assert Error.between(found, exact).largest < 2e-6


def test_ids_out_of_range(target):
    """An error where that costs no wait, else NaN; nothing is read out of bounds."""
    logits, ids = on(target, *draw(17, 4, 5))
    for bad in (5, -1, -100, 2**40, -(2**62)):
        leaf = logits.clone().requires_grad_()
        wrong = ids.clone()
        wrong[2] = bad
        if target.backend in ("reference", "cpu") and target.device == "cpu":
            with pytest.raises(
                ValueError, match=f"^token_ids: got {bad}, expected ids from 0 to 4"
            ):
                token_log_probs(leaf, wrong, backend=target.backend)
        elif target.backend != "reference":
            log_probs = token_log_probs(leaf, wrong, backend=target.backend)
            log_probs.sum().backward()
            rows = torch.arange(4) == 2
            assert torch.equal(log_probs.isnan().cpu(), rows)
            assert torch.equal(leaf.grad.isnan().all(1).cpu(), rows)


@pytest.mark.isa
def test_same_bits(target):
    logits, ids = on(target, *draw(18, 5, 300))
    one, other = (results(fused(target.backend), logits.float(), ids) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.isa
@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    logits, ids = draw(19, 30, 40_001)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(fused("cpu"), logits.to(dtype), ids))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)
