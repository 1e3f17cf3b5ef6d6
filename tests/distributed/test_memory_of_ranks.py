"""What ranks hold at most is what the account says."""

from __future__ import annotations

import pytest
import torch
from peak_memory import peak_memory
from torch import Tensor, distributed
from worlds import Worlds

from benchmarks.scaling import account
from steppo_kernels import StepLayout, StepPOConfig, linear_steppo_loss, linear_token_log_probs
from steppo_kernels.distributed import ContextShard, context_linear_steppo_loss
from steppo_kernels.log_probs.weight_gradient import CPU_SLICE

_WIDE = StepPOConfig(clip_low=0.9, clip_high=9.0)
# Of several ranks, the last one has fewer ids. The last positions of each row have actions.
_VOCABULARY, _SIZE, _ROWS, _POSITIONS = 8192, 512, 512, 1536
# What the account leaves out are some numbers for each row.
_SHARE = 0.01


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, the whole weight, ids and the mask."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((2, _POSITIONS // 2, _SIZE), generator=generator)
    weight = _SIZE**-0.5 * torch.randn((_VOCABULARY, _SIZE), generator=generator)
    ids = torch.randint(_VOCABULARY, (2, _POSITIONS // 2), generator=generator)
    mask = (torch.arange(_POSITIONS // 2) >= (_POSITIONS - _ROWS) // 2).expand(2, -1)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), ids, mask


def of_heads(rank: int, size: int, dtype: torch.dtype, entropy: bool) -> dict[str, int]:
    """Return the most bytes in a call of the loss, and in forward and backward of log-probs."""
    hidden, whole, ids, mask = drawn(dtype)
    weight = whole.chunk(size)[rank].clone().requires_grad_()
    layout = StepLayout.from_mask(mask)
    options = {} if size == 1 else {"tp_group": distributed.group.WORLD}
    advantages = torch.ones(layout.num_steps)
    with peak_memory() as loss:
        linear_steppo_loss(
            *(hidden, weight, ids, None, advantages, layout),
            config=_WIDE,
            report_entropy=entropy,
            **options,
        )
    given = {"mask": mask, "return_entropy": entropy, **options}
    with peak_memory() as log_probs:
        found = linear_token_log_probs(hidden, weight, ids, **given)
        total = sum(one.sum() for one in found) if entropy else found.sum()
        torch.autograd.grad(total, [hidden, weight])
    return {"loss": loss.bytes, "log-probs": log_probs.bytes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "entropy"), [(1, False), (2, False), (2, True), (3, False)])
def test_heads(worlds: Worlds, size: int, entropy: bool, dtype: torch.dtype) -> None:
    head = account.Head(_ROWS, _SIZE, _ROWS, entropy, live=_ROWS, itemsize=dtype.itemsize)
    given = size, _VOCABULARY, _POSITIONS
    # Of halves that ranks add up, a CPU widens slices of the logits and the weight.
    rows = min(CPU_SLICE, -(-_VOCABULARY // size))
    slices = rows * (_ROWS + _SIZE) * 4 if size > 1 and dtype.itemsize < 4 else 0
    for name, of_loss in (("loss", True), ("log-probs", False)):
        wanted = sum(head.memory(*given, of_loss=of_loss).values()) + slices
        most = max(one[name] for one in worlds.run(size, of_heads, dtype, entropy))
        assert wanted <= most <= (1 + _SHARE) * wanted, (name, most, wanted, most / wanted)


def of_tokens(rank: int, size: int, length: int, dtype: torch.dtype) -> int:
    shard = ContextShard.zigzag(length)
    own = torch.zeros((3, len(shard.columns)), dtype=dtype)
    with peak_memory() as held:
        shard.whole(own)
    return held.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_tokens_of_all_ranks(worlds: Worlds, size: int, dtype: torch.dtype) -> None:
    length = 8200
    wanted = account.whole_memory(size, 3 * 2 * -(-length // (2 * size)), dtype.itemsize)
    for most in worlds.run(size, of_tokens, length, dtype):
        # Words are of whole rows of 512 bytes.
        assert most == pytest.approx(wanted, rel=2 * _SHARE), most / wanted


def of_context(rank: int, size: int, dtype: torch.dtype) -> int:
    hidden, weight, ids, mask = drawn(dtype)
    # Each rank has as many action tokens as the others.
    shard = ContextShard.of_columns(range(rank, _POSITIONS // 2, size), _POSITIONS // 2)
    layout = StepLayout.from_mask(mask)
    own = shard.local(hidden.detach()).requires_grad_()
    weight, ids = weight.requires_grad_(), shard.local(ids)
    advantages = torch.ones(layout.num_steps)
    with peak_memory() as held:
        out = context_linear_steppo_loss(
            own, weight, ids, None, advantages, layout, shard, config=_WIDE
        )
        torch.autograd.grad(out.loss, [own, weight])
    return held.bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_context_loss(worlds: Worlds, dtype: torch.dtype) -> None:
    rows, positions = _ROWS // 2, _POSITIONS // 2
    head = account.Head(rows, _SIZE, rows, False, live=rows, itemsize=dtype.itemsize)
    wanted = sum(head.memory(1, _VOCABULARY, positions, of_loss=False).values())
    for most in worlds.run(2, of_context, dtype):
        assert wanted <= most <= (1 + 2 * _SHARE) * wanted, (most, wanted, most / wanted)
