"""`steppo_loss`, forward + backward: step ratios, token ratios, and advantages that vary in a step.

Beside it run eager and compiled PyTorch, the policy losses of verl and TRL, and the floor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import steppo_kernels as sk

from ..gates import assert_close, fused_backend
from ..machine import DEFAULT_THREADS, THREADS, threads
from ..memory import peak_bytes, peak_resident_bytes
from ..modes import MODES
from ..steps import peers, variants
from ..steps.cases import GSPO_TOKEN, STEP, TOKEN, Objective, policy_case, policy_step
from ..steps.floors import policy_floor
from ..steps.variants import COMPILED, EAGER, FLOOR, GSPO, LAYOUT, MASK, TRL, VANILLA
from ..timing import GROWTH_TURNS, Run, measure, runs
from ..variants import Variant

ROWS, TURNS = "rows 512x512", "turns 64x8192"
# 10^4 to 10^7 tokens. Rows are short enough for the smallest batch to have eight of them.
GROWTH = [f"turns {rows}x1250" for rows in (8, 24, 80, 240, 800, 2400, 8000)]
GROWTH_VARIANTS = (LAYOUT, MASK, EAGER)

# fp32 sums of up to 512 terms, and one more rounding of each ratio.
_TOLERANCE = 2e-5

Loss = Callable[[], Tensor]


def loss_of(case_name: str, objective: Objective, variant: Variant) -> Loss:
    """Return the call that a variant makes on a case."""
    case = policy_case(case_name, objective)
    x, old, layout, config = case.log_probs, case.old_log_probs, case.layout, objective.config
    spread, mask = case.token_advantages, case.mask
    if variant in (LAYOUT, EAGER):
        backend = fused_backend() if variant == LAYOUT else "reference"
        return lambda: (
            sk.steppo_loss(x, old, case.advantages, layout, config=config, backend=backend).loss
        )
    if variant == MASK:
        backend = fused_backend()
        return lambda: sk.steppo_loss(x, old, spread, mask, config=config, backend=backend).loss
    if variant == COMPILED:
        compiled = _compiled(case_name, torch.get_num_threads())
        return lambda: compiled(x, old, case.advantages)[0]
    if variant == FLOOR:
        return policy_floor(x, layout)
    if variant in (GSPO, VANILLA):
        loss = peers.verl_loss("gspo" if variant == GSPO else "vanilla", config)
        # verl's trainer hands the mask on as int64.
        integers = mask.to(torch.int64)
        return lambda: loss(
            old_log_prob=old, log_prob=x, advantages=spread, response_mask=integers
        )[0]
    make = peers.trl_loss if variant == TRL else peers.trl_formula
    return make(x, old, spread, mask, config)


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
def expected(case_name: str, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of the reference in fp64."""
    case = policy_case(case_name, objective)
    x = case.log_probs.detach().double().requires_grad_()
    loss = sk.steppo_loss(
        x,
        case.old_log_probs.double(),
        case.advantages.double(),
        case.layout,
        config=objective.config,
        backend="reference",
    ).loss
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


@functools.cache
def gate(case_name: str, objective: Objective, variant: Variant, num_threads: int) -> None:
    """Raise unless the variant, and with TRL its formula, gives the fp64 loss and gradient."""
    if variant == FLOOR:
        return
    case = policy_case(case_name, objective)
    calls = {variant.name: loss_of(case_name, objective, variant)}
    if variant == TRL:
        calls["formula of TRL"] = loss_of(case_name, objective, variants.TRL_FORMULA)
    expected_loss, expected_grad = expected(case_name, objective)
    for name, call in calls.items():
        with threads(num_threads):
            found = call()
            (grad,) = torch.autograd.grad(found, case.log_probs)
        loss, wanted = found.item(), expected_loss.item()
        # The loss is a mean of at least S terms of about 1 and either sign.
        spread = case.layout.num_steps**-0.5
        where = f"{objective.suite}, {case_name}, {name}"
        if not abs(loss - wanted) <= _TOLERANCE * spread:
            raise AssertionError(f"{where}: loss {loss}, expected {wanted}; nothing is timed")
        assert_close(f"{where}: gradient", grad, expected_grad, _TOLERANCE)
        if bool(grad[~case.mask].any()):
            raise AssertionError(f"{where}: a masked token has a gradient")


@functools.cache
def extra_bytes(case_name: str, objective: Objective, variant: Variant, num_threads: int) -> int:
    """Return the peak of torch's allocations over one forward + backward, its gradient included."""
    case = policy_case(case_name, objective)
    with threads(num_threads):
        step, reset = policy_step(case, loss_of(case_name, objective, variant))
        reset()
        peak = peak_bytes(step)
        reset()
    return peak


def _run(benchmark: Any, run: Run, objective: Objective, info: dict[str, Any]) -> None:
    case = policy_case(run.case, objective)
    gate(run.case, objective, run.variant, run.threads)
    with threads(run.threads):
        step, reset = policy_step(case, loss_of(run.case, objective, run.variant))
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
            "suite": objective.suite,
            "action_tokens": case.layout.num_tokens,
            "steps": case.layout.num_steps,
            **info,
        },
    )
    reset()


def _cases(found: Iterable[Variant], counts: Iterable[int] = THREADS) -> list[Run]:
    """Return the runs of both cases; verl's gspo takes a row for a step."""
    there = peers.available(found)
    return [
        *runs(ROWS, there, counts, modes=MODES),
        *runs(TURNS, [v for v in there if v != GSPO], counts, modes=MODES),
    ]


def _speed(benchmark: Any, run: Run, objective: Objective) -> None:
    memory = extra_bytes(run.case, objective, run.variant, run.threads)
    tokens = policy_case(run.case, objective).tokens
    _run(benchmark, run, objective, {"extra_bytes_per_token": memory / tokens})


@pytest.mark.parametrize("run", _cases(variants.POLICY_LOSS), ids=str)
def bench_policy_loss(benchmark: Any, run: Run) -> None:
    """Speed and memory of the default: a ratio and an advantage a step."""
    _speed(benchmark, run, STEP)


@pytest.mark.parametrize("run", _cases(variants.TOKEN_LOSS, (DEFAULT_THREADS,)), ids=str)
def bench_token_loss(benchmark: Any, run: Run) -> None:
    """Speed and memory with a ratio a token and an advantage a step."""
    _speed(benchmark, run, TOKEN)


@pytest.mark.parametrize("run", _cases(variants.GSPO_TOKEN, (DEFAULT_THREADS,)), ids=str)
def bench_token_advantages(benchmark: Any, run: Run) -> None:
    """Speed and memory with a ratio a step and advantages that vary within it (GSPO-token)."""
    _speed(benchmark, run, GSPO_TOKEN)


@pytest.mark.parametrize(
    "run",
    [
        r
        for case in GROWTH
        for r in runs(case, GROWTH_VARIANTS, (DEFAULT_THREADS,), GROWTH_TURNS, MODES)
    ],
    ids=str,
)
def bench_policy_loss_growth(benchmark: Any, run: Run) -> None:
    """Cost against tokens; at the largest size also the resident memory."""
    info: dict[str, Any] = {"growth": True}
    if run.case == GROWTH[-1] and run.turn == 0 and run.mode == MODES[0]:
        case = policy_case(run.case)
        step, reset = policy_step(case, loss_of(run.case, STEP, run.variant))
        step()
        reset()
        if (resident := peak_resident_bytes(step)) is not None:
            info["resident_bytes_per_token"] = resident / case.tokens
        reset()
    _run(benchmark, run, STEP, info)
