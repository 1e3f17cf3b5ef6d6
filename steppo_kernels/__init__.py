"""Step-level policy optimization (StepPO, arXiv 2604.18401), fused, for LLM agents."""

from ._version import __version__
from .broadcast import broadcast_to_tokens
from .config import StepPOConfig
from .gae import step_gae
from .layout import StepLayout
from .linear_steppo_loss import linear_steppo_loss
from .linear_token_log_probs import linear_token_log_probs
from .logits_loss import steppo_loss_from_logits
from .modules import StepPOLoss, StepValueLoss
from .outputs import Metrics, StepAdvantages, StepPOOutput
from .policy_loss import steppo_loss
from .token_log_probs import token_log_probs
from .value_loss import step_value_loss

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
