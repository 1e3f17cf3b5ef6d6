"""Every surrogate from logits and from hidden states: exact gradients, and the work of the head."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch
from batches import Error
from grids import grid
from head_cases import HeadCase, head_case, plain_log_probs, products
from methods import DIFFERENTIABLE, FEW, METHODS, Method
from oracle import OracleLayout
from targets import Target
from torch import Tensor

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    StepPOOutput,
    broadcast_to_tokens,
    linear_steppo_loss,
    steppo_loss_from_logits,
)
from steppo_kernels.outputs import POLICY_METRICS

_DEPTHS = ["logits", "hidden"]


def drawn_case(seed: int, target: Target) -> HeadCase:
    """Return a small case whose log-ratios reach the bounds of `Method`."""
    rows = 1 if target.interpreted else 3
    return head_case(seed, rows=rows, length=11, moved=0.5).to(torch.float64, target.device)


def fused(
    case: HeadCase, depth: str, target: Target, masked: bool, advantages: Tensor, **options: object
) -> tuple[StepPOOutput, tuple[Tensor, ...]]:
    """Return the loss of a case, and the tensors that its gradient reaches."""
    layout = case.mask if masked else case.layout
    given = case.token_ids, case.old_log_probs, advantages, layout
    if depth == "hidden":
        out = linear_steppo_loss(
            case.hidden, case.weight, *given, chunk_tokens=5, backend=target.backend, **options
        )
        return out, (case.hidden, case.weight)
    logits = (case.hidden @ case.weight.t()).detach().requires_grad_()
    out = steppo_loss_from_logits(logits, *given, backend=target.backend, **options)
    return out, (logits,)


def through_softmax(case: HeadCase, depth: str, of_log_probs: Tensor) -> list[Tensor]:
    """Return the gradients that a gradient by log-probs gives to logits, or hidden and weight."""
    clean = torch.where(case.mask[..., None], case.hidden, 0.0).detach()
    hidden, weight = clean.requires_grad_(), case.weight.detach().clone().requires_grad_()
    logits = hidden @ weight.t()
    ids = torch.where(case.mask, case.token_ids, 0)
    log_probs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    inputs = (hidden, weight) if depth == "hidden" else (logits,)
    return list(torch.autograd.grad(log_probs, inputs, of_log_probs))


@grid(
    cover=1,
    method=METHODS,
    depth=_DEPTHS,
    token_clip=[None, (0.2, 0.3)],
    interpreted={"method": FEW},
)
def test_the_gradient_where_advantages_and_weights_vary_in_a_step(
    target, masked, method, depth, token_clip
):
    """Against loops and the softmax: each token has the gradient of its own A, w and bounds."""
    if method.ratio == "token":
        token_clip = None
    live = 0
    for seed in range(6):
        case = drawn_case(seed, target)
        generator = torch.Generator().manual_seed(seed)
        advantages = torch.randn(case.mask.shape, generator=generator, dtype=torch.float64)
        advantages = advantages.masked_fill(torch.arange(11) % 4 == 0, 0.0).to(target.device)
        bounds = {}
        if not masked and method.surrogate != "soft":
            count = (2, case.layout.num_steps)
            low, high = 0.2 + 0.7 * torch.rand(count, generator=generator, dtype=torch.float64)
            bounds = {"clip_low": low.to(target.device), "clip_high": high.to(target.device)}
        config = method.config(token_clip=token_clip, reduction="token_mean", kl_coef=0.1)
        options = {
            "is_weights": case.token_weights,
            "ref_log_probs": case.ref_log_probs,
            "normalizer": 7.0,
            "ratio_center": 0.1,
            **bounds,
        }
        exact, loops = oracles.policy_loss(
            OracleLayout.from_mask(case.mask.reshape(-1).tolist(), tuple(case.mask.shape)),
            config,
            log_probs=plain_log_probs(case)[0],
            old_log_probs=case.old_log_probs,
            advantages=advantages,
            **options,
        )
        if loops.margin < 1e-6:
            continue
        out, inputs = fused(case, depth, target, masked, advantages, config=config, **options)
        found = torch.autograd.grad(out.loss, inputs)
        wanted = through_softmax(case, depth, exact["grad_log_probs"].to(target.device))
        for grad, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(grad, value, rtol=1e-9, atol=1e-11)
        assert out.loss.item() == pytest.approx(loops.loss, rel=1e-10)
        assert out.metrics.as_dict() == pytest.approx(loops.metrics, rel=1e-9, abs=1e-11)
        live += sum(map(bool, loops.of_log_probs))
        if target.interpreted or live > 40:
            break
    assert live > 3


@grid(
    cover=1,
    method=DIFFERENTIABLE,
    depth=_DEPTHS,
    interpreted={"method": {k: v for k, v in FEW.items() if v.is_differentiable}},
)
def test_gradcheck_where_advantages_and_weights_are_constant_in_a_step(
    target, masked, method, depth
):
    """Along random directions; elementwise is the comparison with loops above."""
    case = drawn_case(8, target)
    count = case.layout.num_steps
    generator = torch.Generator().manual_seed(1)
    advantages, weights, low, high = (
        0.2 + 0.7 * torch.rand((4, count), generator=generator, dtype=torch.float64)
    ).to(target.device)
    advantages = advantages * (1 - 2 * (torch.arange(count, device=target.device) % 2))

    def given(of_steps: Tensor) -> Tensor:
        return broadcast_to_tokens(of_steps, case.layout) if masked else of_steps

    options = {
        "config": method.config(entropy_coef=0.1),
        "is_weights": given(weights),
        "ratio_center": 0.1,
    }
    if not masked and method.surrogate != "soft":
        options |= {"clip_low": low, "clip_high": high}
    case.hidden = torch.where(case.mask[..., None], case.hidden.detach(), 0.0).requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        moved = dataclasses.replace(case, hidden=hidden, weight=weight)
        layout = case.mask if masked else case.layout
        arguments = case.token_ids, case.old_log_probs, given(advantages), layout
        if depth == "logits":
            return steppo_loss_from_logits(
                moved.hidden @ moved.weight.t(), *arguments, backend=target.backend, **options
            ).loss
        return linear_steppo_loss(
            hidden, weight, *arguments, chunk_tokens=5, backend=target.backend, **options
        ).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight), fast_mode=True)


def weights_of(method: Method, config: StepPOConfig, case: HeadCase) -> Tensor:
    """Return where the weight c of an action token is not 0, from its definition."""
    new = plain_log_probs(case)[0].detach()
    z = torch.where(case.mask, new - case.old_log_probs, 0.0)
    if method.surrogate == "tv":
        gap = new.exp() - case.old_log_probs.exp()
        positive = broadcast_to_tokens(case.advantages, case.layout) > 0
        return torch.where(positive, gap <= config.clip_high, gap >= -config.clip_low)
    if method.ratio == "geometric":
        z = torch.stack([z[case.layout.step_ids == s].mean() for s in range(len(case.advantages))])
        z = broadcast_to_tokens(z, case.layout)
    ratio = z.exp()
    if method.surrogate == "mask":
        return (ratio >= 1 - config.clip_low) & (ratio <= 1 + config.clip_high)
    return torch.ones_like(case.mask)


@grid(
    cover=1,
    method={
        name: method
        for name, method in METHODS.items()
        if method.surrogate != "clip" and method.ratio in ("geometric", "token")
    },
    chunk=[None, 7],
)
def test_work_is_2_plus_4f(kernel, method, chunk):
    """For `mask` and `tv`, f is the share of tokens with a weight; all others move every token."""
    case = head_case(1, rows=2, length=24, moved=0.3).to(torch.float64, kernel.device)
    case.advantages = case.advantages.sign()
    bounds = {"clip_low": 0.02, "clip_high": 0.02} if method.surrogate == "tv" else {}
    config = method.config(**{"clip_low": 0.2, "clip_high": 0.2, **bounds})
    has_weight = weights_of(method, config, case)[case.mask]
    num_tokens, live = case.layout.num_tokens, int(has_weight.sum())
    with products() as counter:
        out = linear_steppo_loss(
            case.hidden,
            case.weight,
            case.token_ids,
            case.old_log_probs,
            case.advantages,
            case.layout,
            config=config,
            chunk_tokens=chunk,
            backend=kernel.backend,
        )
    longest = int(case.layout.step_lengths.max())
    assert chunk is None or longest <= chunk
    assert counter.operations == (2 * num_tokens + 4 * live) * case.weight.numel()
    if method.surrogate in ("mask", "tv"):
        assert 0.1 < live / num_tokens < 0.9
    else:
        assert live == num_tokens
    dead = out.metrics.values[POLICY_METRICS.index("dead_token_fraction")]
    assert float(dead) == pytest.approx(1 - live / num_tokens)
    (grad,) = torch.autograd.grad(out.loss, case.hidden)
    assert torch.equal(grad[case.mask].any(-1), has_weight)


@grid(cover=1, method=METHODS, depth=_DEPTHS, interpreted={"method": FEW})
def test_a_batch_without_action_tokens(target, masked, method, depth):
    case = drawn_case(2, target)
    case.mask = torch.zeros_like(case.mask)
    case.layout = StepLayout.from_mask(case.mask)
    case.hidden = torch.full_like(case.hidden, torch.nan).requires_grad_()
    advantages = torch.full(
        case.mask.shape if masked else (0,), torch.nan, dtype=torch.float64, device=target.device
    )
    out, inputs = fused(case, depth, target, masked, advantages, config=method.config())
    assert out.loss.item() == 0.0
    assert out.metrics.values.isfinite().all()
    for grad in torch.autograd.grad(out.loss, inputs):
        assert not grad.any()


@grid(cover=1, method=METHODS, depth=_DEPTHS, interpreted={"method": FEW})
def test_nothing_of_a_masked_position_counts(target, masked, method, depth):
    """Bits are those of zeros there, and of two runs the same."""
    found = []
    for filler in (0.0, torch.nan, torch.inf, 0.0):
        case = drawn_case(3, target)
        case.hidden = torch.where(case.mask[..., None], case.hidden.detach(), filler)
        case.hidden.requires_grad_()
        for name in ("old_log_probs", "token_weights", "ref_log_probs"):
            setattr(case, name, torch.where(case.mask, getattr(case, name), filler))
        advantages = case.ref_log_probs - case.old_log_probs
        out, inputs = fused(
            case,
            depth,
            target,
            masked,
            advantages,
            config=method.config(kl_coef=0.1, entropy_coef=0.1),
            is_weights=case.token_weights,
            ref_log_probs=case.ref_log_probs,
        )
        grads = torch.autograd.grad(out.loss, inputs)
        assert not grads[0][~case.mask].any()
        assert grads[0].any()
        found.append((out.loss.detach(), out.metrics.values, *grads))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@grid(method=FEW)
def test_parts_of_a_batch_with_a_global_normalizer(target, method):
    case = head_case(19, rows=4, length=9, moved=0.5).to(torch.float64, target.device)

    def part(rows: slice, **options: object) -> tuple[float, Tensor]:
        out = linear_steppo_loss(
            case.hidden[rows],
            case.weight,
            case.token_ids[rows],
            case.old_log_probs[rows],
            (case.ref_log_probs - case.old_log_probs)[rows],
            StepLayout.from_mask(case.mask[rows]),
            config=method.config(reduction="token_mean"),
            is_weights=case.token_weights[rows],
            backend=target.backend,
            **method.center(),
            **options,
        )
        return out.loss.item(), torch.autograd.grad(out.loss, case.weight)[0]

    loss, grad = part(slice(None))
    total = case.layout.num_tokens
    parts = [part(rows, normalizer=total) for rows in (slice(0, 1), slice(1, 4))]
    assert sum(value for value, _ in parts) == pytest.approx(loss, rel=1e-10)
    assert grad.any()
    assert Error.between(sum(value for _, value in parts), grad).largest <= 1e-11


@grid(cover=1, depth=_DEPTHS)
def test_reported_entropy_is_a_metric_alone(target, masked, depth):
    """It is the mean over steps of the mean over their tokens, and moves no gradient."""
    case = drawn_case(4, target)
    given = case.ref_log_probs - case.old_log_probs
    entropy = plain_log_probs(case)[1]
    steps = range(case.layout.num_steps)
    wanted = torch.stack([entropy[case.layout.step_ids == step].mean() for step in steps]).mean()
    config = METHODS["soft-geometric"].config()
    found = []
    for report in (False, True):
        out, inputs = fused(
            case, depth, target, masked, given, config=config, report_entropy=report
        )
        found.append((out, torch.autograd.grad(out.loss, inputs)))
    (plain, expected), (reported, grads) = found
    assert plain.metrics["entropy"] == 0
    assert reported.metrics["entropy"].item() == pytest.approx(wanted.item(), rel=1e-10)
    assert torch.equal(plain.loss, reported.loss)
    assert all(map(torch.equal, grads, expected))
