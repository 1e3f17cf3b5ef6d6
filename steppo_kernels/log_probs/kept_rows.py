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

    def num_pairs(self) -> int:
        """Return how many ids the tokens that are over their sets have.

        On a GPU, which would be waited for, those of all tokens count.
        """
        if self.covers_all or self.kept.device.type != "cpu":
            return self.held.num_pairs
        return int(self.held.counts[self.kept].sum())

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
    held = _within(support._held, index, vocabulary)
    check_ids(token_ids[index], vocabulary)
    places = held.places(token_ids, index)
    is_none = places < 0
    is_full: Tensor | None = None
    is_missing: Tensor | None = is_none
    if support.missing == "full":
        is_full, is_missing = is_none, None
    elif held.has_empty:
        is_full = held.counts[index] == 0
        is_missing = is_none & ~is_full
    # The host waits for this, but not for where there are none.
    if is_full is not None and not bool(is_full.any()):
        is_full = None
    if is_missing is not None and index.device.type == "cpu":
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


def _within(held: KeptSets, index: Tensor, vocabulary: int) -> KeptSets:
    """Return the sets among the ids of the vocabulary, where those of `index` must be."""
    if held.largest < vocabulary:
        return held
    is_ours = torch.zeros(held.num_tokens, dtype=torch.bool, device=index.device)
    is_ours[index] = True
    bad = held.sets.ids[is_ours[held.tokens] & (held.sets.ids >= vocabulary)]
    if len(bad):
        raise ValueError(
            f"support: got the id {int(bad[0])}, expected ids from 0 to {vocabulary - 1}"
        )
    # Sets of other tokens may have any ids.
    return held.within(0, vocabulary)
