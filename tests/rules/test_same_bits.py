"""Two runs give the same bits, on any number of threads, and inputs are left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import random_batch
from every_function import assert_bitwise, everything


@pytest.mark.isa
def test_two_runs_give_the_same_bits(target):
    batch = random_batch(2, 9, 70, device=target.device)
    expected = everything(batch, target.backend)
    for _ in range(1 if target.interpreted else 3):
        assert_bitwise(everything(batch, target.backend), expected)


@pytest.mark.isa
def test_any_number_of_threads_gives_the_same_bits(target, threads_restored):
    if target.backend != "cpu":
        pytest.skip("only the C++ backend divides work over threads of its own")
    # Large enough to be divided.
    batch = random_batch(3, 256, 6200, mean_step=40.0)
    torch.set_num_threads(1)
    expected = everything(batch, target.backend)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_bitwise(everything(batch, target.backend), expected)


def test_inputs_are_left_alone(target):
    batch = random_batch(17, device=target.device)
    before = {
        field.name: getattr(batch, field.name).clone()
        for field in dataclasses.fields(batch)
        if field.name != "layout"
    }
    layout = {
        field.name: torch.as_tensor(getattr(batch.layout, field.name)).clone()
        for field in dataclasses.fields(batch.layout)
        if getattr(batch.layout, field.name) is not None
    }
    everything(batch, target.backend)
    for name, value in before.items():
        torch.testing.assert_close(getattr(batch, name), value, rtol=0, atol=0, equal_nan=True)
    for name, value in layout.items():
        assert torch.equal(torch.as_tensor(getattr(batch.layout, name)), value)
