"""The cases: at the sizes of the targets, or so small that a CPU runs all of them in seconds."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ..vocabulary.cases import Shape
from . import on_head, on_kept_sets, on_logits, on_tokens
from .on_tokens import LAYOUT, MASK, OF_ROWS, PER_STEP
from .problem import Case


class Sizes(NamedTuple):
    """The shapes of all cases.

    Attributes:
        policy: batches of log-probs.
        long_steps: a batch of log-probs with one long step a row.
        rows: trajectories, steps of one, and tokens of a row.
        tokens: a batch whose tokens are all actions.
        logits: rows and vocabulary; the second has rows that are not aligned, the third few rows.
        loss: steps on logits.
        head: steps on hidden states, and the size of these.
        live: shares of tokens with a gradient.
        kept: hidden states with kept sets, and the ids of these.
    """

    policy: tuple[str, ...]
    long_steps: str
    rows: tuple[int, int, int]
    tokens: str
    logits: tuple[tuple[int, int], ...]
    loss: Shape
    head: tuple[Shape, int]
    live: tuple[float, ...]
    kept: tuple[on_kept_sets.Sizes, tuple[int, ...]]


SIZES = {
    "full": Sizes(
        policy=("turns 64x8192", "turns 256x16384"),
        long_steps="rows 1024x4096",
        rows=(64, 42, 512),
        tokens="64x8192",
        logits=((8192, 151_936), (8192, 50_257), (32, 151_936)),
        loss=Shape(16, 512, 512, 16),
        head=(Shape(64, 128, 128, 64), 4096),
        live=(1.0, 0.3),
        kept=(on_kept_sets.Sizes(8192, 4096, 151_936), (20, 512)),
    ),
    "tiny": Sizes(
        policy=("turns 4x512", "turns 8x512"),
        long_steps="rows 8x512",
        rows=(4, 6, 48),
        tokens="4x96",
        logits=((64, 1024), (64, 1003), (8, 1024)),
        loss=Shape(4, 32, 32, 4, 1024),
        head=(Shape(10, 16, 16, 10, 1024), 64),
        live=(1.0, 0.3),
        kept=(on_kept_sets.Sizes(40, 64, 1024), (3, 20)),
    ),
}


GROUPS = ("tokens", "logits", "head", "kept")


def groups(size: str) -> dict[str, list[Case]]:
    """Return the cases of a size by group. In a group those that targets name come first."""
    sizes = SIZES[size]
    first, second = sizes.policy
    aligned, unaligned, few = sizes.logits
    of_tokens = [
        *_policy(first),
        *_policy(second),
        on_tokens.step_gae(*sizes.rows, PER_STEP),
        on_tokens.token_gae(sizes.tokens),
        on_tokens.policy_loss(first, MASK, backward=False, reduction="trajectory_mean"),
        *(on_tokens.policy_loss(sizes.long_steps, kind, backward=False) for kind in (LAYOUT, MASK)),
        on_tokens.value_loss(first),
        on_tokens.from_mask(first),
        on_tokens.step_gae(*sizes.rows, OF_ROWS),
    ]
    of_logits = [
        *_log_probs(aligned),
        on_logits.logits_loss(sizes.loss),
        on_logits.logits_loss(sizes.loss, leaf=False),
        *_log_probs(unaligned),
        on_logits.log_probs(*few, backward=False),
    ]
    of_head = [
        *(on_head.linear_loss(*sizes.head, live) for live in sizes.live),
        *(on_head.linear_log_probs(*sizes.head, live) for live in sizes.live),
    ]
    of_kept_sets = [
        on_kept_sets.kept_sets(sizes.kept[0], count, trained=trained)
        for count in sizes.kept[1]
        for trained in (False, True)
    ]
    return dict(zip(GROUPS, (of_tokens, of_logits, of_head, of_kept_sets), strict=True))


def cases(size: str) -> list[Case]:
    """Return the cases of a size, as the page has them; `order.py` says which is measured first."""
    return [case for group in groups(size).values() for case in group]


def _policy(shape: str) -> list[Case]:
    return [
        on_tokens.policy_loss(shape, kind, backward=backward)
        for kind, backward in itertools.product((LAYOUT, MASK), (False, True))
    ]


def _log_probs(shape: tuple[int, int]) -> list[Case]:
    return [on_logits.log_probs(*shape, backward=backward) for backward in (False, True)]
