"""TokenSupport: which ids the sampler could choose at each token."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from .. import checks, csr
from ..backends.untraced import untraced
from ..config import one_of
from ..devices import device_of
from ..inference import outside_inference_mode
from ..pickling import state_of
from .kept_sets import MOST_IDS, KeptSets

Missing = Literal["error", "full"]
_MISSING = ("error", "full")
_CONSTRUCTORS = "TokenSupport.from_csr, from_padded, from_lists or from_mask"


class TokenSupport:
    r"""The ids that could be sampled at each token: its *set*. Built once, never changed.

    Sampling with top-k, top-p or min-p draws from a softmax over the kept ids alone. Log-probs that
    a trainer computes over the whole vocabulary are lower by the log of the kept mass, and every
    ratio to those of the engine is wrong by it. Given to a function as `support=`, log-probs,
    entropies and gradients are over the set of each token: log p(y) = z_y - log sum e^z over it.

    Entry n of N flat positions (row-major) is the set of token n, as entry n of `token_ids` is that
    token. Slices such as ``support[:, 1:]`` go along with those of `token_ids`. A token with an
    empty set is normalized over the whole vocabulary. Ids that come twice count once. Sets of
    masked tokens are not looked at.

    What the constructors are given is copied. The sorted ids, and which tokens keep an id, are made
    once and used by every call. Building it waits for a GPU.

    Attributes:
        shape: the token shape, ``[B, T]`` or ``[N]``.
        missing: what a token is that is not in its set: see `from_csr`.
        ids: int32 ``[P]``, all sets one after the other, ascending within a set; a copy.
        offsets: int64 ``[N + 1]``: token n has ``ids[offsets[n]:offsets[n + 1]]``; a copy.
        counts: int64 of the token shape, how many ids each set has; a copy.

    Example:
        >>> import torch
        >>> from steppo_kernels import TokenSupport, token_log_probs
        >>> support = TokenSupport.from_padded(torch.tensor([[0, 2, -1], [1, 2, 3], [-1, -1, -1]]))
        >>> support
        TokenSupport(shape=(3,), num_pairs=5, missing='error', device='cpu')
        >>> token_log_probs(torch.zeros(3, 4), torch.tensor([2, 1, 0]), support=support).exp()
        tensor([0.5000, 0.3333, 0.2500])
    """

    shape: torch.Size
    missing: Missing
    _held: KeptSets

    def __init__(self, *args: Any, **fields: Any) -> None:
        raise TypeError(
            f"TokenSupport: got a call, expected one of its constructors: {_CONSTRUCTORS}"
        )

    @classmethod
    @untraced
    def from_csr(
        cls,
        ids: Tensor,
        offsets: Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        missing: Missing = "error",
    ) -> TokenSupport:
        """Take sets that lie one after the other, as vLLM returns them.

        Args:
            ids: int ``[P']``, 0 or more, in any order within a set.
            offsets: int ``[N + 1]``, from 0 to P', not descending: token n has
                ``ids[offsets[n]:offsets[n + 1]]``.
            shape: the token shape, of N tokens; None is ``[N]``.
            missing: what to do with a token that is not in its set, though that is not empty.
                "error": raise on a CPU, and give NaN on a GPU, where no call waits to look. "full":
                normalize it over the whole vocabulary.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import TokenSupport
            >>> TokenSupport.from_csr(torch.tensor([7, 3, 3, 5]), torch.tensor([0, 3, 4])).ids
            tensor([3, 7, 5], dtype=torch.int32)
        """
        flat = checks.dims("ids", checks.integer("ids", ids), (1,)).to(torch.int64)
        borders = checks.integer("offsets", offsets, flat.device)
        borders = checks.dims("offsets", borders, (1,)).to(torch.int64)
        if len(borders) == 0 or int(borders[0]) != 0 or int(borders[-1]) != len(flat):
            raise ValueError(f"offsets: got {_ends(borders)}, expected 0 to {len(flat)}")
        # Differences of such numbers may overflow.
        if bool((borders[1:] < borders[:-1]).any()):
            raise ValueError("offsets: got numbers that descend, expected none")
        wanted = (len(borders) - 1,) if shape is None else _shape(shape, len(borders) - 1)
        return _made("ids", flat, borders.diff(), torch.Size(wanted), missing)

    @classmethod
    @untraced
    def from_padded(cls, ids: Tensor, *, pad: int = -1, missing: Missing = "error") -> TokenSupport:
        """Take sets that are filled up to the same length.

        Args:
            ids: int ``[*shape, K]``; entries that are `pad` are none.
            pad: what sets are filled up with, anywhere in them.
            missing: as in `from_csr`.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import TokenSupport
            >>> TokenSupport.from_padded(torch.tensor([[[7, 3], [5, -1]]])).counts
            tensor([[2, 1]])
        """
        every = checks.integer("ids", ids)
        if isinstance(pad, bool) or not isinstance(pad, int):
            raise TypeError(f"pad: got {type(pad).__name__}, expected an integer")
        if not -MOST_IDS <= pad < MOST_IDS:
            raise ValueError(f"pad: got {pad}, expected an integer of 32 bits")
        if every.dim() < 2:
            raise ValueError(f"ids: got shape {tuple(every.shape)}, expected [*shape, K]")
        wide = every.to(torch.int64)
        is_id = wide != pad
        return _made("ids", wide[is_id], is_id.sum(-1).reshape(-1), every.shape[:-1], missing)

    @classmethod
    @untraced
    def from_lists(
        cls, sets: Iterable[Iterable[int]], mask: Tensor, *, missing: Missing = "error"
    ) -> TokenSupport:
        """Take the sets of sampled tokens as engines return them, and where these tokens are.

        Args:
            sets: the ids of each sampled token, in the order of the tokens: those of the first row
                first, and in a row one completion after the other.
            mask: bool or 0/1, of the token shape, True at the sampled tokens; others get no set.
            missing: as in `from_csr`.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import TokenSupport
            >>> TokenSupport.from_lists([[3, 7], [5]], torch.tensor([[0, 1, 0, 1]])).counts
            tensor([[0, 2, 0, 1]])
        """
        is_sampled = checks.flags("mask", mask, None)
        rows = [_entries(one, number) for number, one in enumerate(_listed(sets))]
        if len(rows) != int(is_sampled.sum()):
            raise ValueError(
                f"sets: got {len(rows)} sets, expected one of each of the {int(is_sampled.sum())} "
                "tokens in mask"
            )
        entries = [entry for row in rows for entry in row]
        counts = torch.zeros(is_sampled.numel(), dtype=torch.int64, device=is_sampled.device)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=counts.device)
        counts[is_sampled.reshape(-1)] = lengths
        ids = torch.tensor(entries, dtype=torch.int64, device=counts.device)
        return _made("sets", ids, counts, is_sampled.shape, missing)

    @classmethod
    @untraced
    def from_mask(cls, mask: Tensor, *, missing: Missing = "error") -> TokenSupport:
        """Take sets as a mask of the vocabulary.

        Args:
            mask: bool or 0/1 ``[*shape, V]``, True at the ids that are kept.
            missing: as in `from_csr`.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import TokenSupport
            >>> TokenSupport.from_mask(torch.tensor([[True, False, True]])).ids
            tensor([0, 2], dtype=torch.int32)
        """
        is_kept = checks.flags("mask", mask, None)
        if is_kept.dim() < 2:
            raise ValueError(f"mask: got shape {tuple(is_kept.shape)}, expected [*shape, V]")
        ids = is_kept.flatten(0, -2).nonzero()[:, 1]
        return _made("mask", ids, is_kept.sum(-1).reshape(-1), is_kept.shape[:-1], missing)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self._held.sets.ids.device

    @property
    def num_pairs(self) -> int:
        """P, how many ids all sets have together."""
        return self._held.num_pairs

    @property
    def ids(self) -> Tensor:
        """All sets one after the other, int32 ``[P]``."""
        return require_support(self)._held.sets.ids.clone()

    @property
    def offsets(self) -> Tensor:
        """Where the sets begin in `ids`, int64 ``[N + 1]``."""
        return require_support(self)._held.sets.offsets.clone()

    @property
    def counts(self) -> Tensor:
        """How many ids each set has, int64 of the token shape."""
        return require_support(self)._held.counts.view(self.shape).clone()

    @untraced
    @outside_inference_mode
    def __getitem__(self, index: Any) -> TokenSupport:
        """Return the sets of some tokens: those that ``token_ids[index]`` would have.

        Args:
            index: what a tensor of the token shape can be indexed with.

        Raises:
            IndexError, TypeError: as of a tensor.

        Example:
            >>> import torch
            >>> from steppo_kernels import TokenSupport
            >>> support = TokenSupport.from_padded(torch.tensor([[[7, 3], [5, -1], [8, 9]]]))
            >>> support[:, 1:].counts
            tensor([[1, 2]])
        """
        held = require_support(self)._held
        every = torch.arange(held.num_tokens, device=self.device).view(self.shape)[index]
        return _of(held.at(every.reshape(-1)), every.shape, self.missing)

    def to(self, device: torch.device | str | int) -> TokenSupport:
        """Return the sets on `device`; themselves, if they lie there.

        Raises:
            ValueError, TypeError: naming the argument.
            RuntimeError: as of a tensor.

        Example:
            >>> import torch
            >>> from steppo_kernels import TokenSupport
            >>> support = TokenSupport.from_padded(torch.tensor([[7, 3]]))
            >>> support.to("cpu") is support
            True
        """
        where = device_of(device)
        if where.type == "meta":
            raise ValueError("device: got meta, expected one that holds ids")
        held = require_support(self)._held
        moved = held.to(where)
        return self if moved is held else _of(moved, self.shape, self.missing)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("TokenSupport: got the set of one token, which has no length")
        return self.shape[0]

    def __copy__(self) -> TokenSupport:
        return self

    def __deepcopy__(self, memo: object) -> TokenSupport:
        return self

    def __getstate__(self) -> dict[str, object]:
        return state_of(
            lambda: {
                "ids": self.ids,
                "offsets": self.offsets,
                "shape": tuple(self.shape),
                "missing": self.missing,
            }
        )

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        loaded = TokenSupport.from_csr(**state)
        _fill(self, loaded._held, loaded.shape, loaded.missing)

    def __repr__(self) -> str:
        return (
            f"TokenSupport(shape={tuple(self.shape)}, num_pairs={self.num_pairs}, "
            f"missing={self.missing!r}, device={str(self.device)!r})"
        )


def require_support(value: object) -> TokenSupport:
    """Return `value` if it is a `TokenSupport` that a constructor made."""
    if not isinstance(value, TokenSupport):
        raise TypeError(f"support: got {type(value).__name__}, expected a TokenSupport")
    if not isinstance(value.__dict__.get("_held"), KeptSets):
        raise TypeError("support: got a TokenSupport that no constructor made, expected one's")
    return value


def moved(support: TokenSupport, tokens: Tensor, key: Hashable) -> TokenSupport:
    """Return the sets of `tokens` (int64, of any shape; -1 has none), made once for each key."""
    held = support._held
    made = held.derived((key, tokens.shape), lambda: held.at(tokens.reshape(-1)))
    return _of(made, tokens.shape, support.missing)


@outside_inference_mode
def _made(
    name: str, ids: Tensor, counts: Tensor, shape: torch.Size, missing: Missing
) -> TokenSupport:
    """Return N sets of ids (int64 ``[P']``), `counts` of each; `name` is that of the argument."""
    one_of("missing", missing, _MISSING)
    lowest, largest = (int(end) for end in ids.aminmax()) if len(ids) else (0, -1)
    if lowest < 0 or largest >= MOST_IDS:
        bad = lowest if lowest < 0 else largest
        raise ValueError(f"{name}: got the id {bad}, expected ids from 0 to {MOST_IDS - 1}")
    tokens = torch.repeat_interleave(
        torch.arange(len(counts), device=ids.device), counts, output_size=len(ids)
    )
    keys = tokens * MOST_IDS + ids
    if bool((keys.diff() <= 0).any()):
        keys = keys.unique()
        tokens, ids = keys // MOST_IDS, keys % MOST_IDS
        counts = torch.bincount(tokens, minlength=len(counts))
    offsets = csr.prefix(counts)
    has_empty = bool((counts == 0).any())
    held = KeptSets(ids.to(torch.int32), offsets, largest, has_empty=has_empty)
    return _of(held, shape, missing)


def _of(held: KeptSets, shape: torch.Size, missing: Missing) -> TokenSupport:
    made = object.__new__(TokenSupport)
    _fill(made, held, shape, missing)
    return made


def _fill(support: TokenSupport, held: KeptSets, shape: torch.Size, missing: Missing) -> None:
    for name, value in (("_held", held), ("shape", shape), ("missing", missing)):
        object.__setattr__(support, name, value)


def _listed(sets: object) -> list[object]:
    """Return sets one by one, each of any type."""
    if not isinstance(sets, (str, bytes, Tensor)) and isinstance(sets, Iterable):
        # An array without dimensions says that it is iterable.
        with suppress(TypeError):
            return list(sets)
    raise TypeError(f"sets: got {type(sets).__name__}, expected a sequence of sets of ids")


def _entries(one: object, number: int) -> list[int]:
    """Return the ids of a set, the `number`-th of some."""
    if isinstance(one, (str, bytes, Mapping)) or not isinstance(one, Iterable):
        raise TypeError(
            f"sets: got {type(one).__name__} as the set of token {number}, expected ids; none for "
            "one over the whole vocabulary"
        )
    entries = list(one)
    for entry in entries:
        if isinstance(entry, bool) or not hasattr(entry, "__index__"):
            raise TypeError(
                f"sets: got {type(entry).__name__} in the set of token {number}, expected ids"
            )
        if not 0 <= int(entry) < MOST_IDS:
            raise ValueError(
                f"sets: got the id {int(entry)}, expected ids from 0 to {MOST_IDS - 1}"
            )
    return entries


def _shape(shape: tuple[int, ...], num_tokens: int) -> torch.Size:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: got {type(shape).__name__}, expected a tuple of sizes")
    sizes = tuple(checks.count("shape", size, 0) for size in shape)
    # Sizes of any size are multiplied here: torch.Size takes 64 bits.
    if math.prod(sizes) != num_tokens or max(sizes, default=0) >= 2**63:
        raise ValueError(f"shape: got {sizes} with sets of {num_tokens} tokens, expected as many")
    return torch.Size(sizes)


def _ends(offsets: Tensor) -> str:
    return f"{int(offsets[0])} to {int(offsets[-1])}" if len(offsets) else "none"


torch.serialization.add_safe_globals([TokenSupport])
