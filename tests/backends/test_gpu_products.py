"""Products of halves that stay in fp32: what tells whether torch forms them rightly."""

from __future__ import annotations

import pytest
import torch
from batches import Error
from products_in_fp32 import HALVES, emulate

from steppo_kernels.backends.gpu import products

_CPU = torch.device("cpu")


def product(left, right):
    return left.float() @ right.float()


def refusing(error):
    def run(*_):
        raise error

    return run


def contiguous(left):
    """Read memory as if no number were left out."""
    return left.as_strided(left.shape, (1, len(left)))


def wrong_sums():
    """What adds a product to a sum with a fault, by the fault."""
    return {
        "rounds the product": lambda out, a, b: out.add_(product(a, b).to(a.dtype)),
        "rounds the sum": lambda out, a, b: out.copy_(out.add_(product(a, b)).to(a.dtype)),
        "forgets the sum": lambda out, a, b: out.copy_(product(a, b)),
        "adds it twice": lambda out, a, b: out.mul_(2).add_(product(a, b)),
        "takes rows for contiguous": lambda out, a, b: out.add_(product(contiguous(a), b)),
        "does nothing": lambda out, a, b: None,
        "is not there": refusing(NotImplementedError("no kernel")),
        "does not know the option": refusing(TypeError("unexpected keyword argument")),
    }


def wrong_rows():
    """What adds a row to a product with a fault."""
    return {
        "rounds the product": lambda out, a, b, r: out.copy_(product(a, b).to(a.dtype) + r),
        "rounds the sum": lambda out, a, b, r: out.copy_((product(a, b) + r).to(a.dtype)),
        "forgets the row": lambda out, a, b, r: out.copy_(product(a, b)),
        "adds one number": lambda out, a, b, r: out.copy_(product(a, b) + r[0]),
        "adds it to the first row": lambda out, a, b, r: out.copy_(product(a, b))[0].add_(r),
        "reads other bits": lambda out, a, b, r: out.copy_(
            product(a, b) + r.repeat(2).view(torch.float32)
        ),
        "forgets it where rows are padded": lambda out, a, b, r: out.copy_(
            product(a, b) + (r if out.is_contiguous() else 0)
        ),
        "forgets it where they are not": lambda out, a, b, r: out.copy_(
            product(a, b) + (0 if out.is_contiguous() else r)
        ),
        "does nothing": lambda out, a, b, r: None,
        "is not there": refusing(RuntimeError("self and mat2 must have the same dtype")),
    }


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", wrong_sums())
def test_a_wrong_sum_is_noticed(name, dtype):
    assert not products.is_exact_sum(wrong_sums()[name], _CPU, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", wrong_rows())
def test_a_wrong_row_is_noticed(name, dtype):
    assert not products.is_exact_row(wrong_rows()[name], _CPU, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_right_passes(monkeypatch, dtype):
    emulate(monkeypatch)
    assert products.is_exact_sum(lambda out, a, b: out.add_(product(a, b)), _CPU, dtype)
    assert products.is_exact_row(lambda out, a, b, r: out.copy_(product(a, b) + r), _CPU, dtype)
    assert products.is_exact_sum(products.add, _CPU, dtype)
    assert products.is_exact_row(products._add_row, _CPU, dtype)


def test_a_full_device_is_no_answer():
    run = refusing(torch.OutOfMemoryError("full"))
    for ask in (products.is_exact_sum, products.is_exact_row):
        with pytest.raises(torch.OutOfMemoryError):
            ask(run, _CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("answer", "asked"),
    [(products.adds_products, "is_exact_sum"), (products.adds_rows, "is_exact_row")],
    ids=["sum", "row"],
)
def test_a_device_is_asked_once(monkeypatch, answer, asked):
    answer.cache_clear()
    # A CPU has no such products.
    assert not answer(_CPU, torch.bfloat16)
    answer.cache_clear()
    runs = []
    monkeypatch.setattr(products, asked, lambda *given: runs.append(given) or True)
    monkeypatch.setattr(products, "KEEPS_FP32", True)
    assert all(answer(_CPU, torch.bfloat16) for _ in range(2))
    assert len(runs) == 1
    answer.cache_clear()
    monkeypatch.setattr(products, "KEEPS_FP32", False)
    assert not answer(_CPU, torch.bfloat16)
    answer.cache_clear()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_bias_is_added_with_the_product_or_after_it(monkeypatch, is_fused, dtype):
    emulate(monkeypatch)
    monkeypatch.setattr(products, "adds_rows", lambda *_: is_fused)
    generator = torch.Generator().manual_seed(1)
    left, right, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 64), (33, 64), (33,))
    )
    exact = left.double() @ right.double().t()
    for given, expected in ((None, exact), (bias, exact + bias.double())):
        out = torch.full((5, 33), torch.nan)
        products.multiply(out, left, right.t(), given)
        assert Error.between(out, expected).largest <= 1e-6
