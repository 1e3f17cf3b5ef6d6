"""Random batches for losses from hidden states, and what plain PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from batches import ragged_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steppo_kernels import StepLayout, steppo_loss


@dataclass
class HeadCase:
    """Inputs of `linear_steppo_loss`; masked positions hold NaN and ids out of range."""

    mask: Tensor
    layout: StepLayout
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    token_ids: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    temperatures: Tensor
    token_weights: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> HeadCase:
        """Round floating tensors to `dtype`; gradients are wanted of hidden, weight and bias."""
        moved = {}
        for name, value in vars(self).items():
            floating = isinstance(value, Tensor) and value.is_floating_point()
            moved[name] = value.to(device, dtype) if floating else value.to(device)
        for name in ("hidden", "weight", "bias"):
            moved[name] = moved[name].detach().clone().requires_grad_()
        return HeadCase(**moved)

    def gradients(self, loss: Tensor, *names: str) -> dict[str, Tensor]:
        """Return the gradients of `loss` by hidden, weight, bias, or those named."""
        names = names or ("hidden", "weight", "bias")
        found = torch.autograd.grad(loss, [getattr(self, n) for n in names], allow_unused=True)
        return {
            f"grad_{n}": torch.zeros_like(getattr(self, n)) if g is None else g
            for n, g in zip(names, found, strict=True)
        }


def head_case(
    seed: int,
    rows: int = 3,
    length: int = 17,
    size: int = 5,
    vocabulary: int = 11,
    *,
    mean_step: float = 4.0,
    sharp: float = 1.0,
    moved: float = 0.1,
) -> HeadCase:
    """Draw a case in fp64 (hidden states and weight are exact in bf16); log-ratios are `moved`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = ragged_mask(rows, length, mean_step=mean_step, generator=generator)
    layout = StepLayout.from_mask(mask)
    hidden = normal(rows, length, size).bfloat16().double()
    weight = (sharp * size**-0.5 * normal(vocabulary, size)).bfloat16().double()
    bias = (0.3 * normal(vocabulary)).bfloat16().double()
    temperatures = 0.5 + torch.rand((rows, length), generator=generator, dtype=torch.float64)
    logits = hidden @ weight.t()
    # Taken from the policy itself, so that many tokens are likely.
    flat = logits.softmax(-1).view(-1, vocabulary)
    token_ids = torch.multinomial(flat, 1, generator=generator).view(rows, length)
    log_probs = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    garbage = torch.where(torch.arange(length) % 2 == 0, -100, 2**40)
    return HeadCase(
        mask=mask,
        layout=layout,
        hidden=torch.where(mask[..., None], hidden, torch.nan),
        weight=weight,
        bias=bias,
        token_ids=torch.where(mask, token_ids, garbage),
        old_log_probs=torch.where(mask, log_probs + moved * normal(rows, length), torch.nan),
        ref_log_probs=torch.where(mask, log_probs + moved * normal(rows, length), torch.nan),
        advantages=normal(layout.num_steps),
        temperatures=torch.where(mask, temperatures, torch.nan),
        token_weights=0.5 + torch.rand((rows, length), generator=generator, dtype=torch.float64),
    )


def plain_log_probs(
    case: HeadCase,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    softmax_dtype: torch.dtype | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies as a trainer would write them; masked ones are 0.

    With `kept`, bool ``[*shape, V]``, softmaxes are over those ids. The logits have the dtype of
    the hidden states, the softmax has `softmax_dtype`.
    """
    index = case.mask.reshape(-1).nonzero().squeeze(1)
    logits = case.hidden.reshape(-1, case.hidden.shape[-1])[index] @ case.weight.t()
    if bias is not None:
        logits = logits + bias
    if softmax_dtype is not None:
        logits = logits.to(softmax_dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1)[index].to(logits.dtype)
    if kept is not None:
        logits = logits.masked_fill(~kept.reshape(-1, kept.shape[-1])[index], -torch.inf)
    log_p = torch.log_softmax(logits / temperature, -1)
    ids = case.token_ids.reshape(-1)[index]
    finite = log_p if kept is None else log_p.masked_fill(log_p == -torch.inf, 0.0)
    found = log_p.gather(-1, ids[:, None]).squeeze(-1), -(log_p.exp() * finite).sum(-1)
    zeros = torch.zeros(case.mask.numel(), dtype=log_p.dtype, device=log_p.device)
    log_probs, entropy = (
        zeros.index_put((index,), values).view(case.mask.shape) for values in found
    )
    return log_probs, entropy


def plain_loss(case: HeadCase, head: dict, **options: object):
    """Return `steppo_loss` of `plain_log_probs`, by the reference backend."""
    log_probs, entropy = plain_log_probs(case, **head)
    config = options.get("config")
    return steppo_loss(
        log_probs,
        case.old_log_probs,
        case.advantages,
        case.layout,
        backend="reference",
        entropy=entropy if config is not None and config.entropy_coef else None,
        **options,
    )


class _Sizes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _dense(t)}
        self.seen += [
            t.numel()
            for t in tree_leaves(result)
            if _dense(t) and t.untyped_storage().data_ptr() not in held
        ]
        return result


def _dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


@contextmanager
def new_tensors() -> Iterator[list[int]]:
    """Give the numbers of elements of the tensors that are made inside."""
    with _Sizes() as mode:
        yield mode.seen


class _Waits(TorchDispatchMode):
    """Counts operations whose result, or its size, the host reads from the device."""

    _READ = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            # A mask is turned into positions first, of which there is some number.
            self.count += sum(mask is not None and mask.dtype == torch.bool for mask in args[1])
        elif name == "repeat_interleave":
            self.count += (kwargs or {}).get("output_size") is None
        else:
            self.count += name in self._READ
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[_Waits]:
    """Count the operations inside for which the host would wait for a GPU."""
    counter = _Waits()
    tolist = Tensor.tolist

    def counted(values: Tensor) -> Any:
        # No mode sees it.
        counter.count += 1
        return tolist(values)

    with mock.patch.object(Tensor, "tolist", counted), counter:
        yield counter


class _Launches(TorchDispatchMode):
    """Lists the operations of torch for which a GPU launches a kernel, or copies memory."""

    _FREE = ("new_empty", "empty_like", "empty", "empty_strided", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in (*self._FREE, "_unsafe_view")):
            self.names.append(name)
        return result


@contextmanager
def launches() -> Iterator[list[str]]:
    """Give the names of torch's operations inside for which a GPU has work."""
    with _Launches() as mode:
        yield mode.names


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.overloadpacket
        if kind in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@contextmanager
def products() -> Iterator[_Products]:
    """Count the operations of torch's matrix products inside, 2 for each product and sum."""
    with _Products() as counter:
        yield counter
