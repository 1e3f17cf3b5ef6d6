"""token_log_probs: rows that are masked, or have no gradient, are not read."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from grids import grid
from logit_cases import draw, fused, on, results, upstream

from steppo_kernels.backends import choice


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by mprotect")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_masked_rows_may_be_unreadable(dtype):
    """Reading one and not using it would be no different in the results: here it is a crash."""
    if why := choice.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    program = f"""
import ctypes, mmap, torch
from steppo_kernels import StepPOConfig, steppo_loss_from_logits, token_log_probs
torch.set_num_threads(1)
rows, vocabulary = 6, 1500
page = mmap.PAGESIZE
row = -(-vocabulary * {dtype}.itemsize // page) * page
memory = mmap.mmap(-1, rows * row)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
logits = torch.frombuffer(memory, dtype={dtype}).view(rows, -1)[:, :vocabulary]
logits.normal_()
for masked in (1, 4):
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + masked * row), row, 0) == 0
mask = torch.tensor([[1, 0, 1, 1, 0, 1]], dtype=torch.bool)
ids = torch.arange(rows)[None]
token_log_probs(logits[None], ids, mask=mask, backend="cpu")
leaf = logits.requires_grad_()
values = token_log_probs(leaf[None], ids, mask=mask, return_entropy=True, backend="cpu")
assert not torch.autograd.grad(sum(values).sum(), leaf)[0][1].any()
loss = steppo_loss_from_logits(
    leaf[None], ids, None, torch.ones(1, rows), mask, config=StepPOConfig(entropy_coef=0.1),
    backend="cpu",
).loss
assert torch.autograd.grad(loss, leaf)[0][0].any()
print("unread")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "unread\n", (done.returncode, done.stderr)


@grid(
    cover=1,
    garbage=[math.nan, math.inf, -math.inf],
    form=[torch.bool, torch.int64, torch.float32],
)
def test_masked_rows_are_not_read(target, garbage, form):
    logits, ids = on(target, *draw(2, 12, 19))
    mask = torch.arange(12, device=target.device) % 3 != 1
    expected = results(fused(target.backend), logits.float(), ids)
    logits[~mask] = garbage
    ids[~mask] = torch.tensor([-100, 2**40, 19, -(2**62)], device=target.device)
    shape = (3, 4)
    found = results(
        fused(target.backend, mask=mask.view(shape).to(form)),
        logits.float().view(*shape, 19),
        ids.view(shape),
        torch.where(mask, 1.0, garbage).view(shape),
        grads=upstream(12).view(2, *shape),
    )
    for name, value in expected.items():
        kept = found[name].view(value.shape)
        assert torch.equal(kept[mask], value[mask]), name
        assert kept[~mask].count_nonzero() == 0, name
        assert not kept.isnan().any()


def test_everything_masked(target):
    logits = torch.full((2, 3, 4), math.nan, device=target.device)
    ids = torch.full((2, 3), -1, device=target.device)
    mask = torch.zeros((2, 3), dtype=torch.bool, device=target.device)
    found = results(fused(target.backend, mask=mask), logits, ids)
    assert all(value.count_nonzero() == 0 for value in found.values())


def test_dead_rows_are_zeroed_and_not_read(kernel):
    logits, ids = on(kernel, *draw(13, 6, 37))
    logits = logits.float().requires_grad_()
    log_probs, entropy = fused(kernel.backend)(logits, ids)
    grads = upstream(6, dtype=torch.float32).to(kernel.device)
    dead = torch.tensor([0, 3, 5], device=kernel.device)
    grads[:, dead] = 0.0
    (expected,) = torch.autograd.grad((log_probs, entropy), logits, list(grads), retain_graph=True)
    logits.data[dead] = math.nan
    (found,) = torch.autograd.grad((log_probs, entropy), logits, list(grads))
    assert torch.equal(found, expected)
    assert found[dead].count_nonzero() == 0
