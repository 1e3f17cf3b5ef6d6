"""Arguments of the operators on kept sets."""

from __future__ import annotations

import torch
from batches import Batch
from kept_cases import mask_of, support_of


def kept_samples(batch: Batch) -> dict[str, list[tuple]]:
    """Arguments of each operator, with and without optional ones."""
    device, dtype = batch.mask.device, batch.log_probs.dtype
    tokens, vocabulary, size = 5, 13, 8
    held = support_of(mask_of("random", tokens, vocabulary), str(device))._held
    sets, index = tuple(held.sets), tuple(held.by_id)
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows = torch.tensor([0, 1, 3, 4], device=device)
    places = torch.tensor([0, -1, 0, 0], device=device)
    temperatures = torch.linspace(0.5, 1.5, 4, device=device, dtype=torch.float64)
    logits, hidden = normal(held.num_pairs), normal(tokens, size)
    weight, bias = normal(vocabulary, size), normal(vocabulary)
    strided = normal(vocabulary, size + 3)[:, :size]
    wide = normal(4).double(), normal(4).double()
    by_token, alike = (temperatures, 1.0, 0.0), (None, 0.7, 5.0)
    of_rows = places, rows, sets
    zeros = torch.zeros_like
    return {
        "kept_log_probs": [
            (logits, *of_rows, *by_token, True),
            (logits, *of_rows, *alike, False),
        ],
        "kept_log_probs_backward": [
            (
                zeros(logits),
                logits,
                *of_rows,
                *by_token,
                *wide,
                normal(4).abs(),
                normal(4),
                normal(4),
            ),
            (zeros(logits), logits, *of_rows, *alike, *wide, None, normal(4), None),
        ],
        "kept_logits": [
            (zeros(logits), hidden, weight, bias, rows, sets, ()),
            (zeros(logits), hidden, strided, None, rows, sets, index),
        ],
        "kept_directions": [
            (
                zeros(logits),
                normal(4, size),
                hidden,
                weight,
                bias,
                *of_rows,
                *by_token,
            ),
            (zeros(logits), normal(4, size), hidden, strided, None, *of_rows, *alike),
        ],
        "scale_directions": [(zeros(hidden), normal(4, size), normal(4), rows)],
        "kept_hidden_gradient": [(zeros(hidden), logits, weight, rows, sets)],
        "kept_weight_gradient": [
            (zeros(weight), zeros(bias), logits, hidden, index, False),
            (weight.new_zeros((len(index[0]), size)), None, logits, hidden, index, True),
        ],
    }
