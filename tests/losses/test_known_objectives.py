"""Special cases of the step objective, each written out plainly.

PPO on tokens, GSPO on sequences, the product and centered ratios, the reductions and penalties.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from batches import random_batch

from steppo_kernels import StepPOConfig, step_gae, steppo_loss

_CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def batch_of(target, seed=1, **options):
    """A batch without NaN, which would reach the gradients of the plain forms."""
    batch = random_batch(
        seed, 7, 40, log_ratios=(-0.5, 0.5), dtype=torch.float64, device=target.device, **options
    )
    for value in (batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.entropy):
        value[~batch.mask] = 0.0
    return batch


def loss_and_grad(function, log_probs):
    leaf = log_probs.detach().clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_same(batch, target, plain, advantages, layout, config, **options):
    """Compare `steppo_loss` with ``plain(log_probs)``, in value and gradient."""
    found = loss_and_grad(
        lambda log_probs: (
            steppo_loss(
                log_probs,
                batch.old_log_probs,
                advantages,
                layout,
                config=config,
                backend=target.backend,
                **options,
            ).loss
        ),
        batch.log_probs,
    )
    expected = loss_and_grad(plain, batch.log_probs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-11, atol=1e-15)


def clipped(ratio, advantage):
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.3))


def steps_of(batch):
    """Yield the flat positions of each step."""
    offsets = batch.layout.step_offsets.tolist()
    for start, end in itertools.pairwise(offsets):
        yield batch.layout.token_index[start:end]


def test_per_token_layout_is_ppo(target):
    batch = batch_of(target)
    token_advantages = batch.on_tokens(batch.advantages) * batch.token_weights

    def ppo(log_probs):
        ratio = torch.exp(log_probs - batch.old_log_probs)[batch.mask]
        return clipped(ratio, token_advantages[batch.mask]).mean()

    assert_same(
        batch, target, ppo, token_advantages, batch.layout.per_token(), StepPOConfig(**_CLIP)
    )


def test_token_gae_and_ppo_together(target):
    """The baseline of the paper: advantages of tokens, ratios of tokens."""
    batch = batch_of(target)
    layout = batch.layout.per_token()
    found = step_gae(
        batch.rewards,
        batch.values,
        layout,
        gamma=0.97,
        lam=0.9,
        whiten=False,
        backend=target.backend,
    ).advantages
    rewards, values = batch.rewards.tolist(), batch.values.tolist()
    mask = batch.mask.tolist()
    expected = []
    for row, flags in enumerate(mask):
        taken = [t for t, flag in enumerate(flags) if flag]
        if not taken:
            continue
        reward = dict.fromkeys(taken, 0.0)
        for t, value in enumerate(rewards[row]):
            # A reward between actions belongs to the action before it, or to the first.
            reward[max((u for u in taken if u <= t), default=taken[0])] += value
        following, ahead, advantages = 0.0, 0.0, []
        for t in reversed(taken):
            ahead = reward[t] + 0.97 * following - values[row][t] + 0.97 * 0.9 * ahead
            following = values[row][t]
            advantages.append(ahead)
        expected += reversed(advantages)
    expected = torch.tensor(expected, dtype=torch.float64, device=target.device)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)

    def ppo(log_probs):
        ratio = torch.exp(log_probs - batch.old_log_probs)[batch.mask]
        return clipped(ratio, expected).mean()

    assert_same(batch, target, ppo, found, layout, StepPOConfig(**_CLIP))


def test_per_trajectory_layout_is_gspo(target):
    batch = batch_of(target)
    advantages = batch.bootstrap_values

    def gspo(log_probs):
        z = torch.where(batch.mask, log_probs - batch.old_log_probs, 0.0)
        lengths = batch.mask.sum(1)
        rows = lengths > 0
        ratio = torch.exp(z.sum(1)[rows] / lengths[rows])
        return clipped(ratio, advantages[rows]).mean()

    assert_same(
        batch, target, gspo, advantages, batch.layout.per_trajectory(), StepPOConfig(**_CLIP)
    )


@pytest.mark.parametrize("ratio", ["geometric", "product", "centered"])
def test_step_ratios(target, masked, ratio):
    batch = batch_of(target, ratio=ratio)

    def plain(log_probs):
        z = (log_probs - batch.old_log_probs).reshape(-1)
        mean = z[batch.mask.reshape(-1)].mean().detach()
        losses = []
        for step, index in enumerate(steps_of(batch)):
            length = len(index)
            log_ratio = {
                "geometric": lambda z, n: z.sum() / n,
                "product": lambda z, n: z.sum(),
                "centered": lambda z, n: mean + (z - mean).sum() / n**0.5,
            }[ratio](z[index], length)
            losses.append(clipped(log_ratio.exp(), batch.advantages[step]))
        return torch.stack(losses).mean()

    advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    steps = batch.mask if masked else batch.layout
    assert_same(batch, target, plain, advantages, steps, StepPOConfig(ratio=ratio, **_CLIP))


@pytest.mark.parametrize("reduction", ["step_mean", "trajectory_mean", "token_mean", "sum"])
def test_reductions(target, masked, reduction):
    batch = batch_of(target)
    owner = batch.layout.token_index[batch.layout.step_offsets[:-1]] // batch.mask.shape[1]
    lengths = batch.layout.step_lengths

    def plain(log_probs):
        z = (log_probs - batch.old_log_probs).reshape(-1)
        losses = torch.stack(
            [
                clipped(z[index].mean().exp(), batch.advantages[step])
                for step, index in enumerate(steps_of(batch))
            ]
        )
        if reduction == "token_mean":
            return (losses * lengths).sum() / batch.mask.sum()
        if reduction == "trajectory_mean":
            rows = [losses[owner == row].mean() for row in owner.unique()]
            return torch.stack(rows).mean()
        return losses.sum() if reduction == "sum" else losses.mean()

    advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    steps = batch.mask if masked else batch.layout
    assert_same(batch, target, plain, advantages, steps, StepPOConfig(reduction=reduction, **_CLIP))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalty_and_bonus(target, masked, estimator):
    """Means over the tokens of a step, then over steps."""
    batch = batch_of(target)
    config = StepPOConfig(kl_coef=0.7, kl_estimator=estimator, entropy_coef=0.2, **_CLIP)

    def plain(log_probs):
        new = log_probs.reshape(-1)
        z = new - batch.old_log_probs.reshape(-1)
        d = batch.ref_log_probs.reshape(-1) - new
        penalty = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]
        entropy = batch.entropy.reshape(-1)
        return torch.stack(
            [
                clipped(z[index].mean().exp(), batch.advantages[step])
                + 0.7 * penalty[index].mean()
                - 0.2 * entropy[index].mean()
                for step, index in enumerate(steps_of(batch))
            ]
        ).mean()

    advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    steps = batch.mask if masked else batch.layout
    assert_same(
        batch,
        target,
        plain,
        advantages,
        steps,
        config,
        ref_log_probs=batch.ref_log_probs,
        entropy=batch.entropy,
    )


def test_dual_clip(target, masked):
    batch = random_batch(2, 7, 40, dtype=torch.float64, device=target.device)

    def plain(log_probs):
        z = (log_probs - batch.old_log_probs).reshape(-1)
        losses = []
        for step, index in enumerate(steps_of(batch)):
            advantage = batch.advantages[step]
            loss = clipped(z[index].mean().exp(), advantage)
            losses.append(torch.minimum(loss, -3.0 * advantage) if advantage < 0 else loss)
        return torch.stack(losses).mean()

    advantages = batch.on_tokens(batch.advantages) if masked else batch.advantages
    steps = batch.mask if masked else batch.layout
    assert_same(batch, target, plain, advantages, steps, StepPOConfig(dual_clip=3.0, **_CLIP))


def test_step_weights_replace_the_weights_of_a_reduction(target):
    batch = batch_of(target)
    lengths = batch.layout.step_lengths.to(torch.float64)
    by_tokens = StepPOConfig(reduction="token_mean", **_CLIP)
    plain = StepPOConfig(reduction="sum", **_CLIP)

    def loss(config, **options):
        return lambda log_probs: (
            steppo_loss(
                log_probs,
                batch.old_log_probs,
                batch.advantages,
                batch.layout,
                config=config,
                backend=target.backend,
                **options,
            ).loss
        )

    assert_same(
        batch,
        target,
        loss(by_tokens),
        batch.advantages,
        batch.layout,
        plain,
        step_weights=lengths,
        normalizer=float(lengths.sum()),
    )


def test_weights_of_steps_multiply_their_losses(target):
    """is_weights per step act as a scaled advantage, except for what counts as clipped."""
    batch = batch_of(target)
    config = StepPOConfig(**_CLIP)

    def scaled(log_probs):
        return steppo_loss(
            log_probs,
            batch.old_log_probs,
            batch.advantages * batch.is_weights,
            batch.layout,
            config=config,
            backend=target.backend,
        ).loss

    assert_same(
        batch,
        target,
        scaled,
        batch.advantages,
        batch.layout,
        config,
        is_weights=batch.is_weights,
    )
