"""The losses as `torch.nn.Module`, for training loops that are put together from modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backends.choice import Backend
from ..config import Reduction, StepPOConfig
from ..layout.step_layout import StepLayout
from ..outputs import StepPOOutput
from .policy_loss import steppo_loss
from .value_loss import step_value_loss


class StepPOLoss(nn.Module):
    """`steppo_loss` with its hyper-parameters kept.

    Args:
        config: hyper-parameters; the defaults of `StepPOConfig` if None.
        backend: implementation.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, StepPOLoss
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> log_probs = torch.full((1, 5), -1.0, requires_grad=True)
        >>> output = StepPOLoss()(log_probs, None, torch.tensor([1.0, -3.0]), layout)
        >>> output.loss.item()
        1.0
    """

    def __init__(self, config: StepPOConfig | None = None, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = StepPOConfig() if config is None else config
        self.backend: Backend = backend

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        layout: StepLayout | Tensor,
        **options: Any,
    ) -> StepPOOutput:
        """Call `steppo_loss`; `options` are its other keywords, such as bounds of each step."""
        return steppo_loss(
            log_probs,
            old_log_probs,
            advantages,
            layout,
            config=self.config,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        """Name the hyper-parameters in ``repr``."""
        return f"{self.config}, backend={self.backend!r}"


class StepValueLoss(nn.Module):
    """`step_value_loss` with its hyper-parameters kept.

    Args:
        clip: range of the value clip.
        reduction: weights and denominator, as in `StepPOConfig`.
        backend: implementation.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, StepValueLoss
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> values = torch.zeros(1, 5, requires_grad=True)
        >>> StepValueLoss()(values, torch.tensor([1.0, 2.0]), layout).loss.item()
        1.25
    """

    def __init__(
        self, clip: float = 0.5, *, reduction: Reduction = "step_mean", backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.clip = clip
        self.reduction: Reduction = reduction
        self.backend: Backend = backend

    def forward(
        self, values: Tensor, returns: Tensor, layout: StepLayout, **options: Any
    ) -> StepPOOutput:
        """Call `step_value_loss`; `options` are its other keywords."""
        return step_value_loss(
            values,
            returns,
            layout,
            clip=self.clip,
            reduction=self.reduction,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        """Name the hyper-parameters in ``repr``."""
        return f"clip={self.clip}, reduction={self.reduction!r}, backend={self.backend!r}"
