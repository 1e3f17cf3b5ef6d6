"""What is promised of the vocabulary level, and what a page shows of a run."""

from __future__ import annotations

from collections.abc import Callable

from ..report.page import Block, Plot, Table, digits, number, time_text
from ..report.results import Line, Results
from ..report.targets import Targets
from .plots import draw_curves, draw_speed
from .variants import (
    EAGER,
    EAGER_FLOAT,
    EAGER_HALF,
    FUSED,
    IN_PLACE,
    IN_PLACE_SLICE,
    LIGER,
    MOST_CLIPPED,
    NONE_CLIPPED,
    PRODUCTS,
    PRODUCTS_KEPT,
)

LOGITS = "[256, 151936]"
ALL_LOGITS = "512 tokens, 4 steps of 32, V 151936"
HEAD = "1024 tokens, 8 steps of 32, V 151936"
TEN = "1280 tokens, 10 steps of 32, V 151936"
_PRODUCTS = (PRODUCTS, PRODUCTS_KEPT)
_TITLES = {
    "log_probs_forward": "token_log_probs of bf16, forward",
    "log_probs_both": "token_log_probs of bf16, forward + backward",
    "logits_loss": "steppo_loss_from_logits of bf16, forward + backward",
    "linear_loss": "linear_steppo_loss in bf16, d = 896, forward + backward",
    "linear_loss_clipped": "linear_steppo_loss in bf16, d = 896, forward + backward",
    "linear_log_probs": "linear_token_log_probs in bf16, d = 896, without gradients",
}
NOTE = """\
Medians over interleaved turns; a ratio is the median of those taken within a turn. All on logits
that are peaked as a trained model's are. Extra memory is the peak of torch's allocations above the
inputs, in shares of the logits or, where the gradients of hidden states and weight are returned,
beyond these; resident is by how much the process grows, gradients included. Errors: of log-probs
the largest against fp64, of gradients the root mean square over that of the expected ones (fp64, or
fp32 where there is a head, in both cases from logits that are not rounded on the way). GB/s counts
what the task must move at least: logits once forward, again backward, and their gradient.

Eager takes the logits of all tokens, as trainers do; "action tokens" are variants that are given
those alone. Bare products are `H W^T`, `dZ W` and `dZ^T H` of the action tokens with `torch.mm` and
nothing else, all outputs allocated or, as "kept memory", in the same places every time: the package
keeps the memory of its scratch and of the weight's last gradient that was dropped.
"Twice the products" is `linear_token_log_probs` and then `steppo_loss`, which forms the logits
again in its backward pass; "2 chunks" has half the logits and sums the weight's gradient in fp32.
Liger grpo is `LigerFusedLinearGRPOLoss` at the sequence level; TRL chunked and Liger scaled CE are
log-prob functions with the reference loss after them, and so are the two cross entropies."""
NOTE = "\n\n".join(" ".join(part.split("\n")) for part in NOTE.split("\n\n"))


def promise(targets: Targets) -> None:
    """Make every promise."""
    results = targets.results
    for suite, title, factors in (
        ("log_probs_forward", "forward", ((EAGER_HALF, 5), (EAGER_FLOAT, 10))),
        ("log_probs_both", "forward + backward", ((EAGER_HALF, 4), (EAGER_FLOAT, 4))),
    ):
        ours = results.get(suite, LOGITS, FUSED)
        for peer, factor in factors:
            targets.faster(
                f"token_log_probs, {LOGITS} bf16, {title}",
                peer,
                results.get(suite, LOGITS, peer),
                factor,
                ours,
            )
    error, upcast = (
        _of(results.get("log_probs_forward", LOGITS, variant), "error_log_probs")
        for variant in (FUSED, EAGER_FLOAT)
    )
    targets.add(
        f"token_log_probs, {LOGITS} bf16: largest error over that of eager fp32",
        "<= 2x",
        None if error is None or not upcast else error / upcast,
        lambda value: value <= 2,
    )
    for variant in (IN_PLACE, IN_PLACE_SLICE):
        for key, what in (("extra", "peak extra"), ("resident", "peak resident")):
            found = results.get("logits_loss", ALL_LOGITS, variant)
            share = _of(found, f"{key}_of_logits")
            targets.add(
                f"steppo_loss_from_logits, {variant}: {what} memory, of the logits",
                "< 2 %",
                None if share is None else 100 * share,
                lambda value: value < 2,
                " %",
            )
    _promise_head(targets)


def _promise_head(targets: Targets) -> None:
    results = targets.results
    fused = results.get("linear_loss", HEAD, FUSED)
    targets.add(
        "linear_steppo_loss, a quarter of 1024 tokens: time over that of its bare products",
        "<= 1.15x",
        results.ratio(fused, *(results.get("linear_loss", HEAD, variant) for variant in _PRODUCTS)),
        lambda value: value <= 1.15,
    )
    for peer, factor in ((EAGER, 5), (LIGER, 2.5)):
        targets.faster(
            "linear_steppo_loss, a quarter of 1024 tokens",
            peer,
            results.get("linear_loss", HEAD, peer),
            factor,
            fused,
        )
    extra, chunk = _of(fused, "extra_bytes"), _of(fused, "chunk_bytes")
    targets.add(
        "linear_steppo_loss: peak extra memory beyond the gradients, in logits of the chunk",
        # Hidden states of the chunk's rows and their gradient come on top.
        "<= 1 (+ 2 %)",
        None if extra is None or not chunk else extra / chunk,
        lambda value: value <= 1.02,
        "",
    )
    targets.add(
        "linear_steppo_loss, 7 of 10 steps clipped: time over that with none clipped",
        "<= 0.65x",
        results.ratio(
            *(
                results.get("linear_loss_clipped", TEN, variant)
                for variant in (MOST_CLIPPED, NONE_CLIPPED)
            )
        ),
        lambda value: value <= 0.65,
    )


def blocks(results: Results) -> list[Block]:
    """Return what stands on the page."""
    found: list[Block] = [
        Plot("Times and memory of the variants", "speed", draw_speed),
        *_sections(results),
        _choices(results),
    ]
    for name, title in (
        ("share", "of 512 tokens, % in steps; V 32768"),
        ("live", "512 tokens in 16 steps, % of the steps not clipped; V 32768"),
        ("vocabulary", "a quarter of 512 tokens in steps, by V"),
    ):
        places = results.places(name)
        rows = [
            (variant, what, *(text(curve[x]) if x in curve else "" for x in places))
            for (of, _, variant, _), curve in results.curves.items()
            if of == name
            for what, text in (("time", _time), ("extra memory", _extra))
        ]
        if rows:
            header = ("variant", "", *(digits(x) if x != int(x) else str(int(x)) for x in places))
            found.append(Table(f"linear_steppo_loss: {title}", header, rows))
    if results.curves:
        found.append(Plot("Time and memory against shares and V", "curves", draw_curves))
    return found


Column = tuple[str, Callable[[Line], str]]


def _sections(results: Results) -> list[Table]:
    """Return a table for each suite and case, with the columns that have something in them."""
    tables = []
    cases = dict.fromkeys((line.suite, line.case) for line in results.lines.values())
    for suite, case in sorted(cases, key=lambda pair: list(_TITLES).index(pair[0])):
        lines = results.of_case(suite, case)
        products = [line for line in lines if line.variant in {v.name for v in _PRODUCTS}]
        columns = _columns(results, lines[0], products)
        filled = [
            (header, cells)
            for header, text in columns
            if any(cells := [text(line) for line in lines])
        ]
        rows = list(zip(*(cells for _, cells in filled), strict=True))
        tables.append(Table(f"{_TITLES[suite]}: {case}", [header for header, _ in filled], rows))
    return tables


def _columns(results: Results, first: Line, products: list[Line]) -> list[Column]:
    def against(line: Line) -> str:
        return "" if line is first else number(results.ratio(line, first), "x")

    def percent(key: str) -> Callable[[Line], str]:
        return lambda line: number(_times(100, _of(line, key)), " %")

    def error(key: str) -> Callable[[Line], str]:
        return lambda line: "" if (found := _of(line, key)) is None else f"{found:.1e}"

    return [
        ("variant", lambda line: line.variant),
        ("median", _time),
        ("first is faster by", against),
        ("over bare products", lambda line: number(results.ratio(line, *products), "x")),
        ("GB/s", lambda line: number(line.over_turns("gbps"))),
        ("% of copy", percent("copy_fraction")),
        ("extra memory, of logits", percent("extra_of_logits")),
        ("resident, of logits", percent("resident_of_logits")),
        ("extra memory", _extra),
        ("resident", lambda line: number(_times(2**-20, _of(line, "resident_bytes")), " MiB")),
        ("error of log-probs", error("error_log_probs")),
        ("error of dZ", error("error_gradient")),
        ("error of dH", error("error_hidden")),
        ("error of dW", error("error_weight")),
    ]


def _choices(results: Results) -> str:
    """Return what the chunks of Liger's loss were chosen from, in a sentence."""
    line = results.get("linear_loss", HEAD, LIGER)
    choices = [] if line is None else line.info[0].get("choices", [])
    if not choices:
        return ""
    return (
        "Liger grpo takes the fastest of these rows a chunk, tried at V = 8192: "
        f"{', '.join(choices)}."
    )


def _time(line: Line) -> str:
    return time_text(line.median)


def _extra(line: Line) -> str:
    return number(_times(2**-20, _of(line, "extra_bytes")), " MiB")


def _of(line: Line | None, key: str) -> float | None:
    return None if line is None else line.over_turns(key)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
