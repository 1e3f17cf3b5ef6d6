"""The native operators: schema and fake of each.

To add an operator: a row here or in `kept_operators.py`, a launcher per backend, and tests.

The reference has two ways. Its layouts, broadcasts and advantages are launchers like those of the
other backends. Its losses and log-probs are called by the public functions themselves, with the
config as it is, and autograd differentiates them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..outputs import NUM_VALUE_METRICS
from . import kept_operators
from .fakes import loss_outputs, scale, segments
from .records import Steps, Timeline
from .registry import call, handles, launcher, operator, runner, stems

__all__ = ["call", "handles", "kept_operators", "launcher", "runner", "stems"]


@operator(
    "segment",
    "(Tensor mask, Tensor? boundaries, Tensor row_offsets, str backend) "
    "-> (Tensor step_ids, Tensor row_steps, Tensor counts)",
)
def segment_mask(mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor, backend: str) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    return segments(mask.numel(), row_offsets)


@operator(
    "segment",
    "(Tensor mask, Tensor? boundaries, Tensor row_offsets, str backend) "
    "-> (Tensor row_steps, Tensor counts)",
)
def count_steps(mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor, backend: str) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    return segments(mask.numel(), row_offsets)[1:]


@operator(
    "segment",
    "(Tensor mask, Tensor? boundaries, Tensor row_offsets, Tensor row_steps, SymInt num_steps, "
    "SymInt num_actions, str backend) -> (Tensor step_ids, Tensor token_index, "
    "Tensor step_offsets, Tensor step_lengths, Tensor step_starts, Tensor trajectory_steps, "
    "Tensor trajectory_counts, Tensor step_rows)",
)
def lay_out_runs(
    mask: Tensor,
    boundaries: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
    num_steps: int,
    num_actions: int,
    backend: str,
) -> Any:
    """Fake: see `steppo_kernels.layout.segment`. `mask` and `step_ids` are of the token shape."""
    step_ids = segments(mask.numel(), row_offsets)[0]
    csr = compact(step_ids, num_steps, num_actions, backend)
    steps, counts, _, rows = row_trajectories(row_steps, csr[0], csr[1], backend)
    return step_ids.view(mask.shape), *csr, steps, counts, rows


@operator(
    "segment",
    "(Tensor ids, Tensor row_offsets, str backend) "
    "-> (Tensor step_ids, Tensor row_steps, Tensor counts)",
)
def segment_ids(ids: Tensor, row_offsets: Tensor, backend: str) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    return segments(ids.numel(), row_offsets)


@operator(
    "segment",
    "(Tensor mask, Tensor? valid, str backend) "
    "-> (Tensor step_ids, Tensor row_steps, Tensor counts)",
)
def segment_rows(mask: Tensor, valid: Tensor | None, backend: str) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    row_offsets = mask.new_empty((mask.shape[0] + 1,), dtype=torch.int64)
    return segments(mask.numel(), row_offsets)


@operator(
    "segment",
    "(Tensor token_ids, Tensor row_offsets, Tensor starts, Tensor start_offsets, Tensor ends, "
    "Tensor stops, Tensor stop_offsets, str backend) -> Tensor",
)
def mark_actions(
    token_ids: Tensor,
    row_offsets: Tensor,
    starts: Tensor,
    start_offsets: Tensor,
    ends: Tensor,
    stops: Tensor,
    stop_offsets: Tensor,
    backend: str,
) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    return token_ids.new_empty(token_ids.shape, dtype=torch.bool)


@operator(
    "segment",
    "(Tensor step_ids, SymInt num_steps, SymInt num_tokens, str backend) "
    "-> (Tensor token_index, Tensor step_offsets, Tensor step_lengths, Tensor step_starts)",
)
def compact(step_ids: Tensor, num_steps: int, num_tokens: int, backend: str) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    return (
        step_ids.new_empty((num_tokens,), dtype=torch.int64),
        step_ids.new_empty((num_steps + 1,), dtype=torch.int64),
        step_ids.new_empty((num_steps,), dtype=torch.int32),
        step_ids.new_empty((num_steps,), dtype=torch.int64),
    )


@operator(
    "segment",
    "(Tensor row_steps, Tensor token_index, Tensor step_offsets, str backend) "
    "-> (Tensor trajectory_steps, Tensor trajectory_counts, Tensor state_index, Tensor step_rows)",
)
def row_trajectories(
    row_steps: Tensor, token_index: Tensor, step_offsets: Tensor, backend: str
) -> Any:
    """Fake: see `steppo_kernels.layout.segment`."""
    num_steps = step_offsets.shape[0] - 1
    return (
        step_offsets.new_empty((num_steps,)),
        step_offsets.new_empty((num_steps,), dtype=torch.int32),
        step_offsets.new_empty((num_steps,)),
        step_offsets.new_empty((num_steps,)),
    )


@operator(
    "broadcast",
    "(Tensor per_step, Tensor step_ids, str backend) -> Tensor",
)
def broadcast_to_tokens(per_step: Tensor, step_ids: Tensor, backend: str) -> Any:
    """Fake: ``[S]`` to ``[N]``, 0 where there is no step."""
    return per_step.new_empty((step_ids.numel(),))


@operator(
    "broadcast",
    "(Tensor per_token, Tensor token_index, Tensor step_offsets, str backend) -> Tensor",
)
def sum_over_steps(
    per_token: Tensor, token_index: Tensor, step_offsets: Tensor, backend: str
) -> Any:
    """Fake: ``[N]`` to ``[S]``, the transpose of `broadcast_to_tokens`."""
    return per_token.new_empty((step_offsets.shape[0] - 1,))


@operator(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? bootstrap_values, Tensor[] timeline, float[] config, "
    "bool rewards_per_token, bool values_per_token, bool along_rows, str backend) "
    "-> (Tensor advantages, Tensor returns)",
)
def step_gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap_values: Tensor | None,
    timeline: list[Tensor],
    config: tuple[float, ...],
    rewards_per_token: bool,
    values_per_token: bool,
    along_rows: bool,
    backend: str,
) -> Any:
    """Fake: see `steppo_kernels.step_gae`. `config` is gamma, lam and whether to whiten.

    `along_rows` is what `StepTensors` says of the layout that the timeline is of.
    """
    num_steps = Timeline(*timeline).state_index.shape[0]
    return values.new_empty((num_steps,)), values.new_empty((num_steps,))


@operator(
    "value_loss",
    "(Tensor values, Tensor returns, Tensor? old_values, Tensor? step_weights, "
    "Tensor? normalizer, Tensor[] states, float[] config, bool values_per_token, "
    "bool returns_per_token, bool old_values_per_token, bool need_grad, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_values, Tensor gradient_scale)",
)
def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    step_weights: Tensor | None,
    normalizer: Tensor | None,
    states: list[Tensor],
    config: tuple[float, ...],
    values_per_token: bool,
    returns_per_token: bool,
    old_values_per_token: bool,
    need_grad: bool,
    backend: str,
) -> Any:
    """Fake: see `steppo_kernels.step_value_loss`. `config` is clip and reduction.

    The gradient is `grad_values` (of the shape of `values`) times `gradient_scale`, if it is given.
    """
    return (
        values.new_empty(()),
        values.new_empty((NUM_VALUE_METRICS,), dtype=torch.float64),
        torch.empty_like(values) if need_grad else values.new_empty((0,)),
        scale(values, backend),
    )


@operator(
    "policy_loss",
    "(Tensor log_probs, Tensor? entropy, Tensor? old_log_probs, Tensor advantages, "
    "Tensor? ref_log_probs, Tensor? is_weights, Tensor? step_weights, Tensor? clip_low, "
    "Tensor? clip_high, Tensor? ratio_center, Tensor? normalizer, Tensor[] steps, float[] config, "
    "bool advantages_per_token, bool is_weights_per_token, bool need_grad, "
    "bool need_entropy_grad, str backend) -> (Tensor loss, Tensor metrics, Tensor step_log_ratio, "
    "Tensor grad_log_probs, Tensor grad_entropy, Tensor gradient_scale)",
)
def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    steps: list[Tensor],
    config: tuple[float, ...],
    advantages_per_token: bool,
    is_weights_per_token: bool,
    need_grad: bool,
    need_entropy_grad: bool,
    backend: str,
) -> Any:
    """Fake: see `steppo_kernels.steppo_loss`. `config` is a `KernelConfig`.

    What is given per token has N entries in the order of `log_probs`, contiguous and of any shape.
    The gradients of the loss are `grad_log_probs` and `grad_entropy` (of the shape of `log_probs`,
    0 at masked tokens) times `gradient_scale` (fp64), if it is given: the normalizer is then known
    last.
    """
    step_log_ratio = log_probs.new_empty((Steps(*steps).step_offsets.shape[0] - 1,))
    loss, metrics, *grads = loss_outputs(log_probs, need_grad, need_entropy_grad, backend)
    return loss, metrics, step_log_ratio, *grads


@operator(
    "policy_loss",
    "(Tensor log_probs, Tensor? entropy, Tensor? old_log_probs, Tensor advantages, "
    "Tensor? ref_log_probs, Tensor? is_weights, Tensor? ratio_center, Tensor? normalizer, "
    "Tensor mask, SymInt row_length, float[] config, bool need_grad, bool need_entropy_grad, "
    "str backend) -> (Tensor loss, Tensor metrics, Tensor grad_log_probs, Tensor grad_entropy, "
    "Tensor gradient_scale)",
)
def policy_loss_masked(
    log_probs: Tensor,
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    mask: Tensor,
    row_length: int,
    config: tuple[float, ...],
    need_grad: bool,
    need_entropy_grad: bool,
    backend: str,
) -> Any:
    """Fake: the fused form. Runs of ones of `mask` (bool ``[N]``) are the steps.

    Everything else is per token, rows are `row_length` long.
    """
    return loss_outputs(log_probs, need_grad, need_entropy_grad, backend)


@operator(
    "scale_gradient",
    "(Tensor(a!) out, Tensor grad, Tensor upstream, Tensor? scale, str backend) -> ()",
)
def scale_gradient(
    out: Tensor, grad: Tensor, upstream: Tensor, scale: Tensor | None, backend: str
) -> Any:
    """Fake: write `grad` times `upstream` (0-dim) and `scale` (fp64, 0-dim; None is 1) into `out`.

    What is 0 stays 0. `out` may be `grad`; it has the dtype of `grad` or, of fp32, a half
    precision. It is the operator of a GPU's launchers: elsewhere torch's products do it.
    """


_HEAD = "Tensor? mask, Tensor? temperatures, float temperature, float softcap"


@operator(
    "token_log_probs",
    f"(Tensor logits, Tensor token_ids, {_HEAD}, bool need_entropy, str backend) "
    "-> (Tensor log_probs, Tensor entropy, Tensor top, Tensor log_sum)",
)
def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
    backend: str,
) -> Any:
    """Fake: see `steppo_kernels.token_log_probs`.

    `logits` ``[B, T, V]`` of any floating dtype may be strided, but for its last dimension;
    `token_ids` (int64), `mask` (bool) and `temperatures` are ``[B * T]``. With z the logits, capped
    (`softcap` 0 is off) and divided by `temperatures` or, without them, by `temperature`, the row
    has the log-prob z_y - log sum e^z and the entropy log sum e^z - sum p z. The outputs are
    ``[B * T]`` in the dtype of the computation (fp64 for fp64 logits, else fp32), 0 where `mask` is
    False, and `entropy` is empty where not needed. `top` (the largest of the capped logits) and
    `log_sum` (the log of the sum of e^(z - z_top)) are fp64 and for backward. Added up to a
    log-sum-exp they would lose the second where logits are huge. An id out of range is an error
    where the backend can raise one, else NaN.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens = token_ids.shape[0]
    return (
        logits.new_empty((tokens,), dtype=dtype),
        logits.new_empty((tokens if need_entropy else 0,), dtype=dtype),
        logits.new_empty((tokens,), dtype=torch.float64),
        logits.new_empty((tokens,), dtype=torch.float64),
    )


@operator(
    "token_log_probs",
    f"(Tensor(a!) grad_logits, Tensor logits, Tensor token_ids, {_HEAD}, Tensor top, "
    "Tensor log_sum, Tensor? entropy, Tensor grad_log_probs, Tensor? grad_entropy, Tensor? rows, "
    "str backend) -> ()",
)
def token_log_probs_backward(
    grad_logits: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    rows: Tensor | None,
    backend: str,
) -> Any:
    """Fake: write the gradient of the logits into `grad_logits`, which may be `logits` itself.

    With c and e the gradients of a row's log-prob and entropy H, p its probabilities and z as
    above, d/dz_v = c [v = y] - p_v (c + e (log p_v + H)); the rules of temperature and
    softcap follow. Rows that are masked, or whose c and e are 0, are zeroed without being read.
    `grad_logits` has the shape of `logits`, strides of its own, and its dtype or, on the CPU and of
    fp32 logits, a half precision; where the two share memory, their rows begin at the same places.
    With `rows` (int64 ``[n]``, n <= B * T), only rows 0 to n - 1 of `grad_logits` are written, row
    j with the gradient of row ``rows[j]``; in shared memory ``rows[j]`` is j or at least n, and no
    two are the same. `entropy` goes with `grad_entropy`.
    """


@operator(
    "live_rows",
    "(Tensor grad_log_probs, Tensor? grad_entropy, bool ascending, str backend) "
    "-> (Tensor order, Tensor count)",
)
def order_live_rows(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, ascending: bool, backend: str
) -> Any:
    """Fake: order all rows, the `count` that have a gradient (one that is not 0) before the others.

    The others ascend, and so do the first with `ascending`. Without, entry j of these is j where
    row j is among them; the rows from `count` on take the places that are left, ascending.
    """
    order = grad_log_probs.new_empty(grad_log_probs.shape, dtype=torch.int64)
    return order, order.new_empty(())


@operator(
    "lm_head",
    "(Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor? bias, str backend) -> ()",
)
def head_logits(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> Any:
    """Fake: write ``hidden @ weight.T + bias`` into `logits`.

    `hidden` ``[n, d]`` and `logits` ``[n, V]`` are contiguous, `weight` ``[V, d]`` may be strided.
    `logits` has the dtype of the others, or is fp32 and theirs a half precision: then products are
    summed in fp32 and not rounded (`logits_dtype` in `log_probs/lm_head.py` says what a backend
    does well).
    """


@operator(
    "lm_head",
    "(Tensor(a!) total, Tensor product, bool is_first, str backend) -> ()",
)
def accumulate(total: Tensor, product: Tensor, is_first: bool, backend: str) -> Any:
    """Fake: add `product` (fp16 or bf16) to `total` (fp32).

    Both are contiguous and of one shape. With `is_first`, `total` is written instead.
    """
