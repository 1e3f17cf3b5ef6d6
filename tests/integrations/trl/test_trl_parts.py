"""However an update is cut into micro-batches, generations and ranks, it is the same update."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import letter_game
import pytest
import torch
from torch import Tensor, multiprocessing

from steppo_kernels.integrations.trl.denominators import Denominators


def of_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward function of TRL."""
    return [float(sum(ids) % 7) for ids in completion_ids]


UPDATES = 3
# Completions of an update, over all parts.
ROWS = 16
ON_POLICY: dict[str, Any] = {}
TWICE: dict[str, Any] = {"num_iterations": 2, "epsilon": 0.02, "max_steps": 2 * UPDATES}
KINDS: dict[str, dict[str, Any]] = {
    "step_mean": ON_POLICY,
    "trajectory_mean": {"step_reduction": "trajectory_mean"},
    "token_mean": {"step_reduction": "token_mean", "step_ratio": "token", "epsilon": 0.2},
    "sum": {"step_reduction": "sum", "learning_rate": 0.002},
    "twice": TWICE,
    "twice, token_mean": {**TWICE, "step_reduction": "token_mean"},
    # Whitening is over a generation, whatever that is.
    "critic": {
        "step_critic": True,
        "step_lam": 0.9,
        "step_gamma": 0.9,
        "step_value_coef": 0.5,
        "scale_rewards": "none",
    },
    "critic, twice": {**TWICE, "step_critic": True},
    "entropy": {"entropy_coef": 0.1},
    "a group over ranks": {"num_generations": 8},
    "final": {"step_reward_source": "final", "reward_funcs": [of_ids]},
}
# Micro-batch, accumulation, micro-batches of a generation.
PARTS = {
    "accumulation 4": (ROWS // 4, 4, 4),
    "a generation a part": (ROWS // 4, 4, 1),
    "two generations an update": (ROWS // 4, 4, 2),
}
RANKS = {
    "2 ranks": (ROWS // 2, 1, 1),
    "2 ranks, accumulation 2": (ROWS // 4, 2, 2),
    "2 ranks, two generations": (ROWS // 4, 2, 1),
}


def trained(folder: Path, rows: int, accumulation: int, generation: int, **given: Any) -> Any:
    """Return the parameters after three updates by plain gradient descent, and the trainer."""
    options = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": UPDATES,
        **given,
    }
    made = letter_game.trainer(
        folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=generation,
        **options,
    )
    made.train()
    policy = made.accelerator.unwrap_model(made.model)
    return {name: one.detach().clone() for name, one in policy.named_parameters()}, made


def log_of(made: Any) -> list[dict[str, Any]]:
    """Return what was logged of each update."""
    return [entry for entry in made.state.log_history if "steps/num_steps" in entry]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    before = dict(letter_game.model().named_parameters())
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-6, msg=name)
    moved = max(float((expected[name] - one.detach()).abs().max()) for name, one in before.items())
    # The updates are large beside that tolerance.
    assert moved > 1e-3


def goes(kind: str, rows: int, generation: int, ranks: int = 1) -> bool:
    """Whether a kind is the same update in another cut.

    Generations that are used twice are another order of updates, and a group is of one generation.
    """
    size = rows * generation * ranks
    is_whole = size == ROWS
    return (is_whole or "twice" not in kind) and size % KINDS[kind].get("num_generations", 4) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of whole batches, of each kind."""
    kept: dict[str, tuple[dict[str, Tensor], list[Any]]] = {}

    def of(kind: str) -> tuple[dict[str, Tensor], list[Any]]:
        if kind not in kept:
            found, made = trained(tmp_path_factory.mktemp("whole"), ROWS, 1, 1, **KINDS[kind])
            kept[kind] = found, log_of(made)
        return kept[kind]

    return of


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (name, kind)
        for name, (rows, _, generation) in PARTS.items()
        for kind in KINDS
        if goes(kind, rows, generation)
    ],
)
def test_micro_batches_make_the_update_of_the_whole(parts, kind, whole, tmp_path):
    found, _ = trained(tmp_path, *PARTS[parts], **KINDS[kind])
    assert_same(found, whole(kind)[0])


def _rank(rank: int, port: int, folder: str, kinds: list[str]) -> None:
    """Train on one of two ranks, every kind and way one after the other."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    for kind in kinds:
        for name, parts in RANKS.items():
            if not goes(kind, parts[0], parts[2], ranks=2):
                continue
            found, made = trained(Path(folder) / "out", *parts, **KINDS[kind])
            if rank == 0:
                torch.save((found, log_of(made)), Path(folder) / f"{kind}, {name}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Not through Python's own exit, in which a thread of gloo now and again ends the process.
    os._exit(0)


def test_ranks_make_the_update_of_one_process(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # TRL prepares a process once: all kinds run in the same two.
    multiprocessing.spawn(_rank, (port, str(tmp_path), list(KINDS)), nprocs=2)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == sum(
        goes(kind, rows, generation, ranks=2)
        for kind in KINDS
        for rows, _, generation in RANKS.values()
    )
    assert (tmp_path / "a group over ranks, 2 ranks, two generations.pt") in files
    for file in files:
        kind = file.stem.partition(", 2 ranks")[0]
        found, log = torch.load(file)
        expected, expected_log = whole(kind)
        assert_same(found, expected)
        # Metrics are of all ranks.
        if file.stem.endswith(", 2 ranks"):
            for entry, one in zip(log, expected_log, strict=True):
                names = {name for name in one if name.startswith(("steps/", "clip_ratio/"))}
                # Advantages that are 0 but for rounding are dead or not.
                names.discard("steps/dead_token_fraction")
                assert len(names) >= 10
                for name in names | ({"entropy", "policy_loss", "reward", "loss"} & one.keys()):
                    assert entry[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def expected_normalizers(
    counts: list[list[int]], parts: int, period: int, windows: list[int]
) -> tuple[list[float], list[float]]:
    """Return what each micro-batch is weighted by in the end, and what it should be."""
    denominators = Denominators("step_mean", 2)
    weights: list[float] = []
    wanted: list[float] = []
    step = 0
    for length in windows:
        of_window = []
        for _ in range(length):
            is_new = step % period == 0
            if is_new:
                denominators.begin_generation(counts[step // period], step, period)
            normalizer, scale = denominators.at(step, length, is_new=is_new)
            of_window = [scale * weight for weight in of_window] + [1 / normalizer]
            step += 1
        seen = range(step - length, step)
        total = sum(counts[one // period][one % parts] for one in seen)
        weights += of_window
        wanted += [2 / total] * length
    return weights, wanted


@pytest.mark.parametrize(
    ("parts", "iterations", "windows"),
    [
        (4, 1, [4, 4, 4]),
        (4, 1, [2, 2, 2, 2]),
        (2, 1, [4, 4]),
        (3, 1, [4, 4, 4]),
        (4, 1, [3, 3, 3, 3]),
        (4, 2, [4, 4, 4, 4]),
        (2, 2, [4, 4]),
        (3, 2, [4, 4, 4]),
        # The last update of an epoch is shorter, and those after it begin elsewhere.
        (4, 1, [4, 4, 2, 4, 4, 2]),
        (1, 1, [4, 2, 4, 2]),
    ],
)
def test_every_part_is_weighted_by_the_count_of_its_update(parts, iterations, windows):
    period = parts * iterations
    generations = sum(windows) // period + 1
    counts = [[3 + 7 * g + 2 * part for part in range(parts)] for g in range(generations)]
    weights, wanted = expected_normalizers(counts, parts, period, windows)
    assert weights == pytest.approx(wanted, rel=1e-12)


def test_parts_without_a_step_change_nothing():
    denominators = Denominators("step_mean", 1)
    denominators.begin_generation([0.0], 0, 1)
    assert denominators.at(0, 2, is_new=True) == (0.0, 1.0)
    denominators.begin_generation([5.0], 1, 1)
    # What was accumulated before is 0, whatever it is multiplied by.
    assert denominators.at(1, 2, is_new=True) == (5.0, 0.0)
