"""Arguments of the operators on logits and of the output head."""

from __future__ import annotations

import torch
from batches import Batch


def head_samples(batch: Batch) -> dict[str, list[tuple]]:
    """Arguments of the operators on logits."""
    device, dtype = batch.mask.device, batch.log_probs.dtype
    # Few rows: the interpreter takes 50 ms for each.
    mask = batch.mask[:2, :5]
    rows, length = mask.shape
    generator = torch.Generator().manual_seed(rows * length)
    wide = torch.randn((rows, length + 1, 13), generator=generator).to(device, dtype)
    logits = wide[:, :-1]
    mask = mask.reshape(-1)
    ids = (torch.arange(rows * length, device=device) * 7) % 13
    temperatures = torch.linspace(0.5, 1.5, rows * length, device=device, dtype=torch.float64)
    plain = logits.reshape(-1, 13).double()
    top = plain.amax(-1)
    log_sum = plain.logsumexp(-1) - top
    grads = torch.randn((2, rows * length), generator=generator).to(device, dtype)
    grad_logits = torch.zeros((rows, length, 13), device=device, dtype=dtype)
    order = torch.tensor([0, rows * length - 1, 2], device=device)
    hidden, weight, bias = wide[0, :, :8].contiguous(), wide[0, :5, :8], wide[0, 0, :5]
    products = torch.zeros((length + 1, 5), device=device, dtype=dtype)
    total = torch.ones((3, 37), device=device)
    half = torch.linspace(-1.0, 1.0, 3 * 37, device=device).view(3, 37)
    dead = grads[0] * (ids % 3 == 0)
    return {
        "order_live_rows": [(dead, None, False), (dead, grads[1], True), (dead, dead, True)],
        "accumulate": [
            (total, half.bfloat16(), False),
            (total.clone(), half.half(), False),
            (total.clone(), half.bfloat16(), True),
        ],
        "head_logits": [(products, hidden, weight, bias), (products, hidden, weight.clone(), None)],
        "scale_gradient": [
            (torch.zeros_like(half), half, half.new_tensor(-3.0), None),
            (
                torch.zeros_like(half).half(),
                half,
                half.new_tensor(2.0),
                half.new_tensor(0.1).double(),
            ),
            (torch.zeros_like(half).double(), half.double(), half.new_tensor(2.0).double(), None),
        ],
        "token_log_probs": [
            (logits, ids, mask, temperatures, 1.0, 0.0, True),
            (logits, ids, None, None, 0.7, 5.0, False),
        ],
        "token_log_probs_backward": [
            (
                grad_logits,
                logits,
                ids,
                mask,
                temperatures,
                1.0,
                0.0,
                top,
                log_sum,
                grads[0].abs(),
                *grads,
                None,
            ),
            (
                grad_logits,
                logits,
                ids,
                None,
                None,
                0.7,
                5.0,
                top,
                log_sum,
                None,
                grads[1],
                None,
                order,
            ),
        ],
    }
