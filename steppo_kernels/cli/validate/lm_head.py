"""Cases of `linear_token_log_probs` and `linear_steppo_loss`.

In half precision the yardstick forms its logits in that dtype, as models do: the reference
backend would compute in fp32. A backend rounds no logits, but the gradients that it keeps for
backward. Each of them may be lucky on one small batch, so the yardstick takes more draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...backends.choice import Backend
from ...config import SURROGATES
from ...layout.step_layout import StepLayout
from ...log_probs.linear_token_log_probs import linear_token_log_probs
from ...log_probs.token_log_probs import token_log_probs
from ...log_probs.token_support import TokenSupport
from ...losses.linear_steppo_loss import linear_steppo_loss
from ...losses.logits_loss import steppo_loss_from_logits
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw
from .token_log_probs import clear_bounds, clear_config

_MORE_DRAWS = 8


def _draw_head(
    draw: Draw, bias: bool, kept: bool = False
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return hidden states, weight and bias, a mask, and ids that may be anything outside it."""
    mask = draw.mask()[:, :200]
    # Rows of the weight are gathered for sets that are small beside the vocabulary.
    ids = (2000, 3000) if kept else (2, 200)
    size, vocabulary = draw.integer(1, 40), draw.integer(*ids)
    inputs = {
        "hidden": draw.rounded(draw.normal(*mask.shape, size)),
        "weight": draw.rounded(
            draw.choice((1.0, 4.0)) * size**-0.5 * draw.normal(vocabulary, size)
        ),
    }
    if bias:
        inputs["bias"] = draw.rounded(draw.normal(vocabulary))
    tokens = draw.integers(0, vocabulary - 1, *mask.shape)
    return inputs, mask, torch.where(mask, tokens, draw.integers(-5, 2**40, *mask.shape))


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    names = [name for name in ("hidden", "weight", "bias") if name in inputs]
    return {name: inputs[name].detach().clone().requires_grad_() for name in names}


def _plain_logits(leaves: dict[str, Tensor], mask: Tensor) -> Tensor:
    hidden = torch.where(mask[..., None], leaves["hidden"], 0.0)
    return torch.nn.functional.linear(hidden, leaves["weight"], leaves.get("bias"))


def _gradients(total: Tensor, leaves: dict[str, Tensor], upstream: float = 1.0) -> Outputs:
    grads = torch.autograd.grad(total, list(leaves.values()), torch.full_like(total, upstream))
    return {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _support(draw: Draw, kept: bool, ids: Tensor, mask: Tensor, weight: Tensor) -> Any:
    """Return sets of about seven ids each, or none.

    Of two ids, what comes from one may be exactly what comes from the other, up to rounding.
    """
    if not kept:
        return None
    others = draw.integers(0, len(weight) - 1, *mask.shape, 6)
    own = torch.where(mask, ids, 0).unsqueeze(-1)
    return TokenSupport.from_padded(torch.cat((others, own), -1))


def _log_probs_case(
    variant: str, *, bias: bool = False, temperature: bool = False, kept: bool = False
) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        inputs, mask, ids = _draw_head(draw, bias, kept)
        support = _support(draw, kept, ids, mask, inputs["weight"])
        for name in ("upstream", "upstream_entropy"):
            inputs[name] = draw.rounded(draw.normal(*mask.shape))
        by_token = torch.where(mask, draw.uniform(0.5, 2.0, *mask.shape), 1.0)
        heat: Any = by_token if temperature else draw.choice((1.0, 0.6))
        chunk = draw.choice((None, 1, 7, 64))

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            leaves = _leaves(inputs)
            options: dict[str, Any] = {
                "temperature": heat,
                "mask": mask,
                "return_entropy": True,
                "support": support,
                "backend": backend,
            }
            if backend == "reference" and leaves["weight"].dtype in checks.HALF_DTYPES:
                found = token_log_probs(_plain_logits(leaves, mask), ids, **options)
            else:
                found = linear_token_log_probs(
                    leaves["hidden"],
                    leaves["weight"],
                    ids,
                    bias=leaves.get("bias"),
                    chunk_tokens=chunk,
                    **options,
                )
            log_probs, entropy = found
            total = (log_probs * inputs["upstream"]).sum()
            total = total + (entropy * inputs["upstream_entropy"]).sum()
            return {
                "log_probs": log_probs.detach(),
                "entropy": entropy.detach(),
                **_gradients(total, leaves),
            }

        return Problem(run, inputs, {"hidden": (~mask)[..., None].expand_as(inputs["hidden"])})

    return Case("linear_token_log_probs", variant, draw_problem, more_draws=_MORE_DRAWS)


def _loss_case(
    variant: str,
    *,
    bias: bool = False,
    by_token: bool = False,
    bounds: bool = False,
    kept: bool = False,
    **chosen: Any,
) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        inputs, mask, ids = _draw_head(draw, bias, kept)
        layout = StepLayout.from_mask(mask, backend="reference")
        config = clear_config(**chosen)
        options: dict[str, Any] = clear_bounds(layout) if bounds else {}
        options["support"] = _support(draw, kept, ids, mask, inputs["weight"])
        hidden = torch.where(mask[..., None], inputs["hidden"].double(), 0.0)
        exact = torch.nn.functional.linear(hidden, inputs["weight"].double())
        log_probs = token_log_probs(
            exact, ids, mask=mask, support=options["support"], backend="reference"
        )
        assert isinstance(log_probs, Tensor)
        inputs["old_log_probs"] = draw.rounded(log_probs + 0.1 * draw.normal(*mask.shape))
        # Some steps, or tokens, are dead.
        shape = mask.shape if by_token else (layout.num_steps,)
        inputs["advantages"] = draw.rounded(draw.normal(*shape) * draw.flags(0.6, *shape))
        chunk, upstream = draw.choice((None, 1, 7, 64)), draw.upstream()

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            leaves = _leaves(inputs)
            rest = (ids, inputs["old_log_probs"], inputs["advantages"], layout)
            if backend == "reference" and leaves["weight"].dtype in checks.HALF_DTYPES:
                found = steppo_loss_from_logits(
                    _plain_logits(leaves, mask), *rest, config=config, backend=backend, **options
                )
            else:
                found = linear_steppo_loss(
                    leaves["hidden"],
                    leaves["weight"],
                    *rest,
                    bias=leaves.get("bias"),
                    config=config,
                    chunk_tokens=chunk,
                    backend=backend,
                    **options,
                )
            return {"loss": found.loss.detach(), **_gradients(found.loss, leaves, upstream)}

        unread = {"hidden": (~mask)[..., None].expand_as(inputs["hidden"]), "old_log_probs": ~mask}
        return Problem(run, inputs, unread)

    return Case("linear_steppo_loss", variant, draw_problem, more_draws=_MORE_DRAWS)


CASES: tuple[Case, ...] = (
    _log_probs_case("one temperature"),
    _log_probs_case("bias, temperature per token", bias=True, temperature=True),
    _log_probs_case("kept sets", bias=True, kept=True),
    _loss_case("geometric"),
    _loss_case("kept sets", bias=True, kept=True, entropy_coef=0.1),
    _loss_case("bias", bias=True),
    _loss_case("centered", ratio="centered"),
    _loss_case("trajectory_mean", reduction="trajectory_mean"),
    _loss_case("entropy", entropy_coef=0.1),
    _loss_case("advantages per token", by_token=True),
    _loss_case("clip of tokens", token_clip=(50.0, 50.0)),
    _loss_case("bounds per step", bounds=True),
    *(_loss_case(surrogate, surrogate=surrogate) for surrogate in SURROGATES if surrogate != "tv"),
    *(
        _loss_case(f"{surrogate}, token", by_token=True, ratio="token", surrogate=surrogate)
        for surrogate in SURROGATES
        # It squares the ratio, and with it what half precision does to the ratio of a token.
        if surrogate != "quadratic"
    ),
)
