"""Actions by the tokens around them: every rule of `from_markers`, against a loop."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import strategies as st
from properties import examples

from steppo_kernels import StepLayout

# A chat template: roles, their newline, ends, padding and a think block.
_IM, _BOT, _NL, _END, _USER, _PAD, _EOM, _TOOL = 90, 91, 92, 93, 94, 0, 95, 96
_NLNL, _THINK, _THOUGHT = 97, 98, 99
_START = [_IM, _BOT, _NL]


def actions(row, starts, ends, stops, valid):
    """The places of each action of one row, token by token."""
    real = [place for place in range(len(row)) if valid[place]]
    tokens = [row[place] for place in real]

    def stands(sequence, at):
        return at >= 0 and tokens[at : at + len(sequence)] == sequence

    def starts_behind(at):
        for begin in range(at):
            lengths = [len(sequence) for sequence in starts if stands(sequence, begin)]
            if lengths and begin + max(lengths) == at:
                return True
        return False

    found: list[list[int]] = []
    is_open = False
    for at in range(len(tokens)):
        was_open = is_open
        if at and tokens[at - 1] in ends:
            is_open = False
        if starts_behind(at):
            is_open = True
        if any(stands(sequence, at) for sequence in stops):
            is_open = False
        if is_open and not was_open:
            found.append([])
        if is_open:
            found[-1].append(real[at])
    return found


def sequences(max_size):
    return st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=max_size)


@st.composite
def problems(draw):
    rows = draw(st.lists(st.lists(st.integers(0, 3), max_size=16), max_size=4))
    starts = draw(sequences(3).filter(bool))
    if draw(st.booleans()):
        # One that goes on where another ends.
        starts.append(starts[0] + draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)))
    ends = draw(st.lists(st.integers(0, 3), min_size=1, max_size=2))
    stops = draw(sequences(2))
    valid = None
    if draw(st.booleans()):
        valid = [[draw(st.integers(0, 4)) > 0 for _ in row] for row in rows]
    return rows, starts, ends, stops, valid


@examples(80, problem=problems())
def test_actions_are_those_of_the_loop(target, problem):
    rows, starts, ends, stops, valid = problem
    offsets = [0, *accumulate(map(len, rows))]
    expected = oracles.Steps()
    for number, (begin, _) in enumerate(pairwise(offsets)):
        real = [True] * len(rows[number]) if valid is None else valid[number]
        expected.trajectories.append([])
        for action in actions(rows[number], starts, ends, stops, real):
            expected.add([begin + place for place in action])

    def tensor(values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=target.device)

    flat = [token for row in rows for token in row]
    layout = StepLayout.from_markers(
        tensor(flat),
        starts,
        ends,
        stop=stops or None,
        valid=None if valid is None else tensor([one for row in valid for one in row], torch.bool),
        cu_seqlens=tensor(offsets),
        backend=target.backend,
    )
    oracles.assert_layout(layout, (len(flat),), expected)


def test_long_rows_are_those_of_the_loop(kernel):
    """What is open is carried over the blocks of a kernel."""
    length = 40 if kernel.interpreted else 5000
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 5, (2, length), generator=generator)
    valid = torch.rand(2, length, generator=generator) < 0.9
    starts, ends, stops = [[1], [1, 2], [0, 0]], [3, 4], [[2, 2]]
    layout = StepLayout.from_markers(
        ids.to(kernel.device),
        starts,
        ends,
        stop=stops,
        valid=valid.to(kernel.device),
        backend=kernel.backend,
    )
    wanted = StepLayout.from_markers(
        ids, starts, ends, stop=stops, valid=valid, backend="reference"
    )
    assert torch.equal(layout.step_ids.cpu(), wanted.step_ids)
    found = [
        [row * length + place for place in action]
        for row in range(2)
        for action in actions(ids[row].tolist(), starts, ends, stops, valid[row].tolist())
    ]
    assert found == oracles.of_layout(wanted).tokens


_ROLLOUTS = {
    "unfinished and right-padded": (
        [_IM, _BOT, _NL, 5, 6, _PAD, _PAD, _PAD],
        {"end": _END, "valid": [1, 1, 1, 1, 1, 0, 0, 0]},
        [[3, 4]],
    ),
    "padded by the end token": (
        [_IM, _BOT, _NL, 5, 6, _END, _END, _END],
        {"end": _END, "valid": [1, 1, 1, 1, 1, 0, 0, 0]},
        [[3, 4]],
    ),
    "left-padded by a marker": (
        [_IM, _BOT, _NL, _IM, _BOT, _NL, 5, _END],
        {"end": _END, "valid": [0, 0, 0, 1, 1, 1, 1, 1]},
        [[6, 7]],
    ),
    "padding between prompt and response": (
        [_IM, _BOT, _NL, _PAD, _PAD, 5, _END, _PAD],
        {"end": _END, "valid": [1, 1, 1, 0, 0, 1, 1, 0]},
        [[5, 6]],
    ),
    "padding inside of an action": (
        [_IM, _BOT, _NL, 5, _PAD, 6, _END, 7],
        {"end": _END, "valid": [1, 1, 1, 1, 0, 1, 1, 1]},
        [[3, 5, 6]],
    ),
    "a tool call ends in another token": (
        [_IM, _BOT, _NL, 5, _EOM, _IM, _TOOL, _NL, 7, _END, _IM, _BOT, _NL, 8, _END],
        {"end": [_END, _EOM]},
        [[3, 4], [13, 14]],
    ),
    "a turn ends with the marker of the next": (
        [_BOT, 5, 6, _USER, 7, _BOT, 8, _TOOL, 9],
        {"start": [_BOT], "end": [_USER, _TOOL]},
        [[1, 2, 3], [6, 7]],
    ),
    "a turn ends before the marker of the next": (
        [_BOT, 5, 6, _USER, 7, _BOT, 8, _TOOL, 9],
        {"start": [_BOT], "end": [], "stop": [[_USER], [_TOOL]]},
        [[1, 2], [6]],
    ),
    "a newline that merged with what follows": (
        [_IM, _BOT, _NLNL, 5, _END],
        {"start": [_START, [_IM, _BOT, _NLNL]], "end": _END},
        [[3, 4]],
    ),
    "a turn that was cut off": (
        [_IM, _BOT, _NL, 5, _IM, _USER, _NL, 1, _END, _IM, _BOT, _NL, 7, _END],
        {"end": _END, "stop": [_IM]},
        [[3], [12, 13]],
    ),
    "the empty think block of a template": (
        [_IM, _BOT, _NL, _THINK, _NLNL, _THOUGHT, _NLNL, 7, _END],
        {"start": [_START, [*_START, _THINK, _NLNL, _THOUGHT, _NLNL]], "end": _END},
        [[7, 8]],
    ),
    "a think block that was sampled": (
        [_IM, _BOT, _NL, _THINK, _NLNL, 5, _THOUGHT, _NLNL, 7, _END],
        {"start": [_START, [*_START, _THINK, _NLNL, _THOUGHT, _NLNL]], "end": _END},
        [[3, 4, 5, 6, 7, 8, 9]],
    ),
    "a stop where an action would begin": (
        [_IM, _BOT, _NL, _IM, _BOT, _NL, 5, _END],
        {"end": _END, "stop": [_IM]},
        [[6, 7]],
    ),
    "an action of the end token alone": ([_IM, _BOT, _NL, _END, 5], {"end": _END}, [[3]]),
    "a marker at the end of a row": ([5, _IM, _BOT, _NL], {"end": _END}, []),
    "an end that completes a start": (
        [_END, _BOT, 5, _END, _BOT, 6],
        {"start": [_END, _BOT], "end": _BOT},
        [[2, 3, 4, 5]],
    ),
}


@pytest.mark.parametrize("name", _ROLLOUTS)
def test_real_rollouts(target, name):
    ids, options, wanted = _ROLLOUTS[name]
    arguments = {"start": _START, **options}
    if "valid" in arguments:
        mask = torch.tensor([arguments["valid"]], device=target.device)
        arguments["valid"] = mask
    tokens = torch.tensor([ids], device=target.device)
    layout = StepLayout.from_markers(tokens, **arguments, backend=target.backend)
    assert oracles.of_layout(layout).tokens == wanted


def test_markers_of_every_form():
    tokens = torch.tensor([[1, 2, 5, 3, 1, 2, 6, 4]])
    wanted = [2, 3, 6, 7]
    for start in (
        [1, 2],
        (1, 2),
        range(1, 3),
        torch.tensor([1, 2]),
        torch.tensor([1, 2], dtype=torch.int32),
        np.array([1, 2]),
        np.array([1, 2], dtype=object),
        [np.int64(1), torch.tensor(2)],
        [[1, 2]],
        [torch.tensor([1, 2]), [7]],
        np.array([[1, 2], [7, 7]]),
        2,
        np.int32(2),
    ):
        for end in ([3, 4], (3, 4), torch.tensor([3, 4]), np.array([3, 4], dtype=object)):
            layout = StepLayout.from_markers(tokens, start, end)
            assert layout.token_index.tolist() == wanted, (start, end)
    for end in (4, np.int64(4), torch.tensor(4), [4]):
        found = StepLayout.from_markers(tokens, [1, 2], end).token_index.tolist()
        assert found == [2, 3, 4, 5, 6, 7]
        stopped = StepLayout.from_markers(tokens, [1, 2], end, stop=torch.tensor([3, 1]))
        assert stopped.token_index.tolist() == [2, 6, 7]


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("start", {"start": {1, 2}}, "set"),
        ("start", {"start": [1, [2]]}, "list"),
        ("start", {"start": [True]}, "bool"),
        ("start", {"start": [2**63]}, str(2**63)),
        ("start", {"start": torch.ones(2)}, "torch.float32"),
        ("start", {"start": [[1], []]}, "an empty sequence"),
        ("end", {"end": np.bool_(True)}, "bool"),
        ("end", {"end": "3"}, "str"),
        ("end", {"end": -(2**64)}, str(-(2**64))),
        ("stop", {"stop": []}, "an empty sequence"),
        ("stop", {"stop": 1.5}, "float"),
        ("valid", {"valid": torch.ones(1, 3)}, "shape (1, 3)"),
        ("start", {"start": torch.nested.nested_tensor([torch.ones(2)])}, "a nested tensor"),
        ("end", {"end": torch.nested.nested_tensor([torch.ones(2)])}, "a nested tensor"),
        ("stop", {"stop": torch.tensor([1]).to_sparse()}, "layout torch.sparse_coo"),
    ],
)
def test_markers_that_are_refused(name, arguments, text):
    given = {"start": [1], "end": 2, **arguments}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got ") as caught:
        StepLayout.from_markers(torch.tensor([[1, 5, 2, 3]]), **given)
    assert text in str(caught.value)
    assert "expected" in str(caught.value)
