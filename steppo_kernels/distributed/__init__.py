"""What the ranks of torch.distributed say to each other: whole batches out of their parts."""

from .center import ratio_center
from .context_loss import context_linear_steppo_loss
from .gae import step_gae
from .metrics import merge_metrics
from .reduction import BatchReduction, batch_reduction
from .shard import ContextShard

__all__ = [
    "BatchReduction",
    "ContextShard",
    "batch_reduction",
    "context_linear_steppo_loss",
    "merge_metrics",
    "ratio_center",
    "step_gae",
]
