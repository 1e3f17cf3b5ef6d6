"""The policy loss that SkyRL's registry is given."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import apply_off_policy_correction
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from torch import Tensor

from ... import checks
from ...config import StepPOConfig
from ...losses.policy_loss import steppo_loss
from ..masks import layout_of

# Fields of `StepPOConfig` that SkyRL has settings for, and these.
_OF_SKYRL = {
    "clip_low": "eps_clip_low",
    "clip_high": "eps_clip_high",
    "soft_temperature": "sapo.tau_pos and sapo.tau_neg",
    "reduction": "loss_reduction",
    "kl_coef": "kl_loss_coef",
    "kl_estimator": "kl_estimator_type",
    "entropy_coef": "entropy_loss_coef",
}


@dataclass(frozen=True)
class SkyRLPolicyLoss:
    """A step-level policy loss with the arguments and the contract of SkyRL's.

    SkyRL divides the advantages of a mini-batch by what its reduction divides by, and takes the sum
    over the tokens of each call, so that micro-batches and ranks add up. That is `steppo_loss` of
    these advantages with the reduction ``"token_mean"`` and the normalizer 1, as every surrogate is
    proportional to the size of the advantage. Instances can be pickled.

    Attributes:
        family: the fields of `StepPOConfig` that SkyRL has no setting for, as pairs.
        rows_are_steps: whether a row is one step; else every run of ones in its mask is.
        ratio_center: as in `steppo_loss`.

    Example:
        >>> import torch
        >>> from skyrl.train.config import AlgorithmConfig
        >>> from steppo_kernels.integrations.skyrl import SkyRLPolicyLoss
        >>> log_probs, mask = torch.zeros(1, 4, requires_grad=True), torch.tensor([[1, 1, 0, 1]])
        >>> config = AlgorithmConfig(eps_clip_low=3e-4, eps_clip_high=4e-4)
        >>> divided = torch.full((1, 4), 2 / 3)  # by the three tokens of the mini-batch
        >>> loss, metrics = SkyRLPolicyLoss()(log_probs, torch.zeros(1, 4), divided, config, mask)
        >>> loss.item(), metrics["step_ratio_mean"]
        (-2.0, 1.0)
    """

    family: tuple[tuple[str, Any], ...] = ()
    rows_are_steps: bool = False
    ratio_center: float | None = None

    def __post_init__(self) -> None:
        known = {field.name for field in fields(StepPOConfig)}
        for name, value in self.family:
            if name in _OF_SKYRL:
                raise ValueError(
                    f"{name}: got {value!r}, expected SkyRL's setting "
                    f"trainer.algorithm.{_OF_SKYRL[name]}"
                )
            if name not in known:
                raise ValueError(
                    f"{name}: got {value!r}, expected one of "
                    f"{', '.join(sorted(known - set(_OF_SKYRL)))}"
                )
        # Values that mean nothing together raise here, and not in the workers.
        made = StepPOConfig(**dict(self.family))
        checks.switch("rows_are_steps", self.rows_are_steps)
        if self.ratio_center is not None and made.ratio != "centered":
            raise ValueError(
                f"ratio_center: got {self.ratio_center!r} with the ratio {made.ratio!r}, expected "
                "None: it is the center of the ratio 'centered'"
            )
        checks.scalar("ratio_center", self.ratio_center, torch.device("cpu"))

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and its metrics.

        Args:
            log_probs: ``[B, T]``, of the current policy.
            old_log_probs: ``[B, T]``.
            advantages: ``[B, T]``, each divided by what the reduction divides by.
            config: SkyRL's algorithm config: its bounds and its off-policy correction are read.
            loss_mask: ``[B, T]``, 0/1; None is all ones.
            rollout_logprobs: ``[B, T]``, of the inference engine, for the correction.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        given = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        mask = checks.flags("loss_mask", given, None, log_probs.device)
        weights, metrics = _correction(config, mask, old_log_probs, rollout_logprobs)
        found = steppo_loss(
            log_probs,
            old_log_probs,
            checks.as_many("advantages", advantages, mask.shape),
            layout_of(mask, rows_are_steps=self.rows_are_steps),
            config=self._config(config),
            is_weights=weights,
            normalizer=1.0,
            ratio_center=self.ratio_center,
        )
        numbers = found.metrics.as_dict()
        return found.loss, metrics | {
            "clip_ratio": numbers["token_clip_fraction"],
            "step_clip_ratio": numbers["clip_fraction"],
            "step_ratio_mean": numbers["ratio_mean"],
            "approx_kl": numbers["approx_kl"],
        }

    def _config(self, config: Any) -> StepPOConfig:
        family = dict(self.family)
        if family.get("surrogate") == "soft":
            bounds: dict[str, Any] = {
                "soft_temperature": (config.sapo.tau_pos, config.sapo.tau_neg)
            }
        else:
            bounds = {"clip_low": config.eps_clip_low, "clip_high": config.eps_clip_high}
        return StepPOConfig(reduction="token_mean", **bounds, **family)


def register_steppo(
    name: str = "steppo",
    *,
    rows_are_steps: bool = False,
    ratio_center: float | None = None,
    **family: Any,
) -> SkyRLPolicyLoss:
    """Register a loss under a name for ``trainer.algorithm.policy_loss_type``, and return it.

    Args:
        name: of the loss; SkyRL refuses one that is taken.
        rows_are_steps: whether each row is one step, as in step-wise training whose rows have gaps
            in their masks. False: every run of ones in a row's mask is a step.
        ratio_center: as in `steppo_loss`; None is the mean over a micro-batch of one rank.
        family: the fields of `StepPOConfig` that SkyRL has no setting for: `ratio`, `surrogate`,
            `dual_clip`, `token_clip`, `log_ratio_max`.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> from steppo_kernels.integrations.skyrl import register_steppo
        >>> register_steppo("cispo_of_tokens", ratio="token", surrogate="cispo").rows_are_steps
        False
    """
    made = SkyRLPolicyLoss(tuple(family.items()), rows_are_steps, ratio_center)
    PolicyLossRegistry.register(name, made)
    return made


def _correction(
    config: Any, mask: Tensor, old_log_probs: Tensor, rollout_logprobs: Tensor | None
) -> tuple[Tensor | None, dict[str, float]]:
    """Return SkyRL's own correction as weights of tokens: 0 where it takes a token out."""
    if rollout_logprobs is None:
        return None, {}
    weights, kept, metrics = apply_off_policy_correction(
        torch.ones_like(old_log_probs),
        old_log_probs,
        rollout_logprobs,
        mask.to(old_log_probs.dtype),
        config.off_policy_correction,
    )
    return torch.where(kept > 0, weights, 0.0), dict(metrics)
