"""Padding, the order of rows and the split into parts change nothing but rounding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from batches import random_batch
from functions_of_steps import CONFIG, ON_TOKENS, TERMS, close, counts, exact_sums, rows_of
from grids import grid
from methods import FEW, METHODS

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import RATIOS, REDUCTIONS


@grid(cover=1, reduction=REDUCTIONS)
def test_padding_changes_nothing(target, masked, reduction):
    config = dataclasses.replace(CONFIG, reduction=reduction)
    batch = random_batch(5, 5, 21, dtype=torch.float64)
    before, after = 3, 7

    def padded(value):
        filler = False if value.dtype == torch.bool else torch.nan
        wide = value.new_full((6, 21 + before + after), filler)
        wide[:5, before : before + 21] = value
        return wide

    wide = dataclasses.replace(
        batch,
        mask=padded(batch.mask),
        layout=StepLayout.from_mask(padded(batch.mask), backend="reference"),
        **{name: padded(getattr(batch, name)) for name in ON_TOKENS},
    )
    expected = exact_sums(batch, config, target, masked)
    found = exact_sums(wide, config, target, masked)
    for name, value in expected.items():
        if name.startswith("grad"):
            close(found[name][:5, before : before + 21], value, name)
        else:
            close(found[name], value, name)


@grid(cover=1, reduction=REDUCTIONS)
def test_order_of_rows_changes_nothing(target, masked, reduction):
    config = dataclasses.replace(CONFIG, reduction=reduction)
    batch = random_batch(6, 7, 30, dtype=torch.float64)
    order = [3, 0, 6, 5, 1, 4, 2]
    expected = exact_sums(batch, config, target, masked)
    found = exact_sums(rows_of(batch, order), config, target, masked)
    close(found["loss"], expected["loss"])
    close(found["metrics"], expected["metrics"])
    close(found["grad_log_probs"], expected["grad_log_probs"][order])
    close(found["grad_entropy"], expected["grad_entropy"][order])


@grid(
    cover=1,
    ratio=RATIOS,
    reduction=REDUCTIONS,
    as_tensor={"number": False, "tensor": True},
)
def test_micro_batches_with_a_global_normalizer(target, masked, reduction, as_tensor, ratio):
    """Losses and gradients of the parts add up to those of the whole."""
    config = dataclasses.replace(CONFIG, reduction=reduction, ratio=ratio)
    batch = random_batch(7, 7, 24, ratio=ratio, dtype=torch.float64)
    options = {"ratio_center": 0.2} if ratio == "centered" else {}
    expected = exact_sums(batch, config, target, masked, **options)
    normalizer = counts(batch, reduction)
    assert normalizer > 1 or reduction == "sum"
    if as_tensor:
        normalizer = torch.tensor(float(normalizer), device=target.device)
    # Row 6 has no action token: a part of its own.
    parts = [[0, 1, 2], [3], [4, 5], [6]]
    found = [
        exact_sums(rows_of(batch, rows), config, target, masked, normalizer=normalizer, **options)
        for rows in parts
    ]
    close(sum(part["loss"] for part in found), expected["loss"])
    for name in ("grad_log_probs", "grad_entropy"):
        close(torch.cat([part[name] for part in found]), expected[name], name)


@grid(method=METHODS, interpreted={"method": FEW})
def test_micro_batches_of_every_surrogate(target, masked, method):
    """With advantages and weights of tokens."""
    config = method.config(reduction="token_mean", **TERMS)
    batch = random_batch(7, 7, 24, ratio=method.ratio, log_ratios=(-0.9, 0.9), dtype=torch.float64)

    def results(part, **options):
        on_tokens = {"advantages": part.entropy - 1.5, "is_weights": part.token_weights}
        on_tokens = {name: value.to(target.device) for name, value in on_tokens.items()}
        return exact_sums(part, config, target, masked, **on_tokens, **options, **method.center())

    expected = results(batch)
    normalizer = counts(batch, "token_mean")
    found = [
        results(rows_of(batch, rows), normalizer=normalizer) for rows in ([0, 1, 2], [3], [4, 5, 6])
    ]
    close(sum(part["loss"] for part in found), expected["loss"])
    for name in ("grad_log_probs", "grad_entropy"):
        close(torch.cat([part[name] for part in found]), expected[name], name)
    assert expected["grad_log_probs"].count_nonzero() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_that_share_trajectories_add_up(target, reduction):
    """One row a step, shuffled into parts, as trainers do; some rows are empty or padding."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand((9, 12), generator=generator) < 0.5
    mask[4] = False
    owners, turns = [5, 7, 5, 5, 7, 9, 5, 7, 9], [0, 1, 2, 1, 0, 0, 3, 2, 1]
    valid = torch.tensor([True] * 8 + [False])
    log_probs, old = 0.1 * torch.randn((2, 9, 12), generator=generator, dtype=torch.float64)
    advantages = torch.randn(9, generator=generator, dtype=torch.float64)
    log_probs, old, advantages, mask, valid = (
        value.to(target.device) for value in (log_probs, old, advantages, mask, valid)
    )
    config = StepPOConfig(clip_low=0.1, clip_high=0.1, reduction=reduction)

    def part(rows, **options):
        layout = StepLayout.from_rows(
            mask[rows],
            [owners[r] for r in rows],
            [turns[r] for r in rows],
            valid=valid[rows],
            backend=target.backend,
        )
        leaf = log_probs[rows].requires_grad_()
        loss = steppo_loss(
            leaf,
            old[rows],
            advantages[rows],
            layout,
            config=config,
            backend=target.backend,
            **options,
        ).loss
        return layout, loss, torch.autograd.grad(loss, leaf)[0]

    layout, loss, grad = part(list(range(9)))
    weights, normalizer = layout.reduction_weights(reduction)
    again = part(list(range(9)), step_weights=weights, normalizer=normalizer)
    close(again[1], loss)
    parts = [[6, 0], [3, 5, 1], [8, 4], [7, 2]]
    found = [part(rows, step_weights=weights[rows], normalizer=normalizer) for rows in parts]
    close(sum(value for _, value, _ in found), loss)
    for rows, (_, _, value) in zip(parts, found, strict=True):
        close(value, grad[rows])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_normalizers_of_parts_add_up(target, reduction):
    """Where every trajectory is a row; the part without a step counts nothing."""
    batch = random_batch(7, 7, 24, dtype=torch.float64, device=target.device)
    whole = batch.layout.reduction_weights(reduction)[1]
    assert whole == counts(batch, reduction)
    parts = [rows_of(batch, rows).layout for rows in ([0, 1, 2], [3], [4, 5], [6])]
    found = [part.reduction_weights(reduction)[1] for part in parts]
    assert parts[-1].num_tokens == 0
    assert found[-1] == (reduction == "sum")
    assert sum(found) == (whole if reduction != "sum" else 4)
    with pytest.raises(ValueError, match=r"^reduction: got 'mean', expected one of"):
        batch.layout.reduction_weights("mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_normalizer_of_a_batch_without_actions(target, reduction):
    """It is 0, and given to the losses of that batch it changes nothing."""
    mask = torch.zeros(2, 5, dtype=torch.bool, device=target.device)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    weights, normalizer = layout.reduction_weights(reduction)
    leaf = torch.randn(2, 5, device=target.device).requires_grad_()
    none = leaf.detach().new_zeros(0)
    config = StepPOConfig(reduction=reduction)
    for given in (normalizer, float(normalizer)):
        parts = {"normalizer": given, "backend": target.backend}
        for out in (
            steppo_loss(leaf, None, none, layout, config=config, step_weights=weights, **parts),
            step_value_loss(leaf, none, layout, reduction=reduction, **parts),
        ):
            assert out.loss == 0
            assert all(math.isfinite(value) for value in out.metrics.as_dict().values())
            (grad,) = torch.autograd.grad(out.loss, leaf)
            assert not grad.any()
    for wrong in (math.nan, -1.0):
        with pytest.raises(ValueError, match=rf"^normalizer: got {wrong}"):
            steppo_loss(leaf, None, none, layout, normalizer=wrong, backend=target.backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_micro_batches_with_a_global_normalizer(target, reduction):
    batch = random_batch(8, 7, 24, dtype=torch.float64, device=target.device)

    def run(part, normalizer=None):
        values = part.values.detach().clone().requires_grad_()
        result = step_value_loss(
            values,
            part.returns,
            part.layout,
            old_values=part.old_values,
            reduction=reduction,
            normalizer=normalizer,
            backend=target.backend,
        )
        result.loss.backward()
        return result.loss.detach(), values.grad

    loss, grad = run(batch)
    parts = [
        run(rows_of(batch, rows), counts(batch, reduction)) for rows in ([0, 1, 2], [3, 4], [5, 6])
    ]
    close(sum(part[0] for part in parts), loss)
    close(torch.cat([part[1] for part in parts]), grad)
