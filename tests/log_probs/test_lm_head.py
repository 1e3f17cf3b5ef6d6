"""The operators of the output head, and linear_token_log_probs: results, work and memory."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from batches import Error, assert_same
from grids import grid
from head_cases import head_case, new_tensors, plain_log_probs, products

from steppo_kernels import linear_token_log_probs
from steppo_kernels.backends import operators
from steppo_kernels.log_probs.lm_head import Head, check_chunk, logits_dtype


def fused(case, backend, *, upstream=None, upstream_entropy=None, **options):
    """Log-probs, entropies and the gradients of hidden states, weight and bias."""
    log_probs, entropy = linear_token_log_probs(
        case.hidden,
        case.weight,
        case.token_ids,
        mask=case.mask,
        return_entropy=True,
        backend=backend,
        **options,
    )
    return collect(case, log_probs, entropy, upstream, upstream_entropy)


def plain(case, *, upstream=None, upstream_entropy=None, **options):
    return collect(case, *plain_log_probs(case, **options), upstream, upstream_entropy)


def collect(case, log_probs, entropy, upstream, upstream_entropy):
    total = 0.0
    if upstream is not None:
        total = total + (log_probs * upstream).sum()
    if upstream_entropy is not None:
        total = total + (entropy * upstream_entropy).sum()
    return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), **case.gradients(total)}


def ramp(case, start=1.0):
    """Upstream gradients that differ from token to token."""
    return torch.linspace(
        start, -1.0, case.mask.numel(), dtype=torch.float64, device=case.mask.device
    ).view(case.mask.shape)


@grid(
    cover=1,
    given=["nothing", "a temperature", "a softcap", "everything"],
    which=["both", "log_probs", "entropy"],
    chunk=[None, 1, 5],
)
def test_equals_plain_pytorch(target, given, which, chunk):
    case = head_case(3).to(torch.float64, target.device)
    options = {
        "nothing": {},
        "a temperature": {"temperature": 0.6},
        "a softcap": {"softcap": 2.0},
        "everything": {"bias": case.bias, "temperature": case.temperatures, "softcap": 1.5},
    }[given]
    options = {
        **options,
        "upstream": None if which == "entropy" else ramp(case),
        "upstream_entropy": None if which == "log_probs" else ramp(case, 2.0),
    }
    found = fused(case, target.backend, chunk_tokens=chunk, **options)
    assert_same(found, plain(case, **options), 1e-11)


@grid(cover=1, softcap=[1e-30, 1e30], dtype=[torch.float32, torch.float64])
def test_the_least_and_the_largest_softcap(target, softcap, dtype):
    """All logits become 0, or stay as they are."""
    case, exact_case = (head_case(3).to(kind, target.device) for kind in (dtype, torch.float64))
    options = {"softcap": softcap, "upstream": ramp(case), "upstream_entropy": ramp(case, 2.0)}
    found = {name: x.double() for name, x in fused(case, target.backend, **options).items()}
    error = 1e-11 if dtype == torch.float64 else 1e-5
    assert_same(found, plain(exact_case, **options), error)


def test_gradcheck(target):
    case = head_case(2, rows=2, length=5, size=2, vocabulary=4).to(torch.float64, target.device)
    case.hidden = torch.where(case.mask[..., None], case.hidden.detach(), 0.0).requires_grad_()

    def run(hidden, weight, bias):
        return linear_token_log_probs(
            hidden,
            weight,
            case.token_ids,
            bias=bias,
            temperature=0.8,
            softcap=3.0,
            mask=case.mask,
            return_entropy=True,
            chunk_tokens=3,
            backend=target.backend,
        )

    assert torch.autograd.gradcheck(run, (case.hidden, case.weight, case.bias), atol=1e-8)


def test_all_rows_without_a_mask(target):
    case = head_case(5).to(torch.float64, target.device)
    hidden = case.hidden.detach().nan_to_num(0.5)
    ids = case.token_ids.where(case.mask, 1)
    found = linear_token_log_probs(hidden, case.weight, ids, backend=target.backend)
    expected = (hidden @ case.weight.t()).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert found.shape == ids.shape
    assert Error.between(found, expected).largest <= 1e-12


def test_without_gradients_only_the_forward_product_is_formed(kernel):
    case = head_case(6, rows=5, length=40, vocabulary=101).to(torch.float32, kernel.device)
    unit = int(case.mask.sum()) * case.weight.numel()
    with products() as counter, torch.no_grad(), new_tensors() as sizes:
        found = linear_token_log_probs(
            case.hidden,
            case.weight,
            case.token_ids,
            mask=case.mask,
            chunk_tokens=8,
            backend=kernel.backend,
        )
    assert counter.operations == 2 * unit
    assert not found.requires_grad
    assert max(sizes) <= max(8 * 101, case.hidden.numel())


@grid(share=[0.0, 0.5, 1.0])
def test_backward_takes_only_rows_with_a_gradient(kernel, share):
    case = head_case(7, rows=2, length=24, vocabulary=51).to(torch.float32, kernel.device)
    log_probs = linear_token_log_probs(
        case.hidden,
        case.weight,
        case.token_ids,
        mask=case.mask,
        chunk_tokens=16,
        backend=kernel.backend,
    )
    upstream = (torch.arange(log_probs.numel(), device=kernel.device) % 10 < 10 * share).float()
    upstream = upstream.view(log_probs.shape)
    with products() as counter, new_tensors() as sizes:
        found = torch.autograd.grad(log_probs, (case.hidden, case.weight), upstream)
    live = int((upstream * case.mask).sum())
    assert counter.operations == 6 * live * case.weight.numel()
    # On a GPU rows of logits are multiples of 8 numbers.
    assert max(sizes) <= max(16 * 56, case.hidden.numel())
    expected = torch.autograd.grad(
        plain_log_probs(case)[0], (case.hidden, case.weight), upstream, allow_unused=True
    )
    for grad, wanted in zip(found, expected, strict=True):
        assert Error.between(grad, wanted).largest <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_that_of_plain_pytorch(kernel, dtype):
    rows, length = (2, 20) if kernel.interpreted else (3, 50)
    exact = head_case(8, rows, length, 64, 515, sharp=4.0)
    options = {"upstream": ramp(exact), "upstream_entropy": ramp(exact, 2.0)}
    expected = plain(exact.to(torch.float64), **options)
    case = exact.to(dtype, kernel.device)
    options = {name: value.to(kernel.device, torch.float32) for name, value in options.items()}
    found = fused(case, kernel.backend, chunk_tokens=20, **options)
    unfused = plain(case, **{name: value.to(dtype) for name, value in options.items()})
    factor = 2.0 if dtype == torch.float32 else 1.0
    for name in ("log_probs", "entropy", "grad_hidden", "grad_weight"):
        allowed = factor * Error.between(unfused[name], expected[name]).rms
        assert Error.between(found[name], expected[name]).rms <= allowed, name


def test_hidden_of_any_shape_keeps_its_graph(target):
    """Three dimensions, not contiguous, and not a leaf."""
    case = head_case(9, rows=4).to(torch.float64, target.device)
    leaf = case.hidden.detach().nan_to_num(0.0).transpose(0, 1).contiguous().requires_grad_()
    case.hidden = (leaf * 2).transpose(0, 1)
    assert not case.hidden.is_contiguous()
    results = []
    for compute in (
        lambda: linear_token_log_probs(
            case.hidden, case.weight, case.token_ids, mask=case.mask, backend=target.backend
        ),
        lambda: plain_log_probs(case)[0],
    ):
        total = (compute() * ramp(case)).sum()
        results.append(torch.autograd.grad(total, leaf, retain_graph=True)[0])
    assert results[0].any()
    assert Error.between(*results).largest <= 1e-11


def test_bitwise_repeatable(target):
    case = head_case(10).to(torch.float32, target.device)
    upstream = ramp(case).float()
    first, second = (fused(case, target.backend, chunk_tokens=6, upstream=upstream) for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_rows(target):
    case = head_case(11).to(torch.float32, target.device)
    case.mask = torch.zeros_like(case.mask)
    found = fused(case, target.backend, upstream=ramp(case).float())
    assert not any(value.any() for value in found.values())


# Tails of every block of the products: rows, columns, and halves of words of two.
_PRODUCTS = [(1, 2, 1), (5, 3, 7), (13, 34, 130), (7, 1100, 65), (510, 66, 70), (4, 512, 2100)]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", _PRODUCTS, ids=str)
def test_sizes_of_head_logits(kernel, shape, dtype):
    """Halves are summed and kept in fp32: not worse than twice an fp32 product on a CPU.

    The tensor cores of a GPU cut off what is below the last bit of the largest of the numbers that
    they add, where a CPU rounds: up to 7.5 times were seen.
    """
    is_cut = kernel.device != "cpu" and dtype.itemsize == 2
    rows, size, vocabulary = shape
    generator = torch.Generator().manual_seed(size)

    def normal(*numbers):
        return torch.randn(numbers, generator=generator, dtype=torch.float64).to(dtype)

    hidden, wide, bias = normal(rows, size), normal(vocabulary, size + 4), normal(vocabulary)
    made = logits_dtype(kernel.backend, dtype)
    run = operators.launcher(kernel.backend, "head_logits")
    for weight in (wide[:, :size], wide[:, 3 : size + 3], wide[:, :size].t().contiguous().t()):
        for some_bias in (bias, None):
            logits = torch.full((rows, vocabulary), torch.nan, dtype=made, device=kernel.device)
            inputs = [x if x is None else x.to(kernel.device) for x in (hidden, weight, some_bias)]
            run(logits, *inputs)
            added = 0.0 if some_bias is None else some_bias.double()
            exact = hidden.double() @ weight.double().t() + added
            plain = inputs[0].to(made) @ inputs[1].to(made).t() + (
                0.0 if some_bias is None else inputs[2].to(made)
            )
            # One rounding of the largest sum is nobody's error.
            worse = 16 if is_cut else 2
            allowed = worse * Error.between(plain, exact).largest + 4 * torch.finfo(made).eps
            assert Error.between(logits, exact).largest <= allowed


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 31, 33, 70_001])
def test_sizes_of_accumulate(kernel, count, dtype):
    """A sum of fp32 and a product is rounded once, however many there are."""
    product = torch.linspace(-3.0, 3.0, count).to(dtype)
    # Subnormal, infinite and NaN halves are numbers like others.
    for place, value in enumerate((6e-8, torch.inf, torch.nan)):
        product[place * 7 : place * 7 + 1] = value
    total = torch.linspace(1.0, -2.0, count)
    run = operators.launcher(kernel.backend, "accumulate")
    for is_first in (False, True):
        found = total.clone().to(kernel.device)
        if is_first:
            found.fill_(torch.nan)
        run(found, product.to(kernel.device), is_first)
        expected = product.double() + (0.0 if is_first else total.double())
        torch.testing.assert_close(
            found.cpu().double(), expected, rtol=2e-7, atol=2e-7, equal_nan=True
        )


@grid(live=[1, 2, 3, 5])
def test_confident_tokens_in_products_of_other_rows(kernel, live):
    """Backward forms logits again, of fewer rows: libraries then add up in another order."""
    generator = torch.Generator().manual_seed(live)
    rows, size, vocabulary = 64, 256, 100
    weight = torch.randn((vocabulary, size), generator=generator)
    weight *= 4 / weight.norm(dim=1, keepdim=True)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    hidden = weight[ids] / 16 * 20 + 0.3 * torch.randn((rows, size), generator=generator)
    upstream = (torch.arange(rows) < live).float()

    def gradient(dtype, log_probs):
        leaf = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad((log_probs(leaf) * upstream.to(leaf)).sum(), leaf)[0]

    def formed(leaf):
        logits = leaf @ weight.to(leaf).t()
        return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    def kept(leaf):
        leaf = leaf.to(kernel.device)
        found = linear_token_log_probs(
            leaf, weight.to(leaf), ids.to(leaf.device), backend=kernel.backend
        )
        return found.cpu()

    exact = gradient(torch.float64, formed)
    scale = exact.abs().max()
    assert scale < 1e-2
    unfused = (gradient(torch.float32, formed) - exact).abs().max()
    assert (gradient(torch.float32, kept) - exact).abs().max() <= 2 * unfused + 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_autocast_leaves_double_precision(target, dtype):
    """So does `torch.nn.functional.linear`. No product inside is cast twice."""
    case = head_case(12).to(dtype, target.device)
    with torch.no_grad():
        with torch.autocast(target.device, torch.bfloat16):
            found = linear_token_log_probs(
                case.hidden, case.weight, case.token_ids, mask=case.mask, backend=target.backend
            )
        if dtype == torch.float32:
            case.hidden, case.weight = case.hidden.bfloat16(), case.weight.bfloat16()
        exact = case.to(torch.float64, target.device)
        expected = linear_token_log_probs(
            exact.hidden, exact.weight, exact.token_ids, mask=exact.mask, backend="reference"
        )
    assert found.dtype == dtype
    allowed = 1e-12 if dtype == torch.float64 else 1e-5
    assert Error.between(found, expected).largest <= allowed


def test_autocast_around_backward_alone(kernel):
    """Changes nothing: the products are those of the forward pass."""
    case = head_case(12).to(torch.float32, kernel.device)
    found = []
    for enabled in (False, True):
        log_probs = linear_token_log_probs(
            case.hidden,
            case.weight,
            case.token_ids,
            bias=case.bias,
            mask=case.mask,
            backend=kernel.backend,
        )
        with torch.autocast(kernel.device, torch.bfloat16, enabled=enabled):
            loss = log_probs.square().sum()
            found.append(torch.autograd.grad(loss, (case.hidden, case.weight, case.bias)))
    for plain, autocast in zip(*found, strict=True):
        assert torch.equal(plain, autocast)


def test_the_default_dtype_has_no_say_in_sums():
    """Those of a head in fp16 over slices of the vocabulary on a CPU, above all."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (
        torch.randn(4, 16, generator=generator),
        torch.randn(9000, 16, generator=generator),
    )
    found = []
    for default in (torch.float32, torch.bfloat16, torch.float64):
        leaf = hidden.half().requires_grad_()
        torch.set_default_dtype(default)
        try:
            linear_token_log_probs(leaf, weight.half(), torch.arange(4)).sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(leaf.grad)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("vocabulary", [1000, 151_936, 10**7])
def test_rows_of_a_chunk_are_a_share_of_the_memory(monkeypatch, backend, vocabulary):
    """A bf16 head takes 256 MiB of a CPU or a sixteenth of a GPU, and at least 128 rows."""
    device, budget = "cpu", 256 * 2**20
    if backend == "triton":
        device, budget = "cuda", 5 * 10**9
        properties = SimpleNamespace(total_memory=16 * budget)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    # Stands for a tensor, as there need be no GPU.
    weight = MagicMock(device=torch.device(device), dtype=torch.bfloat16)
    weight.__len__.return_value = vocabulary
    head = Head(weight, None, None, 1.0, 0.0, backend)
    rows = check_chunk(None, 10**9, head)
    assert rows % 64 == 0
    assert rows >= 128
    row = vocabulary * logits_dtype(backend, torch.bfloat16).itemsize
    assert rows == 128 or budget - 64 * row < rows * row <= budget
    assert check_chunk(None, 5, head) == 5
