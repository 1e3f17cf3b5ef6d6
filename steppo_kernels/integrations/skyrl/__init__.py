"""StepPO as a policy loss of SkyRL, through its public registry.

    from steppo_kernels.integrations.skyrl import register_steppo

    register_steppo()  # in the script that starts the training, before Ray

and then ``trainer.algorithm.policy_loss_type=steppo``. SkyRL hands what is registered to its
workers, where this package has to be installed too.
"""

from __future__ import annotations

try:
    from .policy_loss import SkyRLPolicyLoss, register_steppo
except ModuleNotFoundError as error:
    if error.name != "skyrl":
        raise
    raise ModuleNotFoundError(
        "skyrl: it is not installed, expected pip install 'skyrl[fsdp]==0.3.0'", name="skyrl"
    ) from error

__all__ = ["SkyRLPolicyLoss", "register_steppo"]
