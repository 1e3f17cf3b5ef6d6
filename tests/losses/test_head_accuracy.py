"""The error rule where arithmetic is hard, from hidden states to the gradients of the head.

Against fp64, fp32 errs at most twice as much as plain PyTorch in fp32, and bf16 at most as much as
plain PyTorch in bf16: log-probs, loss, and the gradients of hidden states, weight and bias, through
`linear_steppo_loss` and through `steppo_loss` of `linear_token_log_probs`. `test_token_log_probs`
has the same for logits, of which `test_logits_loss` shows that their loss is made to the last bit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from batches import Error
from grids import grid
from head_cases import head_case, plain_log_probs

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    linear_token_log_probs,
    steppo_loss,
)

# Wide: what a rounding error clips is not what is measured here.
_CONFIG = StepPOConfig(clip_low=0.9, clip_high=9.0)
_ALL_TERMS = dataclasses.replace(_CONFIG, kl_coef=0.1, entropy_coef=0.05)


@dataclass(frozen=True)
class Regime:
    """How a random case is changed.

    Attributes:
        scale: of the hidden states.
        towards: how far these point at the weights of their tokens, so that p -> 1.
        bias, spread: mean and spread of the bias; None is no bias.
        options: of the head.
        config: of the objective.
        vocabulary, rows, length, size: of the case.
        per_token: whether every token is a step.
    """

    scale: float = 1.0
    towards: float = 0.0
    bias: float | None = None
    spread: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    config: StepPOConfig = _CONFIG
    vocabulary: int = 257
    rows: int = 3
    length: int = 24
    size: int = 64
    per_token: bool = False


_HEAD = {"softcap": 6.0, "temperature": "per token"}
_REGIMES = {
    "usual": Regime(),
    "peaked": Regime(scale=8.0),
    "confident": Regime(towards=25.0),
    "around 300": Regime(scale=4.0, bias=300.0),
    "around -300": Regime(scale=4.0, bias=-300.0),
    "far below 0": Regime(bias=-1e4, spread=5.0),
    "to +-300": Regime(scale=80.0),
    "softcap": Regime(scale=6.0, options={"softcap": 6.0}),
    "all options": Regime(scale=4.0, bias=0.0, spread=1.0, options=_HEAD, config=_ALL_TERMS),
    "steps of a token": Regime(per_token=True),
    "large and peaked": Regime(scale=12.0, vocabulary=152_064, rows=1, length=12, size=32),
    "large and confident": Regime(towards=30.0, vocabulary=152_064, rows=1, length=12, size=32),
}


def draw(regime: Regime, seed: int, dtype: torch.dtype) -> Any:
    """A case whose hidden states, weight and bias are numbers of `dtype`."""
    case = head_case(
        seed,
        rows=regime.rows,
        length=regime.length,
        size=regime.size,
        vocabulary=regime.vocabulary,
        moved=0.02,
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.where(case.mask, case.token_ids, 0)
    hidden = regime.scale * case.hidden + regime.towards * case.weight[ids]
    bias = torch.randn(regime.vocabulary, generator=generator, dtype=torch.float64)
    bias = regime.spread * bias + (regime.bias or 0.0)
    case.hidden, case.weight, case.bias = (
        value.to(dtype).double() for value in (hidden, case.weight, bias)
    )
    if regime.per_token:
        case.layout = case.layout.per_token()
        case.advantages = torch.randn(
            case.layout.num_steps, generator=generator, dtype=torch.float64
        )
    with torch.no_grad():
        log_probs = plain_log_probs(case, **head_of(regime, case))[0]
    noise = torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)
    case.old_log_probs = torch.where(case.mask, log_probs + 0.02 * noise, torch.nan)
    case.ref_log_probs = torch.where(case.mask, log_probs - 0.03 * noise, torch.nan)
    return case


def head_of(regime: Regime, case: Any) -> dict[str, Any]:
    head = dict(regime.options)
    if head.get("temperature") == "per token":
        head["temperature"] = case.temperatures
    if regime.bias is not None:
        head["bias"] = case.bias
    return head


def typed(case: Any, dtype: torch.dtype, device: str) -> Any:
    """The case in `dtype`; what is not the model's stays in fp32, as trainers keep it."""
    moved = case.to(dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    for name in ("old_log_probs", "ref_log_probs", "advantages", "temperatures"):
        setattr(moved, name, getattr(case, name).to(device, wide))
    return moved


def evaluate(case: Any, regime: Regime, way: str, backend: str, chunk: int | None) -> Any:
    head = head_of(regime, case)
    objective = case.old_log_probs, case.advantages, case.layout
    options = {"config": regime.config, "ref_log_probs": case.ref_log_probs}
    if way == "one call":
        output = linear_steppo_loss(
            case.hidden,
            case.weight,
            case.token_ids,
            *objective,
            **head,
            **options,
            chunk_tokens=chunk,
            backend=backend,
        )
        found = {}
    else:
        if way == "plain":
            log_probs, entropy = plain_log_probs(case, **head)
        else:
            log_probs, entropy = linear_token_log_probs(
                case.hidden,
                case.weight,
                case.token_ids,
                mask=case.mask,
                return_entropy=True,
                **head,
                chunk_tokens=chunk,
                backend=backend,
            )
        found = {"log_probs": log_probs.detach()[case.mask], "entropy": entropy.detach()[case.mask]}
        output = steppo_loss(
            log_probs,
            *objective,
            **options,
            entropy=entropy if regime.config.entropy_coef else None,
            backend=backend,
        )
    names = ("hidden", "weight", "bias") if regime.bias is not None else ("hidden", "weight")
    gradients = case.gradients(output.loss, *names)
    # Other tests look at masked hidden states.
    gradients["grad_hidden"] = gradients["grad_hidden"][case.mask]
    return found | {"loss": output.loss.detach()} | gradients


@grid(
    cover=1,
    name=list(_REGIMES),
    dtype=[torch.float32, torch.bfloat16],
    way=["one call", "two calls"],
    chunk={"whole": None, "chunks": 5},
)
def test_error_is_bounded_by_that_of_plain_pytorch(kernel, name, dtype, chunk, way):
    regime = _REGIMES[name]
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
    regime = _REGIMES["usual"]
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
    regime = dataclasses.replace(_REGIMES["all options"], rows=1, length=14)
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
