"""Any upstream gradient, more backward passes than one, gradients and losses changed in place."""

from __future__ import annotations

import pytest
import torch
from batches import random_batch
from functions_of_steps import TERMS, close, losses
from grids import grid
from methods import FEW, METHODS


@grid(
    cover=1,
    method=METHODS,
    upstream=["scaled", "argument", "divided", "negative", "zero"],
    interpreted={"method": FEW},
)
def test_any_upstream_gradient(target, method, upstream):
    batch = random_batch(9, 6, 30, ratio=method.ratio, dtype=torch.float64, device=target.device)
    config = method.config(**TERMS)
    pairs = zip(losses(batch, target, config), losses(batch, target, config), strict=True)
    for (loss, inputs), (again, inputs_again) in pairs:
        plain = torch.autograd.grad(again, inputs_again)
        if upstream == "argument":
            factor, found = 3.0, torch.autograd.grad(loss, inputs, torch.full_like(loss, 3.0))
        else:
            factor = {"divided": 1 / 7, "scaled": 65536.0, "negative": -1.0, "zero": 0.0}[upstream]
            (loss * factor).backward()
            found = [value.grad for value in inputs]
        for grad, value in zip(found, plain, strict=True):
            # A parabola's gradients reach 1e7 here.
            size = max(1.0, float(value.abs().max()))
            close(grad / size, value * (factor / size))


@grid(method=METHODS, interpreted={"method": FEW})
def test_second_backward(target, method):
    """With retain_graph, once more and once more."""
    batch = random_batch(10, 6, 30, ratio=method.ratio, device=target.device)
    for loss, inputs in losses(batch, target, method.config(**TERMS)):
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs, retain_graph=True)
        loss.backward()
        for value, *grads in zip(inputs, first, second, strict=True):
            assert all(torch.equal(grad, value.grad) for grad in grads)


def test_gradients_accumulate_and_do_not_share_memory(target):
    batch = random_batch(10, 6, 30, device=target.device)
    for loss, inputs in losses(batch, target):
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        kept = [grad.clone() for grad in first]
        for grad in first:
            grad.fill_(torch.nan)
        second = torch.autograd.grad(loss, inputs)
        for grad, value in zip(second, kept, strict=True):
            assert torch.equal(grad, value)


def test_gradients_may_be_clipped_between_backward_passes(target):
    """Changes of .grad in place stay there: it is no part of the graph."""
    batch = random_batch(10, 6, 30, device=target.device)
    for loss, inputs in losses(batch, target):
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        loss.backward(retain_graph=True)
        for value in inputs:
            value.grad.mul_(0.5)
        loss.backward(retain_graph=True)
        for value, grad in zip(inputs, first, strict=True):
            assert torch.equal(value.grad, 0.5 * grad + grad)
            value.grad.zero_()
        for _ in range(3):
            loss.backward(retain_graph=True)
        for value, grad in zip(inputs, first, strict=True):
            assert torch.equal(value.grad, grad + grad + grad)


def test_loss_modified_in_place(target):
    """Trainers add the losses of micro-batches in place, and divide them."""
    batch = random_batch(11, 6, 30, dtype=torch.float64, device=target.device)
    pairs = zip(losses(batch, target), losses(batch, target), strict=True)
    for (loss, inputs), (again, inputs_again) in pairs:
        plain = torch.autograd.grad(again, inputs_again)
        value = loss.item()
        loss += 2.5
        loss *= 3.0
        loss /= 4.0
        assert loss.item() == pytest.approx((value + 2.5) * 0.75)
        loss.backward()
        for grad, expected in zip((x.grad for x in inputs), plain, strict=True):
            close(grad, expected * 0.75)
