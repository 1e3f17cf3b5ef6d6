"""The CUDA kernels of value_loss, on the host."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_layouts import layout_of

from steppo_kernels import StepLayout
from steppo_kernels.backends.compiled import value_loss
from steppo_kernels.backends.reference import value_loss as reference
from steppo_kernels.config import REDUCTIONS
from steppo_kernels.layout.step_layout import require_layout

_SHAPES = [(0, 5), (1, 1), (1, 7), (3, 0), (5, 33), (40, 61), (7, 2049)]
_FORMS = ["mask", "rows", "tokens", "trajectories", "kept"]


class Case:
    """Random inputs on a layout, with NaN wherever nothing may be read."""

    def __init__(
        self,
        layout,
        dtype,
        *,
        per_token=True,
        returns_per_token=False,
        old_per_token=True,
        weighted=False,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.layout = layout
        self.per_token, self.old_per_token = per_token, old_per_token
        self.returns_per_token = returns_per_token
        is_used = layout.step_lengths > 0
        reached = torch.zeros(layout.step_ids.numel(), dtype=torch.bool)
        reached[layout.state_index[is_used]] = True

        def drawn(used):
            numbers = torch.randn(used.shape, dtype=torch.float64, generator=generator)
            return torch.where(used, numbers, torch.nan).to(dtype)

        self.values = drawn(reached if per_token else is_used)
        self.old_values = drawn(reached if old_per_token else is_used)
        self.returns = drawn(reached if returns_per_token else is_used)
        self.step_weights = drawn(is_used).abs() if weighted else None
        self.normalizer = None

    def on(self, native, reduction, clip=0.5, need_grad=True):
        """Return loss, metrics, the gradient of the loss and what it lacks."""
        found = value_loss.value_loss(
            native,
            self.values,
            self.returns,
            self.old_values,
            self.step_weights,
            self.normalizer,
            self.layout.states,
            (clip, float(REDUCTIONS.index(reduction))),
            self.per_token,
            self.returns_per_token,
            self.old_per_token,
            need_grad,
        )
        assert (found[2] is not None) == need_grad
        return found

    def exact(self, reduction, clip=0.5):
        """Return the same in fp64, from the reference."""
        values = self.values.double().requires_grad_()
        loss, metrics = reference.value_loss(
            values,
            self.returns.double(),
            None if self.old_values is None else self.old_values.double(),
            None if self.step_weights is None else self.step_weights.double(),
            self.normalizer,
            self.layout.states,
            clip,
            reduction,
            self.per_token,
            self.returns_per_token,
            self.old_per_token,
        )
        loss.backward()
        return loss.detach(), metrics, values.grad


def check(found, exact, dtype):
    """The gradient is that of the loss but for a factor, which comes last."""
    (loss, metrics, grad, scale), (exact_loss, exact_metrics, exact_grad) = found, exact
    eps = torch.finfo(dtype).eps
    near = {"rtol": 4 * eps, "atol": 4 * eps}
    torch.testing.assert_close(loss.double(), exact_loss, equal_nan=True, **near)
    torch.testing.assert_close(metrics, exact_metrics, rtol=1e-11, atol=1e-12, equal_nan=True)
    scaled = torch.where(grad == 0, 0.0, grad.double() * scale)
    torch.testing.assert_close(scaled, exact_grad, equal_nan=True, **near)
    assert torch.equal(grad == 0, exact_grad == 0)


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_reference(cuda, form, shape, dtype):
    layout = layout_of(form, shape)
    for seed, reduction in enumerate(REDUCTIONS):
        ways = {"per_token": seed % 2 == 0, "old_per_token": seed < 2}
        ways |= {"returns_per_token": seed in (1, 2), "weighted": seed > 1}
        case = Case(layout, dtype, seed=seed, **ways)
        if seed == 2:
            case.normalizer = torch.tensor(3.5, dtype=torch.float64)
        if seed == 3:
            case.old_values = None
        check(case.on(cuda, reduction), case.exact(reduction), dtype)


def test_a_normalizer_may_come_by_value(cuda, monkeypatch):
    case = Case(layout_of("tokens", (5, 30)), torch.float64, seed=2)
    case.normalizer = torch.tensor(3.5, dtype=torch.float64)
    by_address = case.on(cuda, "step_mean")
    monkeypatch.setattr(value_loss, "number", lambda value, _: (0, value.item()))
    for one, same in zip(case.on(cuda, "step_mean"), by_address, strict=True):
        assert torch.equal(one, same)


def test_many_steps(cuda):
    """More than one a thread, and as many blocks as there may be."""
    layout = layout_of("tokens", (3, 60000))
    assert layout.num_steps > 256 * 256
    case = Case(layout, torch.float32)
    check(case.on(cuda, "token_mean"), case.exact("token_mean"), torch.float32)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("offset", [1, 3])
def test_tensors_may_begin_anywhere(cuda, per_token, offset, monkeypatch):
    case = Case(layout_of("mask", (5, 33)), torch.float32, per_token=per_token)
    exact = case.exact("step_mean")
    for name in ("values", "returns", "old_values"):
        tensor = getattr(case, name)
        setattr(case, name, torch.cat((tensor.new_zeros(offset), tensor))[offset:])
    around = []

    def empty_like(tensor):
        if tensor.dim() == 0 or tensor.dtype == torch.float64:
            return tensor.new_empty(tensor.shape)
        around.append(torch.full((offset + tensor.numel() + 5,), torch.nan))
        return around[0][offset:-5]

    monkeypatch.setattr(torch, "empty_like", empty_like)
    found = case.on(cuda, "step_mean")
    check(found, exact, torch.float32)
    (memory,) = around
    assert memory.isnan().sum() == offset + 5


def test_bits_do_not_depend_on_the_order_of_threads(cuda):
    case = Case(layout_of("rows", (900, 5)), torch.float32)
    found = []
    for seed in range(5):
        cuda.kernels.order(seed, 1 + seed % 3)
        found.append(case.on(cuda, "trajectory_mean"))
        found.append((*case.on(cuda, "trajectory_mean", need_grad=False)[:2], *found[0][2:]))
    for one in found:
        for a, b in zip(one, found[0], strict=True):
            assert torch.equal(a, b)


def test_metrics_are_those_of_the_cpu(cuda):
    native = pytest.importorskip("steppo_kernels.backends.compiled.launch").native_of("cpu")
    case = Case(layout_of("mask", (40, 61)), torch.float64)
    for reduction in REDUCTIONS:
        found, expected = case.on(cuda, reduction), case.on(native, reduction)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found[2] * found[3], expected[2], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["values", "returns", "old_values"])
@pytest.mark.parametrize("steps", [1, 2, 700])
def test_what_is_not_finite_shows(cuda, bad, name, steps):
    layout = require_layout(StepLayout.from_mask(torch.ones(steps, 2), backend="reference"))
    case = Case(layout, torch.float32, per_token=False, old_per_token=False)
    getattr(case, name)[steps // 2] = bad
    check(case.on(cuda, "step_mean"), case.exact("step_mean"), torch.float32)


def test_returns_without_spread_explain_nothing(cuda):
    layout = require_layout(StepLayout.from_mask(torch.ones(700, 2), backend="reference"))
    case = Case(layout, torch.float32, per_token=False, old_per_token=False)
    case.returns.fill_(0.1)
    _, metrics, *_ = case.on(cuda, "step_mean")
    assert (metrics[4], metrics[7]) == (0, 0)


def test_ties_and_borders_of_the_clip_range(cuda):
    """At the border, and where both losses are equal, the value is trained."""
    layout = require_layout(StepLayout.from_mask(torch.ones(4, 1), backend="reference"))
    case = Case(layout, torch.float64, per_token=False, old_per_token=False)
    case.values = torch.tensor([0.5, 1.0, 1.0, -1.0], dtype=torch.float64)
    case.old_values = torch.zeros(4, dtype=torch.float64)
    case.returns = torch.tensor([0.0, 0.75, 1.0, 1.0], dtype=torch.float64)
    loss, metrics, grad, _ = case.on(cuda, "sum")
    # Of the third step the clipped loss is larger.
    assert grad.tolist() == [0.5, 0.25, 0.0, -2.0]
    assert loss == math.fsum([0.125, 0.03125, 0.125, 2.0])
    assert metrics[1] == 0.25
