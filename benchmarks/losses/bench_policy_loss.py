"""`steppo_loss`, forward + backward, next to eager and compiled PyTorch and verl's gspo loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steppo_kernels as sk

from ..gates import assert_close, fused_backend
from ..machine import DEFAULT_THREADS, threads
from ..memory import peak_bytes, peak_resident_bytes
from ..steps import peers
from ..steps.cases import policy_case, policy_step
from ..steps.variants import COMPILED, EAGER, GSPO, LAYOUT, MASK, POLICY_LOSS
from ..timing import GROWTH_TURNS, Run, measure, runs
from ..variants import Variant

ROWS, TURNS = "rows 512x512", "turns 64x8192"
# 10^4 to 10^7 tokens. Rows are short enough for the smallest batch to have eight of them.
GROWTH = [f"turns {rows}x1250" for rows in (8, 24, 80, 240, 800, 2400, 8000)]
GROWTH_VARIANTS = (LAYOUT, MASK, EAGER)

# fp32 sums of up to 512 terms, and one more rounding of each ratio.
_TOLERANCE = 2e-5

Loss = Callable[[], Tensor]


def loss_of(case_name: str, variant: Variant) -> Loss:
    """Return the call that a variant makes on a case."""
    case = policy_case(case_name)
    x, old, layout = case.log_probs, case.old_log_probs, case.layout
    if variant == LAYOUT:
        backend = fused_backend()
        return lambda: sk.steppo_loss(x, old, case.advantages, layout, backend=backend).loss
    if variant == MASK:
        backend = fused_backend()
        return lambda: (
            sk.steppo_loss(x, old, case.token_advantages, case.mask, backend=backend).loss
        )
    if variant == EAGER:
        return lambda: sk.steppo_loss(x, old, case.advantages, layout, backend="reference").loss
    if variant == COMPILED:
        compiled = _compiled(case_name, torch.get_num_threads())
        return lambda: compiled(x, old, case.advantages)[0]
    config = sk.StepPOConfig()
    gspo = peers.verl_gspo(config.clip_low, config.clip_high)
    # verl's trainer hands the mask on as int64.
    mask = case.mask.to(torch.int64)
    return lambda: gspo(
        old_log_prob=old, log_prob=x, advantages=case.token_advantages, response_mask=mask
    )[0]


@functools.cache
def _compiled(case_name: str, num_threads: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the compiled reference, for one shape and number of threads, already warm."""
    del num_threads
    case = policy_case(case_name)

    def loss(x: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        out = sk.steppo_loss(x, old, advantages, case.layout, backend="reference")
        return out.loss, out.metrics.values

    compiled = torch.compile(loss, dynamic=False, fullgraph=True)
    step, reset = policy_step(
        case, lambda: compiled(case.log_probs, case.old_log_probs, case.advantages)[0]
    )
    for _ in range(3):
        reset()
        step()
    return compiled


@functools.cache
def expected(case_name: str) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of the reference in fp64."""
    case = policy_case(case_name)
    x = case.log_probs.detach().double().requires_grad_()
    loss = sk.steppo_loss(
        x, case.old_log_probs.double(), case.advantages.double(), case.layout, backend="reference"
    ).loss
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


@functools.cache
def gate(case_name: str, variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the fp64 loss and gradient."""
    case = policy_case(case_name)
    with threads(num_threads):
        found = loss_of(case_name, variant)()
        (grad,) = torch.autograd.grad(found, case.log_probs)
    expected_loss, expected_grad = expected(case_name)
    loss, wanted = found.item(), expected_loss.item()
    # The loss is a mean of S terms of about 1 and either sign.
    spread = case.layout.num_steps**-0.5
    if not abs(loss - wanted) <= _TOLERANCE * spread:
        raise AssertionError(
            f"{case_name}, {variant}: loss {loss}, expected {wanted}; nothing is timed"
        )
    assert_close(f"{case_name}, {variant}: gradient", grad, expected_grad, _TOLERANCE)
    if bool(grad[~case.mask].any()):
        raise AssertionError(f"{case_name}, {variant}: a masked token has a gradient")


@functools.cache
def extra_bytes(case_name: str, variant: Variant, num_threads: int) -> int:
    """Return the peak of torch's allocations over one forward + backward, its gradient included."""
    case = policy_case(case_name)
    with threads(num_threads):
        step, reset = policy_step(case, loss_of(case_name, variant))
        reset()
        peak = peak_bytes(step)
        reset()
    return peak


def _run(benchmark: Any, run: Run, info: dict[str, Any]) -> None:
    case = policy_case(run.case)
    gate(run.case, run.variant, run.threads)
    with threads(run.threads):
        step, reset = policy_step(case, loss_of(run.case, run.variant))
    measure(
        benchmark,
        run,
        step,
        setup=reset,
        tokens=case.tokens,
        bytes_to_touch=(
            0 if "growth" in info else case.bytes_to_touch(with_layout=run.variant != MASK)
        ),
        info={
            "suite": "policy_loss",
            "action_tokens": case.layout.num_tokens,
            "steps": case.layout.num_steps,
            **info,
        },
    )
    reset()


_PAIRS = [
    *runs(ROWS, [v for v in POLICY_LOSS if v != GSPO or peers.verl()]),
    *runs(TURNS, [v for v in POLICY_LOSS if v != GSPO]),
]


@pytest.mark.parametrize("run", _PAIRS, ids=str)
def bench_policy_loss(benchmark: Any, run: Run) -> None:
    """Speed and memory."""
    memory = extra_bytes(run.case, run.variant, run.threads) / policy_case(run.case).tokens
    _run(benchmark, run, {"extra_bytes_per_token": memory})


@pytest.mark.parametrize(
    "run",
    [r for case in GROWTH for r in runs(case, GROWTH_VARIANTS, (DEFAULT_THREADS,), GROWTH_TURNS)],
    ids=str,
)
def bench_policy_loss_growth(benchmark: Any, run: Run) -> None:
    """Cost against tokens; at the largest size also the resident memory."""
    info: dict[str, Any] = {"growth": True}
    if run.case == GROWTH[-1] and run.turn == 0:
        case = policy_case(run.case)
        step, reset = policy_step(case, loss_of(run.case, run.variant))
        step()
        reset()
        if (resident := peak_resident_bytes(step)) is not None:
            info["resident_bytes_per_token"] = resident / case.tokens
        reset()
    _run(benchmark, run, info)
