"""`token_log_probs` of bf16 logits, next to PyTorch in bf16 and fp32, compiled, and TRL's function.

In the table, errors are those of the log-probs against fp64 (the largest) and of the gradients (the
root mean square over that of the expected ones).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steppo_kernels as sk

from ..gates import fused_backend
from ..machine import DEFAULT_THREADS, threads
from ..memory import peak_bytes
from ..timing import Run, measure, runs
from ..variants import Variant
from ..vocabulary import peers
from ..vocabulary.cases import LogitsCase, Shape, logits_case, row_log_probs
from ..vocabulary.heads import available
from ..vocabulary.variants import (
    COMPILED_FLOAT,
    EAGER_FLOAT,
    EAGER_HALF,
    FUSED,
    TOKEN_LOG_PROBS,
    TRL_SELECTIVE,
)

SHAPE = Shape(8, 32, 32, 8)
CASE = f"[{SHAPE.tokens}, {SHAPE.vocabulary}]"
_ROWS = 32

# The errors allowed to log-probs (down to -3.1, where bf16 has 64ths) and to gradients, which all
# round to bf16. The fp32 of PyTorch is off by up to 7e-5 on rows of this length.
_TOLERANCES = {FUSED: (1e-5, 4e-3), EAGER_HALF: (0.02, 0.02), TRL_SELECTIVE: (0.02, 0.02)}
_FLOAT_TOLERANCES = 2e-4, 4e-3


def log_probs_of(case: LogitsCase, variant: Variant) -> Callable[[], Tensor]:
    """Return the call of a variant that gives the log-probs of all tokens."""
    logits, ids = case.logits, case.steps.token_ids
    if variant == FUSED:
        backend = fused_backend()
        return lambda: sk.token_log_probs(logits, ids, backend=backend)  # type: ignore[return-value]
    if variant == COMPILED_FLOAT:
        compiled = _compiled(torch.get_num_threads())
        return lambda: compiled(logits, ids)
    if variant == TRL_SELECTIVE:
        return lambda: peers.trl_selective(logits, ids)
    upcast = variant == EAGER_FLOAT
    return lambda: row_log_probs(logits.float() if upcast else logits, ids)


@functools.cache
def _compiled(num_threads: int) -> Callable[[Tensor, Tensor], Tensor]:
    del num_threads
    return torch.compile(
        lambda logits, ids: row_log_probs(logits.float(), ids), dynamic=False, fullgraph=True
    )


def call_of(variant: Variant, *, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Return the forward pass, or forward + backward with random upstream gradients."""
    case = logits_case(SHAPE)
    log_probs = log_probs_of(case, variant)
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (log_probs(),)

        return forward
    upstream = _upstream()

    def both() -> tuple[Tensor, ...]:
        found = log_probs()
        return found, *torch.autograd.grad(found, case.logits, upstream.to(found.dtype))

    return both


@functools.cache
def _upstream() -> Tensor:
    return torch.randn((SHAPE.rows, SHAPE.length), generator=torch.Generator().manual_seed(1))


@functools.cache
def expected() -> list[tuple[Tensor, Tensor]]:
    """Return log-probs and gradients in fp64, a few rows at a time."""
    case = logits_case(SHAPE)
    found = []
    parts = (
        values.split(_ROWS)
        for values in (
            case.logits.detach().flatten(0, 1),
            case.steps.token_ids.view(-1),
            _upstream().view(-1),
        )
    )
    for logits, ids, upstream in zip(*parts, strict=True):
        x = logits.double().requires_grad_()
        log_probs = row_log_probs(x, ids)
        found.append((log_probs.detach(), *torch.autograd.grad(log_probs, x, upstream.double())))
    return found


@functools.cache
def check(variant: Variant, num_threads: int) -> dict[str, float]:
    """Return errors against fp64 and the peak memory, or raise if the errors are too large."""
    with threads(num_threads):
        forward, both = (call_of(variant, backward=backward) for backward in (False, True))
        forward()
        found, grad = both()
        memory = {"forward_bytes": peak_bytes(forward), "both_bytes": peak_bytes(both)}
    error = squares = wanted_squares = 0.0
    every = zip(
        expected(),
        found.detach().view(-1).split(_ROWS),
        grad.flatten(0, 1).split(_ROWS),
        strict=True,
    )
    for (wanted, wanted_grad), log_probs, gradient in every:
        error = max(error, float((log_probs - wanted).abs().max()))
        squares += float((gradient - wanted_grad).square().sum())
        wanted_squares += float(wanted_grad.square().sum())
    errors = error, (squares / wanted_squares) ** 0.5
    tolerances = _TOLERANCES.get(variant, _FLOAT_TOLERANCES)
    for what, got, allowed in zip(("log-probs", "gradient"), errors, tolerances, strict=True):
        if not got <= allowed:
            raise AssertionError(
                f"{CASE}, {variant}: {what} off by {got:.1e}, allowed is {allowed:.0e}; nothing is "
                "timed"
            )
    return {"error_log_probs": errors[0], "error_gradient": errors[1], **memory}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize(
    "run",
    runs(CASE, available(TOKEN_LOG_PROBS), [DEFAULT_THREADS]),
    ids=str,
)
def bench_token_log_probs(benchmark: Any, run: Run, backward: bool) -> None:
    """What has to move at least: the logits; and for backward, again, and their gradient."""
    case = logits_case(SHAPE)
    info = dict(check(run.variant, run.threads))
    extra = info.pop("both_bytes"), info.pop("forward_bytes")
    measure(
        benchmark,
        run,
        call_of(run.variant, backward=backward),
        tokens=SHAPE.tokens,
        bytes_to_touch=case.logits.nbytes * (3 if backward else 1),
        info={
            "suite": "log_probs_both" if backward else "log_probs_forward",
            "extra_of_logits": extra[0 if backward else 1] / case.logits.nbytes,
            **info,
        },
    )
