"""Ratios of an unchanged policy to its own samples, with and without the ids that were kept.

    make example-replay

or, as for `train_smollm2.py` beside this file:

    python examples/replay_sampling.py --tokens 64  # longer answers

SmolLM2-135M-Instruct answers questions under top-p, top-k and min-p sampling. What it samples from
is a softmax over the kept ids alone, and so are the log-probs that an engine reports. The trainer
has the same weights: every ratio should be 1. Over the whole vocabulary the log-prob of a token is
lower by the log of the kept mass. With the sets of kept ids, given as `support=`, it is the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_smollm2 import load, unpack

from steppo_kernels import StepLayout, StepPOConfig, TokenSupport, steppo_loss
from steppo_kernels.integrations.transformers import LogProbBatch, patch_lm_head

QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "Name three things to do in Lisbon.",
    "How do I make a good cup of coffee?",
    "Explain recursion to a child.",
    "What should I cook tonight?",
    "Tell me a joke about computers.",
    "Describe a forest after rain.",
)
WAYS: dict[str, dict[str, float]] = {
    "top_p 0.8": {"top_p": 0.8},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 20": {"top_k": 20},
    "min_p 0.1": {"min_p": 0.1},
    "all ids": {},
}


# Whose clip range is that of StepPO.
DEFAULT = StepPOConfig()
COLUMNS = ("sampling", "kept ids", "support", "token ratio", "least", "step ratio", "outside")


class Rollout(NamedTuple):
    """What an engine returns.

    Attributes:
        token_ids: ``[B, T]``, prompts padded on the left, then what was sampled.
        attention_mask: ``[B, T]``, 1 at tokens.
        sampled: bool ``[B, T]``, the tokens that the policy sampled.
        log_probs: ``[B, T]``, of the sampled tokens, over the kept ids.
        kept: for each sampled token in order, the ids that it was sampled from.
    """

    token_ids: Tensor
    attention_mask: Tensor
    sampled: Tensor
    log_probs: Tensor
    kept: list[list[int]]


@torch.no_grad()
def roll_out(model: Any, tokenizer: Any, tokens: int, way: dict[str, float]) -> Rollout:
    """Sample answers in one way, as an engine does that returns the kept ids."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    # Where nothing is said, transformers takes 50.
    options = {"top_k": 0, **way}
    found = model.generate(
        **prompts,
        do_sample=True,
        max_new_tokens=tokens,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    ids, width = found.sequences, prompts.input_ids.shape[1]
    answers = ids[:, width:]
    # Everything up to the first end of an answer; padding is the same token.
    ended = (answers == tokenizer.eos_token_id).cumsum(1)
    is_sampled = (ended - (answers == tokenizer.eos_token_id).long()) == 0
    scores = torch.stack(found.scores, 1)
    log_probs = scores.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    is_kept = scores[is_sampled] > -torch.inf
    # The whole vocabulary is an empty set.
    kept = [[] if bool(row.all()) else row.nonzero()[:, 0].tolist() for row in is_kept]
    attention = torch.cat((prompts.attention_mask, is_sampled.long()), 1)
    pad = (width, 0)
    return Rollout(
        ids,
        attention,
        torch.nn.functional.pad(is_sampled, pad),
        torch.nn.functional.pad(log_probs, pad),
        kept,
    )


@torch.no_grad()
def ratios(model: Any, rollout: Rollout, support: TokenSupport | None) -> dict[str, float]:
    """Return the ratios of the model, which is unchanged, to what it sampled."""
    layout = StepLayout.from_mask(rollout.sampled)
    positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    new = model(
        rollout.token_ids,
        attention_mask=rollout.attention_mask,
        position_ids=positions,
        steppo=LogProbBatch(layout, support=support),
    ).log_probs
    ones = torch.ones(layout.num_steps)
    log_ratios = steppo_loss(new, rollout.log_probs, ones, layout).step_log_ratio
    assert log_ratios is not None
    token, step = (new - rollout.log_probs)[rollout.sampled].exp(), log_ratios.exp()
    low, high = 1 - DEFAULT.clip_low, 1 + DEFAULT.clip_high
    return {
        "token": float(token.mean()),
        "least": float(token.min()),
        "step": float(step.mean()),
        "outside": float(((step < low) | (step > high)).float().mean()),
    }


def main(
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer.")] = 32,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Show the ratios of an unchanged policy with and without the kept ids."""
    torch.manual_seed(seed)
    table = Table(title="ratios of an unchanged policy")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("sampling", "support") else "right")
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        tokenizer, model = load(Path(folder))
    model.eval()
    rollouts = {name: roll_out(model, tokenizer, tokens, way) for name, way in WAYS.items()}
    patch_lm_head(model)
    for name, rollout in rollouts.items():
        support = TokenSupport.from_lists(rollout.kept, rollout.sampled)
        counts = support.counts[rollout.sampled].float()
        sizes = f"{counts.mean():.1f}" if bool(counts.any()) else "all"
        for given in (None, support):
            found = ratios(model, rollout, given)
            table.add_row(
                *((name, sizes) if given is None else ("", "")),
                "none" if given is None else "replayed",
                *(f"{found[key]:.3f}" for key in ("token", "least", "step")),
                f"{found['outside']:.0%}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
