"""check_step_ends: every mistake in a mask that token ids give away, and none that they do not."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels import StepLayout, check_step_ends

# user, user's words, policy, its words and the end of its turn, twice, and padding.
END, PAD = 2, 0
IDS = torch.tensor(
    [
        [5, 7, 6, 11, 12, END, 5, 8, END, 6, 13, END, PAD, PAD],
        [5, 7, 7, 6, 14, END, 5, 9, END, 6, 15, 16, 17, END],
    ]
)
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1],
    ]
)


def layout_of(mask: torch.Tensor, **options: object) -> StepLayout:
    return StepLayout.from_mask(mask, backend="reference", **options)


@pytest.mark.parametrize("ends", [END, [END], [99, END], torch.tensor(END)], ids=str)
def test_a_right_mask(ends):
    check_step_ends(layout_of(MASK), IDS, ends)
    check_step_ends(layout_of(MASK.flatten()), IDS.flatten(), ends)
    check_step_ends(layout_of(MASK), IDS.to(torch.int32), ends)


def test_turns_that_were_cut_off():
    """At the end of a row, and before a template's own end."""
    for row, column in ((1, 13), (0, 11), (0, 5)):
        cut = MASK.clone()
        cut[row, column] = 0
        check_step_ends(layout_of(cut), IDS, END)
    cut[:] = 0
    cut[1, 10:13] = 1
    ids = IDS.clone()
    ids[1, 13] = 18
    check_step_ends(layout_of(cut), ids, END)


def test_nothing():
    for mask in (MASK * 0, MASK[:, :0], MASK[:0]):
        check_step_ends(layout_of(mask), torch.zeros(mask.shape, dtype=torch.int64), END)


def test_a_token_that_ends_no_turn():
    """Such as the end token of a base model, where a chat template has one of its own."""
    with pytest.raises(ValueError, match=r"^end: got \[99\], of which nothing occurs in token_ids"):
        check_step_ends(layout_of(MASK), IDS, 99)
    check_step_ends(layout_of(MASK * 0), IDS, 99)


def test_a_mask_that_is_shifted_to_the_left():
    """That of logits, whose position i predicts token i + 1."""
    with pytest.raises(ValueError, match=r"no step .* and 4 that stop right before .* to the left"):
        check_step_ends(layout_of(MASK.roll(-1, 1)), IDS, END)
    check_step_ends(layout_of(MASK[:, 1:]), IDS[:, 1:], END)


def test_a_mask_that_is_shifted_to_the_right():
    shifted = MASK.roll(1, 1)
    shifted[:, 0] = 0
    with pytest.raises(ValueError, match=r"got 3 steps with one token behind .* to the right"):
        check_step_ends(layout_of(shifted), IDS, END)


def test_padding_with_the_end_of_a_turn():
    """A mask of what is no padding lacks the end of every turn."""
    ids = torch.where(IDS == PAD, END, IDS)
    check_step_ends(layout_of(MASK), ids, END)
    with pytest.raises(ValueError, match=r"4 that stop right before .* comparing ids"):
        check_step_ends(layout_of(MASK * (ids != END)), ids, END)
    # The way out that the error names: the attention mask, and markers.
    attention = torch.ones_like(MASK)
    attention[0, 12:] = 0
    found = StepLayout.from_markers(ids, [6], END, valid=attention, backend="reference")
    assert torch.equal(found.step_ids >= 0, MASK.bool())


@pytest.mark.parametrize("row", [0, 1])
def test_turns_without_a_gap(row):
    ids, mask = IDS.clone(), MASK.clone()
    ids[row, 6:10] = torch.tensor([18, 19, END, 18])
    mask[row, 6:10] = 1
    with pytest.raises(ValueError, match=f"inside of step {row * 2}, in row {row}.*boundaries"):
        check_step_ends(layout_of(mask), ids, END)
    boundaries = torch.zeros_like(mask)
    boundaries[row, [6, 9]] = 1
    check_step_ends(layout_of(mask, boundaries=boundaries), ids, END)


def test_rows_are_steps():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    ids = torch.tensor([[8, 9, END, PAD], [8, END, PAD, PAD], [END, END, END, END]])
    layout = StepLayout.from_rows(mask, [0, 0, 0], [1, 0, 2], backend="reference")
    check_step_ends(layout, ids, END)
    mask = torch.cat((mask[:, 1:], mask[:, :1] * 0), 1)
    short = StepLayout.from_rows(mask, [0, 0, 0], [1, 0, 2], backend="reference")
    with pytest.raises(ValueError, match="2 that stop right before"):
        check_step_ends(short, ids, END)


def test_the_end_of_a_row_has_nothing_behind_it():
    """The next row begins with an end token, which is none of this row."""
    mask, ids = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[5, 7], [END, 5]])
    check_step_ends(layout_of(mask), ids, END)
    with pytest.raises(ValueError, match="1 that stop right before"):
        check_step_ends(layout_of(mask.flatten()), ids.flatten(), END)


@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (TypeError, "layout: got Tensor", {"layout": MASK}),
        (TypeError, "token_ids: got torch.float32", {"token_ids": IDS.float()}),
        (ValueError, "token_ids: got shape", {"token_ids": IDS[:, 1:]}),
        (TypeError, "end: got", {"end": "</s>"}),
        (ValueError, "end: got an empty sequence", {"end": []}),
    ],
)
def test_wrong_arguments(error, text, changed):
    with pytest.raises(error, match=text):
        check_step_ends(**{"layout": layout_of(MASK), "token_ids": IDS, "end": END, **changed})


def test_steps_per_row(target):
    """An environment counts steps; runs that touch are fewer."""
    mask = MASK.to(target.device)
    for counts in ([2, 2], torch.tensor([2, 2]), torch.tensor([2, 2], dtype=torch.int32)):
        found = StepLayout.from_mask(mask, steps_per_row=counts, backend=target.backend)
        assert found.num_steps == 4
    with pytest.raises(ValueError, match=r"mask: got 2 runs of ones in row 1, expected 3 .*bound"):
        StepLayout.from_mask(mask, steps_per_row=[2, 3], backend=target.backend)
    with pytest.raises(ValueError, match=r"mask: got 2 runs .* row 0, expected 1 .*from_step_ids"):
        StepLayout.from_mask(mask, steps_per_row=[1, 2], backend=target.backend)
    boundaries = torch.zeros_like(mask)
    boundaries[1, 12] = 1
    StepLayout.from_mask(mask, boundaries=boundaries, steps_per_row=[2, 3], backend=target.backend)
    packed = torch.tensor([0, 14, 28], device=target.device)
    StepLayout.from_mask(
        mask.flatten(), cu_seqlens=packed, steps_per_row=[2, 2], backend=target.backend
    )
    with pytest.raises(ValueError, match="steps_per_row: got shape"):
        StepLayout.from_mask(mask, steps_per_row=[2, 2, 0], backend=target.backend)
    with pytest.raises(TypeError, match="steps_per_row: got"):
        StepLayout.from_mask(mask, steps_per_row=[2.0, 2.0], backend=target.backend)
