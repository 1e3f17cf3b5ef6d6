"""Every function of steps on one batch, all results by name; rows of batches; exact comparison."""

from __future__ import annotations

import dataclasses

import torch
from batches import Batch, policy_results

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    group_normalize,
    rollout_weights,
    step_gae,
    step_log_ratios,
    step_returns,
    step_value_loss,
    steppo_loss,
)

CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, dual_clip=9.0, kl_coef=0.1, entropy_coef=0.05)


ON_TOKENS = (
    "log_probs",
    "old_log_probs",
    "ref_log_probs",
    "entropy",
    "token_weights",
    "values",
    "old_values",
)


def everything(batch: Batch, backend: str, config: StepPOConfig = CONFIG) -> dict:
    """Run every function on a batch and return every result and gradient."""
    found = {}
    for masked in (False, True):
        results = policy_results(
            batch, config, backend, masked=masked, is_weights=batch.token_weights
        )
        found |= {f"{name}, {masked=}": value for name, value in results.items()}
    gae = step_gae(
        batch.rewards,
        batch.values,
        batch.layout,
        bootstrap_values=batch.bootstrap_values,
        backend=backend,
    )
    found |= {"advantages": gae.advantages, "returns": gae.returns}
    values = batch.values.detach().clone().requires_grad_()
    result = step_value_loss(
        values, batch.returns, batch.layout, old_values=batch.old_values, backend=backend
    )
    result.loss.backward()
    found |= {
        "value loss": result.loss.detach(),
        # The last entry is the scale of the gradients, which is a backend's own.
        "value metrics": result.metrics.values,
        "grad_values": values.grad,
    }
    per_step = batch.advantages.detach().clone().requires_grad_()
    spread = broadcast_to_tokens(per_step, batch.layout, backend=backend)
    spread.backward(batch.on_tokens(batch.returns).nan_to_num(0.0))
    found |= {"broadcast": spread.detach(), "grad_per_step": per_step.grad}
    found |= _of_steps(batch, backend)
    return found


def _of_steps(batch: Batch, backend: str) -> dict:
    """Return what the functions give that advantages, ratios and weights are made with."""
    found = {}
    found["discounted returns"] = step_returns(
        batch.rewards,
        batch.layout,
        gamma=0.9,
        bootstrap_values=batch.bootstrap_values,
        backend=backend,
    )
    groups = torch.arange(batch.layout.num_trajectories, device=batch.mask.device) // 2
    found["of groups"] = group_normalize(
        batch.advantages.detach(), groups, layout=batch.layout, backend=backend
    )
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    ratios = step_log_ratios(log_probs, batch.old_log_probs, batch.layout, backend=backend)
    (ratios * batch.advantages.detach()).sum().backward()
    found |= {"log-ratios": ratios.detach(), "grad_log_probs of ratios": log_probs.grad}
    for level in ("token", "step", "trajectory"):
        weights = rollout_weights(
            batch.old_log_probs,
            batch.ref_log_probs,
            batch.layout,
            level=level,
            low=0.5,
            high=2.0,
            backend=backend,
        )
        found[f"rollout weights, {level=}"] = weights.weights
        found[f"rollout metrics, {level=}"] = weights.metrics.values
    return found


# The penalty and the bonus of `CONFIG`, for configs of other surrogates.
TERMS = {"kl_coef": CONFIG.kl_coef, "entropy_coef": CONFIG.entropy_coef}


def losses(batch: Batch, target, config: StepPOConfig = CONFIG):
    """Yield each way to a loss, with the tensors its gradient reaches."""
    for masked in (False, True):
        log_probs = batch.log_probs.detach().clone().requires_grad_()
        entropy = batch.entropy.detach().clone().requires_grad_()
        result = steppo_loss(
            log_probs,
            batch.old_log_probs,
            batch.on_tokens(batch.advantages) if masked else batch.advantages,
            batch.mask if masked else batch.layout,
            config=config,
            ref_log_probs=batch.ref_log_probs,
            entropy=entropy,
            backend=target.backend,
        )
        yield result.loss, (log_probs, entropy)
    values = batch.values.detach().clone().requires_grad_()
    result = step_value_loss(
        values, batch.returns, batch.layout, old_values=batch.old_values, backend=target.backend
    )
    yield result.loss, (values,)


def assert_bitwise(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        differs = found[name] != value
        assert torch.equal(found[name], value), (
            f"{name}: {int(differs.sum())} of {value.numel()} differ"
        )


def exact_sums(batch: Batch, config: StepPOConfig, target, masked: bool, **options) -> dict:
    return policy_results(
        batch.to(torch.float64, target.device), config, target.backend, masked=masked, **options
    )


def close(found, expected, msg=""):
    torch.testing.assert_close(
        found.cpu(), expected.cpu(), rtol=1e-11, atol=1e-12, msg=lambda text: f"{msg}: {text}"
    )


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Take rows of a batch, in a new order."""
    offsets = batch.layout.trajectory_offsets.tolist()
    steps = [s for row in rows for s in range(offsets[row], offsets[row + 1])]
    taken = {name: getattr(batch, name)[rows] for name in (*ON_TOKENS, "mask", "rewards")}
    names = ("advantages", "returns", "is_weights", "step_weights")
    return dataclasses.replace(
        batch,
        layout=StepLayout.from_mask(taken["mask"], backend="reference"),
        bootstrap_values=batch.bootstrap_values[rows],
        **taken,
        **{name: getattr(batch, name)[steps] for name in names},
    )


def counts(batch: Batch, reduction: str) -> float:
    layout = batch.layout
    return {
        "step_mean": layout.num_steps,
        "trajectory_mean": int((layout.trajectory_offsets.diff() > 0).sum()),
        "token_mean": layout.num_tokens,
        "sum": 1,
    }[reduction]
