"""StepLayout: which tokens form which step, and which steps form which trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend, resolve
from ..backends.reference.reductions import reduction_weights
from ..config import REDUCTIONS, Reduction, one_of
from . import csr, segment
from .rows import in_time_order, row_offsets, uniform_offsets


@dataclass(frozen=True, eq=False)
class StepLayout:
    """The steps of a batch, in the forms that the kernels read. Built once, never changed.

    N tokens (flat positions are row-major), M action tokens, S steps, G trajectories, R rows.
    All tensors lie on the device of the constructor's input.

    Attributes:
        step_ids: int32 of the token shape ``[B, T]`` or ``[N]``: step of each token, -1 where no
            action token.
        token_index: int64 ``[M]``: flat positions of the action tokens, step by step.
        step_offsets: int64 ``[S + 1]``: step s owns
            ``token_index[step_offsets[s]:step_offsets[s + 1]]``.
        step_lengths: int32 ``[S]``; 0 is allowed.
        trajectory_steps: int64 ``[K]``: steps of the trajectories, each in time order.
        trajectory_offsets: int64 ``[G + 1]``: trajectory g owns
            ``trajectory_steps[trajectory_offsets[g]:trajectory_offsets[g + 1]]``.
        trajectory_counts: int32 ``[S]``: number of non-empty steps in the step's trajectory.
        state_index: int64 ``[S]``: flat position whose value is that of the state before the
            step's first token.
        row_offsets: int64 ``[R + 1]``: flat positions where rows begin; rewards that fall outside
            of actions stay in their row.
        has_empty_rows: whether rows are steps (`from_rows`) and one of a trajectory is empty: its
            rewards then are no action token's.
        reward_rows, reward_offsets, reward_homes: int64 ``[E]``, ``[H + 1]``, ``[H]``, or None; of
            `per_token` and `per_trajectory` of such a layout: the empty rows, and the flat
            positions of the action tokens that take their rewards, ``reward_homes[h]`` those of
            ``reward_rows[reward_offsets[h]:reward_offsets[h + 1]]``: the last token before them in
            their trajectory, else its first.
    """

    step_ids: Tensor
    token_index: Tensor
    step_offsets: Tensor
    step_lengths: Tensor
    trajectory_steps: Tensor
    trajectory_offsets: Tensor
    trajectory_counts: Tensor
    state_index: Tensor
    row_offsets: Tensor
    has_empty_rows: bool = False
    reward_rows: Tensor | None = None
    reward_offsets: Tensor | None = None
    reward_homes: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The token shape, ``[B, T]`` or ``[N]``."""
        return self.step_ids.shape

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.step_ids.device

    @property
    def num_steps(self) -> int:
        """S, empty steps included."""
        return self.step_lengths.shape[0]

    @property
    def num_tokens(self) -> int:
        """M, the number of action tokens."""
        return self.token_index.shape[0]

    @property
    def num_trajectories(self) -> int:
        """G."""
        return self.trajectory_offsets.shape[0] - 1

    def reduction_weights(self, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """Return what a reduction multiplies and divides by: w_s ``[S]`` and the normalizer, fp64.

        Of the whole batch, for losses of its parts (micro-batches, data-parallel ranks): given
        their `normalizer`, and with ``"trajectory_mean"`` their share of the weights as
        `step_weights`, the gradients of the parts add up to that of the whole. Normalizers of
        parts add up too, but for ``"sum"`` (1), if no trajectory is in two of them.

        Args:
            reduction: as in `StepPOConfig`.

        Raises:
            ValueError: it is none of them.
        """
        one_of("reduction", reduction, REDUCTIONS)
        weights, total = reduction_weights(
            self.step_lengths, self.trajectory_counts, reduction, torch.float64
        )
        # A part without steps adds nothing.
        is_part = self.num_tokens > 0 or reduction == "sum"
        return weights, total if is_part else torch.zeros_like(total)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it holds, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> StepLayout:
        """Return the layout with every tensor on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def __repr__(self) -> str:
        return (
            f"StepLayout(shape={tuple(self.shape)}, num_steps={self.num_steps}, "
            f"num_tokens={self.num_tokens}, num_trajectories={self.num_trajectories}, "
            f"device={str(self.device)!r})"
        )

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        boundaries: Tensor | None = None,
        backend: Backend = "auto",
    ) -> StepLayout:
        """Make every run of ones in a row a step and every row a trajectory.

        Args:
            mask: bool, or int or float of 0/1, ``[B, T]`` or packed ``[N]``.
            cu_seqlens: int ``[R + 1]``, where the rows of a packed input, ``[N]`` or ``[1, N]``,
                begin; without it a 1-D input is one row. A run never crosses a row.
            boundaries: bool (or 0/1) of the shape of `mask`: marks tokens that open a new step
                inside a run.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        flags = checks.flags("mask", mask, (1, 2))
        rows = row_offsets("mask", flags, cu_seqlens)
        if boundaries is not None:
            boundaries = checks.flags("boundaries", boundaries, (1, 2), flags.device)
            boundaries = checks.same_shape("boundaries", boundaries, flags.shape)
            boundaries = boundaries.reshape(-1).contiguous()
        chosen = resolve(backend, flags.device)
        found = segment.segment_mask(flags.reshape(-1).contiguous(), boundaries, rows, chosen)
        return cls._from_segments(found, rows, flags.shape, chosen)

    @classmethod
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
        """
        ids = checks.dims("step_ids", checks.integer("step_ids", step_ids), (1, 2))
        rows = row_offsets("step_ids", ids, cu_seqlens)
        if ids.numel() and int(ids.min()) < -1:
            raise ValueError(f"step_ids: got {int(ids.min())}, expected ids >= 0, or -1 for none")
        chosen = resolve(backend, ids.device)
        flat = ids.reshape(-1).to(torch.int64).contiguous()
        found = segment.segment_ids(flat, rows, chosen)
        return cls._from_segments(found, rows, ids.shape, chosen)

    @classmethod
    def from_rows(
        cls,
        mask: Tensor,
        trajectory_ids: Tensor | Sequence[int] | Sequence[str],
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
            trajectory_ids: ``[S]``, any integers or strings.
            step_indices: int ``[S]``, the order of the steps in their trajectory; gaps close up.
            valid: bool (or 0/1) ``[S]``; a False row is padding: it belongs to no trajectory and
                has length 0.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument; also for a duplicate step.
        """
        flags = checks.flags("mask", mask, (2,))
        num_rows, row_length = flags.shape
        device = flags.device
        if valid is not None:
            valid = checks.flags("valid", valid, (1,), device)
            valid = checks.same_shape("valid", valid, torch.Size((num_rows,))).contiguous()
        chosen = resolve(backend, device)
        found = segment.segment_rows(flags.contiguous(), valid, chosen)
        every = torch.arange(num_rows, device="cpu")
        keep = every if valid is None else valid.cpu().nonzero().squeeze(1)
        steps, offsets = in_time_order(trajectory_ids, step_indices, keep, num_rows)
        starts = torch.arange(num_rows, device=device) * row_length
        layout = cls._assemble(
            found,
            flags.shape,
            chosen,
            num_steps=num_rows,
            num_tokens=int(found.counts[0]),
            row_offsets=uniform_offsets(num_rows, row_length, device),
            trajectory_steps=steps.to(device),
            trajectory_offsets=offsets.to(device),
            state_index=starts,
        )
        is_empty = layout.step_lengths[layout.trajectory_steps] == 0
        return replace(layout, has_empty_rows=bool(is_empty.any()))

    @classmethod
    def from_markers(
        cls,
        token_ids: Tensor,
        start: Tensor | Sequence[int],
        end: int,
        *,
        cu_seqlens: Tensor | None = None,
        backend: Backend = "auto",
    ) -> StepLayout:
        r"""Find the actions by the tokens around them, as a chat template writes them.

        An action starts after each occurrence of `start` and ends with the first following `end`,
        inclusive; an unfinished last action runs to the end of the row. While an action is open,
        occurrences of `start` are part of it.

        Args:
            token_ids: int ``[B, T]`` or packed ``[N]``.
            start: int ``[K]``, e.g. the tokens of ``<|im_start|>assistant\n``.
            end: e.g. the token of ``<|im_end|>``.
            cu_seqlens: as in `from_mask`; a match never crosses a row.
            backend: implementation of the segmentation.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        ids = checks.dims("token_ids", checks.integer("token_ids", token_ids), (1, 2))
        rows = row_offsets("token_ids", ids, cu_seqlens)
        marker = checks.dims("start", checks.integers("start", start), (1,)).to(ids.device)
        if marker.numel() == 0:
            raise ValueError("start: got an empty sequence, expected at least one token id")
        if isinstance(end, bool) or not isinstance(end, int):
            raise TypeError(f"end: got {type(end).__name__}, expected one token id (int)")
        if not -(2**63) <= end < 2**63:
            raise ValueError(f"end: got {end}, expected a token id (int64)")
        chosen = resolve(backend, ids.device)
        mask = segment.mark_actions(
            ids.reshape(-1).to(torch.int64).contiguous(),
            rows,
            marker.to(torch.int64).contiguous(),
            end,
            chosen,
        )
        found = segment.segment_mask(mask, None, rows, chosen)
        return cls._from_segments(found, rows, ids.shape, chosen)

    def per_token(self) -> StepLayout:
        """Return the same batch with every action token a step of its own (token-level PPO)."""
        device = self.device
        num_tokens = self.num_tokens
        ranks = torch.arange(num_tokens, device=device)
        step_ids = torch.full_like(self.step_ids, -1)
        step_ids.view(-1)[self.token_index] = ranks.to(torch.int32)
        lengths = self.step_lengths.to(torch.int64)[self.trajectory_steps]
        steps = csr.ranges(self.step_offsets[self.trajectory_steps], lengths)
        offsets = csr.prefix(lengths)[self.trajectory_offsets]
        ones = torch.ones(num_tokens, dtype=torch.int32, device=device)
        return StepLayout(
            step_ids=step_ids,
            token_index=self.token_index,
            step_offsets=torch.arange(num_tokens + 1, device=device),
            step_lengths=ones,
            trajectory_steps=steps,
            trajectory_offsets=offsets,
            trajectory_counts=csr.count_nonempty(ones, steps, offsets, num_tokens),
            state_index=self.token_index,
            row_offsets=self.row_offsets,
            **self._reward_homes(),
        )

    def per_trajectory(self) -> StepLayout:
        """Return the same batch with every trajectory one step (sequence-level GSPO).

        The state of a trajectory is that of its first step. A trajectory without steps becomes
        an empty step that belongs to no trajectory.
        """
        device = self.device
        steps, groups = self.trajectory_steps, self.num_trajectories
        lengths = self.step_lengths.to(torch.int64)[steps]
        offsets = csr.prefix(lengths)[self.trajectory_offsets]
        owner = torch.repeat_interleave(
            torch.arange(groups, device=device, dtype=torch.int32), offsets.diff()
        )
        index = self.token_index[csr.ranges(self.step_offsets[steps], lengths)]
        step_ids = torch.full_like(self.step_ids, -1)
        step_ids.view(-1)[index] = owner
        state_index = torch.zeros(groups, dtype=torch.int64, device=device)
        has_steps = self.trajectory_offsets.diff() > 0
        kept = has_steps.nonzero().squeeze(1)
        state_index[kept] = self.state_index[steps[self.trajectory_offsets[:-1][kept]]]
        step_lengths = offsets.diff().to(torch.int32)
        return StepLayout(
            step_ids=step_ids,
            token_index=index,
            step_offsets=offsets,
            step_lengths=step_lengths,
            trajectory_steps=kept,
            trajectory_offsets=csr.prefix(has_steps.to(torch.int64)),
            trajectory_counts=(step_lengths > 0).to(torch.int32),
            state_index=state_index,
            row_offsets=self.row_offsets,
            **self._reward_homes(),
        )

    def _reward_homes(self) -> dict[str, Any]:
        """Return where rewards of empty rows go once rows are no steps any more."""
        if not self.has_empty_rows or self.num_tokens == 0:
            kept = self.tensors()
            return {name: kept[name] for name in kept if name.startswith("reward_")}
        rows, offsets = self.trajectory_steps, self.trajectory_offsets
        filled = self.step_lengths[rows] > 0
        before, after = csr.nearest(filled, offsets)
        last = self.token_index[(self.step_offsets[rows[before] + 1] - 1).clamp_min(0)]
        first = self.token_index[self.step_offsets[rows[after]].clamp_max(self.num_tokens - 1)]
        found = ~filled & (filled[before] | filled[after])
        # In the order of time, the rows of a token follow each other.
        homes, counts = torch.unique_consecutive(
            torch.where(filled[before], last, first)[found], return_counts=True
        )
        return {
            "reward_rows": rows[found],
            "reward_offsets": csr.prefix(counts),
            "reward_homes": homes,
        }

    @classmethod
    def _from_segments(
        cls, found: segment.Segments, rows: Tensor, shape: torch.Size, backend: str
    ) -> StepLayout:
        """Finish a layout whose trajectories are its rows."""
        # One copy to the host for both sizes and the error.
        num_tokens, decreasing, num_steps = torch.cat((found.counts, found.row_steps[-1:])).tolist()
        if decreasing >= 0:
            raise ValueError(
                f"step_ids: got an id at flat position {decreasing} smaller than one before it in "
                "its row, expected ids that do not decrease along a row"
            )
        return cls._assemble(
            found,
            shape,
            backend,
            num_steps=num_steps,
            num_tokens=num_tokens,
            row_offsets=rows,
            trajectory_steps=torch.arange(num_steps, device=rows.device),
            trajectory_offsets=found.row_steps,
            state_index=None,
        )

    @classmethod
    def _assemble(
        cls,
        found: segment.Segments,
        shape: torch.Size,
        backend: str,
        *,
        num_steps: int,
        num_tokens: int,
        row_offsets: Tensor,
        trajectory_steps: Tensor,
        trajectory_offsets: Tensor,
        state_index: Tensor | None,
    ) -> StepLayout:
        index, offsets, lengths = segment.compact(found.step_ids, num_steps, num_tokens, backend)
        return cls(
            step_ids=found.step_ids.view(shape),
            token_index=index,
            step_offsets=offsets,
            step_lengths=lengths,
            trajectory_steps=trajectory_steps,
            trajectory_offsets=trajectory_offsets,
            trajectory_counts=csr.count_nonempty(
                lengths, trajectory_steps, trajectory_offsets, num_steps
            ),
            # Without empty steps, the first token of a step is where its state is valued.
            state_index=index[offsets[:-1]] if state_index is None else state_index,
            row_offsets=row_offsets,
        )


def require_layout(value: object) -> StepLayout:
    """Return `value` if it is a `StepLayout`."""
    if not isinstance(value, StepLayout):
        raise TypeError(f"layout: got {type(value).__name__}, expected a StepLayout")
    return value
