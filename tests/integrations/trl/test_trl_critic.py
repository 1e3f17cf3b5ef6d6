"""The value head: where its values stand, what it trains, and how it is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import letter_game
import pytest
import torch
from oracle import OracleLayout, value_loss
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2ForCausalLM, TrainerCallback
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from steppo_kernels.integrations.trl import loss

HEAD = "steppo_value_head"


def with_values(trainer: Any) -> Any:
    """Give the value head of a trainer other numbers than zeros."""
    head = getattr(trainer.accelerator.unwrap_model(trainer.model), HEAD)
    torch.manual_seed(5)
    torch.nn.init.normal_(head.weight, std=0.1)
    torch.nn.init.constant_(head.bias, 0.3)
    return trainer


def micro_batch(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[k] for k in range(8)])


def states_of(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Return the states of each row, alone and without padding: those of prompt and completion."""
    inputs = loss.model_inputs(batch)
    return [
        model.model(input_ids=ids[mask == 1][None]).last_hidden_state[0]
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def layout_of(batch: dict[str, Any]) -> OracleLayout:
    mask = batch["completion_mask"] * batch["tool_mask"]
    return OracleLayout.from_mask(mask.flatten().tolist(), tuple(mask.shape))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_value_is_of_the_state_before_the_step(fused, tmp_path):
    trainer = with_values(letter_game.trainer(tmp_path, step_critic=True, step_fused=fused))
    batch = micro_batch(trainer)
    layout, length = layout_of(batch), batch["completion_ids"].shape[1]
    found = batch[loss.OLD_VALUES].flatten()
    with torch.no_grad():
        states = states_of(trainer.model, batch)
    for row, steps in enumerate(layout.trajectories):
        prompt = int(batch["prompt_mask"][row].sum())
        for step in steps:
            first = layout.steps[step][0]
            # The state that the first token of the step is drawn from.
            state = states[row][prompt + first % length - 1]
            head = trainer.model.steppo_value_head
            expected = (state @ head.weight[0] + head.bias[0]).item()
            assert found[first].item() == pytest.approx(expected, abs=1e-5)


def by_loops(trainer: Any, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients of the value loss in fp64, by the loops of the oracle."""
    exact = copy.deepcopy(model).double()
    layout, length = layout_of(batch), batch["completion_ids"].shape[1]
    states = states_of(exact, batch)
    values = []
    for row, steps in enumerate(layout.trajectories):
        prompt = int(batch["prompt_mask"][row].sum())
        values += [states[row][prompt + layout.steps[step][0] % length - 1] for step in steps]
    trains_body = trainer.args.step_value_trains_body
    seen = torch.stack(values)
    new = (
        torch.nn.functional.linear(
            seen if trains_body else seen.detach(), exact.steppo_value_head.weight.double()
        ).squeeze(-1)
        + exact.steppo_value_head.bias.double()
    )
    firsts = [step[0] for step in layout.steps]
    returns, old = (batch[n].flatten()[firsts] for n in (loss.RETURNS, loss.OLD_VALUES))
    found = value_loss(
        new.tolist(),
        returns.tolist(),
        layout,
        old_values=old.tolist(),
        clip=trainer.args.step_value_clip,
        reduction="step_mean",
    )
    new.backward(torch.tensor(found.gradient, dtype=torch.float64))
    return {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains_body", [True, False])
def test_gradients_are_those_of_the_policy_and_of_loops_in_fp64(trains_body, tmp_path):
    options = {
        "step_critic": True,
        "step_value_trains_body": trains_body,
        "step_value_coef": 0.5,
        "step_value_clip": 0.05,
    }
    trainer = with_values(letter_game.trainer(tmp_path, **options))
    plain = Qwen2ForCausalLM(trainer.model.config)
    plain.steppo_value_head = copy.deepcopy(trainer.model.steppo_value_head)
    plain.load_state_dict(trainer.model.state_dict())
    batch = micro_batch(trainer)
    # Some values have moved by more than the clip since.
    moved = 0.2 * torch.randn(batch[loss.OLD_VALUES].shape, generator=torch.manual_seed(2))
    batch[loss.OLD_VALUES] = batch[loss.OLD_VALUES] + moved
    trainer._compute_loss(trainer.model, batch).backward()
    both = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert 0 < trainer._metrics["train"]["critic/clip_fraction"][0] < 1
    trainer.model.zero_grad()
    loss.policy_loss(trainer, trainer.model, batch, None)[0].loss.backward()
    policy = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    exact = by_loops(trainer, plain, batch)
    assert (len(exact) > 2) == trains_body
    largest = max(float(one.abs().max()) for one in exact.values())
    for name, one in both.items():
        expected = 0.5 * exact.get(name, torch.zeros_like(one).double())
        expected = expected + policy.get(name, torch.zeros_like(one))
        assert float((one - expected).abs().max()) < 1e-5 * largest, name


def test_a_checkpoint_holds_the_value_head_and_goes_on_from_it(tmp_path):
    options = {"step_critic": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = letter_game.trainer(tmp_path, **options)
    trainer.train()
    head = trainer.model.steppo_value_head.weight
    assert float(head.abs().max()) > 0
    assert "2604.18401" in (Path(tmp_path) / "README.md").read_text()
    again, seen = letter_game.trainer(tmp_path, **{**options, "max_steps": 3}), []

    class Looks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.append(again.model.steppo_value_head.weight.detach().clone())

    again.add_callback(Looks())
    again.train(resume_from_checkpoint=str(Path(tmp_path) / "checkpoint-2"))
    assert again.state.global_step == 3
    torch.testing.assert_close(seen[0], head.detach(), rtol=0, atol=0)
    # The policy alone loads as any model does.
    policy = Qwen2ForCausalLM.from_pretrained(Path(tmp_path) / "checkpoint-2")
    torch.testing.assert_close(policy.lm_head.weight, trainer.model.lm_head.weight)


def test_an_adapter_is_saved_with_the_value_head(tmp_path):
    options = {
        "step_critic": True,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }
    trainer = letter_game.trainer(tmp_path, **options)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    trained = [name for name, one in policy.named_parameters() if one.requires_grad]
    assert any(HEAD in name for name in trained)
    assert not any("lm_head" in name or "base_layer" in name for name in trained)
    trainer.train()
    trainer.save_model(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = [name for name in saved if HEAD in name and name.endswith("weight")]
    assert float(saved[name].abs().max()) > 0
    # The config that was given is as it was.
    assert options["peft_config"].modules_to_save is None


@pytest.mark.parametrize("peft", [False, True])
def test_an_engine_is_not_sent_the_value_head(peft, tmp_path, monkeypatch):
    """By TRL's own walk over the weights, without vLLM."""

    class Engine(VLLMGeneration):
        def __init__(self, model: Any, accelerator: Any, **_: Any) -> None:
            self.model, self._dist = model, DistributedBackend(accelerator)

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    config = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])} if peft else {}
    trainer = letter_game.trainer(
        tmp_path, step_critic=True, use_vllm=True, vllm_mode="colocate", **config
    )
    sent = [name for name, _ in trainer.vllm_generation._iter_named_params()]
    assert sorted(sent) == sorted(name for name, _ in letter_game.model().named_parameters())


@pytest.mark.parametrize(
    ("model", "peft", "message"),
    [
        ("a-name", True, "model: got 'a-name' with step_critic and peft_config"),
        ("peft", False, "model: got a PEFT model with step_critic"),
    ],
)
def test_models_that_would_lose_the_value_head_raise(model, peft, message, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    policy: Any = model if model != "peft" else get_peft_model(letter_game.model(), config)
    given = {"peft_config": config} if peft else {}
    with pytest.raises(TypeError, match=message):
        letter_game.trainer(tmp_path, policy, step_critic=True, **given)
