"""Operators of kept sets where hidden states and sets are longer than a block of a kernel.

One set is much longer than the others.
"""

from __future__ import annotations

import torch
from grids import grid
from kept_cases import mask_of, support_of, taken_from

from steppo_kernels.backends import operators

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.half, "bf16": torch.bfloat16}
_ROUND = {torch.float32: 4e-6, torch.float64: 1e-14, torch.half: 2e-3, torch.bfloat16: 1e-2}
# Rows that begin at multiples of 16 elements, and others.
_SIZES = [1040, 1027]


class Head:
    """A head of some tokens, every one of which a call is about."""

    def __init__(self, target, dtype, size, kind="long", vocabulary=100):
        self.mask = mask_of(kind, 3, vocabulary)
        self.support = support_of(self.mask, target.device)._held
        self.wide = torch.promote_types(dtype, torch.float32)
        generator = torch.Generator().manual_seed(size)
        drawn = torch.randn((3 + vocabulary, size), generator=generator).to(dtype)
        self.grad = torch.randn(self.mask.shape, generator=generator).to(self.wide) * self.mask
        self.hidden, self.weight = drawn.to(target.device).split([3, vocabulary])
        self.pairs = self.grad[self.mask].to(target.device)
        self.rows = torch.arange(3, device=target.device)

    def logits(self, run):
        found = torch.full_like(self.pairs, torch.nan)
        run("kept_logits", found, self.hidden, self.weight, None, self.rows, self.support.sets, ())
        return found


def runner(target):
    return lambda name, *args: operators.launcher(target.backend, name)(*args)


def assert_sum(found, left, right, tolerance):
    """Compare with the product of two matrices, relative to the sizes of what is added up."""
    left, right = left.double().cpu(), right.double().cpu()
    error = (found.double().cpu() - left @ right).abs()
    number = torch.finfo(found.dtype)
    least = number.eps * number.smallest_normal
    assert (error <= tolerance * (left.abs() @ right.abs()) + least).all()


@grid(cover=1, dtype=_DTYPES, size=_SIZES)
def test_products_of_long_rows(kernel, dtype, size):
    head, run = Head(kernel, dtype, size), runner(kernel)
    logits = torch.zeros(head.mask.shape, dtype=torch.float64)
    logits[head.mask] = head.logits(run).double().cpu()
    hidden, weight = head.hidden.double().cpu(), head.weight.double().cpu()
    sizes = hidden.abs() @ weight.abs().t()
    exact = (hidden @ weight.t()).masked_fill(~head.mask, 0.0)
    assert ((logits - exact).abs() <= _ROUND[head.wide] * sizes).all()

    grad_hidden = torch.full_like(head.hidden, torch.nan)
    run("kept_hidden_gradient", grad_hidden, head.pairs, head.weight, head.rows, head.support.sets)
    assert_sum(grad_hidden, head.grad, weight, _ROUND[dtype])

    index = head.support.by_id
    grad_weight = torch.full((len(index.ids), size), torch.nan, dtype=dtype, device=kernel.device)
    grad_bias = torch.full_like(grad_weight[:, 0], torch.nan, dtype=head.wide)
    run("kept_weight_gradient", grad_weight, grad_bias, head.pairs, head.hidden, index, True)
    of_ids = head.grad.t()[index.ids.long().cpu()]
    assert_sum(grad_weight, of_ids, hidden, _ROUND[dtype])
    assert_sum(grad_bias[:, None], of_ids, torch.ones(3, 1), _ROUND[head.wide])


def test_products_do_not_depend_on_the_programs_that_share_them(kernel, monkeypatch):
    """A program of Triton's takes more than one block of a set that is longer than the others."""
    head = Head(kernel, torch.bfloat16, 40)
    found = head.logits(runner(kernel))
    if kernel.backend == "triton":
        from steppo_kernels.backends.triton import kept_head

        monkeypatch.setattr(kept_head, "_PROGRAMS", 1)
    assert torch.equal(head.logits(runner(kernel)), found)


@grid(dtype={"fp32": torch.float32, "fp64": torch.float64}, kind=["long", "full"])
def test_log_probs_of_long_sets(kernel, dtype, kind):
    head, run = Head(kernel, dtype, 1, kind, 1100), runner(kernel)
    z = head.hidden.double().cpu() @ head.weight.double().cpu().t()
    logits, ids = z[head.mask].to(kernel.device, dtype), taken_from(head.mask)
    places = head.support.places(ids.to(kernel.device), head.rows)
    call = places, head.rows, head.support.sets, None, 0.7, 0.0
    log_probs, entropy, top, log_sum = run("kept_log_probs", logits, *call, True)
    dense = torch.full(head.mask.shape, -torch.inf, dtype=torch.float64)
    dense[head.mask] = logits.double().cpu()
    log_p = (dense / 0.7).log_softmax(1)
    p = log_p.exp()
    exact = -(p * log_p.masked_fill(~head.mask, 0.0)).sum(1)
    chosen = log_p.gather(1, ids[:, None]).squeeze(1)
    tolerance = {torch.float32: 4e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(log_probs.double().cpu(), chosen, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double().cpu(), exact, rtol=tolerance, atol=tolerance)

    c = torch.tensor([1.0, 0.0, -2.0], dtype=dtype)
    e = torch.tensor([0.5, 0.0, 0.0], dtype=dtype)
    given = c.to(kernel.device), e.to(kernel.device)
    run("kept_log_probs_backward", logits, logits, *call, top, log_sum, entropy, *given)
    of_token = torch.nn.functional.one_hot(ids, head.mask.shape[1]) - p
    of_entropy = p * (log_p.masked_fill(~head.mask, 0.0) + exact[:, None])
    wanted = (c.double()[:, None] * of_token - e.double()[:, None] * of_entropy) / 0.7
    torch.testing.assert_close(
        logits.double().cpu(), wanted[head.mask], rtol=tolerance, atol=tolerance
    )
