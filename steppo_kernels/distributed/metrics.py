"""The metrics of a batch from those of its parts on several ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..backends.untraced import untraced
from ..outputs import (
    NUM_POLICY_METRICS,
    NUM_VALUE_METRICS,
    POLICY_METRICS,
    ROLLOUT_METRICS,
    VALUE_METRICS,
    Metrics,
    with_divided_losses,
)
from ..ranks import Call, Ranks
from .words import Gradients, bits_of, divisor, listed, numbers_of

_KINDS = (POLICY_METRICS, VALUE_METRICS, ROLLOUT_METRICS)
_WHAT = ("of a policy loss", "of a value loss", "of rollout weights")
# There is room for the longest kind; a rank without metrics does not know which kind it is.
_ROOM = max(NUM_POLICY_METRICS, NUM_VALUE_METRICS)
_NONE = -1


@untraced
def merge_metrics(
    metrics: Metrics | Iterable[Metrics], *, gradients: Gradients = "mean", group: Any = None
) -> Metrics:
    """Return the metrics of a whole batch from those of its micro-batches on all ranks.

    `Metrics.merge` says what is merged how, and when that is what one call on the whole batch
    gives. All ranks call it. It speaks to the other ranks once, in a gather of 168 bytes a rank,
    for which the host waits.

    Args:
        metrics: those of this rank, or a list with those of its micro-batches; of a policy loss, a
            value loss or rollout weights, the same on all ranks. A rank without any gives an empty
            list.
        gradients: what becomes of the gradients of the ranks. With ``"mean"`` the normalizer was
            divided by the number of ranks (`batch_reduction`), so that losses that add up
            (`Metrics.adds_up`) are divided by it too.
        group: a ProcessGroup or a DeviceMesh of one dimension; None is all ranks. Ranks that hold
            the same tokens (of tensor or context parallelism) are not to be in it together.

    Returns:
        `Metrics`, the same bits on all ranks, where the first metrics of this rank lie (on the CPU
        on a rank without any).

    Raises:
        ValueError, TypeError: naming the argument; or ranks got different arguments; or none has
            metrics.
        RuntimeError: another rank raised an error, or there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels.distributed import batch_reduction, merge_metrics
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> masks, old = torch.tensor([[[0, 1, 1]], [[1, 0, 1]]]), torch.zeros(1, 3)
        >>> parts = [StepLayout.from_mask(mask) for mask in masks]
        >>> _, whole = batch_reduction(parts, "step_mean")
        >>> found = [
        ...     steppo_loss(old, old, torch.ones(part.num_steps), part, normalizer=whole).metrics
        ...     for part in parts
        ... ]
        >>> merged = merge_metrics(found).as_dict()
        >>> round(merged["policy_loss"], 6), merged["num_steps"]
        (-1.0, 3.0)
        >>> dist.destroy_process_group()
    """
    ranks = Ranks.of("group", group)
    with Call("merge_metrics", "group", ranks) as call:
        shares = divisor(gradients, ranks)
        given = listed("metrics", metrics, Metrics)
        own, device = (_NONE, 0, 0, *(0,) * _ROOM), torch.device("cpu")
        if given:
            # One is merged too, which checks it.
            merged = Metrics.merge(given)
            device = merged.values.device
            values = merged.values.tolist()
            bits = bits_of([*values, *(0.0,) * (_ROOM - len(values))])
            own = (_KINDS.index(merged.names), int(merged.adds_up), len(values), *bits)
        said = call.agree({"gradients": gradients}, own)
        parts = [_metrics(one) for one in said if one[0] != _NONE]
        if not parts:
            raise ValueError(
                "metrics: got none on any rank of group, expected Metrics on at least one"
            )
        _check_kinds([one[:2] for one in said])
    whole = with_divided_losses(Metrics.merge(parts), shares)
    return whole.to(device)


def _metrics(word: tuple[int, ...]) -> Metrics:
    kind, adds_up, length, *bits = word
    values = torch.tensor(numbers_of(bits[:length]), dtype=torch.float64, device="cpu")
    return Metrics(values, _KINDS[kind], bool(adds_up))


def _check_kinds(kinds: list[tuple[int, ...]]) -> None:
    """Check that all ranks with metrics have those of one kind; all ranks see the same."""
    holders: dict[tuple[int, ...], list[str]] = {}
    for rank, kind in enumerate(kinds):
        if kind[0] != _NONE:
            holders.setdefault(kind, []).append(str(rank))
    if len(holders) > 1:
        each = ", ".join(
            f"{_WHAT[kind]} {'that add up' if adds_up else 'with denominators of their own'} on "
            f"rank{'s' * (len(found) > 1)} {', '.join(found)}"
            for (kind, adds_up), found in holders.items()
        )
        raise ValueError(f"metrics: got metrics {each} of group, expected the same kind on all")
