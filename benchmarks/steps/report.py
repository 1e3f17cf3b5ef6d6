"""What is promised of the functions on log-probs, and what a page shows of a run."""

from __future__ import annotations

import math

from ..report.page import Block, Plot, Table, digits, number, time_text
from ..report.results import Results
from ..report.targets import Targets
from ..variants import Variant
from .plots import draw_growth, draw_speed
from .variants import COMPILED, EAGER, FUSED, GSPO, LAYOUT, MASK, TABLES, VERL_LOOP

ROWS, TURNS = "rows 512x512", "turns 64x8192"
_NAMES = {
    "policy_loss": "steppo_loss, forward + backward",
    "token_gae": "step_gae per token",
    "step_gae": "step_gae per step",
    "segment": "StepLayout",
    "value_loss": "step_value_loss, forward + backward",
    "broadcast": "broadcast_to_tokens, forward + backward",
}
# The variant that the others of a suite are divided by.
_OURS = {"policy_loss": LAYOUT}
_COLUMNS = (
    "variant",
    "threads",
    "median",
    "ns/token",
    "first is faster by",
    "GB/s",
    "% of copy",
    "% same size",
    "fp32 a token",
)
NOTE = (
    "Medians over interleaved turns. GB/s counts the bytes that the task must move at least, not "
    "what a variant moves. % of copy compares with `torch.Tensor.copy_` of 256 MB in the same "
    "process (read + write), % same size with a copy that moves as many bytes as the case: inputs "
    "that fit the last-level cache can move faster than memory does. fp32 a token is the peak of "
    "torch's allocations above the inputs, the returned gradient included, in fp32 values."
)


def promise(targets: Targets) -> None:
    """Make every promise."""
    results = targets.results

    def faster(
        suite: str, case: str, peer: Variant, factor: float, ours: Variant, label: str
    ) -> None:
        of_peer, of_ours = results.get(suite, case, peer), results.get(suite, case, ours)
        targets.faster(label, peer, of_peer, factor, of_ours)

    for case in (ROWS, TURNS):
        label = f"steppo_loss, {case}"
        faster("policy_loss", case, EAGER, 15, LAYOUT, label)
        faster("policy_loss", case, COMPILED, 4, LAYOUT, label)
        if case == ROWS and results.peers["verl"]:
            faster("policy_loss", case, GSPO, 10, LAYOUT, label)
        for variant in (LAYOUT, MASK):
            line = results.get("policy_loss", case, variant)
            # The mask form has to touch less: its share stands in the table.
            if variant == LAYOUT:
                targets.add(
                    f"{label}: share of copy bandwidth",
                    ">= 40 %",
                    None if line is None else 100 * (line.over_turns("copy_fraction") or 0.0),
                    lambda value: value >= 40,
                    " %",
                )
            memory = None if line is None else line.over_turns("extra_bytes_per_token")
            targets.add(
                f"{label}, {variant}: peak extra memory",
                # What is kept per step comes on top: less than a hundredth of a value.
                "<= 2 fp32 a token",
                None if memory is None else memory / 4,
                lambda value: value <= 2.01,
                " fp32 a token",
            )
    faster("token_gae", "tokens 64x8192", VERL_LOOP, 200, FUSED, "token GAE, 64x8192")
    single = results.get("token_gae", "tokens 64x8192", FUSED, 1)
    targets.add(
        "token GAE, 64x8192, one thread: cost of a token",
        "<= 3 ns",
        None if single is None else single.over_turns("ns_per_token"),
        lambda value: value <= 3,
        " ns",
    )
    faster("step_gae", "rows 2688x512", TABLES, 5, FUSED, "step GAE, 2688x512")
    for suite, variant in (
        ("policy_loss", LAYOUT),
        ("policy_loss", MASK),
        ("token_gae", FUSED),
        ("segment", FUSED),
    ):
        targets.add(
            f"{_NAMES[suite].split(',')[0]}, {variant}: exponent of the growth with tokens",
            "<= 1.1",
            results.slope("tokens", suite, variant),
            lambda value: value <= 1.1,
            "",
        )


def blocks(results: Results) -> list[Block]:
    """Return what stands on the page."""
    found: list[Block] = [Plot("Times of the variants", "speed", draw_speed), *_sections(results)]
    if results.curves:
        places = results.places("tokens")
        found += [
            Table(
                "Growth: ns/token by number of tokens",
                ("curve", "exponent", *(f"{size:.0e}" for size in places)),
                _growth_rows(results),
            ),
            _resident(results),
            Plot("Cost against tokens", "growth", draw_growth),
        ]
    return found


def _sections(results: Results) -> list[Table]:
    """Return a table for each suite and case."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    for line in results.lines.values():
        ours = results.get(line.suite, line.case, _OURS.get(line.suite, FUSED), line.threads)
        ratio = None if line is ours else results.ratio(line, ours)
        fraction, gbps = line.over_turns("copy_fraction"), line.over_turns("gbps")
        same_size = line.over_turns("copy_gbps_same_size")
        memory = line.over_turns("extra_bytes_per_token")
        tables.setdefault(f"{_NAMES[line.suite]}: {line.case}", []).append(
            (
                line.variant,
                str(line.threads),
                time_text(line.median),
                number(line.over_turns("ns_per_token")),
                number(ratio, "x"),
                number(gbps),
                "" if fraction is None else f"{100 * fraction:.0f} %",
                "" if not (gbps and same_size) else f"{100 * gbps / same_size:.0f} %",
                "" if memory is None else f"{memory / 4:.2f}",
            )
        )
    return [Table(title, _COLUMNS, rows) for title, rows in tables.items()]


def _growth_rows(results: Results) -> list[tuple[str, ...]]:
    """Return for each curve its exponent and its ns/token by size."""
    rows = []
    for (name, suite, variant), curve in results.curves.items():
        slope = results.slope(name, suite, Variant(variant))
        rows.append(
            (
                f"{_NAMES[suite].split(',')[0]}, {variant}",
                "" if slope is None else f"{slope:.2f}",
                *(
                    digits(line.over_turns("ns_per_token") or math.nan)
                    for _, line in sorted(curve.items())
                ),
            )
        )
    return rows


def _resident(results: Results) -> str:
    """Return what the largest batch adds to resident memory, in a sentence."""
    parts = [
        f"{variant} {line.over_turns('resident_bytes_per_token'):.1f}"
        for (_, suite, variant), curve in results.curves.items()
        if suite == "policy_loss"
        for line in [curve[max(curve)]]
        if line.over_turns("resident_bytes_per_token") is not None
    ]
    if not parts:
        return ""
    return (
        "Growth of resident memory over one forward + backward at the largest size, bytes a token "
        f"(8 are 2 fp32 values): {'; '.join(parts)}."
    )
