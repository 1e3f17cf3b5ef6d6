"""What a reduction multiplies and divides by where a batch lies on several ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.untraced import untraced
from ..config import REDUCTIONS, Reduction, one_of
from ..layout import integers
from ..layout.step_layout import StepLayout, require_layout
from ..ranks import Call, Ranks
from .words import Gradients, as_many, divisor, listed

_INT64 = torch.iinfo(torch.int64)
_HALF = 2**32


class BatchReduction(NamedTuple):
    """What the losses of the parts of a batch take, from `batch_reduction`.

    Attributes:
        step_weights: the `step_weights` of each layout, fp64 ``[S_i]`` on its device.
        normalizer: the `normalizer` of all of them, 0-dim fp64 on the CPU, the same bits on all
            ranks. Of a batch without any action token it is 0, which losses of such a batch take.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels.distributed import batch_reduction
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]))
        >>> batch_reduction(layout, "token_mean").step_weights
        (tensor([2., 1.], dtype=torch.float64),)
        >>> dist.destroy_process_group()
    """

    step_weights: tuple[Tensor, ...]
    normalizer: Tensor


@untraced
def batch_reduction(
    layouts: StepLayout | Iterable[StepLayout],
    reduction: Reduction,
    *,
    trajectory_ids: Tensor | Sequence[Any] | None = None,
    gradients: Gradients = "mean",
    group: Any = None,
) -> BatchReduction:
    """Return weights and normalizer for the parts of one optimizer step's batch, on all ranks.

    Given to `steppo_loss`, `step_value_loss` and those from logits and from the head, the losses
    of all micro-batches of all ranks have the gradient of one loss of the whole batch. All ranks
    call it, once an optimizer step.

    It speaks to the other ranks once, in a gather of 168 bytes a rank; with ``"trajectory_mean"``
    and `trajectory_ids` once more, in a gather of 24 bytes for each trajectory of the rank that has
    the most of them, and 24 more. The host waits for both.

    Args:
        layouts: those of all micro-batches of this rank; a rank without any gives an empty list.
        reduction: as in `StepPOConfig`.
        trajectory_ids: for each layout the ids of its trajectories, ``[G_i]``, integers or strings
            in the order of the layout (`StepLayout.from_rows` numbers trajectories by their first
            valid row); of one layout that may be the ids themselves. Trajectories with one id are
            parts of one, in whichever layout and on whichever rank they are. None: no trajectory
            is split over layouts. Only ``"trajectory_mean"`` depends on it. Integers within 64 bits
            are told apart exactly; strings are told apart by 64 bits of a hash.
        gradients: what becomes of the gradients of the ranks: ``"mean"`` as in DDP and FSDP, whose
            average the normalizer makes up for, or ``"sum"``. What else divides them (accelerate,
            by its accumulation steps; ranks of a context-parallel group that are averaged over
            too) has to divide the normalizer as well.
        group: a ProcessGroup or a DeviceMesh of one dimension; None is all ranks. Ranks that hold
            the same tokens (of tensor or context parallelism) are not to be in it together.

    Returns:
        `BatchReduction`. With the reduction ``"sum"`` the normalizer is 1 before it is divided.

    Raises:
        ValueError, TypeError: naming the argument; or ranks got different arguments.
        RuntimeError: another rank raised an error, or there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels.distributed import batch_reduction
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mask = torch.ones(3, 4)
        >>> parts = [
        ...     StepLayout.from_rows(mask[:2], ["a", "b"], [0, 0]),
        ...     StepLayout.from_rows(mask[2:], ["a"], [1]),
        ... ]
        >>> ids = [["a", "b"], ["a"]]
        >>> weights, normalizer = batch_reduction(parts, "trajectory_mean", trajectory_ids=ids)
        >>> [part.tolist() for part in weights], normalizer.item()
        ([[0.5, 1.0], [0.5]], 2.0)
        >>> dist.destroy_process_group()
    """
    ranks = Ranks.of("group", group)
    with Call("batch_reduction", "group", ranks) as call:
        one_of("reduction", reduction, REDUCTIONS)
        shares = divisor(gradients, ranks)
        given = listed("layouts", layouts, StepLayout)
        held = [require_layout(layout) for layout in given]
        facts = {
            "reduction": reduction,
            "gradients": gradients,
            "trajectory_ids": "None" if trajectory_ids is None else "given",
        }
        own = [layout.reduction_weights(reduction) for layout in given]
        counts: Counter[int] = Counter()
        ids: list[list[int]] = []
        if trajectory_ids is not None:
            ids = _ids(trajectory_ids, isinstance(layouts, StepLayout), given)
            for one, layout in zip(ids, held, strict=True):
                nonempty = (layout.step_lengths > 0)[layout.trajectory_steps].tolist()
                offsets = layout.trajectory_offsets.tolist()
                for place, key in enumerate(one):
                    counts[key] += sum(nonempty[offsets[place] : offsets[place + 1]])
        total = sum(int(part) for _, part in own)
        weights, device = tuple(weight for weight, _ in own), ranks.words_device()
        said = call.agree(facts, (total, len(counts)))
        if reduction == "sum":
            total = 1
        elif reduction == "trajectory_mean" and trajectory_ids is not None:
            most = max(entries for _, entries in said)
            call.open(most, 3, device)
            counts = _of_all(call, counts, most)
            total = len(counts)
            weights = tuple(
                _weights(layout, [counts[key] for key in one])
                for one, layout in zip(ids, given, strict=True)
            )
        else:
            total = sum(part for part, _ in said)
    # Whole numbers are exact, and so is their sum in any order.
    normalizer = torch.tensor(total / shares, dtype=torch.float64, device="cpu")
    return BatchReduction(weights, normalizer)


def _of_all(call: Call, counts: Counter[int], most: int) -> Counter[int]:
    """Return the sums over the ranks of what is counted for each id: one collective.

    An id travels in two halves, which fp64 holds exactly.
    """
    rows = [(*divmod(key, _HALF), count) for key, count in counts.items()]
    rows += [(0, 0, 0)] * (most - len(rows))
    part = torch.tensor(rows, dtype=torch.float64, device="cpu").view(most, 3)
    found: Counter[int] = Counter()
    for high, low, count in call.gather(part, last=True).reshape(-1, 3).tolist():
        found[int(high) * _HALF + int(low)] += int(count)
    return +found


def _weights(layout: StepLayout, counts: list[int]) -> Tensor:
    """Return one by the number of steps of its trajectory for each step that is not empty."""
    held = require_layout(layout)
    weights = torch.zeros(held.num_steps, dtype=torch.float64, device="cpu")
    lengths = held.trajectory_offsets.diff().cpu()
    of_member = torch.tensor(counts, dtype=torch.float64, device="cpu").repeat_interleave(lengths)
    weights[held.trajectory_steps.cpu()] = 1 / of_member.clamp_min(1)
    return torch.where(held.step_lengths > 0, weights.to(held.device), 0.0)


def _ids(given: object, is_one: bool, layouts: Sequence[StepLayout]) -> list[list[int]]:
    """Return the ids of the trajectories of each layout as integers of 64 bits."""
    if is_one and not _is_nested(given):
        given = [given]
    lists = integers.sequence("trajectory_ids", given, "a list of ids for each layout")
    as_many("trajectory_ids", lists, len(layouts))
    found = []
    for place, (one, layout) in enumerate(zip(lists, layouts, strict=True)):
        name = f"trajectory_ids[{place}]"
        entries = one.tolist() if isinstance(one, Tensor) else one
        keys = [
            _key(name, entry) for entry in integers.sequence(name, entries, "integers or strings")
        ]
        if len(keys) != layout.num_trajectories:
            raise ValueError(
                f"{name}: got {len(keys)} entries, expected {layout.num_trajectories}, one per "
                "trajectory of its layout"
            )
        found.append(keys)
    return found


def _is_nested(ids: object) -> bool:
    """Return whether ids stand in a list of lists, tensors or arrays, as for several layouts."""
    if isinstance(ids, Tensor) or not isinstance(ids, Sequence) or isinstance(ids, str):
        return False
    if len(ids) == 0 or isinstance(ids[0], str):
        return False
    return isinstance(ids[0], Sequence) or getattr(ids[0], "ndim", 0) > 0


def _key(name: str, entry: object) -> int:
    """Return an integer as it is, if it has 64 bits; of others and of strings a hash."""
    if not isinstance(entry, str):
        number = integers.index(name, entry, "or strings")
        if _INT64.min <= number <= _INT64.max:
            return number
        entry = f"integer {number}"
    digest = hashlib.blake2b(entry.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
