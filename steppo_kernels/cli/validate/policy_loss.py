"""Cases of `steppo_loss`, with a layout and with a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...config import StepPOConfig
from ...layout.broadcast import broadcast_to_tokens
from ...layout.step_layout import StepLayout
from ...losses.policy_loss import steppo_loss
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw, border
from .layouts import random_layout

_FAR = (-30.0, -15.0, 15.0, 30.0)


@dataclass(frozen=True)
class _Variant:
    """Which options of the loss are on."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    on_policy: bool = False
    dual_clip: bool = False
    log_ratio_max: bool = False
    is_weights: str = ""
    step_weights: bool = False
    normalizer: bool = False
    ratio_center: bool = False


_KL = {"kl_coef": 0.3}
_VARIANTS = (
    _Variant("geometric"),
    _Variant("product", {"ratio": "product"}),
    _Variant("centered", {"ratio": "centered"}),
    _Variant("centered, ratio_center", {"ratio": "centered"}, ratio_center=True),
    _Variant("trajectory_mean", {"reduction": "trajectory_mean"}),
    _Variant("token_mean", {"reduction": "token_mean"}),
    _Variant("sum", {"reduction": "sum"}),
    _Variant("normalizer", normalizer=True),
    _Variant("kl k1", {**_KL, "kl_estimator": "k1"}),
    _Variant("kl k2", {**_KL, "kl_estimator": "k2"}),
    _Variant("kl k3", {**_KL, "kl_estimator": "k3"}),
    _Variant("entropy", {"entropy_coef": 0.01}),
    _Variant("dual clip", dual_clip=True),
    _Variant("log_ratio_max", log_ratio_max=True),
    _Variant("on-policy", on_policy=True),
    _Variant("is_weights per token", is_weights="per token"),
    _Variant(
        "all options",
        {**_KL, "ratio": "centered", "reduction": "trajectory_mean", "entropy_coef": 0.02},
        dual_clip=True,
        is_weights="per token",
        normalizer=True,
    ),
)
_LAYOUT_VARIANTS = (
    _Variant("is_weights per step", is_weights="per step"),
    _Variant("step_weights", step_weights=True),
)


def _case(variant: _Variant, *, fused: bool) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        given: StepLayout | Tensor
        if fused:
            given = draw.mask()
            layout = StepLayout.from_mask(given, backend="reference")
            given = given.to(draw.choice((torch.bool, torch.int64, torch.float32)))
        else:
            given = layout = random_layout(draw)
        inputs = _inputs(draw, variant, layout, per_token=fused)
        unread = {
            name: layout.step_ids < 0 if value.shape == layout.shape else layout.step_lengths == 0
            for name, value in inputs.items()
        }
        options: dict[str, Any] = {}
        if variant.normalizer:
            number = draw.integer(1, 50)
            options["normalizer"] = draw.choice(
                (number, torch.tensor(float(number), device=layout.device))
            )
        if variant.ratio_center:
            options["ratio_center"] = 0.1 * float(draw.normal())
        config = StepPOConfig(**variant.config)
        config = _keep_clear(config, variant, inputs, layout, options)
        upstream = draw.upstream()

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            return _run(inputs, given, config, upstream, {**options, "backend": backend})

        return Problem(run, inputs, unread)

    return Case("steppo_loss (mask)" if fused else "steppo_loss", variant.name, draw_problem)


def _run(
    inputs: Inputs,
    layout: StepLayout | Tensor,
    config: StepPOConfig,
    upstream: float,
    options: Mapping[str, Any],
) -> Outputs:
    leaves = {
        name: inputs[name].detach().clone().requires_grad_()
        for name in ("log_probs", "entropy")
        if name in inputs
    }
    found = steppo_loss(
        leaves["log_probs"],
        inputs.get("old_log_probs"),
        inputs["advantages"],
        layout,
        config=config,
        ref_log_probs=inputs.get("ref_log_probs"),
        entropy=leaves.get("entropy"),
        is_weights=inputs.get("is_weights"),
        step_weights=inputs.get("step_weights"),
        **options,
    )
    grads = torch.autograd.grad(
        found.loss, list(leaves.values()), torch.full_like(found.loss, upstream)
    )
    metrics = zip(found.metrics.names, found.metrics.values, strict=True)
    outputs = {
        "loss": found.loss.detach(),
        **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)},
        **{f"metrics.{name}": value for name, value in metrics},
    }
    if found.step_log_ratio is not None:
        outputs["step_log_ratio"] = found.step_log_ratio
    return outputs


def _inputs(
    draw: Draw, variant: _Variant, layout: StepLayout, *, per_token: bool
) -> dict[str, Tensor]:
    shape, num_steps = layout.shape, layout.num_steps

    def spread(per_step: Tensor) -> Tensor:
        return broadcast_to_tokens(per_step, layout, backend="reference")

    # Step log-ratios of one size, whichever way they are made of their tokens: of the size of the
    # official clip, or of a step far from its old policy.
    size = draw.choice((1e-3, 0.05, 0.5))
    power = {"product": -1.0, "centered": -0.5}.get(variant.config.get("ratio", ""), 0.0)
    share = layout.step_lengths.clamp_min(1).to(torch.float64) ** power
    z = size * (spread(share * draw.normal(num_steps)) + spread(share) * draw.normal(*shape))
    log_probs = -2.0 * draw.normal(*shape).abs() - 0.01
    inputs = {"log_probs": log_probs}
    if not variant.on_policy:
        inputs["old_log_probs"] = log_probs - z
    # Steps without advantage have no gradient.
    advantages = draw.normal(num_steps) * draw.flags(0.9, num_steps)
    if per_token or draw.flags(0.5):
        # Only the first token of a step speaks for it.
        others = torch.ones(shape.numel(), dtype=torch.bool, device=layout.device)
        others[layout.token_index[layout.step_offsets[:-1][layout.step_lengths > 0]]] = False
        advantages = spread(advantages) + others.view(shape) * 5.0
    inputs["advantages"] = advantages
    if "kl_coef" in variant.config:
        # Some tokens lie beyond the clamps of the estimators, none at one of them.
        near = (0.4 * draw.normal(*shape)).clamp(-2.0, 2.0)
        far = near.new_tensor(_FAR)[draw.integers(0, len(_FAR) - 1, *shape)]
        inputs["ref_log_probs"] = log_probs + torch.where(draw.flags(0.1, *shape), far, near)
    if "entropy_coef" in variant.config:
        inputs["entropy"] = draw.uniform(0.0, 3.0, *shape)
    if variant.is_weights:
        size_of_weights = shape if variant.is_weights == "per token" else (num_steps,)
        weights = draw.uniform(0.5, 1.5, *size_of_weights)
        inputs["is_weights"] = weights * draw.flags(0.95, *size_of_weights)
    if variant.step_weights:
        inputs["step_weights"] = draw.uniform(0.0, 1.0, num_steps)
    return {name: draw.rounded(value) for name, value in inputs.items()}


def _keep_clear(
    config: StepPOConfig,
    variant: _Variant,
    inputs: Inputs,
    layout: StepLayout,
    options: Mapping[str, Any],
) -> StepPOConfig:
    """Return `config` with its borders in gaps of the step ratios of these rounded inputs."""
    found = steppo_loss(
        inputs["log_probs"].double(),
        inputs["old_log_probs"].double() if "old_log_probs" in inputs else None,
        inputs["advantages"].double(),
        layout,
        config=StepPOConfig(ratio=config.ratio),
        backend="reference",
        **options,
    )
    assert found.step_log_ratio is not None
    log_ratio = found.step_log_ratio[layout.step_lengths > 0]
    least = 2e-5
    if variant.log_ratio_max:
        top = border(log_ratio, 0.0, config.log_ratio_max, least=least)
        config = replace(config, log_ratio_max=top)
        log_ratio = log_ratio.clamp(max=top)
    ratio = log_ratio.exp()
    above = border(ratio, 1.0, 1.0 + config.clip_high, least=least)
    below = -border(-ratio, -1.0, -1.0 + config.clip_low, least=least)
    config = replace(config, clip_high=above - 1.0, clip_low=min(1.0 - below, 1.0))
    if variant.dual_clip:
        # Bounds the ratio as the clip does, but of steps with negative advantage.
        config = replace(config, dual_clip=max(border(ratio, 1.0, 3.0, least=least), 1.0 + least))
    if not math.isfinite(above):
        raise AssertionError("the step ratios of a drawn batch overflow")
    return config


CASES: tuple[Case, ...] = (
    *(_case(variant, fused=False) for variant in (*_VARIANTS, *_LAYOUT_VARIANTS)),
    *(_case(variant, fused=True) for variant in _VARIANTS),
)
