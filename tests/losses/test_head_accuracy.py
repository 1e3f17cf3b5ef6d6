"""The error rule where arithmetic is hard, from hidden states to the gradients of the head.

Against fp64, fp32 errs at most twice as much as plain PyTorch in fp32, and bf16 at most as much as
plain PyTorch in bf16: log-probs, loss, and the gradients of hidden states, weight and bias, through
`linear_steppo_loss` and through `steppo_loss` of `linear_token_log_probs`. `test_token_log_probs`
has the same for logits, of which `test_logits_loss` shows that their loss is made to the last bit.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import Error
from grids import grid
from head_cases import plain_log_probs
from head_regimes import REGIMES, Regime, draw, evaluate, typed

from steppo_kernels import StepLayout


@grid(
    cover=1,
    name=list(REGIMES),
    dtype=[torch.float32, torch.bfloat16],
    way=["one call", "two calls"],
    chunk={"whole": None, "chunks": 5},
)
def test_error_is_bounded_by_that_of_plain_pytorch(kernel, name, dtype, chunk, way):
    regime = REGIMES[name]
    # Many numbers are as good as many cases.
    seeds = 1 if regime.vocabulary > 10_000 else 3
    if kernel.interpreted:
        # Longer than a block of the kernels is large enough.
        vocabulary = min(regime.vocabulary, 10_007)
        regime = dataclasses.replace(regime, rows=1, length=16, vocabulary=vocabulary)
    squares: dict[tuple[str, str], float] = {}
    for seed in range(seeds):
        case = draw(regime, seed, dtype)
        exact = evaluate(typed(case, torch.float64, "cpu"), regime, "plain", "reference", None)
        found = evaluate(typed(case, dtype, kernel.device), regime, way, kernel.backend, chunk)
        plain = evaluate(typed(case, dtype, kernel.device), regime, "plain", "reference", None)
        for key, value in found.items():
            for who, got in (("kernel", value), ("plain", plain[key])):
                error = Error.between(got, exact[key]).rms
                squares[who, key] = squares.get((who, key), 0.0) + error**2 / seeds
    factor = 2.0 if dtype == torch.float32 else 1.0
    for key in found:
        error, allowed = (squares[who, key] ** 0.5 for who in ("kernel", "plain"))
        # A loss is one number, in which terms of both signs meet: chance has a say.
        rounding = (8 if key == "loss" else 1) * torch.finfo(found[key].dtype).eps
        assert error <= factor * allowed + rounding, (key, error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(kernel, dtype):
    """More than a dimension of a grid; a step longer than a chunk next to short ones."""
    if kernel.emulated:
        pytest.skip("a block a row takes the CPU minutes")
    regime = Regime(vocabulary=5, rows=2, length=37_000, size=2)
    case = draw(regime, 1, dtype)
    mask = torch.ones_like(case.mask)
    mask[0, ::30] = False
    case.mask, case.layout = mask, StepLayout.from_mask(mask)
    assert case.layout.num_tokens > 70_000
    generator = torch.Generator().manual_seed(1)
    for name in ("hidden", "old_log_probs", "ref_log_probs", "temperatures"):
        setattr(case, name, getattr(case, name).nan_to_num(0.5))
    case.token_ids = torch.randint(0, 5, mask.shape, generator=generator)
    case.old_log_probs = plain_log_probs(case)[0]
    case.advantages = torch.randn(case.layout.num_steps, generator=generator, dtype=torch.float64)
    exact = evaluate(typed(case, torch.float64, "cpu"), regime, "plain", "reference", None)
    plain = evaluate(typed(case, dtype, "cpu"), regime, "plain", "reference", None)
    for way, chunk in (("one call", 20_000), ("one call", None), ("two calls", 20_000)):
        found = evaluate(typed(case, dtype, kernel.device), regime, way, kernel.backend, chunk)
        for key, value in found.items():
            allowed = 2 * Error.between(plain[key], exact[key]).rms
            allowed += 2 * torch.finfo(value.dtype).eps
            assert Error.between(value, exact[key]).rms <= allowed, (way, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_is_live(kernel, dtype):
    """Advantages of 0: a loss, and gradients that are 0 and not unwritten."""
    regime = REGIMES["usual"]
    case = draw(regime, 2, dtype)
    case.advantages = torch.zeros_like(case.advantages)
    for way, chunk in (("one call", None), ("one call", 5), ("two calls", 5)):
        found = evaluate(typed(case, dtype, kernel.device), regime, way, kernel.backend, chunk)
        assert found["loss"] == 0
        assert not found["grad_hidden"].any()
        assert not found["grad_weight"].any()


@grid(dtype=[torch.float32, torch.bfloat16])
def test_chunks_change_nothing_but_rounding(kernel, dtype):
    """Sums of the weight's gradient apart, rows do not know of each other."""
    regime = dataclasses.replace(REGIMES["all options"], rows=1, length=14)
    case = draw(regime, 3, dtype)
    exact = evaluate(typed(case, torch.float64, "cpu"), regime, "plain", "reference", None)
    found = [
        evaluate(typed(case, dtype, kernel.device), regime, "one call", kernel.backend, chunk)
        for chunk in (None, 2, 5)
    ]
    for key, value in found[0].items():
        allowed = Error.between(value, exact[key]).rms + 2 * torch.finfo(value.dtype).eps
        for other in found[1:]:
            assert Error.between(other[key], value).rms <= allowed, key
