"""One demo from start to finish: warm-up, training, evaluation, pictures."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from ..backends.choice import Backend
from . import report
from .agent import Agent
from .environment import TextFrozenLake
from .progress import Live
from .results import DemoResult, Run
from .text import ChatText, build_tokenizer
from .train import (
    LEVELS,
    Evaluation,
    TrainConfig,
    Trainer,
    evaluate,
)
from .warmup import warm_up


def run_demo(
    *,
    out_dir: Path,
    seed: int = 0,
    backend: Backend = "auto",
    compare: bool = False,
    seeds: int = 1,
    config: TrainConfig | None = None,
    warmup_steps: int = 80,
    eval_episodes: int = 256,
    threads: int = 1,
    console: Console | None = None,
) -> DemoResult:
    """Train an agent with StepPO, print a table and write pictures.

    The same arguments give the same numbers, bit for bit on one machine, except for times.

    Args:
        out_dir: folder for the files; made if missing.
        seed: of everything random.
        backend: of the kernels.
        compare: also train by token (PPO) and by trajectory (GSPO), from the same warmed-up agent
            with the same budget and hyper-parameters.
        seeds: number of seeds, from `seed` on, of a comparison. Without one, `seed` alone runs.
        config: hyper-parameters.
        warmup_steps: supervised steps on random actions.
        eval_episodes: episodes of each evaluation.
        threads: of PyTorch. The tensors are small: more gain little, and sums would depend on them.
        console: where to print.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    config = config or TrainConfig()
    console = console or Console()
    methods = list(LEVELS) if compare else ["StepPO"]
    # Before anything is trained: a folder that cannot be made loses nothing then.
    out_dir.mkdir(parents=True, exist_ok=True)
    all_seeds = range(seed, seed + (seeds if compare else 1))
    text = ChatText(build_tokenizer())
    runs: list[Run] = []
    started = time.perf_counter()
    total = len(all_seeds) * (warmup_steps + len(methods) * config.iterations)
    with _reproducible(threads), Live(console, total) as live:
        for run_seed in all_seeds:
            live.begin(f"warm-up, seed {run_seed}")
            agent = _new_agent(text, run_seed)
            warm_up(
                agent,
                text,
                TextFrozenLake(),
                steps=warmup_steps,
                seed=run_seed,
                on_step=live.warmup_step,
            )
            before = evaluate(agent, text, episodes=eval_episodes, seed=run_seed)
            for method in methods:
                live.begin(f"{method}, seed {run_seed}")
                trainer = Trainer(
                    copy.deepcopy(agent),
                    text,
                    method=method,
                    config=config,
                    seed=run_seed,
                    backend=backend,
                )
                runs.append(_train(trainer, before, run_seed, eval_episodes, live))
    files = report.write(out_dir, runs, config)
    seconds = time.perf_counter() - started
    report.show(console, runs, files, seconds)
    return DemoResult(runs, files, seconds)


def _new_agent(text: ChatText, seed: int) -> Agent:
    torch.manual_seed(seed)
    return Agent(text.vocab_size, pad_id=text.pad_id)


def _train(trainer: Trainer, before: Evaluation, seed: int, eval_episodes: int, live: Live) -> Run:
    started = time.perf_counter()
    reports, trace = [], None
    for _ in range(trainer.config.iterations):
        reports.append(trainer.train_iteration())
        live.iteration(reports[-1])
        # Early enough that some steps are still bad, late enough that the values mean something.
        if trainer.method == "StepPO" and len(reports) == max(1, trainer.config.iterations // 4):
            trace = trainer.trace()
    seconds = time.perf_counter() - started
    after = evaluate(trainer.agent, trainer.text, episodes=eval_episodes, seed=seed)
    return Run(trainer.method, seed, before, after, reports, trace, seconds)


@contextlib.contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """Make PyTorch deterministic, and leave it as it was found."""
    found_threads = torch.get_num_threads()
    found_deterministic = torch.are_deterministic_algorithms_enabled()
    found_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.use_deterministic_algorithms(found_deterministic, warn_only=found_warn_only)
        torch.set_num_threads(found_threads)
