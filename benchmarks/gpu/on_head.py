"""Cases of the functions on hidden states and an output head, in bf16.

Every token is in a step. A share f of the tokens has a gradient: of `linear_steppo_loss` the steps
that are not clipped, of `linear_token_log_probs` the tokens whose upstream gradient is not 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk

from ..variants import Variant
from ..vocabulary import peers as shared_peers
from ..vocabulary.cases import (
    HeadCase,
    Shape,
    heights,
    row_log_probs,
    step_mask,
    steps_of,
)
from ..vocabulary.heads import fused, relative_error
from . import peers
from .on_logits import smaller
from .problem import BOTH, Case, Name, Outputs, Problem, backends, free_bytes, that_fit
from .variants import CCE, EAGER, LIGER_CHUNKED, LIGER_SCALED, PRODUCTS, TORCH_LINEAR, TRL_CHUNKED

# As on a CPU: bf16 rounds the logits of likely tokens by up to 3 hundredths (gradients, as root
# mean squares), and the log-sum-exps of large ones by more.
_GRADIENT, _LOG_PROB = 0.03, 0.15
# A loss of that many roundings.
_LOSS = 0.03
# What eager PyTorch holds for a logit at its peak: bf16, fp32 logits, log-probs and two gradients.
_BYTES_A_LOGIT = 2 + 4 * 4 + 2
# The weight and its gradients in bf16 and fp32, and the fp32 weight of the check.
_BYTES_A_WEIGHT = 2 * 2 + 3 * 4
# Rows whose logits are formed in fp32 at a time, and steps that Liger takes at a time.
_CHUNK, _LIGER_STEPS = 1024, 8

LogProbs = Callable[[], Tensor]


def how(live: float) -> str:
    """Return the name of a share of tokens with a gradient."""
    return f"{BOTH}, f = {live:g}"


def linear_loss(shape: Shape, hidden_size: int, live: float) -> Case:
    """Return the case of `linear_steppo_loss`."""
    name = Name("linear_steppo_loss", how(live), _text(shape, hidden_size))
    return Case(name, functools.partial(_linear_loss, shape, hidden_size, live))


def linear_log_probs(shape: Shape, hidden_size: int, live: float) -> Case:
    """Return the case of `linear_token_log_probs`, with upstream gradients of which some are 0."""
    name = Name("linear_token_log_probs", how(live), _text(shape, hidden_size))
    return Case(name, functools.partial(_linear_log_probs, shape, hidden_size, live))


def _text(shape: Shape, hidden_size: int) -> str:
    return f"{shape.tokens} x {hidden_size} x {shape.vocabulary}"


def head_case(shape: Shape, hidden_size: int, device: torch.device) -> HeadCase:
    """Return hidden states that point at the weights of their tokens, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    on_host = torch.Generator().manual_seed(0)
    weight = torch.empty((shape.vocabulary, hidden_size), dtype=torch.bfloat16, device=device)
    # Rows of the weight have length 1: hidden states with entries of 2 spread the logits by 2.
    weight.normal_(0.0, hidden_size**-0.5, generator=generator)
    ids, rivals = torch.randint(shape.vocabulary, (2, shape.tokens), generator=on_host).to(device)
    height, below = (x.to(device) for x in heights(shape.tokens, shape.vocabulary, on_host))
    hidden = 2 * torch.randn((shape.tokens, hidden_size), device=device, generator=generator)
    hidden += height[:, None] * weight[ids] + (height - below)[:, None] * weight[rivals]
    states = hidden.to(weight.dtype)
    mask, _ = step_mask(shape, on_host)
    log_probs = _exact_log_probs(states, weight, ids).cpu()
    return HeadCase(
        shape,
        states.view(shape.rows, shape.length, -1).requires_grad_(),
        weight.requires_grad_(),
        steps_of(shape, mask, ids.cpu(), log_probs, on_host).to(device),
    )


@torch.no_grad()
def _exact_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return log-probs in fp32, from logits that are not rounded."""
    wide = weight.float().t()
    pairs = zip(hidden.split(_CHUNK), ids.split(_CHUNK), strict=True)
    return torch.cat([row_log_probs(x.float() @ wide, at) for x, at in pairs])


@torch.no_grad()
def _exact_gradients(case: HeadCase, of_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden states and weight in fp32."""
    wide = case.weight.detach().float()
    grad_hidden, grad_weight = [], torch.zeros_like(wide)
    parts = (
        values.split(_CHUNK)
        for values in (
            case.hidden.detach().flatten(0, 1),
            case.steps.token_ids.view(-1),
            of_log_probs.view(-1).float(),
        )
    )
    for hidden, ids, grad in zip(*parts, strict=True):
        x = hidden.float()
        of_logits = torch.softmax(x @ wide.t(), -1).mul_(-grad[:, None])
        of_logits.scatter_add_(1, ids[:, None], grad[:, None])
        grad_hidden.append(of_logits @ wide)
        grad_weight += of_logits.t() @ x
    return torch.cat(grad_hidden).view(case.hidden.shape), grad_weight


def _fitted(
    shape: Shape, hidden_size: int, live: float, device: torch.device
) -> tuple[HeadCase, str]:
    """Return the inputs, of fewer steps where memory asks for it, and a sentence that says so."""
    free = free_bytes(device)
    fixed = _BYTES_A_WEIGHT * shape.vocabulary * hidden_size
    rows = that_fit(shape.rows, _BYTES_A_LOGIT * shape.length * shape.vocabulary, fixed, free)
    fitting = replace(shape, rows=rows, live=max(1, round(live * rows)))
    said = smaller(rows * shape.length, shape.tokens, "tokens", free)
    return head_case(fitting, hidden_size, device), said


def _peers_log_probs(case: HeadCase, device: torch.device) -> dict[Variant, LogProbs]:
    """Return the calls that give log-probs of all tokens."""
    implementation = "cce" if device.type == "cuda" else "torch_compile"
    return {
        CCE: lambda: shared_peers.cut_cross_entropy(case, implementation),
        LIGER_SCALED: lambda: shared_peers.liger_scaled(case),
        TRL_CHUNKED: lambda: shared_peers.trl_chunked(case),
        TORCH_LINEAR: lambda: shared_peers.torch_linear_cross_entropy(case, None),
        EAGER: lambda: row_log_probs((case.hidden @ case.weight.t()).float(), case.steps.token_ids),
    }


def _products(case: HeadCase, live: int) -> Callable[[], Outputs]:
    """Return the three products of a head, with its logits in place of their gradient."""
    hidden, weight = case.hidden.detach().flatten(0, 1), case.weight.detach()

    def products() -> Outputs:
        logits = torch.mm(hidden, weight.t())
        return torch.mm(logits[:live], weight), torch.mm(logits[:live].t(), hidden[:live])

    return products


def _operations(case: HeadCase, live: float) -> float:
    """Return what the products take: logits of every token, two products of the live ones."""
    return 2.0 * case.shape.tokens * case.weight.numel() * (1 + 2 * live)


def _linear_loss(shape: Shape, hidden_size: int, live: float, device: torch.device) -> Problem:
    case, said = _fitted(shape, hidden_size, live, device)
    steps, share = case.steps, case.shape.live / case.shape.rows

    runs, left_out = backends(device)
    losses: dict[Variant, Callable[[], Tensor]] = {
        variant: functools.partial(fused, case, backend) for variant, backend in runs.items()
    }
    for variant, call in _peers_log_probs(case, device).items():
        losses[variant] = lambda call=call: steps.loss(call())  # type: ignore[misc]
    losses[LIGER_CHUNKED] = lambda: shared_peers.liger_grpo(
        case, _LIGER_STEPS, compiled=device.type == "cuda"
    )
    losses, missing = peers.that_are_there(losses)

    def both(loss: Callable[[], Tensor]) -> Outputs:
        found = loss()
        return found, *torch.autograd.grad(found, (case.hidden, case.weight))

    exact = _exact_log_probs(
        case.hidden.detach().flatten(0, 1), case.weight.detach(), steps.token_ids.view(-1)
    )
    log_probs = exact.view(steps.mask.shape).requires_grad_()
    wanted = steps.loss(log_probs)
    (of_log_probs,) = torch.autograd.grad(wanted, log_probs)
    calls = {variant: functools.partial(both, loss) for variant, loss in losses.items()}
    calls[PRODUCTS] = _products(case, case.shape.live * case.shape.length)
    return Problem(
        calls,
        check_of((wanted.detach(), *_exact_gradients(case, of_log_probs)), _LOSS),
        operations=_operations(case, share),
        floors=(PRODUCTS,),
        left_out=left_out | missing,
        smaller=said,
    )


def _linear_log_probs(shape: Shape, hidden_size: int, live: float, device: torch.device) -> Problem:
    case, said = _fitted(shape, hidden_size, live, device)
    steps, tokens = case.steps, case.shape.tokens
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(tokens, generator=generator)
    # Which tokens these are is drawn, too.
    count = round(live * tokens)
    upstream[torch.randperm(tokens, generator=generator)[count:]] = 0.0
    upstream = upstream.to(device)

    def ours(backend: Any) -> Tensor:
        found = sk.linear_token_log_probs(
            case.hidden, case.weight, steps.token_ids, backend=backend
        )
        assert isinstance(found, Tensor)
        return found

    runs, left_out = backends(device)
    every: dict[Variant, LogProbs] = {
        variant: functools.partial(ours, backend) for variant, backend in runs.items()
    }
    every, missing = peers.that_are_there(every | _peers_log_probs(case, device))

    def both(log_probs: LogProbs) -> Outputs:
        found = log_probs().view(-1)
        grads = torch.autograd.grad(found, (case.hidden, case.weight), upstream.to(found.dtype))
        return found, *grads

    exact = _exact_log_probs(
        case.hidden.detach().flatten(0, 1), case.weight.detach(), steps.token_ids.view(-1)
    )
    calls = {variant: functools.partial(both, one) for variant, one in every.items()}
    calls[PRODUCTS] = _products(case, count)
    return Problem(
        calls,
        check_of((exact, *_exact_gradients(case, upstream)), _LOG_PROB),
        operations=_operations(case, count / tokens),
        floors=(PRODUCTS,),
        left_out=left_out | missing,
        smaller=said,
    )


def check_of(
    wanted: Outputs, allowed: float, of_eager: float | None = None
) -> Callable[[Variant, Outputs], float]:
    """Return the check of a loss or of log-probs, and of the gradients of states and weight.

    `allowed` is how far the first may be off, `of_eager` that of plain PyTorch if it may be more.
    """

    def check(variant: Variant, outputs: Outputs) -> float:
        error = float((outputs[0].detach() - wanted[0]).abs().max())
        most = of_eager if of_eager is not None and variant == EAGER else allowed
        if not error <= most:
            raise AssertionError(f"{variant}: off by {error:.1e}, not {most:g}")
        for name, got, expected in zip(
            ("hidden states", "weight")[: len(wanted) - 1], outputs[1:], wanted[1:], strict=True
        ):
            off = relative_error(got, expected)
            if not off <= _GRADIENT:
                raise AssertionError(
                    f"{variant}: gradient of the {name} off by {off:.1e} of its root mean square, "
                    f"not {_GRADIENT:g}"
                )
        return error

    return check
