"""Cases of `token_log_probs` and of `steppo_loss_from_logits`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...config import SURROGATES, StepPOConfig
from ...layout.step_layout import StepLayout
from ...log_probs.token_log_probs import token_log_probs
from ...log_probs.token_support import TokenSupport
from ...losses.logits_loss import steppo_loss_from_logits
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw

# Nothing is clipped: a step at its bound could go either way by rounding.
_WIDE = {"clip_low": 1.0, "clip_high": 1e6}


def clear_config(**chosen: Any) -> StepPOConfig:
    """Return a config whose bounds, if its surrogate has any, no drawn ratio comes near to."""
    bounds = {} if chosen.get("surrogate") == "soft" else _WIDE
    return StepPOConfig(**{**bounds, "log_ratio_max": 80.0, **chosen})


def clear_bounds(layout: StepLayout) -> dict[str, Any]:
    """Return such bounds of the steps, fp64 ``[S]``."""
    wide = torch.ones(layout.num_steps, dtype=torch.float64, device=layout.device)
    return {name: value * wide for name, value in _WIDE.items()}


def draw_logits(draw: Draw, *shape: int, near: bool = False) -> Tensor:
    """Return fp64 logits: flat, peaked, or far from 0 if they need not be near."""
    sharp, shift = draw.choice((1.0, 10.0)), draw.choice((0.0, 0.0, -300.0, 300.0)) * (not near)
    return sharp * draw.normal(*shape) + shift


def _log_probs_case(
    variant: str,
    *,
    temperature: bool = False,
    strided: bool = False,
    inplace: bool = False,
    kept: bool = False,
    several: bool = False,
) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        mask = draw.mask()[:, :200]
        vocabulary = draw.integer(1, 300)
        rows, length = mask.shape
        wide = vocabulary + 3 if strided else vocabulary
        inputs = {
            "logits": draw.rounded(draw_logits(draw, rows, length + strided, wide)),
            "upstream_entropy": draw.rounded(draw.normal(rows, length)),
        }
        count = (draw.integer(2, 9),) if several else ()
        inputs["upstream"] = draw.rounded(draw.normal(rows, length, *count))
        ids = draw.integers(0, vocabulary - 1, rows, length, *count)
        others = draw.integers(-5, 2**40, rows, length, *count)
        ids = torch.where(mask[..., None] if several else mask, ids, others)
        unread = torch.ones((rows, length + strided, wide), dtype=torch.bool, device=mask.device)
        unread[:, :length, :vocabulary] = ~mask[..., None]
        support = None
        if kept:
            sets = draw.flags(0.3, rows, length, vocabulary)
            sets.scatter_(-1, torch.where(mask, ids, 0).unsqueeze(-1), True)
            support = TokenSupport.from_mask(sets)
            unread[:, :length, :vocabulary] |= ~sets
        by_token = draw.uniform(0.5, 2.0, rows, length)
        temperatures = torch.where(mask, by_token, 1.0) if temperature else draw.choice((1.0, 0.6))

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            leaf = inputs["logits"].detach().clone().requires_grad_()
            logits = leaf[:, :length, :vocabulary] if strided else leaf * 1
            log_probs, entropy = token_log_probs(
                logits,
                ids,
                temperature=temperatures,
                mask=mask,
                return_entropy=True,
                support=support,
                inplace_backward=inplace,
                backend=backend,
            )
            total = (log_probs * inputs["upstream"]).sum()
            total = total + (entropy * inputs["upstream_entropy"]).sum()
            (grad,) = torch.autograd.grad(total, leaf)
            return {
                "log_probs": log_probs.detach(),
                "entropy": entropy.detach(),
                "grad_logits": grad,
            }

        return Problem(run, inputs, {"logits": unread})

    return Case("token_log_probs", variant, draw_problem)


def _loss_case(variant: str, *, masked: bool = False, bounds: bool = False, **chosen: Any) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        mask = draw.mask()[:, :200]
        rows, length = mask.shape
        vocabulary = draw.integer(2, 200)
        config = clear_config(**chosen)
        layout = StepLayout.from_mask(mask, backend="reference")
        # No mean over a step evens out what rounding does to the ratio of a single token.
        near = config.ratio == "token"
        logits = draw.rounded(draw_logits(draw, rows, length, vocabulary, near=near))
        ids = draw.integers(0, vocabulary - 1, rows, length)
        exact = token_log_probs(logits.double(), ids, backend="reference")
        assert isinstance(exact, Tensor)
        inputs = {
            "logits": logits,
            "old_log_probs": draw.rounded(exact + 0.1 * draw.normal(rows, length)),
            "advantages": draw.rounded(draw.normal(rows, length)),
        }
        unread = {"logits": (~mask)[..., None].expand_as(logits), "old_log_probs": ~mask}
        upstream = draw.upstream()
        options: dict[str, Any] = clear_bounds(layout) if bounds else {}

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            leaf = inputs["logits"].detach().clone().requires_grad_()
            found = steppo_loss_from_logits(
                leaf,
                ids,
                inputs["old_log_probs"],
                inputs["advantages"],
                mask if masked else layout,
                config=config,
                backend=backend,
                **options,
            )
            (grad,) = torch.autograd.grad(found.loss, leaf, torch.full_like(found.loss, upstream))
            return {"loss": found.loss.detach(), "grad_logits": grad}

        return Problem(run, inputs, unread)

    return Case("steppo_loss_from_logits", variant, draw_problem)


CASES: tuple[Case, ...] = (
    _log_probs_case("one temperature"),
    _log_probs_case("temperature per token", temperature=True),
    _log_probs_case("strided", strided=True),
    _log_probs_case("in place", inplace=True),
    _log_probs_case("kept sets", kept=True),
    _log_probs_case("several ids", several=True),
    _loss_case("layout"),
    _loss_case("mask", masked=True),
    _loss_case("entropy", entropy_coef=0.1),
    _loss_case("clip of tokens", token_clip=(50.0, 50.0)),
    _loss_case("bounds per step", bounds=True),
    *(_loss_case(surrogate, surrogate=surrogate) for surrogate in SURROGATES if surrogate != "tv"),
    *(
        _loss_case(f"{surrogate}, token", ratio="token", surrogate=surrogate)
        for surrogate in SURROGATES
    ),
)
