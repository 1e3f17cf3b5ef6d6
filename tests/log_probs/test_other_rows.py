"""Which rows of a tensor a slice of it leaves: what backward zeroes around logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steppo_kernels.log_probs.overwrite import Part, other_rows, whole_of


def part_of(logits: Tensor) -> Part:
    _, part = whole_of(logits)
    assert part is not None
    return part


def assert_complement(whole: Tensor, logits: Tensor) -> Part:
    """Clearing the rest leaves the logits alone, and clears no row twice."""
    part = part_of(logits)
    expected = torch.zeros(whole.shape)
    part.of(expected).fill_(1.0)
    found = torch.ones(whole.shape)
    part.clear_rest(found)
    assert torch.equal(found, expected)
    rows = sum(torch.Size(sizes).numel() for sizes, *_ in part.rest)
    assert rows == whole.shape[:-1].numel() - logits.shape[:-1].numel()
    return part


@st.composite
def slices(draw):
    """A tensor with some of its rows."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    whole = torch.zeros((*sizes, draw(st.integers(1, 3))), requires_grad=True)
    logits = whole
    if draw(st.booleans()):
        # It may be a slice of another view.
        logits = logits.view(-1, *whole.shape[draw(st.integers(1, len(sizes))) :])
    for dim in range(logits.dim() - 1):
        size = logits.shape[dim]
        start = draw(st.integers(0, size))
        stop = draw(st.integers(start, size))
        index = [slice(None)] * logits.dim()
        index[dim] = slice(start, stop, draw(st.integers(1, 3)))
        logits = logits[tuple(index)]
    if draw(st.booleans()) and logits.dim() > 1 and logits.shape[0] > 0:
        logits = logits[draw(st.integers(0, logits.shape[0] - 1))]
    order = draw(st.permutations(range(logits.dim() - 1)))
    return whole, logits.permute(*order, -1)


@given(drawn=slices())
def test_is_the_complement(drawn):
    whole, logits = drawn
    part = assert_complement(whole, logits)
    assert len(part.rest) <= logits.dim() + 1


@pytest.mark.parametrize(
    ("part", "count"),
    [
        (lambda z: z[:, :-1], 1),
        (lambda z: z[:, 1:], 1),
        (lambda z: z[:, :-1].transpose(0, 1), 1),
        (lambda z: z[:, ::2], 1),
        (lambda z: z[:, 1::2], 1),
        (lambda z: z[1:], 1),
        (lambda z: z[1:-1], 2),
        (lambda z: z[1:, :-1], 2),
        (lambda z: z[:, 2:-1], 3),
        (lambda z: z[1, 2], 2),
        (lambda z: z[:, :0], 1),
        (lambda z: z[:], 0),
    ],
)
def test_takes_few_fills(part, count):
    whole = torch.zeros((5, 6, 3), requires_grad=True)
    assert len(assert_complement(whole, part(whole)).rest) == count


def test_of_dimensions_with_no_gap_between_them():
    """Rows 0, 2, 3, 5, 6, 8 of ten: the outer stride is what the inner dimension spans."""
    found = torch.ones(10)
    for sizes, strides, offset in other_rows((3, 2), (3, 2), 0, 10):
        found.as_strided(sizes, strides, offset).zero_()
    assert found.nonzero().flatten().tolist() == [0, 2, 3, 5, 6, 8]
