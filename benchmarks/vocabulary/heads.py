"""Every way from hidden states to the loss and its gradients, and the check that they agree."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels.log_probs.lm_head import logits_dtype

from ..gates import fused_backend
from ..machine import threads
from ..memory import peak_bytes
from ..variants import Variant
from . import peers
from .cases import CONFIG, HeadCase, Shape, head_case, row_log_probs
from .variants import (
    CCE,
    COMPILED,
    COMPILED_ACTIONS,
    EAGER,
    EAGER_ACTIONS,
    FUSED,
    LIGER,
    LIGER_ACTIONS,
    LIGER_SCALED,
    PRODUCTS,
    PRODUCTS_KEPT,
    TORCH_LINEAR,
    TORCH_LINEAR_CHUNK,
    TRL_CHUNKED,
    TWICE,
    TWO_CHUNKS,
)

Call = Callable[[], None]
# What is compiled for these.
_COMPILED_FROM = {COMPILED: EAGER, COMPILED_ACTIONS: EAGER_ACTIONS}

# A share of the expected root mean square. bf16 rounds the logits of likely tokens by up to 3
# hundredths, and with them their probabilities and the ratios.
_TOLERANCE = 0.03
# Where chunk sizes are tried.
_TRIAL_VOCABULARY = 8192


def step_of(shape: Shape, variant: Variant) -> tuple[Call, Call]:
    """Return one forward + backward of a variant, and what has to be called before the next."""
    case = head_case(shape)
    if variant in (PRODUCTS, PRODUCTS_KEPT):
        kept: list[Tensor] = []
        products = _products
        if variant == PRODUCTS_KEPT:
            products = functools.partial(_products_into, _places(shape))
        hidden = peers.rows_of(case)[0].detach()
        weight = case.weight.detach()
        return lambda: kept.extend(products(hidden, weight)), kept.clear
    loss = loss_of(case, variant)
    return lambda: loss().backward(), case.reset


def loss_of(case: HeadCase, variant: Variant) -> Callable[[], Tensor]:
    """Return the call of a variant that gives the loss."""
    rows = case.shape.action_tokens
    losses: dict[Variant, Callable[[], Tensor]] = {
        FUSED: lambda: fused(case, fused_backend()),
        TWO_CHUNKS: lambda: fused(case, fused_backend(), rows // 2),
        TWICE: lambda: _two_calls(case),
        LIGER: lambda: _liger(case, actions_only=False),
        LIGER_ACTIONS: lambda: _liger(case, actions_only=True),
    }
    log_probs: dict[Variant, Callable[[], Tensor]] = {
        EAGER: lambda: row_log_probs((case.hidden @ case.weight.t()).float(), case.steps.token_ids),
        EAGER_ACTIONS: lambda: eager_rows(case),
        LIGER_SCALED: lambda: peers.liger_scaled(case),
        TRL_CHUNKED: lambda: peers.trl_chunked(case),
        CCE: lambda: peers.cut_cross_entropy(case),
        TORCH_LINEAR: lambda: peers.torch_linear_cross_entropy(case, None),
        TORCH_LINEAR_CHUNK: lambda: peers.torch_linear_cross_entropy(case, rows),
    }
    if variant in _COMPILED_FROM:
        return _compiled(case.shape, variant, torch.get_num_threads())
    if variant in losses:
        return losses[variant]
    found = log_probs[variant]
    return lambda: case.steps.loss(found())


def available(variants: Iterable[Variant]) -> list[Variant]:
    """Return those of the variants whose projects can be imported."""
    return [v for v in variants if v.project is None or peers.is_there(v.project)]


def fused(case: HeadCase, backend: Any, chunk_tokens: int | None = None) -> Tensor:
    """Return the loss of this package on a backend."""
    steps = case.steps
    return sk.linear_steppo_loss(
        case.hidden,
        case.weight,
        steps.token_ids,
        steps.old_log_probs,
        steps.advantages,
        steps.layout,
        chunk_tokens=chunk_tokens,
        config=CONFIG,
        backend=backend,
    ).loss


def _liger(case: HeadCase, *, actions_only: bool) -> Tensor:
    chunk, compiled = best_liger_chunk()
    return peers.liger_grpo(case, chunk, compiled=compiled, actions_only=actions_only)


@functools.cache
def best_liger_chunk() -> tuple[int, bool]:
    """Return the fastest number of rows in a chunk of Liger's loss, and whether to compile it."""
    return min(liger_chunks(), key=liger_chunks().__getitem__)


@functools.cache
def liger_chunks() -> dict[tuple[int, bool], float]:
    """Return the seconds of each choice, at a smaller vocabulary: the faster of two calls."""
    case = head_case(Shape(8, 128, 32, 8, _TRIAL_VOCABULARY))
    found = {}
    for rows, compiled in ((8, False), (8, True), (4, False), (2, False), (1, False)):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            peers.liger_grpo(case, rows, compiled=compiled).backward()
            times.append(time.perf_counter() - start)
            case.reset()
        found[rows, compiled] = min(times)
    return found


@functools.cache
def check(shape: Shape, variant: Variant, num_threads: int) -> dict[str, Any]:
    """Return peak memory and errors of one forward + backward, or raise if they are too large."""
    case = head_case(shape)
    step, reset = step_of(shape, variant)
    with threads(num_threads):
        if variant in _COMPILED_FROM or variant == CCE:
            # What compiling allocates is not what a step does.
            step()
            reset()
        if variant in (PRODUCTS, PRODUCTS_KEPT):
            return {}
        peak = peak_bytes(step)
    hidden, weight = case.hidden.grad, case.weight.grad
    wanted_hidden, wanted_weight = expected(shape)
    assert hidden is not None
    assert weight is not None
    errors = {
        "hidden": relative_error(hidden, wanted_hidden),
        "weight": relative_error(weight, wanted_weight),
    }
    for name, error in errors.items():
        if not error <= _TOLERANCE:
            raise AssertionError(
                f"{shape}, {variant}: gradient of the {name} off by {error:.1e} of its root mean "
                f"square, allowed is {_TOLERANCE:.0e}; nothing is timed"
            )
    if bool(hidden[~case.steps.mask].any()):
        raise AssertionError(f"{shape}, {variant}: a masked token has a gradient")
    reset()
    info: dict[str, Any] = {f"error_{name}": error for name, error in errors.items()}
    info["extra_bytes"] = peak - case.gradient_bytes
    if variant == FUSED:
        size = logits_dtype("cpu", case.weight.dtype).itemsize
        info["chunk_bytes"] = shape.action_tokens * shape.vocabulary * size
    if variant == LIGER:
        info["choices"] = [
            f"{rows}{' compiled' if compiled else ''} {seconds:.2f} s"
            for (rows, compiled), seconds in liger_chunks().items()
        ]
    return info


@functools.lru_cache(maxsize=1)
def expected(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the gradients in fp32, from logits that are not rounded."""
    case = head_case(shape)
    hidden = case.hidden.detach().float().requires_grad_()
    weight = case.weight.detach().float().requires_grad_()
    index, ids = case.steps.index, case.steps.token_ids.view(-1)
    log_probs = row_log_probs(hidden.flatten(0, 1)[index] @ weight.t(), ids[index])
    grads = torch.autograd.grad(case.steps.loss(log_probs), (hidden, weight))
    return grads[0], grads[1]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the root mean square error over that of what is wanted, if this is not 0."""
    pairs = zip(got.flatten(0, -2).split(2**14), wanted.flatten(0, -2).split(2**14), strict=True)
    squares = sum(float((g.float() - w).square().sum(dtype=torch.float64)) for g, w in pairs)
    scale = float(wanted.square().sum(dtype=torch.float64)) or 1.0
    return float((squares / scale) ** 0.5)


def _two_calls(case: HeadCase) -> Tensor:
    """Return the loss of log-probs, whose backward pass forms the logits again."""
    steps, backend = case.steps, fused_backend()
    log_probs = sk.linear_token_log_probs(
        case.hidden, case.weight, steps.token_ids, mask=steps.mask, backend=backend
    )
    assert isinstance(log_probs, Tensor)
    return sk.steppo_loss(
        log_probs,
        steps.old_log_probs,
        steps.advantages,
        steps.layout,
        config=CONFIG,
        backend=backend,
    ).loss


def eager_rows(case: HeadCase) -> Tensor:
    """Return the log-probs of the action tokens, of logits in the dtype of the head."""
    hidden, ids = peers.rows_of(case)
    return row_log_probs((hidden @ case.weight.t()).float(), ids)


@functools.cache
def _compiled(shape: Shape, variant: Variant, num_threads: int) -> Callable[[], Tensor]:
    """Return the compiled eager loss, for one shape and number of threads."""
    del num_threads
    case = head_case(shape)
    eager = loss_of(case, _COMPILED_FROM[variant])
    return torch.compile(eager, dynamic=False, fullgraph=True)


def _products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The three products of a head, with its logits in place of their gradient."""
    logits = torch.mm(hidden, weight.t())
    return torch.mm(logits, weight), torch.mm(logits.t(), hidden)


@functools.cache
def _places(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the outputs of the three products."""
    case = head_case(shape)
    hidden = torch.empty_like(peers.rows_of(case)[0])
    return hidden.new_empty(len(hidden), len(case.weight)), hidden, torch.empty_like(case.weight)


def _products_into(
    places: tuple[Tensor, Tensor, Tensor], hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, into memory that is kept."""
    logits, grad_hidden, grad_weight = places
    torch.mm(hidden, weight.t(), out=logits)
    torch.mm(logits, weight, out=grad_hidden)
    torch.mm(logits.t(), hidden, out=grad_weight)
    return grad_hidden, grad_weight
