"""An fp64 oracle of the package in plain loops, written from the equations and from nothing else.

It shares no code with the package, its layouts included, so that a test against it can fail for
a mistake that the package makes everywhere alike. Numbers are Python floats in flat lists.
"""

from oracle.gae import Advantages, step_gae
from oracle.layout import OracleLayout
from oracle.log_probs import head_gradients, head_logits, log_prob_gradients, log_probs
from oracle.markers import marker_actions
from oracle.policy_loss import LossConfig, PolicyLoss, policy_loss, step_log_ratios
from oracle.rollout_weights import RolloutWeights, rollout_weights
from oracle.value_loss import ValueLoss, value_loss

__all__ = [
    "Advantages",
    "LossConfig",
    "OracleLayout",
    "PolicyLoss",
    "RolloutWeights",
    "ValueLoss",
    "head_gradients",
    "head_logits",
    "log_prob_gradients",
    "log_probs",
    "marker_actions",
    "policy_loss",
    "rollout_weights",
    "step_gae",
    "step_log_ratios",
    "value_loss",
]
