"""A trainer of verl whose advantages, returns and values are those of steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import transfer_queue
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import need_critic
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import response_to_nested

from ...layout.broadcast import broadcast_to_tokens
from ...outputs import StepAdvantages
from . import cautions, estimator
from .rows import Rows, Steps
from .trainer_config import StepPOTrainerConfig
from .value_loss import step_critic_loss

# Above this share, padding is worth a warning.
_PADDING = 0.1


class StepTrainerMixin:
    """What makes a trainer of verl one of steps: a class to inherit from, before verl's own.

    Each row is a step of the trajectory that its key names. Advantages are `step_gae` with the
    `gamma` and `lam` of verl's `algorithm`, over the steps of each trajectory and without verl's
    padding. The critic is trained by `step_critic_loss`. Everything else is the trainer's own,
    rewards with KL and the correction of rollouts included.

    Raises:
        ValueError, TypeError: a setting does not go with steps; it is named.

    Example:
        >>> from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, register_trainer
        >>> from steppo_kernels.integrations.verl import StepTrainerMixin
        >>> @register_trainer("my_steps")
        ... class MyTrainer(StepTrainerMixin, PPOTrainerColocateAsync):
        ...     pass
    """

    config: DictConfig

    def __init__(self, config: DictConfig) -> None:
        mode = config.trainer.v1.trainer_mode
        node = OmegaConf.to_container(config.trainer.v1.get(mode) or OmegaConf.create({}))
        assert isinstance(node, dict)
        self.step_config = StepPOTrainerConfig.of_node(mode, node)
        given = config.algorithm.adv_estimator
        if given != estimator.NAME:
            raise ValueError(
                f"algorithm.adv_estimator: got {given!r} with trainer.v1.trainer_mode={mode}, "
                f"expected {estimator.NAME!r}: this trainer would replace its advantages"
            )
        if not need_critic(config):
            raise ValueError(
                f"critic.enable: got {config.critic.enable!r} with trainer.v1.trainer_mode={mode}, "
                "expected true: the advantages of steps take the values of a critic"
            )
        super().__init__(config)  # type: ignore[call-arg]
        self._warned_of: set[str] = set()

    def _setup(self) -> None:
        super()._setup()  # type: ignore[misc]
        critic = omega_conf_to_dataclass(self.config.critic)
        self.critic_wg.set_loss_fn(partial(step_critic_loss, config=critic))  # type: ignore[attr-defined]

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        with estimator.trainer_follows():
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        data, steps = self._steps(batch)
        scores = data["rm_scores"].float().sum(1)
        rewards = steps.rewards(scores, self.step_config)
        if self.step_config.rewards is None and steps.look_copied(rewards):
            self._warn_once("rewards", cautions.of_copied_rewards)
        if steps.look_whole():
            self._warn_once("rows", cautions.of_whole_trajectories)
        if "token_level_rewards" in data.keys():  # noqa: SIM118
            # The scores less a KL penalty, of which the scores may be replaced.
            penalty = data["token_level_rewards"].float().sum(1) - scores
            rewards = rewards + penalty.where(steps.is_step, 0.0)
        values = data["values"][:, 0].float()
        algorithm = self.config.algorithm
        found = steps.advantages(
            rewards,
            values,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            whiten=self.step_config.whiten,
        )
        metrics.update(self._step_metrics(steps, rewards, values, found))
        return self._write(batch, steps, found)

    def _steps(self, batch: KVBatchMeta) -> tuple[TensorDict, Steps]:
        """Return what the rows of a batch hold, padded, and the steps among them."""
        names = ["response_mask", "rm_scores", "values"]
        if self.config.algorithm.use_kl_in_reward:
            names.append("token_level_rewards")
        if self.step_config.reads_extra_fields:
            names.append("extra_fields")
        got = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=names
        )
        extra_fields = got.pop("extra_fields", None)
        data = got.to_padded_tensor()
        rows = Rows(
            batch.keys,
            [bool(tag.get("is_padding", False)) for tag in batch.tags],
            data["response_mask"],
            None if extra_fields is None else [_plain(field) for field in extra_fields],
        )
        return data, Steps.of_rows(rows, self.step_config.bootstrap_key)

    def _step_metrics(
        self, steps: Steps, rewards: Tensor, values: Tensor, found: StepAdvantages
    ) -> dict[str, float]:
        layout, kept = steps.layout, steps.is_step
        padding = sum(steps.rows.is_padding) / len(kept)
        if padding > _PADDING:
            self._warn_once("padding", partial(cautions.of_padding, padding))
        num_steps = int(kept.sum())
        numbers = {
            "step/reward_mean": rewards[kept].mean(),
            "step/value_mean": values[kept].mean(),
            "step/return_mean": found.returns[kept].mean(),
            "step/advantage_error_mean": (found.returns - values)[kept].square().mean(),
        }
        return {
            "step/num_steps": num_steps,
            "step/num_trajectories": layout.num_trajectories,
            "step/steps_per_trajectory_mean": num_steps / max(1, layout.num_trajectories),
            "step/truncated_trajectories": int(steps.is_state.sum()),
            "step/padding_fraction": padding,
            **{name: number.item() for name, number in numbers.items()},
        }

    def _write(self, batch: KVBatchMeta, steps: Steps, found: StepAdvantages) -> KVBatchMeta:
        nested = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"]
        )["response_mask"]
        # Every token of a row has its return: the critic reads that of the first, which may be
        # none of the actions.
        returns = found.returns[:, None].expand(steps.rows.mask.shape).contiguous()
        fields = {
            "advantages": response_to_nested(
                broadcast_to_tokens(found.advantages, steps.layout), nested
            ),
            "returns": response_to_nested(returns, nested),
        }
        written: KVBatchMeta = transfer_queue.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(fields, batch_size=len(batch)),
        )
        return written

    def _warn_once(self, what: str, warn: Any) -> None:
        if what not in self._warned_of:
            self._warned_of.add(what)
            warn()


@register_trainer("steppo_sync")
class StepPOTrainerSync(StepTrainerMixin, PPOTrainerSync):
    """verl's synchronous trainer, with steps: ``trainer.v1.trainer_mode=steppo_sync``.

    Example:
        >>> from verl.trainer.ppo.v1 import get_trainer_cls
        >>> get_trainer_cls("steppo_sync").__name__
        'StepPOTrainerSync'
    """

    def _build_replay_buffer(self) -> Any:
        # verl takes every mode of another name for an asynchronous one, whose replay buffer drops
        # and refills prompts, and whose data comes by single prompts.
        self.trainer_mode = "sync"
        return super()._build_replay_buffer()


def _plain(field: Any) -> Any:
    """Return a row's entry as it was put, without the wrapper of TensorDict."""
    return getattr(field, "data", field)
