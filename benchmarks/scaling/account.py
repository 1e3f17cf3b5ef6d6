"""Collectives, bytes and memory of the functions that talk to other ranks, by formulas.

`tests/distributed/test_account.py` compares them with collectives that it counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from steppo_kernels.backends.reference.vocabulary_shard import COLUMNS
from steppo_kernels.distributed.blocks import ALIGNMENT, WORD_BYTES
from steppo_kernels.ranks import NUMBERS

_NUMBER = 8


class Sent(NamedTuple):
    """Collectives of one kind.

    Attributes:
        collective: "all_gather" or "all_reduce".
        count: how many.
        bytes: what a rank gives to each.
    """

    collective: str
    count: int
    bytes: int

    def received(self, ranks: int) -> float:
        """Return the bytes that a rank receives, an all-reduce being two passes over a ring."""
        share = ranks - 1 if self.collective == "all_gather" else 2 * (ranks - 1) / ranks
        return self.count * self.bytes * share


def received(sent: Iterable[Sent], ranks: int) -> float:
    """Return the bytes that a rank receives in all."""
    return sum(each.received(ranks) for each in sent)


def collectives(sent: Iterable[Sent]) -> int:
    """Return how many collectives there are."""
    return sum(each.count for each in sent)


def first_word() -> Sent:
    """Return the first word of a call: whether the rank failed, a digest, and some numbers.

    It has room for the most numbers that any function says, so that all words are of one size.
    """
    return Sent("all_gather", 1, (2 + NUMBERS) * _NUMBER)


# Once an optimizer step, over the ranks that have batches of their own.
_OF_A_BATCH = ("batch_reduction", "ratio_center", "step_gae", "merge_metrics")
OF_A_BATCH = {name: [first_word()] for name in _OF_A_BATCH}


def whole(tokens: int, arrays: int = 1, itemsize: int = 4) -> list[Sent]:
    """Return what `ContextShard.whole` sends of so many arrays; a rank has up to `tokens`."""
    array = -(-tokens * itemsize // ALIGNMENT) * ALIGNMENT
    rows = -(-arrays * array // WORD_BYTES) + 1
    return [first_word(), Sent("all_gather", 1, rows * WORD_BYTES)]


def whole_memory(ranks: int, tokens: int, itemsize: int = 4) -> float:
    """Return the bytes that `ContextShard.whole` holds at most of one array; ranks are several.

    A rank has up to `tokens`. Those of all ranks are there as words, as bytes, as the block of the
    array and in their order; its own are there in the order of tokens, as bytes and as a word.
    """
    return (4 * ranks + 3) * tokens * itemsize


class Head(NamedTuple):
    """A call of a head whose vocabulary is split over ranks.

    Attributes:
        rows: action tokens M.
        size: hidden size d.
        chunk: `chunk_tokens`, at most M.
        entropy: whether entropies are formed.
        live: rows with a gradient.
        itemsize: bytes of a number of the hidden states.
    """

    rows: int
    size: int
    chunk: int
    entropy: bool
    live: int
    itemsize: int = 2

    def _words(self, count: int) -> list[Sent]:
        columns = COLUMNS if self.entropy else COLUMNS - 1
        return [Sent("all_gather", count, (min(self.chunk, self.rows) + 1) * columns * _NUMBER)]

    def _sum(self) -> list[Sent]:
        # Added up in fp32, or in fp64 if that is what the hidden states are.
        wide = max(4, self.itemsize)
        return [Sent("all_reduce", 1, self.live * self.size * wide)] if self.live else []

    def loss(self, evaluations: int) -> list[Sent]:
        """Return what `linear_steppo_loss` sends that forms so many chunks of logits."""
        first = [first_word()]
        return [*first, *self._words(evaluations + 1), *self._sum()]

    def log_probs(self) -> list[Sent]:
        """Return what the forward pass of `linear_token_log_probs` sends."""
        chunks = math.ceil(self.rows / self.chunk)
        return [first_word(), *self._words(chunks + 1)]

    def log_probs_backward(self) -> list[Sent]:
        """Return what its backward pass sends."""
        again = self._replace(rows=self.live, chunk=min(self.chunk, self.live))
        chunks = math.ceil(again.rows / again.chunk) if again.rows else 0
        return [first_word(), *again._words(chunks + 1), *again._sum()]

    def memory(
        self, ranks: int, vocabulary: int, positions: int, *, of_loss: bool = True
    ) -> dict[str, float]:
        """Return the bytes that a rank holds at most beside its inputs, where all rows are live.

        That is while `linear_steppo_loss` runs, or backward of `linear_token_log_probs` if not
        `of_loss`, with one chunk and all gradients, of a dtype that is not fp16. There are
        `positions` hidden states, action tokens or not. A CPU also widens slices of half precision
        for the products that ranks add up.
        """
        if self.chunk < self.rows or self.live < self.rows:
            raise ValueError("chunk, live: got fewer than all rows, expected all of them")
        part, wide = math.ceil(vocabulary / ranks), max(4, self.itemsize)
        rows = self.rows * self.size
        copies = 2 if of_loss else 1
        # What ranks add up is not rounded before.
        product = wide if ranks > 1 else self.itemsize
        found = {
            "logits": self.rows * part * wide,
            "gradient of the weight": part * self.size * self.itemsize,
            "gradient of the hidden states": positions * self.size * self.itemsize,
            # The hidden states, the loss has them again in the order of gradients, and these.
            "copies of rows": rows * (copies * self.itemsize + product),
        }
        if ranks > 1:
            sent = sum(one.bytes for one in self._words(1))
            found |= {"rows before their sum": rows * wide, "words of ranks": (ranks + 1) * sent}
        return found
