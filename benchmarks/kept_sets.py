"""Heads over kept sets beside whole vocabularies, masks, and rows that torch gathers; K ids each.

    python -m benchmarks.kept_sets                     # a table, and whether targets are met
    python -m benchmarks.kept_sets --break-even        # also how large sets may be, as a picture
    python -m benchmarks.kept_sets --tokens 256        # fewer cases

Everything is bf16 on the CPU: log-probs of tokens from hidden states and a head of 151,936 ids, and
the gradients of hidden states (frozen) and of the weight (dW). The sets are those of a policy whose
probabilities fall off as 1 / rank: ids that are likely are in many of them. They exist before the
call, like a layout; `sets made` has their making and that of their index in the call. `torch
gather` takes all rows by `index_select` and multiplies them by `bmm`; `gather, chunks` multiplies
and sums those of 64 tokens at a time. `dense, masked` forms all logits and masks them. Variants
take turns, and every call begins with empty caches, as after a model's body. Before anything is
timed, log-probs and gradients of each variant over sets are compared with fp64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steppo_kernels import TokenSupport, linear_token_log_probs
from steppo_kernels.log_probs import supported_head

from .machine import empty_caches, machine
from .report.plots import STYLE, top_line

SIZE, VOCABULARY = 896, 151_936
TOKENS, IDS = (256, 2048), (20, 100, 512)
OUT = Path(__file__).parent / "results" / "kept_sets.json"
KEPT, MADE, DENSE, MASK = "kept sets", "sets made", "dense", "dense, masked"
GATHER, CHUNKS = "torch gather", "gather, chunks"
# What kept sets must beat by how much, at this number of ids or fewer.
TARGETS = (
    (DENSE, "frozen", 20, 100.0),
    (DENSE, "dW", 20, 30.0),
    (DENSE, "frozen", 512, 8.0),
    (DENSE, "dW", 512, 8.0),
    (GATHER, "frozen", 512, 2.0),
    (GATHER, "dW", 512, 2.0),
    (CHUNKS, "frozen", 512, 2.0),
    (CHUNKS, "dW", 512, 2.0),
)
# Tokens whose rows are gathered at once, where torch gathers them in chunks.
_CHUNK = 64
_TURNS, _SECONDS = 5, 20.0


class Case(NamedTuple):
    """A batch: hidden states, the weight, the sets ``[M, K]``, tokens and upstream gradients."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    token_ids: Tensor
    upstream: Tensor


def draw(tokens: int, count: int, weight: Tensor) -> Case:
    """Draw a batch; the token of a set is one of its likely ids."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.randperm(VOCABULARY, generator=generator)
    fall = -(torch.arange(VOCABULARY) + 2.7).log()
    rows = []
    for _ in range(0, tokens, 64):
        noise = torch.empty(64, VOCABULARY).exponential_(generator=generator).log_().neg_()
        rows.append(order[(noise + fall).topk(count).indices].int())
    ids = torch.cat(rows)[:tokens]
    hidden = torch.randn(tokens, SIZE, generator=generator).bfloat16()
    upstream = torch.randn(tokens, generator=generator) / tokens
    return Case(hidden, weight, ids, ids[:, min(3, count - 1)].long(), upstream)


def ways(case: Case) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return how log-probs come of hidden states and the weight, by name."""
    support = TokenSupport.from_padded(case.ids)
    wide = case.ids.long()
    place = (wide == case.token_ids.view(len(wide), -1)[:, :1]).int().argmax(1)

    def kept(hidden: Tensor, weight: Tensor) -> Any:
        return linear_token_log_probs(hidden, weight, case.token_ids, support=support)

    def made(hidden: Tensor, weight: Tensor) -> Any:
        sets = TokenSupport.from_padded(case.ids)
        return linear_token_log_probs(hidden, weight, case.token_ids, support=sets)

    def dense(hidden: Tensor, weight: Tensor) -> Any:
        return linear_token_log_probs(hidden, weight, case.token_ids)

    def masked(hidden: Tensor, weight: Tensor) -> Tensor:
        mask = torch.zeros(len(hidden), VOCABULARY, dtype=torch.bool).scatter_(1, wide, True)
        logits = (hidden @ weight.t()).float().masked_fill(~mask, -torch.inf)
        return logits.gather(1, case.token_ids[:, None])[:, 0] - logits.logsumexp(1)

    def gather(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = weight.index_select(0, wide.reshape(-1)).view(*wide.shape, SIZE)
        logits = torch.bmm(rows, hidden.unsqueeze(2)).squeeze(2).float()
        return logits.gather(1, place[:, None])[:, 0] - logits.logsumexp(1)

    def chunks(hidden: Tensor, weight: Tensor) -> Tensor:
        found = []
        for part in torch.arange(len(hidden)).split(_CHUNK):
            rows = weight.index_select(0, wide[part].reshape(-1)).view(len(part), -1, SIZE)
            logits = (rows * hidden[part].unsqueeze(1)).sum(-1).float()
            found.append(logits.gather(1, place[part, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(found)

    return {KEPT: kept, MADE: made, GATHER: gather, CHUNKS: chunks, DENSE: dense, MASK: masked}


def call(case: Case, way: Callable[[Tensor, Tensor], Tensor], gradients: str) -> list[Tensor]:
    """Return log-probs and gradients of one call."""
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.detach().requires_grad_(gradients == "dW")
    log_probs = way(hidden, weight)
    log_probs.backward(case.upstream)
    return [x.detach() for x in (log_probs, hidden.grad, weight.grad) if x is not None]


def check(case: Case, name: str) -> None:
    """Raise unless log-probs and gradients are those of fp64 over the sets, within bf16."""
    wide, rows = case.ids.long(), 64
    part = case._replace(
        hidden=case.hidden[:rows], ids=case.ids[:rows], token_ids=case.token_ids[:rows]
    )
    used, at = wide[:rows].unique(return_inverse=True)
    hidden = part.hidden.double().requires_grad_()
    weight = case.weight[used].double().requires_grad_()
    logits = torch.einsum("nkd,nd->nk", weight[at], hidden)
    place = (wide[:rows] == part.token_ids[:, None]).int().argmax(1)
    log_probs = logits.gather(1, place[:, None])[:, 0] - logits.logsumexp(1)
    log_probs.backward(case.upstream[:rows].double())
    given = part._replace(upstream=case.upstream[:rows])
    found = call(given, ways(given)[name], "dW")
    wanted = [log_probs.detach(), hidden.grad, weight.grad]
    found[2] = found[2][used]
    for got, exact in zip(found, wanted, strict=True):
        assert exact is not None
        error = float((got.double() - exact).norm() / exact.norm())
        assert error < 0.02, f"{name}: an error of {error}"


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return the milliseconds of calls that take turns, each with empty caches."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_TURNS + 1):
        for name, run in calls.items():
            if sum(times[name]) > 1e3 * _SECONDS and len(times[name]) >= 2:
                continue
            repeats = 1 if times[name] and times[name][-1] > 50 else 5
            took = []
            for _ in range(repeats):
                empty_caches()
                begin = time.perf_counter()
                run()
                took.append(1e3 * (time.perf_counter() - begin))
            # The first turn warms up what is made once.
            if turn or took[-1] > 1e3:
                times[name].append(statistics.median(took))
    return times


def measure(tokens: int, count: int, weight: Tensor) -> list[dict[str, Any]]:
    """Return the times of all variants for a number of tokens and of ids."""
    case = draw(tokens, count, weight)
    every = ways(case)
    for name in every.keys() - {DENSE}:
        check(case, name)
    found = []
    for gradients in ("frozen", "dW"):
        times = in_turns(
            {
                name: lambda way=way, gradients=gradients: call(case, way, gradients)
                for name, way in every.items()
            }
        )
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times[KEPT], strict=False)]
            found.append(
                {
                    "tokens": tokens,
                    "ids": count,
                    "gradients": gradients,
                    "variant": name,
                    "ms": statistics.median(values),
                    "ratio": statistics.median(ratios),
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def several(weight: Tensor) -> list[dict[str, Any]]:
    """Return the times of one id and of 64 ids a token over the whole vocabulary."""
    case = draw(256, 64, weight)
    found = []
    for gradients in ("frozen", "dW"):
        calls = {}
        for count in (1, 64):
            ids, upstream = case.ids[:, :count].long(), case.upstream[:, None].expand(-1, count)
            part = case._replace(token_ids=ids, upstream=upstream)
            calls[f"{count} ids"] = lambda part=part, gradients=gradients: call(
                part,
                lambda h, w, part=part: linear_token_log_probs(h, w, part.token_ids),
                gradients,
            )
        times = in_turns(calls)
        ratios = [a / b for a, b in zip(times["64 ids"], times["1 ids"], strict=True)]
        found.append({"gradients": gradients, "ratio": statistics.median(ratios)})
        found[-1] |= {name: statistics.median(values) for name, values in times.items()}
        print(json.dumps(found[-1]), flush=True)
    return found


def break_even(weight: Tensor) -> list[dict[str, Any]]:
    """Return the times of gathered rows and of products with all of the weight, by set size."""
    found = []
    usual = supported_head.BREAK_EVEN
    for count in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        case = draw(256, count, weight)
        way = ways(case)[KEPT]

        def run(ratio: int, case: Case = case, way: Any = way) -> None:
            supported_head.BREAK_EVEN = {False: ratio, True: ratio}
            call(case, way, "dW")

        try:
            times = in_turns({"rows": lambda run=run: run(0), "products": lambda r=run: r(10**9)})
        finally:
            supported_head.BREAK_EVEN = usual
        found.append({"ids": count} | {name: statistics.median(v) for name, v in times.items()})
        print(json.dumps(found[-1]), flush=True)
    return found


def draw_break_even(results: dict[str, Any], path: Path) -> None:
    """Draw the times of both ways by the size of sets, and where the rule changes over."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found, info = results["break_even"], results["machine"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.8))
        axis = figure.subplots()
        for name, label in (("rows", "gathered rows"), ("products", "products with the weight")):
            axis.plot([o["ids"] for o in found], [o[name] for o in found], "o-", label=label)
        border = VOCABULARY / supported_head.BREAK_EVEN[False]
        axis.axvline(border, color="#999999", ls=":")
        axis.annotate(f"the rule: {border:.0f}", (border, 0), (4, 8), textcoords="offset points")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("ids in each set")
        axis.set_ylabel("ms, forward + backward, dW")
        axis.set_ylim(bottom=0)
        axis.legend()
        top_line(
            figure,
            f"256 tokens, d {SIZE}, V {VOCABULARY}, bf16; {info['cpu']}, {info['threads']} "
            f"threads, {info['date']}",
        )
        figure.tight_layout(rect=(0, 0, 1, 0.96))
        figure.savefig(path, dpi=110)


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of all cases."""
    names = (KEPT, MADE, GATHER, CHUNKS, DENSE, MASK)
    lines = [
        "| tokens | ids | gradients | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    cases = dict.fromkeys((one["tokens"], one["ids"], one["gradients"]) for one in found)
    for key in cases:
        of_case = {o["variant"]: o for o in found if (o["tokens"], o["ids"], o["gradients"]) == key}
        cells = [
            f"{of_case[name]['ms']:.1f} ms"
            + ("" if name == KEPT else f" ({of_case[name]['ratio']:.1f}x)")
            if name in of_case
            else ""
            for name in names
        ]
        lines.append("| " + " | ".join([str(part) for part in key] + cells) + " |")
    return lines


def missed(found: list[dict[str, Any]]) -> list[str]:
    """Return the targets that are not met."""
    return [
        f"{one['tokens']} tokens, {one['ids']} ids, {gradients}: {one['ratio']:.1f}x of {variant}, "
        f"expected {least:.0f}x"
        for variant, gradients, most, least in TARGETS
        for one in found
        if (one["variant"], one["gradients"]) == (variant, gradients)
        and one["ids"] <= most
        and one["ratio"] < least
    ]


def main() -> None:
    """Measure, and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--ids", type=int, nargs="*", default=IDS)
    parser.add_argument("--break-even", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCABULARY, SIZE, generator=generator) * 3 / SIZE**0.5).bfloat16()
    found = [
        one
        for tokens in options.tokens
        for count in options.ids
        for one in measure(tokens, count, weight)
    ]
    results: dict[str, Any] = {"machine": machine(), "sets": found, "several": several(weight)}
    if options.break_even:
        results["break_even"] = break_even(weight)
        draw_break_even(results, options.out.with_suffix(".png"))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(found)))
    for text in missed(found):
        print("missed:", text)


if __name__ == "__main__":
    main()
