"""Kept sets of every kind, and what plain PyTorch makes of the operators on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from head_cases import HeadCase
from torch import Tensor

from steppo_kernels import TokenSupport
from steppo_kernels.log_probs import supported_head


@contextmanager
def break_even(ratio: int) -> Iterator[None]:
    """Let heads gather rows for sets (0), or multiply all rows (a large number)."""
    usual = supported_head.BREAK_EVEN
    supported_head.BREAK_EVEN = {False: ratio, True: ratio}
    try:
        yield
    finally:
        supported_head.BREAK_EVEN = usual


# What sets of N tokens over V ids can be like.
KINDS = ("random", "nested", "full", "one", "empty", "some empty", "everywhere", "long")


def mask_of(kind: str, tokens: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Return which ids each token keeps: bool ``[N, V]``."""
    generator = torch.Generator().manual_seed(seed * 1000 + tokens * 31 + vocabulary)
    noise = torch.rand((tokens, vocabulary), generator=generator)
    number, place = torch.arange(vocabulary), torch.arange(tokens)[:, None]
    if kind == "random":
        mask = noise < 0.3
    elif kind == "nested":
        mask = number < 1 + place % vocabulary
    elif kind == "full":
        mask = torch.ones_like(noise, dtype=torch.bool)
    elif kind == "one":
        mask = noise == noise.amax(1, keepdim=True)
    elif kind == "empty":
        mask = torch.zeros_like(noise, dtype=torch.bool)
    elif kind == "some empty":
        mask = (noise < 0.3) & (place % 3 != 1)
    elif kind == "everywhere":
        # One id is in every set, so that it has several parts where there are many tokens.
        mask = (noise < 0.1) | (number == vocabulary // 2)
    else:
        assert kind == "long"
        mask = noise < torch.where(place % 4 == 0, 0.95, 0.05)
    return mask


def kept_of(kind: str, case: HeadCase, seed: int = 0) -> Tensor:
    """Return sets for a case that have its tokens, but for empty ones: bool ``[*shape, V]``."""
    shape, vocabulary = case.mask.shape, len(case.weight)
    mask = mask_of(kind, case.mask.numel(), vocabulary, seed).view(*shape, vocabulary)
    ids = torch.where(case.mask, case.token_ids, 0)
    own = torch.zeros_like(mask).scatter_(-1, ids.unsqueeze(-1), True)
    return mask | (own & mask.any(-1, keepdim=True))


def or_all(mask: Tensor) -> Tensor:
    """Return sets with the whole vocabulary in the place of empty ones."""
    return mask | ~mask.any(-1, keepdim=True)


def taken_from(mask: Tensor, seed: int = 0) -> Tensor:
    """Return an id of each set, any one of an empty set: int64 ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(mask.shape, generator=generator)
    return torch.where(mask.any(1, keepdim=True) & ~mask, -1.0, noise).argmax(1)


def support_of(mask: Tensor, device: str = "cpu", **options: str) -> TokenSupport:
    """Return the sets of a mask, made by `from_csr`: ids come twice and descend."""
    ids = mask.nonzero()[:, 1].flip(0)
    counts = mask.sum(1)
    # The sets lie from the last token to the first; every id of a set comes twice.
    borders = counts.flip(0).cumsum(0)
    parts = [ids[end - count : end] for end, count in zip(borders, counts.flip(0), strict=True)]
    doubled = [torch.cat((part, part)) for part in reversed(parts)]
    offsets = torch.nn.functional.pad((2 * counts).cumsum(0), (1, 0))
    made = TokenSupport.from_csr(torch.cat(doubled), offsets, **options)
    return made.to(device)
