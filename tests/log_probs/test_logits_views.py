"""token_log_probs: logits of any strides, shapes, dtypes and sizes."""

from __future__ import annotations

import math

import pytest
import torch
from batches import Error
from grids import grid
from logit_cases import DTYPES, assert_same_rows, draw, fused, on, plain, results, upstream

from steppo_kernels import token_log_probs

_VIEWS = {
    "without the last": lambda z: z[:, :-1],
    "without the first": lambda z: z[:, 1:],
    "without the first row": lambda z: z[1:],
    "every other": lambda z: z[:, ::2],
    "part of the vocabulary": lambda z: z[..., 3:-4],
    "rows and columns swapped": lambda z: z.transpose(0, 1),
    "one row": lambda z: z[1, 2],
    "two dimensions": lambda z: z[:, 3],
    "four dimensions": lambda z: z.view(2, 2, 2, -1)[:, :, 1:],
    "an entry that is not contiguous": lambda z: z.transpose(1, 2),
    "every other logit": lambda z: z[..., ::2],
}


@grid(cover=1, view=list(_VIEWS), dtype=[torch.float32, torch.bfloat16])
def test_views_are_as_their_copies(target, view, dtype):
    base = draw(4, 8, 41)[0].to(target.device, dtype).view(2, 4, 41)
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
        assert_same_rows(target, found[name], value, name)


def test_expanded_logits(target):
    logits, ids = on(target, *draw(5, 4, 9))
    one = logits[:1].float().requires_grad_()
    log_probs = token_log_probs(one.expand(4, 9), ids, backend=target.backend)
    exact = plain(one.expand(4, 9), ids)[0]
    torch.testing.assert_close(log_probs, exact)
    weights = torch.arange(1.0, 5.0, device=target.device)
    grads = [torch.autograd.grad(value, one, weights)[0] for value in (log_probs, exact)]
    torch.testing.assert_close(*grads)


def test_many_rows(target):
    if target.emulated:
        pytest.skip("a block a row takes the CPU minutes")
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def test_rows_do_not_depend_on_each_other(target):
    """Batches may be cut anywhere."""
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
            assert_same_rows(target, value, whole[name][begin:end], name)
