"""A head over kept sets: for what the host waits."""

from __future__ import annotations

import pytest
import torch
from head_cases import head_case, waits
from kept_cases import break_even, kept_of

from steppo_kernels import TokenSupport, linear_steppo_loss, linear_token_log_probs


@pytest.mark.parametrize("ratio", [0, 10**6], ids=["rows", "products"])
def test_the_host_waits_no_more_than_without_sets(kernel, ratio):
    """For the number of rows, and where masked tokens have no set once more."""
    case = head_case(2, vocabulary=26).to(torch.float32, kernel.device)
    kept = kept_of("random", head_case(2, vocabulary=26))
    counts = []
    for sets in (None, kept, kept & case.mask.cpu().unsqueeze(-1)):
        given = None if sets is None else TokenSupport.from_mask(sets).to(kernel.device)
        if given is not None:
            _ = given._held.by_id.num_slots
        with break_even(ratio), waits() as counter:
            output = linear_steppo_loss(
                case.hidden,
                case.weight,
                case.token_ids,
                None,
                case.advantages,
                case.layout,
                support=given,
                backend=kernel.backend,
            )
            output.loss.backward()
        counts.append(counter.count)
    # With tensors of a CPU there are looks whether ids are in their sets, and how many there are.
    looks = 2 if kernel.device == "cpu" and kernel.backend != "cpu" else 0
    assert counts[1] <= counts[0] + looks
    assert counts[2] <= counts[0] + looks + 1


def test_products_ask_once_for_the_pairs_of_their_chunks(kernel):
    """And not at all where there is one chunk of all tokens: in forward, and not again after it."""
    case = head_case(2, vocabulary=26).to(torch.float32, kernel.device)
    hidden = torch.where(case.mask.unsqueeze(-1), case.hidden, 0.0).detach().requires_grad_()
    ids = torch.where(case.mask, case.token_ids, 0)
    every = torch.ones(*ids.shape, 26, dtype=torch.bool)
    given = TokenSupport.from_mask(every).to(kernel.device)
    _ = given._held.counts
    counts = []
    for chunk in (1000, 7, 3):
        with break_even(10**6), waits() as counter:
            linear_token_log_probs(
                hidden,
                case.weight,
                ids,
                support=given,
                chunk_tokens=chunk,
                backend=kernel.backend,
            ).sum().backward()
        counts.append(counter.count)
    assert counts == [counts[0], counts[0] + 1, counts[0] + 1]
