"""Numbers of verl's policy losses and rollout correction: the oracle and the package have them.

Where a peer has no such loss, its numbers are those of loops in fp64. The oracle meets them to
rounding, the package to 1e-9 in fp64. In fp32 a backend loses at most twice what the reference
loses. Masked positions hold NaN.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from batches import Error
from golden_cases import DTYPES, FOLDER, check, load, one_row_a_step
from grids import grid
from oracle import LossConfig, OracleLayout
from oracle import policy_loss as oracle_policy_loss
from oracle import rollout_weights as oracle_rollout_weights

import steppo_kernels as package
from steppo_kernels import StepPOConfig

pytestmark = pytest.mark.isa

_SURROGATES = sorted(FOLDER.glob("surrogate_*.npz"))
_ROLLOUTS = sorted(FOLDER.glob("rollout_weights_*.npz"))
_COUNTS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "token_clip_fraction",
    "dead_token_fraction",
    "num_steps",
    "num_tokens",
)
# Level and pool of each array of a rollout file, and how weights outside of the bounds end.
_LEVELS = {
    "token_truncate": ("token", "mean", "truncate"),
    "token_mask": ("token", "sum", "mask"),
    "step_truncate": ("step", "sum", "truncate"),
    "step_mask": ("step", "sum", "mask"),
}


def by_name(paths):
    assert paths, f"no golden files in {FOLDER}"
    return {path.stem[-2:]: path for path in paths}


def settings_of(arrays):
    """Return the keywords of the config, and the normalizer."""
    settings = json.loads(arrays["settings"])
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings["config"].items()
    }
    return config, settings["normalizer"]


def traits_of(arrays):
    """Return what a file is one of few to have."""
    config, normalizer = settings_of(arrays)
    return {
        ("ratio", config["ratio"]),
        ("surrogate", config["surrogate"]),
        ("reduction", config["reduction"]),
        ("token_clip", "token_clip" in config),
        ("penalty", "kl_coef" in config),
        ("normalizer", normalizer is None),
        ("advantages", arrays["advantages"].dim()),
        ("weights", arrays["is_weights"].numel() > 0, arrays["is_weights"].dim()),
    }


def few_surrogates():
    """Return the smallest files in which every trait occurs."""
    few, seen = {}, set()
    files = {name: load(path) for name, path in by_name(_SURROGATES).items()}
    for name in sorted(files, key=lambda name: files[name]["response_mask"].numel()):
        if not traits_of(files[name]) <= seen:
            few[name] = by_name(_SURROGATES)[name]
            seen |= traits_of(files[name])
    return few


def without_gaps(arrays):
    """Return the file with the action tokens of each row moved to its begin: a run is a step."""
    mask = arrays["response_mask"] == 1
    order = torch.argsort(~mask, dim=1, stable=True)
    return {
        name: value.gather(1, order)
        if isinstance(value, torch.Tensor) and value.shape == mask.shape
        else value
        for name, value in arrays.items()
    }


def poisoned(arrays, name):
    """Return an array with NaN at the masked positions; None where the file has none."""
    value, mask = arrays[name], arrays["response_mask"] == 1
    if value.numel() == 0:
        return None
    return torch.where(mask, value, torch.nan) if value.shape == mask.shape else value


def on_tokens(arrays, name):
    """Return an array by token, NaN at the masked positions; None where the file has none."""
    value, mask = poisoned(arrays, name), arrays["response_mask"] == 1
    if value is None or value.shape == mask.shape:
        return value
    return torch.where(mask, value[:, None], torch.nan)


def exact_loss(arrays):
    """Return what the oracle makes of a file of a surrogate."""
    config, normalizer = settings_of(arrays)
    flat = {
        name: None if value is None else value.flatten().tolist()
        for name in ("log_probs", "old_log_probs", "advantages", "is_weights", "ref_log_probs")
        for value in [on_tokens(arrays, name)]
    }
    return oracle_policy_loss(
        **flat, layout=oracle_layout(arrays), config=LossConfig(**config), normalizer=normalizer
    )


def oracle_layout(arrays):
    mask = arrays["response_mask"] == 1
    rows = range(len(mask))
    return OracleLayout.from_rows(mask.flatten().tolist(), tuple(mask.shape), rows, [0] * len(rows))


def exact_weights(arrays, name):
    """Return what the oracle makes of a file of rollout log-probs."""
    level, pool, outside = _LEVELS[name]
    old, rollout = (
        poisoned(arrays, one).flatten().tolist() for one in ("old_log_probs", "rollout_log_probs")
    )
    return oracle_rollout_weights(
        old,
        rollout,
        oracle_layout(arrays),
        level=level,
        pool=pool,
        outside=outside,
        **bounds_of(arrays, outside),
    )


def bounds_of(arrays, outside):
    """Return the bounds; where verl truncates it has no lower one."""
    low = None if outside == "truncate" else float(arrays["low"])
    return {"low": low, "high": float(arrays["high"])}


@pytest.mark.parametrize("path", by_name(_SURROGATES).values(), ids=by_name(_SURROGATES))
def test_the_oracle_has_the_peers_loss(path):
    arrays = load(path)
    found = exact_loss(arrays)
    gradient = torch.tensor(found.of_log_probs, dtype=torch.float64)
    assert Error.between(gradient, arrays["grad_log_probs"].flatten()).largest < 1e-14
    # In fp32 each token takes the same branch.
    assert found.margin > 1e-6
    if arrays["loss_is_same"]:
        assert abs(found.loss - float(arrays["loss"])) < 1e-14 * max(found.size, 1.0)
    share = float(arrays["token_clip_fraction"])
    if not math.isnan(share):
        # The peer took this mean in fp32.
        assert found.metrics["token_clip_fraction"] == pytest.approx(share, abs=1e-7)


@pytest.mark.parametrize("name", _LEVELS)
@pytest.mark.parametrize("path", by_name(_ROLLOUTS).values(), ids=by_name(_ROLLOUTS))
def test_the_oracle_has_the_peers_rollout_weights(path, name):
    arrays = load(path)
    found = exact_weights(arrays, name)
    weights = torch.tensor(found.weights, dtype=torch.float64)
    assert Error.between(weights, arrays[name].flatten()).largest < 1e-14
    assert found.margin > 1e-5


def test_the_files_have_every_surrogate_and_ratio_of_a_peer():
    traits = set().union(*(traits_of(load(path)) for path in _SURROGATES))
    surrogates = {value for name, value, *_ in traits if name == "surrogate"}
    assert surrogates == {"clip", "cispo", "mask", "soft", "quadratic", "tv"}
    assert {("ratio", "token"), ("ratio", "geometric"), ("ratio", "product")} <= traits


@grid(cover=1, path=by_name(_SURROGATES), dtype=DTYPES, interpreted={"path": few_surrogates()})
def test_surrogate(target, masked, path, dtype):
    arrays = load(path)
    if masked:
        arrays = without_gaps(arrays)
    exact = exact_loss(arrays)
    config, normalizer = settings_of(arrays)
    mask = arrays["response_mask"] == 1
    metrics = {}

    def compute(target, dtype):
        given = on_tokens if masked else poisoned
        tensors = {
            name: None if value is None else value.to(target.device, dtype)
            for name in ("log_probs", "old_log_probs", "advantages", "is_weights", "ref_log_probs")
            for value in [given(arrays, name)]
        }
        tensors["log_probs"].requires_grad_()
        layout = mask.to(target.device) if masked else one_row_a_step(arrays, target)
        result = package.steppo_loss(
            **tensors,
            layout=layout,
            config=StepPOConfig(**config),
            normalizer=normalizer,
            backend=target.backend,
        )
        result.loss.backward()
        metrics.update(result.metrics.as_dict())
        return {"loss": result.loss, "grad_log_probs": tensors["log_probs"].grad}

    gradient = arrays["grad_log_probs"]
    # What the peer calls its loss may differ by terms without gradient.
    loss = torch.tensor(exact.loss, dtype=torch.float64)
    scales = {
        "loss": exact.size / abs(exact.loss),
        "grad_log_probs": exact.slope_size / float(gradient.abs().max()),
    }
    expected = {"loss": loss, "grad_log_probs": gradient}
    check(compute, expected, target, dtype, bound=1e-9, scales=scales.items())
    found = compute(target, dtype)
    assert not found["grad_log_probs"][~mask.to(target.device)].any()
    counts = {name: metrics[name] for name in _COUNTS}
    assert counts == pytest.approx({name: exact.metrics[name] for name in _COUNTS}, abs=1e-6)
    assert metrics["policy_loss"] == pytest.approx(
        exact.metrics["policy_loss"], abs=1e-6 * exact.size
    )


@grid(cover=1, path=by_name(_ROLLOUTS), name=list(_LEVELS), dtype=DTYPES)
def test_rollout_weights(target, path, name, dtype):
    arrays = load(path)
    level, pool, outside = _LEVELS[name]
    mask = arrays["response_mask"] == 1
    metrics = {}

    def compute(target, dtype):
        old, rollout = (
            poisoned(arrays, one).to(target.device, dtype)
            for one in ("old_log_probs", "rollout_log_probs")
        )
        result = package.rollout_weights(
            old,
            rollout,
            one_row_a_step(arrays, target),
            level=level,
            pool=pool,
            outside=outside,
            **bounds_of(arrays, outside),
            backend=target.backend,
        )
        metrics.update(result.metrics.as_dict())
        weights = result.weights
        if level == "token":
            weights = weights[mask.to(target.device)]
        return {"weights": weights}

    expected = arrays[name][mask] if level == "token" else arrays[name]
    check(compute, {"weights": expected}, target, dtype, bound=1e-9)
    compute(target, dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert metrics == pytest.approx(exact_weights(arrays, name).metrics, rel=tolerance)
