"""rollout_weights: weights and their metrics against loops, at every level."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from batches import fp64, ragged_mask, random_batch, two_steps
from graphs import in_one_graph
from grids import grid
from hypothesis import strategies as st
from oracle import OracleLayout
from properties import examples

from steppo_kernels import StepLayout, StepPOConfig, rollout_weights, steppo_loss
from steppo_kernels.outputs import ROLLOUT_METRICS

NAN, INF = math.nan, math.inf
LEVELS = ("token", "step", "trajectory")
POOLS = ("mean", "sum")


def oracle_weights(old, rollout, plain, **options):
    """Return the weights of the loops with 1 at masked positions, and the whole result."""
    flat = (values.flatten().tolist() for values in (old, rollout))
    defaults = {"pool": "mean", "low": None, "high": None, "outside": "truncate"}
    want = oracle.rollout_weights(*flat, plain, **{**defaults, **options})
    weights = want.weights
    if options["level"] == "token":
        weights = [w if step >= 0 else 1.0 for w, step in zip(weights, plain.step_ids, strict=True)]
    return weights, want


@pytest.mark.isa
@examples(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20)),
    form=st.sampled_from(["runs", "scattered", "mask", "rows"]),
    level=st.sampled_from(LEVELS),
    pool=st.sampled_from(POOLS),
    bounds=st.sampled_from([(None, None), (0.3, 2.0), (None, 1.5), (0.9, None), (1.2, 1.4)]),
    outside=st.sampled_from(["truncate", "mask"]),
    spread=st.sampled_from([0.5, 30.0]),
)
def test_loops(target, seed, shape, form, level, pool, bounds, outside, spread):
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask(*shape, mean_step=3.0, generator=generator)
    if form == "scattered":
        ids = torch.randint(-1, 4, shape, generator=generator).cummax(1).values
        ids = torch.where(mask, ids, -1)
        kept = torch.rand(shape, generator=generator) < 0.6
        layout = StepLayout.from_step_ids(ids, backend="reference").keep(kept)
        plain = OracleLayout.from_step_ids(ids.flatten().tolist(), shape)
        plain = plain.keep(kept.flatten().tolist())
    elif form == "rows":
        # Two steps a trajectory, some of them empty; the last row is padding.
        mask[0] = False
        rows = list(range(shape[0]))
        valid = torch.tensor([row < shape[0] - 1 for row in rows])
        names, places = [row // 2 for row in rows], [row % 2 for row in rows]
        layout = StepLayout.from_rows(mask, names, places, valid=valid, backend="reference")
        plain = OracleLayout.from_rows(
            mask.flatten().tolist(), shape, names, places, valid=valid.tolist()
        )
    else:
        plain = OracleLayout.from_mask(mask.flatten().tolist(), shape)
        layout = mask if form == "mask" else StepLayout.from_mask(mask, backend="reference")
    is_action = torch.tensor(plain.step_ids).reshape(shape) >= 0
    old, noise = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    old, rollout = (torch.where(is_action, x, NAN) for x in (old, old + spread * noise))
    options = {
        "level": level, "pool": pool, "low": bounds[0], "high": bounds[1], "outside": outside,
    }  # fmt: skip
    found = rollout_weights(
        old.to(target.device), rollout.to(target.device), layout.to(target.device),
        **options, backend=target.backend,
    )  # fmt: skip
    weights, want = oracle_weights(old, rollout, plain, **options)
    if want.margin > 1e-9:
        assert found.weights.shape == (shape if level == "token" else (len(plain.steps),))
        assert found.weights.flatten().tolist() == pytest.approx(weights, rel=1e-12)
        assert found.metrics.as_dict() == pytest.approx(want.metrics, rel=1e-12)


def two(target, old, rollout, **options):
    """Call it for a step of two tokens and one of a single token, masked positions being NaN."""
    mask, layout = two_steps(target)
    old, rollout = (torch.where(mask, fp64([x], target.device), NAN) for x in (old, rollout))
    return rollout_weights(old, rollout, layout, **options, backend=target.backend)


@grid(level=LEVELS, outside=["truncate", "mask"])
def test_what_has_no_token_weighs_one_outside_of_all_bounds(target, level, outside):
    """Masked positions, empty steps, and steps of no trajectory."""
    mask = torch.tensor([[1, 0], [0, 0], [0, 0], [1, 0]], device=target.device)
    valid = torch.tensor([True, True, True, False], device=target.device)
    layout = StepLayout.from_rows(mask, [7, 7, 8, 9], [0, 1, 0, 0], valid=valid)
    x = torch.zeros(4, 2, device=target.device)
    found = rollout_weights(
        x, x, layout, level=level, low=2.0, high=3.0, outside=outside, backend=target.backend
    )
    moved = 2.0 if outside == "truncate" else 0.0
    expected = {
        "token": [[moved, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
        "step": [moved, 1.0, 1.0, 1.0],
        # The second step has no token of its own, but its trajectory has.
        "trajectory": [moved, moved, 1.0, 1.0],
    }[level]
    assert found.weights.tolist() == expected
    # They are of the weights before the bounds, of the one unit there is.
    assert found.metrics.as_dict() == {
        "mean": 1.0, "min": 1.0, "max": 1.0, "ess": 1.0, "outside_fraction": 1.0,
    }  # fmt: skip


@grid(level=LEVELS)
def test_a_batch_without_action_tokens(target, level):
    mask = torch.zeros(2, 3, dtype=torch.bool, device=target.device)
    x = torch.full((2, 3), NAN, device=target.device)
    for layout in (mask, StepLayout.from_mask(mask), StepLayout.from_rows(mask, [0, 1], [0, 0])):
        found = rollout_weights(x, x, layout, level=level, high=0.5, backend=target.backend)
        assert bool((found.weights == 1).all())
        assert found.metrics.as_dict() == {
            "mean": 1.0, "min": 1.0, "max": 1.0, "ess": 1.0, "outside_fraction": 0.0,
        }  # fmt: skip


def test_metrics_by_hand(target):
    log2 = math.log(2.0)
    found = two(target, [0.0, log2, 0.0, 2 * log2], [0.0] * 4, level="token", high=2.0)
    assert found.weights.flatten().tolist() == pytest.approx([1.0, 2.0, 1.0, 2.0])
    metrics = found.metrics.as_dict()
    assert list(metrics) == list(ROLLOUT_METRICS)
    assert metrics == pytest.approx(
        {"mean": 7 / 3, "min": 1.0, "max": 4.0, "ess": 49 / 63, "outside_fraction": 1 / 3}
    )


@grid(level=LEVELS, pool=POOLS)
def test_the_pooled_log_ratio_is_clamped(target, level, pool):
    """And not that of each token: two that are far off may make up for each other."""
    found = two(target, [50.0, -50.0, 0.0, 99.0], [0.0] * 4, level=level, pool=pool)
    most, least = math.exp(20.0), math.exp(-20.0)
    expected = {
        "token": [most, least, 1.0, most],
        "step": [1.0, most],
        "trajectory": [most, most],
    }[level]
    assert found.weights.flatten().tolist() == pytest.approx(expected, rel=1e-13)


@grid(level=LEVELS, bad=[NAN, INF, -INF])
def test_a_token_that_the_engine_has_not_scored(target, level, bad):
    """It raises where a look costs nothing, and shows as NaN elsewhere; masked ones may be bad."""
    values = [0.0, bad, 0.0, 0.0]
    if target.device == "cpu":
        with pytest.raises(ValueError, match=f"rollout_log_probs: got {bad} at an action token"):
            two(target, [0.0] * 4, values, level=level)
    else:
        found = two(target, [0.0] * 4, values, level=level, high=2.0, outside="mask")
        expected = {"token": [0, 1, 0, 0], "step": [1, 0], "trajectory": [1, 1]}[level]
        assert found.weights.isnan().flatten().tolist() == [flag == 1 for flag in expected]
        assert found.metrics["mean"].isnan()
    mask, layout = two_steps(target)
    x = torch.zeros(1, 4, device=target.device)
    known = layout.keep(torch.tensor([[1, 0, 1, 1]], device=target.device))
    rollout = torch.where(mask, torch.tensor([values], device=target.device), bad)
    assert bool(
        (rollout_weights(x, rollout, known, level=level, backend=target.backend).weights == 1).all()
    )


@grid(level=LEVELS)
def test_a_compiled_call_does_not_look(target, level):
    if target.interpreted:
        pytest.skip("Triton's interpreter is not traced")
    # What was compiled for other backends counts against a limit.
    torch._dynamo.reset()
    batch = random_batch(3, 3, 12, device=target.device)
    rollout = batch.log_probs.clone()
    rollout.view(-1)[batch.layout.token_index[0]] = -INF

    def weights(old, rollout):
        found = rollout_weights(
            old, rollout, batch.layout, level=level, high=2.0, backend=target.backend
        )
        return found.weights, found.metrics.values

    compiled = in_one_graph(weights)
    found, metrics = compiled(batch.old_log_probs, rollout)
    assert bool(found.isnan().any())
    assert bool(metrics[0].isnan())
    rollout = batch.log_probs
    found, expected = (
        function(batch.old_log_probs, rollout)[0] for function in (compiled, weights)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


@grid(level=LEVELS, pool=POOLS)
def test_a_mask_has_the_weights_of_its_layout(target, level, pool):
    batch = random_batch(4, 3, 12, device=target.device)
    options = {"level": level, "pool": pool, "low": 0.5, "high": 2.0, "backend": target.backend}
    arguments = batch.old_log_probs, batch.log_probs
    expected = rollout_weights(*arguments, batch.layout, **options)
    for mask in (batch.mask, batch.mask.long()):
        found = rollout_weights(*arguments, mask, **options)
        assert torch.equal(found.weights, expected.weights)
        assert torch.equal(found.metrics.values, expected.metrics.values)
    row = rollout_weights(*(x[0] for x in arguments), batch.mask[0], **options)
    whole = rollout_weights(*(x[:1] for x in arguments), batch.mask[:1], **options)
    assert torch.equal(row.weights.flatten(), whole.weights.flatten())


@grid(level=LEVELS)
def test_dtypes_and_forms(target, level):
    batch = random_batch(5, 2, 9, log_ratios=(-0.5, 0.5), device=target.device)
    old, rollout = batch.old_log_probs, batch.log_probs
    expected = rollout_weights(old, rollout, batch.layout, level=level, backend=target.backend)
    assert expected.weights.dtype == torch.float32
    assert expected.metrics.values.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = rollout_weights(
            old.to(dtype).flatten().requires_grad_(),
            rollout.to(dtype)[:, None].requires_grad_(),
            batch.layout,
            level=level,
            backend=target.backend,
        )
        assert not found.weights.requires_grad
        assert not found.metrics.values.requires_grad
        assert found.weights.shape == expected.weights.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.weights.dtype == wide
        torch.testing.assert_close(
            found.weights, expected.weights.to(wide), rtol=8 * torch.finfo(dtype).eps, atol=1e-6
        )


@grid(level=LEVELS)
def test_a_loss_takes_the_weights_as_they_are(target, level):
    batch = random_batch(6, 3, 12, dtype=torch.float64, device=target.device)
    sampled = batch.old_log_probs + 0.1
    weights = rollout_weights(
        batch.old_log_probs, sampled, batch.layout, level=level, backend=target.backend
    ).weights
    losses = [
        steppo_loss(
            batch.log_probs, batch.old_log_probs, batch.advantages, batch.layout,
            config=StepPOConfig(clip_low=0.2, clip_high=0.2), is_weights=given,
            backend=target.backend,
        ).loss
        for given in (weights, None)
    ]  # fmt: skip
    torch.testing.assert_close(losses[0], math.exp(-0.1) * losses[1], rtol=1e-12, atol=0.0)


_TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
_MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"level": "row"}, ValueError, "level: got 'row', expected one of 'token', 'step', 'traj"),
        ({"pool": "max"}, ValueError, "pool: got 'max', expected one of 'mean', 'sum'"),
        ({"outside": "drop"}, ValueError, "outside: got 'drop', expected one of 'truncate', "),
        ({"low": 3.0, "high": 2.0}, ValueError, "low: got 3.0, expected at most high, which is 2"),
        ({"low": -0.1}, ValueError, "low: got -0.1, expected a finite number above 0, or 0"),
        ({"high": NAN}, ValueError, "high: got nan, expected a finite number above 0, or 0"),
        ({"high": INF}, ValueError, "high: got inf, expected a finite number above 0, or 0"),
        ({"high": "2"}, TypeError, "high: got str, expected a finite number above 0, or 0"),
        ({"low": True}, TypeError, "low: got bool, expected a finite number above 0, or 0"),
        ({"old_log_probs": None}, TypeError, "old_log_probs: got NoneType, expected a torch.Ten"),
        ({"old_log_probs": _TOKENS[0]}, ValueError, r"old_log_probs: got shape \(6,\), expected"),
        ({"rollout_log_probs": _TOKENS.T}, ValueError, r"rollout_log_probs: got shape \(6, 2\)"),
        ({"rollout_log_probs": _MASK}, TypeError, "rollout_log_probs: got torch.int64, expected"),
        ({"layout": _MASK + 1}, ValueError, "layout: got the value 2, expected only 0 and 1"),
        ({"layout": None}, TypeError, "layout: got NoneType, expected a StepLayout"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu', expected one of 'auto'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("level", LEVELS)
def test_wrong_calls(level, changed, error, match):
    arguments = {
        "old_log_probs": _TOKENS,
        "rollout_log_probs": _TOKENS,
        "layout": _MASK,
        "level": level,
        **changed,
    }
    with pytest.raises(error, match=match):
        rollout_weights(**arguments)
