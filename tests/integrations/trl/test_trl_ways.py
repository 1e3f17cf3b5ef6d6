"""What TRL offers beside: adapters, references, checkpointing, other heads, evaluation, patches."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import letter_game
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from steppo_kernels.integrations.transformers import patch_lm_head, patch_of
from steppo_kernels.integrations.trl import heads

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OFF_POLICY = {"num_iterations": 2, "epsilon": 0.02, "max_steps": 3}

# Ways that give the same numbers fused and unfused.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "off-policy": OFF_POLICY,
    "kl": {"beta": 0.1, **OFF_POLICY},
    "synchronized reference": {
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        **OFF_POLICY,
    },
    "lora": {"peft_config": LoraConfig(**LORA), "learning_rate": 0.05},
    "lora, kl": {"peft_config": LoraConfig(**LORA), "beta": 0.1, **OFF_POLICY},
    "no checkpointing": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "tied": {"tied": True},
    "generations over updates": {"steps_per_generation": 4, "epsilon": 0.02, "max_steps": 4},
    "masked if truncated": {"mask_truncated_completions": True, "rollout": "some truncated"},
    "padded": {"pad_to_multiple_of": 16},
    "critic": {"step_critic": True, **OFF_POLICY},
    "critic, lora": {
        "step_critic": True,
        "peft_config": LoraConfig(**LORA),
        "learning_rate": 0.05,
    },
    "critic, synchronized reference": {
        "step_critic": True,
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        **OFF_POLICY,
    },
    "no tool mask": {"rollout": "one turn"},
}


class SomeTruncated(letter_game.Scripted):
    """Every second completion ends with the end of a message, the others in the middle of one."""

    def __call__(self, prompts: Any, trainer: Any) -> Any:
        output = super().__call__(prompts, trainer)
        for row in range(0, len(prompts), 2):
            for name in ("completion_ids", "env_mask"):
                del output[name][row][-2:]
        return output


class OneTurn(letter_game.Scripted):
    """Completions of one turn, without a mask of the environment."""

    def __call__(self, prompts: Any, trainer: Any) -> Any:
        output = super().__call__(prompts, trainer)
        del output["env_mask"]
        output["step_rewards"] = [rewards[:1] for rewards in output["step_rewards"]]
        return output


ROLLOUTS = {"some truncated": SomeTruncated, "one turn": OneTurn}


def trained(folder: Any, fused: bool | None, way: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    given = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 2, **way}
    settings = {"tie_word_embeddings": True} if given.pop("tied", False) else {}
    rollout = ROLLOUTS.get(given.pop("rollout", ""), letter_game.Scripted)()
    policy = letter_game.on_disk(folder / "model", **settings)
    made = letter_game.trainer(folder, policy, rollout, step_fused=fused, **copy.deepcopy(given))
    before = {name: one.detach().clone() for name, one in made.model.named_parameters()}
    made.train()
    after = dict(made.model.named_parameters())
    return {name: after[name].detach() - one for name, one in before.items()}, made


@pytest.mark.parametrize("way", WAYS)
def test_fused_and_unfused_make_the_same_updates(way, tmp_path):
    fused, made = trained(tmp_path / "fused", True, WAYS[way])
    unfused, _ = trained(tmp_path / "unfused", False, WAYS[way])
    largest = max(float(one.abs().max()) for one in unfused.values())
    assert largest > 1e-4
    for name, one in unfused.items():
        torch.testing.assert_close(fused[name], one, rtol=0, atol=1e-3 * largest, msg=name)
    log = [entry for entry in made.state.log_history if "entropy" in entry]
    assert {"reward", "clip_ratio/region_mean", "steps/ratio_max", "policy_loss"} <= set(log[0])
    assert ("kl" in log[0]) == ("beta" in WAYS[way])
    assert ("critic/value_loss" in log[0]) == ("critic" in way)
    if "epsilon" in WAYS[way]:
        # Some update was not on-policy.
        assert max(entry["steps/ratio_max"] for entry in log) > 1.0
    if way == "masked if truncated":
        assert log[0]["steps/num_steps"] < 12


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ({"cast_lm_head_to_fp32": True}, "the forward of its output head was replaced"),
        (
            {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])},
            "ModulesToSaveWrapper, expected a plain nn.Linear",
        ),
    ],
)
def test_a_head_that_asks_for_it_is_unfused_and_says_so(way, reason, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        moved, made = trained(tmp_path, None, {**way, "learning_rate": 0.05})
    assert made.step_fused is False
    assert reason in caplog.text
    assert any(float(one.abs().max()) > 0 for one in moved.values())


def test_any_head_without_a_patch_is_unfused(caplog):
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    model = letter_game.model()
    model.lm_head = Doubled(*reversed(model.lm_head.weight.shape), bias=False)
    with caplog.at_level(logging.WARNING):
        assert not heads.choose_fused(model, letter_game.arguments("out"))
    assert "Doubled" in caplog.text
    with pytest.raises(TypeError, match="Doubled"):
        heads.choose_fused(model, letter_game.arguments("out", step_fused=True))


@pytest.mark.parametrize(
    ("rate", "given", "warns"),
    [
        (0.05, {"num_iterations": 2}, True),
        (0.05, {"num_iterations": 2, "disable_dropout": True}, False),
        (0.05, {}, False),
        (0.0, {"num_iterations": 2}, False),
    ],
)
def test_dropout_with_old_log_probs_warns(rate, given, warns, tmp_path):
    peft = LoraConfig(**LORA, lora_dropout=rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        letter_game.trainer(tmp_path, peft_config=peft, **given)
    found = [str(one.message) for one in caught if "model: got dropout" in str(one.message)]
    assert len(found) == warns


def test_dropout_of_attention_warns(tmp_path):
    policy = letter_game.model(attention_dropout=0.1)
    with pytest.warns(UserWarning, match=r"model: got dropout of 0.1 with old log-probs"):
        letter_game.trainer(tmp_path, policy, num_iterations=2)


def test_a_model_that_is_patched_already_is_taken_as_it_is(tmp_path):
    expected, _ = trained(tmp_path / "plain", True, {})
    policy = letter_game.on_disk(tmp_path / "model")
    handle = patch_lm_head(policy)
    made = letter_game.trainer(tmp_path, policy, optim="sgd", learning_rate=0.2, max_steps=2)
    assert patch_of(made.model) is handle
    before = {name: one.detach().clone() for name, one in made.model.named_parameters()}
    made.train()
    for name, one in made.model.named_parameters():
        torch.testing.assert_close(one.detach() - before[name], expected[name], msg=name)


def test_means_of_trl_are_means_with_a_sum_too(tmp_path):
    logs = []
    for reduction in ("step_mean", "sum"):
        policy = letter_game.on_disk(tmp_path / "model", initializer_range=0.3)
        made = letter_game.trainer(tmp_path, policy, step_reduction=reduction, beta=0.1)
        # The reference is another model.
        torch.nn.init.zeros_(made.ref_model.lm_head.weight)
        made.train()
        logs.append(made.state.log_history[0])
    for name in ("entropy", "kl"):
        assert logs[0][name] > 0.1
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name


def test_an_evaluation_divides_by_its_own_steps(tmp_path):
    made = letter_game.trainer(
        tmp_path,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        advantage_func=lambda samples: torch.ones_like(samples.rewards),
    )
    made.train()
    # As the trainer's own does: evaluations have prompts of their own.
    found = made.evaluate(letter_game.prompts(4))
    assert found["eval_steps/num_steps"] > 8
    # The mean over all steps, whose ratios and advantages are 1.
    assert found["eval_loss"] == pytest.approx(-1.0, abs=1e-6)
    assert found["eval_entropy"] > 1


def test_the_last_update_of_an_epoch_is_divided_by_its_own_parts(tmp_path):
    """Six micro-batches an epoch, four to an update: the second update has two."""
    made = letter_game.trainer(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        steps_per_generation=1,
        max_steps=-1,
        num_train_epochs=2,
    )
    made.train_dataset = letter_game.prompts(6)
    seen: list[tuple[float, int]] = []
    counts: list[float] = []
    compute = made._compute_loss

    def counted(model: Any, inputs: Any) -> Tensor:
        seen.append((made._normalizer, made.current_gradient_accumulation_steps))
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        starts = (mask - torch.nn.functional.pad(mask, (1, 0))[:, :-1]) == 1
        counts.append(float(starts.sum()))
        return compute(model, inputs)

    made._compute_loss = counted
    made.train()
    assert [length for _, length in seen] == [4, 4, 4, 4, 2, 2] * 2
    for stop in (4, 6, 10, 12):
        # The last part of an update is divided by the count of all of them.
        normalizer, length = seen[stop - 1]
        assert normalizer == sum(counts[stop - length : stop])


def test_every_accumulated_gradient_is_seen_by_the_optimizer_once(tmp_path):
    """The gradients of an update that reaches into the next generation are rescaled, not kept."""
    norms: list[float] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            norms.append(float(sum(one.grad.square().sum() for one in model.parameters())) ** 0.5)

    common = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0}
    for rows, accumulation in ((16, 1), (4, 4)):
        made = letter_game.trainer(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=1,
            **common,
        )
        made.add_callback(Norms())
        made.train()
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-4)
