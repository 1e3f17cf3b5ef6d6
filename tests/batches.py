"""Random ragged batches, every result of a call by name, and error measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from steppo_kernels.backends.choice import Backend
from steppo_kernels.cli.validate.draw import ragged_mask
from steppo_kernels.config import RatioKind, StepPOConfig
from steppo_kernels.layout.broadcast import broadcast_to_tokens
from steppo_kernels.layout.step_layout import StepLayout
from steppo_kernels.losses.policy_loss import steppo_loss


@dataclass(frozen=True)
class Batch:
    """Inputs of every public function, on one layout of shape ``[B, T]``.

    Attributes:
        mask: bool ``[B, T]``, whose runs are the steps of `layout`.
        layout: B trajectories.
        log_probs, old_log_probs, ref_log_probs, entropy, token_weights, values, old_values:
            ``[B, T]``, NaN where `mask` is False.
        rewards: ``[B, T]``, finite everywhere.
        advantages, returns, is_weights, step_weights: ``[S]``.
        bootstrap_values: ``[G]``.
    """

    mask: Tensor
    layout: StepLayout
    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    entropy: Tensor
    token_weights: Tensor
    values: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    is_weights: Tensor
    step_weights: Tensor
    bootstrap_values: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Batch:
        """Return the batch with its floating tensors in `dtype`, on `device`."""
        device = self.mask.device if device is None else device
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            moved[field.name] = value.to(device, dtype) if floating else value.to(device)
        return Batch(**moved)

    def on_tokens(self, per_step: Tensor) -> Tensor:
        """Return ``[S]`` numbers at the tokens of their steps, NaN at masked ones."""
        spread = broadcast_to_tokens(per_step, self.layout, backend="reference")
        return torch.where(self.mask, spread, torch.nan)


def random_batch(
    seed: int,
    rows: int = 8,
    length: int = 48,
    *,
    ratio: RatioKind = "geometric",
    log_ratios: tuple[float, float] = (math.log(1e-4), 8.0),
    mean_step: float = 6.0,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Batch:
    """Return a random batch, the same for a seed on every device.

    The step log-ratios are about uniform over `log_ratios` under a config with `ratio`. fp64 and
    fp32 batches of a seed hold the same numbers, those of fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    if mask is None:
        mask = ragged_mask(rows, length, mean_step=mean_step, generator=generator)
    layout = StepLayout.from_mask(mask, backend="reference")
    num_steps = layout.num_steps

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    low, high = log_ratios
    lengths = layout.step_lengths.clamp_min(1).to(torch.float64)
    powers = {"geometric": 0.0, "product": -1.0, "centered": -0.5, "token": 0.0}
    share = lengths ** powers[ratio]
    z = broadcast_to_tokens(
        (low + (high - low) * uniform(num_steps)) * share, layout, backend="reference"
    )
    # Tokens of a step differ, little enough not to move its ratio out of the range.
    z = z * (1 + 0.1 * normal(*mask.shape))
    old = torch.log(uniform(*mask.shape).clamp_min(1e-6))
    on_tokens = {
        "log_probs": old + z,
        "old_log_probs": old,
        "ref_log_probs": old + z + 0.3 * normal(*mask.shape),
        "entropy": 3 * uniform(*mask.shape),
        "token_weights": 0.5 + uniform(*mask.shape),
        "values": normal(*mask.shape),
    }
    on_tokens["old_values"] = on_tokens["values"] + 0.6 * normal(*mask.shape)
    drawn = {
        **{name: torch.where(mask, value, torch.nan) for name, value in on_tokens.items()},
        "rewards": normal(*mask.shape),
        "advantages": normal(num_steps),
        "returns": normal(num_steps),
        "is_weights": 0.5 + uniform(num_steps),
        "step_weights": 0.5 + uniform(num_steps),
        "bootstrap_values": normal(layout.num_trajectories),
    }
    rounded = {name: value.to(torch.float32) for name, value in drawn.items()}
    return Batch(mask=mask, layout=layout, **rounded).to(dtype, device)


def policy_results(
    batch: Batch,
    config: StepPOConfig,
    backend: Backend,
    *,
    masked: bool = False,
    upstream: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Return everything `steppo_loss` gives for a batch, by name.

    Args:
        batch: the inputs; `ref_log_probs` and `entropy` are passed where `config` uses them.
        config: hyper-parameters.
        backend: implementation.
        masked: pass the mask instead of the layout.
        upstream: gradient of the loss.
        **options: other keywords of `steppo_loss`, and `advantages` in place of the batch's.

    Returns:
        ``loss``, ``metrics``, ``grad_log_probs``, with entropy ``grad_entropy`` and with a layout
        ``step_log_ratio``.
    """
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    entropy = batch.entropy.detach().clone().requires_grad_() if config.entropy_coef else None
    if config.kl_coef:
        options.setdefault("ref_log_probs", batch.ref_log_probs)
    if (advantages := options.pop("advantages", None)) is None:
        advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    output = steppo_loss(
        log_probs,
        batch.old_log_probs,
        advantages,
        batch.mask if masked else batch.layout,
        config=config,
        entropy=entropy,
        backend=backend,
        **options,
    )
    output.loss.backward(torch.full_like(output.loss, upstream))
    # The last entry is the scale of the gradients, which is a backend's own.
    found = {"loss": output.loss.detach(), "metrics": output.metrics.values}
    for name, value in (("grad_log_probs", log_probs), ("grad_entropy", entropy)):
        if value is not None and value.grad is not None:
            found[name] = value.grad
    if output.step_log_ratio is not None:
        found["step_log_ratio"] = output.step_log_ratio
    return found


@dataclass(frozen=True)
class Error:
    """How far numbers are from the exact ones, relative to these: root mean square, and largest."""

    rms: float
    largest: float

    @classmethod
    def between(cls, actual: Tensor, exact: Tensor) -> Error:
        """Compare two tensors of one shape; the error of a NaN or of a wrong shape is infinite."""
        if actual.shape != exact.shape:
            return cls(math.inf, math.inf)
        if exact.numel() == 0:
            return cls(0.0, 0.0)
        wanted = exact.detach().to("cpu", torch.float64)
        difference = actual.detach().to("cpu", torch.float64) - wanted
        if not bool(difference.isfinite().all()):
            return cls(math.inf, math.inf)
        return cls(
            _ratio(float(difference.square().mean().sqrt()), float(wanted.square().mean().sqrt())),
            _ratio(float(difference.abs().max()), float(wanted.abs().max())),
        )


def errors(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Error]:
    """Return the error of each result in `exact`."""
    return {name: Error.between(actual[name], value) for name, value in exact.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """Compare results of the same names, entry by entry, relative to the largest of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert Error.between(found[name], value).largest <= bound, name


def _ratio(error: float, scale: float) -> float:
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0.0 else math.inf


def fp64(values: Any, device: torch.device | str = "cpu", **options: Any) -> Tensor:
    """Return the numbers as an fp64 tensor."""
    return torch.tensor(values, device=device, dtype=torch.float64, **options)


def two_steps(target: Any) -> tuple[Tensor, StepLayout]:
    """Return the mask of a row with a step of two tokens and one of a single token; its layout."""
    mask = torch.tensor([[1, 1, 0, 1]], device=target.device, dtype=torch.bool)
    return mask, StepLayout.from_mask(mask, backend=target.backend)
