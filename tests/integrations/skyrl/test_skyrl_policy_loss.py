"""The policy loss of SkyRL's registry against SkyRL's own losses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import ray
import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
    sync_registries,
)
from skyrl.train.config import AlgorithmConfig
from torch import Tensor

from steppo_kernels import StepLayout, StepPOConfig, steppo_loss
from steppo_kernels.integrations.skyrl import SkyRLPolicyLoss, register_steppo

ROWS, WIDTH, MICRO = 12, 20, 3
REDUCTIONS = ("token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm")
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.1},
    "sequence": {"tis_ratio_type": "sequence", "sequence_mask_metric": "geometric"},
    "outliers": {"token_mask_is_threshold_low": 0.9, "token_mask_is_threshold_high": 1.1},
}


class Batch(NamedTuple):
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor


def draw(
    reduction: str, *, varying: bool = False, gaps: bool = False, spread: float = 0.1
) -> Batch:
    """A mini-batch in fp64, whose advantages SkyRL has divided."""
    made = torch.Generator().manual_seed(0)
    shape = ROWS, WIDTH
    mask = torch.arange(WIDTH)[None] < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=made)
    if gaps:
        mask &= torch.rand(shape, generator=made) < 0.7
    old = torch.randn(shape, generator=made, dtype=torch.float64) - 1
    new, rollout = (
        old + scale * torch.randn(shape, generator=made, dtype=torch.float64)
        for scale in (spread, 0.05)
    )
    of_rows = torch.randn(ROWS, 1, generator=made, dtype=torch.float64).expand(shape)
    advantages = torch.randn(shape, generator=made, dtype=torch.float64) if varying else of_rows
    mask = mask.double()
    divided = apply_loss_reduction_to_advantages_minibatch(
        advantages * mask, mask, reduction, MICRO, WIDTH
    )
    return Batch(new, old, divided, mask, rollout)


def algorithm(reduction: str, correction: str = "none", **options: Any) -> AlgorithmConfig:
    plain = AlgorithmConfig(loss_reduction=reduction, eps_clip_low=0.03, eps_clip_high=0.04)
    chosen = replace(plain.off_policy_correction, **CORRECTIONS[correction])
    return replace(plain, off_policy_correction=chosen, **options)


def answer(loss: Any, batch: Batch, config: AlgorithmConfig, rollout: bool = True):
    """Loss, gradient and metrics as SkyRL gets them: of micro-batches, added up."""
    total, gradients, metrics = torch.zeros(()), [], []
    for part in zip(*(x.split(MICRO) for x in batch), strict=True):
        log_probs = part[0].clone().requires_grad_()
        value, found = loss(
            log_probs,
            part[1],
            part[2],
            config=config,
            loss_mask=part[3],
            rollout_logprobs=part[4] if rollout else None,
        )
        gradients += torch.autograd.grad(value, log_probs)
        total = total + value.detach()
        metrics.append(found)
    return total, torch.cat(gradients), metrics


@pytest.mark.parametrize("varying", [False, True], ids=["per-step", "per-token"])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_gspo_on_rows_that_are_steps(reduction, correction, varying):
    batch, config = draw(reduction, varying=varying), algorithm(reduction, correction)
    wanted = answer(PolicyLossRegistry.get("gspo"), batch, config)
    for rows_are_steps in (False, True):
        found = answer(SkyRLPolicyLoss(rows_are_steps=rows_are_steps), batch, config)
        assert wanted[1].abs().max() > 0
        assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-6)
        assert torch.allclose(found[1], wanted[1], rtol=1e-6, atol=1e-9)
        for ours, theirs in zip(found[2], wanted[2], strict=True):
            assert theirs.items() <= {**ours, "clip_ratio": theirs["clip_ratio"]}.items()
            assert ours["clip_ratio"] == pytest.approx(theirs["clip_ratio"])


def test_masks_with_gaps_are_one_step_or_several():
    batch, config = draw("sequence_mean", gaps=True), algorithm("sequence_mean")
    gspo = answer(PolicyLossRegistry.get("gspo"), batch, config, rollout=False)
    rows = answer(SkyRLPolicyLoss(rows_are_steps=True), batch, config, rollout=False)
    assert torch.allclose(rows[1], gspo[1], rtol=1e-6, atol=1e-9)
    runs = answer(SkyRLPolicyLoss(), batch, config, rollout=False)
    log_probs = batch.log_probs.clone().requires_grad_()
    of_package = steppo_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        StepLayout.from_mask(batch.loss_mask),
        config=StepPOConfig(clip_low=0.03, clip_high=0.04, reduction="token_mean"),
        normalizer=1.0,
    )
    (gradient,) = torch.autograd.grad(of_package.loss, log_probs)
    assert torch.allclose(runs[1], gradient, rtol=1e-9, atol=0)
    assert not torch.allclose(runs[1], gspo[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("regular", {"ratio": "token"}, {}),
        ("dual_clip", {"ratio": "token", "dual_clip": 3.0}, {"policy_loss_type": "dual_clip"}),
        ("sapo", {"ratio": "token", "surrogate": "soft"}, {}),
    ],
)
def test_the_family_has_the_gradients_of_skyrls_other_losses(name, family, options):
    batch = draw("sequence_mean", varying=True, spread=0.6)
    config = algorithm("sequence_mean", **options)
    wanted = answer(PolicyLossRegistry.get(name), batch, config, rollout=False)
    loss = SkyRLPolicyLoss(tuple(family.items()))
    found = answer(loss, batch, config, rollout=False)
    assert wanted[1].abs().max() > 0
    assert torch.allclose(found[1], wanted[1], rtol=1e-6, atol=1e-9)


def test_it_is_registered_and_survives_the_way_to_a_worker():
    made = register_steppo("steppo_of_test", ratio="token", surrogate="cispo")
    assert PolicyLossRegistry.get("steppo_of_test") is made
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ValueError, match="already registered"):
        register_steppo("steppo_of_test")


def test_workers_of_ray_find_it():
    """SkyRL's own registry actor hands it over, by the name that the driver registered."""
    register_steppo("steppo_of_ray", token_clip=(0.1, 0.2))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        sync_registries()
        assert ray.get(_found_by_a_worker.remote("steppo_of_ray")) == (("token_clip", (0.1, 0.2)),)
    finally:
        ray.shutdown()


@ray.remote
def _found_by_a_worker(name: str) -> Any:
    import typing

    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    return PolicyLossRegistry.get(name).family


def test_masked_positions_may_hold_anything():
    batch, config = draw("sequence_mean", varying=True), algorithm("sequence_mean")
    outside = batch.loss_mask == 0
    dirty = batch._replace(
        log_probs=batch.log_probs.masked_fill(outside, torch.nan),
        old_log_probs=batch.old_log_probs.masked_fill(outside, torch.inf),
    )
    clean, found = (answer(SkyRLPolicyLoss(), x, config, rollout=False) for x in (batch, dirty))
    assert found[0] == clean[0]
    assert torch.equal(found[1], clean[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip_low": 0.1}, "clip_low: got 0.1, expected SkyRL's setting trainer.algorithm.eps"),
        ({"reduction": "sum"}, "reduction: got 'sum', expected SkyRL's setting"),
        ({"my_knob": 1}, "my_knob: got 1, expected one of dual_clip"),
        ({"ratio": "median"}, "ratio: got 'median'"),
        ({"surrogate": "tv"}, "ratio: got 'geometric' with the surrogate 'tv'"),
        ({"ratio_center": 0.0}, "ratio_center: got 0.0 with the ratio 'geometric'"),
        ({"ratio": "centered", "ratio_center": torch.nan}, "ratio_center: got nan, expected a fin"),
    ],
)
def test_settings_that_mean_nothing_raise_where_they_are_registered(options, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        register_steppo("never", **options)
    assert str(caught.value).startswith(says)
    assert "never" not in PolicyLossRegistry.list_available()
