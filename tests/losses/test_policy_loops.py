"""steppo_loss against loops in fp64: every result of every member of the family."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from batches import policy_results, ragged_mask, random_batch
from hypothesis import assume
from hypothesis import strategies as st
from oracle import OracleLayout
from properties import examples

from steppo_kernels import StepPOConfig
from steppo_kernels.config import KL_ESTIMATORS, RATIOS, REDUCTIONS, SURROGATES
from steppo_kernels.outputs import POLICY_METRICS


@st.composite
def configs(draw):
    """A member of the family, any number of which may be at its end."""
    surrogate = draw(st.sampled_from(SURROGATES))
    ratio = "token" if surrogate == "tv" else draw(st.sampled_from(RATIOS))
    # A parabola divides by its bounds.
    lows, highs = [3e-4, 0.2, 1.0], [4e-4, 0.3, 50.0]
    numbers = {
        "clip_low": draw(st.sampled_from(lows if surrogate == "quadratic" else [0.0, *lows])),
        "clip_high": draw(st.sampled_from(highs if surrogate == "quadratic" else [0.0, *highs])),
        "log_ratio_max": draw(st.sampled_from([0.3, 10.0])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "kl_coef": draw(st.sampled_from([0.0, 0.3])),
        "kl_estimator": draw(st.sampled_from(KL_ESTIMATORS)),
        "entropy_coef": draw(st.sampled_from([0.0, 0.1, -0.2])),
    }
    if surrogate == "clip":
        numbers["dual_clip"] = draw(st.sampled_from([None, 1.5, 40.0]))
    if surrogate == "soft":
        del numbers["clip_low"], numbers["clip_high"]
        numbers["soft_temperature"] = draw(st.sampled_from([(1.0, 1.05), (4.0, 0.5)]))
    if ratio != "token":
        numbers["token_clip"] = draw(st.sampled_from([None, (0.1, 0.2), (0.0, 3.0)]))
    return StepPOConfig(ratio=ratio, surrogate=surrogate, **numbers)


@pytest.mark.isa
@examples(
    count=80,
    config=configs(),
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 24)),
    mean_step=st.sampled_from([1.0, 3.0, 30.0]),
    log_ratios=st.sampled_from([(math.log(1e-4), 8.0), (-0.4, 0.4), (-1e-3, 1e-3)]),
    weights=st.sampled_from(["none", "step", "token"]),
    own_advantages=st.booleans(),
    by_step=st.sets(st.sampled_from(["step_weights", "clip_low", "clip_high"])),
    normalizer=st.sampled_from([None, 3.5]),
    ratio_center=st.sampled_from([None, 0.07]),
)
def test_loops(
    target,
    masked,
    config,
    seed,
    shape,
    mean_step,
    log_ratios,
    weights,
    own_advantages,
    by_step,
    normalizer,
    ratio_center,
):
    """Loss, both gradients, step log-ratios and each metric."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(
        seed,
        mask=ragged_mask(*shape, mean_step=mean_step, generator=generator),
        ratio=config.ratio,
        log_ratios=log_ratios,
        dtype=torch.float64,
    )
    per_step = {
        "step_weights": batch.step_weights,
        "clip_low": 0.01 + 0.9 * torch.rand(batch.layout.num_steps, generator=generator).double(),
        "clip_high": 0.01 + torch.rand(batch.layout.num_steps, generator=generator).double(),
    }
    options = {name: per_step[name] for name in sorted(by_step) if not masked}
    if config.surrogate == "soft":
        options = {name: options[name] for name in options if name == "step_weights"}
    plain = {
        **options,
        "log_probs": batch.log_probs,
        "old_log_probs": batch.old_log_probs,
        "advantages": batch.on_tokens(batch.advantages),
    }
    if own_advantages:
        drawn = torch.randn(shape, generator=generator).double()
        options["advantages"] = plain["advantages"] = torch.where(batch.mask, drawn, torch.nan)
    if weights == "token":
        options["is_weights"] = plain["is_weights"] = batch.token_weights
    elif weights == "step":
        plain["is_weights"] = batch.on_tokens(batch.is_weights)
        options["is_weights"] = plain["is_weights"] if masked else batch.is_weights
    if config.kl_coef:
        plain["ref_log_probs"] = batch.ref_log_probs
    if config.entropy_coef:
        plain["entropy"] = batch.entropy
    found = policy_results(
        batch.to(torch.float64, target.device),
        config,
        target.backend,
        masked=masked,
        normalizer=normalizer,
        ratio_center=ratio_center,
        **{name: value.to(target.device) for name, value in options.items()},
    )
    layout = OracleLayout.from_mask(batch.mask.reshape(-1).tolist(), shape)
    expected, loops = oracles.policy_loss(
        layout, config, normalizer=normalizer, ratio_center=ratio_center, **plain
    )
    # On a border of a surrogate, the last bit decides what the gradient is.
    assume(loops.margin > 1e-9)
    if masked:
        del expected["step_log_ratio"]
    assert found.keys() == expected.keys()
    *metrics, divided_by = found["metrics"].tolist()
    found["metrics"] = torch.tensor(metrics, dtype=torch.float64)
    if layout.actions:
        # A hidden metric says what the sums were divided by; of nothing, none reads it.
        denominator = layout.weights(config.reduction)[1] if normalizer is None else normalizer
        assert divided_by == pytest.approx(denominator, rel=1e-12)
    # Terms of these sizes cancel in the sums.
    largest = float(expected["metrics"][POLICY_METRICS.index("ratio_max")])
    scale = max(1.0, largest, loops.size, loops.slope_size)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].cpu(),
            value,
            rtol=1e-10,
            atol=1e-11 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
