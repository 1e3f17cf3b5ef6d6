"""The code that the package is compared with, each as its project calls it on a CPU.

Where a project masks tokens by leaving them out, it is given the action tokens alone; where it
takes whole rows with a mask, whole rows. What cannot be imported is left out; `make bench` installs
all of it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cases import CONFIG, HeadCase

_NAMES = {
    "trl": "trl.trainer.utils",
    "liger-kernel": "liger_kernel.chunked_loss.grpo_loss",
    "cut-cross-entropy": "cut_cross_entropy",
}


@functools.cache
def project(name: str) -> Any | None:
    """Return the module of a peer that is used, or None where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(_NAMES[name])
    except ImportError:
        return None


def versions() -> dict[str, str | None]:
    """Return the version of each peer, None without it."""
    return {name: metadata.version(name) if project(name) else None for name in _NAMES}


def trl_selective(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return log-probs by `selective_log_softmax`, which takes a sequence at a time."""
    found: Tensor = project("trl").selective_log_softmax(logits, token_ids)  # type: ignore[union-attr]
    return found


def trl_chunked(case: HeadCase) -> Tensor:
    """Return log-probs of the action tokens by the function of TRL's fused head."""
    utils: Any = project("trl")
    hidden, ids = rows_of(case)
    return _first(
        utils._ChunkedLogProbFunction.apply(
            hidden, case.weight, None, ids, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
    )


def liger_grpo(
    case: HeadCase, chunk_rows: int, *, compiled: bool, actions_only: bool = False
) -> Tensor:
    """Return the sequence-level loss of the fused linear GRPO loss, a step a row.

    It has no way to leave tokens out. `actions_only` packs the action tokens into rows of their
    own, which its trainers do not: steps of one length make that possible here.
    """
    steps, shape = case.steps, case.shape
    hidden, ids, mask = case.hidden, steps.token_ids, steps.mask.float()
    old = steps.old_log_probs
    if actions_only:
        packed = (shape.rows, shape.actions)
        hidden, flat = rows_of(case)
        hidden, ids = hidden.view(*packed, -1), flat.view(packed)
        mask, old = torch.ones(packed), old.view(-1)[steps.index].view(packed)
    loss = project("liger-kernel").LigerFusedLinearGRPOLoss(  # type: ignore[union-attr]
        beta=0.0,
        compiled=compiled,
        use_ref_model=False,
        chunk_size=chunk_rows,
        epsilon_low=CONFIG.clip_low,
        epsilon_high=CONFIG.clip_high,
        loss_type="grpo",
        importance_sampling_level="sequence",
    )
    return _first(loss(hidden, case.weight, ids, mask, steps.advantages, old_per_token_logps=old))


def liger_scaled(case: HeadCase) -> Tensor:
    """Return log-probs of the action tokens by the fused linear scaled cross entropy."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    found: Tensor = module.LigerFusedLinearScaledCrossEntropyFunction.apply(
        rows_of(case)[0], case.weight, rows_of(case)[1]
    )
    return -found


def cut_cross_entropy(case: HeadCase, implementation: str = "torch_compile") -> Tensor:
    """Return log-probs of all tokens, 0 where masked; the default implementation runs on CPUs."""
    ids = case.steps.token_ids.masked_fill(~case.steps.mask, -100)
    found: Tensor = project("cut-cross-entropy").linear_cross_entropy(  # type: ignore[union-attr]
        case.hidden, case.weight, ids, impl=implementation, reduction="none"
    )
    return -found


def torch_linear_cross_entropy(case: HeadCase, chunk_rows: int | None) -> Tensor:
    """Return log-probs of the action tokens by torch's own function, in chunks or not."""
    hidden, ids = rows_of(case)
    options = None
    if chunk_rows is not None:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
    return -functional.linear_cross_entropy(
        hidden, case.weight, ids, reduction="none", options=options
    )


def is_there(name: str) -> bool:
    """Whether a project that a variant needs can be used; torch has to be new enough."""
    if name.startswith("torch"):
        return hasattr(functional, "linear_cross_entropy")
    return project(name) is not None


def rows_of(case: HeadCase) -> tuple[Tensor, Tensor]:
    """Return hidden states and ids of the action tokens."""
    index = case.steps.index
    return case.hidden.flatten(0, -2)[index], case.steps.token_ids.view(-1)[index]


def _first(outputs: Any) -> Tensor:
    found: Tensor = outputs[0]
    return found
