"""Softmaxes over kept sets from logits: against dense fp64 with a mask, in place and not."""

from __future__ import annotations

import pytest
import torch
from grids import grid
from head_cases import head_case
from kept_cases import KINDS, kept_of, mask_of, or_all

from steppo_kernels import (
    StepPOConfig,
    TokenSupport,
    steppo_loss,
    steppo_loss_from_logits,
    token_log_probs,
)

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.half, "bf16": torch.bfloat16}
_CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, entropy_coef=0.1, kl_coef=0.1)


class Case:
    """Logits whose masked rows and whose ids that nobody keeps are NaN."""

    def __init__(self, kind, dtype, device, missing="error"):
        head = head_case(11, rows=3, length=9, vocabulary=23)
        kept = kept_of(kind, head)
        self.kept = or_all(kept)
        generator = torch.Generator().manual_seed(3)
        logits = 3 * torch.randn((3, 10, 23), generator=generator)
        logits[:, :-1][~head.mask] = torch.nan
        logits[:, :-1][~self.kept] = torch.nan
        self.logits = logits.to(device, dtype)
        self.head = head.to(torch.float32, device)
        self.support = TokenSupport.from_mask(kept, missing=missing).to(device)
        self.ids = self.head.token_ids

    def run(self, backend, inplace, temperature, as_loss):
        leaf = self.logits.clone().requires_grad_()
        whole = leaf.clone() if inplace else leaf
        given = whole[:, :-1], self.ids
        options = {
            "support": self.support,
            "temperature": temperature,
            "inplace_backward": inplace,
            "backend": backend,
        }
        head = self.head
        if as_loss:
            out = steppo_loss_from_logits(
                *given,
                head.old_log_probs,
                head.advantages,
                head.layout,
                config=_CONFIG,
                ref_log_probs=head.ref_log_probs,
                **options,
            )
            found = {"loss": out.loss, "metrics": out.metrics.values[:15]}
            out.loss.backward()
        else:
            log_probs, entropy = token_log_probs(
                *given, mask=head.mask, return_entropy=True, **options
            )
            found = {"log_probs": log_probs, "entropy": entropy}
            (log_probs * 0.7 - entropy * 0.2).sum().backward()
        found["grad"] = leaf.grad
        return {name: value.detach().double().cpu() for name, value in found.items()}

    def exact(self, temperature, as_loss):
        head = self.head.to(torch.float64, "cpu")
        leaf = self.logits.double().cpu().nan_to_num(0.0).requires_grad_()
        z = leaf[:, :-1].masked_fill(~self.kept, -torch.inf)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.cpu().double().nan_to_num(1.0).unsqueeze(-1)
        log_p = torch.where(head.mask.unsqueeze(-1), z / temperature, 0.0).log_softmax(-1)
        ids = torch.where(head.mask, head.token_ids, 0).unsqueeze(-1)
        log_probs = torch.where(head.mask, log_p.gather(-1, ids).squeeze(-1), 0.0)
        p_log_p = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)
        entropy = torch.where(head.mask, -p_log_p.sum(-1), 0.0)
        if as_loss:
            out = steppo_loss(
                log_probs,
                head.old_log_probs,
                head.advantages,
                head.layout,
                config=_CONFIG,
                ref_log_probs=head.ref_log_probs,
                entropy=entropy,
                backend="reference",
            )
            found = {"loss": out.loss, "metrics": out.metrics.values[:15]}
            out.loss.backward()
        else:
            found = {"log_probs": log_probs, "entropy": entropy}
            (log_probs * 0.7 - entropy * 0.2).sum().backward()
        return {name: value.detach() for name, value in found.items()} | {"grad": leaf.grad}


@grid(
    cover=1,
    kind=KINDS,
    dtype=_DTYPES,
    inplace=[False, True],
    by_token=[False, True],
    as_loss=[False, True],
)
def test_against_dense_fp64(target, kind, dtype, inplace, by_token, as_loss):
    case = Case(kind, dtype, target.device)
    temperature = 0.7
    if by_token:
        temperature = torch.where(case.head.mask, case.head.temperatures, torch.nan)
    found = case.run(target.backend, inplace, temperature, as_loss)
    exact = case.exact(temperature, as_loss)
    tolerance = {torch.float64: 1e-6, torch.float32: 4e-6}.get(dtype, 4e-6)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for name, value in exact.items():
        limit = tolerance + (rounding if name == "grad" else 0.0)
        torch.testing.assert_close(found[name], value, rtol=limit, atol=limit)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_token_without_its_id_takes_all_ids(target, inplace):
    """Of logits all of which are finite."""
    case = Case("some empty", torch.float32, target.device, missing="full")
    at = tuple(case.head.mask.nonzero()[2].tolist())
    case.logits[:, :-1][case.head.mask] = case.logits[:, :-1][case.head.mask].nan_to_num(0.5)
    kept = torch.zeros_like(case.kept)
    kept |= case.kept & (case.kept.sum(-1, keepdim=True) < case.kept.shape[-1])
    kept[at] = False
    kept[at][(int(case.ids[at]) + 1) % 23] = True
    case.support = TokenSupport.from_mask(kept, missing="full").to(target.device)
    case.kept = or_all(kept)
    case.kept[at] = True
    found, exact = case.run(target.backend, inplace, 1.0, False), case.exact(1.0, False)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=4e-6, atol=4e-6)


def test_logits_in_the_precision_of_fp64(target):
    case = Case("random", torch.float64, target.device)
    case.head = head_case(11, rows=3, length=9, vocabulary=23).to(torch.float64, target.device)
    found, exact = case.run(target.backend, False, 0.7, True), case.exact(0.7, True)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (2, 1, 3)])
def test_shapes_of_sets_and_of_tokens(target, shape):
    """Flat, with dimensions of size 1 more or less; another order raises."""
    kept = mask_of("random", 6, 11) | (torch.arange(11) == 4)
    logits = torch.randn((2, 3, 11), generator=torch.Generator().manual_seed(1)).to(target.device)
    ids = torch.full((2, 3), 4, device=target.device)
    wanted = token_log_probs(
        logits,
        ids,
        support=TokenSupport.from_mask(kept.view(2, 3, 11)).to(target.device),
        backend=target.backend,
    )
    support = TokenSupport.from_mask(kept.view(*shape, 11)).to(target.device)
    found = token_log_probs(logits, ids, support=support, backend=target.backend)
    assert torch.equal(found, wanted)
    turned = TokenSupport.from_mask(kept.view(3, 2, 11)).to(target.device)
    for bad in (turned, support[:0]):
        with pytest.raises(ValueError, match=r"^support: got shape "):
            token_log_probs(logits, ids, support=bad, backend=target.backend)
    with pytest.raises(TypeError, match=r"^support: got Tensor, expected a TokenSupport"):
        token_log_probs(logits, ids, support=kept, backend=target.backend)
    with pytest.raises(ValueError, match=r"^support: got the id \d+, expected ids from 0 to 4"):
        token_log_probs(logits[..., :5], ids, support=support, backend=target.backend)


def test_compiled_code_breaks_its_graph_and_gives_the_same(kernel):
    case = Case("some empty", torch.float32, kernel.device)

    def run(logits):
        scaled = logits * 1.0
        return token_log_probs(
            scaled[:, :-1],
            case.ids,
            mask=case.head.mask,
            support=case.support,
            backend=kernel.backend,
        ).sum()

    found = []
    for function in (run, torch.compile(run, backend="aot_eager")):
        leaf = case.logits.nan_to_num(0.0).requires_grad_()
        value = function(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
