"""token_log_probs: gradients in the memory of the logits, or of the slice that they are."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from grids import grid
from head_cases import new_tensors
from logit_cases import DTYPES, draw, fused, on, upstream

from steppo_kernels import token_log_probs


@grid(dtype=DTYPES)
def test_inplace_backward(kernel, dtype):
    """The same gradient to the last bit, in the memory of the logits; and only once."""
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
    """Where autograd cannot be passed by, its own path gives the same result."""
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


def leaf_and_loss(kernel, part="next token", *, inplace=True, is_leaf=True, look=None):
    """A tensor, and a loss of its slice; `look` is given both before the loss is."""
    draws = torch.Generator().manual_seed(3)
    leaf = torch.randn((3, 6, 29), generator=draws).to(kernel.device).requires_grad_()
    whole = leaf if is_leaf else leaf * 1.0
    logits = _SLICES[part](whole)
    if look is not None:
        look(whole, logits)
    ids = torch.arange(logits.shape[:-1].numel(), device=kernel.device) % 29
    found = fused(kernel.backend, inplace_backward=inplace)(logits, ids.view(logits.shape[:-1]))
    return leaf, whole, logits, (found[0] ** 2 + found[1]).sum()


@pytest.mark.parametrize("part", _SLICES)
def test_inplace_backward_of_a_slice_of_a_leaf(kernel, part):
    """Its `grad` is in its own memory, as where nothing is sliced; and adds up with another."""
    expected, *_, loss = leaf_and_loss(kernel, part, inplace=False)
    loss.backward()
    leaf, *_, loss = leaf_and_loss(kernel, part)
    with new_tensors() as sizes:
        loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected.grad)
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    if kernel.backend == "cpu":  # the interpreter makes tensors of its own
        assert max(sizes) < leaf.numel()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    again, *_, loss = leaf_and_loss(kernel, part)
    again.grad = torch.ones_like(again)
    loss.backward()
    assert torch.equal(again.grad, expected.grad + 1.0)


def test_inplace_backward_calls_the_hooks_of_a_sliced_leaf(kernel):
    expected, *_, loss = leaf_and_loss(kernel, inplace=False)
    loss.backward()
    seen = []
    leaf, *_, loss = leaf_and_loss(kernel)
    leaf.register_hook(lambda grad: seen.append(grad.clone()))
    leaf.register_hook(lambda grad: grad * 2)
    leaf.register_post_accumulate_grad_hook(lambda holder: seen.append(holder.grad.clone()))
    loss.backward()
    assert torch.equal(seen[0], expected.grad)
    assert torch.equal(seen[1], expected.grad * 2)
    assert torch.equal(leaf.grad, seen[1])


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("why", ["hook", "retain_grad"])
def test_inplace_backward_shows_the_gradient_of_a_slice(kernel, why, when, is_leaf):
    """Whoever looks at the slice sees its gradient, and may replace it, even after the forward."""
    seen = []

    def look(_, logits):
        if why == "hook":
            logits.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
        else:
            logits.retain_grad()

    expected, *_, loss = leaf_and_loss(kernel, inplace=False, is_leaf=is_leaf)
    loss.backward()
    leaf, whole, logits, loss = leaf_and_loss(
        kernel, is_leaf=is_leaf, look=look if when == "before" else None
    )
    if when == "after":
        look(whole, logits)
    loss.backward()
    found = seen[0] if why == "hook" else logits.grad
    assert torch.equal(found, expected.grad[:, :-1])
    assert torch.equal(leaf.grad, expected.grad * (2 if why == "hook" else 1))


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
def test_inplace_backward_calls_hooks_between_a_slice_and_its_whole(kernel, is_leaf):
    """No gradient goes that way. Their hooks hear of that, and are not left out."""
    expected, *_, loss = leaf_and_loss(kernel, "of a slice", inplace=False, is_leaf=is_leaf)
    loss.backward()
    leaf, _, logits, loss = leaf_and_loss(kernel, "of a slice", is_leaf=is_leaf)
    seen = []
    logits.grad_fn.register_prehook(lambda grads: seen.append(grads))
    logits.grad_fn.next_functions[0][0].register_prehook(lambda grads: seen.append(grads))
    loss.backward()
    assert seen == [(None,), (None,)]
    assert torch.equal(leaf.grad, expected.grad)


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
def test_inplace_backward_to_a_slice_alone(kernel, is_leaf):
    leaf, *_, loss = leaf_and_loss(kernel, inplace=False, is_leaf=is_leaf)
    (expected,) = torch.autograd.grad(loss, leaf)
    _, whole, logits, loss = leaf_and_loss(kernel, is_leaf=is_leaf)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, expected[:, :-1])
    assert grad.data_ptr() == whole.data_ptr()
    _, whole, _, loss = leaf_and_loss(kernel, is_leaf=is_leaf)
    (grad,) = torch.autograd.grad(loss, whole)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == whole.data_ptr()


def test_inplace_backward_of_a_slice_without_a_graph(kernel):
    """A slice that was taken of what has none is a leaf of its own."""
    leaf, *_, loss = leaf_and_loss(kernel, inplace=False)
    (expected,) = torch.autograd.grad(loss, leaf)
    ids = torch.arange(15, device=kernel.device).view(3, 5) % 29
    with torch.no_grad():
        assert not token_log_probs(
            leaf[:, :-1], ids, inplace_backward=True, backend=kernel.backend
        ).requires_grad
    logits = leaf.detach()[:, :-1].requires_grad_()
    found = fused(kernel.backend, inplace_backward=True)(logits, ids)
    (found[0] ** 2 + found[1]).sum().backward()
    assert torch.equal(logits.grad, expected[:, :-1])
    assert leaf.grad is None


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


@pytest.mark.parametrize(
    "cut",
    [lambda z: z, lambda z: z[:, :-1], lambda z: z[1]],
    ids=["whole", "next token", "one row"],
)
@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
def test_hooks_that_return_logits_in_another_layout(kernel, cut, inplace):
    """A gradient in the place of a copy is the gradient all the same."""

    def turned(value):
        if value.dim() < 2:
            return value
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)

    logits = torch.randn((2, 4, 7), generator=torch.Generator().manual_seed(4)).to(kernel.device)
    ids = cut(torch.arange(8, device=kernel.device).view(2, 4) % 7)
    hooks = torch.autograd.graph.saved_tensors_hooks
    found = []
    for way in (nullcontext(), hooks(turned, lambda kept: kept), hooks(lambda kept: kept, turned)):
        leaf = logits.clone().requires_grad_()
        with way:
            log_probs = token_log_probs(
                cut(leaf * 1.0), ids, inplace_backward=inplace, backend=kernel.backend
            )
        (log_probs**2).sum().backward()
        found.append(leaf.grad)
    assert found[0].any()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)
