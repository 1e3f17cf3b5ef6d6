"""The gradient of the head's weight over chunks, in each of its ways, on a CPU."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from batches import Error
from grids import grid
from head_cases import head_case, new_tensors, plain_log_probs, plain_loss, products
from products_in_fp32 import HALVES, emulate

from steppo_kernels import StepPOConfig, linear_steppo_loss, linear_token_log_probs
from steppo_kernels.log_probs import lm_head, weight_gradient
from steppo_kernels.log_probs.weight_gradient import (
    CPU_SLICE,
    GPU_SLICE,
    KeptRows,
    OneProduct,
    Sum,
    add_alike,
    add_in_fp32,
    add_rounded,
)


def chunks_of(dtype, rows, vocabulary, size):
    """Gradients of chunks, each in the memory of the one before, and hidden states."""
    generator = torch.Generator().manual_seed(sum(rows))
    memory = torch.empty((max(rows, default=0), 2 * vocabulary), dtype=dtype)
    for count in rows:
        memory.fill_(torch.nan)
        grad_logits = memory[:count, :vocabulary]
        grad_logits.copy_(torch.randn((count, vocabulary), generator=generator))
        yield grad_logits, torch.randn((count, size), generator=generator).to(dtype)


def ways(weight, backend):
    """Every way to add up several chunks: the last two have too many rows to keep."""
    if weight.dtype not in HALVES:
        return {"alike": Sum(weight, add_alike, 50)}

    def rounded():
        return Sum(weight, functools.partial(add_rounded, backend), 50)

    def in_fp32():
        is_there = weight_gradient.products.adds_products(weight.device, weight.dtype)
        return Sum(weight, add_in_fp32, 50) if is_there else rounded()

    return {
        "rounded": rounded(),
        "in fp32": in_fp32(),
        "kept": KeptRows(weight, 60, in_fp32),
        "kept, then in fp32": KeptRows(weight, 30, in_fp32),
        "too many at once": KeptRows(weight, 1, in_fp32),
    }


_NAMES = ("rounded", "in fp32", "kept", "kept, then in fp32", "too many at once")
_WAYS = [
    ("alike", torch.float32),
    ("alike", torch.float64),
    *itertools.product(_NAMES, HALVES),
]


@pytest.mark.parametrize(("name", "dtype"), _WAYS, ids=str)
@pytest.mark.parametrize("rows", [(), (20,), (20, 9, 31)], ids=str)
def test_chunks_add_up(monkeypatch, name, rows, dtype):
    """The error is that of plain PyTorch's one product, or that of rounding the sum once."""
    monkeypatch.setattr(weight_gradient, "GPU_SLICE", 50)
    emulate(monkeypatch)
    weight = torch.empty((131, 24), dtype=dtype)
    found = ways(weight, "cpu")[name]
    given = []
    for grad_logits, hidden in chunks_of(dtype, rows, *weight.shape):
        found.add(grad_logits, hidden)
        given.append((grad_logits.clone(), hidden))
    total = found.finish()
    assert total.shape == weight.shape
    exact = sum((g.double().t() @ h.double() for g, h in given), torch.zeros(weight.shape).double())
    if not rows:
        assert not total.any()
        return
    plain = torch.cat([g for g, _ in given]).t() @ torch.cat([h for _, h in given])
    # The rounding of each product is one more error than plain PyTorch has.
    allowed = Error.between(plain, exact).rms * (2 if name == "rounded" else 1.05)
    assert Error.between(total.to(dtype), exact).rms <= allowed


def test_the_only_chunk_is_one_product():
    weight = torch.empty((131, 24), dtype=torch.bfloat16)
    for slice_rows in (131, 50):
        one = OneProduct(weight, slice_rows)
        ((grad_logits, hidden),) = chunks_of(torch.bfloat16, (20,), *weight.shape)
        one.add(grad_logits, hidden)
        assert torch.equal(one.finish(), grad_logits.t() @ hidden)
    assert not OneProduct(weight, 131).finish().any()
    with pytest.raises(AssertionError, match="a second chunk"):
        one.add(grad_logits, hidden)


def test_kept_rows_are_multiplied_once_without_a_sum():
    weight = torch.empty((131, 24), dtype=torch.bfloat16)
    chunks = [(g.clone(), h) for g, h in chunks_of(torch.bfloat16, (20, 9, 31), *weight.shape)]
    with products() as counter, new_tensors() as sizes:
        kept = KeptRows(weight, 60, lambda: pytest.fail("a sum"))
        for grad_logits, hidden in chunks:
            kept.add(grad_logits, hidden)
        assert counter.operations == 0
        kept.finish()
    assert counter.operations == 2 * 60 * weight.numel()
    assert max(sizes) == 60 * 131


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_way_is_chosen_by_device_dtype_and_number_of_rows(monkeypatch, device, adds):
    """A stand-in for a weight, as there need be no GPU."""
    is_gpu, vocabulary, size = device == "cuda", 100_000, 64
    monkeypatch.setattr(weight_gradient, "gradient", lambda *_: None)
    monkeypatch.setattr(weight_gradient.products, "adds_products", lambda *_: adds)
    whole, part = (vocabulary, GPU_SLICE) if is_gpu else (CPU_SLICE, CPU_SLICE)

    def chosen(dtype, num_chunks, num_rows=None, takes_units=False):
        weight = SimpleNamespace(
            shape=(vocabulary, size), dtype=dtype, device=torch.device(device), is_cuda=is_gpu
        )
        return weight_gradient.weight_gradient(
            weight, "triton", num_chunks, num_rows, takes_units=takes_units
        )

    def is_sum(found, add, slice_rows):
        assert type(found) is Sum
        made = found._add.func if isinstance(found._add, functools.partial) else found._add
        assert (made, found._slice) == (add, slice_rows)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one = chosen(dtype, 1)
        assert (type(one), one._slice) == (OneProduct, whole)
        assert type(chosen(dtype, 0)) is OneProduct
    is_sum(chosen(torch.float32, 2), add_alike, whole)
    is_sum(chosen(torch.float64, 2), add_alike, whole)
    is_sum(chosen(torch.float16, 1, takes_units=True), add_alike, part)
    adder, rows = (add_rounded, part)
    if is_gpu and adds:
        adder, rows = (add_in_fp32, whole)
    for dtype in HALVES:
        is_sum(chosen(dtype, 2, size + 1), adder, rows)
        for num_rows in (None, size):
            found = chosen(dtype, 2, num_rows)
            if is_gpu:
                assert type(found) is KeptRows
                assert found._most_rows == size
                found = found._make_sum()
            is_sum(found, adder, rows)


# Wide: what a rounding error clips is not what is measured here.
_CONFIG = StepPOConfig(clip_low=0.9, clip_high=9.0)


@grid(cover=1, name=_NAMES, dtype=[torch.bfloat16, torch.float16])
def test_gradients_of_the_head_in_every_way(monkeypatch, kernel, name, dtype):
    """Chunks of a loss and of log-probs; the error is at most that of plain PyTorch."""
    monkeypatch.setattr(weight_gradient, "GPU_SLICE", 50)
    emulate(monkeypatch)
    asked = []

    def given(weight, backend, num_chunks, num_rows, *, takes_units):
        asked.append(num_chunks)
        # Units take another way: products are formed in fp32 then.
        return Sum(weight, add_alike, 50) if takes_units else ways(weight, backend)[name]

    monkeypatch.setattr(lm_head, "weight_gradient", given)
    exact = head_case(8, 2, 20, 64, 131, sharp=4.0)
    # Some steps are dead.
    exact.advantages[::3] = 0.0
    upstream = torch.linspace(1.0, -1.0, exact.mask.numel()).view(exact.mask.shape)
    upstream = upstream.to(kernel.device)

    def gradient(case, run):
        return case.gradients(run(case), "weight")["grad_weight"]

    def fused_loss(case):
        return linear_steppo_loss(
            case.hidden,
            case.weight,
            case.token_ids,
            case.old_log_probs,
            case.advantages,
            case.layout,
            config=_CONFIG,
            chunk_tokens=12,
            backend=kernel.backend,
        ).loss

    def fused_log_probs(case):
        found = linear_token_log_probs(
            case.hidden,
            case.weight,
            case.token_ids,
            mask=case.mask,
            chunk_tokens=9,
            backend=kernel.backend,
        )
        return (found * upstream).sum()

    def plain_upstream(case):
        return (plain_log_probs(case)[0] * upstream.to(case.hidden.dtype)).sum()

    for fused, plain in (
        (fused_loss, lambda case: plain_loss(case, {}, config=_CONFIG).loss),
        (fused_log_probs, plain_upstream),
    ):
        expected = gradient(exact.to(torch.float64, kernel.device), plain)
        unfused = gradient(exact.to(dtype, kernel.device), plain)
        found = gradient(exact.to(dtype, kernel.device), fused)
        assert Error.between(found, expected).rms <= Error.between(unfused, expected).rms, (
            fused.__name__
        )
    assert min(asked) > 1
