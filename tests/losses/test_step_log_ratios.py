"""step_log_ratios: values and gradients against loops, and objectives made of them."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from batches import Error, fp64, ragged_mask, random_batch, two_steps
from graphs import in_one_graph
from grids import grid
from hypothesis import strategies as st
from oracle import OracleLayout
from properties import examples

from steppo_kernels import StepLayout, StepPOConfig, step_log_ratios, steppo_loss
from steppo_kernels.config import RATIOS

_EPS = torch.finfo(torch.float32).eps
NAN = math.nan


@pytest.mark.isa
@examples(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20)),
    form=st.sampled_from(["runs", "scattered", "mask"]),
    ratio=st.sampled_from(RATIOS),
    center=st.sampled_from([None, 0.07]),
    on_policy=st.booleans(),
)
def test_loops(target, seed, shape, form, ratio, center, on_policy):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    if form == "scattered":
        # Ids that ascend in time are shuffled over the row by tokens that share them, and some
        # steps lose all of their tokens.
        ids = torch.randint(-1, 4, shape, generator=generator).cummax(1).values
        ids = torch.where(torch.rand(shape, generator=generator) < 0.3, -1, ids)
        kept = torch.rand(shape, generator=generator) < 0.6
        plain = OracleLayout.from_step_ids(ids.flatten().tolist(), shape)
        plain = plain.keep(kept.flatten().tolist())
        layout = StepLayout.from_step_ids(ids, backend="reference").keep(kept).to(target.device)
        is_action = kept & (ids >= 0)
    else:
        is_action = ragged_mask(*shape, mean_step=3.0, generator=generator)
        plain = OracleLayout.from_mask(is_action.flatten().tolist(), shape)
        layout = is_action.to(target.device)
        layout = layout if form == "mask" else StepLayout.from_mask(layout, backend="reference")
    new, old = (torch.where(is_action, numbers(*shape), NAN) for _ in range(2))
    upstream = numbers(len(plain.steps))
    leaf = new.to(target.device).requires_grad_()
    found = step_log_ratios(
        leaf,
        None if on_policy else old.to(target.device),
        layout,
        ratio=ratio,
        ratio_center=center,
        backend=target.backend,
    )
    found.backward(upstream.to(target.device))
    values, gradient = oracle.step_log_ratios(
        new.flatten().tolist(),
        None if on_policy else old.flatten().tolist(),
        plain,
        ratio=ratio,
        upstream=upstream.tolist(),
        ratio_center=center,
    )
    assert found.tolist() == pytest.approx(values, rel=1e-12, abs=1e-12)
    assert leaf.grad.flatten().tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("ratio", RATIOS)
def test_they_are_what_the_loss_reports(target, ratio):
    batch = random_batch(2, log_ratios=(-0.5, 0.5), dtype=torch.float64, device=target.device)
    reported = steppo_loss(
        batch.log_probs, batch.old_log_probs, batch.advantages, batch.layout,
        config=StepPOConfig(ratio=ratio), backend=target.backend,
    ).step_log_ratio  # fmt: skip
    found = step_log_ratios(
        batch.log_probs, batch.old_log_probs, batch.layout, ratio=ratio, backend=target.backend
    )
    torch.testing.assert_close(found, reported, rtol=1e-13, atol=1e-14)


@grid(ratio=RATIOS)
def test_derivatives_of_both_orders(target, ratio):
    """It is linear, so that an objective made of it may be differentiated twice."""
    batch = random_batch(3, 2, 9, log_ratios=(-0.5, 0.5), dtype=torch.float64, device=target.device)

    def objective(log_probs):
        return step_log_ratios(
            log_probs, batch.old_log_probs, batch.layout, ratio=ratio, ratio_center=0.1,
            backend=target.backend,
        ).exp()  # fmt: skip

    leaf = (batch.log_probs.requires_grad_(),)
    assert torch.autograd.gradcheck(objective, leaf, fast_mode=target.interpreted)
    assert torch.autograd.gradgradcheck(objective, leaf, fast_mode=True)


@grid(ratio=["geometric", "product", "centered"])
def test_a_surrogate_in_three_lines(target, ratio):
    """The clip of StepPO, written with it, has the loss and the gradient of `steppo_loss`."""
    batch = random_batch(5, ratio=ratio, log_ratios=(-0.5, 0.5), dtype=torch.float64)
    batch = batch.to(torch.float64, target.device)
    config = StepPOConfig(ratio=ratio, clip_low=0.2, clip_high=0.3)
    own, fused = (batch.log_probs.clone().requires_grad_() for _ in range(2))
    rho = step_log_ratios(
        own, batch.old_log_probs, batch.layout, ratio=ratio, backend=target.backend
    ).exp()
    each = torch.maximum(-batch.advantages * rho, -batch.advantages * rho.clamp(0.8, 1.3))
    each.mean().backward()
    loss = steppo_loss(
        fused, batch.old_log_probs, batch.advantages, batch.layout, config=config,
        backend=target.backend,
    ).loss  # fmt: skip
    loss.backward()
    torch.testing.assert_close(each.mean(), loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(own.grad, fused.grad, rtol=1e-12, atol=1e-13)
    assert bool(own.grad.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (4,), (1, 1, 4)], ids=str)
def test_gradients_come_back_in_dtype_and_shape(target, dtype, shape):
    mask, layout = two_steps(target)
    leaf = torch.where(mask, -0.5, NAN).reshape(shape).to(dtype).requires_grad_()
    old = torch.full((1, 4), -1.0, device=target.device, dtype=torch.float64)
    found = step_log_ratios(leaf, old, layout, ratio="product", backend=target.backend)
    assert found.dtype == torch.float32
    assert found.tolist() == [1.0, 0.5]
    (found * fp64([2.0, 3.0], target.device)).sum().backward()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.shape == shape
    assert leaf.grad.flatten().tolist() == [2.0, 2.0, 0.0, 3.0]


@grid(ratio=RATIOS)
def test_what_is_not_finite_stays_in_its_step(target, ratio):
    mask, layout = two_steps(target)
    old = torch.where(mask, -1.0, NAN).double()
    leaf = torch.where(mask, fp64([[NAN, -1.0, NAN, -0.5]], target.device), math.inf)
    leaf.requires_grad_()
    found = step_log_ratios(
        leaf, old, layout, ratio=ratio, ratio_center=0.0, backend=target.backend
    )
    assert found[0].isnan()
    assert found[1] == 0.5
    found.backward(fp64([1.0, math.inf], target.device))
    share = {"geometric": 0.5, "product": 1.0, "centered": 2**-0.5, "token": 0.5}[ratio]
    assert leaf.grad.flatten().tolist() == pytest.approx([share, share, 0.0, math.inf])


@grid(ratio=RATIOS)
def test_without_action_tokens_they_are_zero_with_a_graph(target, ratio):
    mask = torch.zeros(2, 3, dtype=torch.bool, device=target.device)
    leaf = torch.full((2, 3), NAN, device=target.device, requires_grad=True)
    for layout, count in ((StepLayout.from_rows(mask, [0, 1], [0, 0]), 2), (mask, 0)):
        found = step_log_ratios(
            leaf, leaf.detach(), layout, ratio=ratio, ratio_center=0.3, backend=target.backend
        )
        assert found.tolist() == [0.0] * count
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        assert not grad.any()


@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_they_are_zero_whatever_the_center(target, ratio):
    batch = random_batch(6, device=target.device)
    leaf = batch.log_probs.requires_grad_()
    found = step_log_ratios(
        leaf, None, batch.layout, ratio=ratio, ratio_center=0.5, backend=target.backend
    )
    assert not found.any()
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    assert torch.equal(grad != 0, batch.mask)


@pytest.mark.isa
@grid(ratio=RATIOS)
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel, ratio):
    rms = {"kernel": 0.0, "reference": 0.0}
    for seed in range(2 if kernel.interpreted else 12):
        batch = random_batch(seed, 4, 400, mean_step=100.0)

        def ratios(dtype, backend, device, batch=batch):
            moved = batch.to(dtype, device)
            return step_log_ratios(
                moved.log_probs, moved.old_log_probs, moved.layout, ratio=ratio, backend=backend
            )

        exact = ratios(torch.float64, "reference", "cpu")
        plain = ratios(torch.float32, "reference", "cpu")
        found = ratios(torch.float32, kernel.backend, kernel.device)
        rms["kernel"] += Error.between(found, exact).rms ** 2
        rms["reference"] += Error.between(plain, exact).rms ** 2
    assert rms["kernel"] ** 0.5 <= 2 * rms["reference"] ** 0.5 + _EPS


def test_a_compiled_objective_is_one_graph(target):
    if target.interpreted:
        pytest.skip("Triton's interpreter is not traced")
    batch = random_batch(7, 3, 12, dtype=torch.float64, device=target.device)

    def objective(log_probs):
        x = step_log_ratios(
            log_probs, batch.old_log_probs, batch.layout, ratio="centered", backend=target.backend
        )
        return (batch.advantages * x.exp()).mean()

    compiled = in_one_graph(objective)
    leaves = [batch.log_probs.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((objective, compiled), leaves, strict=True):
        function(leaf).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-13, atol=0.0)


_TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
_MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        (
            {"log_probs": _TOKENS.T},
            ValueError,
            r"log_probs: got shape \(6, 2\), expected the token",
        ),
        ({"log_probs": _TOKENS.long()}, TypeError, "log_probs: got torch.int64, expected float32"),
        ({"log_probs": None}, TypeError, "log_probs: got NoneType, expected a torch.Tensor"),
        ({"old_log_probs": _TOKENS[:1]}, ValueError, r"old_log_probs: got shape \(1, 6\)"),
        ({"old_log_probs": 0.5}, TypeError, "old_log_probs: got float, expected a torch.Tensor"),
        ({"layout": _MASK * 2}, ValueError, "layout: got the value 2, expected only 0 and 1"),
        ({"layout": [1, 0]}, TypeError, "layout: got list, expected a StepLayout"),
        ({"ratio": "mean"}, ValueError, "ratio: got 'mean', expected one of 'geometric', "),
        ({"ratio_center": NAN}, ValueError, "ratio_center: got nan, expected a finite number"),
        ({"ratio_center": _TOKENS}, ValueError, r"ratio_center: got shape \(2, 6\), expected a 0-"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu', expected one of 'auto'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_calls(changed, error, match):
    arguments = {"log_probs": _TOKENS, "old_log_probs": _TOKENS, "layout": _MASK, **changed}
    with pytest.raises(error, match=match):
        step_log_ratios(**arguments)
