"""The tokens of a call with `support`: which are over their sets, and which over all ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.reference.token_log_probs import check_ids
from .kept_sets import KeptSets
from .token_support import TokenSupport, require_support


class KeptRows(NamedTuple):
    """The tokens of a call, by what they are normalized over.

    Attributes:
        held: the sets of all tokens.
        kept: int64 ``[n]``, the tokens that are over their sets.
        places: int64 ``[n]``, where in its set each of these has its own id, -1 if nowhere.
        full: int64 ``[m]``, those that are over the whole vocabulary.
        is_missing: bool ``[n]``, whether a token's id is not in its set, which a GPU does not wait
            to hear; None where none is.
    """

    held: KeptSets
    kept: Tensor
    places: Tensor
    full: Tensor
    is_missing: Tensor | None

    @property
    def covers_all(self) -> bool:
        """Whether every token is over its set."""
        return len(self.kept) == self.held.num_tokens

    def has_all_pairs(self) -> bool:
        """Return whether no other token has ids; a GPU would be waited for."""
        return self.covers_all or int(self.held.counts[self.kept].sum()) == self.held.num_pairs

    def marked(self, values: Tensor) -> Tensor:
        """Return values ``[n]``, NaN where a token is not in its set."""
        return values if self.is_missing is None else values.masked_fill(self.is_missing, torch.nan)

    def marked_all(self, log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Return values ``[N]`` of all tokens, with gradients, as `marked` returns those of n."""
        if self.is_missing is None:
            return log_probs, entropy
        factor = torch.ones_like(log_probs)
        factor[self.kept] = self.marked(factor[self.kept])
        return log_probs * factor, entropy * factor

    def mask(self, rows: Tensor, start: int, vocabulary: int) -> Tensor:
        """Return which of the ids from `start` on each of some tokens is over: bool ``[k, V]``."""
        held = self.held.within(start, vocabulary)
        mask = torch.zeros((held.num_tokens, vocabulary), dtype=torch.bool, device=rows.device)
        mask[held.tokens, held.sets.ids.long()] = True
        mask[self.full] = True
        return mask[rows]


def check_support(support: object, shape: torch.Size, device: torch.device) -> TokenSupport:
    """Return a `TokenSupport` that goes with tokens of this shape."""
    checked = require_support(support)
    if checked.device != device:
        raise ValueError(f"support: got {checked.device}, expected {device}, where the tokens are")
    if checked.shape != shape and not (
        checked.shape.numel() == shape.numel() and checks.same_order(checked.shape, shape)
    ):
        raise ValueError(
            f"support: got shape {tuple(checked.shape)}, expected the token shape {tuple(shape)}, "
            f"flat or as it is"
        )
    return checked


def rows_of(support: TokenSupport, token_ids: Tensor, index: Tensor, vocabulary: int) -> KeptRows:
    """Return the tokens at `index` (int64) by what they are normalized over.

    Raises:
        ValueError: an id is not in the vocabulary, or a token is not in its set; as far as looking
            costs no wait.
    """
    held = support._held
    if held.largest >= vocabulary:
        raise ValueError(
            f"support: got the id {held.largest}, expected ids from 0 to {vocabulary - 1}"
        )
    check_ids(token_ids[index], vocabulary)
    places = held.places(token_ids, index)
    is_full = held.counts[index] == 0 if held.has_empty else None
    is_missing: Tensor | None = places < 0
    assert is_missing is not None
    if is_full is not None:
        is_missing = is_missing & ~is_full
    if support.missing == "full":
        is_full = is_missing if is_full is None else is_full | is_missing
        is_missing = None
    elif index.device.type == "cpu":
        if bool(is_missing.any()):
            at = int(index[is_missing][0])
            raise ValueError(
                f"support: got a set of {int(held.counts[at])} ids without {int(token_ids[at])}, "
                f"the token at position {at}, expected every token in its set; with "
                'missing="full" others are over the whole vocabulary'
            )
        is_missing = None
    full = index[:0]
    if is_full is not None:
        is_kept = ~is_full
        if is_missing is not None:
            is_missing = is_missing[is_kept]
        full, index, places = index[is_full], index[is_kept], places[is_kept]
    return KeptRows(held, index, places, full, is_missing)
