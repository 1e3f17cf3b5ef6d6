"""The center of the centered ratio where a batch lies on several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.reference.policy_loss import clip_tokens
from ..backends.untraced import untraced
from ..config import DEFAULT_CONFIG, StepPOConfig
from ..layout.step_layout import StepLayout, require_layout
from ..layout.step_tensors import StepTensors
from ..ranks import Call, Ranks
from .words import as_many, bits_of, listed, numbers_of, value_of


@untraced
def ratio_center(
    log_probs: Tensor | Iterable[Tensor],
    old_log_probs: Tensor | Iterable[Tensor],
    layouts: StepLayout | Iterable[StepLayout],
    *,
    config: StepPOConfig = DEFAULT_CONFIG,
    advantages: Tensor | Iterable[Tensor] | None = None,
    group: Any = None,
) -> Tensor:
    """Return the mean log-ratio of all action tokens of all ranks.

    It is the `ratio_center` that the ratio ``"centered"`` of `steppo_loss` takes for the parts of a
    batch. With `token_clip`, log-ratios are clamped first, as those of the loss are: on the side
    that the advantage of the token says. All ranks call it, with all their micro-batches at once.
    It speaks to the other ranks once, in a gather of 168 bytes a rank, for which the host waits.

    Args:
        log_probs: log-probs of the taken tokens under the current policy, of the token shape, or a
            list with those of each micro-batch (an empty one of a rank without any). No gradient.
            Masked tokens may hold anything.
        old_log_probs: those of the policy that acted, likewise.
        layouts: the steps, likewise.
        config: that of the loss, of which `token_clip` is read; the same on all ranks.
        advantages: those of the loss, ``[S]`` or of the token shape, likewise. With `token_clip`
            they are needed.
        group: a ProcessGroup or a DeviceMesh of one dimension; None is all ranks.

    Returns:
        0-dim fp64 on the CPU, the same bits on all ranks: log-ratios are summed in fp64, and the
        sums of the ranks in their order. It is 0 if no rank has an action token.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: another rank raised an error, or there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels.distributed import ratio_center
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]))
        >>> new, old = torch.tensor([[0.25, 0.5, 9.0, 0.75]]), torch.zeros(1, 4)
        >>> ratio_center(new, old, layout)
        tensor(0.5000, dtype=torch.float64)
        >>> dist.destroy_process_group()
    """
    ranks = Ranks.of("group", group)
    with Call("ratio_center", "group", ranks) as call:
        held = [require_layout(layout) for layout in listed("layouts", layouts, StepLayout)]
        every = [listed(n, x, Tensor) for n, x in _named(log_probs, old_log_probs)]
        for name, values in zip(_NAMES, every, strict=True):
            as_many(name, values, len(held))
        if not isinstance(config, StepPOConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a StepPOConfig")
        signs: Sequence[Tensor | None] = [None] * len(held)
        if advantages is not None:
            signs = listed("advantages", advantages, Tensor)
            as_many("advantages", signs, len(held))
        elif config.token_clip is not None:
            raise ValueError(
                "advantages: got None, expected a tensor or a list of it, as config.token_clip is "
                "not None"
            )
        count, total = 0, 0.0
        for steps, new, old, sign in zip(held, *every, signs, strict=True):
            ratios = _log_ratios(steps, new, old, config.token_clip, sign)
            total += float(ratios.to(torch.float64).sum())
            count += steps.num_tokens
        facts = {"config.token_clip": value_of(config.token_clip)}
        said = call.agree(facts, (count, *bits_of([total])))
    tokens = sum(one for one, _ in said)
    sums = [numbers_of([bits])[0] for _, bits in said]
    return torch.tensor(sum(sums) / max(tokens, 1), dtype=torch.float64, device="cpu")


def _log_ratios(
    steps: StepTensors,
    new: Tensor,
    old: Tensor,
    token_clip: tuple[float, float] | None,
    advantages: Tensor | None,
) -> Tensor:
    """Return the log-ratios ``[M]`` that the loss pools, in its dtype."""
    shape, device, index = steps.shape, steps.device, steps.token_index
    values = []
    for name, value in _named(new, old):
        checked = checks.token_count(name, value, shape, device)
        # Selected before it is looked at: masked tokens may hold anything.
        values.append(checks.constant(checked).reshape(-1)[index])
    dtype = checks.compute_dtype(values[0])
    ratios = values[0].to(dtype) - values[1].to(dtype)
    if advantages is None:
        return ratios
    checked, by_token = checks.steps_or_tokens(
        "advantages", advantages, steps.num_steps, shape, device, dtype
    )
    if token_clip is None:
        return ratios
    place = index if by_token else steps.step_ids.reshape(-1)[index].to(torch.int64)
    signs = checks.constant(checked).reshape(-1)[place]
    return clip_tokens(ratios, signs, token_clip)[0]


_NAMES = ("log_probs", "old_log_probs")


def _named(new: Any, old: Any) -> zip[tuple[str, Any]]:
    return zip(_NAMES, (new, old), strict=True)
