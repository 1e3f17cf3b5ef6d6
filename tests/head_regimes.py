"""Where the arithmetic of an output head is hard, and what a way through it gives there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from head_cases import head_case, plain_log_probs

from steppo_kernels import (
    StepPOConfig,
    TokenSupport,
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
REGIMES = {
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


def evaluate(
    case: Any,
    regime: Regime,
    way: str,
    backend: str,
    chunk: int | None,
    kept: torch.Tensor | None = None,
    **more: Any,
) -> Any:
    """Log-probs, loss and gradients of a case; `more` are further arguments of the head.

    With `kept`, bool ``[*shape, V]``, softmaxes are over those ids.
    """
    head = head_of(regime, case)
    if kept is not None:
        kept = kept.to(case.hidden.device)
        name, value = (
            ("kept", kept) if way == "plain" else ("support", TokenSupport.from_mask(kept))
        )
        head[name] = value
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
            **more,
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
                **more,
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
