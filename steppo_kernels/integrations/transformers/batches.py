"""What a patched model is called with, and what it computes at the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from ...backends.choice import Backend
from ...config import DEFAULT_CONFIG, StepPOConfig
from ...layout.step_layout import StepLayout
from ...log_probs.linear_token_log_probs import linear_token_log_probs
from ...log_probs.sharded_head import on_shards
from ...log_probs.token_support import TokenSupport
from ...losses.linear_steppo_loss import linear_steppo_loss
from ...outputs import StepPOOutput
from .placement import Placed, States


def _count(name: str, value: int | None) -> int | None:
    return None if value is None else checks.count(name, value)


def _shifted(shifted: bool, logits_to_keep: int | None, token_ids: Tensor | None) -> bool:
    """Return a switch that goes with some arguments alone."""
    if checks.switch("shifted", shifted):
        if token_ids is None:
            raise ValueError(
                "token_ids: got None with shifted=True, expected the tokens that the states predict"
            )
        if logits_to_keep is not None:
            raise ValueError(
                f"logits_to_keep: got {logits_to_keep} with shifted=True, expected None"
            )
    return shifted


# What travels through a model's arguments is neither dataclass, tuple nor mapping: wrappers look
# into those, and FSDP's mixed precision would round the log-probs in them to bf16.
class StepPOBatch:
    """A batch whose `linear_steppo_loss` is wanted; its arguments, with everything at its token.

    Wrappers of the model neither cast nor move it: its tensors are on the device of the model.

    Args:
        old_log_probs: of the shape of `input_ids`; None if the policy that acted is the current.
        advantages: per step ``[S]``, or of the shape of `input_ids`.
        layout: which tokens of `input_ids` were sampled, in which steps; or a 0/1 mask. The first
            token of a row is never one, and none is padding: both raise.
        logits_to_keep: C of trainers whose `input_ids` are prompt and completion, ``[B, P + C]``,
            and all else is of the completion: the layout and whatever is given per token are then
            ``[B, C]``, of the last C tokens of each row. The first of these may be an action.
        shifted: whether everything per token stands at the place of the state that predicts the
            token already, one before the token's own: the layout, the token ids, which must be
            given, and all else. A context-parallel rank has some columns of each row, and its last
            state may predict a token that another rank has. Such a loss is that of the steps as
            this rank's part has them: a step that lies on several ranks has its ratio from
            log-probs of all of them.
        token_ids: the tokens. None takes the `labels` that the model is called with, of which only
            those at action tokens are looked at, or else its `input_ids`. With `logits_to_keep`
            they are ``[B, C]`` or of the shape of `input_ids`.
        temperature: what the policy's logits are divided by; a number or one for each token.
        support: the ids that each token could be sampled from, of the shape of `input_ids` (with
            `logits_to_keep` ``[B, C]``): see `linear_token_log_probs`.
        chunk_tokens: as in `linear_steppo_loss`.
        config: as in `steppo_loss`.
        ref_log_probs: as in `steppo_loss`.
        is_weights: as in `steppo_loss`.
        step_weights: as in `steppo_loss`.
        normalizer: as in `steppo_loss`.
        ratio_center: as in `steppo_loss`.
        clip_low: as in `steppo_loss`.
        clip_high: as in `steppo_loss`.
        report_entropy: as in `steppo_loss_from_logits`.
        backend: implementation of what is not a matrix product.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from steppo_kernels.integrations.transformers import patch_lm_head
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> patch = patch_lm_head(model)
        >>> ids = torch.randint(50, (2, 8))
        >>> mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]] * 2)
        >>> out = model(ids, steppo=StepPOBatch(None, torch.ones(4), mask))
        >>> out.loss.backward()
        >>> int(out.steppo.metrics["num_steps"])
        4
    """

    def __init__(
        self,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        layout: StepLayout | Tensor,
        *,
        logits_to_keep: int | None = None,
        shifted: bool = False,
        token_ids: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        support: TokenSupport | None = None,
        chunk_tokens: int | None = None,
        config: StepPOConfig = DEFAULT_CONFIG,
        ref_log_probs: Tensor | None = None,
        is_weights: Tensor | None = None,
        step_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        ratio_center: float | Tensor | None = None,
        clip_low: Tensor | None = None,
        clip_high: Tensor | None = None,
        report_entropy: bool = False,
        backend: Backend = "auto",
    ) -> None:
        self.old_log_probs = old_log_probs
        self.advantages = advantages
        self.layout = layout
        self.logits_to_keep = _count("logits_to_keep", logits_to_keep)
        self.shifted = _shifted(shifted, logits_to_keep, token_ids)
        self.token_ids = token_ids
        self.temperature = temperature
        self.support = support
        self.chunk_tokens = chunk_tokens
        self.config = config
        self.ref_log_probs = ref_log_probs
        self.is_weights = is_weights
        self.step_weights = step_weights
        self.normalizer = normalizer
        self.ratio_center = ratio_center
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.report_entropy = report_entropy
        self.backend: Backend = backend

    def evaluate(self, states: States) -> tuple[dict[str, Tensor], StepPOOutput | None]:
        """Return the output's tensors that come from the states before the head, and metrics."""
        part = states.part
        with on_shards("linear_steppo_loss", part.tp_group, None):
            placed = Placed(self.layout, states, self.logits_to_keep, self.shifted, self.backend)
            at_states: dict[str, Any] = {
                "token_ids": placed.token_ids,
                "old_log_probs": placed.tokens("old_log_probs", self.old_log_probs),
                "advantages": placed.tokens("advantages", self.advantages, or_steps=True),
                "layout": placed.layout,
                "support": placed.support(self.support),
                "ref_log_probs": placed.tokens("ref_log_probs", self.ref_log_probs),
                "is_weights": placed.tokens("is_weights", self.is_weights, or_steps=True),
                "temperature": states.logit_map.temperature(
                    placed.tokens("temperature", self.temperature)
                ),
            }
        found = linear_steppo_loss(
            states.hidden,
            part.weight,
            **at_states,
            bias=part.bias,
            softcap=states.logit_map.softcap,
            chunk_tokens=self.chunk_tokens,
            tp_group=part.tp_group,
            vocab_start=part.start,
            config=self.config,
            step_weights=self.step_weights,
            normalizer=self.normalizer,
            ratio_center=self.ratio_center,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            report_entropy=self.report_entropy,
            backend=self.backend,
        )
        return {"loss": found.loss}, found


class LogProbBatch:
    """A batch whose token log-probs are wanted, as of the old and of the reference policy.

    Under ``torch.no_grad()`` nothing is kept; else the log-probs are differentiable, at the cost of
    forming logits, a chunk at a time, once more (`linear_token_log_probs`).

    Args:
        layout: as in `StepPOBatch`; other tokens cost nothing and get 0.
        logits_to_keep: as in `StepPOBatch`; the log-probs and entropies are then ``[B, C]`` too.
        shifted: as in `StepPOBatch`; the log-probs and entropies are then at the places of the
            states too.
        token_ids: as in `StepPOBatch`.
        temperature: as in `StepPOBatch`.
        return_entropy: also return the entropies.
        support: as in `StepPOBatch`.
        chunk_tokens: as in `linear_token_log_probs`.
        backend: as in `StepPOBatch`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from steppo_kernels.integrations.transformers import patch_lm_head
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> patch = patch_lm_head(model)
        >>> ids = torch.randint(50, (2, 8))
        >>> mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]] * 2)
        >>> with torch.no_grad():
        ...     out = model(ids, steppo=LogProbBatch(mask, return_entropy=True))
        >>> tuple(out.log_probs.shape), bool((out.entropy[mask == 1] > 0).all())
        ((2, 8), True)
    """

    def __init__(
        self,
        layout: StepLayout | Tensor,
        *,
        logits_to_keep: int | None = None,
        shifted: bool = False,
        token_ids: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        return_entropy: bool = False,
        support: TokenSupport | None = None,
        chunk_tokens: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.layout = layout
        self.logits_to_keep = _count("logits_to_keep", logits_to_keep)
        self.shifted = _shifted(shifted, logits_to_keep, token_ids)
        self.token_ids = token_ids
        self.temperature = temperature
        self.return_entropy = return_entropy
        self.support = support
        self.chunk_tokens = chunk_tokens
        self.backend: Backend = backend

    def evaluate(self, states: States) -> tuple[dict[str, Tensor], StepPOOutput | None]:
        """Return the output's tensors that come from the states before the head, and metrics."""
        part = states.part
        with on_shards("linear_token_log_probs", part.tp_group, None):
            placed = Placed(self.layout, states, self.logits_to_keep, self.shifted, self.backend)
            temperature = placed.tokens("temperature", self.temperature)
            support = placed.support(self.support)
        found = linear_token_log_probs(
            states.hidden,
            part.weight,
            placed.token_ids,
            bias=part.bias,
            temperature=states.logit_map.temperature(temperature),
            softcap=states.logit_map.softcap,
            mask=placed.layout.step_ids >= 0,
            return_entropy=self.return_entropy,
            support=support,
            chunk_tokens=self.chunk_tokens,
            tp_group=part.tp_group,
            vocab_start=part.start,
            backend=self.backend,
        )
        values = found if isinstance(found, tuple) else (found,)
        at_tokens = (placed.at_tokens(value) for value in values)
        return dict(zip(("log_probs", "entropy"), at_tokens, strict=False)), None
