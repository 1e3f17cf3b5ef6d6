"""A game of three turns, a tokenizer, a model of two layers, and trainers that play it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.models import unwrap_model_for_generation

from steppo_kernels.integrations.trl import StepPOTrainer, StepPOTrainingArguments

TURNS = 3
LETTERS = list("abcd")
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
WORDS = ["user", "assistant", "tool", "go", "say", "call", "answer", "{", "}", '"', ":", "bad"]
VOCABULARY = SPECIAL + WORDS + LETTERS + [letter.upper() for letter in LETTERS]
TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }} "
    "{%- if m.get('content') %} {{ m['content'] }}{% endif -%}"
    "{%- for one in (m.get('tool_calls') or []) %} call {{ one['function']['name'] }} "
    "{{ one['function']['arguments'] | tojson }}{% endfor -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant {%- endif -%}"
)


class LetterTokenizer(PreTrainedTokenizerFast):
    """Words are tokens. A message of the model calls the tool with its first word."""

    # Of transformers from 5.13 on, and of older ones: TRL looks whether there is one.
    response_template: ClassVar[dict[str, str]] = {"kind": "letters"}
    response_schema: ClassVar[dict[str, str]] = {"kind": "letters"}

    def parse_response(self, ids: Any, prefix: Any = None, tools: Any = None, **_: Any) -> Any:
        words = self.decode(ids, skip_special_tokens=True).split()
        if not words or words[0] == "bad":
            return {"role": "assistant", "content": " ".join(words)}
        function = {"name": "answer", "arguments": {"word": words[0]}}
        calls = [{"type": "function", "function": function}]
        return {"role": "assistant", "content": "", "tool_calls": calls}


def tokenizer() -> LetterTokenizer:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    made = LetterTokenizer(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        padding_side="left",
    )
    made.chat_template = TEMPLATE
    return made


def model(seed: int = 0, **settings: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=None,
        **{**sizes, **settings},
    )
    config._attn_implementation = "eager"
    made = Qwen2ForCausalLM(config)
    made.generation_config.eos_token_id = 3
    made.generation_config.pad_token_id = 0
    return made


def on_disk(folder: Path, **settings: Any) -> Qwen2ForCausalLM:
    """Return a model that was saved: TRL loads the reference from its path."""
    model(**settings).save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager")


class LetterGame:
    """Says a letter, and wants its capital."""

    def __init__(self) -> None:
        self.step_rewards: list[float] = []

    def reset(self, seed: int = 0, **_: Any) -> str:
        self.step_rewards.clear()
        self._random = random.Random(seed)
        self._letter = self._random.choice(LETTERS)
        return f" say {self._letter}"

    def answer(self, word: str) -> str:
        """Answers.

        Args:
            word: the capital.

        Returns:
            The next letter.
        """
        is_capital = word.isupper() and word.lower() in LETTERS
        self.step_rewards.append(1.0 if word == self._letter.upper() else 0.1 * is_capital)
        self._letter = self._random.choice(LETTERS)
        return f"say {self._letter}"


def play(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Play the game with the policy: a `rollout_func`."""
    words, device = trainer.processing_class, trainer.accelerator.device
    games = [LetterGame() for _ in prompts]
    seen = []
    for prompt, game in zip(prompts, games, strict=True):
        said = game.reset(seed=int(prompt[-1]["content"]))
        text = f"<|im_start|>user {said}<|im_end|><|im_start|>assistant"
        seen.append(words(text, add_special_tokens=False)["input_ids"])
    completions: list[list[int]] = [[] for _ in prompts]
    masks: list[list[int]] = [[] for _ in prompts]
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as policy:
        for turn in range(TURNS):
            rows = [a + b for a, b in zip(seen, completions, strict=True)]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            attention = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
            with torch.no_grad():
                made = policy.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    do_sample=True,
                    temperature=trainer.temperature,
                    top_k=0,
                    max_new_tokens=3,
                    eos_token_id=3,
                    pad_token_id=0,
                )[:, width:].tolist()
            for row, message in enumerate(made):
                if 3 in message:
                    message = message[: message.index(3) + 1]
                completions[row] += message
                masks[row] += [1] * len(message)
                said = games[row].answer(
                    (words.decode(message, skip_special_tokens=True).split() or [""])[0]
                )
                if turn + 1 < TURNS:
                    text = f"<|im_start|>tool {said}<|im_end|><|im_start|>assistant"
                    suffix = words(text, add_special_tokens=False)["input_ids"]
                    completions[row] += suffix
                    masks[row] += [0] * len(suffix)
    return {
        "prompt_ids": seen,
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": masks,
        "step_rewards": [game.step_rewards for game in games],
    }


def prompts(count: int = 256) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"{seed}"}] for seed in range(count)],
            "seed": list(range(count)),
        }
    )


class Scripted:
    """A `rollout_func` that does not ask the policy: the same completions for every split.

    A completion is drawn from its number since the beginning, over all ranks. It has one to four
    steps of two to six tokens.
    """

    def __init__(self) -> None:
        self.before = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: [] for name in ("prompt_ids", "completion_ids", "env_mask", "step_rewards")
        }
        start = self.before + trainer.accelerator.process_index * len(prompts)
        for row in range(start, start + len(prompts)):
            draw = random.Random(row)
            ids, mask, rewards = [], [], []
            for _ in range(draw.randint(1, 4)):
                length = draw.randint(1, 5)
                ids += [draw.randrange(4, len(VOCABULARY)) for _ in range(length)] + [3, 2, 6]
                mask += [1] * (length + 1) + [0, 0]
                rewards.append(draw.random())
            found["prompt_ids"].append([2, 4] + [draw.randrange(4, 20)] * draw.randint(1, 3))
            found["completion_ids"].append(ids)
            found["env_mask"].append(mask)
            found["step_rewards"].append(rewards)
        self.before += trainer.accelerator.num_processes * len(prompts)
        return {**found, "logprobs": None}


def arguments(folder: Path | str, **given: Any) -> StepPOTrainingArguments:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 64,
        "learning_rate": 3e-3,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "seed": 1,
        "step_gamma": 1.0,
    }
    return StepPOTrainingArguments(str(folder), **{**usual, **given})


def trainer(
    folder: Path | str, policy: Any = None, rollout: Any = None, **given: Any
) -> StepPOTrainer:
    """Return a trainer; what is no argument of the trainer is one of the training."""
    names = (
        *("peft_config", "environment_factory", "reward_funcs", "advantage_func", "tools"),
        "optimizers",
    )
    own = {name: given.pop(name) for name in names if name in given}
    if "environment_factory" not in own and rollout is not False:
        own["rollout_func"] = rollout or Scripted()
    return StepPOTrainer(
        model() if policy is None else policy,
        args=arguments(folder, **given),
        train_dataset=own.pop("train_dataset", prompts()),
        processing_class=tokenizer(),
        **own,
    )
