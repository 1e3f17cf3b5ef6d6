"""Log-probs and entropies of tokens from their logits."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .. import checks
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.derivatives import first_only, wants_gradient
from ..backends.reference import token_log_probs as reference
from ..backends.saved import save, saved
from ..backends.untraced import traced_without
from . import kept_logits
from .kept_rows import KeptRows, check_support, rows_of
from .overwrite import Part, whole_of
from .several_ids import Several
from .targets import Targets, entropy_shape, one_id, token_shape
from .token_support import TokenSupport


@traced_without("support")
def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    mask: Tensor | None = None,
    support: TokenSupport | None = None,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return log softmax(logits / temperature) at the given tokens, and the entropy if asked for.

    One pass over the logits forward, with sums in fp32 (fp64 for fp64 logits) whatever their dtype,
    and one backward; nothing of the size of the logits is allocated but their gradient.

    Args:
        logits: ``[..., V]``; position i predicts ``token_ids[i]``. fp32, fp64, fp16 or bf16. Slices
            such as ``logits[:, :-1]`` are read as they are.
        token_ids: int ``[...]``, below V where `mask` is True; or ``[..., K]`` for K ids of each
            token, which may come twice: all of them from one pass. Ids, mask and temperatures may
            also be flat, or have dimensions of size 1 more or less; of flat logits, the ids have
            the token shape. On a GPU, where no call waits to look, an id out of range gives NaN.
        temperature: above 0; a number, or one for each token, ``[...]``.
        return_entropy: also return the entropies, differentiable as the log-probs are.
        mask: bool or 0/1 ``[...]``; where it is False, logits are not read (and may hold anything),
            the result is 0 and so is the gradient.
        support: the ids that each token could be sampled from, of the token shape or flat: the
            softmaxes are over these, and logits of other ids are not read. `torch.compile` breaks
            its graph here.
        inplace_backward: let backward overwrite `logits` with their gradient, so that no second
            tensor of that size exists. Where `logits` are a slice, such as
            ``logits[:, :-1]`` of what a model returned, all of the sliced tensor is overwritten,
            and the gradient goes to it. Nothing else may need the logits after that. A second
            backward raises. The reference
            backend has no use for it.
        backend: implementation.

    Returns:
        fp32 (fp64 for fp64 logits) of the shape of `token_ids`; with `return_entropy` a pair. Of K
        ids a token, entropies have the token shape.

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
    logits = logits_of("logits", logits)
    shape, device = token_shape(token_ids, logits.shape[:-1]), logits.device
    if mask is not None:
        mask = checks.row_mask("mask", mask, shape, device)
    targets = Targets.of(token_ids, mask, temperature, shape, device, several=True)
    rows = None
    if support is not None:
        one_id(targets.token_ids, "support")
        checked = check_support(support, shape, device)
        rows = rows_of(checked, targets.token_ids, targets.rows(), logits.shape[-1])
    chosen = resolve(backend, device)
    log_probs, entropy = log_probs_of(
        logits, targets, temperature, return_entropy, inplace_backward, chosen, rows
    )
    of_tokens = entropy_shape(token_ids, logits.shape[:-1])
    log_probs = log_probs.view(token_ids.shape)
    return (log_probs, entropy.view(of_tokens)) if return_entropy else log_probs


def logits_of(name: str, values: Tensor) -> Tensor:
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
    kept: KeptRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of checked arguments; no entropies are ``[0]``.

    Log-probs are ``[N, K]`` where tokens have K ids. `temperature` is the caller's, which may not
    change before backward. With `kept`, softmaxes are over the sets of those rows.
    """
    if backend == "reference":
        tokens = targets.rows()
        temperatures = targets.temperatures
        log_probs, entropy = reference.token_log_probs(
            logits.reshape(-1, logits.shape[-1]),
            targets.token_ids,
            tokens,
            targets.temperature if temperatures is None else temperatures,
            targets.softcap,
            checks.compute_dtype(logits),
            None if kept is None else kept.mask(tokens, 0, logits.shape[-1]),
        )
        if kept is not None:
            log_probs, entropy = kept.marked_all(log_probs, entropy)
        return log_probs, entropy if need_entropy else entropy[:0]
    rows = _three_dims(logits)
    if inplace_backward and not _overwritable(rows, logits):
        raise ValueError(
            f"inplace_backward: got logits of shape {tuple(logits.shape)} with strides "
            f"{logits.stride()}, expected logits whose rows do not overlap and whose leading "
            "dimensions merge into at most two strides; pass a contiguous tensor or a slice such "
            "as `logits[:, :-1]`"
        )
    if wants_gradient(logits):
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
            kept,
        )
        return found
    several = _several(rows, targets)
    log_probs, entropy, *_ = _read(rows, targets, need_entropy, backend, kept, several)
    return log_probs, entropy


def _read(
    rows: Tensor,
    targets: Targets,
    need_entropy: bool,
    backend: str,
    kept: KeptRows | None,
    several: Several | None,
) -> tuple[Any, ...]:
    """Return what the operator finds in rows ``[B, T, V]``, and what backward needs beside that.

    With `kept`, that are the kept logits; where tokens have K ids, a copy of the log-probs.
    """
    if kept is not None:
        return kept_logits.read(rows, targets, need_entropy, backend, kept)
    if several is None:
        found: tuple[Tensor, ...] = operators.call(
            "token_log_probs", backend, rows, *targets, need_entropy
        )
        return *found, None
    of_rows = targets._replace(token_ids=several.target)
    of_target, entropy, top, log_sum = operators.call(
        "token_log_probs", backend, rows, *of_rows, need_entropy
    )
    log_probs = several.log_probs(of_target, top, log_sum, targets.scale, targets.softcap)
    if targets.mask is not None:
        log_probs = torch.where(targets.mask.unsqueeze(1), log_probs, 0.0)
    return log_probs, entropy, top, log_sum, log_probs.clone()


def _several(rows: Tensor, targets: Targets) -> Several | None:
    """Return the K ids of rows ``[B, T, V]``, None where a token has one."""
    if targets.token_ids.dim() == 1:
        return None
    return Several.of(rows, targets.token_ids, targets.mask, checks.compute_dtype(rows))


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


def _write(
    grad_rows: Tensor,
    rows: Tensor,
    targets: Targets,
    found: tuple[Tensor, Tensor, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    backend: str,
    kept: KeptRows | None,
    several: Several | None,
    beside: Tensor | None,
) -> None:
    """Write the gradient of rows ``[B, T, V]``, of which `_read` has `found` that and `beside`."""
    if kept is not None:
        assert beside is not None
        kept_logits.write(grad_rows, rows, targets, found, grads, backend, kept, beside)
        return
    of_rows, (grad, grad_entropy) = targets, grads
    if several is not None:
        of_rows, grad = targets._replace(token_ids=several.target), several.of_rows(grads[0])
    operators.call(
        "token_log_probs_backward",
        backend,
        grad_rows,
        rows,
        *of_rows,
        *found,
        grad,
        grad_entropy,
        None,
    )
    if several is not None:
        assert beside is not None
        scales = targets.mask, targets.scale, targets.softcap
        several.write_columns(grad_rows, beside, grads[0], grad_entropy, found[2], *scales)


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
        kept: KeptRows | None,
    ) -> tuple[Tensor, Tensor]:
        values = (whole if logits is None else logits).detach()
        rows = _three_dims(values)
        several = _several(rows, targets)
        log_probs, entropy, top, log_sum, beside = _read(
            rows, targets, need_entropy, backend, kept, several
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
            beside=beside,
        )
        ctx.kept, ctx.several = kept, several
        ctx.scalars = targets.temperature, targets.softcap
        ctx.part, ctx.inplace, ctx.backend, ctx.is_spent = part, inplace, backend, False
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @first_only("token_log_probs", lambda ctx: ctx.saved_tensors[:1])
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        tensors: Any = saved(ctx)
        whole, token_ids, mask, temperatures, top, log_sum, entropy, beside = tensors
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
            # Hooks may also hand out a copy that is laid out in another way.
            if part is not None or not _overwritable(_three_dims(whole), whole):
                whole = whole.contiguous()
        logits = whole if part is None else part.of(whole)
        grad_logits = logits if ctx.inplace else whole.new_empty(whole.shape)
        if grad is None:
            grad = torch.zeros_like(token_ids, dtype=entropy.dtype)
        if grad_entropy is not None:
            # Of no entropies, compiled code has an empty gradient.
            is_any = len(entropy) > 0
            grad_entropy = grad_entropy.resolve_neg().contiguous() if is_any else None
        found = top, log_sum, None if grad_entropy is None else entropy
        grads = grad.resolve_neg().contiguous(), grad_entropy
        targets = Targets(token_ids, mask, temperatures, *ctx.scalars)
        rows = _three_dims(grad_logits), _three_dims(logits)
        _write(*rows, targets, found, grads, ctx.backend, ctx.kept, ctx.several, beside)
        if ctx.inplace:
            # The kernel wrote behind autograd's back: a second backward must not take it.
            torch.autograd.graph.increment_version(whole)
        others = [None] * 7
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
