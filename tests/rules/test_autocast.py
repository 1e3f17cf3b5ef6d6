"""Autocast casts the arguments of a head once, and nothing that follows from them.

What it would round besides are coefficients of the loss in fp32: fp16 has none of their sizes.
"""

from __future__ import annotations

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    TokenSupport,
    linear_steppo_loss,
    linear_token_log_probs,
)

_IDS = torch.arange(16).reshape(2, 8) * 7 % 33
_SETS = (_IDS.unsqueeze(-1) + torch.arange(5)) % 33


def one_pass(head, device, backend, **options):
    layout = StepLayout.from_mask(torch.ones(2, 8, device=device), backend=backend)
    advantages = torch.tensor([1.0, -0.5], device=device)
    return linear_steppo_loss(
        *head[:2],
        _IDS.to(device),
        None,
        advantages,
        layout,
        bias=head[2],
        normalizer=1e7,
        backend=backend,
        **options,
    ).loss


def log_probs(head, device, backend, **options):
    return linear_token_log_probs(
        *head[:2], _IDS.to(device), bias=head[2], backend=backend, **options
    ).sum()


def two_chunks(head, device, backend):
    return one_pass(head, device, backend, chunk_tokens=8)


def of_sets(head, device, backend):
    support = TokenSupport.from_padded(_SETS.to(device))
    return one_pass(head, device, backend, support=support)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("function", [one_pass, two_chunks, log_probs, of_sets])
def test_autocast_is_a_cast_of_the_arguments(target, function, dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 8, 8), (33, 8), (33,)]
    given = [torch.randn(shape, generator=generator).to(target.device) for shape in shapes]
    found = []
    for autocast in (True, False):
        leaves = [value.clone().requires_grad_() for value in given]
        with torch.autocast(target.device, dtype, enabled=autocast):
            head = leaves if autocast else [leaf.to(dtype) for leaf in leaves]
            value = function(head, target.device, target.backend)
        # A loss is scaled before its backward pass, which does not undo a rounding in forward.
        (value * 65536.0).backward()
        found.append([leaf.grad for leaf in leaves])
    for cast, plain in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(cast, plain)
