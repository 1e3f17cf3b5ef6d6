"""Logits so large, and temperatures so small, that a log-sum-exp in one number loses its sum."""

from __future__ import annotations

import math

import pytest
import torch

from steppo_kernels import linear_steppo_loss, linear_token_log_probs, token_log_probs
from steppo_kernels.config import StepPOConfig
from steppo_kernels.layout.step_layout import StepLayout

_INF = math.inf


def exact(logits, ids, temperature, grads):
    """Return what fp64 gives, with differences of logits taken before anything else."""
    z = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    log_p_or_0 = log_p.masked_fill(p == 0, 0.0)
    entropy = -(p * log_p_or_0).sum(-1, keepdim=True)
    is_token = torch.zeros_like(p).scatter_(-1, ids.unsqueeze(-1), 1.0)
    c, e = (grad.double().unsqueeze(-1) for grad in grads)
    return {
        "log_probs": log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "entropy": entropy.squeeze(-1),
        "grad_of_log_probs": c * (is_token - p) / temperature,
        "grad_of_entropy": -e * p * (log_p_or_0 + entropy) / temperature,
    }


def results(target, logits, ids, temperature, grads):
    """Return what a backend gives."""
    leaf = logits.to(target.device).detach().requires_grad_()
    found = token_log_probs(
        leaf,
        ids.to(target.device),
        temperature=temperature,
        return_entropy=True,
        backend=target.backend,
    )
    of_each = [
        torch.autograd.grad(value, leaf, grad.to(value), retain_graph=True)[0].cpu()
        for value, grad in zip(found, grads, strict=True)
    ]
    log_probs, entropy = (value.detach().cpu() for value in found)
    return dict(
        zip(
            ("log_probs", "entropy", "grad_of_log_probs", "grad_of_entropy"),
            (log_probs, entropy, *of_each),
            strict=True,
        )
    )


def check(target, logits, ids, temperature=1.0):
    """Compare with `exact`: gradients by 1 / temperature, their size."""
    grads = torch.linspace(0.5, 2.0, 2 * len(ids)).view(2, -1)
    found = results(target, logits, ids, temperature, grads)
    for name, value in exact(logits, ids, temperature, grads).items():
        size = 1 / temperature if name.startswith("grad") else 1.0
        eps = torch.finfo(found[name].dtype).eps
        torch.testing.assert_close(
            found[name].double() / size,
            value / size,
            rtol=4 * eps,
            atol=1e-5 if eps > 1e-9 else 1e-14,
            msg=lambda text, name=name: f"{name}: {text}",
        )


_LEVELS = {
    torch.float32: [1e13, -1e20, 1e30, -3.4028234663852886e38, 3.4e38],
    torch.float64: [1e17, 1e300, -1.7976931348623157e308],
    torch.bfloat16: [1e13, -3.3895313892515355e38],
    torch.float16: [-65504.0],
}


@pytest.mark.parametrize(
    ("dtype", "level"), [(dtype, level) for dtype in _LEVELS for level in _LEVELS[dtype]], ids=str
)
def test_ties_at_any_level_are_ties(target, dtype, level):
    """A row that is banned whole, at the lowest number, is one of them."""
    logits = torch.full((2, 37), level, dtype=dtype)
    check(target, logits, torch.tensor([0, 36]))


@pytest.mark.parametrize("vocabulary", [5, 5000])
@pytest.mark.parametrize("power", [20, 60, 100])
def test_differences_of_huge_logits_count(target, power, vocabulary):
    """Some ulps apart, at a temperature of as many: as small logits at temperature 1."""
    steps = torch.randint(0, 9, (3, vocabulary), generator=torch.Generator().manual_seed(power))
    unit = 2.0**power
    logits = (2.0**23 + steps.float()) * unit
    check(target, logits, torch.tensor([0, 3, 4]), temperature=3 * unit)
    check(target, -logits, torch.tensor([0, 3, 4]), temperature=3 * unit)


@pytest.mark.parametrize("temperature", [1e-10, 1e-20, 1e-30, 1e-37])
def test_tiny_temperatures(target, temperature):
    """One word has it all, or some share it; the others have no gradient, of entropy either."""
    one = [0.5, 2.0, -3.0, 1.0, 2.0 + 1e-6]
    logits = torch.tensor([one, one, [2.0, 2.0, 1.0, -1e30, 2.0], [0.0] * 5])
    logits[3] = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0]) * temperature
    check(target, logits, torch.tensor([0, 4, 1, 2]), temperature)


def test_temperatures_whose_inverse_is_no_fp32_number(target):
    """Words of probability 0 have the gradient 0, though 1 / temperature is infinite in fp32."""
    if target.backend == "reference":
        pytest.skip("plain PyTorch in fp32 divides by a number that is 0 to it")
    logits = torch.tensor([[1.0, 5.0, -2.0], [3.0, 3.0, -1.0]])
    grads = torch.ones(2, 2)
    found = results(target, logits, torch.tensor([1, 0]), 1e-40, grads)
    assert found["log_probs"].tolist() == pytest.approx([0.0, -math.log(2)])
    assert found["entropy"].tolist() == pytest.approx([0.0, math.log(2)])
    confident, tied = found["grad_of_log_probs"].tolist()
    assert confident == [0.0, 0.0, 0.0]
    # Infinite, or at the end of the range.
    assert tied[0] > 1e38
    assert tied[1] < -1e38
    assert tied[2] == 0.0
    assert not found["grad_of_entropy"][0].any()


@pytest.mark.parametrize("temperature", [1e20, 1e30, 1e38])
def test_large_temperatures_leave_banned_words_banned(target, temperature):
    logits = torch.tensor([[1.0, -_INF, 3.0, -_INF]])
    check(target, logits, torch.tensor([0]), temperature)


def test_huge_logits_in_products_with_a_head(target):
    """From hidden states too: all words are tied, the softmax is uniform."""
    hidden = torch.full((4, 2), 1e10, dtype=torch.float32, device=target.device)
    weight = torch.full((9, 2), 1e5, dtype=torch.float32, device=target.device)
    ids = torch.tensor([0, 3, 8, 1], device=target.device)
    leaves = [value.requires_grad_() for value in (hidden, weight)]
    log_probs, entropy = linear_token_log_probs(
        *leaves, ids, return_entropy=True, chunk_tokens=3, backend=target.backend
    )
    assert log_probs.tolist() == pytest.approx([-math.log(9)] * 4, rel=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(9)] * 4, rel=1e-6)
    (grad,) = torch.autograd.grad(log_probs.sum(), weight)
    expected = torch.full((9, 2), -4 / 9, dtype=torch.float64)
    expected[ids.cpu()] += 1
    torch.testing.assert_close(grad.double().cpu(), expected * 1e10, rtol=1e-5, atol=0)
    loss = linear_steppo_loss(
        *leaves,
        ids,
        None,
        torch.ones(1, device=target.device),
        StepLayout.from_mask(torch.ones(4, dtype=torch.bool, device=target.device)),
        config=StepPOConfig(entropy_coef=0.1),
        backend=target.backend,
    ).loss
    (grad,) = torch.autograd.grad(loss, weight)
    # Entropy is at its largest: it has no gradient.
    torch.testing.assert_close(grad.double().cpu(), expected * -1e10 / 4, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_capped_infinities_are_at_the_cap(target, dtype):
    """Softcap makes -inf and inf two numbers, with no gradient; NaN stays NaN."""
    hidden = torch.zeros((1, 2), dtype=dtype, device=target.device)
    weight = torch.zeros((5, 2), dtype=dtype, device=target.device)
    bias = torch.tensor([0.0, 1.0, -_INF, _INF, 0.5], dtype=dtype, device=target.device)
    bias.requires_grad_()
    ids = torch.tensor([1], device=target.device)

    def run(bias):
        return linear_token_log_probs(
            hidden, weight, ids, bias=bias, softcap=3.0, backend=target.backend
        )

    z = 3.0 * torch.tanh(bias.detach().double() / 3.0)
    log_p = z.log_softmax(-1)
    assert run(bias).item() == pytest.approx(log_p[1].item(), rel=1e-6)
    (grad,) = torch.autograd.grad(run(bias).sum(), bias)
    slope = torch.tensor([0.0, 1.0, 0, 0, 0], dtype=z.dtype, device=z.device) - log_p.exp()
    slope *= 1 - (z / 3.0).square()
    torch.testing.assert_close(
        grad.double(), slope, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-9
    )
    assert grad[2].item() == grad[3].item() == 0.0
    spoilt = bias.detach().clone()
    spoilt[4] = math.nan
    assert run(spoilt).isnan().all()
