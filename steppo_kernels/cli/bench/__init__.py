"""Every public function on every backend, next to plain PyTorch and `torch.compile` of that.

A case is a way to call a function, with sizes for a CPU and for a GPU. Its variants are the
reference backend (``"eager"``), what `torch.compile` makes of it, and the other backends. Each must
give the right answer before it is timed: that of the reference in a wider dtype.

A budget bounds the whole: see `run`. What has no time is left out, and its row says so.

One module an operation holds its cases: a new one adds its module to `CASES`.
"""

from . import (
    broadcast,
    critic_free,
    gae,
    layouts,
    lm_head,
    logits_loss,
    policy_loss,
    rollout_weights,
    step_log_ratios,
    token_log_probs,
    value_loss,
)
from .case import Case
from .report import Report, as_json, show
from .row import COMPILED, EAGER, Row
from .run import bench
from .targets import without_meaning

# The simple ones come first: in this order `torch.compile` gets what time there is, and a loss
# takes it ten times as long as a sum.
CASES: tuple[Case, ...] = (
    *layouts.CASES,
    *broadcast.CASES,
    *step_log_ratios.CASES,
    *rollout_weights.CASES,
    *gae.CASES,
    *critic_free.CASES,
    *value_loss.CASES,
    *token_log_probs.CASES,
    *policy_loss.CASES,
    *logits_loss.CASES,
    *lm_head.CASES,
)

__all__ = [
    "CASES",
    "COMPILED",
    "EAGER",
    "Case",
    "Report",
    "Row",
    "as_json",
    "bench",
    "show",
    "without_meaning",
]
