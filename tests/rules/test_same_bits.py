"""Two runs give the same bits, on any number of threads, and inputs are left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import random_batch
from functions_of_steps import TERMS, assert_bitwise, close, everything
from grids import grid
from methods import FEW, METHODS


@pytest.mark.isa
@grid(method=METHODS, interpreted={"method": FEW})
def test_two_runs_give_the_same_bits(target, method):
    rows, length = (3, 40) if target.interpreted else (9, 70)
    batch = random_batch(2, rows, length, ratio=method.ratio, device=target.device)
    config = method.config(**TERMS)
    expected = everything(batch, target.backend, config)
    for _ in range(1 if target.interpreted else 3):
        assert_bitwise(everything(batch, target.backend, config), expected)


@pytest.mark.isa
@pytest.mark.parametrize("method", FEW.values(), ids=FEW)
def test_any_number_of_threads_gives_the_same_bits(target, threads_restored, method):
    if target.backend != "cpu":
        pytest.skip("only the C++ backend divides work over threads of its own")
    # Large enough to be divided.
    batch = random_batch(3, 256, 6200, mean_step=40.0, ratio=method.ratio)
    config = method.config(**TERMS)
    torch.set_num_threads(1)
    expected = everything(batch, target.backend, config)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        found = everything(batch, target.backend, config)
        for name in [name for name in expected if name.startswith("rollout metrics")]:
            # Their sums over all units are torch's own.
            close(found[name], expected[name], name)
            found[name] = expected[name]
        assert_bitwise(found, expected)


def test_inputs_are_left_alone(target):
    batch = random_batch(17, device=target.device)
    before = {
        field.name: getattr(batch, field.name).clone()
        for field in dataclasses.fields(batch)
        if field.name != "layout"
    }
    layout = {name: value.clone() for name, value in batch.layout.tensors().items()}
    everything(batch, target.backend)
    for name, value in before.items():
        torch.testing.assert_close(getattr(batch, name), value, rtol=0, atol=0, equal_nan=True)
    for name, value in layout.items():
        assert torch.equal(batch.layout.tensors()[name], value)
