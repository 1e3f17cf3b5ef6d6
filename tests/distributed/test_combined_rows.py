"""What ranks make of the numbers that they tell each other of a row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steppo_kernels.backends.reference.vocabulary_shard import combined, local_ids, told_of_rows


def told(*ranks: tuple[float, float, float, float]) -> Tensor:
    """One row as ranks tell it: largest logit, log-sum, log-prob or infinity, entropy."""
    return torch.tensor([[rank] for rank in ranks], dtype=torch.float64)


@pytest.mark.parametrize("gap", [1.0, 30.0, 40.0, 300.0, 700.0])
def test_an_almost_certain_token_keeps_its_digits(gap: float) -> None:
    """The other rank's share is e^-gap: the log-prob is -log1p(e^-gap), however small that is."""
    log_prob, entropy, top, log_sum = combined(
        told((5.0, 0.0, 0.0, 0.0), (5.0 - gap, 0.0, math.inf, 0.0)), 1.0
    )
    wanted = -math.log1p(math.exp(-gap))
    assert log_prob.item() == pytest.approx(wanted, rel=1e-14)
    assert entropy.item() == pytest.approx(
        math.log1p(math.exp(-gap)) + gap * math.exp(-gap) / (1 + math.exp(-gap)), rel=1e-12
    )
    assert (top.item(), log_sum.item()) == (5.0, pytest.approx(-wanted, abs=1e-16))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_an_unlikely_token_of_a_rank_far_below(temperature: float) -> None:
    log_prob, *_ = combined(
        told((1e4, 0.0, math.inf, 0.0), (-1e4, math.log(2), math.log(0.5), 0.0)), temperature
    )
    assert log_prob.item() == pytest.approx(-2e4 / temperature, rel=1e-14)


def test_a_rank_whose_ids_are_all_ruled_out() -> None:
    """Whatever it says is its largest logit plays no part; a token of it has probability 0."""
    out = (0.0, -math.inf, math.nan, 0.0)
    log_prob, entropy, top, log_sum = combined(told((-50.0, 1.0, math.inf, 0.5), out), 1.0)
    assert (log_prob.item(), top.item(), log_sum.item()) == (-math.inf, -50.0, 1.0)
    assert entropy.item() == 0.5
    log_prob, *_ = combined(told((-50.0, 1.0, -0.25, 0.5), (0.0, -math.inf, math.inf, 0.0)), 1.0)
    assert log_prob.item() == -0.25


def test_a_token_of_no_rank_is_no_number() -> None:
    log_prob, entropy, *_ = combined(
        told((1.0, 0.0, math.inf, 0.1), (1.0, 0.0, math.inf, 0.1)), 1.0
    )
    assert math.isnan(log_prob.item())
    assert entropy.item() == pytest.approx(math.log(2) + 0.1)


def test_what_is_no_number_stays_so() -> None:
    log_prob, entropy, *_ = combined(
        told((math.nan, math.nan, math.inf, math.nan), (0.0, 0.0, -1.0, 0.1)), 1.0
    )
    assert math.isnan(log_prob.item())
    assert math.isnan(entropy.item())


def test_ids_by_column() -> None:
    columns, is_away = local_ids(torch.tensor([4, 5, 7, 8]), 5, 3)
    assert columns.tolist() == [0, 0, 2, 0]
    assert is_away.tolist() == [True, False, False, True]
    row = told_of_rows(*torch.zeros(3, 4), None, is_away)
    assert row[:, 2].tolist() == [math.inf, 0.0, 0.0, math.inf]
