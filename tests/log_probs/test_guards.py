"""What backward cannot do right raises: second derivatives, changed inputs, batches of gradients.

What is the same Python for all kernels is tested with those of one backend.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    linear_token_log_probs,
    steppo_loss_from_logits,
    token_log_probs,
)

_MASK = torch.tensor([[1, 0, 1]], dtype=torch.bool)
_LAYOUT = StepLayout.from_mask(_MASK)
_CONFIG = StepPOConfig(clip_low=0.5, clip_high=0.5, entropy_coef=0.1)
_REFUSED = "got a second derivative, expected first ones only"
_CHANGED = "modified by an inplace operation"


def numbers(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _token_log_probs(x, given, backend):
    log_probs, entropy = token_log_probs(
        x,
        given["token_ids"],
        temperature=given["temperature"],
        mask=given["mask"],
        return_entropy=True,
        backend=backend,
    )
    return (log_probs + entropy).square().sum()


def _from_logits(x, given, backend):
    return steppo_loss_from_logits(
        x,
        given["token_ids"],
        numbers(1, 3).to(x),
        numbers(2).to(x),
        _LAYOUT.to(x.device),
        temperature=given["temperature"],
        config=_CONFIG,
        backend=backend,
    ).loss


def _linear_token_log_probs(x, given, backend):
    log_probs, entropy = linear_token_log_probs(
        x,
        given["weight"],
        given["token_ids"],
        bias=given["bias"],
        temperature=given["temperature"],
        mask=given["mask"],
        return_entropy=True,
        chunk_tokens=1,
        backend=backend,
    )
    return (log_probs + entropy).square().sum()


def _linear_steppo_loss(x, given, backend):
    return linear_steppo_loss(
        x,
        given["weight"],
        given["token_ids"],
        numbers(1, 3).to(x),
        numbers(2).to(x),
        _LAYOUT.to(x.device),
        bias=given["bias"],
        temperature=given["temperature"],
        config=_CONFIG,
        backend=backend,
    ).loss


_LOSSES = {
    "token_log_probs": _token_log_probs,
    "steppo_loss_from_logits": _from_logits,
    "linear_token_log_probs": _linear_token_log_probs,
    "linear_steppo_loss": _linear_steppo_loss,
}


@pytest.fixture(params=_LOSSES)
def loss_of(request):
    """A loss of fp64 logits or hidden states ``[1, 3, 5]``."""
    return _LOSSES[request.param]


def arguments(device, temperature_dtype=torch.float64):
    """Return everything but the logits or hidden states, by name."""
    return {
        "token_ids": torch.tensor([[4, 0, 2]], device=device),
        "mask": _MASK.to(device),
        "temperature": torch.linspace(0.7, 1.3, 3, device=device, dtype=temperature_dtype).view(
            1, 3
        ),
        "weight": numbers(7, 5, seed=6).to(device),
        "bias": numbers(7, seed=7).to(device),
    }


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "not-a-leaf"])
def test_a_gradient_is_not_differentiated_again(kernel, loss_of, is_leaf):
    leaf = numbers(1, 3, 5).to(kernel.device).requires_grad_()
    x = leaf * 1.0 if not is_leaf else leaf
    given = arguments(kernel.device)
    loss = loss_of(x, given, kernel.backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(grad, plain)
    for penalty in (grad.sum(), loss + grad.square().sum()):
        with pytest.raises(RuntimeError, match=_REFUSED):
            torch.autograd.grad(penalty, leaf, retain_graph=True)


def test_the_sum_of_log_probs_has_no_second_derivative_either(kernel):
    """Its upstream gradient is a number that knows nothing of the logits."""
    logits = numbers(1, 3, 5).to(kernel.device).requires_grad_()
    ids = arguments(kernel.device)["token_ids"]
    total = token_log_probs(logits, ids, backend=kernel.backend).sum()
    (grad,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.grad(total + 10 * grad.square().sum(), logits)


def test_a_hessian_raises(kernel, loss_of):
    given = arguments(kernel.device)
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.functional.hessian(
            lambda x: loss_of(x, given, kernel.backend), numbers(1, 3, 5).to(kernel.device)
        )


@pytest.mark.parametrize("name", ["linear_token_log_probs", "linear_steppo_loss"])
@pytest.mark.parametrize("wanted", ["weight", "bias"])
def test_gradients_of_the_head_are_not_differentiated_again(name, wanted):
    given = arguments("cpu")
    given[wanted].requires_grad_()
    loss = _LOSSES[name](numbers(1, 3, 5), given, "cpu")
    (grad,) = torch.autograd.grad(loss, given[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match=_REFUSED):
        torch.autograd.grad(grad.sum(), given[wanted])


def test_log_probs_of_the_reference_have_second_derivatives():
    given = arguments("cpu")
    for name in ("token_log_probs", "linear_token_log_probs"):
        assert torch.autograd.gradgradcheck(
            lambda x, name=name: _LOSSES[name](x, given, "reference"),
            (numbers(1, 3, 5).requires_grad_(),),
        )


def _copies():
    """Hooks that keep a copy, as offloading to another device does."""
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept)


_HOOKS = {
    "plain": contextlib.nullcontext,
    # On a CPU, both leave tensors where they are, and switch off autograd's own check.
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
}


@pytest.mark.parametrize("hooks", _HOOKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_temperature_that_changes_before_backward_raises(loss_of, dtype, hooks):
    """In fp32 as well, which is converted: what is right must not depend on a dtype."""
    given = arguments("cpu", dtype)
    x = numbers(1, 3, 5).requires_grad_()
    with _HOOKS[hooks]():
        loss = loss_of(x, given, "cpu")
    given["temperature"].mul_(2)
    with pytest.raises(RuntimeError, match=_CHANGED):
        loss.backward()


# What backward reads again of what it was given, function by function.
_READ_AGAIN = {
    "token_log_probs": ("x", "token_ids", "mask"),
    "steppo_loss_from_logits": ("x", "token_ids"),
    "linear_token_log_probs": ("x", "token_ids", "weight", "bias"),
    "linear_steppo_loss": (),
}


@pytest.mark.parametrize("hooks", [*_HOOKS, "copies"])
@pytest.mark.parametrize("changed", ["x", "token_ids", "mask", "weight", "bias"])
@pytest.mark.parametrize("name", _LOSSES)
def test_what_changes_before_backward_raises_or_makes_no_difference(name, changed, hooks):
    """A loss that has formed its gradients, and hooks that keep copies, do not read it again."""

    def gradient(is_changed):
        given = arguments("cpu")
        x = given["x"] = numbers(1, 3, 5).requires_grad_()
        with _HOOKS.get(hooks, _copies)():
            loss = _LOSSES[name](x, given, "cpu")
        if is_changed:
            with torch.no_grad():
                given[changed].copy_(given[changed].flip(-1))
        return torch.autograd.grad(loss, x)[0]

    if changed in _READ_AGAIN[name] and hooks != "copies":
        with pytest.raises(RuntimeError, match=_CHANGED):
            gradient(True)
    else:
        assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("hooks", [*_HOOKS, "copies"])
@pytest.mark.parametrize("name", ["token_log_probs", "steppo_loss_from_logits"])
def test_a_second_backward_after_one_in_place_raises(name, hooks):
    logits = numbers(1, 3, 5).requires_grad_()
    given = arguments("cpu")
    with _HOOKS.get(hooks, _copies)():
        if name == "token_log_probs":
            total = token_log_probs(
                logits, given["token_ids"], inplace_backward=True, backend="cpu"
            ).sum()
        else:
            total = steppo_loss_from_logits(
                logits,
                given["token_ids"],
                None,
                numbers(2),
                _LAYOUT,
                inplace_backward=True,
                backend="cpu",
            ).loss
    torch.autograd.grad(total, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match=_CHANGED):
        torch.autograd.grad(total, logits)


@pytest.mark.parametrize("hooks", _HOOKS)
def test_logits_that_two_losses_overwrite_raise(hooks):
    logits = numbers(1, 3, 5).requires_grad_()
    ids = arguments("cpu")["token_ids"]
    with _HOOKS[hooks]():
        one, other = (
            token_log_probs(logits, ids, inplace_backward=True, backend="cpu").sum()
            for _ in range(2)
        )
    one.backward()
    with pytest.raises(RuntimeError, match=_CHANGED):
        other.backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
def test_a_bad_upstream_gradient_reaches_no_masked_token(target, bad, inplace):
    given = arguments(target.device)
    upstream = torch.full((1, 3), bad, dtype=torch.float64, device=target.device)
    x = numbers(1, 3, 5).to(target.device)
    for options in ({"inplace_backward": inplace}, {}):
        leaf = x.clone().requires_grad_()
        if options:
            found = token_log_probs(
                leaf,
                given["token_ids"],
                mask=given["mask"],
                return_entropy=True,
                backend=target.backend,
                **options,
            )
        else:
            found = linear_token_log_probs(
                leaf,
                given["weight"],
                given["token_ids"],
                mask=given["mask"],
                return_entropy=True,
                backend=target.backend,
            )
        (grad,) = torch.autograd.grad(found, leaf, [upstream, upstream])
        assert not grad[~given["mask"]].any()
        assert grad[given["mask"]].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["steppo_loss_from_logits", "linear_steppo_loss"])
def test_a_bad_upstream_gradient_of_a_loss_reaches_no_masked_token(target, name, bad):
    given = arguments(target.device)
    leaf = numbers(1, 3, 5).to(target.device).requires_grad_()
    loss = _LOSSES[name](leaf, given, target.backend)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, bad))
    assert not grad[~given["mask"]].any()
    assert not grad[given["mask"]].isfinite().all()


@pytest.mark.parametrize("lent", ["token_ids", "mask", "temperature", "weight", "bias"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensors_made_in_inference_mode_are_as_others(backend, loss_of, lent):
    """As rollouts make them. What backward needs of them is copied."""
    given = arguments("cpu")
    x = numbers(1, 3, 5).requires_grad_()
    expected = torch.autograd.grad(loss_of(x, given, backend), x)[0]
    with torch.inference_mode():
        given[lent] = given[lent].clone()
    found = torch.autograd.grad(loss_of(x, given, backend), x)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["linear_token_log_probs", "linear_steppo_loss"])
def test_hidden_states_made_in_inference_mode_train_a_head(target, name):
    given = arguments(target.device)
    x = numbers(1, 3, 5).to(target.device)
    given["weight"].requires_grad_()
    expected = torch.autograd.grad(_LOSSES[name](x, given, target.backend), given["weight"])[0]
    with torch.inference_mode():
        x = x.clone()
    found = torch.autograd.grad(_LOSSES[name](x, given, target.backend), given["weight"])[0]
    assert torch.equal(found, expected)


def test_everything_runs_inside_inference_mode(target, loss_of):
    given = arguments(target.device)
    with torch.inference_mode():
        x = numbers(1, 3, 5).to(target.device)
        assert loss_of(x, given, target.backend).isfinite()
