"""The code of other projects that a GPU runs, each as its project calls it there.

What stands in `benchmarks/vocabulary/peers.py` is called as it is. Whatever a project raises when
it is imported or called, it is left out with that reason.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..variants import Variant
from ..vocabulary.cases import CONFIG, Steps

_MODULES = {
    "liger-kernel": "liger_kernel.transformers.grpo_loss",
    "trl": "trl.trainer.utils",
    "cut-cross-entropy": "cut_cross_entropy",
    "quack-kernels": "quack.cross_entropy",
}


Made = TypeVar("Made")


@functools.cache
def _imported(project: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(_MODULES[project])
    except Exception as error:
        return error


def why_not(variant: Variant) -> str | None:
    """Return why the project of a variant cannot be used here, or None if it can."""
    if variant.project is None:
        return None
    if variant.project == "torch":
        is_there = hasattr(functional, "linear_cross_entropy")
        return None if is_there else f"torch {torch.__version__} does not have it"
    found = _imported(variant.project)
    if not isinstance(found, Exception):
        return None
    if isinstance(found, ModuleNotFoundError):
        return f"not installed: {found.name}"
    return f"cannot be imported: {type(found).__name__}: {found}"


def that_are_there(calls: dict[Variant, Made]) -> tuple[dict[Variant, Made], dict[Variant, str]]:
    """Return the variants whose projects can be used, and why the others cannot."""
    reasons = {variant: why_not(variant) for variant in calls}
    return (
        {variant: calls[variant] for variant, why in reasons.items() if why is None},
        {variant: why for variant, why in reasons.items() if why is not None},
    )


def versions() -> dict[str, str]:
    """Return the versions of the projects that are installed."""
    found = {}
    for project in _MODULES:
        try:
            found[project] = metadata.version(project)
        except metadata.PackageNotFoundError:
            continue
    return found


def quack_log_probs(logits: Tensor, token_ids: Tensor, *, in_place: bool) -> Tensor:
    """Return log-probs by quack's cross entropy of rows."""
    module = _imported("quack-kernels")
    found: Tensor = module.cross_entropy(
        logits, token_ids, reduction="none", inplace_backward=in_place
    )
    return -found


def liger_selective(whole: Tensor, token_ids: Tensor) -> Tensor:
    """Return log-probs of ``[B, L + 1, V]`` logits at ``[B, L]`` tokens, without gradients."""
    module = _imported("liger-kernel")
    found: Tensor = module.fused_selective_log_softmax(whole, token_ids, temperature=1.0)
    return found


def liger_loss(whole: Tensor, steps: Steps) -> Tensor:
    """Return the sequence-level loss of ``[B, L + 1, V]`` logits, a step a row, by Triton kernels.

    Backward puts the gradient in the place of the logits.
    """
    module = _imported("liger-kernel")
    loss, _ = module.triton_grpo_loss(
        whole,
        steps.old_log_probs,
        None,
        steps.token_ids,
        steps.advantages,
        completion_mask=steps.mask.to(torch.int64),
        temperature=1.0,
        beta=0.0,
        eps_low=CONFIG.clip_low,
        eps_high=CONFIG.clip_high,
        inplace=True,
        loss_type="grpo",
        importance_sampling_level="sequence",
        reduce=True,
    )
    found: Tensor = loss
    return found
