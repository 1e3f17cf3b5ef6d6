"""Cases of `rollout_weights`."""

from __future__ import annotations

import itertools

import torch

from ...backends.choice import Backend
from ...losses.rollout_weights import Level, Outside, Pool, rollout_weights
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw, border
from .layouts import random_layout

# Rounding in fp32 does not carry a weight from one side of a bound to the other.
_LEAST = 1e-4


def _case(level: Level, pool: Pool, outside: Outside, *, masked: bool = False) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        layout = draw.mask() if masked else random_layout(draw)
        shape = layout.shape
        old = -2.0 * draw.normal(*shape).abs() - 0.01
        rollout = old + draw.choice((1e-2, 0.3)) * draw.normal(*shape)
        inputs = {"old_log_probs": draw.rounded(old), "rollout_log_probs": draw.rounded(rollout)}
        is_masked = ~layout if isinstance(layout, torch.Tensor) else layout.step_ids < 0
        # Without bounds, weights are the raw ones; those of masked positions are 1.
        raw = rollout_weights(
            inputs["old_log_probs"].double(),
            inputs["rollout_log_probs"].double(),
            layout,
            level=level,
            pool=pool,
            backend="reference",
        ).weights.view(-1)
        high = border(raw, 1.0, 2.0, least=_LEAST)
        low = max(-border(-raw, -1.0, -0.5, least=_LEAST), 0.0)

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            found = rollout_weights(
                inputs["old_log_probs"],
                inputs["rollout_log_probs"],
                layout,
                level=level,
                pool=pool,
                low=low,
                high=high,
                outside=outside,
                backend=backend,
            )
            metrics = {f"metrics.{name}": found.metrics[name] for name in found.metrics}
            return {"weights": found.weights, **metrics}

        return Problem(run, inputs, dict.fromkeys(inputs, is_masked))

    name = f"{level}, {pool}, {outside}{', mask' * masked}"
    return Case("rollout_weights", name, draw_problem)


_LEVELS: tuple[Level, ...] = ("token", "step", "trajectory")
_POOLS: tuple[Pool, ...] = ("mean", "sum")
_OUTSIDE: tuple[Outside, ...] = ("truncate", "mask")
CASES: tuple[Case, ...] = (
    *(_case(*kind) for kind in itertools.product(_LEVELS, _POOLS, _OUTSIDE)),
    *(_case(level, "mean", "truncate", masked=True) for level in _LEVELS),
)
