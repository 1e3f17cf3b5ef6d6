"""The operators on logits as the loss from hidden states calls them: rows gathered, softcap."""

from __future__ import annotations

import pytest
import torch
from batches import Error
from logit_cases import draw, on, plain, results, upstream

from steppo_kernels.backends import operators


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_operator_gathers_rows(kernel, shared, softcap):
    """The loss from hidden states lets live rows move to the front of their own memory."""
    logits, ids = on(kernel, *draw(21, 8, 45))
    logits = logits.float().unsqueeze(0)
    temperatures = torch.linspace(0.5, 2.0, 8, device=kernel.device).double()
    head = ids, None, temperatures, 1.0, softcap
    _, entropy, log_sum_exp = operators.call("token_log_probs", kernel.backend, logits, *head, True)
    grads = upstream(8, dtype=torch.float32).to(kernel.device)

    def differentiate(grad_logits, logits, rows):
        operators.call(
            "token_log_probs_backward",
            kernel.backend,
            grad_logits,
            logits,
            *head,
            log_sum_exp,
            entropy,
            *grads,
            rows,
        )
        return grad_logits[0]

    every = differentiate(torch.empty_like(logits), logits, None)
    wide = logits.double().requires_grad_()
    z = softcap * torch.tanh(wide / softcap) if softcap else wide
    exact = plain(z[0], ids, temperatures[:, None])
    (expected,) = torch.autograd.grad(exact, wide, list(grads.double()))
    assert Error.between(every, expected[0]).largest < 1e-6
    rows = torch.tensor([7, 1, 5], device=kernel.device)
    found = differentiate(logits if shared else torch.empty_like(logits), logits, rows)
    assert torch.equal(found[:3], every[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.5, 5.0, 12.0])
def test_softcap_error(kernel, dtype, spread):
    """Logits go from much smaller to larger than the cap."""
    rows, cap = 20 if kernel.interpreted else 60, 5.0
    logits = spread * torch.randn((rows, 257), generator=torch.Generator().manual_seed(4))
    logits = logits.to(dtype)
    policy = (cap * torch.tanh(logits.float() / cap)).softmax(-1)
    ids = torch.multinomial(policy, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    grads = upstream(rows)

    def plain_capped(values, at, temperature):
        return plain(cap * torch.tanh(values / cap), at, temperature)

    exact = results(plain_capped, logits.double(), ids, 0.9, grads=grads)
    inexact = results(plain_capped, logits.float(), ids, 0.9, grads=grads)
    found = capped(kernel, logits, ids, cap, grads)
    for name, value in exact.items():
        error, allowed = Error.between(found[name], value), Error.between(inexact[name], value)
        rounding = torch.finfo(found[name].dtype).eps
        assert error.rms <= 2 * allowed.rms + rounding / 2, name
        assert error.largest <= 3 * allowed.largest + rounding, name


def capped(kernel, logits, ids, cap, grads):
    """Everything that the operators give with a softcap, by name, at temperature 0.9."""
    logits, ids = (value.to(kernel.device)[None] for value in (logits, ids))
    targets = ids[0].contiguous(), None, None, 0.9, cap
    log_probs, entropy, log_sum_exp = operators.call(
        "token_log_probs", kernel.backend, logits, *targets, True
    )
    found = {"log_probs": log_probs, "entropy": entropy}
    zeros = torch.zeros_like(log_probs)
    for at, name in enumerate(("log_probs", "entropy")):
        given = [zeros, zeros]
        given[at] = grads[at].to(log_probs)
        grad = torch.full_like(logits, torch.nan)
        operators.call(
            "token_log_probs_backward",
            kernel.backend,
            grad,
            logits,
            *targets,
            log_sum_exp,
            entropy,
            *given,
            None,
        )
        found[f"grad_of_{name}"] = grad[0]
    return found
