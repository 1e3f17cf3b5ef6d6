"""Layouts and configs that go through a file or a pipe."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch

from steppo_kernels import StepLayout, StepPOConfig, rollout_weights, step_gae, steppo_loss
from steppo_kernels.layout.step_layout import require_layout


def layouts() -> dict[str, StepLayout]:
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    rows = StepLayout.from_rows(
        mask, ["a", "b", "a"], [1, 0, 0], valid=torch.tensor([True, True, False])
    )
    turns = StepLayout.from_mask(mask)
    return {
        "mask": turns,
        "packed": StepLayout.from_mask(mask.view(-1), cu_seqlens=torch.tensor([0, 0, 7, 15])),
        "rows": rows,
        "rows, per token": rows.per_token(),
        "rows, per trajectory": rows.per_trajectory(),
        "kept": turns.keep(mask.flip(1)),
        "kept, per token": turns.keep(mask.flip(1)).per_token(),
        "no token": StepLayout.from_mask(torch.zeros(2, 3)),
        "no row": StepLayout.from_mask(torch.zeros(0, 3)),
        "no column": StepLayout.from_rows(torch.zeros(2, 0), [0, 0], [0, 1]),
    }


@pytest.mark.parametrize("weights_only", [True, False])
def test_results_come_back_as_they_were(weights_only):
    layout = layouts()["mask"]
    new, old = torch.randn(3, 5), torch.randn(3, 5)
    results = {
        "loss": steppo_loss(new, old, torch.ones(layout.num_steps), layout),
        "advantages": step_gae(old, new, layout),
        "weights": rollout_weights(new, old, layout, level="step"),
    }
    again = torch.load(saved(results), weights_only=weights_only)
    assert torch.equal(again["loss"].loss, results["loss"].loss)
    assert torch.equal(again["advantages"].returns, results["advantages"].returns)
    assert torch.equal(again["weights"].weights, results["weights"].weights)
    for name in ("loss", "weights"):
        assert type(again[name]) is type(results[name])
        assert again[name].metrics.as_dict() == results[name].metrics.as_dict()


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", layouts())
def test_a_layout_comes_back_as_it_was(name):
    layout = layouts()[name]
    for again in (
        torch.load(saved({"layout": layout}))["layout"],
        torch.load(saved(layout), weights_only=False),
        pickle.loads(pickle.dumps(layout)),
        copy.copy(layout),
        copy.deepcopy(layout),
    ):
        assert again is not layout
        wanted = layout.tensors()
        for tensor_name, value in again.tensors().items():
            assert torch.equal(value, wanted[tensor_name])
            assert value.dtype == wanted[tensor_name].dtype
        assert again.tensors().keys() == wanted.keys()
        rewards = torch.arange(float(layout.shape.numel())).view(layout.shape)
        values = torch.zeros(layout.num_steps)
        found = [step_gae(rewards, values, one).returns for one in (again, layout)]
        assert torch.equal(*found)


def test_a_layout_that_is_loaded_to_another_device():
    layout = layouts()["mask"]
    assert torch.load(saved(layout), map_location="meta").device.type == "meta"


# The tensor, and what somebody wrote into the file: none of it may reach a kernel.
_DAMAGE = {
    "an index beyond the tokens": ("token_index", lambda v: v + 100),
    "a negative index": ("token_index", lambda v: v - 2),
    "an index twice": ("token_index", lambda v: v[:1].expand(len(v))),
    "tokens back in time": ("token_index", lambda v: v.flip(0)),
    "ids that do not go with the index": ("step_ids", lambda v: v.roll(1)),
    "ids of no step": ("step_ids", lambda v: v + 50),
    "ids of three dimensions": ("step_ids", lambda v: v[None]),
    "huge offsets": ("step_offsets", lambda v: torch.where(v > 0, 2**40, v)),
    "offsets that decrease": ("step_offsets", lambda v: v.flip(0)),
    "offsets that overflow": ("step_offsets", lambda v: v.index_fill(0, torch.tensor(1), -(2**63))),
    "no offsets": ("step_offsets", lambda v: v[:0]),
    "other lengths": ("step_lengths", lambda v: v + 1),
    "lengths of another dtype": ("step_lengths", lambda v: v.long()),
    "steps beyond": ("trajectory_steps", lambda v: v + 1),
    "a step twice": ("trajectory_steps", lambda v: v * 0),
    "trajectories beyond": ("trajectory_offsets", lambda v: v + 1),
    "other counts": ("trajectory_counts", lambda v: v + 1),
    "states beyond": ("state_index", lambda v: v + 1000),
    "fewer states": ("state_index", lambda v: v[1:]),
    "rows beyond": ("step_rows", lambda v: v + 1000),
    "row offsets beyond": ("row_offsets", lambda v: v * 2),
    "float offsets": ("row_offsets", lambda v: v.float()),
    "a list": ("row_offsets", lambda v: v.tolist()),
    "rewards beyond": ("reward_index", lambda v: v + 1000),
    "rewards twice": ("reward_index", lambda v: v * 0),
    "reward offsets beyond": ("reward_offsets", lambda v: v + 1),
    "a sparse tensor": ("token_index", lambda v: v.to_sparse()),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_layout_is_refused_when_it_is_loaded(damage):
    whole = StepLayout.from_mask(torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]))
    layout = whole.keep(torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]))
    name, change = _DAMAGE[damage]
    state = layout.__getstate__()
    for given in (
        {**state, name: change(state[name])},
        {k: v for k, v in state.items() if k != name},
    ):
        if given.keys() != state.keys() and name == "reward_offsets":
            continue
        with pytest.raises((ValueError, TypeError), match=r"^StepLayout.*: got .*, expected "):
            object.__new__(StepLayout).__setstate__(given)

    class Damaged:
        def __reduce__(self):
            return StepLayout.__new__, (StepLayout,), {**state, name: change(state[name])}

    file = saved(Damaged())
    with pytest.raises((ValueError, TypeError, pickle.UnpicklingError)):
        torch.load(file, weights_only=False)


def test_a_layout_whose_steps_exchanged_their_places_in_a_row_is_refused():
    """Its tensors agree with each other; kernels rely on ids that do not decrease along a row."""
    layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1, 1]]))
    ids = layout.step_ids
    state = layout.__getstate__()
    exchanged = {
        "step_ids": torch.where(ids >= 0, 1 - ids, ids),
        "token_index": torch.tensor([3, 4, 0, 1]),
        "state_index": torch.tensor([3, 0]),
    }
    with pytest.raises(ValueError, match=r"^StepLayout.step_ids: got entries that do not go"):
        object.__new__(StepLayout).__setstate__({**state, **exchanged})


@pytest.mark.parametrize("name", layouts())
def test_where_whole_steps_lie_is_neither_shown_nor_saved(name):
    """It follows from the other tensors, and is found again when they are loaded."""
    layout = layouts()[name]
    state = layout.__getstate__()
    assert "step_starts" not in {*state, *layout.tensors()}
    held = require_layout(layout)
    starts = []
    for begin, end in itertools.pairwise(layout.step_offsets.tolist()):
        positions = layout.token_index[begin:end].tolist()
        is_whole = bool(positions) and positions == list(range(positions[0], positions[-1] + 1))
        starts.append(positions[0] if is_whole else -1)
    assert held.step_starts.tolist() == starts
    assert torch.equal(require_layout(copy.copy(layout)).step_starts, held.step_starts)
    with pytest.raises(ValueError, match=r"^StepLayout: got a state of .*'step_starts'"):
        object.__new__(StepLayout).__setstate__({**state, "step_starts": held.step_starts})


def test_states_that_are_none_of_a_layout():
    for state in ({}, {"step_ids": torch.zeros(1)}, None, [1]):
        with pytest.raises((ValueError, TypeError), match=r"^StepLayout: got a state"):
            object.__new__(StepLayout).__setstate__(state)


def test_what_is_loaded_is_memory_of_its_own():
    layout = layouts()["mask"]
    state = {name: value.clone() for name, value in layout.__getstate__().items()}
    made = object.__new__(StepLayout)
    made.__setstate__(state)
    for value in state.values():
        value.fill_(7)
    assert all(torch.equal(v, layout.tensors()[n]) for n, v in made.tensors().items())


def test_configs_come_back_as_they_were():
    config = StepPOConfig(ratio="centered", kl_coef=np.float32(0.5), dual_clip=3)
    assert type(config.kl_coef) is float
    for again in (
        torch.load(saved([config]))[0],
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
    ):
        assert again == config
        assert hash(again) == hash(config)


def test_a_damaged_config_is_refused_when_it_is_loaded():
    config = StepPOConfig()
    for state, name in (({"clip_low": 7.0}, "clip_low"), ({"surprise": 1}, "StepPOConfig")):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            object.__new__(StepPOConfig).__setstate__({**config.__getstate__(), **state})


def test_a_config_of_a_release_with_fewer_fields_has_their_defaults():
    state = {"ratio": "product", "clip_low": 0.1, "clip_high": 0.2, "dual_clip": 3.0}
    again = object.__new__(StepPOConfig)
    again.__setstate__(state)
    assert again == StepPOConfig(**state)
    assert again.kernel == StepPOConfig(**state).kernel
