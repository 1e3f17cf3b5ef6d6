"""The tables of docs/scaling.md, from the account."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import account
from .account import Head

VOCABULARY = 151_936
# A micro-batch of a rank: positions, and action tokens among them.
POSITIONS, ROWS = 32_768, 8_192
# What the default of `chunk_tokens` takes on a GPU of 80 GB is more than these rows.
CHUNK = ROWS
_RESULTS = Path(__file__).parents[1] / "results" / "scaling.json"


class Model(NamedTuple):
    """A model: its name, and its hidden size."""

    name: str
    size: int


MODELS = (Model("8B", 4096), Model("70B", 8192))


class Mesh(NamedTuple):
    """How GPUs are divided: by vocabulary, by tokens, and the rest by batches."""

    gpus: int
    tp: int
    cp: int

    @property
    def dp(self) -> int:
        """How many groups have batches of their own."""
        return self.gpus // (self.tp * self.cp)


# Long rows come with many GPUs.
MESHES = {
    "8B": (Mesh(8, 1, 1), Mesh(64, 2, 1), Mesh(512, 4, 2), Mesh(4096, 8, 8)),
    "70B": (Mesh(8, 8, 1), Mesh(64, 8, 1), Mesh(512, 8, 4), Mesh(4096, 8, 8)),
}


def sized(number: float) -> str:
    """Return bytes as a text: 1,536 B, 2.4 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.3g} B"


def _rows(lines: Iterable[Iterable[object]]) -> list[str]:
    head, *rest = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return [head, "|" + "---|" * (head.count("|") - 1), *rest]


def meshes() -> list[str]:
    """Return what a rank sends and holds, by the number of GPUs."""
    lines: list[list[object]] = [
        [
            "model, GPUs",
            "tp x cp x dp",
            "collectives, micro-batch",
            "received, micro-batch",
            "per action token",
            "received, optimizer step",
            "memory",
        ]
    ]
    for model in MODELS:
        head = Head(ROWS, model.size, CHUNK, False, live=ROWS)
        for mesh in MESHES[model.name]:
            of_head, of_context = [], []
            if mesh.tp > 1:
                of_head = head.loss(1)
                if mesh.cp > 1:
                    of_head = [*head.log_probs(), *head.log_probs_backward()]
            if mesh.cp > 1:
                of_context = account.whole(POSITIONS)
            got = account.received(of_head, mesh.tp) + account.received(of_context, mesh.cp)
            count = account.collectives(of_head) + account.collectives(of_context)
            of_batch = sum(account.received(sent, mesh.dp) for sent in account.OF_A_BATCH.values())
            held = head.memory(mesh.tp, VOCABULARY, POSITIONS, of_loss=mesh.cp == 1)
            lines.append(
                [
                    f"{model.name}, {mesh.gpus:,}",
                    f"{mesh.tp} x {mesh.cp} x {mesh.dp}",
                    count,
                    sized(got),
                    sized(got / ROWS),
                    sized(of_batch),
                    sized(sum(held.values())),
                ]
            )
    return _rows(lines)


def heads() -> list[str]:
    """Return what a call of `linear_steppo_loss` sends and holds, by the ranks of its group."""
    lines: list[list[object]] = [
        ["model", "tp", "collectives", "gathers", "sum", *Head(1, 1, 1, False, 1).memory(2, 1, 1)]
    ]
    for model in MODELS:
        head = Head(ROWS, model.size, CHUNK, False, live=ROWS)
        for ranks in (1, 2, 4, 8):
            sent = head.loss(1) if ranks > 1 else []
            words = [each for each in sent if each.collective == "all_gather"]
            sums = [each for each in sent if each.collective == "all_reduce"]
            memory = head.memory(ranks, VOCABULARY, POSITIONS)
            lines.append(
                [
                    model.name,
                    ranks,
                    account.collectives(sent),
                    sized(account.received(words, ranks)),
                    sized(account.received(sums, ranks)),
                    *(sized(memory.get(name, 0)) for name in lines[0][5:]),
                ]
            )
    return _rows(lines)


def batches() -> list[str]:
    """Return what the functions of a whole batch receive, by the ranks that have batches."""
    sizes = (8, 64, 512, 4096)
    lines: list[list[object]] = [["function", "collectives", *(f"{n:,} ranks" for n in sizes)]]
    for name, sent in account.OF_A_BATCH.items():
        got = (sized(account.received(sent, size)) for size in sizes)
        lines.append([f"`{name}`", account.collectives(sent), *got])
    return _rows(lines)


def peers() -> list[str]:
    """Return what others send for the log-probs of the same rows on 8 ranks, as their code says."""
    ranks, size, logits = 8, 4096, 2
    head = Head(ROWS, size, CHUNK, True, live=ROWS)

    def row(name: str, forward: list[account.Sent], backward: list[account.Sent]) -> list[object]:
        every = [*forward, *backward]
        got = (sized(account.received(one, ranks)) for one in (forward, backward))
        return [name, account.collectives(every), *got]

    def reduced(count: int, numbers: int, itemsize: int = 4) -> account.Sent:
        return account.Sent("all_reduce", count, numbers * itemsize)

    chunks = -(-ROWS // 512)
    # Parts of the vocabulary of a rank, whose largest logits are reduced one by one.
    splits = -(-VOCABULARY // ranks // 1024)
    layer_sum = reduced(1, ROWS * size, 2)
    lines = [
        ["log-probs and entropies of a head, 8 ranks", "collectives", "forward", "backward"],
        row("`linear_token_log_probs`", head.log_probs(), head.log_probs_backward()),
        row("`linear_steppo_loss`, all of the loss", head.loss(1), []),
        row(
            "Liger 0.8.5, its torch code for tensor parallelism",
            [reduced(chunks, 512), reduced(chunks, 3 * 512)],
            [layer_sum],
        ),
        row(
            "Liger 0.8.5, `vocab_parallel_cross_entropy` of sharded logits, without entropies",
            [reduced(3, ROWS)],
            [layer_sum],
        ),
        row(
            "verl 0.9.1, its Triton head under Megatron",
            [reduced(1, splits * ROWS), reduced(1, ROWS), reduced(1, 2 * ROWS)],
            [layer_sum],
        ),
        row(
            "verl 0.9.1 from sharded logits under Megatron",
            [reduced(6, ROWS)],
            [layer_sum],
        ),
        row(
            "logits gathered, as a sharded head of transformers returns them",
            [account.Sent("all_gather", 1, ROWS * -(-VOCABULARY // ranks) * logits)],
            [layer_sum],
        ),
    ]
    return _rows(lines)


def weak() -> list[str]:
    """Return what the weak-scaling run measured."""
    document = json.loads(_RESULTS.read_text())
    info = document["machine"]
    lines: list[list[object]] = [["what is split", "1 process", "2 processes", "efficiency"]]
    for way, numbers in document["ways"].items():
        one, two = numbers["seconds"]["1"], numbers["seconds"]["2"]
        lines.append(
            [way, f"{one * 1e3:.0f} ms", f"{two * 1e3:.0f} ms", f"{numbers['efficiency']:.0%}"]
        )
    where = f"{info['cpu']}, {info['cores']} cores; torch {info['torch']}, {info['date']}."
    turns, work = document["turns"], document["work of a rank"]
    done = f"Each process, with one thread, in {turns} turns: {work}."
    return [where, done, "", *_rows(lines)]


TABLES = {"meshes": meshes, "heads": heads, "batches": batches, "peers": peers, "weak": weak}
