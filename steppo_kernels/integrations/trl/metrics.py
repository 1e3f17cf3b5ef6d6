"""What is logged of a micro-batch, over all ranks, under the names of TRL and of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config import StepPOConfig
from ...layout.step_layout import StepLayout
from ...outputs import Metrics, StepPOOutput
from .denominators import count_of
from .samples import StepSamples

# Metrics that TRL has too, under its names. The others have `steps/` before their own.
_NAMES_OF_TRL = {
    "policy_loss": "policy_loss",
    "kl_loss": "kl",
    "entropy": "entropy",
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}
# Metrics that are divided by the denominator of the whole update.
_LOSSES = ("policy_loss", "kl_loss", "entropy", "value_loss")


def log_samples(log: Any, samples: StepSamples) -> None:
    """Log what the steps of a generation are, those of all ranks."""
    layout, rewards = samples.layout, samples.rewards
    log["steps/per_completion"].append(layout.num_steps / max(1, layout.num_trajectories))
    log["steps/reward"].append(rewards.mean().item())
    if samples.values is not None:
        log["steps/value"].append(samples.values.mean().item())


def over_ranks(
    metrics: Metrics, count: Tensor, normalizer: float | None, accelerator: Any
) -> dict[str, float]:
    """Return the metrics of a micro-batch of all ranks. Every rank has to call it.

    Args:
        metrics: of this rank's part.
        count: what this rank's part adds to the denominator, 0-dim.
        normalizer: what its losses were divided by; None is `count`.
        accelerator: that of the trainer.
    """
    own = torch.cat((metrics.values.detach(), count.reshape(1).to(metrics.values))).to(
        # Of devices without fp64.
        torch.float64 if metrics.values.device.type != "mps" else torch.float32
    )
    every = accelerator.gather(own[None])
    parts = [Metrics(row[:-1], metrics.names, metrics.adds_up) for row in every]
    merged = Metrics.merge(parts).as_dict()
    # Nothing is counted for "sum", whose denominator is 1.
    total = float(every[:, -1].sum()) or 1.0
    if normalizer is not None:
        # The parts add up to a share of the update. Here they are means of their own.
        merged = {
            name: value * normalizer / total if name in _LOSSES else value
            for name, value in merged.items()
        }
    return merged


def log_policy(
    trainer: Any, output: StepPOOutput, layout: StepLayout, normalizer: float | None, mode: str
) -> None:
    """Log the metrics of the policy's loss."""
    config, accelerator = trainer.args.step_config, trainer.accelerator
    count = count_of(layout, config.reduction)
    found = over_ranks(output.metrics, count, normalizer, accelerator)
    if config.reduction == "sum":
        # What TRL logs by these names is a mean.
        for name in ("kl_loss", "entropy"):
            found[name] /= max(1.0, found["num_steps"])
    if config.kl_coef == 0:
        del found["kl_loss"]
    log = trainer._metrics[mode]
    for name, value in found.items():
        log[_NAMES_OF_TRL.get(name, f"steps/{name}")].append(value)
    if config.entropy_coef != 0:
        log["entropy_coef"].append(config.entropy_coef)


def log_extremes(
    trainer: Any, output: StepPOOutput, layout: StepLayout, advantages: Tensor, mode: str
) -> None:
    """Log the least and the largest share of clipped steps of a completion, as TRL does.

    A step of ``"clip"`` is clipped as a whole where its ratio and its advantage are one number
    each. With other surrogates, and with ratios of tokens, TRL's names would mean something else.
    """
    config: StepPOConfig = trainer.args.step_config
    if config.surrogate != "clip" or config.ratio == "token" or output.step_log_ratio is None:
        return
    ratio = output.step_log_ratio.clamp(max=config.log_ratio_max).exp()
    advantage = advantages.reshape(-1)[layout.state_index]
    low = (ratio < 1 - config.clip_low) & (advantage < 0)
    high = (ratio > 1 + config.clip_high) & (advantage > 0)
    shares = torch.stack([_share_of_rows(one, layout) for one in (low, high)], dim=1)
    every = trainer.accelerator.gather(shares)
    every = every[~every[:, 0].isnan()]
    if len(every):
        trainer._metrics[mode]["clip_ratio/low_min"].append(every[:, 0].min().item())
        trainer._metrics[mode]["clip_ratio/high_max"].append(every[:, 1].max().item())


def _share_of_rows(flags: Tensor, layout: StepLayout) -> Tensor:
    """Return the share of the steps of each row that have a flag, NaN of a row without a step."""
    found = torch.zeros((layout.shape[0], 2), dtype=torch.float32, device=flags.device)
    found.index_add_(0, layout.step_rows, torch.stack((flags, torch.ones_like(flags)), 1).float())
    return found[:, 0] / found[:, 1]


def log_critic(
    trainer: Any, output: StepPOOutput, layout: StepLayout, normalizer: float | None, mode: str
) -> None:
    """Log the metrics of the critic's loss."""
    count = count_of(layout, trainer.args.step_config.reduction)
    found = over_ranks(output.metrics, count, normalizer, trainer.accelerator)
    for name, value in found.items():
        if name != "num_steps":
            trainer._metrics[mode][f"critic/{name}"].append(value)
