"""StepPO inside of verl: policy losses, the critic's loss, and a trainer whose actions are steps.

verl imports this module by itself wherever the package is installed, through the entry point
`verl.plugins`, or by ``VERL_USE_EXTERNAL_MODULES=steppo_kernels.integrations.verl``. The import
registers under verl's own names:

    actor_rollout_ref.actor.policy_loss.loss_mode=steppo (or capo)
    trainer.v1.trainer_mode=steppo_sync
    algorithm.adv_estimator=step_gae

The trainer is registered where TransferQueue is installed, without which verl itself has no such
trainer. A failure is logged as an error with its traceback, because verl goes on without a plugin
that raises.
"""

from __future__ import annotations

import importlib.util

from .failures import reported

with reported("verl: the policy losses `steppo` and `capo` are not registered"):
    from .policy_config import StepPOPolicyLossConfig
    from .policy_losses import capo, steppo
    from .value_loss import step_critic_loss

__all__ = ["StepPOPolicyLossConfig", "capo", "step_critic_loss", "steppo"]

if importlib.util.find_spec("transfer_queue") is not None:
    with reported("verl: the trainer `steppo_sync` is not registered"):
        from .trainer import StepPOTrainerSync, StepTrainerMixin
        from .trainer_config import StepPOTrainerConfig

    __all__ += ["StepPOTrainerConfig", "StepPOTrainerSync", "StepTrainerMixin"]
