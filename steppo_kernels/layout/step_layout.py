"""StepLayout: which tokens form which step, and which steps form which trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError
from typing import Any, NoReturn, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.data._utils.collate import default_collate_fn_map

from .. import checks
from ..backends.choice import Backend
from ..backends.reference.reductions import reduction_weights
from ..backends.untraced import untraced
from ..config import REDUCTIONS, Reduction, one_of
from ..devices import device_of
from ..inference import outside_inference_mode
from ..pickling import state_of
from . import build, regroup
from .loaded import checked_tensors
from .step_tensors import StepTensors


class _Shown:
    """A tensor of a layout, as a caller sees it: a copy, made when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layout: None, owner: type) -> _Shown: ...
    @overload
    def __get__(self, layout: StepLayout, owner: type) -> Tensor: ...
    def __get__(self, layout: StepLayout | None, owner: type) -> _Shown | Tensor:
        return self if layout is None else layout._show(self.name)

    def __set__(self, layout: StepLayout, value: object) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {self.name!r}")


class StepLayout:
    r"""The steps of a batch. Built once by one of the constructors below, never changed.

    N tokens (flat positions are row-major), M action tokens, S steps, G trajectories, R rows. All
    tensors lie on the device of the constructor's input, and share no memory with it. The tensors
    below are copies of those that the kernels read. A layout one of whose copies was written to
    raises in the next call that it is given to.

    Layouts can be pickled, copied and saved. ``torch.load`` reads them with its default
    ``weights_only=True``, and what is loaded is checked entry by entry.

    Attributes:
        step_ids: int32 of the token shape ``[B, T]`` or ``[N]``: step of each token, -1 where no
            action token.
        token_index: int64 ``[M]``: flat positions of the action tokens, step by step. Those of a
            step are in time order: they ascend within a row, but not over the rows of a step.
        step_offsets: int64 ``[S + 1]``: step s owns
            ``token_index[step_offsets[s]:step_offsets[s + 1]]``.
        step_lengths: int32 ``[S]``; 0 is allowed.
        trajectory_steps: int64 ``[K]``: steps of the trajectories, each in time order.
        trajectory_offsets: int64 ``[G + 1]``: trajectory g owns
            ``trajectory_steps[trajectory_offsets[g]:trajectory_offsets[g + 1]]``.
        trajectory_counts: int32 ``[S]``: number of non-empty steps in the step's trajectory.
        state_index: int64 ``[S]``: flat position whose value is that of the state before the
            step's first token.
        step_rows: int64 ``[S]``: row (of ``[B, T]``, or of `cu_seqlens`) of the step's first token;
            of an empty step, its own row. Numbers per row become numbers per step by
            ``x[layout.step_rows]``.
        row_offsets: int64 ``[R + 1]``: flat positions where rows begin; rewards that fall outside
            of actions stay in their row.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]))
        >>> layout
        StepLayout(shape=(2, 5), num_steps=3, num_tokens=5, num_trajectories=2, device='cpu')
        >>> layout.step_ids.tolist()
        [[-1, 0, 0, -1, 1], [2, 2, -1, -1, -1]]
        >>> torch.tensor([0.5, -0.5])[layout.step_rows].tolist()
        [0.5, 0.5, -0.5]
    """

    _held: StepTensors
    # The copies that were handed out, and the number of writes to each when it was made.
    _copies: dict[str, tuple[Tensor, int]]

    step_ids = _Shown()
    token_index = _Shown()
    step_offsets = _Shown()
    step_lengths = _Shown()
    trajectory_steps = _Shown()
    trajectory_offsets = _Shown()
    trajectory_counts = _Shown()
    state_index = _Shown()
    step_rows = _Shown()
    row_offsets = _Shown()

    def __init__(self, *args: Any, **fields: Any) -> None:
        raise TypeError(
            "StepLayout: got a call, expected one of its constructors: StepLayout.from_mask, "
            "from_step_ids, from_rows or from_markers"
        )

    @property
    def shape(self) -> torch.Size:
        """The token shape, ``[B, T]`` or ``[N]``."""
        return self._held.shape

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self._held.device

    @property
    def num_steps(self) -> int:
        """S, empty steps included."""
        return self._held.num_steps

    @property
    def num_tokens(self) -> int:
        """M, the number of action tokens."""
        return self._held.num_tokens

    @property
    def num_trajectories(self) -> int:
        """G."""
        return self._held.num_trajectories

    @classmethod
    @untraced
    @outside_inference_mode
    def from_mask(
        cls,
        mask: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        boundaries: Tensor | None = None,
        steps_per_row: Tensor | Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> StepLayout:
        """Make every run of ones in a row a step and every row a trajectory.

        Args:
            mask: bool, or int or float of 0/1, ``[B, T]`` or packed ``[N]``.
            cu_seqlens: int ``[R + 1]``, where the rows of a packed input, ``[N]`` or ``[1, N]``,
                begin; without it a 1-D input is one row. A run never crosses a row.
            boundaries: bool (or 0/1) of the shape of `mask`: marks tokens that open a new step
                inside a run.
            steps_per_row: int ``[R]``, how many steps each row has, as an environment counts them:
                then it is an error if adjacent steps made one run. It makes no other difference.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> packed = torch.tensor([1, 1, 0, 1, 1, 1])
            >>> StepLayout.from_mask(packed, cu_seqlens=torch.tensor([0, 4, 6])).step_ids.tolist()
            [0, 0, -1, 1, 2, 2]
        """
        return layout_of(build.from_mask(mask, cu_seqlens, boundaries, steps_per_row, backend))

    @classmethod
    @untraced
    @outside_inference_mode
    def from_step_ids(
        cls, step_ids: Tensor, *, cu_seqlens: Tensor | None = None, backend: Backend = "auto"
    ) -> StepLayout:
        """Build from the step (turn) id of each token.

        Ids number steps within a row, so equal ids in two rows are two steps; they must not
        decrease along a row, gaps between them close up, and the tokens of one step need not be
        contiguous.

        Args:
            step_ids: int ``[B, T]`` or packed ``[N]``; -1 where no action token.
            cu_seqlens: as in `from_mask`.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument; also for an id that decreases.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> StepLayout.from_step_ids(torch.tensor([[-1, 4, -1, 4, 7]])).step_ids.tolist()
            [[-1, 0, -1, 0, 1]]
        """
        return layout_of(build.from_step_ids(step_ids, cu_seqlens, backend))

    @classmethod
    @untraced
    @outside_inference_mode
    def from_rows(
        cls,
        mask: Tensor,
        trajectory_ids: Tensor | Sequence[Any],
        step_indices: Tensor | Sequence[int],
        *,
        valid: Tensor | None = None,
        backend: Backend = "auto",
    ) -> StepLayout:
        """Make each row one step: the layout of the StepPO authors' code and of most trainers.

        S is the number of rows, in row order. A valid row whose mask is all zero keeps its place
        in time. Trajectories are numbered by their first valid row.

        Args:
            mask: bool, or int or float of 0/1, ``[S, T]``.
            trajectory_ids: ``[S]``, any integers or strings: a tensor, an array or a sequence.
            step_indices: int ``[S]``, the order of the steps in their trajectory; gaps close up.
            valid: bool (or 0/1) ``[S]``; a False row is padding: it belongs to no trajectory and
                has length 0.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument; also for a duplicate step.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> layout = StepLayout.from_rows(torch.ones(3, 2), ["b", "a", "b"], [1, 0, 0])
            >>> layout.trajectory_steps.tolist(), layout.trajectory_offsets.tolist()
            ([2, 0, 1], [0, 2, 3])
        """
        return layout_of(build.from_rows(mask, trajectory_ids, step_indices, valid, backend))

    @classmethod
    @untraced
    @outside_inference_mode
    def from_markers(
        cls,
        token_ids: Tensor,
        start: Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor],
        end: int | Tensor | Sequence[int],
        *,
        stop: Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor] | None = None,
        valid: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        backend: Backend = "auto",
    ) -> StepLayout:
        r"""Find the actions by the tokens around them, as a chat template writes them.

        An action starts after each occurrence of a `start` sequence and ends with the first
        following `end` token, inclusive, or before the first following `stop` sequence. An
        unfinished last action runs to the end of the row. In detail:

        - Where several `start` sequences begin at one token, the longest counts: give the marker
          with and without what the template adds to it (an empty think block), or with the
          newline merged into the token behind.
        - While an action is open, an occurrence of `start` is part of it. A token that completes a
          `start` is no `end`.
        - A `stop` sequence wins over all else where it begins: an action before it is over, and one
          that would begin there has no token. It is then no step.
        - Tokens where `valid` is False are read as if they were not there: they are part of no
          action and of no sequence, at the end, at the start or inside of a row.

        Args:
            token_ids: int ``[B, T]`` or packed ``[N]``.
            start: token ids of one sequence, e.g. of ``<|im_start|>assistant\n``, or several such
                sequences. Lists, tuples, arrays or 1-D tensors; a lone id is a sequence of one.
            end: the token id that ends an action, e.g. of ``<|im_end|>``, or several of which each
                does.
            stop: one sequence or several, as `start`, e.g. ``<|im_start|>``: an action that was cut
                off then does not swallow the next turn.
            valid: bool (or 0/1) of the shape of `token_ids`: False at padding (an attention mask).
            cu_seqlens: as in `from_mask`; a match never crosses a row.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> user, assistant, end = 1, 2, 3
            >>> ids = torch.tensor([[user, 7, end, assistant, 8, user, 7, end, assistant, 9, end]])
            >>> layout = StepLayout.from_markers(ids, [assistant], end, stop=[[user], [assistant]])
            >>> layout.step_ids.tolist()
            [[-1, -1, -1, -1, 0, -1, -1, -1, -1, 1, 1]]
        """
        return layout_of(
            build.from_markers(token_ids, start, end, stop, valid, cu_seqlens, backend)
        )

    @untraced
    @outside_inference_mode
    def per_token(self) -> StepLayout:
        """Return the same batch with every action token a step of its own (token-level PPO).

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> StepLayout.from_mask(torch.tensor([[0, 1, 1]])).per_token().step_ids.tolist()
            [[-1, 0, 1]]
        """
        return layout_of(regroup.per_token(require_layout(self)))

    @untraced
    @outside_inference_mode
    def per_trajectory(self) -> StepLayout:
        """Return the same batch with every trajectory one step (sequence-level GSPO).

        The state of a trajectory is that of its first step. A trajectory without steps becomes
        an empty step that belongs to no trajectory.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> StepLayout.from_mask(torch.tensor([[1, 0, 1]])).per_trajectory().step_ids.tolist()
            [[0, -1, 0]]
        """
        return layout_of(regroup.per_trajectory(require_layout(self)))

    @untraced
    @outside_inference_mode
    def keep(self, mask: Tensor) -> StepLayout:
        """Return the layout without the tokens where `mask` is False.

        Steps keep their number, their place in time and the rewards on their former tokens, also
        those of which no token is left. Rejected or unscored tokens go this way, and rows that a
        trainer masks.

        Args:
            mask: bool (or 0/1) of the token shape. It may be anything where no action token is.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]))
            >>> layout.keep(torch.tensor([[True, True, True, False]])).step_lengths.tolist()
            [2, 0]
        """
        held = require_layout(self)
        flags = checks.flags("mask", mask, None, held.device)
        return layout_of(
            regroup.keep(held, checks.as_many("mask", flags, held.shape).view(held.shape))
        )

    @untraced
    @outside_inference_mode
    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> StepLayout:
        """Return the layout on `device`; itself, if it lies there.

        Args:
            device: where to. A dtype is refused: no other one suits the numbers of a layout.
            non_blocking: as in ``torch.Tensor.to``.

        Raises:
            TypeError, ValueError: naming the argument.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> layout = StepLayout.from_mask(torch.ones(1, 2))
            >>> layout.to("cpu", non_blocking=True) is layout
            True
        """
        where = device_of(device)
        checks.switch("non_blocking", non_blocking)
        held = require_layout(self)
        moved = held.to(where, non_blocking)
        return self if moved.step_ids is held.step_ids else layout_of(moved)

    @outside_inference_mode
    def reduction_weights(self, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """Return what a reduction multiplies and divides by: w_s ``[S]`` and the normalizer, fp64.

        Both are of the whole batch, for losses of its parts (micro-batches, data-parallel ranks).
        Given their `normalizer`, and with ``"trajectory_mean"`` their share of the weights as
        `step_weights`, the gradients of the parts add up to that of the whole. If no trajectory is
        split over parts, the parts' normalizers also add up to the whole batch's, except for
        ``"sum"``, whose normalizer is always 1.

        Args:
            reduction: as in `StepPOConfig`.

        Raises:
            ValueError: it is none of them.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]))
            >>> weights, total = layout.reduction_weights("token_mean")
            >>> weights.tolist(), total.item()
            ([2.0, 1.0], 3.0)
        """
        one_of("reduction", reduction, REDUCTIONS)
        held = require_layout(self)
        weights, total = reduction_weights(
            held.step_lengths, held.trajectory_counts, reduction, torch.float64
        )
        # A part without steps adds nothing.
        is_part = held.num_tokens > 0 or reduction == "sum"
        return weights, total if is_part else torch.zeros_like(total)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the tensors that it holds, by name.

        Beside the attributes there may be `reward_index` and `reward_offsets`: which positions'
        rewards the steps take, where no rule says so.

        Example:
            >>> import torch
            >>> from steppo_kernels import StepLayout
            >>> sorted(StepLayout.from_mask(torch.ones(1, 2)).tensors())[:3]
            ['row_offsets', 'state_index', 'step_ids']
        """
        return {name: self._show(name) for name in self._held.by_name()}

    @outside_inference_mode
    def _show(self, name: str) -> Tensor:
        """Return the caller's copy of a tensor; in compiled code one of its own."""
        if is_compiling():
            own: Tensor = getattr(self._held, name).clone()
            return own
        if name not in self._copies:
            copy: Tensor = getattr(self._held, name).clone()
            # Two threads both get the copy that the first one made.
            self._copies.setdefault(name, (copy, copy._version))
        return self._copies[name][0]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __getstate__(self) -> dict[str, Tensor]:
        held = self._held.by_name()
        return state_of(lambda: {name: value.clone() for name, value in held.items()})

    @outside_inference_mode
    def __setstate__(self, state: Mapping[str, object]) -> None:
        _fill(self, checked_tensors(state))

    def __repr__(self) -> str:
        return (
            f"StepLayout(shape={tuple(self.shape)}, num_steps={self.num_steps}, "
            f"num_tokens={self.num_tokens}, num_trajectories={self.num_trajectories}, "
            f"device={str(self.device)!r})"
        )


def require_layout(value: object) -> StepTensors:
    """Return the tensors of a `StepLayout` that is as it was built."""
    if not isinstance(value, StepLayout):
        raise TypeError(f"layout: got {type(value).__name__}, expected a StepLayout")
    # Compiled code sees no number of writes; the tensors that it reads are not those of a caller.
    if not is_compiling():
        held = value.__dict__.get("_held")
        if not isinstance(held, StepTensors):
            raise TypeError("layout: got a StepLayout that no constructor made, expected one's")
        for name, (copy, version) in tuple(value._copies.items()):
            if copy._version != version:
                raise ValueError(
                    f"layout: got a StepLayout whose {name} was written to, expected one that is "
                    "as it was built"
                )
        return held
    # What a layout keeps would be constants of a graph.
    return StepTensors(*value._held)


def layout_of(held: StepTensors) -> StepLayout:
    """Return the layout that holds these tensors."""
    layout = object.__new__(StepLayout)
    _fill(layout, held)
    return layout


def _fill(layout: StepLayout, held: StepTensors) -> None:
    object.__setattr__(layout, "_held", held)
    object.__setattr__(layout, "_copies", {})


def _refuse_to_collate(batch: list[StepLayout], **options: Any) -> NoReturn:
    raise TypeError(
        f"default_collate: got {len(batch)} StepLayouts, expected what one is built from: a layout "
        "tells of a whole batch; collate masks or ids, and build the layout of what comes out"
    )


torch.serialization.add_safe_globals([StepLayout])
default_collate_fn_map[StepLayout] = _refuse_to_collate
