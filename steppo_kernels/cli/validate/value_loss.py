"""Cases of `step_value_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...config import Reduction
from ...layout.step_layout import StepLayout
from ...losses.value_loss import step_value_loss
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw, border
from .layouts import random_layout

# How far, at least, the two branches of the clipped loss stay apart.
_CLEAR = 1e-3


def _case(
    variant: str,
    *,
    per_token: bool = True,
    clipped: bool = True,
    reduction: Reduction = "step_mean",
    returns_per_token: bool = False,
    weighted: bool = False,
    normalizer: bool = False,
) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        layout = random_layout(draw)
        shape = layout.shape if per_token else torch.Size((layout.num_steps,))
        new = draw.normal(*shape)
        inputs = {"values": draw.rounded(new)}
        unread = {"values": _unread(layout, shape if per_token else None)}
        if clipped:
            inputs["old_values"] = draw.rounded(new + 0.6 * draw.normal(*shape))
            unread["old_values"] = unread["values"]
        inputs["returns"] = draw.rounded(draw.normal(layout.num_steps))
        clip = _keep_clear(inputs, layout, per_token) if clipped else 0.5
        unread["returns"] = layout.step_lengths == 0
        if weighted:
            inputs["step_weights"] = draw.rounded(draw.uniform(0.0, 1.0, layout.num_steps))
            unread["step_weights"] = unread["returns"]
        if returns_per_token:
            inputs["returns"] = _at_states(inputs["returns"], layout)
            unread["returns"] = _unread(layout, layout.shape)
        total = torch.tensor(draw.integer(1, 50), device=layout.device) if normalizer else None
        upstream = draw.upstream()

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            values = inputs["values"].detach().clone().requires_grad_()
            found = step_value_loss(
                values,
                inputs["returns"],
                layout,
                old_values=inputs.get("old_values"),
                clip=clip,
                reduction=reduction,
                step_weights=inputs.get("step_weights"),
                normalizer=total,
                backend=backend,
            )
            (grad,) = torch.autograd.grad(found.loss, values, torch.full_like(found.loss, upstream))
            return {
                "loss": found.loss.detach(),
                "grad_values": grad,
                **{f"metrics.{name}": found.metrics[name] for name in found.metrics},
            }

        return Problem(run, inputs, unread)

    return Case("step_value_loss", variant, draw_problem)


def _unread(layout: StepLayout, shape: torch.Size | None) -> Tensor:
    empty = layout.step_lengths == 0
    if shape is None:
        return empty
    unread = torch.ones(shape.numel(), dtype=torch.bool, device=layout.device)
    unread[layout.state_index[~empty]] = False
    return unread.view(shape)


def _at_states(per_step: Tensor, layout: StepLayout) -> Tensor:
    """Return numbers of the steps at the positions of their values, 0 elsewhere."""
    kept = layout.step_lengths > 0
    per_token = per_step.new_zeros(layout.shape)
    per_token.view(-1)[layout.state_index[kept]] = per_step[kept]
    return per_token


def _keep_clear(inputs: dict[str, Tensor], layout: StepLayout, per_token: bool) -> float:
    """Return a clip clear of every |v - v_old|, and move returns that lie at a switch.

    The larger of the two squares changes where the return is midway between v and v_old + clip.
    """
    kept = layout.step_lengths > 0

    def at_steps(name: str) -> Tensor:
        values = inputs[name].double().reshape(-1)
        return values[layout.state_index[kept]] if per_token else values[kept]

    v, old = at_steps("values"), at_steps("old_values")
    target = inputs["returns"].double()[kept]
    clip = border((v - old).abs(), 0.0, 0.5, least=_CLEAR)
    moved = old + (v - old).clamp(-clip, clip)
    at_switch = ((v - target).abs() - (moved - target).abs()).abs() < _CLEAR
    # Far out, the squares differ by much more than by how far v was moved.
    target = torch.where(at_switch, v + 4.0, target)
    inputs["returns"][kept] = target.to(inputs["returns"].dtype)
    return clip


CASES: tuple[Case, ...] = (
    _case("per token, clipped"),
    _case("per step, clipped", per_token=False),
    _case("not clipped", clipped=False),
    _case("trajectory_mean", reduction="trajectory_mean"),
    _case("token_mean", reduction="token_mean"),
    _case("sum", reduction="sum"),
    _case("returns per token", returns_per_token=True),
    _case("step_weights", weighted=True),
    _case("normalizer", normalizer=True),
)
