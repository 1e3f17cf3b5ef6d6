"""Random compositions of constructors, views and functions, each held to the oracle.

A composition is a function of its seed and its size. Where one fails, smaller ones with the same
seed are tried, and the message names the smallest that fails too.
"""

from __future__ import annotations

import pytest
from targets import Target

from fuzz.calls import (
    check_broadcast,
    check_gae,
    check_log_probs,
    check_policy_loss,
    check_rollout_weights,
    check_step_log_ratios,
    check_value_loss,
)
from fuzz.draws import Draw
from fuzz.layouts import check_layout, draw_layout, goes_along_rows
from steppo_kernels.layout.step_layout import require_layout

CHUNKS = 20
COMPOSITIONS = 3000
# Kernels in Triton's interpreter take a hundred times as long.
INTERPRETED = 60
SIZES = (2, 4, 6, 9)


def compose(seed: int, size: int, target: Target) -> Draw:
    """Run one composition; raise AssertionError, with what was drawn, where it is wrong."""
    draw = Draw(seed, size, target.device)
    backend = target.backend
    try:
        pair = draw_layout(draw, backend)
        check_layout(pair.layout, pair.oracle)
        advantages, returns = check_gae(draw, pair, backend)
        per_token = check_broadcast(draw, pair, backend, advantages)
        if pair.oracle.shape == (len(pair.oracle.steps),):
            per_token = None
        check_policy_loss(draw, pair, backend, advantages, per_token)
        check_value_loss(draw, pair, backend, returns)
        if draw.chance(0.2):
            check_log_probs(draw, pair, backend)
        if draw.chance(0.2):
            check_step_log_ratios(draw, pair, backend)
        if draw.chance(0.3):
            check_rollout_weights(draw, pair, backend)
    except Exception as error:
        drawn = ", ".join(draw.words)
        raise AssertionError(f"compose({seed}, {size}, {target}): {drawn}: {error}") from error
    return draw


def run(seed: int, target: Target) -> None:
    """Run a composition, and if it fails its smaller relatives first."""
    size = SIZES[seed % len(SIZES)]
    try:
        compose(seed, size, target)
    except AssertionError:
        for smaller in range(1, size):
            compose(seed, smaller, target)
        raise


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_compositions_are_as_the_oracle_has_them(target: Target, chunk: int) -> None:
    count = INTERPRETED if target.interpreted else COMPOSITIONS
    seeds = range(chunk, count, CHUNKS)
    assert len(seeds) * CHUNKS == count
    for seed in seeds:
        run(seed, target)


def test_layouts_along_rows_and_others_are_drawn() -> None:
    """Of those that go along rows, kernels are told, unless they came about in another way."""
    told = []
    for seed in range(300):
        layout, oracle, _ = draw_layout(Draw(seed, SIZES[seed % len(SIZES)], "cpu"), "reference")
        told.append((goes_along_rows(oracle), require_layout(layout).along_rows))
    assert told.count((True, True)) >= 50
    assert told.count((False, False)) >= 50
    assert (False, True) not in told


def test_enough_compositions_are_run() -> None:
    seeds = [seed for chunk in range(CHUNKS) for seed in range(chunk, COMPOSITIONS, CHUNKS)]
    assert len(set(seeds)) >= 2000
