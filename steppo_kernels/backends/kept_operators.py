"""The operators of kept sets: schema and fake of each, as in `operators.py`.

Token n keeps the ids ``sets.ids[sets.offsets[n] : sets.offsets[n + 1]]``. Each of them is a *pair*
of a token and an id; what a call has for each pair are vectors ``[P]``. `rows` are the tokens that
a call is about.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import operator

_ROWS = "Tensor rows, Tensor[] sets"
_SCALES = "Tensor? temperatures, float temperature, float softcap"


@operator(
    "kept_log_probs",
    f"(Tensor logits, Tensor places, {_ROWS}, {_SCALES}, bool need_entropy, str backend) "
    "-> (Tensor log_probs, Tensor entropy, Tensor top, Tensor log_sum)",
)
def kept_log_probs(
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: list[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
    backend: str,
) -> Any:
    """Fake: what `token_log_probs` finds in the logits ``[P]`` (fp32 or fp64) of some tokens' sets.

    `rows` (int64 ``[n]``) are those tokens; `places` (int64 ``[n]``) say where in its set each has
    its own id, -1 for nowhere, and `temperatures` are fp64 ``[n]``. The outputs are ``[n]``, as
    those of `token_log_probs` are. A token whose id is nowhere has the log-prob 0, and the other
    numbers are those of its set; of an empty set, `top` and `log_sum` are -inf, the entropy is 0.
    """
    count = rows.shape[0]
    wide = logits.new_empty((count,), dtype=torch.float64)
    return (
        logits.new_empty((count,)),
        logits.new_empty((count if need_entropy else 0,)),
        wide,
        torch.empty_like(wide),
    )


@operator(
    "kept_log_probs",
    f"(Tensor(a!) grad_logits, Tensor logits, Tensor places, {_ROWS}, {_SCALES}, Tensor top, "
    "Tensor log_sum, Tensor? entropy, Tensor grad_log_probs, Tensor? grad_entropy, str backend) "
    "-> ()",
)
def kept_log_probs_backward(
    grad_logits: Tensor,
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: list[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    backend: str,
) -> Any:
    """Fake: write the gradient of the logits of the pairs of `rows` into `grad_logits` ``[P]``.

    It may be `logits` itself. Everything else is ``[n]``, and as `token_log_probs_backward` has it:
    pairs of a token without a gradient get 0, and their logits are not read. Where a token's id is
    nowhere, its gradient is that of the others. Pairs of other tokens are left as they are.
    """


@operator(
    "kept_head",
    f"(Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor? bias, {_ROWS}, Tensor[] by_id, "
    "str backend) -> ()",
)
def kept_logits(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    sets: list[Tensor],
    by_id: list[Tensor],
    backend: str,
) -> Any:
    """Fake: write ``hidden[n] @ weight[v] + bias[v]`` for the pairs (n, v) of `rows`.

    `hidden` ``[N, d]`` is contiguous, `weight` ``[V, d]`` may have any stride between its rows, and
    both have one dtype. `logits` ``[P]`` are fp64 for fp64, else fp32: sums are not rounded. Pairs
    of other tokens are written with anything, or not.
    With `by_id`, an `IdIndex` that is not empty, a CPU takes all pairs in the order of their ids,
    and reads each row of the weight once; other backends do not look at it.
    """


@operator(
    "kept_head",
    "(Tensor(a!) logits, Tensor(b!) directions, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor places, {_ROWS}, {_SCALES}, str backend) -> ()",
)
def kept_directions(
    logits: Tensor,
    directions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    rows: Tensor,
    sets: list[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
) -> Any:
    """Fake: write the logits of `kept_logits`, to the bit, and what they are about to be used for.

    `directions` (``[n, d]``, in the dtype of the logits) are the gradients of the log-probs of
    `kept_log_probs` by the hidden states of `rows`. Each row of the weight is read from memory
    once. Rows have at most `MOST_ROW_BYTES` of `records.py`.
    It is an operator of GPUs: on a CPU the second read is one of a cache.
    """


@operator(
    "kept_head_gradients",
    "(Tensor(a!) grad_hidden, Tensor directions, Tensor grad_log_probs, Tensor rows, "
    "str backend) -> ()",
)
def scale_directions(
    grad_hidden: Tensor,
    directions: Tensor,
    grad_log_probs: Tensor,
    rows: Tensor,
    backend: str,
) -> Any:
    """Fake: write ``grad_log_probs[i] * directions[i]`` into row ``rows[i]`` of `grad_hidden`.

    It is rounded once; where the gradient is 0 it is 0, whatever the direction is. Other rows of
    `grad_hidden` ``[N, d]`` are left as they are. It is an operator of GPUs.
    """


@operator(
    "kept_head_gradients",
    f"(Tensor(a!) grad_hidden, Tensor grad_logits, Tensor weight, {_ROWS}, str backend) -> ()",
)
def kept_hidden_gradient(
    grad_hidden: Tensor,
    grad_logits: Tensor,
    weight: Tensor,
    rows: Tensor,
    sets: list[Tensor],
    backend: str,
) -> Any:
    """Fake: write the sum of ``grad_logits[p] * weight[v]`` over the pairs p of each of `rows`.

    It goes to the token's row of `grad_hidden` ``[N, d]``, which has the dtype of `weight` or, of a
    half precision, fp32; other rows are left as they are. Sums are formed in fp32 or fp64, over ids
    in their order, and rounded once. Rows of the weight whose gradient is 0 are not read.
    """


@operator(
    "kept_head_gradients",
    "(Tensor(a!) grad_weight, Tensor(b!)? grad_bias, Tensor grad_logits, Tensor hidden, "
    "Tensor[] by_id, bool compact, str backend) -> ()",
)
def kept_weight_gradient(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    grad_logits: Tensor,
    hidden: Tensor,
    by_id: list[Tensor],
    compact: bool,
    backend: str,
) -> Any:
    """Fake: write the sums of ``grad_logits[p] * hidden[n]`` over the pairs p of each kept id.

    They go to the id's row of `grad_weight` ``[V, d]``, whose other rows are 0, or with `compact`
    to row u of ``[U, d]`` for the u-th of the ids; `grad_bias` (fp32 or fp64, ``[V]`` or ``[U]``)
    gets the sums of ``grad_logits[p]``. `grad_weight` has the dtype of `hidden`.
    Sums are formed in fp32 or fp64, over tokens in their order, those of each part of the `IdIndex`
    first, and rounded once. Hidden states whose gradient is 0 are not read.
    """
