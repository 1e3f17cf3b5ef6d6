"""The policy losses against verl's own, in fp64 and fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
from verl_batches import MINI_BATCHES, WEIGHTS, actor, answer, draw, relative_error

from steppo_kernels.integrations.verl import StepPOPolicyLossConfig
from steppo_kernels.integrations.verl.aggregation import MODES

MASKS = (torch.bool, torch.int64, torch.float32)
# verl divides the tokens of a row by their number plus 1e-8.
TINY = 1e-7


@pytest.mark.parametrize("varying", [False, True], ids=["per-step", "per-token"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask_dtype", MASKS, ids=str)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("mode", MODES)
def test_steppo_is_gspo_on_rows_that_are_steps(mode, mini_batch, mask_dtype, weights, varying):
    config = actor(mode, MINI_BATCHES[mini_batch])
    for seed, gaps in itertools.product(range(2), (False, True)):
        batch = draw(seed, weights=weights, varying=varying, gaps=gaps, mask_dtype=mask_dtype)
        exact = answer("gspo", batch.to(torch.float64), config)
        doubles = answer("steppo", batch.to(torch.float64), config)
        assert relative_error(doubles, exact) < TINY
        assert relative_error(answer("steppo", batch, config), exact) < 1e-5
        assert doubles.metrics["actor/ppo_kl"] == pytest.approx(exact.metrics["actor/ppo_kl"])
        clipped = exact.metrics["actor/pg_clipfrac"]
        assert 0 < clipped < 1
        assert doubles.metrics["actor/pg_clipfrac"] == pytest.approx(clipped)


_TOKENS = {"ratio": "token"}
# Other losses of verl that are members of the family, with what they read of the actor's config.
MEMBERS = {
    "vanilla": (_TOKENS | {"dual_clip": 3.0}, {"clip_ratio_c": 3.0}, MODES),
    "cispo": (_TOKENS | {"surrogate": "cispo"}, {}, MODES),
    "dppo_tv": (
        _TOKENS | {"surrogate": "tv", "log_ratio_max": 0.5},
        {"clip_ratio_c": torch.tensor(0.5, dtype=torch.float64).exp().item()},
        MODES,
    ),
    "sapo": (
        _TOKENS | {"surrogate": "soft"},
        {"tau_pos": 2.0, "tau_neg": 3.0},
        ("seq-mean-token-mean",),
    ),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, (*_, modes) in MEMBERS.items() for mode in modes]
)
def test_the_family_has_the_gradients_of_verls_other_losses(name, mode, mini_batch, weights):
    knobs, of_actor, _ = MEMBERS[name]
    config = actor(
        mode,
        MINI_BATCHES[mini_batch],
        low=0.1,
        high=0.15,
        loss=StepPOPolicyLossConfig(**knobs),
        **of_actor,
    )
    batch = draw(3, weights=weights, varying=True, spread=0.5).to(torch.float64)
    wanted, found = answer(name, batch, config), answer("steppo", batch, config)
    scale = wanted.gradient.abs().max()
    assert scale > 0
    assert (found.gradient - wanted.gradient).abs().max() / scale < TINY
    if name != "sapo":  # It says that nothing is clipped.
        clipped = wanted.metrics["actor/pg_clipfrac"]
        if name == "dppo_tv":  # It counts the tokens apart whose weight is cut.
            clipped += wanted.metrics["actor/pg_clipfrac_lower"]
        assert found.metrics["actor/pg_clipfrac"] == pytest.approx(clipped)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["steppo", "capo"])
def test_micro_batches_and_ranks_add_up_to_the_mini_batch(loss, mode):
    """verl averages the gradients of ranks, and adds those of micro-batches."""
    settings = {"steppo": {}, "capo": {"ratio_center": 0.0}}[loss]
    knobs = StepPOPolicyLossConfig(loss_mode=loss, **settings)
    batch = draw(5, weights="token", varying=True, gaps=True).to(torch.float64)
    tokens, rows = int(batch.response_mask.sum()), len(batch.log_prob)
    counts = {"batch_num_tokens": tokens, "global_batch_size": rows, "loss_scale_factor": 20}
    whole = answer(loss, batch, actor(mode, counts | {"dp_size": 1}, loss=knobs))
    config = actor(mode, counts | {"dp_size": 2}, loss=knobs)
    rows_of = zip(*(x.split(3) for x in batch), strict=True)
    parts = [answer(loss, type(batch)(*part), config) for part in rows_of]
    total = sum(part.loss for part in parts) / 2
    gradient = torch.cat([part.gradient for part in parts]) / 2
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    assert torch.allclose(gradient, whole.gradient, rtol=1e-12, atol=0)


def test_runs_of_a_row_are_steps_where_the_setting_says_so():
    """The mean of a row over its steps, which is not the mean over its tokens."""
    mask = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]])
    batch = draw(7, shape=(3, 6)).to(torch.float64)._replace(response_mask=mask)
    batch = batch._replace(advantages=torch.tensor([[1.0], [-2.0], [0.5]]).expand(3, 6).double())
    runs = StepPOPolicyLossConfig(rows_are_steps=False)
    found = answer("steppo", batch, actor(loss=runs, low=1.0, high=1e9))
    z = batch.log_prob - batch.old_log_prob
    steps = [[z[0, :3], z[0, 4:5]], [z[1, :1]], [z[2, :1], z[2, 2:4], z[2, 5:]]]
    of_row = [torch.stack([part.mean().exp() for part in row]).mean() for row in steps]
    wanted = -(of_row[0] - 2 * of_row[1] + 0.5 * of_row[2]) / 3
    assert found.loss.item() == pytest.approx(wanted.item())
    rows = answer("steppo", batch, actor(low=1.0, high=1e9))
    assert rows.loss.item() != pytest.approx(wanted.item())


def test_capo_has_the_centered_ratio():
    batch = draw(8).to(torch.float64)
    mask = batch.response_mask
    z = (batch.log_prob - batch.old_log_prob).where(mask, 0.0)
    for given, center in ((None, z.sum() / mask.sum()), (0.0, torch.tensor(0.0))):
        knobs = StepPOPolicyLossConfig(loss_mode="capo", ratio_center=given)
        config = actor(loss=knobs, low=1.0, high=1e9)
        lengths = mask.double().sum(1)
        deviation = (z - center).where(mask, 0.0).sum(1)
        ratio = (center + deviation / lengths.clamp_min(1).sqrt()).exp()
        wanted = -(ratio * batch.advantages[:, 0]).sum() / (lengths > 0).sum()
        found = answer("capo", batch, config)
        assert found.loss.item() == pytest.approx(wanted.item()), given


@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("mode", MODES)
def test_masked_positions_may_hold_anything(mode, mini_batch):
    """verl's own loss is NaN then."""
    batch = draw(9, weights="token")
    outside = ~batch.response_mask
    dirty = batch._replace(
        log_prob=batch.log_prob.masked_fill(outside, torch.nan),
        old_log_prob=batch.old_log_prob.masked_fill(outside, torch.inf),
        advantages=batch.advantages.masked_fill(outside, torch.nan),
        rollout_is_weights=batch.rollout_is_weights.masked_fill(outside, torch.nan),
    )
    config = actor(mode, MINI_BATCHES[mini_batch])
    clean, found = answer("steppo", batch, config), answer("steppo", dirty, config)
    assert found.loss == clean.loss
    assert torch.equal(found.gradient, clean.gradient)
    assert found.metrics == clean.metrics
    assert answer("gspo", dirty, config).loss.isnan()


@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["steppo", "capo"])
def test_a_micro_batch_of_padding_is_zero(loss, mode, mini_batch):
    batch = draw(10)
    empty = batch._replace(response_mask=torch.zeros_like(batch.response_mask))
    knobs = StepPOPolicyLossConfig(loss_mode=loss)
    found = answer(loss, empty, actor(mode, MINI_BATCHES[mini_batch], loss=knobs))
    assert found.loss == 0
    assert not found.gradient.any()
    assert all(torch.tensor(value).isfinite() for value in found.metrics.values())
    if mini_batch == "alone" and mode != "token-sum":
        assert answer("gspo", empty, actor(mode)).loss.isnan()


def test_padding_rows_change_nothing_but_the_number_of_rows():
    batch = draw(11)
    padding = [torch.zeros_like(x[:4]) for x in batch[:4]]
    padded = type(batch)(*map(torch.cat, zip(batch[:4], padding, strict=True)), None)
    counts = {"dp_size": 1, "batch_num_tokens": 60, "global_batch_size": 16}
    for mode in MODES:
        alone, found = (answer("steppo", b, actor(mode, counts)) for b in (batch, padded))
        assert found.loss == pytest.approx(alone.loss.item(), rel=1e-6), mode
        assert torch.allclose(found.gradient[:12], alone.gradient, rtol=1e-5)
        assert not found.gradient[12:].any()
