"""What the ranks of a process group say to each other, and how none waits for one that failed.

Every word is a gather of a size that all ranks know: what they need alike to the last bit is formed
of the words by each of them, in the order of the ranks. A rank that fails says so in the place of
its next word, and all of them raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

# How many numbers of its own a rank may say with its first word: as many as the longest metrics.
NUMBERS = 19
_FINE, _FAILED = 0, 1
# What a later word is.
_PART, _END = 0, 1


class Ranks(NamedTuple):
    """The ranks of a process group.

    Attributes:
        group: the group.
        rank, size: the place of this process in it, and how many it has.
    """

    group: Any
    rank: int
    size: int

    @staticmethod
    def of(name: str, group: Any) -> Ranks:
        """Return the ranks of a group, of a mesh with one dimension, or of all (None).

        Raises:
            TypeError, ValueError, RuntimeError: naming the argument.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{name}: got {type(group).__name__} without torch.distributed, expected it after "
                "torch.distributed.init_process_group"
            )
        if hasattr(group, "mesh_dim_names"):
            if group.ndim != 1:
                raise ValueError(
                    f"{name}: got a DeviceMesh of {group.ndim} dimensions, expected one: take "
                    'mesh["tp"]'
                )
            group = group.get_group()
        if group is None:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(f"{name}: got a group without this rank, expected one with it")
            raise TypeError(
                f"{name}: got {type(group).__name__}, expected a ProcessGroup or a DeviceMesh"
            )
        return Ranks(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, part: Tensor, into: Tensor | None = None) -> Tensor:
        """Return what each rank gives, ``[R, *shape]``: one collective."""
        every = part.new_empty((self.size, *part.shape)) if into is None else into
        dist.all_gather(list(every.unbind()), part.contiguous(), group=self.group)
        return every

    def add_up(self, part: Tensor) -> Tensor:
        """Return `part`, in place, as the sum over the ranks: one collective."""
        dist.all_reduce(part, group=self.group)
        return part

    def words_device(self) -> torch.device:
        """Return where a group exchanges numbers that the host wants to know."""
        kinds = [one.partition(":")[0] for one in dist.get_backend_config(self.group).split(",")]
        if "cpu" in kinds:
            return torch.device("cpu")
        kind = kinds[0]
        return torch.device(kind, torch.get_device_module(kind).current_device())


class Call:
    """One call of a function on all ranks of a group.

    Within ``with`` it is: `agree` once; `open`; `gather` any number of times; `finish`, or a last
    `gather`. What is raised until then is told to the other ranks, which raise too, so that the
    group can be used again. Between `agree` and `open` is nothing that may fail on one rank alone.
    """

    def __init__(self, function: str, name: str, ranks: Ranks) -> None:
        """Begin a call; `name` is the argument that the group came as."""
        self.ranks, self.function, self.name = ranks, function, name
        self._size: tuple[int, int] | None = None
        self._device = torch.device("cpu")
        self._word: Tensor | None = None
        self._every: Tensor | None = None
        # Whether the other ranks no longer listen, or may not.
        self._is_over = False
        self._has_agreed = False

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._is_over:
            return
        if not self._has_agreed:
            self._compare(_FAILED, f"{type(error).__name__}: {error}", ())
        elif self._size is not None:
            self._say(_FAILED, 0, 0)

    def agree(
        self, facts: Mapping[str, object], numbers: Sequence[int] = ()
    ) -> list[tuple[int, ...]]:
        """Return the numbers of each rank, if all ranks know the same facts: one collective.

        The facts are what the next words depend on. Their texts must be short, and the same
        wherever they mean the same. There are up to `NUMBERS` numbers of 64 bits.

        Raises:
            ValueError: ranks know different facts; on all of them.
            RuntimeError: a rank failed before.
        """
        told = {"function": self.function, **{name: str(fact) for name, fact in facts.items()}}
        return [one[: len(numbers)] for one in self._compare(_FINE, told, numbers)]

    def open(self, rows: int, columns: int, device: torch.device) -> None:
        """Say how large the next words are: fp64 ``[n, columns]`` with n up to `rows`."""
        # Known before there is memory for it, so that a rank without memory can say so.
        self._size, self._device = (rows + 1, max(columns, 3)), device
        self._allocate()

    def gather(self, part: Tensor, *, last: bool = False) -> Tensor:
        """Return the parts of all ranks, ``[R, n, columns]``: one collective.

        The next word overwrites them. What is raised after the `last` one is told to no rank.

        Raises:
            RuntimeError: a rank failed.
        """
        word, count, columns = self._allocate(), *part.shape
        word[:count, :columns] = part
        every = self._say(_FINE, _PART, count)[:, :count, :columns]
        self._is_over = last
        return every

    def finish(self, number: int = 0) -> None:
        """Say that nothing failed, and a number that all ranks must have: one collective.

        Raises:
            RuntimeError: a rank failed.
        """
        self._say(_FINE, _END, number)
        self._is_over = True

    def _allocate(self) -> Tensor:
        """Return the memory of a word; that of all ranks' words is there with it."""
        if self._word is None or self._every is None:
            assert self._size is not None
            self._every = torch.zeros(
                (self.ranks.size, *self._size), dtype=torch.float64, device=self._device
            )
            self._word = self._every.new_zeros(self._size)
        return self._word

    def _say(self, status: int, kind: int, number: int) -> Tensor:
        word = self._allocate()
        word[-1, :3] = word.new_tensor((status, kind, number))
        # A collective that fails is not begun once more.
        self._is_over = True
        every = self.ranks.gather(word, self._every)
        signed = every[:, -1, :3].tolist()
        if status == _FAILED:
            return every
        failed = [rank for rank, one in enumerate(signed) if one[0] != _FINE]
        if failed:
            raise RuntimeError(
                f"{self.function}: {_ranks(failed)} of {self.name} raised an error in it, "
                "expected none: it stands in the log of that rank"
            )
        if any(one != signed[0] for one in signed):
            raise RuntimeError(
                f"{self.function}: ranks of {self.name} went different ways, expected the same "
                "inputs on all of them"
            )
        self._is_over = False
        return every

    def _compare(
        self, status: int, told: str | Mapping[str, str], numbers: Sequence[int]
    ) -> list[tuple[int, ...]]:
        digest = hashlib.sha256(repr(told).encode()).digest()[:8]
        own = [status, int.from_bytes(digest, "little", signed=True), *numbers]
        # Of one size, whichever functions the ranks call.
        own += [0] * (2 + NUMBERS - len(own))
        word = torch.tensor(own, dtype=torch.int64, device=self.ranks.words_device())
        self._has_agreed = self._is_over = True
        every = [tuple(one) for one in self.ranks.gather(word).tolist()]
        if all(one[:2] == (_FINE, every[0][1]) for one in every):
            self._is_over = False
            return [one[2:] for one in every]
        # All ranks know that they differ, and tell each other how.
        texts: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(texts, told, group=self.ranks.group)
        if status == _FAILED:
            return []
        failed = [rank for rank, one in enumerate(every) if one[0] != _FINE]
        if failed:
            raise RuntimeError(
                f"{self.function}: {_ranks(failed)} of {self.name} raised "
                f"{texts[failed[0]]} (expected none)"
            )
        raise ValueError(
            f"{self.name}: its ranks got different arguments, expected the same: "
            f"{_difference(texts)}"
        )


def _ranks(numbers: list[int]) -> str:
    several = "s" if len(numbers) > 1 else ""
    return f"rank{several} {', '.join(map(str, numbers))}"


def _difference(texts: list[dict[str, str]]) -> str:
    """Return which facts differ, and on which ranks."""
    said = []
    for name in {name: None for text in texts for name in text}:
        holders: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            holders.setdefault(text.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            each = (f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
            said.append(f"{name} is {', '.join(each)}")
    return "; ".join(said)
