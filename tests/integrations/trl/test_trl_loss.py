"""Losses and gradients of a micro-batch: of logits in fp64, and of TRL's own losses."""

from __future__ import annotations

import copy
from typing import Any

import letter_game
import oracles
import pytest
import torch
from oracle import OracleLayout
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from steppo_kernels import StepPOConfig
from steppo_kernels.integrations.trl import loss

# What the ratios of the batches below leave on both sides.
BOUNDS = {"epsilon": 0.03, "epsilon_high": 0.04}
KINDS: dict[str, dict[str, Any]] = {
    "steppo": {},
    "trajectory_mean": {"step_reduction": "trajectory_mean"},
    "product, sum": {"step_ratio": "product", "step_reduction": "sum"},
    "centered": {"step_ratio": "centered"},
    "token": {"step_ratio": "token", "step_reduction": "token_mean"},
    "dual clip": {"step_dual_clip": 1.01},
    "token clip": {"step_token_clip": [0.1, 0.12]},
    "cispo": {"step_surrogate": "cispo"},
    "mask": {"step_surrogate": "mask"},
    "soft": {
        "step_surrogate": "soft",
        "step_soft_temperature": [0.9, 1.1],
        "epsilon": StepPOConfig().clip_low,
        "epsilon_high": StepPOConfig().clip_high,
    },
    "quadratic": {"step_surrogate": "quadratic"},
    "tv": {"step_surrogate": "tv", "step_ratio": "token"},
    "entropy": {"entropy_coef": 0.1},
    "temperature": {"temperature": 0.7},
    "kl": {"beta": 0.2},
    "kl, k1": {"beta": 0.2, "step_kl_estimator": "k1"},
}


def policy(folder: Any) -> Any:
    """A model that was saved, for the reference, whose logits differ from each other."""
    return letter_game.on_disk(folder, initializer_range=0.3)


def micro_batch(trainer: Any, *, corrected: bool = True) -> dict[str, Any]:
    """A batch as TRL hands it to the loss, with the old log-probs of another policy.

    With `corrected`, each completion has a weight for the engine that sampled it.
    """
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[k] for k in range(8)])
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        new, _ = logits_of(trainer.accelerator.unwrap_model(trainer.model), batch, trainer)
        batch["old_per_token_logps"] = new + 0.1 * torch.randn(new.shape, generator=draw)
        if "ref_per_token_logps" in batch:
            batch["ref_per_token_logps"] = new + 0.3 * torch.randn(new.shape, generator=draw)
    if corrected:
        batch["importance_sampling_ratio"] = 0.5 + torch.rand(len(new), 1, generator=draw)
    return batch


def logits_of(model: Any, batch: dict[str, Any], trainer: Any) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of the completions from a model's logits.

    Each row is read alone and without padding.
    """
    inputs, ids = loss.model_inputs(batch), batch["completion_ids"]
    log_probs, entropies = [], []
    for row, mask in enumerate(batch["completion_mask"].bool()):
        tokens = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
        logits = model(input_ids=tokens[None]).logits[0, -int(mask.sum()) - 1 : -1]
        every = torch.log_softmax(logits / trainer.temperature, dim=-1)
        found = every.gather(-1, ids[row][mask][:, None]).squeeze(-1)
        zeros = torch.zeros(mask.shape, dtype=every.dtype)
        log_probs.append(zeros.masked_scatter(mask, found))
        entropies.append(zeros.masked_scatter(mask, -(every.exp() * every).sum(-1)))
    return torch.stack(log_probs), torch.stack(entropies)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_loops(
    trainer: Any, batch: dict[str, Any], dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients: the loops of the oracle on the logits of a model of a dtype."""
    exact = copy.deepcopy(trainer.plain).to(dtype)
    new, entropy = logits_of(exact, batch, trainer)
    mask = batch["completion_mask"] * batch["tool_mask"]
    given = {"old_log_probs": batch["old_per_token_logps"], "advantages": batch["advantages"]}
    if "importance_sampling_ratio" in batch:
        given["is_weights"] = batch["importance_sampling_ratio"].expand(new.shape)
    if "ref_per_token_logps" in batch:
        given["ref_log_probs"] = batch["ref_per_token_logps"]
    layout = OracleLayout.from_mask(mask.flatten().tolist(), tuple(mask.shape))
    results, _ = oracles.policy_loss(
        layout,
        trainer.args.step_config,
        log_probs=new.detach().double(),
        entropy=entropy.detach().double(),
        **{name: one.double() for name, one in given.items()},
    )
    upstream = [results["grad_log_probs"].to(dtype)]
    values = [new]
    if "grad_entropy" in results:
        values.append(entropy)
        upstream.append(results["grad_entropy"].to(dtype))
    torch.autograd.backward(values, upstream)
    return float(results["loss"]), gradients(exact)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error, as a share of the largest entry."""
    assert found.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    assert largest > 1e-4
    return max(float((found[name] - one).abs().max()) for name, one in expected.items()) / largest


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_logits_in_fp64(kind, fused, tmp_path):
    model = policy(tmp_path)
    untouched = copy.deepcopy(model)
    trainer = letter_game.trainer(tmp_path, model, step_fused=fused, **{**BOUNDS, **KINDS[kind]})
    assert trainer.step_fused is fused
    trainer.plain = untouched
    batch = micro_batch(trainer)
    found = trainer._compute_loss(trainer.model, batch)
    found.backward()
    expected, exact = by_loops(trainer, batch, torch.float64)
    rounded, plain = by_loops(trainer, batch, torch.float32)
    assert abs(found.item() - expected) <= 4 * abs(rounded - expected) + 1e-6 * abs(expected)
    # The body of the model rounds as well, and the loss adds next to nothing.
    of_plain = error(plain, exact)
    assert of_plain < 1e-4
    assert error(gradients(trainer.model), exact) <= 4 * of_plain
    # Ratios are on both sides of the bounds, where there are some.
    log = trainer._metrics["train"]
    if "soft" not in kind and kind not in ("quadratic", "tv"):
        assert 0 < log["clip_ratio/region_mean"][0] < 1
        assert log["clip_ratio/low_mean"][0] > 0
        assert log["clip_ratio/high_mean"][0] > 0


# Arguments here, GRPO's arguments, and whether completions have several steps.
OF_TRL: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "dapo": (
        {"step_ratio": "token", "step_reduction": "token_mean", "epsilon": 0.05},
        {"loss_type": "dapo", "epsilon": 0.05},
        True,
    ),
    "dapo, kl": (
        {"step_ratio": "token", "step_reduction": "token_mean", "epsilon": 0.05, "beta": 0.3},
        {"loss_type": "dapo", "epsilon": 0.05, "beta": 0.3, "use_bias_correction_kl": False},
        True,
    ),
    "cispo": (
        {
            "step_ratio": "token",
            "step_reduction": "token_mean",
            "step_surrogate": "cispo",
            "epsilon": 1.0,
            "epsilon_high": 0.05,
        },
        {"loss_type": "cispo", "epsilon_high": 1.05},
        True,
    ),
    "grpo": (
        {"step_ratio": "token", "epsilon": 0.05},
        {"loss_type": "grpo", "epsilon": 0.05},
        False,
    ),
    "gspo": (
        {"epsilon": 0.02, "epsilon_high": 0.03},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "epsilon_high": 0.03,
        },
        False,
    ),
    "sapo": (
        {"step_ratio": "token", "step_surrogate": "soft"},
        {"loss_type": "sapo"},
        False,
    ),
}


@pytest.mark.parametrize("name", OF_TRL)
def test_gradients_are_those_of_the_loss_of_trl(name, tmp_path):
    ours, theirs, has_turns = OF_TRL[name]
    model = policy(tmp_path)
    grpo = GRPOTrainer(
        copy.deepcopy(model),
        lambda completions, **_: [0.0] * len(completions),
        GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            **theirs,
        ),
        letter_game.prompts(),
        processing_class=letter_game.tokenizer(),
    )
    trainer = letter_game.trainer(tmp_path, model, **ours)
    batch = micro_batch(trainer, corrected=False)
    if not has_turns:
        # The completion is one step: what comes after its first run is cut off.
        first = (batch["completion_mask"] * batch["tool_mask"]).cumprod(1)
        batch["completion_mask"], batch["tool_mask"] = first, torch.ones_like(first)
        row = batch["advantages"][:, :1]
        batch["advantages"] = row.expand(first.shape).contiguous()
    mask = batch["completion_mask"] * batch["tool_mask"]
    batch["num_items_in_batch"] = mask.sum()
    for one in (trainer, grpo):
        one.model.eval()
    trainer._compute_loss(trainer.model, batch).backward()
    # A completion of one step has one advantage, as GRPO has it.
    own = {} if has_turns else {"advantages": batch["advantages"][:, 0]}
    grpo._compute_loss(grpo.model, {**batch, **own}).backward()
    assert error(gradients(trainer.model), gradients(grpo.model)) < 1e-5
    # Means of GRPO are over tokens, and those of GSPO over completions, as ours.
    names = ["kl"] if "beta" in ours else []
    if name == "gspo":
        names += [key for key in grpo._metrics["eval"] if key.startswith("clip_ratio/")]
        assert len(names) == 5
    for key in names:
        found, expected = (one._metrics["eval"][key] for one in (trainer, grpo))
        assert found == pytest.approx(expected, rel=1e-4), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unchanged_policy_has_ratios_of_one(dtype, tmp_path):
    """Old log-probs come from the code of the new ones: a clip of 3e-4 sees any other."""
    model = letter_game.model(initializer_range=0.3).to(dtype)
    trainer = letter_game.trainer(tmp_path, model, num_iterations=2)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[k] for k in range(8)])
    assert batch["old_per_token_logps"].dtype == torch.float32
    trainer._compute_loss(trainer.model, batch)
    log = trainer._metrics["train"]
    assert log["steps/ratio_min"][0] == pytest.approx(1.0, abs=1e-6)
    assert log["steps/ratio_max"][0] == pytest.approx(1.0, abs=1e-6)
    assert log["clip_ratio/region_mean"] == [0.0]


def test_tokens_of_the_environment_are_not_scored(tmp_path):
    trainer = letter_game.trainer(tmp_path, num_iterations=2)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[k] for k in range(8)])
    mask = batch["completion_mask"] * batch["tool_mask"]
    assert (batch["old_per_token_logps"][mask == 0] == 0).all()
    assert (batch["old_per_token_logps"][mask == 1] < 0).all()
