"""The operators of kept sets against dense products and softmaxes in fp64."""

from __future__ import annotations

import torch
from grids import grid
from kept_cases import KINDS, mask_of, support_of, taken_from
from kept_heads import DTYPES, ROUND, Head, run, wide_of

from steppo_kernels.log_probs.kept_sets import PART

_WIDE = {"fp32": torch.float32, "fp64": torch.float64}
# Rounding of sums, relative to the sum of the sizes of what is added up.
_SUM = {torch.float32: 2e-6, torch.float64: 1e-14}


@grid(kind=KINDS, dtype=DTYPES, size=[1, 7, 40, 130], by_id=[False, True], bias=[False, True])
def test_logits_are_those_of_the_dense_product(kernel, kind, dtype, size, by_id, bias):
    head = Head(kernel, kind, dtype, size)
    logits = torch.full((head.support.num_pairs,), torch.nan, dtype=wide_of(dtype))
    logits = logits.to(kernel.device)
    index = head.index if by_id else ()
    added = head.bias if bias else None
    run(kernel, "kept_logits", logits, head.hidden, head.weight, added, head.rows, head.sets, index)
    hidden, weight = head.hidden.double(), head.weight.double().cpu()
    exact, sizes = hidden @ weight.t(), hidden.abs() @ weight.abs().t()
    if bias:
        exact, sizes = exact + head.bias.double(), sizes + head.bias.double().abs()
    dense = torch.full(head.mask.shape, torch.nan, dtype=torch.float64)
    dense[head.mask] = logits.double().cpu()
    error = ((dense - exact).abs() / sizes)[head.of_rows]
    assert error.numel() == 0 or error.max() <= _SUM[wide_of(dtype)]


@grid(kind=KINDS, dtype=DTYPES, size=[1, 7, 40, 130, 470], wide=[False, True])
def test_the_gradient_of_hidden_states(kernel, kind, dtype, size, wide):
    head = Head(kernel, kind, dtype, size)
    out_dtype = wide_of(dtype) if wide else dtype
    found = torch.full(head.hidden.shape, 9.0, dtype=out_dtype, device=kernel.device)
    # What has no gradient is not read.
    weight = head.weight.clone() if kernel.device == "cpu" else head.weight
    weight[head.mask.any(0).logical_not().to(weight.device)] = torch.nan
    weight[::3] = torch.nan
    run(kernel, "kept_hidden_gradient", found, head.pairs, weight, head.rows, head.sets)
    clean = weight.double().cpu().nan_to_num(0.0)
    exact, sizes = head.grad.double() @ clean, head.grad.double().abs() @ clean.abs()
    found = found.double().cpu()
    others = torch.ones(len(found), dtype=torch.bool)
    others[head.rows] = False
    assert (found[others] == 9.0).all()
    error = (found - exact).abs()[head.rows]
    assert (error <= ROUND[out_dtype] * sizes[head.rows]).all()


@grid(kind=KINDS, dtype=DTYPES, size=[1, 7, 40, 130], compact=[False, True], bias=[False, True])
def test_the_gradient_of_the_weight(kernel, kind, dtype, size, compact, bias):
    head = Head(kernel, kind, dtype, size)
    check_weight_gradient(kernel, head, dtype, compact, bias)


@grid(cover=1, dtype=DTYPES, tokens=[PART, PART + 1, 3 * PART + 5], compact=[False, True])
def test_an_id_with_many_tokens_is_summed_in_parts(kernel, dtype, tokens, compact):
    head = Head(kernel, "everywhere", dtype, 5, tokens, 6)
    assert (head.support.by_id.num_slots > 1) == (tokens > PART)
    check_weight_gradient(kernel, head, dtype, compact, True)


def check_weight_gradient(kernel, head, dtype, compact, bias):
    ids = head.index.ids.long().cpu()
    count = len(ids) if compact else len(head.mask[0])
    size = head.hidden.shape[1]
    found = torch.full((count, size), 9.0, dtype=dtype, device=kernel.device)
    of_bias = torch.full((count,), 9.0, dtype=wide_of(dtype), device=kernel.device)
    hidden = head.hidden.clone()
    hidden[2::4] = torch.nan
    added = of_bias if bias else None
    run(kernel, "kept_weight_gradient", found, added, head.pairs, hidden, head.index, compact)
    grad, clean = head.grad.double().t(), head.hidden.double()
    exact, sizes = grad @ clean, grad.abs() @ clean.abs()
    rows = torch.arange(len(ids)) if compact else ids
    others = torch.ones(count, dtype=torch.bool)
    others[rows] = False
    assert (found.cpu()[others] == 0.0).all()
    error = (found.double().cpu()[rows] - exact[ids]).abs()
    assert (error <= ROUND[dtype] * sizes[ids] + 1e-30).all()
    if bias:
        assert (of_bias.cpu()[others] == 0.0).all()
        error = (of_bias.double().cpu()[rows] - grad.sum(1)[ids]).abs()
        assert (error <= _SUM[wide_of(dtype)] * grad.abs().sum(1)[ids] + 1e-30).all()
    else:
        assert (of_bias == 9.0).all()


class Logits:
    """Logits of kept sets; some of the tokens have their id in their set."""

    def __init__(self, target, kind, dtype, tokens=9, vocabulary=23, sharp=3.0):
        mask = mask_of(kind, tokens, vocabulary)
        self.support = support_of(mask, target.device)._held
        generator = torch.Generator().manual_seed(7)
        dense = sharp * torch.randn((tokens, vocabulary), generator=generator).to(dtype)
        self.mask, self.sets = mask, self.support.sets
        ids = taken_from(mask)
        # A token that is certain, next to which the others have little left.
        dense[0, ids[0]] = 9.0
        self.rows = torch.arange(tokens)[torch.arange(tokens) % 4 != 2]
        places = self.support.places(ids.to(target.device), self.rows.to(target.device)).cpu()
        # The id of every third is elsewhere.
        self.places = torch.where(torch.arange(len(places)) % 3 == 2, -1, places)
        self.ids, self.dense = ids, dense
        self.temperatures = torch.linspace(0.5, 1.5, len(self.rows), dtype=torch.float64)
        self.c = torch.randn(len(self.rows), generator=generator).to(dtype)
        self.e = torch.randn(len(self.rows), generator=generator).to(dtype)
        self.c[::5] = self.e[::5] = 0.0

    def exact(self, temperature, softcap):
        """Return log-probs, entropies and log p over the sets, and the logits, all with a graph."""
        z = self.dense.double().requires_grad_()
        capped = softcap * torch.tanh(z / softcap) if softcap else z
        scaled = capped[self.rows] / temperature
        kept = self.mask[self.rows]
        some = torch.where(kept.any(1, keepdim=True), kept, True)
        log_p = scaled.masked_fill(~some, -torch.inf).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(~some, 0.0)).sum(-1)
        chosen = log_p.gather(1, self.ids[self.rows][:, None]).squeeze(1)
        is_there = (self.places >= 0) & kept.any(1)
        return z, torch.where(is_there, chosen, 0.0), torch.where(kept.any(1), entropy, 0.0)


def options(case, by_token, softcap):
    temperature = case.temperatures[:, None] if by_token else 0.7
    given = (case.temperatures, 1.0, softcap) if by_token else (None, 0.7, softcap)
    return temperature, given


@grid(kind=KINDS, dtype=_WIDE, by_token=[False, True], softcap=[0.0, 4.0], entropy=[False, True])
def test_log_probs_over_sets(kernel, kind, dtype, by_token, softcap, entropy):
    case = Logits(kernel, kind, dtype)
    temperature, given = options(case, by_token, softcap)
    pairs = case.dense[case.mask]
    found = run(kernel, "kept_log_probs", pairs, case.places, case.rows, case.sets, *given, entropy)
    log_probs, entropies, top, log_sum = (x.cpu() for x in found)
    assert top.dtype == log_sum.dtype == torch.float64
    _, wanted, of_sets = case.exact(temperature, softcap)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(log_probs.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    # A certain token has what is left of its probability in full precision.
    certain = wanted.detach().abs() < 1e-3
    torch.testing.assert_close(
        log_probs.double()[certain], wanted.detach()[certain], rtol=1e-5, atol=0.0
    )
    if entropy:
        torch.testing.assert_close(
            entropies.double(), of_sets.detach(), rtol=10 * tolerance, atol=10 * tolerance
        )
    else:
        assert entropies.numel() == 0
    is_empty = ~case.mask[case.rows].any(1)
    assert (top[is_empty] == -torch.inf).all()
    assert (log_sum[is_empty] == -torch.inf).all()


@grid(kind=KINDS, dtype=_WIDE, by_token=[False, True], softcap=[0.0, 4.0], entropy=[False, True])
def test_the_gradient_of_logits_over_sets(kernel, kind, dtype, by_token, softcap, entropy):
    case = Logits(kernel, kind, dtype)
    temperature, given = options(case, by_token, softcap)
    pairs = case.dense[case.mask].to(kernel.device)
    call = case.places, case.rows, case.sets, *given
    _, of_sets, top, log_sum = run(kernel, "kept_log_probs", pairs, *call, True)
    z, log_probs, entropies = case.exact(temperature, softcap)
    # Where the id is elsewhere, -p of each pair is left of the gradient of a log-prob.
    total = (log_probs * case.c.double()).sum()
    if entropy:
        total = total + (entropies * case.e.double()).sum()
    kept = case.mask[case.rows]
    capped = softcap * torch.tanh(z / softcap) if softcap else z
    scaled = (capped[case.rows] / temperature).masked_fill(~kept, -torch.inf)
    away = (case.places < 0) & kept.any(1)
    lse = torch.logsumexp(torch.where(kept.any(1)[:, None], scaled, 0.0), -1)
    total = total - (torch.where(away, lse, 0.0) * case.c.double()).sum()
    exact = torch.autograd.grad(total, z)[0]
    for in_place in (False, True):
        grad = pairs.clone() if in_place else torch.full_like(pairs, 9.0)
        source = grad if in_place else pairs
        before = grad.clone()
        e = case.e if entropy else None
        h = of_sets if entropy else None
        run(kernel, "kept_log_probs_backward", grad, source, *call, top, log_sum, h, case.c, e)
        dense = torch.zeros(case.mask.shape, dtype=torch.float64)
        dense[case.mask] = grad.double().cpu()
        left = torch.zeros(case.mask.shape, dtype=torch.float64)
        left[case.mask] = before.double().cpu()
        others = torch.ones(len(dense), dtype=torch.bool)
        others[case.rows] = False
        assert torch.equal(dense[others], left[others])
        tolerance = {torch.float32: 4e-6, torch.float64: 1e-13}[dtype]
        torch.testing.assert_close(
            dense[case.rows], exact[case.rows], rtol=tolerance, atol=tolerance
        )
        dead = case.rows[::5]
        assert (dense[dead] == 0).all()


def test_temperatures_and_logits_of_any_size(kernel):
    """As for whole rows, what is left of a set is right at the ends of the range."""
    case = Logits(kernel, "random", torch.float64, sharp=1e3)
    case.dense = case.dense.float().double()
    for temperature in (1e-30, 1e-3, 1e3, 1e30):
        pairs = case.dense[case.mask].float()
        given = (None, temperature, 0.0)
        found = run(
            kernel, "kept_log_probs", pairs, case.places, case.rows, case.sets, *given, True
        )
        _, wanted, entropy = case.exact(temperature, 0.0)
        torch.testing.assert_close(found[0].double().cpu(), wanted.detach(), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found[1].double().cpu(), entropy.detach(), rtol=2e-4, atol=2e-4)
