"""What trainers divide the gradients of parts of a batch by, as docs/parts_of_a_batch.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the demo's extra is not installed")
pytest.importorskip("accelerate", reason="the demo's extra is not installed")

from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from steppo_kernels import StepLayout, steppo_loss

# Rows of one step and of three: whoever divides by the steps of a part counts them differently.
MASK = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 3.0])
LAYOUT = StepLayout.from_mask(MASK, backend="reference")
PARTS = len(MASK)
ALL = float(LAYOUT.reduction_weights("step_mean")[1])
STEPS = [{"row": row} for row in range(PARTS)]


class Policy(nn.Module):
    """Log-probs that are its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(MASK.shape, -1.0))

    def forward(self, row: torch.Tensor, normalizer: float) -> torch.Tensor:
        layout = StepLayout.from_mask(MASK[row], backend="reference")
        advantages = ADVANTAGES[LAYOUT.step_rows == row]
        return steppo_loss(
            self.weight[row], None, advantages, layout, normalizer=normalizer, backend="reference"
        ).loss


class TakesLossArguments(Policy):
    """Causal LMs of transformers take what a loss is divided by."""

    def forward(self, row: Any, normalizer: float, **kwargs: Any) -> torch.Tensor:
        return super().forward(row, normalizer)


def whole() -> torch.Tensor:
    """Return what one call on all rows gives."""
    policy = Policy()
    steppo_loss(policy.weight, None, ADVANTAGES, LAYOUT, backend="reference").loss.backward()
    return policy.weight.grad


def test_accelerate_divides_by_the_accumulation_steps():
    accelerator = Accelerator(gradient_accumulation_steps=PARTS, cpu=True)
    policy = accelerator.prepare(Policy())
    for row in range(PARTS):
        with accelerator.accumulate(policy):
            accelerator.backward(policy(torch.tensor([row]), ALL / PARTS))
    torch.testing.assert_close(policy.weight.grad, whole())


def trained(kind: type[Trainer], model: nn.Module, folder: Path, normalizer: float) -> torch.Tensor:
    """Return the gradient of the one update of a Trainer."""

    class Losses(kind):  # type: ignore[valid-type, misc]
        def compute_loss(self, model, inputs, *args: Any, **kwargs: Any) -> torch.Tensor:
            return model(inputs["row"], normalizer)

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PARTS,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    before = model.weight.detach().clone()
    Losses(model=model, args=arguments, train_dataset=STEPS).train()
    return before - model.weight.detach()


class Scaled(Trainer):
    loss_is_scaled_for_ga = True


class Unscaled(Trainer):
    loss_is_scaled_for_ga = False


def test_the_trainer_divides_by_the_accumulation_steps_unless_told_otherwise(tmp_path):
    found = trained(Trainer, Policy(), tmp_path, ALL / PARTS)
    torch.testing.assert_close(found, whole())


@pytest.mark.skipif(
    not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this Trainer has no such attribute"
)
def test_a_trainer_that_says_so_divides_by_nothing(tmp_path):
    """GRPOTrainer of TRL is one."""
    for model in (Policy(), TakesLossArguments()):
        torch.testing.assert_close(trained(Scaled, model, tmp_path, ALL), whole())
    for model in (Policy(), TakesLossArguments()):
        torch.testing.assert_close(trained(Unscaled, model, tmp_path, ALL / PARTS), whole())
