"""The critic's loss inside of verl: values of the states in which steps begin."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import CriticConfig
from verl.workers.utils.padding import no_padding_2_padding

from ...layout.step_layout import StepLayout
from ...losses.value_loss import step_value_loss


def step_critic_loss(
    config: CriticConfig, model_output: Any, data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Return `step_value_loss` of rows that are steps, in the place of verl's own value loss.

    Each row with an action token trains one value: that before its first token, at the end of the
    prompt. The returns are those that the trainer `steppo_sync` writes to every token of a row. The
    loss is the mean over the rows of the mini-batch on all ranks, in each `loss_agg_mode`. Rows
    without an action token, as of padding, add nothing to it but are counted: verl knows no other
    number of rows.

    Args:
        config: of which this reads `cliprange_value`.
        model_output: its `values`, of all tokens.
        data: the micro-batch, with `values`, `returns` and `response_mask`.
        dp_group: not read; verl passes it to every loss.

    Returns:
        The part of this micro-batch in the loss of the mini-batch, and metrics.

    Example:
        >>> import torch
        >>> from verl.utils.tensordict_utils import get_tensordict
        >>> from verl.workers.config import CriticConfig
        >>> from steppo_kernels.integrations.verl import step_critic_loss
        >>> def nested(*rows):
        ...     tensors = list(map(torch.tensor, rows))
        ...     return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)
        >>> data = get_tensordict(
        ...     {
        ...         "prompts": nested([5], [6, 7]),
        ...         "responses": nested([8, 9], [8]),
        ...         "response_mask": nested([1, 1], [1]),
        ...         "values": nested([0.0, 0.0], [0.0]),
        ...         "returns": nested([1.0, 1.0], [0.5]),
        ...     },
        ...     non_tensor_dict={"dp_size": 1, "global_batch_size": 2},
        ... )
        >>> model_output = {"values": nested([0.0, 4.0, 4.0], [4.0, 0.5, 4.0])}
        >>> config = CriticConfig(strategy="fsdp2", ppo_micro_batch_size_per_gpu=1)
        >>> loss, metrics = step_critic_loss(config, model_output, data)
        >>> loss.item(), metrics["critic/vpred_mean"]
        (0.25, 0.25)
    """
    values = no_padding_2_padding(model_output["values"], data)
    rows_of_rank = data["global_batch_size"] / data["dp_size"]
    padded = data.select("values", "returns", "response_mask").to_padded_tensor()
    is_step = padded["response_mask"].bool().any(1, keepdim=True)
    found = step_value_loss(
        values[:, :1],
        padded["returns"][:, :1],
        StepLayout.from_mask(is_step),
        old_values=padded["values"][:, :1],
        clip=config.cliprange_value,
        normalizer=rows_of_rank,
    )
    numbers = found.metrics.as_dict()
    return found.loss, {
        "critic/vf_loss": Metric(value=found.loss, aggregation=AggregationType.SUM),
        "critic/vf_clipfrac": numbers["clip_fraction"],
        "critic/vpred_mean": numbers["value_mean"],
        "critic/step_explained_variance": numbers["explained_variance"],
    }
