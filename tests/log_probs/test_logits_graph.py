"""token_log_probs in autograd's graph and in compiled ones: what it notices and allocates."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from graphs import in_one_graph
from head_cases import new_tensors
from logit_cases import draw, fused, on

from steppo_kernels import token_log_probs


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
        expected = torch.autograd.grad(log_probs.sum(), leaf, retain_graph=True)[0]
        with torch.no_grad():
            changed.fill_(1)
        if changed is mask and mask.device.type != "cpu":
            # There it is copied, so that its bytes need no look.
            assert torch.equal(torch.autograd.grad(log_probs.sum(), leaf)[0], expected)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                log_probs.sum().backward()


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


def step(logits, ids, mask, temperature, backend, inplace=False):
    # A leaf cannot be written to; the output of a model can.
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
    if target.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
    if target.backend == "reference" and inplace:
        pytest.skip("the reference does nothing in place")
    torch._dynamo.reset()
    compiled = in_one_graph(step)
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


@pytest.mark.unpoisoned
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
def test_compiled_autograd(is_leaf):
    """It traces a backward in place of a graph that was recorded without a compiler."""
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")

    def gradient(context):
        torch._dynamo.reset()
        leaf = draw(1, 18, 29)[0].float().view(3, 6, 29).requires_grad_()
        whole = leaf if is_leaf else leaf * 1.0
        ids = torch.arange(15).view(3, 5)
        found = token_log_probs(whole[:, :-1], ids, inplace_backward=True, backend="cpu")
        with context:
            found.square().sum().backward()
        return leaf.grad

    # AOTAutograd does not take a leaf beside views of it.
    compiler = functools.partial(torch.compile, backend="eager")
    found = gradient(compiled_autograd._enable(compiler))
    torch.testing.assert_close(found, gradient(contextlib.nullcontext()))
