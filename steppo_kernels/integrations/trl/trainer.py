"""The trainer: the hooks of TRL, and what each of them calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ...layout.broadcast import broadcast_to_tokens
from ...layout.step_layout import StepLayout
from . import critic as critics
from . import heads, loss, metrics, options
from .advantages import AdvantageFunction, advantages_of
from .arguments import StepPOTrainingArguments
from .denominators import Denominators, count_of
from .rewards import StepRewards, by_source, checked_rollout, own_reward_functions
from .samples import LocalSteps


class StepPOTrainer(GRPOTrainer):
    """A `GRPOTrainer` of TRL whose advantages and loss are of steps.

    A step is a run of tokens that the policy wrote: of ones in ``completion_mask * tool_mask``.
    Rollouts come from `rollout_func`, `environment_factory`, `tools` or plain generation, as in
    TRL. Rewards of steps come from the rollout or the environment, as `step_rewards`, or the reward
    of the completion falls to its last step.

    Args:
        model: as in `GRPOTrainer`.
        reward_funcs: as in `GRPOTrainer`. None logs the sum of the rewards of steps, where an
            environment has no `get_reward` and rewards are those of steps.
        args: `StepPOTrainingArguments`.
        train_dataset: as in `GRPOTrainer`.
        advantage_func: takes the `StepSamples` of a generation and returns their advantages
            ``[S]``, on every rank alike. None is what the arguments say.
        **grpo: the other arguments of `GRPOTrainer`, by their names.

    Attributes:
        step_fused: whether the patched model computes the loss.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> from datasets import Dataset
        >>> from steppo_kernels.integrations.trl import StepPOTrainer, StepPOTrainingArguments
        >>> def train(model, tokenizer, rollout):
        ...     trainer = StepPOTrainer(
        ...         model,
        ...         args=StepPOTrainingArguments("out", max_steps=10),
        ...         train_dataset=Dataset.from_dict({"prompt": ["Go!"] * 8}),
        ...         processing_class=tokenizer,
        ...         rollout_func=rollout,
        ...     )
        ...     trainer.train()
    """

    _tag_names = ["trl", "steppo"]  # noqa: RUF012 - as in TRL
    _name = "StepPO"
    _paper = {"title": "StepPO", "id": "2604.18401"}  # noqa: RUF012

    args: StepPOTrainingArguments

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: StepPOTrainingArguments | None = None,
        train_dataset: Any = None,
        *,
        advantage_func: AdvantageFunction | None = None,
        **grpo: Any,
    ) -> None:
        args = StepPOTrainingArguments("StepPO") if args is None else args
        if not isinstance(args, StepPOTrainingArguments):
            raise TypeError(
                f"args: got {type(args).__name__}, expected StepPOTrainingArguments, which has all "
                "that GRPOConfig has"
            )
        args.check()
        if args.step_critic:
            _prepare_critic(model, args, grpo)
        rollout = grpo.get("rollout_func")
        if rollout is not None:
            grpo["rollout_func"] = checked_rollout(rollout)
        environment = grpo.get("environment_factory")
        has_steps = rollout is not None or environment is not None
        if reward_funcs is None and has_steps and args.step_reward_source == "steps":
            reward_funcs = own_reward_functions(environment)
        super().__init__(model, reward_funcs, args, train_dataset, **grpo)
        options.refuse_of_trainer(self)
        self._advantage_func = advantage_func
        policy = self.accelerator.unwrap_model(self.model)
        options.warn_of_dropout(policy, args)
        self.step_fused = heads.choose_fused(policy, args)
        if self.step_fused and self.ref_model is not None:
            heads.patch(self.accelerator.unwrap_model(self.ref_model))
        self._critic: critics.Critic | None = None
        if args.step_critic:
            base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
            critics.add_value_head(base)
            self._critic = critics.Critic(base, args.step_value_trains_body)
            if args.sync_ref_model:
                # TRL mixes the parameters of both models pair by pair.
                critics.add_value_head(self.accelerator.unwrap_model(self.ref_model))
            if self.use_vllm:
                critics.keep_from_engine(self.vllm_generation)
        self._rewards = StepRewards()
        self._tool_masks: list[list[int]] | None = None
        self._scores: Tensor | None = None
        self._denominators = Denominators(
            args.step_config.reduction, self.accelerator.num_processes
        )
        self._normalizer: float | None = None

    # Rollouts: what is noted on the way.

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self._rewards.note_message(self.environments)
        return super()._generate_single_turn(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        self._rewards.clear()
        found = super()._generate(prompts)
        _, _, tool_masks, _, _, fields, *_ = found
        self._tool_masks = tool_masks
        self._rewards.note_rollout(fields)
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards.note_message(self.environments)
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        scores = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        scores[rewards.isnan().all(dim=1)] = torch.nan
        self._scores = scores
        return rewards

    # Log-probs of the old and of the reference policy: from the code that gives the new ones.

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self.step_fused:
            found: Any = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
            log_probs, entropies, aux_loss = found
            return log_probs, entropies, aux_loss
        mask = attention_mask[:, -logits_to_keep:]
        mask = mask * heads.padded_mask(self._tool_masks, mask)
        parts = []
        for rows in torch.arange(len(mask), device=mask.device).split(batch_size or len(mask)):
            inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
            parts.append(heads.fused_log_probs(self, model, inputs, mask[rows], compute_entropy))
        log_probs = torch.cat([part[0] for part in parts])
        entropies = [part[1] for part in parts if part[1] is not None]
        return log_probs, torch.cat(entropies) if entropies else None, None

    # Advantages.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._tool_masks = None
        training = self.model.training
        steps = LocalSteps(heads.action_mask(batch))
        scores, source = self._scores, self.args.step_reward_source
        assert scores is not None
        start = self.accelerator.process_index * len(inputs)
        given = [] if source == "final" else self._rewards.of_steps(steps.runs)
        own_scores = scores[start : start + len(inputs)].tolist()
        rewards = by_source(source, given, steps.runs, own_scores)
        values = None
        if self._critic is not None:
            batch[loss.OLD_VALUES] = self._values(batch)
            values = batch[loss.OLD_VALUES].reshape(-1)[steps.layout.state_index]
        samples = steps.gather(
            rewards,
            values,
            scores,
            self.num_generations if training else self.num_generations_eval,
            self.accelerator,
        )
        found = advantages_of(samples, self.args, self._advantage_func)
        layout = steps.layout
        batch["advantages"] = broadcast_to_tokens(steps.own(found.advantages, 0.0), layout)
        if self._critic is not None:
            own = steps.own(found.returns, torch.nan)
            batch[loss.RETURNS] = broadcast_to_tokens(own, layout)
        metrics.log_samples(self._metrics["train" if training else "eval"], samples)
        return batch

    @torch.no_grad()
    def _values(self, batch: dict[str, Any]) -> Tensor:
        """Return the values of the states before the tokens of completions, ``[B, C]``."""
        assert self._critic is not None
        args, inputs = self.args, loss.model_inputs(batch)
        length = batch["completion_ids"].shape[1]
        size = args.per_device_train_batch_size
        if not self.model.training:
            size = args.per_device_eval_batch_size
        found = []
        for rows in torch.arange(len(inputs["input_ids"]), device="cpu").split(size):
            part = {name: given[rows] for name, given in inputs.items()}
            with self._critic.listening() as heard:
                heads.run_body(self, self.model, part, length)
            found.append(critics.of_completions(heard[0], length))
        return torch.cat(found)

    # Losses.

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._normalizer = None
            return inputs
        is_new = self._buffered_inputs is not before
        if is_new:
            reduction = self.args.step_config.reduction
            layouts = [StepLayout.from_mask(heads.action_mask(p)) for p in self._buffered_inputs]
            counts = torch.stack([count_of(layout, reduction) for layout in layouts])
            self._denominators.begin_generation(
                self.accelerator.reduce(counts, reduction="sum").tolist(),
                self._step,
                self.args.steps_per_generation * self.num_iterations,
            )
        self._normalizer, scale = self._denominators.at(
            self._step, self.current_gradient_accumulation_steps, is_new=is_new
        )
        if scale != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        normalizer = self._normalizer
        if self._critic is None:
            policy, layout = loss.policy_loss(self, model, inputs, normalizer)
            total = policy.loss
        else:
            with self._critic.listening() as heard:
                policy, layout = loss.policy_loss(self, model, inputs, normalizer)
            value = loss.value_loss(self, heard[0], inputs, layout, normalizer)
            total = policy.loss + self.args.step_value_coef * value.loss
            metrics.log_critic(self, value, layout, normalizer, mode)
        metrics.log_policy(self, policy, layout, normalizer, mode)
        metrics.log_extremes(self, policy, layout, inputs["advantages"], mode)
        return total


def _prepare_critic(model: Any, args: StepPOTrainingArguments, grpo: dict[str, Any]) -> None:
    """Let a value head be trained and saved, where that has to be said before TRL sets up.

    Raises:
        TypeError: the model or its adapter is there too late or too early for that.
        ValueError: DistributedDataParallel would look for unused parameters, or the optimizer does
            not know the value head.
    """
    optimizer, _ = grpo.get("optimizers") or (None, None)
    if optimizer is not None:
        raise ValueError(
            f"optimizers: got {type(optimizer).__name__} with step_critic, expected None: it was "
            "made before the value head was there, and would not train it"
        )
    if hasattr(model, "peft_config"):
        raise TypeError(
            "model: got a PEFT model with step_critic, expected a plain one and peft_config: the "
            "value head is saved with the adapter"
        )
    if grpo.get("peft_config") is not None:
        if isinstance(model, str):
            raise TypeError(
                f"model: got {model!r} with step_critic and peft_config, expected a model that is "
                "loaded: the value head is added before the adapter"
            )
        critics.add_value_head(model)
        grpo["peft_config"] = critics.saved_with_adapter(grpo["peft_config"])
    if args.ddp_find_unused_parameters:
        raise ValueError(
            "ddp_find_unused_parameters: got True with step_critic, expected False or None: the "
            "value head would be taken for unused, as no output of the model shows it"
        )
    args.ddp_find_unused_parameters = False
