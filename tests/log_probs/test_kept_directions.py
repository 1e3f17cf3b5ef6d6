"""The operators that give logits of kept sets and gradients of log-probs from one read of rows."""

from __future__ import annotations

import torch
from grids import grid
from kept_cases import KINDS, taken_from
from kept_heads import DTYPES, ROUND, Head, run, wide_of


@grid(kind=KINDS, dtype=DTYPES, size=[1, 40, 130], by_token=[False, True], softcap=[0.0, 4.0])
def test_one_read_gives_logits_and_the_gradient_of_a_log_prob(
    gpu_kernel, kind, dtype, size, by_token, softcap
):
    head = Head(gpu_kernel, kind, dtype, size)
    wide = wide_of(dtype)
    ids = taken_from(head.mask)
    places = head.support.places(ids.to(gpu_kernel.device), head.rows.to(gpu_kernel.device)).cpu()
    # The id of every third is elsewhere; what is left is -p of each pair.
    places[2::3] = -1
    temperatures = torch.linspace(0.5, 1.5, len(head.rows), dtype=torch.float64)
    logits = torch.full((head.support.num_pairs,), torch.nan, dtype=wide, device=gpu_kernel.device)
    directions = torch.full((len(head.rows), size), torch.nan, dtype=wide, device=gpu_kernel.device)
    given = (temperatures if by_token else None, 0.7, softcap)
    call = head.hidden, head.weight, head.bias
    sets = places, head.rows, head.sets
    run(gpu_kernel, "kept_directions", logits, directions, *call, *sets, *given)

    alone = torch.full_like(logits, torch.nan)
    run(gpu_kernel, "kept_logits", alone, *call, head.rows, head.sets, ())
    mine = torch.isin(head.support.tokens, head.rows.to(gpu_kernel.device))
    assert torch.equal(logits[mine], alone[mine])

    hidden = head.hidden.double().requires_grad_()
    weight = head.weight.double().cpu()
    dense = hidden @ weight.t() + head.bias.double()
    capped = softcap * torch.tanh(dense / softcap) if softcap else dense
    z = capped[head.rows] / (temperatures[:, None] if by_token else 0.7)
    kept, is_there = head.mask[head.rows], places >= 0
    some = kept.any(1)
    lse = z.masked_fill(~kept, -torch.inf)[some].logsumexp(-1)
    own = z.gather(1, ids[head.rows][:, None])[is_there]
    exact = torch.autograd.grad(own.sum() - lse.sum(), hidden)[0][head.rows]
    # Sums of probabilities, which are 2 at most, times the sizes of the weight.
    size_of_terms = 2 * weight.abs().amax() / (temperatures[:, None] if by_token else 0.7)
    error = (directions.double().cpu() - exact).abs()
    assert (error <= (4e-6 if wide == torch.float32 else 1e-13) * size_of_terms).all()
    assert not directions.cpu()[~some].any()


@grid(cover=1, dtype=DTYPES, size=[1, 40, 130, 1040])
def test_a_gradient_is_a_direction_times_a_number(gpu_kernel, dtype, size):
    generator = torch.Generator().manual_seed(size)
    rows, others = torch.tensor([4, 0, 3]), [1, 2, 5]
    directions = torch.randn((3, size), generator=generator).to(wide_of(dtype))
    grad = torch.tensor([0.3, 0.0, -2.0], dtype=wide_of(dtype))
    # What has no gradient does not matter.
    directions[1] = torch.nan
    found = torch.full((6, size), 9.0, dtype=dtype, device=gpu_kernel.device)
    run(gpu_kernel, "scale_directions", found, directions, grad, rows)
    exact = grad.double()[:, None] * directions.double().nan_to_num()
    assert ((found.double().cpu()[rows] - exact).abs() <= ROUND[dtype] * exact.abs()).all()
    assert not found[0].any()
    assert (found[others] == 9.0).all()
