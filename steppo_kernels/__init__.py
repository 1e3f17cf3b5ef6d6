"""Step-level policy optimization (StepPO, arXiv 2604.18401), fused, for LLM agents."""

from ._version import __version__
from .broadcast import broadcast_to_tokens
from .config import StepPOConfig
from .gae import step_gae
from .layout import StepLayout
from .modules import StepPOLoss, StepValueLoss
from .outputs import Metrics, StepAdvantages, StepPOOutput
from .policy_loss import steppo_loss
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
    "step_gae",
    "step_value_loss",
    "steppo_loss",
]
