"""StepLayout: every constructor against plain Python loops."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from steppo_kernels import StepLayout, step_gae
from steppo_kernels.backends import choice

_MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float64]


def packed(values: st.SearchStrategy, max_rows: int = 4, max_length: int = 12):
    """Rows of unequal lengths, some empty."""
    return st.lists(st.lists(values, max_size=max_length), max_size=max_rows)


def rectangle(values: st.SearchStrategy, max_rows: int = 4, max_length: int = 12):
    """Rows of one length."""
    return st.integers(0, max_length).flatmap(
        lambda length: st.lists(
            st.lists(values, min_size=length, max_size=length), min_size=1, max_size=max_rows
        )
    )


def row_offsets(rows: list[list]) -> list[int]:
    return [0, *accumulate(len(row) for row in rows)]


def flat(rows: list[list]) -> list:
    return [value for row in rows for value in row]


@examples(rows=packed(st.tuples(st.booleans(), st.booleans())), dtype=st.sampled_from(_MASK_DTYPES))
def test_from_mask_packed(target, rows, dtype):
    offsets = row_offsets(rows)
    mask = [flag for flag, _ in flat(rows)]
    opens = [flag for _, flag in flat(rows)]
    layout = StepLayout.from_mask(
        torch.tensor(mask, dtype=torch.bool).to(target.device, dtype),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=target.device),
        boundaries=torch.tensor(opens, dtype=torch.bool, device=target.device),
        backend=target.backend,
    )
    oracles.assert_layout(layout, (len(mask),), oracles.of_mask(mask, offsets, opens))
    assert layout.row_offsets.tolist() == offsets


@examples(rows=rectangle(st.booleans()), dtype=st.sampled_from(_MASK_DTYPES))
def test_from_mask_rows(target, rows, dtype):
    mask = torch.tensor(rows, dtype=torch.bool).to(target.device, dtype)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    offsets = row_offsets(rows)
    expected = oracles.of_mask(flat(rows), offsets, [False] * offsets[-1])
    oracles.assert_layout(layout, mask.shape, expected)


def test_from_mask_takes_one_dimension_as_one_row(target):
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1], device=target.device)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    assert (layout.num_steps, layout.num_trajectories) == (3, 1)
    assert layout.row_offsets.tolist() == [0, 7]


def test_from_mask_takes_any_strides(target):
    rows = (torch.arange(35).reshape(5, 7) % 3 > 0).to(target.device)
    expected = StepLayout.from_mask(rows, backend=target.backend)
    wide = torch.zeros((5, 14), dtype=torch.bool, device=target.device)
    wide[:, ::2] = rows
    for view in (rows.T.contiguous().T, wide[:, ::2]):
        assert not view.is_contiguous()
        layout = StepLayout.from_mask(view, boundaries=view & ~rows, backend=target.backend)
        assert torch.equal(layout.step_ids, expected.step_ids)


def ids_of_row(draw: st.DrawFn) -> list[int]:
    """Ids that do not decrease, with gaps between ids, and -1 anywhere."""
    ids, current = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.booleans()):
            current += draw(st.sampled_from([0, 0, 1, 1, 5, 2**40]))
            ids.append(current)
        else:
            ids.append(-1)
    return ids


@examples(rows=st.lists(st.composite(ids_of_row)(), max_size=4))
def test_from_step_ids_packed(target, rows):
    offsets = row_offsets(rows)
    ids = flat(rows)
    layout = StepLayout.from_step_ids(
        torch.tensor(ids, dtype=torch.int64, device=target.device),
        cu_seqlens=torch.tensor(offsets, device=target.device),
        backend=target.backend,
    )
    oracles.assert_layout(layout, (len(ids),), oracles.of_ids(ids, offsets))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_from_step_ids_rows(target, dtype):
    """Tokens of one step lie apart, ids leave gaps and begin again in each row."""
    rows = [[-1, 0, -1, 0, 3, -1, 3], [-1] * 7, [5, 5, 7, 9, -1, 9, 9], [0, 1, 2, 3, 4, 5, 6]]
    ids = torch.tensor(rows, dtype=dtype, device=target.device)
    layout = StepLayout.from_step_ids(ids, backend=target.backend)
    oracles.assert_layout(layout, (4, 7), oracles.of_ids(flat(rows), row_offsets(rows)))


@pytest.mark.parametrize(
    ("ids", "where"),
    [([2, 1], 1), ([0, -1, 3, -1, 2, 1], 4), ([-1, 0, 0, 1, 0], 4)],
    ids=["next", "after-a-gap", "back-to-an-id"],
)
def test_from_step_ids_refuses_ids_that_decrease(target, ids, where):
    rows = torch.tensor([[0] * len(ids), ids, ids], device=target.device)
    with pytest.raises(ValueError, match=f"^step_ids: .*position {len(ids) + where} "):
        StepLayout.from_step_ids(rows, backend=target.backend)


@examples(data=st.data(), strings=st.booleans(), with_padding=st.booleans())
def test_from_rows(target, data, strings, with_padding):
    rows = data.draw(rectangle(st.booleans(), max_rows=8, max_length=5))
    slots = [(trajectory, 3 * index - 4) for trajectory in range(4) for index in range(5)]
    chosen = data.draw(
        st.lists(st.sampled_from(slots), min_size=len(rows), max_size=len(rows), unique=True)
    )
    valid = [True] * len(rows)
    if with_padding:
        valid = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
        # Padding repeats a row, as trainers make it; only valid rows must be distinct.
        chosen = [slot if ok else chosen[0] for slot, ok in zip(chosen, valid, strict=True)]
    names = [f"t{trajectory}" if strings else trajectory * 10**12 - 7 for trajectory, _ in chosen]
    indices = [index for _, index in chosen]
    layout = StepLayout.from_rows(
        torch.tensor(rows, dtype=torch.bool, device=target.device),
        names if strings else torch.tensor(names, device=target.device),
        torch.tensor(indices, device=target.device),
        valid=torch.tensor(valid, device=target.device) if with_padding else None,
        backend=target.backend,
    )
    expected = oracles.of_rows(rows, names, indices, valid)
    oracles.assert_layout(layout, (len(rows), len(rows[0])), expected)


def test_from_rows_takes_lists_and_no_rows(target):
    mask = torch.zeros((0, 4), device=target.device)
    layout = StepLayout.from_rows(mask, [], [], backend=target.backend)
    oracles.assert_layout(layout, (0, 4), oracles.Steps())
    mask = torch.ones((3, 2), device=target.device)
    layout = StepLayout.from_rows(mask, ["b", "a", "b"], [1, 0, 0], backend=target.backend)
    expected = oracles.of_rows([[True] * 2] * 3, ["b", "a", "b"], [1, 0, 0], [True] * 3)
    oracles.assert_layout(layout, (3, 2), expected)
    assert layout.trajectory_steps.tolist() == [2, 0, 1]


@pytest.mark.isa
@examples(
    80,
    rows=packed(st.integers(0, 3), max_length=16),
    start=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    end=st.integers(0, 3),
)
def test_from_markers(target, rows, start, end):
    """Few distinct ids, so that markers overlap, repeat, and stand at borders of rows."""
    ids, offsets = flat(rows), row_offsets(rows)
    layout = StepLayout.from_markers(
        torch.tensor(ids, dtype=torch.int64, device=target.device),
        start,
        end,
        cu_seqlens=torch.tensor(offsets, device=target.device),
        backend=target.backend,
    )
    mask = oracles.marked(ids, offsets, start, end)
    expected = oracles.of_mask(mask, offsets, [False] * len(ids))
    oracles.assert_layout(layout, (len(ids),), expected)


@pytest.mark.isa
@pytest.mark.parametrize(
    ("start", "end", "ids", "mask"),
    [
        ([7, 8], 9, [7, 8, 1, 2, 9, 3, 7, 8, 9, 4], [0, 0, 1, 1, 1, 0, 0, 0, 1, 0]),
        ([7, 8], 9, [1, 7, 8, 1, 2], [0, 0, 0, 1, 1]),
        ([7, 8], 9, [7, 8, 1, 7, 8, 2, 9, 3], [0, 0, 1, 1, 1, 1, 1, 0]),
        ([7, 7], 9, [7, 7, 7, 9, 7, 9], [0, 0, 1, 1, 0, 0]),
        ([7, 8], 8, [7, 8, 1, 8, 2], [0, 0, 1, 1, 0]),
        ([7], 9, [9, 9, 1, 9], [0, 0, 0, 0]),
        ([7], 9, [1, 2, 7], [0, 0, 0]),
    ],
    ids=[
        "two-actions",
        "unfinished",
        "start-inside",
        "start-overlaps-itself",
        "end-in-start",
        "no-start",
        "start-at-the-end",
    ],
)
def test_from_markers_by_hand(target, start, end, ids, mask):
    tokens = torch.tensor([ids, ids], dtype=torch.int32, device=target.device)
    layout = StepLayout.from_markers(
        tokens, torch.tensor(start, device=target.device), end, backend=target.backend
    )
    assert (layout.step_ids >= 0).int().tolist() == [mask, mask]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 4)], ids=str)
def test_layouts_without_action_tokens(target, shape):
    zeros = torch.zeros(shape, dtype=torch.int64, device=target.device)
    rows = shape[0] if len(shape) == 2 else 1
    expected = oracles.Steps(trajectories=[[] for _ in range(rows)])
    for layout in (
        StepLayout.from_mask(zeros, boundaries=zeros, backend=target.backend),
        StepLayout.from_step_ids(zeros - 1, backend=target.backend),
        StepLayout.from_markers(zeros, [1, 2], 3, backend=target.backend),
    ):
        oracles.assert_layout(layout, shape, expected)
        oracles.assert_layout(layout.per_token(), shape, oracles.per_token(expected))
        oracles.assert_layout(layout.per_trajectory(), shape, oracles.per_trajectory(expected))


@given(data=st.data())
@settings(max_examples=40)
def test_per_token_and_per_trajectory(data):
    rows = data.draw(rectangle(st.booleans(), max_rows=6, max_length=5))
    order = data.draw(st.permutations(range(len(rows))))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    valid = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    mask = torch.tensor(rows, dtype=torch.bool)
    by_rows = StepLayout.from_rows(mask, groups, list(order), valid=torch.tensor(valid))
    for layout in (by_rows, StepLayout.from_mask(mask)):
        steps = oracles.of_layout(layout)
        oracles.assert_layout(layout.per_token(), mask.shape, oracles.per_token(steps))
        whole = layout.per_trajectory()
        oracles.assert_layout(whole, mask.shape, oracles.per_trajectory(steps))
        assert torch.equal(whole.row_offsets, layout.row_offsets)


def test_to_moves_every_tensor():
    layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]), backend="reference")
    moved = layout.to("meta")
    for name, value in moved.tensors().items():
        assert value.device.type == "meta", name
    assert moved.device.type == "meta"
    assert moved.shape == layout.shape
    again = layout.to("cpu")
    assert again.tensors().keys() == moved.tensors().keys() == layout.tensors().keys()
    assert all(torch.equal(again.tensors()[name], x) for name, x in layout.tensors().items())
    assert again.has_empty_rows == layout.has_empty_rows


def test_layouts_are_immutable_and_say_what_they_hold():
    layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]), backend="reference")
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.step_ids = layout.token_index
    text = repr(layout)
    assert "shape=(1, 4), num_steps=2, num_tokens=3, num_trajectories=1, device='cpu'" in text


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_strided_inputs(backend):
    """Views of every kind give the layout of their contiguous copies."""
    if why := choice.unavailable(backend, torch.device("cpu")):
        pytest.skip(f"{backend}: {why}")
    wide = torch.rand(4, 8, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    for mask in (wide[..., 0], wide[..., 0].t(), wide[:, ::2, 1], wide[:1, :1, 0].expand(4, 8)):
        found = StepLayout.from_mask(mask, backend=backend)
        wanted = StepLayout.from_mask(mask.contiguous(), backend="reference")
        for name, value in wanted.tensors().items():
            assert torch.equal(found.tensors()[name], value), name
    valid = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)[:, 0]
    rows = torch.ones(4, 3, dtype=torch.bool)
    found = StepLayout.from_rows(rows, [0] * 4, range(4), valid=valid, backend=backend)
    assert found.step_lengths.tolist() == [3, 0, 3, 3]
    start = torch.tensor([5, 0, 7, 0])[::2]
    found = StepLayout.from_markers(torch.tensor([5, 7, 1, 1, 9]), start, 9, backend=backend)
    assert found.token_index.tolist() == [2, 3, 4]


def test_from_rows_reads_ids_of_any_integer_type():
    mask = torch.ones(4, 2, dtype=torch.bool)
    for ids in (torch.tensor([0, 0, 1, 1]), list(torch.tensor([0, 0, 1, 1])), range(4)):
        layout = StepLayout.from_rows(mask, ids, [0, 1, 0, 1])
        assert layout.num_trajectories == len({int(one) for one in ids})


def test_layouts_compare_by_identity():
    layout = StepLayout.from_mask(torch.ones(2, 2, dtype=torch.bool))
    assert layout != StepLayout.from_mask(torch.ones(2, 2, dtype=torch.bool))
    assert layout in [layout]


def test_packed_input_as_one_row(target):
    """As transformers takes packed sequences: ``[1, N]`` with `cu_seqlens`."""
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool, device=target.device)
    offsets = torch.tensor([0, 4, 7], device=target.device)
    flat = StepLayout.from_mask(mask, cu_seqlens=offsets, backend=target.backend)
    wide = StepLayout.from_mask(mask[None], cu_seqlens=offsets, backend=target.backend)
    assert wide.shape == (1, 7)
    assert torch.equal(wide.step_ids[0], flat.step_ids)
    rest = [layout.tensors() for layout in (flat, wide)]
    for name in set(rest[0]) - {"step_ids"}:
        assert torch.equal(rest[0][name], rest[1][name]), name
    values = torch.arange(7.0, device=target.device)
    found = [
        step_gae(
            values.view(layout.shape), values.view(layout.shape), layout, backend=target.backend
        )
        for layout in (flat, wide)
    ]
    assert torch.equal(found[0].advantages, found[1].advantages)
