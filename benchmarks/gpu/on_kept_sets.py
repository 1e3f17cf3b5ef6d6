"""Cases of log-probs over kept sets from hidden states and an output head, in bf16.

Every token keeps as many ids, which are drawn from all alike: no row of the weight is in a cache
because others have it. The sets exist before the call, like a layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import steppo_kernels as sk

from ..variants import Variant
from .on_head import check_of
from .problem import BOTH, Case, Name, Outputs, Problem, backends
from .variants import EAGER

# The log-probs come of fp32 logits.
_LOG_PROB = 0.01
# Pairs of a token and an id whose rows plain PyTorch gathers at a time.
_PAIRS = 1 << 17


class Sizes(NamedTuple):
    """Tokens, the size of hidden states, and the vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int


def kept_sets(sizes: Sizes, count: int, *, trained: bool) -> Case:
    """Return the case of sets of `count` ids, with a frozen or a trained weight."""
    how = f"{BOTH}, {'trained' if trained else 'frozen'} weight"
    shape = f"{count} ids, {sizes.tokens} x {sizes.hidden} x {sizes.vocabulary}"
    name = Name("linear_token_log_probs over sets", how, shape)
    return Case(name, functools.partial(_kept_sets, sizes, count, trained))


def _kept_sets(sizes: Sizes, count: int, trained: bool, device: torch.device) -> Problem:
    tokens, size, vocabulary = sizes
    generator = torch.Generator().manual_seed(0)
    first, step = torch.randint(vocabulary, (2, tokens, 1), generator=generator)
    # Multiples of odd numbers below V / K are other ids each.
    step = 2 * (step % max(1, vocabulary // (2 * count))) + 1
    ids = ((first + step * torch.arange(count)) % vocabulary).to(device)
    own = ids[:, min(1, count - 1)]
    on_device = torch.Generator(device).manual_seed(0)
    made = {"dtype": torch.bfloat16, "device": device}
    weight = torch.empty((vocabulary, size), **made)  # type: ignore[call-overload]
    weight.normal_(0.0, size**-0.5, generator=on_device).requires_grad_(trained)
    hidden = torch.empty((tokens, size), **made)  # type: ignore[call-overload]
    hidden.normal_(0.0, 2.0, generator=on_device).requires_grad_()
    upstream = torch.randn(tokens, generator=generator).to(device)
    support = sk.TokenSupport.from_padded(ids)
    leaves = [hidden, weight] if trained else [hidden]

    def ours(backend: Any) -> Outputs:
        found = sk.linear_token_log_probs(hidden, weight, own, support=support, backend=backend)
        return found, *torch.autograd.grad(found, leaves, upstream)  # type: ignore[arg-type]

    def gathered() -> Outputs:
        found = torch.cat(
            [_log_probs(hidden[at], weight, ids[at], min(1, count - 1)) for at in _parts(ids)]
        )
        return found, *torch.autograd.grad(found, leaves, upstream)

    runs, left_out = backends(device)
    calls: dict[Variant, Callable[[], Outputs]] = {
        variant: functools.partial(ours, backend) for variant, backend in runs.items()
    }
    calls[EAGER] = gathered
    wanted = _exact(hidden, weight, ids, min(1, count - 1), upstream)
    moved = 2 * size * tokens * count
    if trained:
        moved += 2 * size * (vocabulary + tokens * count)
    # Plain PyTorch rounds logits to bf16.
    check = check_of(wanted[: 1 + len(leaves)], _LOG_PROB, of_eager=0.15)
    return Problem(calls, check, moved=moved, left_out=left_out)


def _parts(ids: Tensor) -> list[slice]:
    """Return tokens whose rows are gathered together."""
    each = max(1, _PAIRS // ids.shape[1])
    return [slice(begin, begin + each) for begin in range(0, len(ids), each)]


def _log_probs(hidden: Tensor, weight: Tensor, ids: Tensor, place: int) -> Tensor:
    """Return log-probs of rows that torch gathers."""
    rows = weight.index_select(0, ids.reshape(-1)).view(*ids.shape, -1)
    logits = torch.bmm(rows, hidden.unsqueeze(2)).squeeze(2).float()
    return logits[:, place] - logits.logsumexp(1)


@torch.no_grad()
def _exact(hidden: Tensor, weight: Tensor, ids: Tensor, place: int, upstream: Tensor) -> Outputs:
    """Return log-probs and the gradients of hidden states and weight, in fp32."""
    log_probs, of_hidden = [], []
    of_weight = torch.zeros(weight.shape, device=weight.device)
    for at in _parts(ids):
        rows, states = weight[ids[at]].float(), hidden[at].float()
        log_p = torch.einsum("nkd,nd->nk", rows, states).log_softmax(1)
        of_logits = -log_p.exp() * upstream[at, None]
        of_logits[:, place] += upstream[at]
        log_probs.append(log_p[:, place])
        of_hidden.append(torch.einsum("nk,nkd->nd", of_logits, rows))
        terms = of_logits.unsqueeze(2) * states.unsqueeze(1)
        of_weight.index_add_(0, ids[at].reshape(-1), terms.flatten(0, 1))
    return torch.cat(log_probs), torch.cat(of_hidden), of_weight
