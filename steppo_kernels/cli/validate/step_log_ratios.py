"""Cases of `step_log_ratios`."""

from __future__ import annotations

import torch

from ...backends.choice import Backend
from ...config import RatioKind
from ...layout.step_layout import StepLayout
from ...losses.step_log_ratios import step_log_ratios
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw
from .layouts import random_layout


def _case(ratio: RatioKind, *, masked: bool = False, center: bool = False) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        mask = draw.mask()
        layout = StepLayout.from_mask(mask, backend="reference") if masked else random_layout(draw)
        shape = layout.shape
        log_probs = -2.0 * draw.normal(*shape).abs() - 0.01
        # Their mean is not near 0, where a step alone in its call would have no digits left.
        old = log_probs + draw.choice((1e-3, 0.5)) * (1.0 + draw.normal(*shape))
        ratio_center = 0.1 * float(draw.normal()) if center else None
        inputs = {"log_probs": draw.rounded(log_probs), "old_log_probs": draw.rounded(old)}
        upstream = draw.normal(layout.num_steps)

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            leaf = inputs["log_probs"].detach().clone().requires_grad_()
            found = step_log_ratios(
                leaf,
                inputs["old_log_probs"],
                mask if masked else layout,
                ratio=ratio,
                ratio_center=ratio_center,
                backend=backend,
            )
            (grad,) = torch.autograd.grad(found, leaf, upstream.to(found))
            return {"step_log_ratios": found.detach(), "grad_log_probs": grad}

        return Problem(run, inputs, dict.fromkeys(inputs, layout.step_ids < 0))

    name = f"{ratio}{', ratio_center' * center}{', mask' * masked}"
    return Case("step_log_ratios", name, draw_problem)


_KINDS: tuple[RatioKind, ...] = ("geometric", "product", "centered", "token")
CASES: tuple[Case, ...] = (
    *(_case(ratio) for ratio in _KINDS),
    _case("centered", center=True),
    _case("geometric", masked=True),
)
