"""Heads over kept sets against dense fp64 with a mask.

Against that, fp32 errs at most twice as much as plain PyTorch in fp32, and bf16 at most as much as
plain PyTorch in bf16, which forms all logits and masks them.
"""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from batches import Error
from grids import grid
from head_cases import head_case, new_tensors
from head_regimes import REGIMES, Regime, draw, evaluate, typed
from kept_cases import KINDS, kept_of, or_all

from steppo_kernels import (
    StepPOConfig,
    TokenSupport,
    linear_steppo_loss,
    linear_token_log_probs,
    token_log_probs,
)
from steppo_kernels.log_probs import supported_head

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.half, "bf16": torch.bfloat16}
# As many as all sets of these vocabularies have ids, and more.
_ALWAYS, _NEVER = {False: 10**6, True: 10**6}, {False: 0, True: 0}


@pytest.fixture(params=["rows", "products"])
def taken(request, monkeypatch):
    """How logits of sets are formed: from gathered rows, or from products with the whole weight."""
    ratio = _NEVER if request.param == "rows" else _ALWAYS
    monkeypatch.setattr(supported_head, "BREAK_EVEN", ratio)
    return request.param


@grid(
    cover=1,
    name=[name for name in REGIMES if not name.startswith("large")],
    kind=KINDS,
    dtype=[torch.float32, torch.bfloat16],
    way=["one call", "two calls"],
)
def test_error_is_bounded(target, taken, name, kind, dtype, way):
    regime = dataclasses.replace(REGIMES[name], vocabulary=61)
    if target.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter drops bits of bf16 where a GPU rounds them")
    if target.interpreted:
        regime = dataclasses.replace(regime, rows=1, length=16, size=32)
    seeds, squares = 2, {}
    for seed in range(seeds):
        case = draw(regime, seed, dtype)
        kept = kept_of(kind, case, seed)
        given = {"kept": or_all(kept)}
        exact = evaluate(
            typed(case, torch.float64, "cpu"), regime, "plain", "reference", None, **given
        )
        plain = evaluate(
            typed(case, dtype, target.device), regime, "plain", "reference", None, **given
        )
        found = evaluate(
            typed(case, dtype, target.device), regime, way, target.backend, 5, kept=kept
        )
        for key, value in found.items():
            for who, got in (("kernel", value), ("plain", plain[key])):
                error = Error.between(got, exact[key]).rms
                squares[who, key] = squares.get((who, key), 0.0) + error**2 / seeds
    factor = 2.0 if dtype == torch.float32 else 1.0
    for key in found:
        error, allowed = (squares[who, key] ** 0.5 for who in ("kernel", "plain"))
        rounding = (8 if key == "loss" else 2) * torch.finfo(found[key].dtype).eps
        assert error <= factor * allowed + rounding, (key, error, allowed)


@grid(cover=1, kind=KINDS, dtype=_DTYPES, wanted=["all", "hidden", "weight", "bias", "nothing"])
def test_only_what_wants_a_gradient_gets_one(kernel, taken, kind, dtype, wanted):
    """A frozen head, frozen hidden states; each gradient is what it is with the others."""
    case = head_case(3, vocabulary=26).to(dtype, kernel.device)
    support = TokenSupport.from_mask(kept_of(kind, head_case(3, vocabulary=26))).to(kernel.device)

    def gradients(names):
        leaves = {
            name: getattr(case, name).detach().clone().requires_grad_(name in names)
            for name in ("hidden", "weight", "bias")
        }
        log_probs, entropy = linear_token_log_probs(
            leaves["hidden"],
            leaves["weight"],
            case.token_ids,
            bias=leaves["bias"],
            mask=case.mask,
            support=support,
            return_entropy=True,
            backend=kernel.backend,
        )
        assert log_probs.requires_grad == bool(names)
        if names:
            (log_probs * 0.7 + entropy * 0.1).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    every = gradients(("hidden", "weight", "bias"))
    names = {"all": tuple(every), "nothing": ()}.get(wanted, (wanted,))
    some = gradients(names)
    for name, grad in some.items():
        assert (grad is not None) == (name in names)
        if grad is not None:
            assert grad.dtype == dtype
            assert torch.equal(grad.nan_to_num(7.0), every[name].nan_to_num(7.0))


@grid(cover=1, kind=["random", "nested", "full", "one", "everywhere"], dtype=_DTYPES)
def test_a_sparse_gradient_has_the_rows_of_the_dense_one(kernel, monkeypatch, kind, dtype):
    monkeypatch.setattr(supported_head, "BREAK_EVEN", _NEVER)
    case = head_case(5, vocabulary=26).to(dtype, kernel.device)
    support = TokenSupport.from_mask(kept_of(kind, head_case(5, vocabulary=26))).to(kernel.device)
    found = []
    for sparse in (False, True):
        output = linear_steppo_loss(
            case.hidden,
            case.weight,
            case.token_ids,
            None,
            case.advantages,
            case.layout,
            bias=case.bias,
            support=support,
            sparse_grad=sparse,
            backend=kernel.backend,
        )
        weight, bias = torch.autograd.grad(output.loss, [case.weight, case.bias])
        assert weight.is_sparse == bias.is_sparse == sparse
        found.append((weight.to_dense(), bias.to_dense()))
    for dense, sparse in zip(*found, strict=True):
        assert torch.equal(dense, sparse)


def test_an_optimizer_of_sparse_gradients_moves_the_rows_that_are_kept(kernel):
    case = head_case(5, vocabulary=26).to(torch.float32, kernel.device)
    kept = kept_of("one", head_case(5, vocabulary=26)).to(kernel.device)
    weight = torch.nn.Parameter(case.weight.detach().clone())
    log_probs, entropy = linear_token_log_probs(
        case.hidden.detach(),
        weight,
        case.token_ids,
        mask=case.mask,
        support=TokenSupport.from_mask(kept | (torch.arange(26, device=kept.device) == 3)),
        return_entropy=True,
        sparse_grad=True,
        backend=kernel.backend,
    )
    (log_probs + entropy).sum().backward()
    assert weight.grad.is_sparse
    before = weight.detach().clone()
    torch.optim.SparseAdam([weight], lr=0.1).step()
    ids = torch.cat((kept.view(-1, 26).nonzero()[:, 1], torch.tensor([3], device=kept.device)))
    others = torch.ones(26, dtype=torch.bool, device=kept.device)
    others[ids] = False
    assert torch.equal(weight[others], before[others])
    assert (weight[3] != before[3]).any()


@pytest.mark.parametrize("kind", ["random", "full"])
def test_sets_of_masked_tokens_change_nothing(kernel, taken, kind):
    """Whether or not they have ids, results are those of the others."""
    case = head_case(6, vocabulary=26).to(torch.float32, kernel.device)
    kept = kept_of(kind, head_case(6, vocabulary=26)).to(kernel.device)
    found = []
    for sets in (kept, kept & case.mask.unsqueeze(-1)):
        log_probs = linear_token_log_probs(
            case.hidden,
            case.weight,
            case.token_ids,
            bias=case.bias,
            mask=case.mask,
            support=TokenSupport.from_mask(sets),
            backend=kernel.backend,
        )
        found.append([log_probs.detach(), *case.gradients(log_probs.sum()).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_a_sparse_gradient_wants_a_set_of_every_token(kernel):
    case = head_case(5, vocabulary=26).to(torch.float32, kernel.device)
    kept = kept_of("some empty", head_case(5, vocabulary=26)).to(kernel.device)
    given = case.hidden, case.weight, case.token_ids
    options = {"mask": case.mask, "sparse_grad": True, "backend": kernel.backend}
    with pytest.raises(ValueError, match=r"^sparse_grad: got it without support, "):
        linear_token_log_probs(*given, **options)
    with pytest.raises(ValueError, match=r"^sparse_grad: got it with \d+ tokens over all ids, "):
        linear_token_log_probs(*given, **options, support=TokenSupport.from_mask(kept))


def test_a_sparse_gradient_goes_through_a_cast(kernel, monkeypatch):
    """Autocast: the master weight is in fp32."""
    monkeypatch.setattr(supported_head, "BREAK_EVEN", _NEVER)
    case = head_case(5, vocabulary=26).to(torch.float32, kernel.device)
    support = TokenSupport.from_mask(kept_of("random", head_case(5, vocabulary=26)))
    found = []
    for sparse in (False, True):
        with torch.autocast(kernel.device, torch.bfloat16):
            log_probs = linear_token_log_probs(
                case.hidden,
                case.weight,
                case.token_ids,
                bias=case.bias,
                mask=case.mask,
                support=support.to(kernel.device),
                sparse_grad=sparse,
                backend=kernel.backend,
            )
        grads = torch.autograd.grad(log_probs.sum(), [case.weight, case.bias])
        assert {grad.dtype for grad in grads} == {torch.float32}
        assert {grad.is_sparse for grad in grads} == {sparse}
        found.append([grad.to_dense() for grad in grads])
    for dense, sparse in zip(*found, strict=True):
        assert torch.equal(dense, sparse)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_strided_head(target, taken, sparse):
    """A leaf may be a transposed weight, and a bias every other number of something."""
    case = head_case(5, vocabulary=26).to(torch.float64, target.device)
    support = TokenSupport.from_mask(kept_of("random", head_case(5, vocabulary=26)))
    options = {"mask": case.mask, "support": support.to(target.device), "backend": target.backend}
    found = []
    for is_strided in (False, True):
        weight, bias = case.weight.detach().clone(), case.bias.detach().clone()
        if is_strided:
            weight = weight.t().contiguous().t()
            bias = bias.repeat_interleave(2)[::2]
        weight.requires_grad_()
        bias.requires_grad_()
        log_probs = linear_token_log_probs(
            case.hidden, weight, case.token_ids, bias=bias, sparse_grad=sparse, **options
        )
        grads = torch.autograd.grad(log_probs.sum(), [weight, bias])
        found.append([log_probs.detach(), *(grad.to_dense() for grad in grads)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sparse_gradient_wants_leaves(kernel):
    """Operations of torch do not hand it on, and would say so in backward."""
    case = head_case(5, vocabulary=26).to(torch.float32, kernel.device)
    support = TokenSupport.from_mask(kept_of("one", head_case(5, vocabulary=26)))
    options = {"support": support.to(kernel.device), "backend": kernel.backend}
    options |= {"mask": case.mask, "sparse_grad": True}
    for name in ("weight", "bias"):
        given = {"weight": case.weight, "bias": case.bias}
        given[name] = given[name] * 1.0
        with pytest.raises(ValueError, match=rf"^sparse_grad: got a {name} that is a view or "):
            linear_token_log_probs(case.hidden, token_ids=case.token_ids, **given, **options)
        with torch.no_grad():
            linear_token_log_probs(case.hidden, token_ids=case.token_ids, **given, **options)


def test_a_frozen_weight_has_no_gradient_made(kernel, monkeypatch):
    """That of a bias needs none of its size."""
    monkeypatch.setattr(supported_head, "BREAK_EVEN", _NEVER)
    case = head_case(5, vocabulary=4096).to(torch.float32, kernel.device)
    support = TokenSupport.from_mask(kept_of("one", head_case(5, vocabulary=4096)))
    weight = case.weight.detach()
    with new_tensors() as made:
        log_probs = linear_token_log_probs(
            case.hidden,
            weight,
            case.token_ids,
            bias=case.bias,
            mask=case.mask,
            support=support.to(kernel.device),
            backend=kernel.backend,
        )
        log_probs.sum().backward()
    assert case.bias.grad.any()
    assert max(made) < weight.numel()


def test_sets_of_masked_tokens_may_have_any_ids(target, taken):
    case = head_case(6, vocabulary=26).to(torch.float64, target.device)
    kept = kept_of("random", head_case(6, vocabulary=26)) & case.mask.cpu().unsqueeze(-1)
    sets = [row.nonzero().squeeze(1).tolist() for row in kept.view(-1, 26)]
    strange = [
        ids if is_live else [1000, 3]
        for ids, is_live in zip(sets, case.mask.view(-1).tolist(), strict=True)
    ]
    found = []
    for given in (sets, strange):
        support = TokenSupport.from_lists(given, torch.ones(len(given))).to(target.device)
        log_probs = linear_token_log_probs(
            case.hidden,
            case.weight,
            case.token_ids,
            mask=case.mask,
            support=support,
            backend=target.backend,
        )
        logits = torch.randn((*case.mask.shape, 26), generator=torch.Generator().manual_seed(3))
        logits = logits.to(target.device).requires_grad_()
        of_logits = token_log_probs(
            logits, case.token_ids, mask=case.mask, support=support, backend=target.backend
        )
        grads = torch.autograd.grad(log_probs.sum(), [case.hidden, case.weight])
        of_logits.sum().backward()
        found.append([log_probs.detach(), of_logits.detach(), logits.grad, *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.nan_to_num(), other.nan_to_num(), rtol=1e-6, atol=1e-6)
    live = case.mask.view(-1).nonzero()[0, 0]
    strange[int(live)] = [*strange[int(live)], 77]
    support = TokenSupport.from_lists(strange, torch.ones(len(strange))).to(target.device)
    for rows, function in ((case.hidden, linear_token_log_probs), (logits, token_log_probs)):
        given = (rows, case.weight) if rows is case.hidden else (rows,)
        with pytest.raises(ValueError, match=r"^support: got the id 77, expected ids from 0 to 25"):
            function(
                *given, case.token_ids, mask=case.mask, support=support, backend=target.backend
            )


@grid(cover=1, kind=KINDS, dtype=_DTYPES)
def test_bits_do_not_depend_on_threads_or_on_the_order_of_ids(
    kernel, taken, threads_restored, kind, dtype
):
    # Interpreted kernels take their time.
    rows, length, vocabulary = (2, 9, 23) if kernel.interpreted else (4, 40, 97)
    case = head_case(7, rows=rows, length=length, size=48, vocabulary=vocabulary)
    kept = kept_of(kind, case)
    ids = [row.nonzero().squeeze(1) for row in kept.view(-1, vocabulary)]
    orders = [ids, [row.flip(0) for row in ids], [torch.cat((row, row[::2])) for row in ids]]
    results = []
    for threads, order in zip((1, 2, 3), orders, strict=True):
        # Of what an emulated GPU leaves to torch, the threads of a CPU have a say.
        torch.set_num_threads(1 if kernel.emulated else threads)
        offsets = torch.tensor([0, *(len(row) for row in order)]).cumsum(0)
        support = TokenSupport.from_csr(torch.cat(order), offsets, shape=case.mask.shape)
        moved = case.to(dtype, kernel.device)
        output = linear_steppo_loss(
            moved.hidden,
            moved.weight,
            moved.token_ids,
            moved.old_log_probs.float(),
            moved.advantages.float(),
            moved.layout,
            bias=moved.bias,
            support=support.to(kernel.device),
            config=StepPOConfig(clip_low=0.2, clip_high=0.2, entropy_coef=0.1),
            backend=kernel.backend,
        )
        gradients = moved.gradients(output.loss)
        results.append([output.loss.detach(), output.metrics.values, *gradients.values()])
    for other in results[1:]:
        for one, again in zip(results[0], other, strict=True):
            assert torch.equal(one.nan_to_num(7.0), again.nan_to_num(7.0))


@pytest.mark.parametrize("kind", ["random", "some empty"])
def test_a_token_that_is_not_in_its_set(target, kind):
    """Raises on a CPU; on a GPU it is NaN alone. `missing="full"` takes all ids instead."""
    case = head_case(9, vocabulary=26).to(torch.float32, target.device)
    kept = kept_of(kind, head_case(9, vocabulary=26)).to(target.device)
    at = case.mask.nonzero()[3]
    kept[at[0], at[1]] = torch.arange(26, device=target.device) < 5
    kept[at[0], at[1], case.token_ids[at[0], at[1]]] = False

    def run(**options):
        return linear_token_log_probs(
            case.hidden,
            case.weight,
            case.token_ids,
            mask=case.mask,
            support=TokenSupport.from_mask(kept, **options),
            backend=target.backend,
        )

    if target.device == "cpu":
        token = int(case.token_ids[at[0], at[1]])
        with pytest.raises(ValueError, match=rf"^support: got a set of \d ids without {token}, "):
            run()
    else:
        found = run()
        is_there = torch.ones_like(case.mask)
        is_there[at[0], at[1]] = False
        assert found[at[0], at[1]].isnan()
        assert found[is_there].isfinite().all()
    whole = linear_token_log_probs(
        case.hidden, case.weight, case.token_ids, mask=case.mask, backend=target.backend
    )
    found = run(missing="full")
    assert torch.equal(found[at[0], at[1]], whole[at[0], at[1]])
    assert (found[case.mask] >= whole[case.mask] - 1e-5).all()


def test_nothing_of_the_size_of_all_logits_is_made(kernel):
    drawn = {"rows": 2, "length": 8 if kernel.interpreted else 30, "size": 4, "vocabulary": 4001}
    case = head_case(2, **drawn).to(torch.float32, kernel.device)
    kept = kept_of("one", head_case(2, **drawn))
    support = TokenSupport.from_mask(kept).to(kernel.device)
    with new_tensors() as seen:
        log_probs = linear_token_log_probs(
            case.hidden,
            case.weight.detach(),
            case.token_ids,
            mask=case.mask,
            support=support,
            backend=kernel.backend,
        )
        log_probs.sum().backward()
    assert max(seen) < 4001


def test_threads_share_sets(kernel):
    """What is made once and kept is made by several threads at a time."""
    if kernel.interpreted:
        pytest.skip("Triton's interpreter runs in one thread")
    case = head_case(4, vocabulary=26).to(torch.float32, kernel.device)
    kept = kept_of("random", head_case(4, vocabulary=26)).to(kernel.device)
    support, results = TokenSupport.from_mask(kept), {}

    def run(number):
        leaf = case.weight.detach().clone().requires_grad_()
        linear_token_log_probs(
            case.hidden.detach(),
            leaf,
            case.token_ids,
            mask=case.mask,
            support=support,
            backend=kernel.backend,
        ).sum().backward()
        results[number] = leaf.grad

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for grad in results.values():
        assert torch.equal(grad, results[0])


def test_a_vocabulary_that_divides_nothing_and_a_long_row(kernel):
    """V = 152,063; sets of one to thousands of ids, whose rows lie far apart."""
    vocabulary = 263 if kernel.interpreted else 2_063 if kernel.emulated else 152_063
    regime = Regime(vocabulary=vocabulary, rows=1, length=12, size=33)
    case = draw(regime, 1, torch.float32)
    kept = kept_of("long", case) & (torch.arange(regime.vocabulary) % 3 != 1)
    ids = torch.where(case.mask, case.token_ids, 0)
    kept |= torch.zeros_like(kept).scatter_(-1, ids.unsqueeze(-1), True)
    exact = evaluate(
        typed(case, torch.float64, "cpu"), regime, "plain", "reference", None, kept=kept
    )
    moved = typed(case, torch.float32, kernel.device)
    found = evaluate(moved, regime, "two calls", kernel.backend, None, kept=kept)
    for key, value in found.items():
        assert Error.between(value, exact[key]).rms <= 2e-6, key
