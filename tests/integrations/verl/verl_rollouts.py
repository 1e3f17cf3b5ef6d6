"""Rollouts of the toy game in the actor's own weights, one row of TransferQueue a step."""

from __future__ import annotations

import random
from typing import Any

import torch
import transfer_queue
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl_toy import Capitals

_ANSWER = 3


class Manager:
    """It stands for verl's AgentLoopManager, with its whole interface."""

    @classmethod
    def create(
        cls,
        config: Any,
        llm_client: Any,
        teacher_client: Any = None,
        reward_loop_worker_handles: Any = None,
    ) -> Manager:
        made = cls()
        made.config, made.client = config, llm_client
        path = config.actor_rollout_ref.model.path
        options = {"attn_implementation": "eager"}
        made.model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
        made.tokenizer = AutoTokenizer.from_pretrained(path)
        node = config.trainer.v1.get(config.trainer.v1.trainer_mode) or {}
        made.state_key = node.get("bootstrap_key")
        made.copies = node.get("rewards") in ("last", "extra_fields")
        made.scores_tokens = config.actor_rollout_ref.rollout.calculate_log_probs
        made.random = random.Random(0)
        torch.manual_seed(0)
        return made

    @torch.no_grad()
    def generate_sequences(self, batch: Any) -> None:
        self.model.load_state_dict(self.client.weights(), strict=False)
        update = int(getattr(batch["global_steps"], "data", batch["global_steps"]))
        uids = [getattr(uid, "data", uid) for uid in batch["uid"]]
        rows = []
        for uid in uids:
            for session in range(self.config.actor_rollout_ref.rollout.n):
                rows += self._play(f"{uid}_{session}", uid)
        tag = {"status": "success", "global_steps": update}
        versions = {"min_global_steps": update - 1, "max_global_steps": update - 1}
        tags = [
            {
                **tag,
                **versions,
                "prompt_len": len(row["prompts"]),
                "response_len": len(row["responses"]),
                "seq_len": len(row["input_ids"]),
            }
            for _, row in rows
        ]
        transfer_queue.kv_batch_put(
            keys=[key for key, _ in rows],
            fields=list_of_dict_to_tensordict([row for _, row in rows]),
            tags=tags,
            partition_id="train",
        )
        finished = [{"status": "finished"}] * len(uids)
        transfer_queue.kv_batch_put(keys=uids, partition_id="train", tags=finished)

    def _play(self, trajectory: str, uid: str) -> list[tuple[str, dict[str, Any]]]:
        """Play a game, which is cut off after a random number of turns."""
        game = Capitals(self.random.randrange(10**6))
        turns = self.random.randint(1, game.turns)
        played = []
        for _ in range(turns):
            prompt = self._prompt(game)
            answer, log_probs = self._answer(prompt)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            played.append((prompt, answer, log_probs, game.answer(text)))
        rows = []
        for turn, (prompt, answer, log_probs, reward) in enumerate(played):
            # verl's agent loop copies the score of the last row onto all others.
            score = played[-1][-1] if self.copies else reward
            row = self._row(uid, turns, prompt, answer, score, [1] * len(answer), log_probs)
            row["extra_fields"]["step_reward"] = reward
            # Every second index: gaps mean nothing.
            rows.append((f"{trajectory}_{2 * turn}", row))
        if self.state_key and turns < game.turns:
            end = [self.tokenizer.eos_token_id]
            row = self._row(uid, turns, self._prompt(game), end, played[-1][-1], [0], [0.0])
            row["extra_fields"][self.state_key] = True
            rows.append((f"{trajectory}_{2 * turns}", row))
        return rows

    def _prompt(self, game: Capitals) -> list[int]:
        said = [{"role": "user", "content": game.says()}]
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _answer(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        found = self.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=_ANSWER,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = found.sequences[0, len(prompt) :]
        log_probs = torch.cat(found.logits).log_softmax(-1)
        return answer.tolist(), log_probs.gather(1, answer[:, None])[:, 0].tolist()

    def _row(
        self,
        uid: str,
        turns: int,
        prompt: list[int],
        answer: list[int],
        score: float,
        mask: list[int],
        log_probs: list[float],
    ) -> dict[str, Any]:
        scores = torch.zeros(len(answer))
        scores[-1] = score
        both = torch.tensor(prompt + answer)
        engine = {}
        if self.scores_tokens:
            # Those of an inference engine differ from the trainer's.
            noise = 0.05 * torch.randn(len(answer))
            engine = {"rollout_log_probs": torch.tensor(log_probs) + noise}
        return engine | {
            "prompts": torch.tensor(prompt),
            "responses": torch.tensor(answer),
            "response_mask": torch.tensor(mask),
            "loss_mask": torch.tensor(mask),
            "rm_scores": scores,
            "input_ids": both,
            "position_ids": torch.arange(len(both)),
            "uid": uid,
            "num_turns": turns,
            "extra_fields": {},
            "multi_modal_inputs": {},
        }
