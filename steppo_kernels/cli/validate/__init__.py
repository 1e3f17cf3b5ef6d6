"""Every operation on every backend against the fp64 reference, on fresh random batches.

The answer is the reference in fp64 on the same inputs, already rounded to the dtype under test. The
yardstick is plain PyTorch: the reference in that dtype. A backend may err twice as far, and a few
units in the last place more. Where plain PyTorch rounds in other places than a backend, its error
on one batch is a matter of luck: there the yardstick is at least its mean error on more draws (see
`Case.more_draws`). Beside that, each call must give the same bits again, and may not let anything
through from slots that it has no business to read: those hold NaN and infinities.

The objective jumps where a ratio meets its clip, or a value its range. There a rounding error
decides between two answers that are both right, so batches are drawn clear of it: hyper-parameters
are placed in gaps of the very numbers that they are compared with (see `draw.border`).

One module an operation holds its cases: a new one adds its module to `CASES`.
"""

from . import (
    broadcast,
    gae,
    layouts,
    lm_head,
    policy_loss,
    rollout_weights,
    step_log_ratios,
    token_log_probs,
    value_loss,
)
from .case import Case
from .run import DTYPES, Row, validate, widest

CASES: tuple[Case, ...] = (
    *layouts.CASES,
    *broadcast.CASES,
    *gae.CASES,
    *value_loss.CASES,
    *policy_loss.CASES,
    *step_log_ratios.CASES,
    *rollout_weights.CASES,
    *token_log_probs.CASES,
    *lm_head.CASES,
)

__all__ = ["CASES", "DTYPES", "Case", "Row", "validate", "widest"]
