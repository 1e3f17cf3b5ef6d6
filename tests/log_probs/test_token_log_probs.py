"""token_log_probs: gradcheck, the error rule, confident and infinite logits, strides, in place."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from batches import Error
from head_cases import new_tensors

from steppo_kernels import token_log_probs
from steppo_kernels.backends import choice, operators

_EPS = torch.finfo(torch.float32).eps
_HALVES = [torch.bfloat16, torch.float16]
_DTYPES = [torch.float32, *_HALVES, torch.float64]


def draw(seed, rows, vocabulary, scale=2.0, shift=0.0, temperature=1.0):
    """Logits in fp64 and tokens of that policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, vocabulary), dtype=torch.float64, generator=generator)
    logits = logits * scale + shift
    policy = (logits / temperature).softmax(-1)
    return logits, torch.multinomial(policy, 1, generator=generator).squeeze(1)


def upstream(*shape, dtype=torch.float64, seed=7):
    """Gradients of log-probs and entropies, of both signs and different in every row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, *shape), dtype=torch.float64, generator=generator).to(dtype)


def plain(logits, ids, temperature=1.0):
    """What a trainer writes, in the dtype of the logits."""
    log_p = torch.log_softmax(logits / temperature, -1)
    log_probs = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def fused(backend, **options):
    def compute(logits, ids, temperature=1.0):
        return token_log_probs(
            logits, ids, temperature=temperature, return_entropy=True, backend=backend, **options
        )

    return compute


def results(compute, logits, ids, *args, grads=None):
    """Return everything that `compute` gives, by name; `grads` are its upstream gradients."""
    logits = logits.detach().clone().requires_grad_()
    values = dict(zip(("log_probs", "entropy"), compute(logits, ids, *args), strict=True))
    grads = upstream(*ids.shape) if grads is None else grads
    found = {name: value.detach() for name, value in values.items()}
    for (name, value), grad in zip(values.items(), grads, strict=True):
        (found[f"grad_of_{name}"],) = torch.autograd.grad(
            value, logits, grad.to(value.device, value.dtype), retain_graph=True
        )
    return found


def on(target, *tensors):
    return [value.to(target.device) for value in tensors]


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


@pytest.mark.parametrize("dtype", [torch.float32, *_HALVES], ids=str)
@pytest.mark.parametrize("case", _CASES)
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel, case, dtype):
    """And in half precision at most that of a softmax in that precision."""
    rows, vocabulary, scale, shift, temperature = _CASES[case]
    rows = min(rows, 20) if kernel.interpreted else rows
    kernel.thin(list(_CASES).index(case), 2 * _HALVES.count(dtype), every=4)
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


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
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


@pytest.mark.parametrize("padding", [0, 300], ids=["short", "long"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("case", _NOT_FINITE)
def test_logits_that_are_not_finite(target, case, dtype, padding):
    """As torch has it; where p is 0, p log p and the gradient are 0."""
    target.thin(list(_NOT_FINITE).index(case), _DTYPES.index(dtype), padding, every=4)
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


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_words_at_the_lowest_number_count_nothing(target, dtype):
    """As at -inf, under any upstream gradient: how trainers write banned words."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by mprotect")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_masked_rows_may_be_unreadable(dtype):
    """Reading one and not using it would be no different in the results: here it is a crash."""
    if why := choice.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    program = f"""
import ctypes, mmap, torch
from steppo_kernels import StepPOConfig, steppo_loss_from_logits, token_log_probs
torch.set_num_threads(1)
rows, vocabulary = 6, 1500
page = mmap.PAGESIZE
row = -(-vocabulary * {dtype}.itemsize // page) * page
memory = mmap.mmap(-1, rows * row)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
logits = torch.frombuffer(memory, dtype={dtype}).view(rows, -1)[:, :vocabulary]
logits.normal_()
for masked in (1, 4):
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + masked * row), row, 0) == 0
mask = torch.tensor([[1, 0, 1, 1, 0, 1]], dtype=torch.bool)
ids = torch.arange(rows)[None]
token_log_probs(logits[None], ids, mask=mask, backend="cpu")
leaf = logits.requires_grad_()
values = token_log_probs(leaf[None], ids, mask=mask, return_entropy=True, backend="cpu")
assert not torch.autograd.grad(sum(values).sum(), leaf)[0][1].any()
loss = steppo_loss_from_logits(
    leaf[None], ids, None, torch.ones(1, rows), mask, config=StepPOConfig(entropy_coef=0.1),
    backend="cpu",
).loss
assert torch.autograd.grad(loss, leaf)[0][0].any()
print("unread")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "unread\n", (done.returncode, done.stderr)


@pytest.mark.parametrize("form", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
def test_masked_rows_are_not_read(target, garbage, form):
    target.thin(form == torch.int64, 2 * math.isnan(garbage), every=3)
    logits, ids = on(target, *draw(2, 12, 19))
    mask = torch.arange(12, device=target.device) % 3 != 1
    expected = results(fused(target.backend), logits.float(), ids)
    logits[~mask] = garbage
    ids[~mask] = torch.tensor([-100, 2**40, 19, -(2**62)], device=target.device)
    shape = (3, 4)
    found = results(
        fused(target.backend, mask=mask.view(shape).to(form)),
        logits.float().view(*shape, 19),
        ids.view(shape),
        torch.where(mask, 1.0, garbage).view(shape),
        grads=upstream(12).view(2, *shape),
    )
    for name, value in expected.items():
        kept = found[name].view(value.shape)
        assert torch.equal(kept[mask], value[mask]), name
        assert kept[~mask].count_nonzero() == 0, name
        assert not kept.isnan().any()


def test_everything_masked(target):
    logits = torch.full((2, 3, 4), math.nan, device=target.device)
    ids = torch.full((2, 3), -1, device=target.device)
    mask = torch.zeros((2, 3), dtype=torch.bool, device=target.device)
    found = results(fused(target.backend, mask=mask), logits, ids)
    assert all(value.count_nonzero() == 0 for value in found.values())


_VIEWS = {
    "without the last": lambda z: z[:, :-1],
    "without the first": lambda z: z[:, 1:],
    "without the first row": lambda z: z[1:],
    "every other": lambda z: z[:, ::2],
    "part of the vocabulary": lambda z: z[..., 3:-4],
    "rows and columns swapped": lambda z: z.transpose(0, 1),
    "one row": lambda z: z[1, 2],
    "two dimensions": lambda z: z[:, 3],
    "four dimensions": lambda z: z.view(3, 2, 4, -1)[:, :, 1:],
    "an entry that is not contiguous": lambda z: z.transpose(1, 2),
    "every other logit": lambda z: z[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", _VIEWS)
def test_views_are_as_their_copies(target, view, dtype):
    target.thin(list(_VIEWS).index(view), 3 * (dtype == torch.float32), every=6)
    base = draw(4, 24, 41)[0].to(target.device, dtype).view(3, 8, 41)
    viewed = _VIEWS[view](base)
    shape = viewed.shape[:-1]
    ids = torch.arange(shape.numel(), device=target.device).view(shape) % viewed.shape[-1]
    expected = results(fused(target.backend), viewed.contiguous(), ids)
    base.requires_grad_()
    found = dict(
        zip(("log_probs", "entropy"), fused(target.backend)(_VIEWS[view](base), ids), strict=True)
    )
    for (name, value), grad in zip(list(found.items()), upstream(*shape), strict=True):
        (grad_base,) = torch.autograd.grad(value, base, grad.to(value), retain_graph=True)
        found[f"grad_of_{name}"] = _VIEWS[view](grad_base)
        assert grad_base.count_nonzero() == found[f"grad_of_{name}"].count_nonzero()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value), name


def test_expanded_logits(target):
    logits, ids = on(target, *draw(5, 4, 9))
    one = logits[:1].float().requires_grad_()
    log_probs = token_log_probs(one.expand(4, 9), ids, backend=target.backend)
    exact = plain(one.expand(4, 9), ids)[0]
    torch.testing.assert_close(log_probs, exact)
    weights = torch.arange(1.0, 5.0, device=target.device)
    grads = [torch.autograd.grad(value, one, weights)[0] for value in (log_probs, exact)]
    torch.testing.assert_close(*grads)


def test_only_the_gradient_has_the_size_of_the_logits(kernel):
    if kernel.backend != "cpu":
        pytest.skip("sizes are counted where no interpreter makes tensors of its own")
    base = draw(6, 24, 41)[0].bfloat16().view(3, 8, 41).requires_grad_()
    ids = torch.zeros((3, 7), dtype=torch.int64)
    with new_tensors() as sizes:
        logits = base[:, :-1]
        log_probs, entropy = fused(kernel.backend)(logits, ids)
    assert max(sizes) <= ids.numel()
    with new_tensors() as sizes:
        torch.autograd.grad((log_probs * entropy).sum(), logits)
    assert [size for size in sizes if size >= logits.numel()] == [logits.numel()]


def test_nothing_has_the_size_of_the_logits_in_place(kernel):
    if kernel.backend != "cpu":
        pytest.skip("sizes are counted where no interpreter makes tensors of its own")
    logits = draw(6, 21, 41)[0].float().view(3, 7, 41).requires_grad_()
    ids = torch.zeros((3, 7), dtype=torch.int64)
    with new_tensors() as sizes:
        log_probs, entropy = fused(kernel.backend, inplace_backward=True)(logits, ids)
        torch.autograd.grad((log_probs * entropy).sum(), logits)
    assert max(sizes) <= ids.numel()


def test_many_rows(target):
    if target.interpreted:
        pytest.skip("a program a row takes the interpreter minutes")
    logits, ids = on(target, *draw(8, 70_000, 3))
    found = results(fused(target.backend), logits.float(), ids)
    exact = results(plain, logits, ids)
    for name, value in exact.items():
        assert Error.between(found[name], value).largest < 1e-5, name


@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
def test_offsets_of_more_than_31_bits(target, inplace):
    """Rows far apart in memory of which nothing else is ever touched."""
    if target.interpreted:
        pytest.skip("the interpreter takes strides declared as int64 for int32")
    try:
        far = torch.empty(2**31 + 2**21, dtype=torch.bfloat16, device=target.device)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    logits, ids = on(target, *draw(25, 3, 64))
    logits = logits.bfloat16()
    apart = far.as_strided((3, 64), (2**30 + 2**19, 1))
    apart.copy_(logits)
    expected = results(fused(target.backend), logits, ids)
    found = fused(target.backend, inplace_backward=inplace)(apart.requires_grad_(), ids)
    weights = [grad.to(value) for grad, value in zip(upstream(3), found, strict=True)]
    (grad,) = torch.autograd.grad(found[0], apart, weights[0])
    assert torch.equal(grad, expected["grad_of_log_probs"])
    assert torch.equal(found[1], expected["entropy"])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (1, 1, 1)], ids=str)
def test_shapes(target, shape):
    logits = torch.zeros((*shape, 4), device=target.device, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int32, device=target.device)
    log_probs, entropy = fused(target.backend)(logits, ids)
    assert log_probs.shape == entropy.shape == shape
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == logits.shape
    assert torch.equal(log_probs, torch.full_like(log_probs, -math.log(4.0)))


def test_ids_and_masks_in_other_shapes(target):
    """The result has the shape of the ids."""
    logits, ids = on(target, *draw(9, 12, 8))
    mask = torch.arange(12, device=target.device) % 2 == 0
    expected = token_log_probs(logits.view(3, 4, 8), ids.view(3, 4), backend=target.backend)
    temperature = torch.ones((1, 3, 4), device=target.device)
    found = token_log_probs(
        logits.view(3, 4, 8),
        ids.view(3, 1, 4).to(torch.int16),
        mask=mask,
        temperature=temperature,
        backend=target.backend,
    )
    assert torch.equal(found.view(-1), torch.where(mask, expected.view(-1), 0.0))
    assert found.shape == (3, 1, 4)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_dtypes(target, dtype):
    logits, ids = on(target, *draw(10, 3, 8))
    logits = logits.to(dtype).requires_grad_()
    log_probs, entropy = fused(target.backend)(logits, ids)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert log_probs.dtype == entropy.dtype == compute
    (log_probs * entropy).sum().backward()
    assert logits.grad.dtype == dtype
    with torch.no_grad():
        again = token_log_probs(logits, ids, backend=target.backend)
    assert not again.requires_grad
    assert torch.equal(again, log_probs)


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
    """Of one result or of both, different in every row or one number for all."""
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


def test_dead_rows_are_zeroed_and_not_read(kernel):
    logits, ids = on(kernel, *draw(13, 6, 37))
    logits = logits.float().requires_grad_()
    log_probs, entropy = fused(kernel.backend)(logits, ids)
    grads = upstream(6, dtype=torch.float32).to(kernel.device)
    dead = torch.tensor([0, 3, 5], device=kernel.device)
    grads[:, dead] = 0.0
    (expected,) = torch.autograd.grad((log_probs, entropy), logits, list(grads), retain_graph=True)
    logits.data[dead] = math.nan
    (found,) = torch.autograd.grad((log_probs, entropy), logits, list(grads))
    assert torch.equal(found, expected)
    assert found[dead].count_nonzero() == 0


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_inplace_backward(kernel, dtype):
    """The same gradient to the last bit, in the memory of the logits; and only once."""
    kernel.thin(_DTYPES.index(dtype), every=2)
    logits, ids = on(kernel, *draw(14, 12, 133))
    mask = torch.arange(12, device=kernel.device) % 4 != 2
    logits = logits.to(dtype)
    grads = upstream(12).to(kernel.device)

    def gradient(inplace):
        leaf = logits.clone().requires_grad_()
        found = fused(kernel.backend, inplace_backward=inplace, mask=mask)(leaf, ids)
        weights = [grad.to(value) for grad, value in zip(grads, found, strict=True)]
        (grad,) = torch.autograd.grad(found, leaf, weights, retain_graph=True)
        return leaf, grad, found, weights

    _, expected, *_ = gradient(False)
    leaf, grad, found, weights = gradient(True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == leaf.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found, leaf, weights)


def test_inplace_backward_behind_a_linear_layer(kernel):
    hidden = torch.randn((10, 6), generator=torch.Generator().manual_seed(1)).to(kernel.device)
    head = torch.nn.Linear(6, 29, device=kernel.device)
    ids = torch.arange(8, device=kernel.device).view(2, 4)
    found = []
    for inplace in (False, True):
        logits = head(hidden).view(2, 5, 29)[:, :-1]
        log_probs = token_log_probs(logits, ids, inplace_backward=inplace, backend=kernel.backend)
        found.append(torch.autograd.grad((log_probs**2).sum(), list(head.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


_SLICES = {
    "next token": lambda z: z[:, :-1],
    "response": lambda z: z[:, 2:-1],
    "rows": lambda z: z[1:],
    "one row": lambda z: z[1],
    "every other": lambda z: z[:, ::2],
    "of a view": lambda z: z.view(-1, z.shape[-1])[3:9].unsqueeze(0),
    "time first": lambda z: z.transpose(0, 1)[1:],
    "of a slice": lambda z: z[1:][:, :-1],
}


def head_and_gradients(kernel, part, inplace, extra=None):
    """Gradients of a head through a slice of its logits, and what backward allocates."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((3, 6, 4), generator=generator).to(kernel.device)
    weight = torch.randn((29, 4), generator=generator).to(kernel.device).requires_grad_()
    whole = hidden @ weight.t()
    logits = _SLICES[part](whole) if isinstance(part, str) else part(whole)
    ids = torch.arange(logits.shape[:-1].numel(), device=kernel.device) % 29
    found = fused(kernel.backend, inplace_backward=inplace)(logits, ids.view(logits.shape[:-1]))
    loss = (found[0] ** 2 + found[1]).sum()
    if extra is not None:
        loss = loss + extra(whole)
    seen = []
    whole.register_hook(seen.append)
    with new_tensors() as sizes:
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return grad, sizes, whole, seen[0], loss, weight


@pytest.mark.parametrize("part", _SLICES)
def test_inplace_backward_of_a_slice_overwrites_all_of_it(kernel, part):
    expected = head_and_gradients(kernel, part, False)[0]
    grad, sizes, whole, grad_whole, loss, weight = head_and_gradients(kernel, part, True)
    assert torch.equal(grad, expected)
    assert grad_whole.data_ptr() == whole.data_ptr()
    if kernel.backend == "cpu":  # the interpreter makes tensors of its own
        assert max(sizes) < whole.numel()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


def test_inplace_backward_of_a_slice_leaves_other_uses_alone(kernel):
    def extra(whole):
        return (whole * torch.linspace(-1, 1, 29, device=whole.device)).sum()

    expected = head_and_gradients(kernel, "next token", False, extra)[0]
    found = head_and_gradients(kernel, "next token", True, extra)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("why", ["hook", "retain_grad", "columns", "not a view", "offloaded"])
def test_inplace_backward_where_a_slice_is_looked_at(kernel, why):
    """Then autograd's own path is taken, or the same result comes of the other."""
    seen = []

    def part(whole):
        logits = whole[:, :-1]
        if why == "hook":
            logits.register_hook(seen.append)
        elif why == "retain_grad":
            logits.retain_grad()
            seen.append(logits)
        elif why == "columns":
            logits = whole[..., :20]
        elif why == "not a view":
            logits = (whole * 1.0)[:, :-1]
        return logits

    def plain(whole):
        return whole[..., :20] if why == "columns" else whole[:, :-1]

    offload = torch.autograd.graph.save_on_cpu() if why == "offloaded" else nullcontext()
    expected = head_and_gradients(kernel, plain, False)[0]
    with offload:
        found = head_and_gradients(kernel, part, True)[0]
    assert torch.equal(found, expected)
    if why == "hook":
        assert seen[0].shape == (3, 5, 29)
    if why == "retain_grad":
        assert seen[0].grad.shape == (3, 5, 29)


def test_inplace_backward_needs_memory_of_its_own(kernel):
    base = torch.zeros((2, 3, 4), device=kernel.device)
    ids = torch.zeros((2, 3), dtype=torch.int64, device=kernel.device)
    windows = torch.zeros(40, device=kernel.device).as_strided((2, 3, 4), (12, 2, 1))
    for logits in (
        base.transpose(1, 2).contiguous().transpose(1, 2),  # needs a copy
        base[:1].expand(2, 3, 4),
        base[:, :1].expand(2, 3, 4),
        windows,
    ):
        with pytest.raises(ValueError, match=r"^inplace_backward: got logits of shape"):
            token_log_probs(logits, ids, inplace_backward=True, backend=kernel.backend)
    for logits in (base, base.transpose(0, 1).contiguous().transpose(0, 1), base[:, 1:]):
        token_log_probs(
            logits, ids[:, : logits.shape[1]], inplace_backward=True, backend=kernel.backend
        )


def test_second_backward(target):
    logits, ids = on(target, *draw(15, 4, 50))
    logits = logits.float().requires_grad_()
    loss = token_log_probs(logits, ids, backend=target.backend).square().sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_changed_inputs_are_noticed(kernel):
    """Backward reads them again: changed in place, they would give a wrong gradient."""
    logits, ids = on(kernel, *draw(16, 4, 50))
    mask = torch.ones(4, dtype=torch.bool, device=kernel.device)
    temperature = torch.ones(4, dtype=torch.float64, device=kernel.device)
    for changed in (logits, ids, mask, temperature):
        leaf = logits.requires_grad_() if changed is logits else logits.clone().requires_grad_()
        log_probs = token_log_probs(
            leaf, ids, mask=mask, temperature=temperature, backend=kernel.backend
        )
        with torch.no_grad():
            changed.fill_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            log_probs.sum().backward()


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


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_operator_gathers_rows(kernel, shared, softcap):
    """As the loss from hidden states uses it: live rows move to the front of their own memory."""
    logits, ids = on(kernel, *draw(21, 8, 45))
    logits = logits.float().unsqueeze(0)
    temperatures = torch.linspace(0.5, 2.0, 8, device=kernel.device).double()
    head = ids, None, temperatures, 1.0, softcap
    _, entropy, *sums = operators.call("token_log_probs", kernel.backend, logits, *head, True)
    grads = upstream(8, dtype=torch.float32).to(kernel.device)

    def differentiate(grad_logits, logits, rows):
        operators.call(
            "token_log_probs_backward",
            kernel.backend,
            grad_logits,
            logits,
            *head,
            *sums,
            entropy,
            *grads,
            rows,
        )
        return grad_logits[0]

    every = differentiate(torch.empty_like(logits), logits, None)
    wide = logits.double().requires_grad_()
    z = softcap * torch.tanh(wide / softcap) if softcap else wide
    exact = plain(z[0], ids, temperatures[:, None])
    (expected,) = torch.autograd.grad(exact, wide, list(grads.double()))
    assert Error.between(every, expected[0]).largest < 1e-6
    rows = torch.tensor([7, 1, 5], device=kernel.device)
    found = differentiate(logits if shared else torch.empty_like(logits), logits, rows)
    assert torch.equal(found[:3], every[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.5, 5.0, 12.0])
def test_softcap_error(kernel, dtype, spread):
    """Of the operators, from logits much smaller to larger than the cap."""
    rows, cap = 20 if kernel.interpreted else 60, 5.0
    logits = spread * torch.randn((rows, 257), generator=torch.Generator().manual_seed(4))
    logits = logits.to(dtype)
    policy = (cap * torch.tanh(logits.float() / cap)).softmax(-1)
    ids = torch.multinomial(policy, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    grads = upstream(rows)

    def plain_capped(values, at, temperature):
        return plain(cap * torch.tanh(values / cap), at, temperature)

    exact = results(plain_capped, logits.double(), ids, 0.9, grads=grads)
    inexact = results(plain_capped, logits.float(), ids, 0.9, grads=grads)
    found = capped(kernel, logits, ids, cap, grads)
    for name, value in exact.items():
        error, allowed = Error.between(found[name], value), Error.between(inexact[name], value)
        rounding = torch.finfo(found[name].dtype).eps
        assert error.rms <= 2 * allowed.rms + rounding / 2, name
        assert error.largest <= 3 * allowed.largest + rounding, name


def capped(kernel, logits, ids, cap, grads):
    """Everything that the operators give with a softcap, by name, at temperature 0.9."""
    logits, ids = (value.to(kernel.device)[None] for value in (logits, ids))
    targets = ids[0].contiguous(), None, None, 0.9, cap
    log_probs, entropy, *sums = operators.call(
        "token_log_probs", kernel.backend, logits, *targets, True
    )
    found = {"log_probs": log_probs, "entropy": entropy}
    zeros = torch.zeros_like(log_probs)
    for at, name in enumerate(("log_probs", "entropy")):
        given = [zeros, zeros]
        given[at] = grads[at].to(log_probs)
        grad = torch.full_like(logits, torch.nan)
        operators.call(
            "token_log_probs_backward",
            kernel.backend,
            grad,
            logits,
            *targets,
            *sums,
            entropy,
            *given,
            None,
        )
        found[f"grad_of_{name}"] = grad[0]
    return found


def test_same_bits(target):
    logits, ids = on(target, *draw(18, 5, 300))
    one, other = (results(fused(target.backend), logits.float(), ids) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


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


def test_rows_do_not_depend_on_each_other(target):
    """Nor on how they are cut into batches."""
    logits, ids = on(target, *draw(20, 9, 70))
    whole = results(fused(target.backend), logits.float(), ids)
    for begin, end in ((0, 1), (1, 4), (4, 9)):
        part = results(
            fused(target.backend),
            logits[begin:end].float(),
            ids[begin:end],
            grads=upstream(9)[:, begin:end],
        )
        for name, value in part.items():
            assert torch.equal(value, whole[name][begin:end]), name


def step(logits, ids, mask, temperature, backend, inplace=False):
    # Of what a model computes, as a leaf cannot be written to.
    logits = logits * 1.0
    log_probs, entropy = token_log_probs(
        logits[:, :-1],
        ids,
        mask=mask,
        temperature=temperature,
        return_entropy=True,
        inplace_backward=inplace,
        backend=backend,
    )
    return (log_probs * log_probs.detach().exp() + entropy).sum()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
def test_compile(target, inplace):
    if target.backend == "reference" and inplace:
        pytest.skip("the reference does nothing in place")
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed, (rows, length) in enumerate([(2, 5), (3, 7)]):
        logits, ids = on(target, *draw(seed, rows * length, 21))
        logits = logits.float().view(rows, length, 21).requires_grad_()
        ids = ids.view(rows, length)[:, 1:]
        # The rows of a mask are counted by the reference.
        mask = None if target.backend == "reference" else ids % 3 > 0
        temperature = 1.0 + torch.rand(ids.shape, device=target.device)
        args = logits, ids, mask, temperature, target.backend, inplace
        found, expected = (
            torch.autograd.grad(function(*args), logits)[0] for function in (compiled, step)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
