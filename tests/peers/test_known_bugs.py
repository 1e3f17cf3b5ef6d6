"""Bugs that fused losses of other projects had, one test each.

Their projects' tests did not see them: logits near 0, upstream gradients of ones, few rows.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from batches import Error, assert_same
from grids import grid
from head_cases import head_case

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    linear_token_log_probs,
    steppo_loss,
    steppo_loss_from_logits,
    token_log_probs,
)

FROM_LOGITS = [token_log_probs, steppo_loss_from_logits]
LINEAR = [linear_token_log_probs, linear_steppo_loss]
# The clip is as wide as some of the steps need: the gradients of others are 0.
_CONFIG = StepPOConfig(clip_low=0.1, clip_high=0.1)

of_all = grid(function=FROM_LOGITS + LINEAR)
of_a_weight = grid(function=LINEAR)


class Call:
    """A function on a case, and the same in plain PyTorch; `leaves` are what has gradients."""

    def __init__(self, function, case):
        self.function, self.case = function, case
        if function in LINEAR:
            self.leaves = {name: getattr(case, name) for name in ("hidden", "weight", "bias")}
        else:
            logits = case.hidden @ case.weight.t() + case.bias
            self.leaves = {"logits": logits.detach().requires_grad_()}

    def with_leaves(self, **leaves):
        """Return the same call with other tensors in the place of leaves."""
        twin = Call(self.function, self.case)
        twin.leaves = {**self.leaves, **leaves}
        return twin

    def fused(self, backend, **options):
        """Return log-probs or the loss."""
        case, run = self.case, self.function
        rows = {**self.leaves, "token_ids": case.token_ids, "backend": backend, **options}
        if run in (token_log_probs, linear_token_log_probs):
            return run(**rows, mask=case.mask)
        others = (case.old_log_probs, case.advantages, case.layout)
        names = ("old_log_probs", "advantages", "layout")
        return run(**rows, **dict(zip(names, others, strict=True)), config=_CONFIG).loss

    def plain(self):
        """Return the same, of rows that count alone."""
        case, leaves = self.case, self.leaves
        if "logits" in leaves:
            rows = leaves["logits"][case.mask]
        else:
            rows = leaves["hidden"][case.mask] @ leaves["weight"].t() + leaves["bias"]
        ids = case.token_ids[case.mask]
        chosen = rows.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        log_probs = chosen.new_zeros(case.mask.shape).masked_scatter(case.mask, chosen)
        if self.function in (token_log_probs, linear_token_log_probs):
            return log_probs
        return steppo_loss(
            log_probs,
            case.old_log_probs,
            case.advantages,
            case.layout,
            config=_CONFIG,
            backend="reference",
        ).loss

    def gradients(self, output, upstream=None):
        """Return the gradients of all leaves, by name."""
        upstream = torch.ones_like(output) if upstream is None else upstream
        found = torch.autograd.grad(output, [*self.leaves.values()], upstream, retain_graph=True)
        return dict(zip(self.leaves, found, strict=True))


def draw(function, kernel, *, dtype=torch.float64, seed=3, shift=0.0, **sizes):
    """Return a call on a random case; masked positions hold NaN and ids out of range."""
    case = head_case(seed, **{"rows": 2, "length": 9, "mean_step": 3.0, **sizes})
    case.bias = case.bias + shift
    case = case.to(dtype, kernel.device)
    return Call(function, case)


@grid(cover=1, function=FROM_LOGITS + LINEAR, vocabulary=[5, 4097, 4100])
def test_phantom_vocabulary_columns(kernel, function, vocabulary):
    """Columns beyond the vocabulary, read as logits of 0, add e^0 each: verl #5349, SkyRL #2141.

    Next to logits far below 0 they are all that counts.
    """
    call = draw(function, kernel, dtype=torch.float32, vocabulary=vocabulary, shift=-300.0)
    found, expected = call.fused(kernel.backend), call.plain()
    assert Error.between(found, expected).largest <= 1e-4
    assert_same(call.gradients(found), call.gradients(expected), 1e-4)


@of_all
def test_upstream_gradient_of_one_element(kernel, function):
    """The upstream gradient of the first token was that of all: Liger-Kernel #1298."""
    call = draw(function, kernel)
    found, expected = call.fused(kernel.backend), call.plain()
    upstream = torch.linspace(3.0, -2.0, found.numel(), dtype=found.dtype, device=found.device)
    upstream = upstream.view(found.shape)
    assert_same(call.gradients(found, upstream), call.gradients(expected, upstream), 1e-11)


@of_all
def test_lost_requires_grad(kernel, function):
    """The result was detached, or gradients of inputs that are no leaves None: verl #6913."""
    every = draw(function, kernel)
    expected = every.gradients(every.plain())
    for name, leaf in every.leaves.items():
        others = {other: tensor.detach() for other, tensor in every.leaves.items()}
        call = every.with_leaves(**{**others, name: leaf * 1.0})
        output = call.fused(kernel.backend)
        assert output.requires_grad
        (found,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
        assert Error.between(found, expected[name]).largest <= 1e-11, name


@of_all
def test_doubled_gradient_of_a_second_backward(kernel, function):
    """Each backward adds its gradient once, also of inputs used twice: unsloth-zoo #892."""
    call = draw(function, kernel)
    expected = call.gradients(call.plain())
    output = call.fused(kernel.backend)
    again = call.fused(kernel.backend)
    upstream = torch.ones_like(output)
    for count, backward in (
        (1.0, partial(output.backward, upstream, retain_graph=True)),
        (2.0, partial(output.backward, upstream)),
        (5.0, partial((3.0 * again).backward, upstream)),
    ):
        backward()
        for name, leaf in call.leaves.items():
            assert Error.between(leaf.grad, count * expected[name]).largest <= 1e-11, name


@of_a_weight
def test_doubled_gradient_of_a_tied_weight(kernel, function):
    """The head's share of an embedding's gradient came twice: unsloth-zoo #892."""
    call = draw(function, kernel)
    weight, ids = call.leaves["weight"], call.case.token_ids.where(call.case.mask, 0)
    results = []
    for run in (Call.plain, lambda tied: tied.fused(kernel.backend)):
        weight.grad = None
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        # Not autograd.grad: a backward inside of backward adds to what the parameter holds.
        run(call.with_leaves(hidden=hidden)).sum().backward()
        results.append(weight.grad)
    assert Error.between(results[1], results[0]).largest <= 1e-11


@of_all
def test_more_rows_than_a_grid_has(kernel, function):
    """65,536 rows in the second dimension of a grid do not launch: Liger-Kernel #1294."""
    call = draw(function, kernel, rows=2, length=70_001, size=2, vocabulary=3, mean_step=90.0)
    options = {"chunk_tokens": 2**20} if function in LINEAR else {}
    assert call.case.layout.num_tokens > 65_536
    if kernel.emulated and not kernel.interpreted:
        pytest.skip("every launch has its blocks in one dimension: csrc/cuda/launch.h")
    if kernel.interpreted:
        from compiled_kernels import recorded

        # It raises for other grids.
        launches = recorded(lambda: call.gradients(call.fused(kernel.backend, **options)))
        names = {launched.__name__ for launched, *_ in launches}
        # Of no row that a kernel has found to be live, a head forms a gradient.
        last = "rank_live_rows_kernel" if function in LINEAR else "token_log_probs_backward_kernel"
        assert names >= {"token_log_probs_kernel", last}
        return
    found, expected = call.fused(kernel.backend, **options), call.plain()
    assert Error.between(found, expected).largest <= 1e-11
    assert_same(call.gradients(found), call.gradients(expected), 1e-10)


@grid(cover=1, function=FROM_LOGITS + LINEAR, garbage=[math.nan, math.inf, -math.inf])
def test_nan_from_masked_rows(kernel, function, garbage):
    """0 times NaN is NaN: rows that do not count are not multiplied by a mask: OpenRLHF #1240."""
    call = draw(function, kernel)
    name = "hidden" if function in LINEAR else "logits"
    counts = call.case.mask[..., None]
    results = []
    for filler in (0.0, garbage):
        filled = call.leaves[name].detach().where(counts, filler).requires_grad_()
        of_filler = call.with_leaves(**{name: filled})
        output = of_filler.fused(kernel.backend)
        results.append({"output": output.detach(), **of_filler.gradients(output)})
    clean, found = results
    assert not found[name][~call.case.mask].any()
    for key, value in clean.items():
        assert value.isfinite().all()
        assert torch.equal(found[key], value), key


def many_rows(function, kernel, count, *, alike):
    """Return a call in bf16 on rows that are each a step, and the exact gradients."""
    call = draw(function, kernel, vocabulary=13)
    case, device = call.case, kernel.device
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn((1, count, 5), generator=generator, dtype=torch.float64).to(device)
    case.mask = torch.ones((1, count), dtype=torch.bool, device=device)
    case.layout = StepLayout.from_mask(case.mask, backend="reference").per_token()
    case.token_ids = torch.full((1, count), 3, device=device)
    case.old_log_probs, case.advantages = None, torch.ones(count, device=device)
    leaves = {**call.leaves, "hidden": hidden[:, :1].expand_as(hidden) if alike else hidden}
    rounded = {name: leaf.detach().bfloat16() for name, leaf in leaves.items()}
    call, exact = (
        call.with_leaves(
            **{name: leaf.to(dtype).requires_grad_() for name, leaf in rounded.items()}
        )
        for dtype in (torch.bfloat16, torch.float64)
    )
    return call, exact.gradients(exact.plain())


@of_a_weight
def test_weight_gradient_summed_in_bf16(kernel, function):
    """Chunks were added to a gradient in bf16: Liger-Kernel #512, #827, #1391.

    Of rows that are alike, such a sum stops growing: at 256 times what is added.
    """
    call, expected = many_rows(function, kernel, 40 if kernel.interpreted else 600, alike=True)
    one = call.gradients(call.fused(kernel.backend))
    many = call.gradients(call.fused(kernel.backend, chunk_tokens=1))
    # The product of each chunk is rounded to bf16 once more.
    for name in ("weight", "bias"):
        allowed = Error.between(one[name], expected[name]).rms + 2**-8
        assert Error.between(many[name], expected[name]).rms <= allowed, name


@grid(cover=1, function=LINEAR, chunk=[None, 4])
def test_bias_gradient_summed_in_bf16(kernel, function, chunk):
    """It errs at most twice as much as bf16 rows that are summed in fp32."""
    call, expected = many_rows(function, kernel, 64 if kernel.interpreted else 3000, alike=False)
    logits = call.leaves["hidden"].double() @ call.leaves["weight"].double().t()
    logits = logits + call.leaves["bias"].double()
    if kernel.backend == "triton":
        # Its logits are in the dtype of the head.
        logits = logits.bfloat16().double()
    rows = logits.detach().requires_grad_()
    per_row = torch.autograd.grad(call.with_leaves(logits=rows).plain().sum(), rows)[0]
    summed = per_row.bfloat16().float().sum((0, 1)).bfloat16()
    found = call.gradients(call.fused(kernel.backend, chunk_tokens=chunk))["bias"]
    assert found.dtype == torch.bfloat16
    allowed = 2 * Error.between(summed, expected["bias"]).rms
    assert Error.between(found, expected["bias"]).rms <= allowed
