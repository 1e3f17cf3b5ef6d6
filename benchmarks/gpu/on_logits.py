"""Cases of the functions on logits, in bf16.

The logits of a causal LM have a position more than there are tokens: ``[B, L + 1, V]``. Functions
of this package are given a slice of these, and peers what they ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import steppo_kernels as sk

from ..gates import assert_close
from ..variants import Variant
from ..vocabulary import peers as shared_peers
from ..vocabulary.cases import CONFIG, Shape, Steps, heights, row_log_probs, step_mask, steps_of
from . import peers
from .bare import bare
from .problem import (
    BOTH,
    FORWARD,
    Call,
    Case,
    Name,
    Outputs,
    Problem,
    backends,
    free_bytes,
    that_fit,
)
from .variants import (
    BARE,
    COMPILED,
    EAGER,
    EAGER_HALF,
    LIGER,
    LIGER_SELECTIVE,
    QUACK,
    TRL_SELECTIVE,
)

IN_PLACE = f"{BOTH}, in place"
# Logits are the output of an operation, as a model's are, and no leaf of the graph.
OF_MODEL = f"{IN_PLACE}, logits of an operation"
# Errors allowed to log-probs (the largest) and to gradients (the root mean square over that of the
# expected ones), which all round to bf16. Those that are made of bf16 probabilities stand apart.
_ALLOWED, _ALLOWED_HALF = (2e-4, 4e-3), (0.02, 0.02)
_HALVES = (EAGER_HALF, TRL_SELECTIVE)
# What eager PyTorch holds for a logit at its peak, with the logits and a copy: fp32 logits,
# log-probs and two gradients, and three times bf16.
_BYTES_A_LOGIT = 4 * 4 + 3 * 2
# Rows whose logits are looked at in fp64 at a time, and those whose gradients are compared.
_CHUNK, _SAMPLED = 256, 64
# TRL takes a sequence at a time.
_SEQUENCES = 8


class Drawn(NamedTuple):
    """Logits ``[B, L + 1, V]`` as a trained model's are, and the tokens ``[B, L]``."""

    whole: Tensor
    token_ids: Tensor


def draw(rows: int, length: int, vocabulary: int, device: torch.device) -> Drawn:
    """Return logits that are drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    on_host = torch.Generator().manual_seed(0)
    whole = torch.empty((rows, length + 1, vocabulary), dtype=torch.bfloat16, device=device)
    whole.normal_(0.0, 2.0, generator=generator)
    ids, rivals = torch.randint(vocabulary, (2, rows, length), generator=on_host).to(device)
    height, below = (x.to(device) for x in heights(rows * length, vocabulary, on_host))
    for places, values in ((rivals, height - below), (ids, height)):
        values = values.view(rows, length, 1).to(whole.dtype)
        whole[:, :-1].scatter_(-1, places[..., None], values)
    return Drawn(whole, ids)


def log_probs(rows: int, vocabulary: int, *, backward: bool) -> Case:
    """Return the case of `token_log_probs`, forward alone or with a backward pass in place."""
    how = IN_PLACE if backward else FORWARD
    name = Name("token_log_probs", how, f"[{rows}, {vocabulary}]")
    return Case(name, functools.partial(_log_probs, rows, vocabulary, backward))


def _log_probs(rows: int, vocabulary: int, backward: bool, device: torch.device) -> Problem:
    wanted_rows, free = rows, free_bytes(device)
    rows = that_fit(rows, _BYTES_A_LOGIT * vocabulary, 0, free)
    drawn = draw(1, rows, vocabulary, device)
    ids = drawn.token_ids[0]
    flat = drawn.whole[0, :-1].detach().requires_grad_(backward)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(device)

    def ours(backend: Any) -> Tensor:
        found = sk.token_log_probs(flat, ids, inplace_backward=backward, backend=backend)
        assert isinstance(found, Tensor)
        return found

    runs, left_out = backends(device)
    calls: dict[Variant, Callable[[], Tensor]] = {
        variant: functools.partial(ours, backend) for variant, backend in runs.items()
    }
    calls[QUACK] = lambda: peers.quack_log_probs(flat, ids, in_place=backward)
    if not backward:
        calls[LIGER_SELECTIVE] = lambda: peers.liger_selective(drawn.whole, drawn.token_ids)[0]
    if rows % _SEQUENCES == 0:
        sequences = (_SEQUENCES, rows // _SEQUENCES)
        calls[TRL_SELECTIVE] = lambda: shared_peers.trl_selective(
            flat.view(*sequences, -1), ids.view(sequences)
        ).view(-1)
    calls[EAGER] = lambda: row_log_probs(flat.float(), ids)
    calls[EAGER_HALF] = lambda: row_log_probs(flat, ids)
    if device.type == "cuda":
        compiled = torch.compile(
            lambda x, at: row_log_probs(x.float(), at), dynamic=False, fullgraph=True
        )
        calls[COMPILED] = lambda: compiled(flat, ids)
    nothing = bare(flat, ((rows,), torch.float32), in_place=backward)
    calls[BARE] = lambda: nothing()[0]
    calls, missing = peers.that_are_there(calls)
    return Problem(
        {v: _call(one, flat, upstream if backward else None) for v, one in calls.items()},
        _rows_check(drawn.whole[0, :-1], ids, upstream),
        reset=restoring(drawn.whole) if backward else None,
        # The logits; and for backward, again, and their gradient.
        moved=flat.nbytes * (3 if backward else 1),
        floors=(BARE,),
        left_out=left_out | missing,
        smaller=smaller(rows, wanted_rows, "rows", free),
    )


def _call(log_probs: Callable[[], Tensor], x: Tensor, upstream: Tensor | None) -> Call:
    """Return the forward pass, or with upstream gradients both passes."""
    if upstream is None:

        def forward() -> Outputs:
            with torch.no_grad():
                return (log_probs(),)

        return forward

    def both() -> Outputs:
        found = log_probs()
        return found, *torch.autograd.grad(found, x, upstream.to(found.dtype))

    return both


def _rows_check(
    logits: Tensor, ids: Tensor, upstream: Tensor
) -> Callable[[Variant, Outputs], float]:
    """Return the check of log-probs and gradients of some rows, against fp64."""
    rows = sampled(len(ids), logits.device)
    wide = logits[rows].double().requires_grad_()
    wanted = row_log_probs(wide, ids[rows])
    (wanted_grad,) = torch.autograd.grad(wanted, wide, upstream[rows].double())
    exact = wanted.detach()

    def check(variant: Variant, outputs: Outputs) -> float:
        allowed = _ALLOWED_HALF if variant in _HALVES else _ALLOWED
        error = float((outputs[0].detach()[rows] - exact).abs().max())
        if not error <= allowed[0]:
            raise AssertionError(f"{variant}: a log-prob is off by {error:.1e}, not {allowed[0]:g}")
        for grad in outputs[1:]:
            assert_close(f"{variant}: gradient", grad[rows], wanted_grad, allowed[1])
        return error

    return check


class _Operation(torch.autograd.Function):
    """An operation whose output has the memory of its input, and is no view of it for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # A detached alias would be a view.
        return x.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def logits_loss(shape: Shape, *, leaf: bool = True) -> Case:
    """Return the case of `steppo_loss_from_logits`: every token is in a step, every row is one.

    Args:
        shape: of the logits.
        leaf: whether the logits are a leaf of the graph, and not the output of an operation.
    """
    name = Name("steppo_loss_from_logits", IN_PLACE if leaf else OF_MODEL, str(shape))
    return Case(name, functools.partial(_logits_loss, shape, leaf))


def _logits_loss(shape: Shape, leaf: bool, device: torch.device) -> Problem:
    wanted_rows, free = shape.rows, free_bytes(device)
    rows = that_fit(shape.rows, _BYTES_A_LOGIT * shape.length * shape.vocabulary, 0, free)
    shape = replace(shape, rows=rows, live=rows)
    whole, ids = draw(rows, shape.length, shape.vocabulary, device)
    whole.requires_grad_()
    steps, exact = _steps_of(shape, whole.detach()[:, :-1], ids)

    def ours(backend: Any, logits: Tensor) -> Tensor:
        return sk.steppo_loss_from_logits(
            logits[:, :-1],
            ids,
            steps.old_log_probs,
            steps.advantages,
            steps.layout,
            inplace_backward=True,
            config=CONFIG,
            backend=backend,
        ).loss

    runs, left_out = backends(device)
    losses: dict[Variant, Callable[[Tensor], Tensor]] = {
        variant: functools.partial(ours, backend) for variant, backend in runs.items()
    }
    losses[LIGER] = lambda logits: peers.liger_loss(logits, steps)
    losses[EAGER] = lambda logits: steps.loss(row_log_probs(logits[:, :-1].float(), ids))
    losses, missing = peers.that_are_there(losses)

    def both(loss: Callable[[Tensor], Tensor]) -> Outputs:
        logits = whole if leaf else _Operation.apply(whole)
        found = loss(logits)
        return found, *torch.autograd.grad(found, whole)

    return Problem(
        {variant: functools.partial(both, loss) for variant, loss in losses.items()},
        _loss_check(whole, ids, steps, exact),
        reset=restoring(whole),
        moved=3 * whole.nbytes,
        left_out=left_out | missing,
        smaller=smaller(rows, wanted_rows, "rows", free),
    )


def _steps_of(shape: Shape, logits: Tensor, ids: Tensor) -> tuple[Steps, Tensor]:
    """Return steps whose ratios are close to 1, and the log-probs of the tokens in fp64."""
    pairs = zip(logits.split(1), ids.split(1), strict=True)
    exact = torch.cat(
        [
            row_log_probs(x.double(), at)
            for row, of_row in pairs
            for x, at in zip(row[0].split(_CHUNK), of_row[0].split(_CHUNK), strict=True)
        ]
    ).view(ids.shape)
    generator = torch.Generator().manual_seed(shape.rows)
    mask, _ = step_mask(shape, generator)
    steps = steps_of(shape, mask, ids.cpu(), exact.float().cpu(), generator)
    return steps.to(logits.device), exact


def _loss_check(
    whole: Tensor, ids: Tensor, steps: Steps, exact: Tensor
) -> Callable[[Variant, Outputs], float]:
    """Return the check of a loss, and of the gradients of some rows of its logits, in fp64."""
    log_probs = exact.clone().requires_grad_()
    loss = steps.loss(log_probs)
    (of_log_probs,) = torch.autograd.grad(loss, log_probs)
    expected = loss.item()
    rows = sampled(ids.numel(), ids.device)
    places = rows // ids.shape[1], rows % ids.shape[1]
    wide = whole.detach()[places].double().requires_grad_()
    (wanted,) = torch.autograd.grad(row_log_probs(wide, ids[places]), wide, of_log_probs[places])

    def check(variant: Variant, outputs: Outputs) -> float:
        error = abs(outputs[0].item() - expected)
        # A mean over steps of about 1 and either sign, whose ratios are off as log-probs are.
        if not error <= _ALLOWED[0]:
            raise AssertionError(f"{variant}: loss {outputs[0].item()}, expected {expected}")
        assert_close(f"{variant}: gradient", outputs[1][places], wanted, _ALLOWED[1])
        if bool(outputs[1][:, -1].any()):
            raise AssertionError(f"{variant}: a position without a token has a gradient")
        return error

    return check


def sampled(count: int, device: torch.device) -> Tensor:
    """Return positions that are spread over `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, _SAMPLED), device=device).round().long().unique()


def restoring(values: Tensor) -> Callable[[], object]:
    """Return what makes values what they are now."""
    copy = values.detach().clone()

    def reset() -> None:
        values.detach().copy_(copy)

    return reset


def smaller(count: int, wanted: int, what: str, free: int | None) -> str:
    """Return a sentence where memory holds fewer than are wanted."""
    if count == wanted or free is None:
        return ""
    return f"{count} {what} in place of {wanted}: {free / 2**30:.0f} GiB of memory are free"
