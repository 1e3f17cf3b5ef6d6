"""Log-probs and entropies of tokens from their logits."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .. import checks
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.derivatives import first_only
from ..backends.reference import token_log_probs as reference
from .overwrite import Part, whole_of
from .saved import save, saved


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return log softmax(logits / temperature) at the given tokens, and the entropy if asked for.

    One pass over the logits forward, with sums in fp32 (fp64 for fp64 logits) whatever their dtype,
    and one backward; nothing of the size of the logits is allocated but their gradient.

    Args:
        logits: ``[..., V]``; position i predicts ``token_ids[i]``. fp32, fp64, fp16 or bf16. Slices
            such as ``logits[:, :-1]`` are read as they are.
        token_ids: int ``[...]``, below V where `mask` is True. Ids, mask and temperatures may also
            be flat, or have dimensions of size 1 more or less; of flat logits, the ids have the
            token shape. On a GPU, where no call waits to look, an id out of range gives NaN.
        temperature: above 0; a number, or one for each token, ``[...]``.
        return_entropy: also return the entropies, differentiable as the log-probs are.
        mask: bool or 0/1 ``[...]``; where it is False, logits are not read (and may hold anything),
            the result is 0 and so is the gradient.
        inplace_backward: let backward overwrite `logits` with their gradient, so that no second
            tensor of that size exists. Where `logits` are a slice, such as
            ``logits[:, :-1]`` of what a model returned, all of the sliced tensor is overwritten,
            and the gradient goes to it. Nothing else may need the logits after that. A second
            backward raises. The reference
            backend has no use for it.
        backend: implementation.

    Returns:
        fp32 (fp64 for fp64 logits) of the shape of `token_ids`; with `return_entropy` a pair.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: in backward, where an input was changed in place since the forward pass, for a
            second backward after one in place, and for second derivatives.

    Example:
        >>> import torch
        >>> from steppo_kernels import token_log_probs
        >>> logits = torch.zeros(1, 3, 4, requires_grad=True)
        >>> ids = torch.tensor([[0, 3, 2]])
        >>> log_probs, entropy = token_log_probs(logits, ids, return_entropy=True)
        >>> log_probs.tolist() == (-entropy).tolist()
        True
        >>> log_probs.sum().backward()
        >>> logits.grad[0, 0]
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    checks.switch("return_entropy", return_entropy)
    checks.switch("inplace_backward", inplace_backward)
    logits = rows_of("logits", logits)
    shape, device = checks.token_shape(token_ids, logits.shape[:-1]), logits.device
    if mask is not None:
        mask = checks.row_mask("mask", mask, shape, device)
    targets = Targets.of(token_ids, mask, temperature, shape, device)
    log_probs, entropy = log_probs_of(
        logits, targets, temperature, return_entropy, inplace_backward, resolve(backend, device)
    )
    log_probs = log_probs.view(token_ids.shape)
    return (log_probs, entropy.view(token_ids.shape)) if return_entropy else log_probs


class Targets(NamedTuple):
    """What to take from N rows of logits.

    Attributes:
        token_ids: int64 ``[N]``.
        mask: bool ``[N]``, the rows that count; None is all.
        temperatures: fp64 ``[N]``, or None: then `temperature` is that of all rows.
        softcap: logits are capped to +- this before; 0 is off.
    """

    token_ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    softcap: float

    @classmethod
    def of(
        cls,
        token_ids: Tensor,
        mask: Tensor | None,
        temperature: float | Tensor,
        shape: torch.Size,
        device: torch.device,
    ) -> Targets:
        """Return the checked arguments of a call on logits of N tokens; `mask` is checked."""
        ids = checks.token_ids("token_ids", token_ids, shape, device)
        every, number = checks.temperature("temperature", temperature, shape, device, mask)
        return cls(ids, mask, every, number, 0.0)


def rows_of(name: str, values: Tensor) -> Tensor:
    """Return ``[..., V]`` values, checked."""
    values = checks.floating(name, values, saved=False)
    if values.dim() < 1 or values.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected [..., V] with V > 0")
    return values


def log_probs_of(
    logits: Tensor,
    targets: Targets,
    temperature: float | Tensor,
    need_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of checked arguments; no entropies are ``[0]``.

    `temperature` is the caller's, which may not change before backward.
    """
    if backend == "reference":
        every = torch.arange(targets.token_ids.numel(), device=logits.device)
        tokens = every if targets.mask is None else targets.mask.nonzero().squeeze(1)
        temperatures = targets.temperatures
        log_probs, entropy = reference.token_log_probs(
            logits.reshape(-1, logits.shape[-1]),
            targets.token_ids,
            tokens,
            targets.temperature if temperatures is None else temperatures,
            targets.softcap,
            checks.compute_dtype(logits),
        )
        return log_probs, entropy if need_entropy else entropy[:0]
    rows = _three_dims(logits)
    if inplace_backward and not _overwritable(rows, logits):
        raise ValueError(
            f"inplace_backward: got logits of shape {tuple(logits.shape)} with strides "
            f"{logits.stride()}, expected logits whose rows do not overlap and whose leading "
            "dimensions merge into at most two strides; pass a contiguous tensor or a slice such "
            "as `logits[:, :-1]`"
        )
    if checks.wants_gradient(logits):
        whole, part = whole_of(logits) if inplace_backward else (logits, None)
        found: tuple[Tensor, Tensor] = _TokenLogProbs.apply(
            whole,
            None if part is None else logits,
            targets,
            temperature if isinstance(temperature, Tensor) else None,
            need_entropy,
            part,
            inplace_backward,
            backend,
        )
        return found
    log_probs, entropy, *_ = operators.call(
        "token_log_probs", backend, rows, *targets, need_entropy
    )
    return log_probs, entropy


def _three_dims(logits: Tensor) -> Tensor:
    """Return logits as ``[B, T, V]`` with a contiguous last dimension, a view where one exists."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    while logits.dim() < 3:
        logits = logits.unsqueeze(0)
    return logits if logits.dim() == 3 else logits.flatten(0, -3)


def _overwritable(rows: Tensor, logits: Tensor) -> bool:
    """Whether rows ``[B, T, V]`` of logits are a view of them, and no two share memory."""
    (b, t, v), (stride_b, stride_t, _) = rows.shape, rows.stride()
    by_b = (t == 1 or stride_t >= v) and (b == 1 or stride_b >= (t - 1) * stride_t + v)
    by_t = (b == 1 or stride_b >= v) and (t == 1 or stride_t >= (b - 1) * stride_b + v)
    return (by_b or by_t) and _is_viewed(logits)


def _is_viewed(logits: Tensor) -> bool:
    """Whether `_three_dims` returns a view. Compiled code does not compare addresses."""
    leading = zip(logits.shape[:-2], logits.stride()[:-2], strict=True)
    merged = [(size, stride) for size, stride in leading if size != 1]
    return (logits.stride(-1) == 1 or logits.shape[-1] <= 1) and all(
        outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(merged)
    )


class _TokenLogProbs(torch.autograd.Function):
    """Of logits that are a part, both they and the whole are inputs: one of them gets a gradient.

    Where that is the whole, autograd still walks over the views between, with no gradient. A hook
    there is called with None, and not skipped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        whole: Tensor,
        logits: Tensor | None,
        targets: Targets,
        temperature: Tensor | None,
        need_entropy: bool,
        part: Part | None,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        values = (whole if logits is None else logits).detach()
        log_probs, entropy, top, log_sum = operators.call(
            "token_log_probs", backend, _three_dims(values), *targets, need_entropy
        )
        save(
            ctx,
            temperature,
            logits=whole,
            token_ids=targets.token_ids,
            mask=targets.mask,
            temperature=targets.temperatures,
            top=top,
            log_sum=log_sum,
            entropy=entropy,
        )
        ctx.scalars = targets.temperature, targets.softcap
        ctx.part, ctx.inplace, ctx.backend, ctx.is_spent = part, inplace, backend, False
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @first_only("token_log_probs", lambda ctx: ctx.saved_tensors[:1])
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        tensors: Any = saved(ctx, grad, grad_entropy)
        whole, token_ids, mask, temperatures, top, log_sum, entropy = tensors
        whole = whole.detach()
        part: Part | None = ctx.part
        if ctx.inplace and not torch.compiler.is_compiling():
            # Where saved-tensor hooks hand out a copy, autograd has seen no change.
            if ctx.is_spent:
                raise RuntimeError(
                    "inplace_backward: got a second backward, expected one: the logits were "
                    "modified by an inplace operation, as the first put their gradient there"
                )
            ctx.is_spent = True
        logits = whole if part is None else part.of(whole)
        grad_logits = logits if ctx.inplace else whole.new_empty(whole.shape)
        grad = torch.zeros_like(log_sum, dtype=entropy.dtype) if grad is None else grad
        if grad_entropy is not None:
            grad_entropy = grad_entropy.resolve_neg().contiguous()
        operators.call(
            "token_log_probs_backward",
            ctx.backend,
            _three_dims(grad_logits),
            _three_dims(logits),
            token_ids,
            mask,
            temperatures,
            *ctx.scalars,
            top,
            log_sum,
            None if grad_entropy is None else entropy,
            grad.resolve_neg().contiguous(),
            grad_entropy,
            None,
        )
        if ctx.inplace:
            # The kernel wrote behind autograd's back: a second backward must not take it.
            torch.autograd.graph.increment_version(whole)
        others = [None] * 6
        if part is None:
            return grad_logits, None, *others
        if not isinstance(ctx, BackwardCFunction):
            # Compiled autograd calls this with an object of its own, and adds up what goes to the
            # whole: it takes no missing gradient.
            return whole.new_zeros(()).expand(whole.shape), grad_logits, *others
        if not part.is_passed_by(ctx):
            return None, grad_logits, *others
        part.clear_rest(whole)
        return whole, None, *others
