"""The registered operators: opcheck, and the public functions under torch.compile."""

from __future__ import annotations

import pytest
import torch
from batches import Batch, random_batch
from grids import grid
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

# Tracing would look into the patched allocations.
pytestmark = pytest.mark.unpoisoned

_CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, dual_clip=9.0, kl_coef=0.1, entropy_coef=0.05)


def finite_batch(target, seed=1, rows=3, length=30, dtype=torch.float32) -> Batch:
    """A batch whose masked positions hold 0, as comparisons of NaN fail."""
    batch = random_batch(seed, rows, length, dtype=dtype, device=target.device)
    for name in (
        "log_probs",
        "old_log_probs",
        "ref_log_probs",
        "entropy",
        "token_weights",
        "values",
        "old_values",
    ):
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
            "token_weights",
            "values",
            "old_values",
            "rewards",
        )
    }
    token_advantages = broadcast_to_tokens(batch.advantages, layout, backend="reference").view(-1)
    csr = (ids, layout.token_index, layout.step_offsets, layout.trajectory_counts)
    # Clip range, dual clip (0: none), log_ratio_max, reduction.
    clips = (0.2, 0.3, 9.0, 10.0, 1)
    # kl_coef, estimator, entropy_coef.
    penalties, no_penalties = (0.1, 2, 0.05), (0.0, 2, 0.0)
    center = torch.tensor(0.1, dtype=torch.float64)
    normalizer = torch.tensor(5.0, dtype=torch.float64, device=mask.device)
    full = (flat["log_probs"], flat["old_log_probs"])
    marks = torch.tensor([1, 2], device=mask.device)
    tokens = (torch.arange(mask.numel(), device=mask.device) * 7) % 5
    per_step = torch.rand(layout.num_steps, device=mask.device, dtype=batch.log_probs.dtype)
    states = (layout.state_index, layout.step_lengths, layout.trajectory_counts)
    trajectories = (layout.trajectory_steps, layout.trajectory_offsets)
    return {
        "segment_mask": [(mask, None, rows), (mask, ids % 2 == 0, rows)],
        "segment_ids": [(ids.to(torch.int64), rows)],
        "segment_rows": [(batch.mask, None), (batch.mask, batch.mask[:, 0].contiguous())],
        "mark_actions": [(tokens, rows, marks, 4)],
        "compact": [(ids, layout.num_steps, layout.num_tokens)],
        "broadcast_to_tokens": [(per_step, ids)],
        "sum_over_steps": [(flat["rewards"], layout.token_index, layout.step_offsets)],
        "step_gae": [
            (
                flat["rewards"],
                flat["values"],
                True,
                True,
                ids,
                rows,
                layout.state_index,
                *trajectories,
                batch.bootstrap_values,
                0.99,
                0.95,
                True,
            ),
            (
                per_step,
                batch.returns,
                False,
                False,
                ids,
                rows,
                layout.state_index,
                *trajectories,
                None,
                0.99,
                1.0,
                False,
            ),
        ],
        "value_loss": [
            (
                flat["values"],
                batch.returns,
                flat["old_values"],
                True,
                True,
                *states,
                normalizer,
                0.5,
                1,
                True,
            ),
            (per_step, batch.returns, None, False, False, *states, None, 0.5, 2, False),
        ],
        "policy_loss": [
            (
                *full,
                batch.advantages,
                flat["ref_log_probs"],
                flat["entropy"],
                flat["token_weights"],
                batch.step_weights,
                False,
                True,
                *csr,
                center,
                normalizer,
                2,
                *clips,
                *penalties,
                True,
                True,
            ),
            (
                flat["log_probs"],
                None,
                token_advantages,
                None,
                None,
                None,
                None,
                True,
                False,
                *csr,
                None,
                None,
                0,
                *clips,
                *no_penalties,
                False,
                False,
            ),
        ],
        "policy_loss_masked": [
            (
                *full,
                token_advantages,
                flat["ref_log_probs"],
                flat["entropy"],
                flat["token_weights"],
                mask,
                batch.mask.shape[1],
                center,
                normalizer,
                1,
                *clips,
                *penalties,
                True,
                True,
            ),
            (
                flat["log_probs"],
                None,
                token_advantages,
                None,
                None,
                None,
                mask,
                batch.mask.shape[1],
                None,
                None,
                0,
                *clips,
                *no_penalties,
                True,
                False,
            ),
        ],
        **head_samples(batch),
    }


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
    log_sum_exp = logits.reshape(-1, 13).double().logsumexp(-1)
    grads = torch.randn((2, rows * length), generator=generator).to(device, dtype)
    grad_logits = torch.zeros((rows, length, 13), device=device, dtype=dtype)
    order = torch.tensor([0, rows * length - 1, 2], device=device)
    hidden, weight, bias = wide[0, :, :8].contiguous(), wide[0, :5, :8], wide[0, 0, :5]
    products = torch.zeros((length + 1, 5), device=device, dtype=dtype)
    total = torch.ones((3, 37), device=device)
    half = torch.linspace(-1.0, 1.0, 3 * 37, device=device).view(3, 37)
    return {
        "accumulate": [
            (total, half.bfloat16(), False),
            (total.clone(), half.half(), False),
            (total.clone(), half.bfloat16(), True),
        ],
        "head_logits": [(products, hidden, weight, bias), (products, hidden, weight.clone(), None)],
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
                log_sum_exp,
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
                log_sum_exp,
                None,
                grads[1],
                None,
                order,
            ),
        ],
    }


def test_every_operator_has_a_sample():
    target = type("Target", (), {"device": "cpu"})
    assert samples(finite_batch(target)).keys() == operators._stems.keys()


# Autograd differentiates the reference of these: it is no operator.
_DIFFERENTIATED = {
    "accumulate",
    "head_logits",
    "policy_loss",
    "policy_loss_masked",
    "token_log_probs",
    "token_log_probs_backward",
    "value_loss",
}


@grid(cover=1, name=sorted(_DIFFERENTIATED), dtype=[torch.float32, torch.float64])
def test_opcheck_of_losses(kernel, name, dtype):
    opcheck(kernel, name, dtype)


@grid(
    cover=1,
    name=sorted(operators._stems.keys() - _DIFFERENTIATED),
    dtype=[torch.float32, torch.float64],
)
def test_opcheck(target, name, dtype):
    opcheck(target, name, dtype)


def opcheck(target, name, dtype):
    operator = getattr(torch.ops.steppo, name).default
    for args in samples(finite_batch(target, dtype=dtype))[name]:
        torch.library.opcheck(operator, (*args, target.backend))


def test_operators_and_direct_calls_are_the_same(kernel):
    """Eager code calls launchers, compiled code operators."""
    for name, calls in samples(finite_batch(kernel)).items():
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
                results.append([*written, *(value for value in outputs if value is not None)])
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other), name


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
    compiled = torch.compile(train_step, backend=counter, fullgraph=True)
    shapes = [(3, 30), (4, 35), (5, 41), (2, 64), (6, 27)]
    for seed, (rows, length) in enumerate(shapes if target.backend == "cpu" else shapes[:3]):
        batch = finite_batch(target, seed, rows, length)
        found = results_and_grads(compiled, batch, masked, target.backend)
        assert_as_eager(found, results_and_grads(train_step, batch, masked, target.backend))
        assert counter.frame_count <= 2, f"a graph of its own for {(rows, length)}"
    assert counter.frame_count == 2


def test_compile_with_numbers_that_change(target):
    if target.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
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

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for number in (3.0, 4.0, 5.5, 7.25):
        torch.testing.assert_close(compiled(number), step(number))


def test_compile_with_the_default_compiler(kernel):
    """The backend is left to the package."""
    if kernel.interpreted:
        pytest.skip("what is compiled around interpreted kernels is no different")
    torch._dynamo.reset()
    batch = finite_batch(kernel)
    found = results_and_grads(torch.compile(train_step, fullgraph=True), batch, False, "auto")
    assert_as_eager(found, results_and_grads(train_step, batch, False, "auto"))


def test_compile_needs_no_gradient(kernel, masked):
    torch._dynamo.reset()
    batch = finite_batch(kernel)
    compiled = torch.compile(train_step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(batch, batch.layout, masked, kernel.backend)
        expected = train_step(batch, batch.layout, masked, kernel.backend)
    assert not found[0].requires_grad
    assert_as_eager(found, expected)
