"""Step-level policy optimization (StepPO, arXiv 2604.18401), fused, for LLM agents."""

from ._version import __version__
from .config import StepPOConfig
from .layout.broadcast import broadcast_to_tokens
from .layout.ends import check_step_ends
from .layout.step_layout import StepLayout
from .log_probs.linear_token_log_probs import linear_token_log_probs
from .log_probs.token_log_probs import token_log_probs
from .log_probs.token_support import TokenSupport
from .losses.gae import step_gae
from .losses.group_normalize import group_normalize
from .losses.linear_steppo_loss import linear_steppo_loss
from .losses.logits_loss import steppo_loss_from_logits
from .losses.modules import StepPOLoss, StepValueLoss
from .losses.policy_loss import steppo_loss
from .losses.returns import step_returns
from .losses.rollout_weights import rollout_weights
from .losses.step_log_ratios import step_log_ratios
from .losses.value_loss import step_value_loss
from .outputs import Metrics, RolloutWeights, StepAdvantages, StepPOOutput

__all__ = [
    "Metrics",
    "RolloutWeights",
    "StepAdvantages",
    "StepLayout",
    "StepPOConfig",
    "StepPOLoss",
    "StepPOOutput",
    "StepValueLoss",
    "TokenSupport",
    "__version__",
    "broadcast_to_tokens",
    "check_step_ends",
    "group_normalize",
    "linear_steppo_loss",
    "linear_token_log_probs",
    "rollout_weights",
    "step_gae",
    "step_log_ratios",
    "step_returns",
    "step_value_loss",
    "steppo_loss",
    "steppo_loss_from_logits",
    "token_log_probs",
]
