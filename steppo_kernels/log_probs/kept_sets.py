"""The kept sets of tokens as kernels read them: sorted, without duplicates, and grouped by id."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import csr
from ..backends.records import IdIndex, Sets, kept

# Pairs of one id that are summed together: enough of them that what the sums of parts move is small
# next to the hidden states, and few enough that an id which every token keeps is split over all
# processors.
PART = 256
# Ids are below this, and so are tokens: a token and an id make one int64.
MOST_IDS = 2**31


class KeptSets:
    """The ids of N tokens, P together. Only the package sees these tensors: nothing changes them.

    What follows from them is made when it is first asked for, and kept.

    Attributes:
        sets: the ids, ascending within a token and each once.
        largest: an id that none of them is above; -1 is above none.
        has_empty: whether a token has no ids. Sets that were cut to a range of ids have the answer
            of the whole sets.
    """

    def __init__(self, ids: Tensor, offsets: Tensor, largest: int, *, has_empty: bool) -> None:
        self.sets, self.largest, self.has_empty = Sets(ids, offsets), largest, has_empty
        self._derived: dict[Hashable, KeptSets] = {}

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.sets.offsets.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.sets.ids.shape[0]

    @kept
    def counts(self) -> Tensor:
        """How many ids each token has: int64 ``[N]``."""
        with _plain():
            return self.sets.offsets.diff()

    @kept
    def tokens(self) -> Tensor:
        """The token of each pair: int64 ``[P]``."""
        with _plain():
            every = torch.arange(self.num_tokens, device=self.sets.ids.device)
            return torch.repeat_interleave(every, self.counts, output_size=self.num_pairs)

    @kept
    def _keys(self) -> Tensor:
        """A number for each pair, which ascends: int64 ``[P]``."""
        with _plain():
            return self.tokens * MOST_IDS + self.sets.ids

    @kept
    def by_id(self) -> IdIndex:
        """The pairs in the order of their ids."""
        with _plain():
            return id_index(self.sets.ids, self.tokens)

    @kept
    def digest(self) -> str:
        """Text that other sets have not, but by chance. A GPU is waited for, once."""
        with _plain():
            # Sums that wrap around in 64 bits, of numbers times an odd one for each place.
            sums = [
                (values * (2 * torch.arange(len(values), device=values.device) + 1)).sum()
                for values in ((self.sets.ids.long() + 1) * 0x1B873593CC9E2D51, self.sets.offsets)
            ]
            return " ".join(f"{one & (2**64 - 1):x}" for one in torch.stack(sums).tolist())

    def places(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """Return where in its set each of the tokens `rows` has its id, -1 if nowhere: ``[n]``."""
        if self.num_pairs == 0:
            return torch.full_like(rows, -1)
        ids = token_ids[rows]
        keys = rows * MOST_IDS + ids
        at = torch.searchsorted(self._keys, keys).clamp(max=self.num_pairs - 1)
        is_there = (self._keys[at] == keys) & (ids >= 0) & (ids < MOST_IDS)
        return torch.where(is_there, at - self.sets.offsets[rows], -1)

    def at(self, tokens: Tensor) -> KeptSets:
        """Return the sets of some tokens (int64 ``[n]``), which may come twice and in any order.

        That of -1 is empty.
        """
        every = torch.nn.functional.pad(self.counts, (0, 1))
        counts = every[tokens]
        borders = csr.prefix(counts)
        total = int(borders[-1])
        ids = self.sets.ids[csr.ranges(self.sets.offsets[tokens], counts, total)]
        if not total:
            return KeptSets(ids, borders, -1, has_empty=len(counts) > 0)
        # Both are read at once: a GPU is waited for.
        least, largest = torch.stack((counts.min(), ids.max().long())).tolist()
        return KeptSets(ids, borders, largest, has_empty=least == 0)

    def to(self, device: torch.device) -> KeptSets:
        """Return the sets on `device`; themselves, if they lie there."""
        ids, offsets = (tensor.to(device) for tensor in self.sets)
        if ids is self.sets.ids:
            return self
        return KeptSets(ids, offsets, self.largest, has_empty=self.has_empty)

    def within(self, start: int, size: int) -> KeptSets:
        """Return the sets among ids from `start` on, `size` of them, counted from there."""

        def make() -> KeptSets:
            ids = self.sets.ids
            is_in = (ids >= start) & (ids < start + size)
            offsets = csr.prefix(is_in.to(torch.int64))[self.sets.offsets]
            return KeptSets(ids[is_in] - start, offsets, size - 1, has_empty=self.has_empty)

        if start == 0 and size > self.largest:
            return self
        return self.derived((start, size), make)

    def derived(self, key: Hashable, make: Callable[[], KeptSets]) -> KeptSets:
        """Return what `make` makes of these sets; it is made once for each key."""
        if key not in self._derived:
            with _plain():
                self._derived[key] = make()
        return self._derived[key]


def id_index(ids: Tensor, tokens: Tensor) -> IdIndex:
    """Return pairs ``[P]`` of ids (int32) and tokens in the order of their ids."""
    device = ids.device
    in_order, pairs = ids.sort(stable=True)
    distinct, counts = torch.unique_consecutive(in_order, return_counts=True)
    num_parts = (counts + (PART - 1)) // PART
    # What is long is known on the host from here on, and so is every size.
    every = torch.arange(len(distinct), device=device)
    part_ids = torch.repeat_interleave(every, num_parts)
    number = torch.arange(len(part_ids), device=device)
    number -= (num_parts.cumsum(0) - num_parts)[part_ids]
    begin = (counts.cumsum(0) - counts)[part_ids] + number * PART
    parts = torch.cat((begin, begin.new_full((1,), len(ids))))
    is_long = num_parts > 1
    is_slot = is_long[part_ids]
    part_slots = torch.where(is_slot, is_slot.cumsum(0) - 1, -1)
    long_ids = is_long.nonzero().squeeze(1)
    long_slots = csr.prefix(num_parts[long_ids])
    return IdIndex(
        distinct, pairs, tokens[pairs], parts, part_ids, part_slots, long_ids, long_slots
    )


@contextmanager
def _plain() -> Iterator[None]:
    """Make tensors that outlive the modes which are on."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield
