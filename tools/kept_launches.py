"""What is launched for kept sets: everything that can be asked, of rows of any size."""

from __future__ import annotations

import itertools

import torch

from steppo_kernels.backends import operators
from steppo_kernels.backends.records import MOST_ROW_BYTES
from steppo_kernels.log_probs.kept_sets import PART, KeptSets

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Ids that each token keeps, for sets that are short in the mean and for others.
_LENGTHS = (2, 200)


def kept_sets(num_tokens: int, length: int) -> KeptSets:
    """Return sets that are all alike; with more than `PART` tokens each id is long."""
    ids = torch.arange(length, dtype=torch.int32).repeat(num_tokens)
    offsets = length * torch.arange(num_tokens + 1)
    return KeptSets(ids, offsets, length - 1, has_empty=False)


def log_probs(dtype: torch.dtype, length: int, *, entropy: bool, softcap: bool) -> None:
    """Launch the kernels that read logits of kept sets: with an entropy also temperatures."""
    held = kept_sets(3, length)
    logits = torch.zeros(held.num_pairs, dtype=dtype)
    rows, row = torch.arange(3), torch.zeros(3, dtype=dtype)
    temperatures = row.double() if entropy else None
    call = rows, rows, held.sets, temperatures, 1.0, 30.0 if softcap else 0.0
    if_entropy = row if entropy else None
    operators.launcher("triton", "kept_log_probs")(logits, *call, entropy)
    operators.launcher("triton", "kept_log_probs_backward")(
        logits, logits, *call, row.double(), row.double(), if_entropy, row, if_entropy
    )


def products(dtype: torch.dtype, size: int, *, full: bool) -> None:
    """Launch the products of the head: with a bias, and with gradients of any ids, or without."""
    held = kept_sets(PART + 1, 2)
    wide = torch.promote_types(dtype, torch.float32)
    rows, pairs = torch.arange(held.num_tokens), torch.zeros(held.num_pairs, dtype=wide)
    hidden, weight = torch.zeros((held.num_tokens, size), dtype=dtype), torch.zeros(2, size + 16)
    kept_rows = weight.to(dtype)[:, :size]
    bias = weight[:, 0].to(dtype) if full else None
    run = operators.launcher
    run("triton", "kept_logits")(pairs, hidden, kept_rows, bias, rows, held.sets, ())
    if size * hidden.element_size() <= MOST_ROW_BYTES:
        directions = hidden.to(wide)
        scales = (rows.double(), 1.0, 30.0) if full else (None, 1.0, 0.0)
        run("triton", "kept_directions")(
            pairs, directions, hidden, kept_rows, bias, rows, rows, held.sets, *scales
        )
        run("triton", "scale_directions")(hidden, directions, pairs, rows)
    grad_hidden = hidden if full else hidden.to(wide)
    run("triton", "kept_hidden_gradient")(grad_hidden, pairs, kept_rows, rows, held.sets)
    grad_bias = pairs if full else None
    run("triton", "kept_weight_gradient")(hidden, grad_bias, pairs, hidden, held.by_id, not full)


def everything(size: int, *, whole: bool = True) -> None:
    """Launch every kernel of kept sets: with all that can be asked or, if not, with each pair."""
    for dtype, full in itertools.product(_DTYPES, (False, True)):
        products(dtype, size, full=full)
    axes = (torch.float32, torch.float64), _LENGTHS, (False, True), (False, True)
    for at in itertools.product(*(range(2) for _ in axes)):
        if whole or sum(at[:3]) % 2 == at[3]:
            dtype, length, entropy, softcap = (axis[i] for axis, i in zip(axes, at, strict=True))
            log_probs(dtype, length, entropy=entropy, softcap=softcap)
