"""A loss within a checkpoint, whose backward pass computes it anew, gives the same gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from fuzz.crash_worker import results
from fuzz.subjects import subjects
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


# Where allocations are poisoned, no memory is kept.
@pytest.mark.unpoisoned
@pytest.mark.parametrize("stops_early", [True, False], ids=["stops-early", "to-the-end"])
@pytest.mark.parametrize(
    "subject", [one for one in subjects() if one.leaves], ids=lambda one: one.name
)
def test_a_checkpointed_call_is_as_a_plain_one(kernel, subject, stops_early):
    if kernel.device != "cpu":
        pytest.skip("the subjects are on a CPU, where memory is kept")

    @functools.wraps(subject.function)
    def checkpointed(**arguments):
        with set_checkpoint_early_stop(stops_early):
            return checkpoint(subject.function, use_reentrant=False, **arguments)

    plain = results(subject, kernel.backend, {})
    for turn in range(4):
        found = results(subject._replace(function=checkpointed), kernel.backend, {})
        assert_same(found, plain)
        # The next call finds the memory of this gradient, or makes it anew while this one is held.
        if turn % 2:
            del found


def assert_same(found, plain):
    assert found.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(found.gradients[name], gradient)
    for one, other in zip(found.values, plain.values, strict=True):
        assert torch.equal(one, other)
