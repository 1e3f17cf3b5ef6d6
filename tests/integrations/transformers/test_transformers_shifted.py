"""Batches whose tensors stand at the places of the states that predict the tokens already."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from tiny_models import (
    CONFIG,
    LENGTH,
    ON_BACKENDS,
    ROWS,
    Batch,
    assert_same,
    fused_batch,
    gradients,
    make,
    old_and_ref,
)
from torch import Tensor

from steppo_kernels import StepLayout, broadcast_to_tokens
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head


def at_states(values: Tensor) -> Tensor:
    """Return rows with everything one place earlier."""
    return torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)


@pytest.mark.parametrize("by_token", [False, True])
@ON_BACKENDS
def test_a_shifted_batch_is_the_same_batch(backend: str, by_token: bool) -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    values = old_and_ref(model, batch)
    more: dict[str, Any] = {"backend": backend}
    temperature = 1.0 + 0.5 * torch.rand(ROWS, LENGTH, dtype=torch.float64)
    if by_token:
        more |= {
            "temperature": temperature,
            "is_weights": torch.rand(ROWS, LENGTH, dtype=torch.float64),
            "advantages": broadcast_to_tokens(values.pop("advantages"), batch.layout),
        }
    expected = model(**batch.inputs, steppo=fused_batch(batch, values, **more))
    expected.loss.backward()
    wanted = gradients(model)
    moved = {
        name: at_states(value) if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in {**values, **more}.items()
    }
    layout = StepLayout.from_mask(at_states(batch.mask))
    ids = at_states(batch.ids)
    request = StepPOBatch(layout=layout, token_ids=ids, shifted=True, config=CONFIG, **moved)
    found = model(**batch.inputs, steppo=request)
    found.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    assert_same(gradients(model), wanted, 1e-14)


def test_log_probs_are_at_the_states() -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    with torch.no_grad():
        asked = LogProbBatch(batch.layout, return_entropy=True)
        expected = model(**batch.inputs, steppo=asked)
        asked = LogProbBatch(
            at_states(batch.mask), shifted=True, token_ids=at_states(batch.ids), return_entropy=True
        )
        found = model(**batch.inputs, steppo=asked)
    for name in ("log_probs", "entropy"):
        assert torch.equal(found[name], at_states(expected[name]))


def test_the_last_state_may_predict_a_token_of_another_rank() -> None:
    """Columns of a causal model from the first on: their states are those of the whole."""
    model, batch = make("llama"), Batch()
    patch_lm_head(model)
    count = 10
    with torch.no_grad():
        whole = model(**batch.inputs, steppo=LogProbBatch(batch.layout)).log_probs
        mask, ids = (at_states(one)[:, :count] for one in (batch.mask, batch.ids))
        assert bool(mask[:, -1].any())
        asked = LogProbBatch(mask, shifted=True, token_ids=ids)
        part = model(batch.ids[:, :count], steppo=asked).log_probs
    torch.testing.assert_close(part, at_states(whole)[:, :count])


def test_the_first_column_may_hold_an_action() -> None:
    model = make()
    patch_lm_head(model)
    ids = torch.tensor([[3, 4, 5]])
    mask = torch.tensor([[1, 1, 0]])
    asked = LogProbBatch(mask, shifted=True, token_ids=torch.tensor([[4, 5, 0]]))
    with torch.no_grad():
        found = model(ids, steppo=asked).log_probs
    assert bool((found[:, :2] < 0).all())
    assert float(found[0, 2]) == 0.0


def test_what_does_not_go_with_it() -> None:
    batch = Batch()
    with pytest.raises(ValueError, match=r"^token_ids: got None with shifted=True"):
        LogProbBatch(batch.layout, shifted=True)
    with pytest.raises(ValueError, match=r"^logits_to_keep: got 3 with shifted=True"):
        LogProbBatch(batch.layout, shifted=True, token_ids=batch.ids, logits_to_keep=3)
    with pytest.raises(TypeError, match=r"^shifted: got int, expected a bool"):
        StepPOBatch(None, batch.advantages, batch.layout, shifted=1, token_ids=batch.ids)
    model = make()
    patch_lm_head(model)
    # At padding there is no state.
    mask = at_states(batch.mask)
    mask[1, 12] = True
    with pytest.raises(
        ValueError,
        match=r"^layout: got an action token in row 1, column 12, expected the state there to be",
    ):
        model(**batch.inputs, steppo=LogProbBatch(mask, shifted=True, token_ids=batch.ids))
    mask[1, 12] = False
    ids = at_states(batch.ids)
    ids[0, 1] = -100
    with pytest.raises(ValueError, match=r"^token_ids: got -100 in row 0, column 1"):
        model(**batch.inputs, steppo=LogProbBatch(mask, shifted=True, token_ids=ids))
