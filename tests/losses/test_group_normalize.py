"""group_normalize: against loops, and against the lines of TRL and verl."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from properties import examples
from test_gae import layouts

from steppo_kernels import StepLayout, group_normalize

NAN = math.nan


def loops(values, groups, std, eps):
    found = []
    for value, group in zip(values, groups, strict=True):
        others = [x for x, own in zip(values, groups, strict=True) if own == group]
        if group < 0:
            found.append(0.0)
            continue
        centered = value - math.fsum(others) / len(others)
        if std:
            spread = statistics.stdev(others) if len(others) > 1 else 0.0
            centered /= spread + eps
        found.append(centered)
    return torch.tensor(found, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-10)


@examples(
    groups=st.lists(st.integers(-2, 3), max_size=12),
    seed=st.integers(0, 2**31),
    std=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-4, 0.5]),
)
def test_loops(target, groups, seed, std, eps):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(groups), dtype=torch.float64, generator=generator)
    ids = torch.tensor(groups, dtype=torch.int64, device=target.device)
    found = group_normalize(values.to(target.device), ids, std=std, eps=eps, backend=target.backend)
    close(found, loops(values.tolist(), groups, std, eps))


@examples(layout=layouts(), seed=st.integers(0, 2**31), std=st.booleans())
def test_groups_of_trajectories(target, layout, seed, std):
    """Every step counts once; one of no trajectory gets 0 and counts in no group."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.num_steps, dtype=torch.float64, generator=generator)
    groups = torch.randint(-1, 2, (layout.num_trajectories,), generator=generator)
    of_steps = [-1] * layout.num_steps
    members, offsets = layout.trajectory_steps.tolist(), layout.trajectory_offsets.tolist()
    for trajectory, group in enumerate(groups.tolist()):
        for step in members[offsets[trajectory] : offsets[trajectory + 1]]:
            of_steps[step] = group
    found = group_normalize(
        values.to(target.device),
        groups.to(target.device),
        layout=layout.to(target.device),
        std=std,
        backend=target.backend,
    )
    close(found, loops(values.tolist(), of_steps, std, 1e-6))


def test_it_is_what_trainers_compute(target):
    """TRL: [prompts, generations], eps 1e-4. verl: eps 1e-6."""
    scores = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(6).repeat_interleave(4).to(target.device)
    centered = scores - scores.mean(1, keepdim=True)
    for eps in (1e-4, 1e-6):
        found = group_normalize(
            scores.flatten().to(target.device), ids, eps=eps, backend=target.backend
        )
        close(found, (centered / (scores.std(1, keepdim=True) + eps)).flatten())
    found = group_normalize(
        scores.flatten().to(target.device), ids, std=False, backend=target.backend
    )
    close(found, centered.flatten())


def test_equal_numbers_and_lone_ones_are_0(target):
    values = torch.tensor([0.1, 0.1, 0.1, 7.3], device=target.device)
    ids = torch.tensor([5, 5, 5, 2], device=target.device)
    for std in (True, False):
        found = group_normalize(values, ids, std=std, backend=target.backend)
        assert found.tolist() == [0.0] * 4


def test_what_is_in_no_group_may_be_anything(target):
    values = torch.tensor([NAN, 1.0, math.inf, 3.0], device=target.device)
    ids = torch.tensor([-1, 0, -7, 0], device=target.device)
    found = group_normalize(values, ids, std=False, backend=target.backend)
    assert found.tolist() == [0.0, -1.0, 0.0, 1.0]


def test_a_nan_stays_in_its_group(target):
    values = torch.tensor([NAN, 1.0, 1.0, 3.0], device=target.device)
    ids = torch.tensor([4, 4, 0, 0], device=target.device)
    found = group_normalize(values, ids, std=False, backend=target.backend)
    assert found.isnan().tolist() == [True, True, False, False]


def test_a_large_offset_costs_no_digits(target):
    """The squares are of deviations from the mean."""
    values = torch.tensor([0.0, 1.0, 2.0], device=target.device)
    ids = torch.zeros(3, dtype=torch.int64, device=target.device)
    near = group_normalize(values, ids, backend=target.backend)
    far = group_normalize(values + 2.0**20, ids, backend=target.backend)
    assert torch.equal(near, far)


@pytest.mark.parametrize(
    "groups",
    [
        ["b", "b", "a"],
        np.array(["b", "b", "a"], dtype=object),
        [9, 9, 2],
        np.array([9, 9, 2]),
        torch.tensor([9, 9, 2], dtype=torch.int32),
        [2**70, 2**70, "x"],
    ],
    ids=["strings", "objects", "integers", "array", "int32", "mixed"],
)
def test_names_of_groups(groups):
    values = torch.tensor([1.0, 3.0, 5.0])
    found = group_normalize(values, groups, std=False, backend="reference")
    assert found.tolist() == [-1.0, 1.0, 0.0]


def test_dtypes(target):
    ids = torch.zeros(2, dtype=torch.int64, device=target.device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        values = torch.tensor([1.0, 2.0], dtype=dtype, device=target.device, requires_grad=True)
        found = group_normalize(values, ids, std=False, backend=target.backend)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not found.requires_grad
        assert found.tolist() == [-0.5, 0.5]


def test_bits_do_not_depend_on_how_groups_are_named(target):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(200, generator=generator).to(target.device)
    ids = torch.randint(5, (200,), generator=generator).to(target.device)
    found = group_normalize(values, ids, backend=target.backend)
    assert torch.equal(found, group_normalize(values, 7 - ids, backend=target.backend))


_LAYOUT = StepLayout.from_mask(torch.tensor([[1, 0, 1], [1, 1, 1]]), backend="reference")


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "values: got torch.int64", {"values": torch.arange(3)}),
        (ValueError, r"values: got shape \(1, 3\), expected 1", {"values": torch.ones(1, 3)}),
        (
            ValueError,
            r"groups: got shape \(2,\), expected \(3,\), one entry per value",
            {"groups": torch.zeros(2, dtype=torch.int64)},
        ),
        (
            ValueError,
            r"groups: got shape \(3,\), expected \(2,\), one entry per trajectory",
            {"layout": _LAYOUT},
        ),
        (
            ValueError,
            r"values: got shape \(2,\), expected \(3,\), one entry per step",
            {"values": torch.ones(2), "layout": _LAYOUT},
        ),
        (TypeError, "groups: got torch.float32", {"groups": torch.zeros(3)}),
        (TypeError, "groups: got an entry of type float", {"groups": [0.0, 1.0, 2.0]}),
        (TypeError, "groups: got str", {"groups": "abc"}),
        (TypeError, "std: got int", {"std": 1}),
        (ValueError, "eps: got 0.0", {"eps": 0.0}),
        (TypeError, "layout: got Tensor", {"layout": torch.ones(2, 3)}),
    ],
)
def test_wrong_arguments(error, text, call):
    given = {"values": torch.ones(3), "groups": torch.zeros(3, dtype=torch.int64), **call}
    with pytest.raises(error, match=text):
        group_normalize(given.pop("values"), given.pop("groups"), **given, backend="reference")
