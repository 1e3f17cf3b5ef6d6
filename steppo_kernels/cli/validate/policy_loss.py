"""Cases of `steppo_loss`, with a layout and with a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...config import RATIOS, SURROGATES, StepPOConfig
from ...layout.broadcast import broadcast_to_tokens
from ...layout.step_layout import StepLayout
from ...losses.policy_loss import steppo_loss
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw, border
from .layouts import random_layout

_FAR = (-30.0, -15.0, 15.0, 30.0)
# Rounding in fp32 does not carry a number from one side of a border to the other.
_LEAST = 2e-5


@dataclass(frozen=True)
class _Variant:
    """Which options of the loss are on."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    on_policy: bool = False
    dual_clip: bool = False
    token_clip: bool = False
    log_ratio_max: bool = False
    advantages: str = ""
    is_weights: str = ""
    step_weights: bool = False
    bounds: bool = False
    normalizer: bool = False
    ratio_center: bool = False


_KL = {"kl_coef": 0.3}
_FAMILY = tuple(
    _Variant(
        ratio if surrogate == "clip" else f"{surrogate}, {ratio}",
        {"ratio": ratio, "surrogate": surrogate},
    )
    for surrogate in SURROGATES
    for ratio in (("token",) if surrogate == "tv" else RATIOS)
)
_VARIANTS = (
    *_FAMILY,
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
    _Variant("dual clip, token", {"ratio": "token"}, dual_clip=True),
    _Variant("token_clip", token_clip=True),
    _Variant("log_ratio_max", log_ratio_max=True),
    _Variant("log_ratio_max, cispo", {"surrogate": "cispo"}, log_ratio_max=True),
    _Variant("on-policy", on_policy=True),
    _Variant("on-policy, tv", {"ratio": "token", "surrogate": "tv"}, on_policy=True),
    _Variant("advantages per token", advantages="per token"),
    _Variant(
        "advantages per token, mask", {"surrogate": "mask"}, advantages="per token", token_clip=True
    ),
    _Variant(
        "advantages per token, token",
        {"ratio": "token", "reduction": "token_mean"},
        advantages="per token",
    ),
    _Variant("is_weights per token", is_weights="per token"),
    _Variant(
        "all options, token",
        {**_KL, "ratio": "token", "surrogate": "cispo", "entropy_coef": 0.02},
        advantages="per token",
        is_weights="per token",
        log_ratio_max=True,
        normalizer=True,
    ),
    _Variant(
        "all options",
        {**_KL, "ratio": "centered", "reduction": "trajectory_mean", "entropy_coef": 0.02},
        dual_clip=True,
        token_clip=True,
        is_weights="per token",
        normalizer=True,
    ),
)
_LAYOUT_VARIANTS = (
    _Variant("is_weights per step", is_weights="per step"),
    _Variant("step_weights", step_weights=True),
    _Variant("bounds per step", bounds=True),
    *(
        _Variant(
            f"bounds per step, {surrogate}",
            {"ratio": "token", "surrogate": surrogate},
            bounds=True,
            advantages="per token",
        )
        for surrogate in SURROGATES
        if surrogate not in ("clip", "soft")
    ),
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
        of_steps = {"step_weights"} | {
            name
            for name in ("advantages", "is_weights")
            if getattr(variant, name) != "per token" and not fused
        }
        unread = {
            name: layout.step_lengths == 0
            if name in of_steps
            else (layout.step_ids < 0).view(value.shape)
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
        if variant.bounds:
            options |= _bounds(draw, config, layout)
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
    metrics = {name: found.metrics[name] for name in found.metrics}
    outputs = {
        "loss": found.loss.detach(),
        **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)},
        **{f"metrics.{name}": value for name, value in metrics.items()},
    }
    if found.step_log_ratio is not None:
        outputs["step_log_ratio"] = found.step_log_ratio
    return outputs


def _inputs(
    draw: Draw, variant: _Variant, layout: StepLayout, *, per_token: bool
) -> dict[str, Tensor]:
    shape, num_steps = layout.shape, layout.num_steps
    # A vector as long as the layout has steps would be per step.
    rows = shape if len(shape) == 2 else torch.Size((1, *shape))

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
    # Units without advantage have no gradient.
    if variant.advantages == "per token":
        inputs["advantages"] = draw.normal(*rows) * draw.flags(0.9, *rows)
    else:
        advantages = draw.normal(num_steps) * draw.flags(0.9, num_steps)
        inputs["advantages"] = spread(advantages).view(rows) if per_token else advantages
    if "kl_coef" in variant.config:
        # Some tokens lie beyond the clamps of the estimators, none at one of them.
        near = (0.4 * draw.normal(*shape)).clamp(-2.0, 2.0)
        far = near.new_tensor(_FAR)[draw.integers(0, len(_FAR) - 1, *shape)]
        inputs["ref_log_probs"] = log_probs + torch.where(draw.flags(0.1, *shape), far, near)
    if "entropy_coef" in variant.config:
        inputs["entropy"] = draw.uniform(0.0, 3.0, *shape)
    if variant.is_weights:
        size_of_weights = rows if variant.is_weights == "per token" else (num_steps,)
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
    """Return `config` with its borders in gaps of the ratios of these rounded inputs.

    The ratios are of steps, or of tokens. The borders of ``"tv"`` lie in gaps of the moves of the
    tokens' probabilities.
    """
    new = inputs["log_probs"].double()
    old = inputs["old_log_probs"].double() if "old_log_probs" in inputs else new
    tokens = layout.token_index
    z = (new - old).view(-1)[tokens]
    if variant.token_clip:
        low, high = (border(side, 0.0, 0.5, least=_LEAST) for side in (-z, z))
        config = replace(config, token_clip=(low, high))
    found = steppo_loss(
        new,
        None if variant.on_policy else old,
        inputs["advantages"].double(),
        layout,
        config=StepPOConfig(ratio=config.ratio, token_clip=config.token_clip),
        backend="reference",
        **options,
    )
    assert found.step_log_ratio is not None
    log_ratio = z if config.ratio == "token" else found.step_log_ratio[layout.step_lengths > 0]
    if variant.log_ratio_max:
        top = border(log_ratio, 0.0, config.log_ratio_max, least=_LEAST)
        config = replace(config, log_ratio_max=top)
        log_ratio = log_ratio.clamp(max=top)
    if config.surrogate == "soft":
        # It has no bounds, and jumps nowhere.
        return config
    if config.surrogate == "quadratic":
        # It divides by its bounds, and jumps nowhere.
        return replace(config, clip_low=0.2, clip_high=0.3)
    ratio = log_ratio.exp()
    if config.surrogate == "tv":
        moved = (new.exp() - old.exp()).view(-1)[tokens]
        return replace(
            config,
            clip_high=border(moved, 0.0, 0.1, least=_LEAST),
            clip_low=min(border(-moved, 0.0, 0.1, least=_LEAST), 1.0),
        )
    above = border(ratio, 1.0, 1.0 + config.clip_high, least=_LEAST)
    below = -border(-ratio, -1.0, -1.0 + config.clip_low, least=_LEAST)
    config = replace(config, clip_high=above - 1.0, clip_low=min(1.0 - below, 1.0))
    if variant.dual_clip:
        # Bounds the ratio as the clip does, but of units with negative advantage.
        dual_clip = max(border(ratio, 1.0, 3.0, least=_LEAST), 1.0 + _LEAST)
        config = replace(config, dual_clip=dual_clip)
    if not math.isfinite(above):
        raise AssertionError("the ratios of a drawn batch overflow")
    return config


def _bounds(draw: Draw, config: StepPOConfig, layout: StepLayout) -> dict[str, Tensor]:
    """Return bounds of the steps: those of `config`, which are clear of ratios, or far ones."""
    shape = (layout.num_steps,)
    is_empty = layout.step_lengths == 0
    found = {}
    for name, far in (("clip_low", 1.0), ("clip_high", 1e3)):
        near = torch.full(shape, getattr(config, name), dtype=torch.float64, device=layout.device)
        bounds = torch.where(draw.flags(0.5, *shape), near, far)
        found[name] = torch.where(is_empty, torch.nan, bounds)
    return found


CASES: tuple[Case, ...] = (
    *(_case(variant, fused=False) for variant in (*_VARIANTS, *_LAYOUT_VARIANTS)),
    *(_case(variant, fused=True) for variant in _VARIANTS),
)
