"""`linear_token_log_probs` without gradients, as for old and reference policies."""

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
from ..vocabulary.cases import Shape, head_case, row_log_probs
from ..vocabulary.heads import available, eager_rows
from ..vocabulary.variants import (
    BARE_PRODUCT,
    EAGER_ACTIONS,
    FUSED,
    LIGER_SCALED,
    LINEAR_LOG_PROBS,
    TRL_CHUNKED,
)

SHAPE = Shape(8, 128, 32, 8)
CASE = str(SHAPE)

# bf16 logits of up to 22 are rounded by up to 6 hundredths, and so are the log-sum-exps.
_TOLERANCE = 0.15


def call_of(variant: Variant) -> Callable[[], Tensor]:
    """Return the call of a variant that gives log-probs: ``[256]``, or of every token."""
    case = head_case(SHAPE)
    backend = fused_backend()

    calls: dict[Variant, Callable[[], Tensor]] = {
        FUSED: lambda: sk.linear_token_log_probs(  # type: ignore[dict-item,return-value]
            case.hidden, case.weight, case.steps.token_ids, mask=case.steps.mask, backend=backend
        ),
        BARE_PRODUCT: lambda: torch.mm(peers.rows_of(case)[0], case.weight.t()),
        EAGER_ACTIONS: lambda: eager_rows(case),
        LIGER_SCALED: lambda: peers.liger_scaled(case),
        TRL_CHUNKED: lambda: peers.trl_chunked(case),
    }
    call = calls[variant]

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return call()

    return without_gradients


@functools.cache
def check(variant: Variant, num_threads: int) -> dict[str, float]:
    """Return the largest error of a log-prob and the peak memory, or raise if it is too large."""
    case = head_case(SHAPE)
    with threads(num_threads):
        call = call_of(variant)
        if variant == BARE_PRODUCT:
            return {"extra_bytes": peak_bytes(call)}
        found = call().view(-1)
        peak = peak_bytes(call)
    index = case.steps.index
    hidden, ids = peers.rows_of(case)
    with torch.no_grad():
        wanted = row_log_probs(hidden.double() @ case.weight.double().t(), ids)
    error = float(((found if len(found) == len(index) else found[index]) - wanted).abs().max())
    if not error <= _TOLERANCE:
        raise AssertionError(
            f"{CASE}, {variant}: a log-prob is off by {error:.1e}, allowed is {_TOLERANCE}; "
            "nothing is timed"
        )
    return {"error_log_probs": error, "extra_bytes": peak}


@pytest.mark.parametrize("run", runs(CASE, available(LINEAR_LOG_PROBS), [DEFAULT_THREADS]), ids=str)
def bench_linear_log_probs(benchmark: Any, run: Run) -> None:
    """Only the action tokens of the case of `bench_linear_loss`."""
    info = check(run.variant, run.threads)
    measure(
        benchmark,
        run,
        call_of(run.variant),
        tokens=SHAPE.action_tokens,
        info={"suite": "linear_log_probs", **info},
    )
