"""A batch of upstream gradients raises at once: no kernel takes one."""

from __future__ import annotations

import pytest
import torch
from fuzz.crash_worker import tensors
from fuzz.subjects import subjects


@pytest.mark.parametrize(
    "subject", [one for one in subjects() if one.leaves], ids=lambda one: one.name
)
def test_a_batch_of_upstream_gradients_raises(kernel, subject):
    subject = subject.on(kernel.device)
    leaves = {name: subject.arguments[name].clone().requires_grad_() for name in subject.leaves}
    given = {**subject.arguments, **leaves}
    if "backend" in subject.parameters:
        given["backend"] = kernel.backend
    found = next(one for one in tensors(subject.function(**given)) if one.requires_grad)
    upstream = torch.ones((2, *found.shape), dtype=found.dtype, device=kernel.device)
    with pytest.raises(RuntimeError, match="is_grads_batched: got a batch"):
        torch.autograd.grad(found, list(leaves.values()), upstream, is_grads_batched=True)
