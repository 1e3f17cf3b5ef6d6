"""`step_gae` per token and per step, next to the loops of verl and of the StepPO authors."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels.backends.choice import Backend

from ..gates import assert_close, fused_backend
from ..machine import DEFAULT_THREADS, threads
from ..modes import MODES
from ..steps import peers
from ..steps.cases import policy_case, rows_mask
from ..steps.floors import gae_floor
from ..steps.variants import (
    FLOOR,
    FUSED,
    PAIR,
    PER_TOKEN,
    STEP_GAE,
    TABLES,
    TOKEN_GAE,
    VERL_LOOP,
    WITH_LAYOUT,
)
from ..timing import GROWTH_TURNS, Run, measure, runs
from ..variants import Variant

GAMMA, LAM = 0.99, 0.95

# Advantages of a recursion over 8192 tokens in fp32, against fp64.
_TOLERANCE = 1e-4

# Every position an action token; and multi-turn rows, where verl's loop skips the observations.
TOKENS, TURNS = "tokens 64x8192", "turns 64x8192"
GROWTH = [f"tokens {rows}x1250" for rows in (8, 24, 80, 240, 800, 2400, 8000)]

ROWS = "rows 2688x512"
_STEPS_PER_TRAJECTORY = 42

Pair = tuple[Tensor, Tensor]


@functools.cache
def token_case(case: str) -> tuple[Tensor, Tensor, Tensor, sk.StepLayout]:
    """Return mask, rewards (0 outside of actions), values and the layout of steps of one token."""
    kind, shape = case.split(" ")
    rows, length = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones((rows, length), dtype=torch.bool)
    if kind == "turns":
        mask = policy_case(case).mask
    rewards = 0.1 * torch.randn(mask.shape, generator=generator) * mask
    values = torch.randn(mask.shape, generator=generator)
    return mask, rewards, values, sk.StepLayout.from_mask(mask).per_token()


def token_bytes(case: str) -> int:
    """Return what token-level GAE has to move at least.

    For each token the reward (fp32) and the step id (int32) that says whose it is; for each action
    token its value (fp32), where that stands and where the token stands in time (int64), and the
    two results (fp32), written. The second pass of the whitening is not counted.
    """
    mask, _, _, layout = token_case(case)
    return 8 * mask.numel() + 28 * layout.num_tokens


def _gae_of(
    rewards: Tensor, values: Tensor, layout: sk.StepLayout, backend: Backend
) -> Callable[[], Pair]:
    def call() -> Pair:
        out = sk.step_gae(rewards, values, layout, gamma=GAMMA, lam=LAM, backend=backend)
        return out.advantages, out.returns

    return call


def token_gae(case: str, variant: Variant) -> Callable[[], Pair]:
    """Return the call that a variant makes: advantages and returns, ``[S]`` or ``[B, T]``."""
    mask, rewards, values, layout = token_case(case)
    if variant == FUSED:
        return _gae_of(rewards, values, layout, fused_backend())
    # verl's trainer hands the mask on as int64.
    integers = mask.to(torch.int64)
    core = peers.verl()
    loop = peers.token_gae_loop if core is None else core.compute_gae_advantage_return
    return lambda: loop(rewards, values, integers, GAMMA, LAM)


@functools.cache
def token_expected(case: str) -> Pair:
    """Return the fp64 reference at the action tokens."""
    mask, rewards, values, _ = token_case(case)
    advantages, returns = peers.token_gae_loop(rewards.double(), values.double(), mask, GAMMA, LAM)
    if mask.numel() <= 10**6:
        layout = token_case(case)[3]
        out = sk.step_gae(
            rewards.double(), values.double(), layout, gamma=GAMMA, lam=LAM, backend="reference"
        )
        assert_close(f"{case}, loop: advantages", advantages[mask], out.advantages, 1e-7)
        assert_close(f"{case}, loop: returns", returns[mask], out.returns, 1e-9)
    return advantages[mask], returns[mask]


@functools.cache
def token_gate(case: str, variant: Variant, num_threads: int) -> None:
    """Raise unless the variant, and with it the loop that stands in for verl's, is right."""
    mask, rewards, values, _ = token_case(case)
    results = {}
    with threads(num_threads):
        results[variant.name] = token_gae(case, variant)()
    if variant == VERL_LOOP:
        results["stand-in"] = peers.token_gae_loop(rewards, values, mask, GAMMA, LAM)
    for name, (advantages, returns) in results.items():
        if advantages.dim() == 2:
            advantages, returns = advantages[mask], returns[mask]
        wanted = token_expected(case)
        assert_close(f"{case}, {name}: advantages", advantages, wanted[0], _TOLERANCE)
        assert_close(f"{case}, {name}: returns", returns, wanted[1], _TOLERANCE)


@pytest.mark.parametrize(
    "run",
    [r for case in (TOKENS, TURNS) for r in runs(case, TOKEN_GAE, modes=MODES)],
    ids=str,
)
def bench_token_gae(benchmark: Any, run: Run) -> None:
    """One value a token, steps of one token."""
    _token_run(benchmark, run, {})


@pytest.mark.parametrize(
    "run",
    [r for case in GROWTH for r in runs(case, [FUSED], (DEFAULT_THREADS,), GROWTH_TURNS, MODES)],
    ids=str,
)
def bench_token_gae_growth(benchmark: Any, run: Run) -> None:
    """Cost against tokens."""
    _token_run(benchmark, run, {"growth": True})


def _token_run(benchmark: Any, run: Run, info: dict[str, Any]) -> None:
    mask, _, _, layout = token_case(run.case)
    token_gate(run.case, run.variant, run.threads)
    measure(
        benchmark,
        run,
        token_gae(run.case, run.variant),
        tokens=mask.numel(),
        bytes_to_touch=0 if "growth" in info else token_bytes(run.case),
        info={"suite": "token_gae", "action_tokens": layout.num_tokens, **info},
    )


@functools.cache
def row_case() -> dict[str, Any]:
    """Return what the authors' trainer has at this point: one row a step, 64 trajectories of 42."""
    _, shape = ROWS.split(" ")
    rows, length = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    mask = rows_mask(rows, length, generator)
    last = mask.sum(1, keepdim=True) - 1
    rewards = torch.zeros(mask.shape)
    rewards.scatter_(1, last, torch.randn((rows, 1), generator=generator))
    random = Random(0)
    names = [uuid.UUID(int=random.getrandbits(128)).hex for _ in range(rows // 42)]
    return {
        "rewards": rewards,
        "values": torch.randn(mask.shape, generator=generator),
        "mask": mask.to(torch.int64),
        "trajectory_uids": np.array(np.repeat(names, _STEPS_PER_TRAJECTORY), dtype=object),
        "step_indices": np.tile(np.arange(_STEPS_PER_TRAJECTORY, dtype=np.int32), len(names)),
    }


@functools.cache
def row_layout() -> sk.StepLayout:
    """Return the layout of `row_case`."""
    return _make_layout(row_case())


def _make_layout(case: dict[str, Any]) -> sk.StepLayout:
    return sk.StepLayout.from_rows(
        case["mask"], case["trajectory_uids"], torch.from_numpy(case["step_indices"])
    )


def row_gae(variant: Variant) -> Callable[[], Pair]:
    """Return the call that a variant makes: advantages and returns, ``[S]`` or ``[S, R]``."""
    case = row_case()
    if variant == TABLES:
        return lambda: peers.step_gae_tables(**case, gamma=GAMMA, lam=LAM)
    layout, backend = row_layout(), fused_backend()

    def fused(steps: sk.StepLayout = layout) -> Pair:
        out = sk.step_gae(
            case["rewards"], case["values"], steps, gamma=GAMMA, lam=LAM, backend=backend
        )
        return out.advantages, out.returns

    def spread(steps: sk.StepLayout = layout) -> Pair:
        advantages, returns = fused(steps)
        return sk.broadcast_to_tokens(advantages, steps), sk.broadcast_to_tokens(returns, steps)

    return {
        FUSED: fused,
        PER_TOKEN: spread,
        WITH_LAYOUT: lambda: spread(_make_layout(case)),
    }[variant]


@functools.cache
def row_gate(variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the fp64 reference."""
    case = row_case()
    out = sk.step_gae(
        case["rewards"].double(),
        case["values"].double(),
        row_layout(),
        gamma=GAMMA,
        lam=LAM,
        backend="reference",
    )
    with threads(num_threads):
        found = row_gae(variant)()
    for name, got, wanted in zip(
        ("advantages", "returns"), found, (out.advantages, out.returns), strict=True
    ):
        if got.dim() == 2:
            wanted = wanted[:, None] * case["mask"]
        assert_close(f"{ROWS}, {variant}: {name}", got, wanted, _TOLERANCE)


@pytest.mark.parametrize("run", runs(ROWS, STEP_GAE, modes=MODES), ids=str)
def bench_step_gae(benchmark: Any, run: Run) -> None:
    """One row a step.

    What it has to move at least: the reward of every token, as those outside of the response count
    too, and per step one value, four numbers that say where it lies, and two results.
    """
    layout = row_layout()
    row_gate(run.variant, run.threads)
    tokens = row_case()["mask"].numel()
    measure(
        benchmark,
        run,
        row_gae(run.variant),
        tokens=tokens,
        bytes_to_touch=4 * tokens + 44 * layout.num_steps,
        info={"suite": "step_gae", "steps": layout.num_steps},
    )


def turn_gae(variant: Variant) -> Callable[[], Pair]:
    """Return the call that a variant makes on multi-turn rows: advantages and returns ``[S]``."""
    _, rewards, values, _ = token_case(TURNS)
    layout = policy_case(TURNS).layout
    if variant == FLOOR:
        return gae_floor(rewards, layout)
    return _gae_of(rewards, values, layout, fused_backend() if variant == FUSED else "reference")


@functools.cache
def turn_gate(variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the fp64 reference."""
    if variant == FLOOR:
        return
    _, rewards, values, _ = token_case(TURNS)
    out = sk.step_gae(
        rewards.double(),
        values.double(),
        policy_case(TURNS).layout,
        gamma=GAMMA,
        lam=LAM,
        backend="reference",
    )
    with threads(num_threads):
        advantages, returns = turn_gae(variant)()
    assert_close(f"{TURNS}, {variant}: advantages", advantages, out.advantages, _TOLERANCE)
    assert_close(f"{TURNS}, {variant}: returns", returns, out.returns, _TOLERANCE)


@pytest.mark.parametrize("run", runs(TURNS, (*PAIR, FLOOR), modes=MODES), ids=str)
def bench_step_gae_turns(benchmark: Any, run: Run) -> None:
    """Multi-turn rows, with a reward and a value a token.

    What it has to move at least: the reward of every token, as those outside of actions count too,
    and per step one value, four numbers that say where it lies, and two results.
    """
    turn_gate(run.variant, run.threads)
    layout = policy_case(TURNS).layout
    tokens = layout.step_ids.numel()
    measure(
        benchmark,
        run,
        turn_gae(run.variant),
        tokens=tokens,
        bytes_to_touch=4 * tokens + 44 * layout.num_steps,
        info={"suite": "step_gae", "steps": layout.num_steps},
    )
