"""The rules that hold for every function on every backend."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from batches import Batch, policy_results, ragged_mask, random_batch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import RATIOS, REDUCTIONS

_CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, dual_clip=9.0, kl_coef=0.1, entropy_coef=0.05)
_ON_TOKENS = (
    "log_probs",
    "old_log_probs",
    "ref_log_probs",
    "entropy",
    "token_weights",
    "values",
    "old_values",
)


def everything(batch: Batch, backend: str, config: StepPOConfig = _CONFIG) -> dict:
    """Run every function on a batch and return every result and gradient."""
    found = {}
    for masked in (False, True):
        results = policy_results(
            batch, config, backend, masked=masked, is_weights=batch.token_weights
        )
        found |= {f"{name}, {masked=}": value for name, value in results.items()}
    gae = step_gae(
        batch.rewards,
        batch.values,
        batch.layout,
        bootstrap_values=batch.bootstrap_values,
        backend=backend,
    )
    found |= {"advantages": gae.advantages, "returns": gae.returns}
    values = batch.values.detach().clone().requires_grad_()
    result = step_value_loss(
        values, batch.returns, batch.layout, old_values=batch.old_values, backend=backend
    )
    result.loss.backward()
    found |= {
        "value loss": result.loss.detach(),
        "value metrics": result.metrics.values,
        "grad_values": values.grad,
    }
    per_step = batch.advantages.detach().clone().requires_grad_()
    spread = broadcast_to_tokens(per_step, batch.layout, backend=backend)
    spread.backward(batch.on_tokens(batch.returns).nan_to_num(0.0))
    found |= {"broadcast": spread.detach(), "grad_per_step": per_step.grad}
    return found


def assert_bitwise(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        differs = found[name] != value
        assert torch.equal(found[name], value), (
            f"{name}: {int(differs.sum())} of {value.numel()} differ"
        )


_GARBAGE = [math.inf, -math.inf, 0.0, 1e38, -1e-42]


@pytest.mark.parametrize("garbage", _GARBAGE, ids=str)
def test_nothing_of_a_masked_position_counts(target, garbage):
    """The batch holds NaN there; with anything else, all is the same to the last bit."""
    target.thin(_GARBAGE.index(garbage), every=5)
    batch = random_batch(1, device=target.device)
    filled = {name: torch.where(batch.mask, getattr(batch, name), garbage) for name in _ON_TOKENS}
    expected = everything(batch, target.backend)
    found = everything(dataclasses.replace(batch, **filled), target.backend)
    for value in found.values():
        assert value.isfinite().all()
    assert_bitwise(found, expected)
    for name in ("grad_log_probs", "grad_entropy"):
        for masked in (False, True):
            assert (found[f"{name}, {masked=}"][~batch.mask] == 0).all()
    assert (found["broadcast"][~batch.mask] == 0).all()
    states = torch.zeros_like(batch.mask).view(-1)
    states[batch.layout.state_index] = True
    assert (found["grad_values"].view(-1)[~states] == 0).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 4)], ids=str)
def test_no_action_token(target, shape, ratio, reduction):
    """Loss 0, finite metrics, zero gradients, and a graph that reaches the inputs."""
    target.thin(RATIOS.index(ratio), REDUCTIONS.index(reduction), every=6)
    config = dataclasses.replace(_CONFIG, ratio=ratio, reduction=reduction)
    mask = torch.zeros(shape, dtype=torch.bool, device=target.device)
    by_mask = StepLayout.from_mask(mask, backend=target.backend)
    layouts = [mask, by_mask, by_mask.per_token(), by_mask.per_trajectory()]
    if len(shape) == 2:
        rows = list(range(shape[0]))
        layouts.append(StepLayout.from_rows(mask, rows, rows, backend=target.backend))
    for layout in layouts:
        nan = torch.full(shape, torch.nan, device=target.device)
        log_probs, entropy, values = (nan.clone().requires_grad_() for _ in range(3))
        steps = nan if layout is mask else nan.new_zeros(layout.num_steps)
        results = [
            steppo_loss(
                log_probs,
                nan,
                steps,
                layout,
                config=config,
                ref_log_probs=nan,
                entropy=entropy,
                is_weights=nan,
                backend=target.backend,
            )
        ]
        if layout is not mask:
            results.append(
                step_value_loss(
                    values,
                    steps,
                    layout,
                    old_values=nan,
                    reduction=reduction,
                    backend=target.backend,
                )
            )
            found = step_gae(nan, nan, layout, backend=target.backend)
            assert found.advantages.shape == found.returns.shape == steps.shape
            spread = broadcast_to_tokens(steps.requires_grad_(), layout, backend=target.backend)
            spread.sum().backward()
            assert torch.equal(spread, torch.zeros(shape, device=target.device))
            assert torch.equal(steps.grad, torch.zeros_like(steps))
        inputs = (log_probs, entropy, values)
        for result in results:
            assert result.loss.item() == 0.0
            assert result.metrics.values.isfinite().all()
            result.loss.backward()
        for value in inputs[: len(results) + 1]:
            assert torch.equal(value.grad, torch.zeros(shape, device=target.device))
        metrics = results[0].metrics.as_dict()
        assert metrics.pop("ratio_mean") == metrics.pop("ratio_min") == 1.0
        assert metrics.pop("ratio_max") == 1.0
        assert set(metrics.values()) == {0.0}


def test_empty_steps_count_for_nothing(target):
    """A row without action tokens keeps its place in time; its numbers may be anything."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1]], device=target.device)
    valid = torch.tensor([True, True, True, False], device=target.device)
    layout = StepLayout.from_rows(
        mask, [0, 0, 0, 0], [0, 1, 2, 2], valid=valid, backend=target.backend
    )
    nan = torch.nan
    log_probs = torch.tensor(
        [[-0.1, -0.2, nan], [nan, nan, nan], [-0.3, nan, -0.4], [nan, nan, nan]],
        device=target.device,
    ).requires_grad_()
    per_step = torch.tensor([1.0, nan, -2.0, nan], device=target.device)
    for reduction in REDUCTIONS:
        log_probs.grad = None
        result = steppo_loss(
            log_probs,
            log_probs.detach(),
            per_step,
            layout,
            is_weights=per_step.abs(),
            step_weights=per_step.abs() * 0 + 1,
            config=StepPOConfig(reduction=reduction),
            backend=target.backend,
        )
        result.loss.backward()
        # Two steps: weights 1, losses -1 * 1 and 2 * 2.
        normalizer = {"step_mean": 2, "trajectory_mean": 1, "token_mean": 4, "sum": 1}[reduction]
        assert result.loss.item() == pytest.approx(3.0 / normalizer)
        metrics = result.metrics.as_dict()
        assert (metrics["num_steps"], metrics["num_tokens"]) == (2, 4)
        assert log_probs.grad.isfinite().all()
        assert (log_probs.grad[[1, 3]] == 0).all()
        assert result.step_log_ratio.tolist() == [0.0] * 4
        values = per_step.clone().requires_grad_()
        result = step_value_loss(
            values,
            per_step,
            layout,
            old_values=per_step,
            reduction=reduction,
            backend=target.backend,
        )
        result.loss.backward()
        assert result.loss.item() == 0.0
        assert result.metrics.as_dict()["num_steps"] == 2
        assert values.grad.isfinite().all()


def test_two_runs_give_the_same_bits(target):
    batch = random_batch(2, 9, 70, device=target.device)
    expected = everything(batch, target.backend)
    for _ in range(1 if target.interpreted else 3):
        assert_bitwise(everything(batch, target.backend), expected)


def test_any_number_of_threads_gives_the_same_bits(target, threads_restored):
    if target.backend != "cpu":
        pytest.skip("only the C++ backend divides work over threads of its own")
    # Large enough to be divided.
    batch = random_batch(3, 256, 6200, mean_step=40.0)
    torch.set_num_threads(1)
    expected = everything(batch, target.backend)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_bitwise(everything(batch, target.backend), expected)


_VIEWS = ["transposed", "strided", "sliced", "flat", "expanded"]


@pytest.mark.parametrize("view", _VIEWS)
def test_inputs_of_any_strides(target, view):
    target.thin(_VIEWS.index(view), every=4)
    batch = random_batch(4, 8, 20, device=target.device)
    expected = everything(batch, target.backend)

    def as_view(value):
        if view == "transposed":
            return value.T.contiguous().T
        if view == "strided":
            wide = torch.full((8, 40), torch.nan, device=target.device)
            wide[:, ::2] = value
            return wide[:, ::2]
        if view == "sliced":
            larger = torch.full((10, 33), torch.nan, device=target.device)
            larger[1:9, 5:25] = value
            return larger[1:9, 5:25]
        if view == "flat":
            return value.reshape(-1)
        return value[None].expand(1, 8, 20)[0]

    viewed = {name: as_view(getattr(batch, name)) for name in (*_ON_TOKENS, "rewards")}
    log_probs, entropy = (
        viewed[name].detach().requires_grad_() for name in ("log_probs", "entropy")
    )
    for masked in (False, True):
        advantages = as_view(batch.on_tokens(batch.advantages)) if masked else batch.advantages
        result = steppo_loss(
            log_probs,
            viewed["old_log_probs"],
            advantages,
            batch.mask.T.contiguous().T if masked else batch.layout,
            config=_CONFIG,
            ref_log_probs=viewed["ref_log_probs"],
            entropy=entropy,
            is_weights=viewed["token_weights"],
            backend=target.backend,
        )
        grads = torch.autograd.grad(result.loss, (log_probs, entropy))
        assert torch.equal(result.loss, expected[f"loss, {masked=}"])
        for grad, name in zip(grads, ("grad_log_probs", "grad_entropy"), strict=True):
            assert torch.equal(grad.reshape(8, 20), expected[f"{name}, {masked=}"])
    gae = step_gae(
        viewed["rewards"],
        viewed["values"],
        batch.layout,
        bootstrap_values=batch.bootstrap_values,
        backend=target.backend,
    )
    assert torch.equal(gae.advantages, expected["advantages"])
    values = viewed["values"].detach().requires_grad_()
    result = step_value_loss(
        values,
        batch.returns,
        batch.layout,
        old_values=viewed["old_values"],
        backend=target.backend,
    )
    result.loss.backward()
    assert torch.equal(result.loss, expected["value loss"])
    assert torch.equal(values.grad.reshape(8, 20), expected["grad_values"])
    per_step = torch.stack((batch.advantages, batch.returns), 1)[:, 0]
    spread = broadcast_to_tokens(per_step, batch.layout, backend=target.backend)
    assert torch.equal(spread, expected["broadcast"])


def exact_sums(batch: Batch, config: StepPOConfig, target, masked: bool, **options) -> dict:
    return policy_results(
        batch.to(torch.float64, target.device), config, target.backend, masked=masked, **options
    )


def close(found, expected, msg=""):
    torch.testing.assert_close(
        found.cpu(), expected.cpu(), rtol=1e-11, atol=1e-12, msg=lambda text: f"{msg}: {text}"
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_changes_nothing(target, masked, reduction):
    target.thin(REDUCTIONS.index(reduction), every=3)
    config = dataclasses.replace(_CONFIG, reduction=reduction)
    batch = random_batch(5, 5, 21, dtype=torch.float64)
    before, after = 3, 7

    def padded(value):
        filler = False if value.dtype == torch.bool else torch.nan
        wide = value.new_full((6, 21 + before + after), filler)
        wide[:5, before : before + 21] = value
        return wide

    wide = dataclasses.replace(
        batch,
        mask=padded(batch.mask),
        layout=StepLayout.from_mask(padded(batch.mask), backend="reference"),
        **{name: padded(getattr(batch, name)) for name in _ON_TOKENS},
    )
    expected = exact_sums(batch, config, target, masked)
    found = exact_sums(wide, config, target, masked)
    for name, value in expected.items():
        if name.startswith("grad"):
            close(found[name][:5, before : before + 21], value, name)
        else:
            close(found[name], value, name)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Take rows of a batch, in a new order."""
    offsets = batch.layout.trajectory_offsets.tolist()
    steps = [s for row in rows for s in range(offsets[row], offsets[row + 1])]
    taken = {name: getattr(batch, name)[rows] for name in (*_ON_TOKENS, "mask", "rewards")}
    names = ("advantages", "returns", "is_weights", "step_weights")
    return dataclasses.replace(
        batch,
        layout=StepLayout.from_mask(taken["mask"], backend="reference"),
        bootstrap_values=batch.bootstrap_values[rows],
        **taken,
        **{name: getattr(batch, name)[steps] for name in names},
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_order_of_rows_changes_nothing(target, masked, reduction):
    target.thin(REDUCTIONS.index(reduction), every=3)
    config = dataclasses.replace(_CONFIG, reduction=reduction)
    batch = random_batch(6, 7, 30, dtype=torch.float64)
    order = [3, 0, 6, 5, 1, 4, 2]
    expected = exact_sums(batch, config, target, masked)
    found = exact_sums(rows_of(batch, order), config, target, masked)
    close(found["loss"], expected["loss"])
    close(found["metrics"], expected["metrics"])
    close(found["grad_log_probs"], expected["grad_log_probs"][order])
    close(found["grad_entropy"], expected["grad_entropy"][order])


def counts(batch: Batch, reduction: str) -> float:
    layout = batch.layout
    return {
        "step_mean": layout.num_steps,
        "trajectory_mean": int((layout.trajectory_offsets.diff() > 0).sum()),
        "token_mean": layout.num_tokens,
        "sum": 1,
    }[reduction]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_micro_batches_with_a_global_normalizer(target, masked, reduction, as_tensor, ratio):
    """Losses and gradients of the parts add up to those of the whole."""
    target.thin(RATIOS.index(ratio), REDUCTIONS.index(reduction), as_tensor, every=6)
    config = dataclasses.replace(_CONFIG, reduction=reduction, ratio=ratio)
    batch = random_batch(7, 7, 24, ratio=ratio, dtype=torch.float64)
    options = {"ratio_center": 0.2} if ratio == "centered" else {}
    expected = exact_sums(batch, config, target, masked, **options)
    normalizer = counts(batch, reduction)
    assert normalizer > 1 or reduction == "sum"
    if as_tensor:
        normalizer = torch.tensor(float(normalizer), device=target.device)
    # Row 6 has no action token: a part of its own.
    parts = [[0, 1, 2], [3], [4, 5], [6]]
    found = [
        exact_sums(rows_of(batch, rows), config, target, masked, normalizer=normalizer, **options)
        for rows in parts
    ]
    close(sum(part["loss"] for part in found), expected["loss"])
    for name in ("grad_log_probs", "grad_entropy"):
        close(torch.cat([part[name] for part in found]), expected[name], name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_that_share_trajectories_add_up(target, reduction):
    """One row a step, shuffled into parts, as trainers do; some rows are empty or padding."""
    target.thin(REDUCTIONS.index(reduction), every=2)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand((9, 12), generator=generator) < 0.5
    mask[4] = False
    owners, turns = [5, 7, 5, 5, 7, 9, 5, 7, 9], [0, 1, 2, 1, 0, 0, 3, 2, 1]
    valid = torch.tensor([True] * 8 + [False])
    log_probs, old = 0.1 * torch.randn((2, 9, 12), generator=generator, dtype=torch.float64)
    advantages = torch.randn(9, generator=generator, dtype=torch.float64)
    log_probs, old, advantages, mask, valid = (
        value.to(target.device) for value in (log_probs, old, advantages, mask, valid)
    )
    config = StepPOConfig(clip_low=0.1, clip_high=0.1, reduction=reduction)

    def part(rows, **options):
        layout = StepLayout.from_rows(
            mask[rows],
            [owners[r] for r in rows],
            [turns[r] for r in rows],
            valid=valid[rows],
            backend=target.backend,
        )
        leaf = log_probs[rows].requires_grad_()
        loss = steppo_loss(
            leaf,
            old[rows],
            advantages[rows],
            layout,
            config=config,
            backend=target.backend,
            **options,
        ).loss
        return layout, loss, torch.autograd.grad(loss, leaf)[0]

    layout, loss, grad = part(list(range(9)))
    weights, normalizer = layout.reduction_weights(reduction)
    again = part(list(range(9)), step_weights=weights, normalizer=normalizer)
    close(again[1], loss)
    parts = [[6, 0], [3, 5, 1], [8, 4], [7, 2]]
    found = [part(rows, step_weights=weights[rows], normalizer=normalizer) for rows in parts]
    close(sum(value for _, value, _ in found), loss)
    for rows, (_, _, value) in zip(parts, found, strict=True):
        close(value, grad[rows])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_normalizers_of_parts_add_up(target, reduction):
    """Where every trajectory is a row; the part without a step counts nothing."""
    batch = random_batch(7, 7, 24, dtype=torch.float64, device=target.device)
    whole = batch.layout.reduction_weights(reduction)[1]
    assert whole == counts(batch, reduction)
    parts = [rows_of(batch, rows).layout for rows in ([0, 1, 2], [3], [4, 5], [6])]
    found = [part.reduction_weights(reduction)[1] for part in parts]
    assert parts[-1].num_tokens == 0
    assert found[-1] == (reduction == "sum")
    assert sum(found) == (whole if reduction != "sum" else 4)
    with pytest.raises(ValueError, match=r"^reduction: got 'mean', expected one of"):
        batch.layout.reduction_weights("mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_normalizer_of_a_batch_without_actions(target, reduction):
    """It is 0, and given to the losses of that batch it changes nothing."""
    mask = torch.zeros(2, 5, dtype=torch.bool, device=target.device)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    weights, normalizer = layout.reduction_weights(reduction)
    leaf = torch.randn(2, 5, device=target.device).requires_grad_()
    none = leaf.detach().new_zeros(0)
    config = StepPOConfig(reduction=reduction)
    for given in (normalizer, float(normalizer)):
        parts = {"normalizer": given, "backend": target.backend}
        for out in (
            steppo_loss(leaf, None, none, layout, config=config, step_weights=weights, **parts),
            step_value_loss(leaf, none, layout, reduction=reduction, **parts),
        ):
            assert out.loss == 0
            assert all(math.isfinite(value) for value in out.metrics.as_dict().values())
            (grad,) = torch.autograd.grad(out.loss, leaf)
            assert not grad.any()
    for wrong in (math.nan, -1.0):
        with pytest.raises(ValueError, match=rf"^normalizer: got {wrong}"):
            steppo_loss(leaf, None, none, layout, normalizer=wrong, backend=target.backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_micro_batches_with_a_global_normalizer(target, reduction):
    target.thin(REDUCTIONS.index(reduction), every=3)
    batch = random_batch(8, 7, 24, dtype=torch.float64, device=target.device)

    def run(part, normalizer=None):
        values = part.values.detach().clone().requires_grad_()
        result = step_value_loss(
            values,
            part.returns,
            part.layout,
            old_values=part.old_values,
            reduction=reduction,
            normalizer=normalizer,
            backend=target.backend,
        )
        result.loss.backward()
        return result.loss.detach(), values.grad

    loss, grad = run(batch)
    parts = [
        run(rows_of(batch, rows), counts(batch, reduction)) for rows in ([0, 1, 2], [3, 4], [5, 6])
    ]
    close(sum(part[0] for part in parts), loss)
    close(torch.cat([part[1] for part in parts]), grad)


def losses(batch: Batch, target):
    """Yield each way to a loss, with the tensors its gradient reaches."""
    for masked in (False, True):
        log_probs = batch.log_probs.detach().clone().requires_grad_()
        entropy = batch.entropy.detach().clone().requires_grad_()
        result = steppo_loss(
            log_probs,
            batch.old_log_probs,
            batch.on_tokens(batch.advantages) if masked else batch.advantages,
            batch.mask if masked else batch.layout,
            config=_CONFIG,
            ref_log_probs=batch.ref_log_probs,
            entropy=entropy,
            backend=target.backend,
        )
        yield result.loss, (log_probs, entropy)
    values = batch.values.detach().clone().requires_grad_()
    result = step_value_loss(
        values, batch.returns, batch.layout, old_values=batch.old_values, backend=target.backend
    )
    yield result.loss, (values,)


_UPSTREAMS = ["scaled", "argument", "divided", "negative", "zero"]


@pytest.mark.parametrize("upstream", _UPSTREAMS)
def test_any_upstream_gradient(target, upstream):
    target.thin(_UPSTREAMS.index(upstream), every=5)
    batch = random_batch(9, 6, 30, dtype=torch.float64, device=target.device)
    pairs = zip(losses(batch, target), losses(batch, target), strict=True)
    for (loss, inputs), (again, inputs_again) in pairs:
        plain = torch.autograd.grad(again, inputs_again)
        if upstream == "argument":
            factor, found = 3.0, torch.autograd.grad(loss, inputs, torch.full_like(loss, 3.0))
        else:
            factor = {"divided": 1 / 7, "scaled": 65536.0, "negative": -1.0, "zero": 0.0}[upstream]
            (loss * factor).backward()
            found = [value.grad for value in inputs]
        for grad, value in zip(found, plain, strict=True):
            close(grad, value * factor)


def test_second_backward(target):
    """With retain_graph, once more and once more."""
    batch = random_batch(10, 6, 30, device=target.device)
    for loss, inputs in losses(batch, target):
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs, retain_graph=True)
        loss.backward()
        for value, *grads in zip(inputs, first, second, strict=True):
            assert all(torch.equal(grad, value.grad) for grad in grads)


def test_gradients_accumulate_and_do_not_share_memory(target):
    batch = random_batch(10, 6, 30, device=target.device)
    for loss, inputs in losses(batch, target):
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        kept = [grad.clone() for grad in first]
        for grad in first:
            grad.fill_(torch.nan)
        second = torch.autograd.grad(loss, inputs)
        for grad, value in zip(second, kept, strict=True):
            assert torch.equal(grad, value)


def test_gradients_may_be_clipped_between_backward_passes(target):
    """What is done to .grad in place stays there: it is no part of the graph."""
    batch = random_batch(10, 6, 30, device=target.device)
    for loss, inputs in losses(batch, target):
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        loss.backward(retain_graph=True)
        for value in inputs:
            value.grad.mul_(0.5)
        loss.backward(retain_graph=True)
        for value, grad in zip(inputs, first, strict=True):
            assert torch.equal(value.grad, 0.5 * grad + grad)
            value.grad.zero_()
        for _ in range(3):
            loss.backward(retain_graph=True)
        for value, grad in zip(inputs, first, strict=True):
            assert torch.equal(value.grad, grad + grad + grad)


def test_loss_modified_in_place(target):
    """As trainers do: they add the losses of micro-batches, and divide."""
    batch = random_batch(11, 6, 30, dtype=torch.float64, device=target.device)
    pairs = zip(losses(batch, target), losses(batch, target), strict=True)
    for (loss, inputs), (again, inputs_again) in pairs:
        plain = torch.autograd.grad(again, inputs_again)
        value = loss.item()
        loss += 2.5
        loss *= 3.0
        loss /= 4.0
        assert loss.item() == pytest.approx((value + 2.5) * 0.75)
        loss.backward()
        for grad, expected in zip((x.grad for x in inputs), plain, strict=True):
            close(grad, expected * 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(target, masked, dtype):
    """Computed in fp32 from the half precision values; gradients in the dtype of their input."""
    batch = random_batch(12, 6, 30, log_ratios=(-0.5, 0.5), device=target.device)
    halves = {name: getattr(batch, name).to(dtype) for name in (*_ON_TOKENS, "returns")}
    found, expected = {}, {}
    for results, as_type in ((found, dtype), (expected, torch.float32)):
        inputs = {name: value.to(as_type, copy=True) for name, value in halves.items()}
        leaves = [inputs[name].requires_grad_() for name in ("log_probs", "entropy", "values")]
        result = steppo_loss(
            leaves[0],
            inputs["old_log_probs"],
            batch.on_tokens(batch.advantages) if masked else batch.advantages,
            batch.mask if masked else batch.layout,
            config=_CONFIG,
            ref_log_probs=inputs["ref_log_probs"],
            entropy=leaves[1],
            is_weights=inputs["token_weights"],
            backend=target.backend,
        )
        values = step_value_loss(
            leaves[2],
            inputs["returns"],
            batch.layout,
            old_values=inputs["old_values"],
            backend=target.backend,
        )
        (result.loss + values.loss).backward()
        assert result.loss.dtype == values.loss.dtype == torch.float32
        results |= {"loss": result.loss, "value loss": values.loss, "leaves": leaves}
    for name in ("loss", "value loss"):
        assert torch.equal(found[name], expected[name])
    for leaf, exact in zip(found["leaves"], expected["leaves"], strict=True):
        assert leaf.grad.dtype == dtype
        assert torch.equal(leaf.grad, exact.grad.to(dtype))


def test_fp64_stays_fp64(target, masked):
    batch = random_batch(13, dtype=torch.float64, device=target.device)
    found = policy_results(batch, _CONFIG, target.backend, masked=masked)
    assert {value.dtype for value in found.values()} == {torch.float64}
    gae = step_gae(batch.rewards, batch.values, batch.layout, backend=target.backend)
    assert gae.advantages.dtype == gae.returns.dtype == torch.float64
    spread = broadcast_to_tokens(batch.advantages, batch.layout, backend=target.backend)
    assert spread.dtype == torch.float64


def test_other_inputs_follow_the_first(target, masked):
    """fp64 constants with fp32 log-probs: computed in fp32, as the log-probs are."""
    batch = random_batch(14, device=target.device)
    expected = policy_results(batch, _CONFIG, target.backend, masked=masked)
    mixed = dataclasses.replace(
        batch.to(torch.float64), log_probs=batch.log_probs, entropy=batch.entropy
    )
    found = policy_results(mixed, _CONFIG, target.backend, masked=masked)
    assert_bitwise(found, expected)


# More rows than a grid's second dimension, one row, one token, odd sizes, one step that is huge.
_SIZES = {
    "70001x3": (70_001, 3, 2.0),
    "1x1": (1, 1, 2.0),
    "1x7": (1, 7, 2.0),
    "13x1": (13, 1, 2.0),
    "5x1023": (5, 1023, 300.0),
    "3x4099": (3, 4099, 2.0),
}


@pytest.mark.parametrize("size", _SIZES)
def test_sizes(kernel, size):
    rows, length, mean_step = _SIZES[size]
    if kernel.interpreted and rows > 10_000:
        pytest.skip("the interpreter takes minutes for that many rows")
    batch = random_batch(15, rows, length, mean_step=mean_step, dtype=torch.float64)
    exact = everything(batch, "reference")
    found = everything(batch.to(torch.float64, kernel.device), kernel.backend)
    for name, value in exact.items():
        scale = float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(
            found[name].cpu(),
            value,
            rtol=1e-9,
            atol=1e-11 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("form", ["one-huge-step", "steps-of-one-token", "one-step-among-many"])
def test_extreme_steps(kernel, form):
    total = 1_000_003 if form == "one-huge-step" else 50_003
    if kernel.interpreted:
        total = 6_001
    mask = torch.ones((1, total), dtype=torch.bool)
    if form == "steps-of-one-token":
        mask[:, 1::2] = False
    elif form == "one-step-among-many":
        mask[:, : total // 2 : 2] = False
    batch = random_batch(16, mask=mask, log_ratios=(-0.4, 0.4), dtype=torch.float64)
    config = dataclasses.replace(_CONFIG, reduction="token_mean")
    moved = batch.to(torch.float64, kernel.device)
    for masked in (False, True):
        exact = policy_results(batch, config, "reference", masked=masked)
        found = policy_results(moved, config, kernel.backend, masked=masked)
        for name, value in exact.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-9, atol=1e-11 * scale)


def test_inputs_are_left_alone(target):
    batch = random_batch(17, device=target.device)
    before = {
        field.name: getattr(batch, field.name).clone()
        for field in dataclasses.fields(batch)
        if field.name != "layout"
    }
    layout = {name: value.clone() for name, value in batch.layout.tensors().items()}
    everything(batch, target.backend)
    for name, value in before.items():
        torch.testing.assert_close(getattr(batch, name), value, rtol=0, atol=0, equal_nan=True)
    for name, value in layout.items():
        assert torch.equal(batch.layout.tensors()[name], value)


def test_ragged_masks_hold_what_the_tests_rely_on():
    """Runs at both borders of rows, steps of one token, and rows without an action token."""
    mask = ragged_mask(14, 50, generator=torch.Generator().manual_seed(0))
    assert not mask[6].any()
    assert not mask[13].any()
    assert mask[:, 0].any()
    assert mask[:, -1].any()
    lengths = StepLayout.from_mask(mask, backend="reference").step_lengths
    assert int(lengths.min()) == 1
    assert int(lengths.max()) > 8
