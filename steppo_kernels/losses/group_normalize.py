"""Numbers relative to those of their group: the advantages of GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, csr
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.untraced import traced
from ..layout import integers
from ..layout.step_layout import StepLayout, require_layout


@traced
def group_normalize(
    values: Tensor,
    groups: Tensor | Sequence[Any],
    *,
    layout: StepLayout | None = None,
    std: bool = True,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return what is above or below the mean of a group, in standard deviations of that group.

    .. math:: A_i = \frac{x_i - \mathrm{mean}_{j \in g(i)} x_j}{\mathrm{std}_{j \in g(i)} x_j + eps}

    These are the advantages of GRPO (arXiv 2402.03300), a group being the trajectories of one
    prompt, or of GiGPO (arXiv 2505.10978), one being the steps from one state. The standard
    deviation is the unbiased one, as TRL and verl have it. Sums are in fp64 and in the order of
    `values`.

    Args:
        values: ``[n]``, a number of each trajectory, or of each step. No gradient.
        groups: the group of each entry of `values`: ``[n]``, any integers or strings, as a tensor,
            an array or a sequence. An entry with a negative integer belongs to no group.
        layout: with it, `values` are per step ``[S]`` and `groups` per trajectory ``[G]``, and each
            step counts once. Without it a step brings its own group: that of its row is
            ``groups[layout.step_rows]``, and trajectories that count once each are normalized
            before they are spread over their steps.
        std: False leaves the difference undivided (Dr. GRPO, arXiv 2503.20783).
        eps: above 0; verl's, by default. TRL's is 1e-4.
        backend: implementation of the sums.

    Returns:
        fp32 (fp64 if `values` is) ``[n]``; 0 in a group of one, in which verl leaves the number
        itself, and 0 for an entry of no group or a step of no trajectory.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, group_normalize, step_returns
        >>> scores = torch.tensor([1.0, 3.0, 5.0, 5.0])
        >>> group_normalize(scores, torch.tensor([7, 7, 4, 4])).tolist()
        [-0.7071062922477722, 0.7071062922477722, 0.0, 0.0]
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 0, 1], [1, 1, 1]]))
        >>> returns = step_returns(torch.tensor([0.0, 1.0, 2.0]), layout, gamma=1.0)
        >>> group_normalize(returns, torch.tensor([0, 0]), layout=layout, std=False)
        tensor([-0.3333, -0.3333,  0.6667])
    """
    checks.switch("std", std)
    eps = checks.positive_number("eps", eps)
    values = checks.constant(checks.floating("values", values))
    dtype, device = checks.compute_dtype(values), values.device
    if layout is None:
        checks.dims("values", values, (1,))
        ids = _ids(groups, len(values), "value", device)
    else:
        steps = require_layout(layout)
        device = steps.device
        values = checks.vector("values", values, steps.num_steps, "step", device, dtype)
        ids = _ids(groups, steps.num_trajectories, "trajectory", device)
        of_steps = csr.owners(steps.trajectory_steps, steps.trajectory_offsets, steps.num_steps)
        # The id behind the last one is that of a step of no trajectory.
        ids = torch.cat((ids, ids.new_full((1,), -1)))[of_steps]
    chosen = resolve(backend, device)
    is_member = ids >= 0
    numbers = torch.where(is_member, values, 0.0).to(torch.float64)
    own = _Groups.of(torch.where(is_member, ids, -1))
    centered = numbers - own.mean(numbers, 0, chosen)
    if std:
        centered = centered / (own.mean(centered.square(), 1, chosen).sqrt() + eps)
    return torch.where(is_member, centered, 0.0).to(dtype)


class _Groups(NamedTuple):
    """Which entries of a vector ``[n]`` belong together, found without a wait for the device.

    There are room and offsets for n groups; those behind the last one are empty.

    Attributes:
        order: int64 ``[n]``: the entries, group by group and in their order.
        offsets: int64 ``[n + 1]``: where the groups begin in it.
        places: int64 ``[n]``: the group of each entry.
    """

    order: Tensor
    offsets: Tensor
    places: Tensor

    @staticmethod
    def of(ids: Tensor) -> _Groups:
        """Return the groups of entries with equal ids."""
        ordered, order = torch.sort(ids, stable=True)
        numbers = torch.zeros_like(ordered)
        numbers[1:] = ordered.diff() != 0
        numbers = numbers.cumsum(0)
        every = torch.arange(len(ids) + 1, device=ids.device)
        return _Groups(order, torch.searchsorted(numbers, every), numbers[order.argsort()])

    def mean(self, values: Tensor, less: int, backend: str) -> Tensor:
        """Return for each entry the sum over its group, divided by its size less `less`."""
        sums = operators.call("sum_over_steps", backend, values, self.order, self.offsets)
        counts = (self.offsets.diff() - less).clamp_min(1)
        means: Tensor = (sums / counts)[self.places]
        return means


def _ids(groups: Tensor | Sequence[Any], length: int, what: str, device: torch.device) -> Tensor:
    """Return the groups as integers, int64 ``[length]`` on the device; `what` has one each."""
    if isinstance(groups, Tensor):
        ids = checks.integer("groups", groups, device).to(torch.int64)
    else:
        ids = torch.tensor(_numbered(groups), dtype=torch.int64, device="cpu").to(device)
    if ids.shape != (length,):
        raise ValueError(
            f"groups: got shape {tuple(ids.shape)}, expected ({length},), one entry per {what}"
        )
    return ids


def _numbered(groups: Sequence[Any]) -> list[int]:
    """Return integers and strings as numbers in the order of first appearance; negative is -1."""
    seen: dict[object, int] = {}
    found = []
    for entry in integers.sequence("groups", groups, "integers or strings"):
        key = entry if isinstance(entry, str) else integers.index("groups", entry, "or strings")
        is_none = isinstance(key, int) and key < 0
        found.append(-1 if is_none else seen.setdefault(key, len(seen)))
    return found
