"""Step-level policy optimization (StepPO, arXiv 2604.18401), fused, for LLM agents."""

from ._version import __version__
from .config import StepPOConfig
from .layout.broadcast import broadcast_to_tokens
from .layout.step_layout import StepLayout
from .log_probs.linear_token_log_probs import linear_token_log_probs
from .log_probs.token_log_probs import token_log_probs
from .losses.gae import step_gae
from .losses.linear_steppo_loss import linear_steppo_loss
from .losses.logits_loss import steppo_loss_from_logits
from .losses.modules import StepPOLoss, StepValueLoss
from .losses.policy_loss import steppo_loss
from .losses.value_loss import step_value_loss
from .outputs import Metrics, StepAdvantages, StepPOOutput

__all__ = [
    "Metrics",
    "StepAdvantages",
    "StepLayout",
    "StepPOConfig",
    "StepPOLoss",
    "StepPOOutput",
    "StepValueLoss",
    "__version__",
    "broadcast_to_tokens",
    "linear_steppo_loss",
    "linear_token_log_probs",
    "step_gae",
    "step_value_loss",
    "steppo_loss",
    "steppo_loss_from_logits",
    "token_log_probs",
]
