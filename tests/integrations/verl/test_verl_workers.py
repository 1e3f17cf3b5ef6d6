"""The losses in verl's own TrainingWorker with the FSDP2 engine, on one and two ranks of gloo."""

from __future__ import annotations

import json

import pytest
import verl_toy
from verl_processes import run_ranks

# Loss, rows a micro-batch, and what differs from the defaults. Each makes two updates.
CASES = {
    "gspo": {"loss": "gspo", "micro": 4},
    "steppo": {"loss": "steppo", "micro": 4},
    "steppo-whole": {"loss": "steppo", "micro": 16},
    "gspo-all": {"loss": "gspo", "micro": 4, "kl": True, "entropy": 0.01, "mode": "token-mean"},
    "steppo-all": {"loss": "steppo", "micro": 4, "kl": True, "entropy": 0.01, "mode": "token-mean"},
    "gspo-packed": {"loss": "gspo", "micro": 4, "remove_padding": True},
    "steppo-packed": {"loss": "steppo", "micro": 4, "remove_padding": True},
    "gspo-bf16": {"loss": "gspo", "micro": 4, "dtype": "bf16"},
    "steppo-bf16": {"loss": "steppo", "micro": 4, "dtype": "bf16"},
    "capo": {"loss": "capo", "micro": 4, "settings": {"ratio_center": 0.0}},
    "capo-whole": {"loss": "capo", "micro": 16, "settings": {"ratio_center": 0.0}},
    "runs": {"loss": "steppo", "micro": 4, "settings": {"rows_are_steps": False}},
    "runs-whole": {"loss": "steppo", "micro": 16, "settings": {"rows_are_steps": False}},
    "critic": {"loss": "critic", "micro": 4},
    "critic-whole": {"loss": "critic", "micro": 16},
}
ON_TWO_RANKS = ("gspo", "steppo", "steppo-all", "capo", "runs", "critic")


def results(folder, world: int, names) -> dict[str, dict]:
    verl_toy.write_models(folder)
    cases, found = folder / "cases.json", folder / "results.json"
    cases.write_text(json.dumps({name: CASES[name] for name in names}))
    run_ranks("verl_worker.py", world, str(folder), str(cases), str(found))
    return json.loads(found.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    return results(tmp_path_factory.mktemp("alone"), 1, CASES)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    return results(tmp_path_factory.mktemp("ranks"), 2, ON_TWO_RANKS)


def same(found: dict, wanted: dict, rel: float) -> None:
    """Losses and gradient norms of both updates, and the weights after them."""
    ours, others = found["metrics"], wanted["metrics"]
    norms = ours["grad_norm"]
    assert len(norms) == 2
    assert min(norms) > 1e-3
    assert norms == pytest.approx(others["grad_norm"], rel=rel)
    losses = {name for name in ours if name.endswith("_loss")}
    assert losses
    assert losses == {name for name in others if name.endswith("_loss")}
    for name in losses:
        assert ours[name] == pytest.approx(others[name], rel=rel, abs=1e-6), name
    assert found["weights"] == pytest.approx(wanted["weights"], rel=rel, abs=1e-3)


@pytest.mark.parametrize("how", ["", "-all", "-packed", "-bf16"])
def test_steppo_trains_as_gspo_does(alone, how):
    same(alone[f"steppo{how}"], alone[f"gspo{how}"], 1e-4)


@pytest.mark.parametrize("name", ["steppo", "capo", "runs", "critic"])
def test_micro_batches_change_nothing(alone, name):
    same(alone[name], alone[f"{name}-whole"], 1e-4)


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_ranks_change_nothing(alone, two_ranks, name):
    same(two_ranks[name], alone[name], 1e-4)


def test_cases_differ_where_they_should(alone):
    norms = {name: alone[name]["metrics"]["grad_norm"][0] for name in ("steppo", "capo", "runs")}
    assert len({round(norm, 4) for norm in norms.values()}) == 3, norms
    clipped = alone["steppo"]["metrics"]["actor/pg_clipfrac"]
    assert any(0 < one < 1 for one in clipped), clipped
