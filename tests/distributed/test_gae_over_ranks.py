"""step_gae whose advantages are whitened over all ranks: against one process with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import random_batch
from collectives import counted, parted
from functions_of_steps import close, rows_of
from torch import Tensor
from worlds import Worlds

from steppo_kernels import StepLayout, distributed, step_gae

SIZES = (2, 3)


def rows_of_rank(rows: int, size: int, seed: int) -> list[list[int]]:
    """Draw the rows of each rank: those of its micro-batches."""
    return [[row for part in own for row in part] for own in parted(rows, size, seed)]


def some_splits(rank: int, size: int) -> list[str]:
    drawn = []
    for seed in range(24):
        dtype = (torch.float32, torch.float64)[seed % 2]
        batch = random_batch(seed, 7, 30, dtype=dtype)
        split = rows_of_rank(7, size, seed)
        what = f"{dtype}, rows {split}"
        options: Any = {"gamma": 0.9, "lam": 0.8, "whiten": seed % 5 > 0}
        whole = step_gae(
            batch.rewards,
            batch.values,
            batch.layout,
            bootstrap_values=batch.bootstrap_values,
            **options,
        )
        own = rows_of(batch, split[rank])
        with counted() as said:
            found = distributed.step_gae(
                own.rewards,
                own.values,
                own.layout,
                bootstrap_values=own.bootstrap_values,
                **options,
            )
        assert (said.names, said.bytes) == (["all_gather"], [168]), what
        offsets = batch.layout.trajectory_offsets.tolist()
        steps = [s for row in split[rank] for s in range(offsets[row], offsets[row + 1])]
        assert found.advantages.dtype == dtype, what
        assert torch.equal(found.returns, whole.returns[steps]), what
        if dtype == torch.float64:
            close(found.advantages, whole.advantages[steps], what)
        else:
            exact = whole.advantages[steps]
            torch.testing.assert_close(found.advantages, exact, rtol=4e-7, atol=4e-7)
        drawn.append(what)
    return drawn


@pytest.mark.parametrize("size", SIZES)
def test_splits_of_rows(worlds: Worlds, size: int) -> None:
    drawn = worlds.run(size, some_splits)[0]
    # Some ranks have no row.
    assert any("[]" in what for what in drawn)


def of_lists(rank: int, lots: list[list[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the advantages of rewards that are given by rank, and how one process shifts them.

    Values are 0 and every step is a trajectory, so that a reward is the advantage.
    """
    rewards = torch.tensor(lots[rank], dtype=dtype)
    layout = StepLayout.from_mask(torch.ones(len(rewards), 1))
    found = distributed.step_gae(rewards, torch.zeros_like(rewards), layout).advantages
    raw = torch.tensor([x for lot in lots for x in lot], dtype=dtype).double()
    moved = raw - raw.mean() if len(raw) else raw
    if len(raw) and raw.max() == raw.min():
        # Their mean may be rounded.
        moved = torch.zeros_like(raw)
    elif len(raw):
        moved = moved / (raw.std() + 1e-8)
    begin = sum(map(len, lots[:rank]))
    return found, moved[begin : begin + len(rewards)]


LOTS = {
    "no step": [[], [], []],
    "one step": [[], [3.5], []],
    "one step a rank": [[1.0], [2.0], [4.0]],
    "all equal": [[0.1] * 11, [0.1], [0.1] * 19],
    "equal on each rank": [[0.1, 0.1, 0.1], [0.7], [0.3] * 7],
    "one is empty": [[1.0, 2.0], [], [5.0]],
    "far from 0": [[1e6, 1e6 + 1], [1e6 + 2], [1e6 + 0.5, 1e6 + 3.0]],
    "means far apart": [[-1e6, -1e6 + 1], [2.0], [1e6 + 0.5, 1e6 + 3.0]],
}


def some_lots(rank: int, size: int) -> None:
    for name, lots in LOTS.items():
        # With two ranks, the second one has what the last one would have too.
        given = lots if size == 3 else [lots[0], lots[1] + lots[2]]
        for dtype in (torch.float32, torch.float64):
            found, expected = of_lists(rank, given, dtype)
            error = (found.double() - expected).abs().max() if len(found) else torch.zeros(())
            scale = 1.0 + float(expected.abs().max()) if len(found) else 1.0
            limit = (1e-7 if dtype == torch.float32 else 1e-11) * scale
            assert float(error) <= limit, f"{name}, {dtype}: {error}"
            if name == "all equal":
                assert not found.any(), dtype


@pytest.mark.parametrize("size", SIZES)
def test_spreads(worlds: Worlds, size: int) -> None:
    worlds.run(size, some_lots)
