"""Numbers of other implementations: the StepPO authors' GAE, verl's and Liger-Kernel's losses.

In fp64 they are met to 1e-10. In fp32 a backend loses at most twice what the reference loses.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batches import Error
from golden_cases import DTYPES, FOLDER, check, load, one_row_a_step
from grids import grid

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    linear_steppo_loss,
    step_gae,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
)

pytestmark = pytest.mark.isa

_SETTINGS = ("gamma", "lam", "clip", "clip_low", "clip_high", "temperature")


def golden(kind):
    """Run a test on every file of a kind, in fp64 and fp32.

    The interpreter takes the smallest files in which every setting has each of its values.
    """
    files = {path.stem[-2:]: path for path in sorted(FOLDER.glob(f"{kind}_*.npz"))}
    assert files, f"no golden files {kind}_*.npz"
    few, seen = {}, set()
    for name, path in sorted(files.items(), key=lambda item: tokens_of(load(item[1]))):
        values = settings_of(load(path))
        if not values <= seen:
            few[name], seen = path, seen | values
    return grid(cover=1, path=files, dtype=DTYPES, interpreted={"path": few})


def settings_of(arrays):
    found = {(name, float(arrays[name])) for name in _SETTINGS if name in arrays}
    if "is_weights" in arrays:
        found.add(("is_weights", arrays["is_weights"].numel() > 0))
    return found


def tokens_of(arrays):
    return arrays["response_mask"].numel()


def by_trajectory(arrays, target):
    return StepLayout.from_rows(
        arrays["response_mask"].to(target.device),
        arrays["trajectory_ids"],
        arrays["step_indices"],
        backend="reference",
    )


@golden("step_gae")
def test_step_gae(target, path, dtype):
    arrays = load(path)

    def compute(target, dtype):
        layout = by_trajectory(arrays, target)
        result = step_gae(
            arrays["token_rewards"].to(target.device, dtype),
            arrays["values"].to(target.device, dtype),
            layout,
            gamma=float(arrays["gamma"]),
            lam=float(arrays["lam"]),
            backend=target.backend,
        )
        return {
            name: broadcast_to_tokens(getattr(result, name), layout, backend="reference")
            for name in ("advantages", "returns")
        }

    action = arrays["response_mask"] == 1
    expected = {name: torch.where(action, arrays[name], 0.0) for name in ("advantages", "returns")}
    check(compute, expected, target, dtype)


@golden("token_gae")
def test_token_gae(target, path, dtype):
    arrays = load(path)
    action = arrays["response_mask"] == 1

    def run(target, dtype, whiten):
        layout = by_trajectory(arrays, target).per_token()
        result = step_gae(
            arrays["token_rewards"].to(target.device, dtype),
            arrays["values"].to(target.device, dtype),
            layout,
            gamma=float(arrays["gamma"]),
            lam=float(arrays["lam"]),
            whiten=whiten,
            backend=target.backend,
        )
        return {
            name: broadcast_to_tokens(getattr(result, name), layout, backend="reference").cpu()[
                action
            ]
            for name in ("advantages", "returns")
        }

    def as_verl_whitens(target, dtype):
        # verl puts 1e-8 under the root, and rounds the Bessel factor to fp32.
        found = run(target, dtype, whiten=False)
        raw = found["advantages"]
        count = raw.numel()
        factor = float(np.float32(count / (count - 1)))
        centered = raw - raw.mean()
        variance = centered.square().mean() * factor
        return {**found, "advantages": centered * torch.rsqrt(variance + 1e-8)}

    expected = {name: arrays[name][action] for name in ("advantages", "returns")}
    check(as_verl_whitens, expected, target, dtype)
    if dtype == torch.float64:
        # The two whitenings differ by the rounding of that factor, eps / 4 of fp32.
        check(lambda *where: run(*where, whiten=True), expected, target, dtype, bound=3e-8)


@golden("policy_loss")
def test_policy_loss(target, path, dtype):
    arrays = load(path)
    scalars = {}

    def compute(target, dtype):
        def moved(name):
            return arrays[name].to(target.device, dtype)

        log_probs = moved("log_probs").requires_grad_()
        result = steppo_loss(
            log_probs,
            moved("old_log_probs"),
            moved("advantages"),
            one_row_a_step(arrays, target),
            config=StepPOConfig(
                clip_low=float(arrays["clip_low"]), clip_high=float(arrays["clip_high"])
            ),
            is_weights=moved("is_weights") if arrays["is_weights"].numel() else None,
            backend=target.backend,
        )
        result.loss.backward()
        scalars.update(result.metrics.as_dict())
        return {"loss": result.loss, "grad_log_probs": log_probs.grad}

    expected = {name: arrays[name] for name in ("loss", "grad_log_probs")}
    if dtype == torch.float32 and not clear_of_borders(arrays):
        # There fp32 decides otherwise whether a step is clipped.
        pytest.skip("a ratio lies within fp32 rounding of a border")
    summed = arrays["advantages"].abs().mean() / arrays["loss"].abs()
    check(compute, expected, target, dtype, scales={"loss": float(summed)}.items())
    if dtype == torch.float64:
        # verl took these means in fp32.
        assert scalars["token_clip_fraction"] == pytest.approx(
            float(arrays["token_clip_fraction"]), abs=1e-7
        )
        assert scalars["approx_kl"] == pytest.approx(float(arrays["k1"]), rel=1e-7, abs=1e-7)


def clear_of_borders(arrays):
    mask = arrays["response_mask"] == 1
    z = torch.where(mask, arrays["log_probs"] - arrays["old_log_probs"], 0.0)
    ratio = (z.sum(1) / mask.sum(1)).exp()
    borders = 1 - arrays["clip_low"], 1 + arrays["clip_high"]
    return all(float((ratio - border).abs().min()) > 1e-6 for border in borders)


@golden("policy_loss")
def test_kl_penalty(target, path, dtype):
    arrays = load(path)

    def compute(target, dtype):
        log_probs, old, ref = (
            arrays[name].to(target.device, dtype)
            for name in ("log_probs", "old_log_probs", "ref_log_probs")
        )
        log_probs.requires_grad_()
        result = steppo_loss(
            log_probs,
            old,
            torch.zeros(len(log_probs), dtype=dtype, device=target.device),
            one_row_a_step(arrays, target),
            config=StepPOConfig(kl_coef=1.0),
            ref_log_probs=ref,
            backend=target.backend,
        )
        result.loss.backward()
        return {"kl_k3_loss": result.loss, "kl_k3_grad": log_probs.grad}

    check(compute, {k: arrays[k] for k in ("kl_k3_loss", "kl_k3_grad")}, target, dtype)


@golden("value_loss")
def test_value_loss(target, path, dtype):
    arrays = load(path)
    scalars = {}

    def compute(target, dtype):
        values, old, returns = (
            arrays[name].to(target.device, dtype)
            for name in ("values", "old_values", "step_returns")
        )
        values.requires_grad_()
        result = step_value_loss(
            values,
            returns,
            one_row_a_step(arrays, target),
            old_values=old,
            clip=float(arrays["clip"]),
            backend=target.backend,
        )
        result.loss.backward()
        scalars.update(result.metrics.as_dict())
        return {"loss": result.loss, "grad_values": values.grad}

    check(compute, {name: arrays[name] for name in ("loss", "grad_values")}, target, dtype)
    if dtype == torch.float64:
        # verl took this mean in fp32.
        assert scalars["clip_fraction"] == pytest.approx(float(arrays["clip_fraction"]), abs=1e-7)


def linear_loss(path, target, dtype, loss_of):
    """Compare ``loss_of(hidden, weight, **arguments)`` with what Liger-Kernel found in fp32."""
    arrays = load(path)
    hidden, weight = (
        arrays[name].to(target.device, dtype).requires_grad_() for name in ("hidden", "weight")
    )
    result = loss_of(
        hidden,
        weight,
        token_ids=arrays["token_ids"].to(target.device),
        old_log_probs=arrays["old_log_probs"].to(target.device, dtype),
        advantages=arrays["advantages"].to(target.device, dtype),
        layout=one_row_a_step(arrays, target),
        temperature=float(arrays["temperature"]),
        config=StepPOConfig(
            clip_low=float(arrays["clip_low"]), clip_high=float(arrays["clip_high"])
        ),
        backend=target.backend,
    )
    result.loss.backward()
    found = {"loss": result.loss, "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    for name, value in found.items():
        assert value.dtype == dtype, name
        # Both are sums of fp32 rounding errors of a few hundred terms.
        assert Error.between(value, arrays[name]).largest < 2e-6, name
    fraction = result.metrics.as_dict()["token_clip_fraction"]
    assert fraction == pytest.approx(float(arrays["token_clip_fraction"]), abs=1e-7)


@golden("linear_loss")
def test_logits_loss(target, path, dtype):
    def loss_of(hidden, weight, **arguments):
        return steppo_loss_from_logits(hidden @ weight.t(), **arguments)

    linear_loss(path, target, dtype, loss_of)


@golden("linear_loss")
def test_linear_loss(target, path, dtype):
    def loss_of(hidden, weight, **arguments):
        return linear_steppo_loss(hidden, weight, chunk_tokens=20, **arguments)

    linear_loss(path, target, dtype, loss_of)
