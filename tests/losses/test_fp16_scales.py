"""fp16 gradients of steps of very different length, and of losses of any scale."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    linear_token_log_probs,
    steppo_loss,
)

_SIZE, _VOCABULARY = 8, 4003


def _case(lengths, sharp=1.0):
    """Return hidden states, weight, ids and a layout of steps of these lengths, one row."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.cat([torch.tensor([True] * length + [False]) for length in lengths])
    hidden = torch.randn((len(mask), _SIZE), generator=generator)
    weight = sharp * 0.05 * torch.randn((_VOCABULARY, _SIZE), generator=generator)
    ids = torch.randint(0, _VOCABULARY, (len(mask),), generator=generator)
    return hidden.half(), weight.half(), ids, StepLayout.from_mask(mask, backend="reference")


def _gradients(loss_of, case, dtype, upstream, device="cpu"):
    hidden, weight, ids, layout = case
    leaves = [value.to(device, dtype).requires_grad_() for value in (hidden, weight)]
    loss = loss_of(*leaves, ids.to(device), layout.to(device))
    return [grad.double().cpu() for grad in torch.autograd.grad(loss * upstream, leaves)]


def _fused(backend, **options):
    def loss_of(hidden, weight, ids, layout):
        advantages = torch.ones(layout.num_steps, dtype=torch.float64, device=hidden.device)
        return linear_steppo_loss(
            hidden, weight, ids, None, advantages, layout, backend=backend, **options
        ).loss

    return loss_of


def _log_probs_first(backend, **options):
    """The loss of log-probs that come from the head in a step of their own."""

    def loss_of(hidden, weight, ids, layout):
        log_probs = linear_token_log_probs(
            hidden, weight, ids, mask=layout.step_ids >= 0, backend=backend, **options
        )
        advantages = torch.ones(layout.num_steps, device=hidden.device)
        return steppo_loss(log_probs, None, advantages, layout, backend="reference").loss

    return loss_of


def _eager(hidden, weight, ids, layout):
    """What a trainer writes: products in the dtype of the head, the softmax in fp32."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    log_probs = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    advantages = torch.ones(layout.num_steps)
    return steppo_loss(log_probs, None, advantages, layout, backend="reference").loss


def _errors(found, exact, case):
    """Return relative errors of parts of the gradients that are of very different size."""
    _, weight, ids, layout = case
    is_last = (layout.step_ids == layout.num_steps - 1).reshape(-1)
    is_taken = torch.zeros(len(weight), dtype=torch.bool)
    is_taken[ids[layout.step_ids >= 0]] = True
    parts = {
        "hidden of the last step": (0, is_last),
        "rows of W that are taken": (1, is_taken),
        "rows of W that are not": (1, ~is_taken),
    }
    return {
        name: float((found[i][at] - exact[i][at]).norm() / exact[i][at].norm())
        for name, (i, at) in parts.items()
    }


_CASES = {"1 and 800": [1, 800], "800 and 1": [800, 1], "1, 40 and 2000": [1, 40, 2000]}


@pytest.mark.parametrize("chunk", [None, 801, 64])
@pytest.mark.parametrize("lengths", _CASES)
@pytest.mark.parametrize("form", [_fused, _log_probs_first])
def test_steps_of_very_different_length(lengths, chunk, form):
    """The loss is scaled as a grad scaler scales it: its gradients are then in the range."""
    case = _case(_CASES[lengths])
    exact = _gradients(_fused("reference"), case, torch.float64, 2.0**12)
    plain = _errors(_gradients(_eager, case, torch.float16, 2.0**12), exact, case)
    fused = form("cpu", chunk_tokens=chunk)
    found = _errors(_gradients(fused, case, torch.float16, 2.0**12), exact, case)
    for name, error in found.items():
        assert error <= 5e-4, (name, error)
        assert error <= 1.1 * plain[name], (name, error, plain[name])


def test_steps_of_very_different_length_in_every_kernel(kernel):
    case = _case([1, 30] if kernel.interpreted else [1, 800])
    config = StepPOConfig(entropy_coef=0.5)
    exact = _gradients(_fused("reference", config=config), case, torch.float64, 2.0**14)
    fused = _fused(kernel.backend, config=config)
    found = _gradients(fused, case, torch.float16, 2.0**14, kernel.device)
    for name, error in _errors(found, exact, case).items():
        assert error <= 6e-4, (name, error)


@pytest.mark.parametrize("upstream", [1e-3, 1.0, 2.0**16])
def test_a_scale_that_comes_late_is_as_one_that_comes_early(upstream):
    """The gradients are kept until it comes: they are rounded once, to what they then are."""
    case = _case([1, 300])
    total = 2 / upstream
    at_once = _gradients(_fused("cpu", normalizer=total), case, torch.float16, 1.0)
    later = _gradients(_fused("cpu"), case, torch.float16, upstream)
    for one, other in zip(at_once, later, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("sharp", [0.1, 40.0])
def test_temperatures_and_sharp_policies(temperature, sharp):
    case = _case([1, 200], sharp * temperature)
    options = {"temperature": temperature, "config": StepPOConfig(entropy_coef=0.1)}
    upstream = 2.0**12 * min(temperature, 1.0)
    exact = _gradients(_fused("reference", **options), case, torch.float64, upstream)
    found = _gradients(_fused("cpu", **options), case, torch.float16, upstream)
    for name, error in _errors(found, exact, case).items():
        assert error <= 1e-3, (name, error)


def test_bias_sums_tokens_of_different_scales(kernel):
    hidden, weight, ids, layout = _case([1, 20])

    def gradient(dtype, device, backend):
        bias = torch.zeros(_VOCABULARY, dtype=dtype, device=device, requires_grad=True)
        loss = _fused(backend, bias=bias)(
            hidden.to(device, dtype), weight.to(device, dtype), ids.to(device), layout.to(device)
        )
        return torch.autograd.grad(loss * 2.0**10, bias)[0].double().cpu()

    exact = gradient(torch.float64, "cpu", "reference")
    found = gradient(torch.float16, kernel.device, kernel.backend)
    torch.testing.assert_close(found, exact, rtol=torch.finfo(torch.float16).eps, atol=0)


def test_bfloat16_needs_no_units():
    """Its range is that of fp32."""
    case = _case([1, 800])
    exact = _gradients(_fused("reference"), case, torch.float64, 1.0)
    found = _errors(_gradients(_fused("cpu"), case, torch.bfloat16, 1.0), exact, case)
    for name, error in found.items():
        assert error <= 5e-3, (name, error)
