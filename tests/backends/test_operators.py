"""The registered operators: opcheck, and the public functions under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import Batch, random_batch
from functions_of_steps import ON_TOKENS
from graphs import in_one_graph
from grids import grid
from head_samples import head_samples
from kept_samples import kept_samples
from torch._dynamo.testing import CompileCounterWithBackend

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
    token_log_probs,
)
from steppo_kernels.backends import operators
from steppo_kernels.config import RATIOS, REDUCTIONS, SURROGATES
from steppo_kernels.layout.step_layout import require_layout

# Tracing would look into the patched allocations.
pytestmark = pytest.mark.unpoisoned

_PENALTIES = {"kl_coef": 0.1, "entropy_coef": 0.05}
_BOUNDED = {"clip_low": 0.2, "clip_high": 0.3, **_PENALTIES}
_CONFIG = StepPOConfig(dual_clip=9.0, **_BOUNDED)
# Every surrogate, every ratio and every reduction.
_CONFIGS = [
    _CONFIG,
    StepPOConfig(ratio="token", reduction="token_mean", **_BOUNDED),
    StepPOConfig(surrogate="cispo", ratio="product", reduction="sum", **_BOUNDED),
    StepPOConfig(surrogate="mask", ratio="centered", token_clip=(0.1, 0.2), **_BOUNDED),
    StepPOConfig(surrogate="soft", reduction="trajectory_mean", **_PENALTIES),
    StepPOConfig(surrogate="quadratic", kl_estimator="k1", **_BOUNDED),
    StepPOConfig(surrogate="tv", ratio="token", kl_estimator="k2", **_BOUNDED),
]


def finite_batch(target, seed=1, rows=3, length=30, dtype=torch.float32) -> Batch:
    """A batch whose masked positions hold 0, as comparisons of NaN fail."""
    batch = random_batch(seed, rows, length, dtype=dtype, device=target.device)
    for name in ON_TOKENS:
        getattr(batch, name)[~batch.mask] = 0.0
    return batch


def samples(batch: Batch) -> dict[str, list[tuple]]:
    """Arguments of every operator, without the last; with and without optional ones."""
    layout, mask = batch.layout, batch.mask.reshape(-1)
    rows = layout.row_offsets
    ids = layout.step_ids.reshape(-1)
    flat = {
        name: getattr(batch, name).reshape(-1)
        for name in (
            "log_probs",
            "old_log_probs",
            "ref_log_probs",
            "entropy",
            "values",
            "old_values",
            "rewards",
        )
    }
    normalizer = torch.tensor(5.0, dtype=torch.float64, device=mask.device)
    marks = torch.tensor([1, 2], device=mask.device)
    tokens = (torch.arange(mask.numel(), device=mask.device) * 7) % 5
    ones = torch.arange(3, device=mask.device)
    # Two starts and two stops of one token each, and one end.
    markers = (marks, ones, marks[:1] + 2, marks - 1, ones)
    per_step = torch.rand(layout.num_steps, device=mask.device, dtype=batch.log_probs.dtype)
    held = require_layout(layout)
    timeline, states = tuple(held.timeline), tuple(held.states)
    return {
        "segment_mask": [(mask, None, rows), (mask, ids % 2 == 0, rows)],
        "count_steps": [(mask, None, rows), (mask, ids % 2 == 0, rows)],
        "lay_out_runs": [
            (mask, None, rows, layout.trajectory_offsets, layout.num_steps, layout.num_tokens)
        ],
        "segment_ids": [(ids.to(torch.int64), rows)],
        "segment_rows": [(batch.mask, None), (batch.mask, batch.mask[:, 0].contiguous())],
        "mark_actions": [
            (tokens, rows, *markers),
            (tokens, rows, *markers[:3], marks[:0], ones[:1]),
        ],
        "compact": [(ids, layout.num_steps, layout.num_tokens)],
        "row_trajectories": [(layout.trajectory_offsets, layout.token_index, layout.step_offsets)],
        "broadcast_to_tokens": [(per_step, ids)],
        "sum_over_steps": [(flat["rewards"], layout.token_index, layout.step_offsets)],
        "step_gae": [
            (
                flat["rewards"],
                flat["values"],
                batch.bootstrap_values,
                timeline,
                (0.99, 0.95, 1.0),
                True,
                True,
                True,
            ),
            (per_step, batch.returns, None, timeline, (0.99, 1.0, 0.0), False, False, False),
        ],
        "value_loss": [
            (
                flat["values"],
                batch.returns,
                flat["old_values"],
                None,
                normalizer,
                states,
                (0.5, 1.0),
                True,
                False,
                True,
                True,
            ),
            (
                per_step,
                flat["rewards"],
                None,
                batch.step_weights,
                None,
                states,
                (0.5, 2.0),
                False,
                True,
                False,
                False,
            ),
        ],
        **policy_samples(batch),
        **head_samples(batch),
        **kept_samples(batch),
    }


def policy_samples(batch: Batch) -> dict[str, list[tuple]]:
    """Arguments of both forms of the policy loss: every surrogate, each with and without options.

    The first of each has every optional argument, and the second none.
    """
    layout, mask = batch.layout, batch.mask.reshape(-1)
    tokens = {
        name: getattr(batch, name).reshape(-1)
        for name in ("log_probs", "old_log_probs", "ref_log_probs", "entropy")
    }
    token_advantages = torch.where(mask, batch.entropy.reshape(-1) - 1.5, 0.0)
    spread = broadcast_to_tokens(batch.advantages, layout, backend="reference").view(-1)
    numbers = {
        "ratio_center": torch.tensor(0.1, dtype=torch.float64),
        "normalizer": torch.tensor(5.0, dtype=torch.float64, device=mask.device),
    }
    by_step = {
        "step_weights": batch.step_weights,
        "clip_low": batch.step_weights / 4,
        "clip_high": batch.is_weights / 4,
    }
    no_bounds = {"step_weights": batch.step_weights}
    found = {"policy_loss": [], "policy_loss_masked": []}
    for config in _CONFIGS:
        kernel = tuple(config.kernel)
        full = {
            **tokens,
            **numbers,
            "is_weights": batch.token_weights.reshape(-1),
            "config": kernel,
            "need_grad": True,
            "need_entropy_grad": True,
        }
        bare = {
            "log_probs": tokens["log_probs"],
            "config": config.kernel._replace(kl_coef=0.0, entropy_coef=0.0),
            "need_grad": False,
            "need_entropy_grad": False,
        }
        of_layout = {
            "steps": tuple(require_layout(layout).steps),
            "advantages_per_token": False,
            "is_weights_per_token": False,
        }
        of_mask = {"mask": mask, "row_length": batch.mask.shape[1]}
        found["policy_loss"] += [
            in_order(
                "policy_loss",
                **{**full, **of_layout, "is_weights_per_token": True},
                **(no_bounds if config.surrogate == "soft" else by_step),
                advantages=batch.advantages,
            ),
            in_order(
                "policy_loss",
                **{**bare, **of_layout, "advantages_per_token": True, "need_grad": True},
                advantages=token_advantages,
            ),
            in_order("policy_loss", **bare, **of_layout, advantages=batch.advantages),
        ]
        found["policy_loss_masked"] += [
            in_order("policy_loss_masked", **full, **of_mask, advantages=token_advantages),
            in_order("policy_loss_masked", **bare, **of_mask, advantages=spread),
        ]
    return found


def in_order(name: str, **given: Any) -> tuple:
    """Return arguments in the order of an operator's schema, None for optional ones not given."""
    arguments = getattr(torch.ops.steppo, name).default._schema.arguments[:-1]
    assert given.keys() <= {argument.name for argument in arguments}
    optional = {a.name for a in arguments if isinstance(a.type, torch.OptionalType)}
    assert {argument.name for argument in arguments} <= given.keys() | optional
    return tuple(given.get(argument.name) for argument in arguments)


def test_samples_are_of_the_whole_family():
    for name, names in (("surrogate", SURROGATES), ("ratio", RATIOS), ("reduction", REDUCTIONS)):
        assert {getattr(config, name) for config in _CONFIGS} == {*names}


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has no such tag")
def test_graphs_that_inductor_records_leave_the_operators_out():
    """What kernels keep between calls may not come from the memory of such a graph."""
    assert all(torch.Tag.cudagraph_unsafe in one.tags for one in operators.handles.values())
    assert len(operators.handles) >= 18


def test_every_operator_has_a_sample():
    target = type("Target", (), {"device": "cpu"})
    assert samples(finite_batch(target)).keys() == operators.stems.keys()


# Autograd differentiates the reference of these: it is no operator.
_DIFFERENTIATED = {
    "accumulate",
    "head_logits",
    "kept_directions",
    "kept_hidden_gradient",
    "kept_log_probs",
    "kept_log_probs_backward",
    "kept_logits",
    "kept_weight_gradient",
    "policy_loss",
    "policy_loss_masked",
    "scale_directions",
    "scale_gradient",
    "token_log_probs",
    "token_log_probs_backward",
    "value_loss",
}
# What the other backends leave to torch, and what is of GPUs.
_OF = {"scale_gradient": ("cuda",)}
_OF |= dict.fromkeys(("kept_directions", "scale_directions"), ("cuda", "triton"))


@grid(cover=1, name=sorted(_DIFFERENTIATED), dtype=[torch.float32, torch.float64])
def test_opcheck_of_losses(kernel, name, dtype):
    opcheck(kernel, name, dtype)


@grid(
    cover=1,
    name=sorted(operators.stems.keys() - _DIFFERENTIATED),
    dtype=[torch.float32, torch.float64],
)
def test_opcheck(target, name, dtype):
    opcheck(target, name, dtype)


def opcheck(target, name, dtype):
    if target.backend not in _OF.get(name, target.backend):
        pytest.skip(f"{target.backend} does not have it")
    operator = getattr(torch.ops.steppo, name).default
    for args in samples(finite_batch(target, dtype=dtype))[name]:
        torch.library.opcheck(operator, (*args, target.backend))


def test_operators_and_direct_calls_are_the_same(kernel):
    """Eager code calls launchers, compiled code operators."""
    for name, calls in samples(finite_batch(kernel)).items():
        if kernel.backend not in _OF.get(name, kernel.backend):
            continue
        for args in calls:
            results = []
            for run in (
                operators.launcher(kernel.backend, name),
                through_torch(name, kernel.backend),
            ):
                copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
                result = run(*copies)
                written = [arg for arg in copies if isinstance(arg, torch.Tensor)]
                outputs = result if isinstance(result, tuple) else (result,)
                results.append([*written, *(() if result is None else outputs)])
            for one, other in zip(*results, strict=True):
                # An output that is not needed is None, or empty.
                same = other.numel() == 0 if one is None else torch.equal(one, other)
                assert same, name


def through_torch(name: str, backend: str):
    """Return the registered operator, as a function of a launcher's arguments."""
    return lambda *args: getattr(torch.ops.steppo, name)(*args, backend)


def train_step(batch: Batch, layout: StepLayout, masked: bool, backend: str):
    """Use every public function, as one training step does, and return all its results."""
    gae = step_gae(
        batch.rewards,
        batch.values.detach(),
        layout,
        bootstrap_values=batch.bootstrap_values,
        backend=backend,
    )
    spread = broadcast_to_tokens(gae.advantages, layout, backend=backend)
    policy = steppo_loss(
        batch.log_probs,
        batch.old_log_probs,
        spread if masked else gae.advantages,
        batch.mask if masked else layout,
        config=_CONFIG,
        ref_log_probs=batch.ref_log_probs,
        entropy=batch.entropy,
        is_weights=batch.token_weights,
        normalizer=7.0,
        backend=backend,
    )
    value = step_value_loss(
        batch.values, gae.returns, layout, old_values=batch.old_values, backend=backend
    )
    return policy.loss + value.loss, spread, policy.metrics.values, value.metrics.values


def results_and_grads(function, batch: Batch, *args):
    leaves = [getattr(batch, name).requires_grad_() for name in ("log_probs", "entropy", "values")]
    loss, *others = function(batch, batch.layout, *args)
    return [loss.detach(), *others, *torch.autograd.grad(loss, leaves)]


def assert_as_eager(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_compile_without_graph_breaks_or_recompiles(target, masked):
    """One graph for the first length, one for all others."""
    if masked and target.backend == "reference":
        pytest.skip("the reference builds a layout of the mask, whose size depends on its values")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = in_one_graph(train_step, counter)
    shapes = [(3, 30), (4, 35), (5, 41), (2, 64), (6, 27)]
    for seed, (rows, length) in enumerate(shapes if target.backend == "cpu" else shapes[:3]):
        batch = finite_batch(target, seed, rows, length)
        found = results_and_grads(compiled, batch, masked, target.backend)
        assert_as_eager(found, results_and_grads(train_step, batch, masked, target.backend))
        assert counter.frame_count <= 2, f"a graph of its own for {(rows, length)}"
    assert counter.frame_count == 2


@grid(cover=1, config={config.surrogate + "-" + config.ratio: config for config in _CONFIGS})
def test_compile_of_the_family(target, masked, config):
    """With bounds of steps and advantages of tokens; one graph for the first length, one more."""
    if masked and target.backend == "reference":
        pytest.skip("the reference builds a layout of the mask, whose size depends on its values")

    def step(batch, layout, advantages, clip_low, clip_high):
        out = steppo_loss(
            batch.log_probs,
            batch.old_log_probs,
            advantages,
            layout,
            config=config,
            ref_log_probs=batch.ref_log_probs,
            entropy=batch.entropy,
            is_weights=batch.token_weights,
            clip_low=clip_low,
            clip_high=clip_high,
            backend=target.backend,
        )
        return out.loss, out.metrics.values

    torch._dynamo.reset()
    # The reference's graph is long; that it can be traced is what is seen here.
    counter = CompileCounterWithBackend("eager" if target.backend == "reference" else "aot_eager")
    compiled = in_one_graph(step, counter)
    for seed, shape in enumerate([(3, 20), (4, 26), (5, 23)]):
        batch = finite_batch(target, seed, *shape)
        advantages = torch.where(batch.mask, batch.entropy - 1.5, 0.0).detach()
        bounds = (None, None)
        if not masked and config.surrogate != "soft":
            bounds = (batch.step_weights / 4, batch.is_weights / 4)
        given = (batch, batch.mask if masked else batch.layout, advantages, *bounds)
        leaves = [batch.log_probs.requires_grad_(), batch.entropy.requires_grad_()]
        results = []
        for run in (compiled, step, compiled):
            loss, metrics = run(*given)
            results.append([loss.detach(), metrics, *torch.autograd.grad(loss, leaves)])
        assert_as_eager(results[0], results[1])
        # What a layout keeps after a plain call makes no graph of its own.
        assert_as_eager(results[2], results[1])
    assert counter.frame_count == 2


def test_compile_with_numbers_that_change(target):
    if target.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
    # What was compiled for other backends counts against a limit.
    torch._dynamo.reset()
    batch = random_batch(2, 3, 16, device=target.device)
    logits = torch.randn((*batch.mask.shape, 7), device=target.device)
    ids = torch.zeros(batch.mask.shape, dtype=torch.int64, device=target.device)

    def step(number):
        loss = steppo_loss(
            batch.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.layout,
            config=StepPOConfig(ratio="centered"),
            normalizer=number,
            ratio_center=number / 10,
            backend=target.backend,
        ).loss
        return (
            loss
            + token_log_probs(
                logits, ids, mask=batch.mask, temperature=number, backend=target.backend
            ).sum()
        )

    compiled = in_one_graph(step)
    for number in (3.0, 4.0, 5.5, 7.25):
        torch.testing.assert_close(compiled(number), step(number))


def test_compile_with_the_default_compiler(kernel):
    """The backend is left to the package."""
    if kernel.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
    torch._dynamo.reset()
    batch = finite_batch(kernel)
    found = results_and_grads(in_one_graph(train_step, "inductor"), batch, False, "auto")
    assert_as_eager(found, results_and_grads(train_step, batch, False, "auto"))


def test_compile_needs_no_gradient(kernel, masked):
    torch._dynamo.reset()
    batch = finite_batch(kernel)
    compiled = in_one_graph(train_step)
    with torch.no_grad():
        found = compiled(batch, batch.layout, masked, kernel.backend)
        expected = train_step(batch, batch.layout, masked, kernel.backend)
    assert not found[0].requires_grad
    assert_as_eager(found, expected)


def test_what_a_layout_shows_is_part_of_a_graph(target):
    def step(batch, layout, of_rows):
        _, total = layout.reduction_weights("token_mean")
        advantages = of_rows[layout.step_rows]
        return steppo_loss(
            batch.log_probs,
            batch.old_log_probs,
            advantages,
            layout,
            normalizer=total,
            backend=target.backend,
        ).loss

    torch._dynamo.reset()
    compiled = in_one_graph(step)
    for seed, (rows, length) in enumerate([(3, 20), (4, 26)]):
        batch = finite_batch(target, seed, rows, length)
        of_rows = torch.linspace(-1, 1, rows, dtype=torch.float32, device=target.device)
        found = compiled(batch, batch.layout, of_rows)
        assert_as_eager([found], [step(batch, batch.layout, of_rows)])
