"""Where the states are that predict the action tokens of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...backends.choice import Backend
from ...layout.predictors import padded_left, shifted_left
from ...layout.step_layout import StepLayout
from ...log_probs.token_support import TokenSupport, moved, require_support
from .probe import LogitMap
from .tensor_parallel import Part


class Tokens(NamedTuple):
    """The token ids of a call, and the name of the argument that they came as."""

    name: str
    ids: Tensor


class States(NamedTuple):
    """What there is at the head: its input, itself, and what the call says about the tokens."""

    hidden: Tensor
    part: Part
    logit_map: LogitMap
    tokens: Tokens
    attention_mask: object


class Placed:
    """A batch with everything of token i at the place of the state that predicts it, i - 1.

    The states themselves stay where they are, as the largest of the tensors; and rows follow each
    other, so that the first place of a row, which is no action's, takes the last place of the row
    before. What is given for the last tokens of each row alone is padded for that. A batch that is
    `shifted` has everything at those places already.

    Attributes:
        layout: the steps.
        token_ids: the tokens that the states predict.
    """

    def __init__(
        self,
        layout: StepLayout | Tensor,
        states: States,
        logits_to_keep: int | None,
        shifted: bool,
        backend: Backend,
    ) -> None:
        """Check which tokens are actions, and move them."""
        self._is_shifted = shifted
        name, ids = states.tokens
        device = states.hidden.device
        tokens = checks.integer(name, ids, device)
        positions = states.hidden.shape[:-1]
        given = _given_shape(positions, logits_to_keep)
        # How many places of a row nothing is given for.
        self._padding = 0 if given is None else positions[-1] - given[-1]
        has_kept_ids = self._padding > 0 and _is_view(tokens.shape, given or positions)
        if given is not None and has_kept_ids:
            tokens = _padded(tokens.reshape(given), self._padding)
        if not _is_view(tokens.shape, positions):
            raise ValueError(
                f"{name}: got shape {tuple(tokens.shape)}, expected that of the positions whose "
                f"hidden states the output head was given, {tuple(positions)}"
            )
        if isinstance(layout, Tensor):
            layout = StepLayout.from_mask(checks.flags("layout", layout, (1, 2)), backend=backend)
        elif not isinstance(layout, StepLayout):
            raise TypeError(f"layout: got {type(layout).__name__}, expected a StepLayout or a mask")
        self._shape = tokens.shape if given is None else given
        if not _is_view(layout.shape, self._shape):
            raise ValueError(
                f"layout: got shape {tuple(layout.shape)}, expected that of the tokens, "
                f"{tuple(self._shape)}" + _way_out(layout.shape, positions, logits_to_keep)
            )
        if self._padding:
            layout = padded_left(layout, self._shape, self._padding)
        index = checks.on_device("layout", layout.token_index, device)
        if shifted:
            allowed = _in_rows(tokens.shape, states.attention_mask, device)
        else:
            allowed = _predicted(layout, tokens.shape, states.attention_mask)
        # Both at once, as each look at values waits for the device.
        flat = tokens.reshape(-1)
        bad = index[~allowed[index] | (flat[index] < 0)]
        if len(bad):
            first = int(bad.min())
            row, column = divmod(first, tokens.shape[-1])
            kept = column - self._padding
            if allowed[first]:
                raise ValueError(
                    f"{name}: got {int(flat[first])} in row {row}, column "
                    f"{kept if has_kept_ids else column}, expected token ids at action tokens"
                )
            wanted = "the state there" if shifted else "it and the token before it"
            raise ValueError(
                f"layout: got an action token in row {row}, column {kept}, expected {wanted} to be "
                "in the row and in attention_mask"
            )
        self.layout = layout if shifted else shifted_left(layout)
        self.token_ids = (flat if shifted else flat.roll(-1)).view(tokens.shape)

    def tokens(self, name: str, values: Any, *, or_steps: bool = False) -> Any:
        """Return what is given per token at the places of the states; all else as it is.

        With `or_steps`, a vector with as many entries as there are steps is per step, as it is for
        the loss.
        """
        if or_steps and isinstance(values, Tensor) and values.shape == (self.layout.num_steps,):
            return values
        is_whole = self._padding == 0
        if not isinstance(values, Tensor) or (is_whole and values.numel() != self._shape.numel()):
            return values
        # A number for all.
        if values.dim() == 0:
            return values
        if not _is_view(values.shape, self._shape):
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}, expected that of the tokens, "
                f"{tuple(self._shape)}" + (", as logits_to_keep says" if not is_whole else "")
            )
        if not is_whole:
            values = _padded(values.reshape(self._shape), self._padding)
        return values if self._is_shifted else values.reshape(-1).roll(-1).view(values.shape)

    def support(self, support: object) -> TokenSupport | None:
        """Return sets of tokens at the places of the states; None as it is."""
        if support is None:
            return None
        checked = require_support(support)
        if not _is_view(checked.shape, self._shape):
            raise ValueError(
                f"support: got shape {tuple(checked.shape)}, expected that of the tokens, "
                f"{tuple(self._shape)}"
            )
        number = torch.arange(self._shape.numel(), device=checked.device).view(self._shape)
        if self._padding:
            number = torch.nn.functional.pad(number, (self._padding, 0), value=-1)
        if not self._is_shifted:
            number = number.reshape(-1).roll(-1).view(number.shape)
        return moved(checked, number, ("states", self._padding, self._is_shifted))

    def at_tokens(self, values: Tensor) -> Tensor:
        """Return what is at the places of the states at the tokens that they predict."""
        if self._is_shifted:
            return values
        moved = values.reshape(-1).roll(1).view(values.shape)
        return moved[:, self._padding :] if self._padding else moved


def _is_view(shape: torch.Size, other: torch.Size) -> bool:
    """Return whether tensors of both shapes have the same elements in the same order.

    Either may be flat. Rows that were exchanged for columns have another order.
    """
    return checks.same_order(shape, other) or checks.same_order(other, shape)


def _given_shape(positions: torch.Size, logits_to_keep: int | None) -> torch.Size | None:
    """Return ``[B, C]`` of the last C tokens of each row, None where nothing says how many."""
    if logits_to_keep is None:
        return None
    if len(positions) != 2 or logits_to_keep > positions[1]:
        raise ValueError(
            f"logits_to_keep: got {logits_to_keep} with tokens of shape {tuple(positions)}, "
            "expected rows of at least as many tokens, [B, T]"
        )
    return torch.Size((positions[0], logits_to_keep))


def _padded(values: Tensor, columns: int) -> Tensor:
    """Return rows with so many zeros before them."""
    return torch.nn.functional.pad(values, (columns, 0))


def _way_out(found: torch.Size, positions: torch.Size, logits_to_keep: int | None) -> str:
    """Return what to do where a layout seems to be that of completions."""
    is_shorter = len(found) == len(positions) == 2 and found[1] < positions[1]
    if logits_to_keep is None and is_shorter and found[0] == positions[0]:
        return (
            f"; if it is that of the last {found[1]} tokens of each row, give the batch "
            f"logits_to_keep={found[1]}"
        )
    return ""


def _predicted(layout: StepLayout, shape: torch.Size, attention_mask: object) -> Tensor:
    """Return which tokens ``[N]`` a state predicts: none at the start of a row or at padding."""
    num_tokens, device = shape.numel(), layout.device
    found = torch.ones(num_tokens, dtype=torch.bool, device=device)
    found[layout.row_offsets[:-1][layout.row_offsets.diff() > 0]] = False
    found.view(-1, max(shape[-1], 1))[:, 0] = False
    seen = _in_rows(shape, attention_mask, device)
    return found & seen & seen.roll(1)


def _in_rows(shape: torch.Size, attention_mask: object, device: torch.device) -> Tensor:
    """Return which places ``[N]`` are no padding, as far as the attention mask says."""
    if isinstance(attention_mask, Tensor) and attention_mask.shape == shape:
        return attention_mask.reshape(-1) != 0
    return torch.ones(shape.numel(), dtype=torch.bool, device=device)
