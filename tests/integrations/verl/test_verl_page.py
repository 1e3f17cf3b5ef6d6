"""The page on verl names what there is: the lines of the tests, every setting and metric."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from verl.workers.config import PolicyLossConfig
from verl_train import STEPPO

from steppo_kernels.integrations.verl import StepPOPolicyLossConfig, StepPOTrainerConfig
from steppo_kernels.integrations.verl.policy_losses import _METRICS

PAGE = (Path(__file__).parents[3] / "docs/verl.md").read_text()


@pytest.mark.parametrize("line", STEPPO.split())
def test_the_lines_of_the_tests_are_those_of_the_page(line):
    assert f"    {line}\n" in PAGE


def test_every_setting_is_explained():
    verls = {field.name for field in fields(PolicyLossConfig)}
    of_loss = {field.name for field in fields(StepPOPolicyLossConfig)} - verls
    of_trainer = {field.name for field in fields(StepPOTrainerConfig)}
    assert {"ratio_center", "whiten"} <= of_loss | of_trainer
    cells = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert {name for name in of_loss | of_trainer if f"`{name}`" not in cells} == set()


def test_every_metric_is_explained():
    cells = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert {name for name in _METRICS if f"`{name}`" not in cells} == set()
