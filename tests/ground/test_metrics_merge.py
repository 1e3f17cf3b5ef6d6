"""`Metrics.merge`: the metrics of parts are merged to those of the whole batch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from batches import Batch, random_batch
from grids import grid
from torch import Tensor

from steppo_kernels import (
    Metrics,
    StepLayout,
    StepPOConfig,
    rollout_weights,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import RATIOS, REDUCTIONS
from steppo_kernels.outputs import POLICY_METRICS, ROLLOUT_METRICS, VALUE_METRICS

# The metrics of some rows of a batch.
Measure = Callable[[Tensor], Metrics]


def drawn(seed: int, device: str) -> Batch:
    """Rows of one batch in fp64, of which the seventh has no action token."""
    return random_batch(
        seed, rows=8, length=14, log_ratios=(-0.4, 0.4), dtype=torch.float64, device=device
    )


def splits(seed: int, rows: int = 8) -> list[list[Tensor]]:
    """Return ways to cut rows into parts, one of them with a part that has no action token."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    cuts = torch.randint(1, rows, (2,), generator=generator).sort().values.tolist()
    without_steps = order[order == 6], order[order != 6]
    return [list(torch.arange(rows).split(1)), list(order.tensor_split(cuts)), list(without_steps)]


def steps_of(batch: Batch, rows: Tensor) -> Tensor:
    """The steps of some rows, in the order in which a layout of these rows has them."""
    found = [(batch.layout.step_rows.cpu() == row).nonzero().squeeze(1) for row in rows]
    return torch.cat(found).to(batch.mask.device)


def same(got: Metrics, expected: Metrics) -> None:
    """Names and all values are the same, but for the factor of gradients, which a merge has not."""
    assert (got.names, got.adds_up) == (expected.names, expected.adds_up)
    compared = slice(None if got.names == ROLLOUT_METRICS else -1)
    torch.testing.assert_close(
        got.values[compared], expected.values[compared], rtol=1e-9, atol=1e-11
    )


def check(measure: Measure, seed: int) -> None:
    """Merged parts are the whole, and merged merges are the merge of all."""
    whole = measure(torch.arange(8))
    for split in splits(seed):
        parts = [measure(rows) for rows in split]
        same(Metrics.merge(parts), whole)
        half = len(parts) // 2
        first, second = Metrics.merge(parts[:half]), Metrics.merge(iter(parts[half:]))
        same(Metrics.merge([second, first]), whole)


@grid(
    reduction=REDUCTIONS,
    ratio=RATIOS,
    given={"own": False, "global": True},
    masked={"layout": False, "mask": True},
)
def test_policy_metrics(target, reduction, ratio, given, masked):
    seed = RATIOS.index(ratio)
    batch = drawn(seed, target.device)
    normalizer = batch.layout.reduction_weights(reduction)[1] if given else None
    config = StepPOConfig(
        ratio=ratio,
        reduction=reduction,
        clip_low=0.1,
        clip_high=0.15,
        kl_coef=0.1,
        entropy_coef=0.1,
    )

    def measure(rows: Tensor) -> Metrics:
        mask = batch.mask[rows]
        layout = StepLayout.from_mask(mask, backend="reference")
        out = steppo_loss(
            batch.log_probs[rows],
            batch.old_log_probs[rows],
            batch.on_tokens(batch.advantages)[rows]
            if masked
            else batch.advantages[steps_of(batch, rows)],
            mask if masked else layout,
            config=config,
            ref_log_probs=batch.ref_log_probs[rows],
            entropy=batch.entropy[rows],
            is_weights=batch.token_weights[rows],
            normalizer=normalizer,
            ratio_center=0.05,
            backend=target.backend,
        )
        return out.metrics

    assert measure(torch.arange(8)).adds_up == (given or reduction == "sum")
    fractions = measure(torch.arange(8)).as_dict()
    assert 0 < fractions["clip_fraction_low"] < fractions["clip_fraction"] < 1
    check(measure, seed)


@grid(reduction=REDUCTIONS, given={"own": False, "global": True})
def test_value_metrics(target, reduction, given):
    batch = drawn(5, target.device)
    normalizer = batch.layout.reduction_weights(reduction)[1] if given else None

    def measure(rows: Tensor) -> Metrics:
        return step_value_loss(
            batch.values[rows],
            batch.returns[steps_of(batch, rows)],
            StepLayout.from_mask(batch.mask[rows], backend="reference"),
            old_values=batch.old_values[rows],
            reduction=reduction,
            normalizer=normalizer,
            backend=target.backend,
        ).metrics

    whole = measure(torch.arange(8)).as_dict()
    assert 0 < whole["clip_fraction"] < 1
    assert whole["explained_variance"] != 0
    check(measure, 5)


@grid(level=("token", "step", "trajectory"), pool=("mean", "sum"))
def test_rollout_metrics(target, level, pool):
    batch = drawn(6, target.device)

    def measure(rows: Tensor) -> Metrics:
        return rollout_weights(
            batch.log_probs[rows],
            batch.old_log_probs[rows],
            StepLayout.from_mask(batch.mask[rows], backend="reference"),
            level=level,
            pool=pool,
            low=0.9,
            high=1.2,
            backend=target.backend,
        ).metrics

    assert measure(torch.arange(8)).as_dict()["outside_fraction"] > 0
    check(measure, 6)


def loss_metrics(log_ratio: float = 0.0, length: int = 3, **options: object) -> Metrics:
    layout = StepLayout.from_mask(torch.ones(1, length), backend="reference")
    new, old = torch.full((1, length), log_ratio), torch.zeros(1, length)
    return steppo_loss(new, old, torch.ones(1), layout, backend="reference", **options).metrics


def value_metrics(values: list[float], returns: list[float]) -> Metrics:
    layout = StepLayout.from_mask(torch.tensor([[1, 0] * len(values)]), backend="reference")
    given = torch.tensor(values), torch.tensor(returns)
    return step_value_loss(*given, layout, backend="reference").metrics


def empty(**options: object) -> Metrics:
    layout = StepLayout.from_mask(torch.zeros(1, 3), backend="reference")
    found = torch.zeros(1, 3), None, torch.zeros(0), layout
    return steppo_loss(*found, backend="reference", **options).metrics


def test_parts_without_steps_change_nothing_and_merge_to_none():
    part = loss_metrics(0.5)
    same(Metrics.merge([empty(), part, empty()]), part)
    assert Metrics.merge([empty(), empty()]).as_dict() == empty().as_dict()
    # What such a part was divided by may be anything.
    given = empty(normalizer=0.0), loss_metrics(0.5, normalizer=2.0)
    same(Metrics.merge(given), given[1])
    without = value_metrics([], [])
    assert Metrics.merge([without, without]).as_dict() == without.as_dict()
    old, layout = torch.zeros(1, 3), StepLayout.from_mask(torch.zeros(1, 3), backend="reference")
    without = rollout_weights(old, old, layout, backend="reference").metrics
    assert Metrics.merge([without, without]).as_dict() == without.as_dict()
    assert without.as_dict()["ess"] == 1.0


def test_a_nan_stays():
    found = Metrics.merge([loss_metrics(0.0), loss_metrics(math.nan)]).as_dict()
    lost = {"policy_loss", "ratio_mean", "ratio_min", "ratio_max", "approx_kl", "approx_kl_k3"}
    assert {name for name, value in found.items() if math.isnan(value)} == lost


def test_explained_variance_of_parts_whose_returns_are_alike():
    parts = value_metrics([1.0, 2.0], [0.1, 0.1]), value_metrics([0.5], [0.1])
    assert Metrics.merge(parts).as_dict()["explained_variance"] == 0.0
    # Alike within each part, and not over both.
    parts = value_metrics([1.0, 1.0], [1.0, 1.0]), value_metrics([3.0], [3.0])
    assert Metrics.merge(parts).as_dict()["explained_variance"] == 1.0


def test_merging_needs_no_numbers():
    """Nothing is copied to the host: it works where there is nothing to copy."""
    parts = [loss_metrics(), loss_metrics(0.1)], [value_metrics([1.0], [2.0])] * 2
    for some in parts:
        merged = Metrics.merge([part.to("meta") for part in some])
        assert merged.values.device.type == "meta"
        assert merged.values.shape == some[0].values.shape


def test_a_merge_is_pickled_and_carries_no_gradient():
    values = loss_metrics().values.clone().requires_grad_()
    merged = Metrics.merge([Metrics(values, POLICY_METRICS), loss_metrics(0.1)])
    assert not merged.values.requires_grad
    again = pickle.loads(pickle.dumps(merged))
    same(again, merged)
    same(Metrics.merge([again, again.to("cpu")]), Metrics.merge([merged, merged]))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, "parts: got none, expected at least one Metrics"),
        (None, TypeError, "parts: got NoneType, expected a list of Metrics"),
        (loss_metrics(), TypeError, "parts: got Metrics, expected a list of Metrics"),
        ([loss_metrics(), {}], TypeError, r"parts\[1\]: got dict, expected Metrics"),
        (
            [loss_metrics(), value_metrics([1.0], [1.0])],
            ValueError,
            r"parts\[1\]: got the names value_loss, .*, expected those of parts\[0\]: policy_loss",
        ),
        (
            [Metrics(torch.zeros(2), ("a", "b"))],
            ValueError,
            r"parts\[0\]: got the names a, b, expected those of a policy loss",
        ),
        (
            [Metrics(torch.zeros(15), POLICY_METRICS)],
            ValueError,
            r"parts\[0\]: got values of shape \(15,\), expected \(16,\)",
        ),
        (
            [Metrics(torch.zeros(6), VALUE_METRICS)],
            ValueError,
            r"parts\[0\]: got values of shape \(6,\), expected \(9,\)",
        ),
        (
            [Metrics(torch.zeros(5), ROLLOUT_METRICS)],
            ValueError,
            r"parts\[0\]: got values of shape \(5,\), expected \(8,\)",
        ),
        (
            [loss_metrics(), loss_metrics().to("meta")],
            ValueError,
            r"parts\[1\]: got it on meta, expected cpu as parts\[0\]",
        ),
        (
            [loss_metrics(normalizer=2.0), loss_metrics()],
            ValueError,
            r"parts\[1\]: got a loss that has a denominator of its own, expected one that adds up",
        ),
        (
            [loss_metrics(), loss_metrics(config=StepPOConfig(reduction="sum"))],
            ValueError,
            r"parts\[1\]: got a loss that adds up with others, expected one that has a denominator",
        ),
    ],
)
def test_errors(parts, error, message):
    with pytest.raises(error, match=message):
        Metrics.merge(parts)
