"""The surrogates: a unit in loops, gradients that are derivatives, and those that are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from grids import grid
from methods import DIFFERENTIABLE, FEW, METHODS
from oracle import LossConfig, OracleLayout, policy_loss
from oracle.surrogates import Unit
from oracle.surrogates import surrogate as unit_in_loops
from targets import Target

from steppo_kernels import StepLayout, StepPOConfig, step_value_loss, steppo_loss
from steppo_kernels.backends.reference.surrogates import surrogate
from steppo_kernels.config import SURROGATES
from steppo_kernels.outputs import POLICY_METRICS, VALUE_METRICS

NAN, INF = math.nan, math.inf


def fp64(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# With and without a clamp of tokens, which a ratio of tokens has not.
CLAMPS = {
    **{name: (method, None) for name, method in METHODS.items()},
    **{
        f"{name}-token-clip": (method, (0.3, 0.4))
        for name, method in METHODS.items()
        if method.ratio != "token"
    },
}
FEW_CLAMPS = {
    **{name: CLAMPS[name] for name in FEW},
    "clip-geometric-token-clip": CLAMPS["clip-geometric-token-clip"],
}


# The function of the reference.

_X = [
    0.0,
    -0.3,
    0.4,
    math.log(0.5),
    math.log(1.5),
    0.7,
    0.7 + 1e-15,
    3.0,
    -1e4,
    1e4,
    -INF,
    INF,
    NAN,
]
_ADVANTAGES = [1.5, -2.0, 0.0]
_GAPS = [0.0, 0.3, -0.3, 0.5, -0.5]
_BOUNDS = (0.5, 0.5)


@pytest.mark.parametrize("bounds_are_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", SURROGATES)
def test_the_reference_has_the_unit_of_the_loops(name, bounds_are_tensors):
    """Values, slopes and clipping: ties, both sides of log_ratio_max, and what is not finite."""
    numbers = {"dual_clip": 1.25} if name == "clip" else {}
    ratio = "token" if name == "tv" else "geometric"
    config = StepPOConfig(surrogate=name, ratio=ratio, log_ratio_max=0.7, **numbers)
    shape = (len(_X), len(_ADVANTAGES), len(_GAPS))
    low, high = (torch.full(shape, bound).double() for bound in _BOUNDS)
    found = surrogate(
        fp64(_X)[:, None, None],
        fp64(_ADVANTAGES)[:, None],
        *((low, high) if bounds_are_tensors else _BOUNDS),
        config,
        fp64(_GAPS),
    )
    value, slope, is_clipped = (made.expand(shape) for made in found)
    for i, x in enumerate(_X):
        for j, advantage in enumerate(_ADVANTAGES):
            for k, gap in enumerate(_GAPS):
                unit = Unit(
                    min(x, 0.7), x >= 0.7, advantage, *_BOUNDS, gap, config.dual_clip,
                    config.soft_temperature,
                )  # fmt: skip
                want = unit_in_loops(name, unit)
                beyond = x > 0.7 and name not in ("cispo", "tv")
                of_loops = (want.value, 0.0 if beyond else want.slope)
                got = (value[i, j, k].item(), slope[i, j, k].item())
                place = f"x={x}, A={advantage}, gap={gap}"
                assert got == pytest.approx(of_loops, rel=1e-13, abs=1e-300, nan_ok=True), place
                assert bool(is_clipped[i, j, k]) == want.clipped, place
                assert (got[1] == 0.0) == (of_loops[1] == 0.0), place


@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_of_a_unit_is_its_slope(name):
    """Also where x is infinite or the upstream gradient unknown."""
    config = StepPOConfig(surrogate=name, ratio="token", log_ratio_max=0.7)
    x = fp64(_X)[:, None].expand(-1, 3).clone().requires_grad_()
    value, slope, _ = surrogate(x, fp64(_ADVANTAGES), *_BOUNDS, config, fp64(0.1))
    (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, slope, rtol=1e-15, atol=0.0, equal_nan=True)
    (grad,) = torch.autograd.grad(value.sum(), x, fp64(NAN))
    assert torch.equal(grad == 0, slope == 0)
    assert not slope.requires_grad


@pytest.mark.parametrize("name", ["clip", "mask", "soft", "quadratic"])
def test_the_slope_of_a_unit_is_its_derivative(name):
    config = StepPOConfig(
        surrogate=name,
        dual_clip=1.7 if name == "clip" else None,
        soft_temperature=(1.5, 3.0) if name == "soft" else (1.0, 1.05),
    )
    x = torch.linspace(-1.1, 1.1, 30, dtype=torch.float64)[:, None].requires_grad_()
    advantages = fp64([1.3, -0.7])
    assert torch.autograd.gradcheck(lambda x: surrogate(x, advantages, 0.4, 0.6, config)[0], (x,))


# The loss of every backend.


class Drawn(NamedTuple):
    """A batch of the given steps, and the same for the loops; masked positions hold garbage."""

    layout: StepLayout | torch.Tensor
    plain: OracleLayout
    log_probs: list[float]
    old_log_probs: list[float]
    generator: torch.Generator

    def floats(self, low: float, high: float, count: int | None = None) -> list[float]:
        """Return numbers by position, NaN at masked ones, or `count` of them."""
        size = self.plain.size if count is None else count
        drawn = torch.rand(size, generator=self.generator, dtype=torch.float64)
        values = (low + (high - low) * drawn).tolist()
        if count is not None:
            return values
        return [v if at in set(self.plain.actions) else NAN for at, v in enumerate(values)]

    def on_tokens(self, per_step: Sequence[float]) -> list[float]:
        return [per_step[step] if step >= 0 else NAN for step in self.plain.step_ids]


_SHAPE = (3, 8)
# Steps whose tokens lie apart, one of a single token, and one that `keep` empties.
_IDS = [-1, 0, 1, 1, -1, 1, 2, 0, 0, 0, 1, 1, 1, -1, 2, 2, 0, -1, 0, 3, 3, -1, 3, 5]
_IDS[7] = -1
_KEPT = [at not in (14, 15) for at in range(24)]
# Runs that end with a row and begin with one.
_RUNS = [step >= 0 for step in _IDS]


def drawn(seed: int, target, masked: bool, spread: float = 0.9) -> Drawn:
    if masked:
        layout = torch.tensor(_RUNS).reshape(_SHAPE).to(target.device)
        plain = OracleLayout.from_mask(_RUNS, _SHAPE)
    else:
        made = StepLayout.from_step_ids(torch.tensor(_IDS).reshape(_SHAPE), backend="reference")
        layout = made.keep(torch.tensor(_KEPT).reshape(_SHAPE)).to(target.device)
        plain = OracleLayout.from_step_ids(_IDS, _SHAPE).keep(_KEPT)
    generator = torch.Generator().manual_seed(seed)
    batch = Drawn(layout, plain, [], [], generator)
    old = batch.floats(-2.0, -0.1)
    new = [a + b for a, b in zip(old, batch.floats(-spread, spread), strict=True)]
    return batch._replace(log_probs=new, old_log_probs=old)


def on(target, values: Sequence[float], shape=_SHAPE) -> torch.Tensor:
    return fp64(values).reshape(shape).to(target.device)


def results(target, batch: Drawn, config: StepPOConfig, advantages, **options) -> dict:
    """Return loss, metrics and gradient of the package."""
    leaf = on(target, batch.log_probs).requires_grad_()
    out = steppo_loss(
        leaf, on(target, batch.old_log_probs), advantages, batch.layout, config=config,
        backend=target.backend, **options,
    )  # fmt: skip
    out.loss.backward()
    return {
        "loss": out.loss.item(),
        "metrics": out.metrics.as_dict(),
        "of_log_probs": leaf.grad.flatten().tolist(),
        "step_log_ratio": None if out.step_log_ratio is None else out.step_log_ratio.tolist(),
    }


@grid(clamped=CLAMPS, interpreted={"clamped": FEW_CLAMPS})
def test_the_gradient_where_advantages_and_weights_vary_in_a_step(target, masked, clamped):
    """Against loops: each token has the gradient of its own A, w and bounds."""
    method, token_clip = clamped
    live = 0
    for seed in range(12):
        batch = drawn(seed, target, masked)
        advantages, weights = batch.floats(-1, 1), batch.floats(0.5, 2)
        advantages[batch.plain.actions[3]] = 0.0
        by_step, bounds = {}, {}
        if not masked and method.surrogate != "soft":
            count = len(batch.plain.steps)
            bounds = {name: batch.floats(0.2, 0.8, count) for name in ("clip_low", "clip_high")}
            by_step = {name: on(target, values, -1) for name, values in bounds.items()}
        want = policy_loss(
            batch.log_probs,
            batch.old_log_probs,
            advantages,
            batch.plain,
            config=LossConfig(**method.numbers, token_clip=token_clip),
            is_weights=weights,
            ratio_center=0.1,
            **bounds,
        )
        if want.margin < 1e-6:
            continue
        found = results(
            target,
            batch,
            method.config(token_clip=token_clip),
            on(target, advantages),
            is_weights=on(target, weights),
            ratio_center=0.1,
            **by_step,
        )
        assert found["loss"] == pytest.approx(want.loss, rel=1e-10, abs=1e-12)
        assert found["metrics"] == pytest.approx(want.metrics, rel=1e-10, abs=1e-12)
        assert found["of_log_probs"] == pytest.approx(want.of_log_probs, rel=1e-10, abs=1e-13)
        assert [x == 0 for x in found["of_log_probs"]] == [x == 0 for x in want.of_log_probs]
        if not masked:
            assert found["step_log_ratio"] == pytest.approx(want.step_log_ratio, abs=1e-12)
        live += sum(map(bool, want.of_log_probs))
        if target.interpreted:
            break
    assert live > 3


@grid(
    method=DIFFERENTIABLE,
    interpreted={"method": {k: v for k, v in FEW.items() if v.is_differentiable}},
)
def test_gradcheck_where_advantages_and_weights_are_constant_in_a_step(target, masked, method):
    """Steps have advantages, weights and bounds of their own; no unit is at a jump."""
    batch = drawn(3, target, masked)
    count = len(batch.plain.steps)
    advantages = on(target, batch.on_tokens(batch.floats(-1, 1, count)))
    options = {"is_weights": on(target, batch.on_tokens(batch.floats(0.5, 2, count)))}
    if not masked:
        options["step_weights"] = on(target, batch.floats(0.5, 2, count), -1)
        if method.surrogate != "soft":
            options["clip_low"] = on(target, batch.floats(0.2, 0.9, count), -1)
            options["clip_high"] = on(target, batch.floats(0.2, 0.9, count), -1)

    def loss(log_probs):
        return steppo_loss(
            log_probs,
            on(target, batch.old_log_probs),
            advantages,
            batch.layout,
            config=method.config(),
            ratio_center=0.1,
            backend=target.backend,
            **options,
        ).loss

    leaf = on(target, batch.log_probs).requires_grad_()
    assert torch.autograd.gradcheck(loss, (leaf,), fast_mode=target.interpreted)


@grid(method=METHODS, interpreted={"method": FEW})
def test_what_is_not_finite_reaches_its_own_units(target, masked, method):
    """Log-ratios may be huge; without advantage the gradient is 0 whatever they are."""
    batch = drawn(5, target, masked)
    step = max(range(len(batch.plain.steps)), key=lambda s: len(batch.plain.steps[s]))
    tokens, others = batch.plain.steps[step], set(batch.plain.actions)
    others -= set(tokens)
    for value in (NAN, INF, -INF, 1e4, -1e4):
        for is_still in (False, True):
            advantages = batch.floats(0.5, 1.0)
            new = list(batch.log_probs)
            new[tokens[0]] = batch.old_log_probs[tokens[0]] + value
            if is_still:
                for at in tokens:
                    advantages[at] = 0.0
            # A unit of this kind has a value like any other, but for the NaN.
            found = results(
                target,
                batch._replace(log_probs=new),
                method.config(),
                on(target, advantages),
                ratio_center=0.1,
            )
            grad = found["of_log_probs"]
            assert all(math.isfinite(grad[at]) for at in others)
            reached = tokens if method.ratio != "token" else tokens[:1]
            if is_still:
                assert [grad[at] for at in tokens] == [0.0] * len(tokens)
            else:
                assert [math.isnan(grad[at]) for at in reached] == [math.isnan(value)] * len(
                    reached
                )
            assert math.isnan(found["loss"]) == math.isnan(value)


@grid(cover=1, method=METHODS, dtype=[torch.float32, torch.float64], interpreted={"method": FEW})
def test_log_ratios_of_any_size(target, masked, method, dtype):
    """Against loops: e^z has no number, or is 0, or all of a step cancel."""
    sizes = [1e4, -1e4, 1.0, -1.0, 0.0]
    live = 0
    for seed in range(12):
        batch = drawn(seed, target, masked)
        picked = torch.randint(0, 5, (24,), generator=batch.generator).tolist()
        old = [-1.0 for _ in batch.old_log_probs]
        # The sums are exact in fp32, as are the log-ratios.
        new = [sizes[k] - 1.0 for k in picked]
        batch = batch._replace(log_probs=new, old_log_probs=old)
        advantages = [round(8 * a) / 8 if a == a else NAN for a in batch.floats(-1, 1)]
        advantages[batch.plain.actions[3]] = 0.0
        want = policy_loss(
            new, old, advantages, batch.plain, config=LossConfig(**method.numbers), ratio_center=0.5
        )
        # A weight between e^-760 and e^-85 is 0 in some dtypes.
        if want.margin < 1e-6:
            continue
        leaf = on(target, new).to(dtype).requires_grad_()
        out = steppo_loss(
            leaf,
            on(target, old).to(dtype),
            on(target, advantages).to(dtype),
            batch.layout,
            config=method.config(),
            ratio_center=0.5,
            backend=target.backend,
        )
        out.loss.backward()
        rel = 1e-10 if dtype == torch.float64 else 2e-5
        found = leaf.grad.flatten().tolist()
        assert out.loss.item() == pytest.approx(want.loss, rel=rel, abs=rel * want.size)
        assert out.metrics.as_dict() == pytest.approx(want.metrics, rel=rel, abs=rel * want.size)
        assert found == pytest.approx(want.of_log_probs, rel=rel, abs=rel * want.slope_size)
        assert [x == 0 for x in found] == [x == 0 for x in want.of_log_probs]
        live += sum(map(bool, found))
        if target.interpreted:
            break
    assert live


@grid(method=METHODS, interpreted={"method": FEW})
@pytest.mark.parametrize("by_token", [False, True], ids=["by-step", "by-token"])
def test_an_unknown_upstream_gradient_reaches_live_tokens_only(target, masked, method, by_token):
    batch = drawn(7, target, masked)
    advantages = batch.floats(-1, 1) if by_token else batch.floats(-1, 1, len(batch.plain.steps))
    advantages[1 if by_token else 0] = 0.0
    if masked and not by_token:
        advantages = batch.on_tokens(advantages)
    shape = _SHAPE if by_token or masked else -1
    leaf = on(target, batch.log_probs).requires_grad_()
    loss = steppo_loss(
        leaf, on(target, batch.old_log_probs), on(target, advantages, shape), batch.layout,
        config=method.config(), backend=target.backend,
    ).loss  # fmt: skip
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (unknown,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, NAN))
    assert torch.equal(unknown.isnan(), plain != 0)
    assert torch.equal(unknown == 0, plain == 0)
    assert bool(plain.any())


@grid(method=METHODS, interpreted={"method": FEW})
def test_a_batch_without_action_tokens(target, masked, method):
    mask = torch.zeros(_SHAPE, dtype=torch.bool)
    layout = mask.to(target.device) if masked else StepLayout.from_rows(mask, [0, 0, 1], [0, 1, 0])
    layout = layout if masked else layout.to(target.device)
    leaf = on(target, [NAN] * 24).requires_grad_()
    out = steppo_loss(
        leaf, leaf.detach(), leaf.detach(), layout, config=method.config(), backend=target.backend
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert not leaf.grad.any()
    metrics = out.metrics.as_dict()
    ones = ("ratio_mean", "ratio_min", "ratio_max")
    assert metrics == {name: float(name in ones) for name in POLICY_METRICS}


@grid(method=METHODS, interpreted={"method": FEW})
def test_on_policy_every_unit_has_its_advantage_as_slope(target, masked, method):
    """At rho = 1 the weight of every surrogate is 1."""
    batch = drawn(1, target, masked)
    leaf = on(target, batch.log_probs).requires_grad_()
    advantages = batch.floats(-1, 1)
    out = steppo_loss(
        leaf, None, on(target, advantages), batch.layout, ratio_center=0.5,
        config=method.config(reduction="sum"), backend=target.backend,
    )  # fmt: skip
    out.loss.backward()
    expected = [0.0] * 24
    for tokens in batch.plain.steps:
        for at in tokens:
            expected[at] = -advantages[at] * method.share(len(tokens))
    assert leaf.grad.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert out.metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("by_token", [False, True], ids=["by-step", "by-token"])
def test_the_reference_has_no_second_derivative(method, by_token):
    """The stop-gradient form would be differentiated wrongly."""
    target = Target("reference", "cpu")
    batch = drawn(2, target, False)
    advantages = batch.floats(0.5, 1) if by_token else [1.0] * len(batch.plain.steps)
    leaf = on(target, batch.log_probs).requires_grad_()
    loss = steppo_loss(
        leaf, on(target, batch.old_log_probs), on(target, advantages, _SHAPE if by_token else -1),
        batch.layout, config=method.config(), backend=target.backend,
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("reduction", ["step_mean", "trajectory_mean", "token_mean", "sum"])
@pytest.mark.parametrize("is_empty", [False, True], ids=["", "empty"])
def test_the_metrics_end_with_the_denominator(target, reduction, is_empty):
    batch = drawn(4, target, False)
    layout = batch.layout.keep(torch.zeros(_SHAPE, device=target.device)) if is_empty else None
    layout = batch.layout if layout is None else layout
    counted = {
        "step_mean": int((layout.step_lengths > 0).sum()),
        "trajectory_mean": 0 if is_empty else 3,
        "token_mean": layout.num_tokens,
        "sum": 1,
    }[reduction]
    log_probs, steps = on(target, batch.log_probs), on(target, [1.0] * layout.num_steps, -1)
    # A given normalizer of nothing is 1: the part adds up with others as before.
    for normalizer, expected in ((None, counted), (7.5, 1.0 if is_empty else 7.5)):
        policy = steppo_loss(
            log_probs, None, steps, layout, config=StepPOConfig(reduction=reduction),
            normalizer=normalizer, backend=target.backend,
        )  # fmt: skip
        value = step_value_loss(
            2 * steps, steps, layout, reduction=reduction, normalizer=normalizer,
            backend=target.backend,
        )  # fmt: skip
        for out, names in ((policy, POLICY_METRICS), (value, VALUE_METRICS)):
            assert out.metrics.values[len(names)].item() == expected
