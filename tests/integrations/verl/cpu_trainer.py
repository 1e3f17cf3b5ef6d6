"""verl's synchronous trainer without inference servers: what the tests put in their place.

``VERL_USE_EXTERNAL_MODULES=cpu_platform,cpu_trainer`` selects it. Rollouts come from
`verl_rollouts.Manager`, which asks the trainer for the weights of the actor. Everything else is
verl's own: workers, engines, TransferQueue, padding, mini-batches, metrics.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transfer_queue
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import ResourcePoolManager
from verl.trainer.ppo.v1 import PPOTrainerSync, trainer_base
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.replica import RolloutReplicaRegistry


class CPUActor(ActorRolloutRefWorker):
    """The worker of the actor, which also hands out its weights."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def full_weights(self) -> dict[str, torch.Tensor]:
        parameters, _ = self.actor.engine.get_per_tensor_param()
        return {name: value.float().cpu().clone() for name, value in parameters}


class Client:
    """What rollouts are given of the trainer."""

    def __init__(self, trainer: PPOTrainerSync) -> None:
        self._trainer = trainer

    def weights(self) -> dict[str, torch.Tensor]:
        return self._trainer.actor_rollout_wg.full_weights()[0]


_FIELDS = ("response_mask", "rm_scores", "values", "advantages", "returns", "extra_fields")
_update_critic = PPOTrainerSync._update_critic


def _update_critic_and_dump(self: PPOTrainerSync, batch: Any, metrics: dict[str, Any]) -> Any:
    """Write what the trainer computed of the batch where STEPPO_DUMP says."""
    path = os.environ.get("STEPPO_DUMP")
    if path:
        fields = [*_FIELDS, *(["token_level_rewards"] if self.use_reference_policy else [])]
        got = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        extra = [getattr(one, "data", one) for one in got.pop("extra_fields")]
        rows = {name: list(got[name].unbind()) for name in fields if name != "extra_fields"}
        tags = [bool(tag.get("is_padding", False)) for tag in batch.tags]
        torch.save(
            {"keys": list(batch.keys), "is_padding": tags, "extra_fields": extra, **rows}, path
        )
    return _update_critic(self, batch, metrics)


PPOTrainerSync._update_critic = _update_critic_and_dump
PPOTrainerSync._enable_hybrid_replicas = False
PPOTrainerSync.get_llm_client = lambda self: Client(self)
for _hook in ("on_init_end", "on_step_end", "on_sample_end"):
    setattr(PPOTrainerSync, _hook, lambda self: None)
trainer_base.ActorRolloutRefWorker = CPUActor
# It counts GPUs alone.
ResourcePoolManager._check_resource_available = lambda self: None
RolloutReplicaRegistry.register("cpu", lambda: object)
