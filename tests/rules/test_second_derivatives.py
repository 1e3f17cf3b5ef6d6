"""Differentiating a gradient again gives the right value or an error, never a silent 0."""

from __future__ import annotations

import warnings

import pytest
import torch
from grids import grid
from methods import FEW, METHODS

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    linear_steppo_loss,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
)

_MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
_LAYOUT = StepLayout.from_mask(_MASK)
_CONFIG = StepPOConfig(clip_low=0.5, clip_high=0.5, kl_coef=0.1, entropy_coef=0.1)
_REFUSED = "got a second derivative, expected first ones only"


def _numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 5


def _policy_loss(x, backend, layout=_LAYOUT):
    layout = layout.to(x.device)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=x.device)
    if isinstance(layout, torch.Tensor):
        advantages = broadcast_to_tokens(advantages, _LAYOUT.to(x.device))
    return steppo_loss(
        x,
        _numbers(2, 4).to(x.device),
        advantages,
        layout,
        config=_CONFIG,
        ref_log_probs=_numbers(2, 4).to(x.device),
        entropy=x.detach().square().requires_grad_(),
        backend=backend,
    ).loss


_LOSSES = {
    "steppo_loss": _policy_loss,
    "steppo_loss-mask": lambda x, backend: _policy_loss(x, backend, _MASK),
    "step_value_loss": lambda x, backend: (
        step_value_loss(x, _numbers(3).to(x.device), _LAYOUT.to(x.device), backend=backend).loss
    ),
}


@pytest.fixture(params=_LOSSES)
def loss_of(request):
    """A loss of an fp64 tensor of the token shape."""
    return _LOSSES[request.param]


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
def test_a_gradient_of_a_kernel_is_not_differentiated_again(kernel, loss_of, is_leaf):
    leaf = _numbers(2, 4).to(kernel.device).requires_grad_()
    x = leaf if is_leaf else leaf * 1.5
    loss = loss_of(x, kernel.backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.grad(grad.sum(), leaf, retain_graph=True)
    # A penalty on the gradient is a part of another loss, the rest of which has a derivative.
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.grad(loss + grad.square().sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=_REFUSED):
        (loss + grad.square().sum()).backward()


@grid(
    cover=1,
    method=METHODS,
    depth=["log-probs", "logits", "hidden"],
    by_token={"by-step": False, "by-token": True},
    interpreted={"method": FEW},
)
def test_no_surrogate_has_a_second_derivative(target, masked, method, depth, by_token):
    """From log-probs, logits and hidden states, of kernels and of the reference."""
    device = target.device
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    on_tokens = torch.where(_MASK, _numbers(2, 4), 0.0)
    if masked and not by_token:
        on_tokens = broadcast_to_tokens(advantages, _LAYOUT)
    given = (
        (-2.0 + _numbers(2, 4)).to(device),
        (on_tokens if masked or by_token else advantages).to(device),
        (_MASK if masked else _LAYOUT).to(device),
    )
    options = {"config": method.config(kl_coef=0.1), "ref_log_probs": given[0], **method.center()}
    ids = torch.arange(8, device=device).view(2, 4) % 5
    x = _numbers(2, 4, *{"log-probs": (), "logits": (5,), "hidden": (3,)}[depth]).to(device)
    x.requires_grad_()
    if depth == "log-probs":
        loss = steppo_loss(x - 2.0, *given, **options, backend=target.backend).loss
    elif depth == "logits":
        loss = steppo_loss_from_logits(x, ids, *given, **options, backend=target.backend).loss
    else:
        weight = _numbers(5, 3).to(device)
        loss = linear_steppo_loss(x, weight, ids, *given, **options, backend=target.backend).loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert grad.any()
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(grad.square().sum(), x)


def test_a_hessian_of_a_kernel_raises(kernel, loss_of):
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.functional.hessian(
            lambda x: loss_of(x, kernel.backend), _numbers(2, 4).to(kernel.device)
        )


def test_a_gradient_in_the_upstream_gradient_raises_too(kernel, loss_of):
    x = _numbers(2, 4).to(kernel.device).requires_grad_()
    scale = torch.ones((), dtype=torch.float64, device=kernel.device, requires_grad=True)
    (grad,) = torch.autograd.grad(loss_of(x, kernel.backend) * scale, x, create_graph=True)
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.grad(grad.sum(), scale)


def test_entropy_gets_no_second_derivative_either(kernel):
    entropy = _numbers(2, 4).to(kernel.device).requires_grad_()
    loss = steppo_loss(
        _numbers(2, 4).to(kernel.device),
        None,
        torch.ones(3, dtype=torch.float64, device=kernel.device),
        _LAYOUT.to(kernel.device),
        config=StepPOConfig(entropy_coef=0.1),
        entropy=entropy,
        backend=kernel.backend,
    ).loss
    (grad,) = torch.autograd.grad(loss, entropy, create_graph=True)
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.grad(grad.sum(), entropy)


def test_create_graph_alone_changes_nothing(target, loss_of):
    """A gradient that is not differentiated again is a plain number, also one added up twice."""
    x, y = (_numbers(2, 4).to(target.device).requires_grad_() for _ in range(2))
    for _ in range(2):
        with warnings.catch_warnings():
            # torch warns of a reference cycle, which `x.grad = None` would end.
            warnings.simplefilter("ignore")
            loss_of(x, target.backend).backward(create_graph=True)
        loss_of(y, target.backend).backward()
    assert torch.equal(x.grad.detach(), y.grad)


def test_the_reference_is_right_or_refuses():
    """Its value loss is plain PyTorch; the sums of its policy loss have no second derivative."""
    x = _numbers(2, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: _LOSSES["step_value_loss"](x, "reference"), (x,))
    for name in ("steppo_loss", "steppo_loss-mask"):
        (grad,) = torch.autograd.grad(_LOSSES[name](x, "reference"), x, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            torch.autograd.grad(grad.sum(), x)


def test_steps_to_tokens_have_second_derivatives(target):
    x = _numbers(3).to(target.device).requires_grad_()
    layout = _LAYOUT.to(target.device)
    assert torch.autograd.gradgradcheck(
        lambda x: broadcast_to_tokens(x, layout, backend=target.backend).square(), (x,)
    )


def test_a_compiled_loss_refuses_a_second_derivative():
    x = _numbers(2, 4).requires_grad_()
    compiled = torch.compile(lambda x: _policy_loss(x, "cpu"), backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)
