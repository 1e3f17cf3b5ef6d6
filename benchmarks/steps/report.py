"""What is promised of the functions on log-probs, and what a page shows of a run."""

from __future__ import annotations

import math

from ..modes import COLD, MODES, WARM
from ..report.page import Block, Plot, Table, digits, number, time_text
from ..report.results import Results
from ..report.targets import Targets
from ..variants import Variant
from .floors import STATED
from .plots import draw_growth, draw_speed
from .variants import (
    BARE,
    COMPILED,
    EAGER,
    FLOOR,
    FUSED,
    GSPO,
    LAYOUT,
    MASK,
    TABLES,
    VANILLA,
    VERL_LOOP,
)

ROWS, TURNS = "rows 512x512", "turns 64x8192"
_OVERHEAD = "overhead"
_CALLS = [f"{function}, rows 8x64" for function in ("steppo_loss", "step_gae", "step_value_loss")]
_NAMES = {
    "policy_loss": "steppo_loss, forward + backward",
    "token_loss": "steppo_loss with a ratio a token, forward + backward",
    "token_advantages": "steppo_loss with advantages that vary in a step, forward + backward",
    "token_gae": "step_gae per token",
    "step_gae": "step_gae per step",
    "segment": "StepLayout",
    "value_loss": "step_value_loss, forward + backward",
    "broadcast": "broadcast_to_tokens, forward + backward",
    "step_log_ratios": "step_log_ratios, forward + backward",
    "rollout_weights": "rollout_weights",
}
# The variant that the others of a suite are divided by.
_OURS = dict.fromkeys(("policy_loss", "token_loss", "token_advantages"), LAYOUT)
_COLUMNS = (
    "variant",
    "caches",
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
    "Medians over interleaved turns. Cold: 64 MB are read and written before each call, untimed "
    "and the same for every variant, so that inputs, code and objects have left the caches, as "
    "they have when a model has run in between. Warm: the call is repeated. GB/s counts the bytes "
    "that the task must move at least, not what a variant moves. % of copy compares with "
    "`torch.Tensor.copy_` of 256 MB in the same process (read + write), % same size with a copy "
    "that moves as many bytes as the case, cold or warm as the case is: inputs that fit the "
    "last-level cache can move faster than memory does. fp32 a token is the peak of torch's "
    "allocations above the inputs, the returned gradient included, in fp32 values."
)


def promise(targets: Targets) -> None:
    """Make every promise."""
    _promise_cold(targets)
    _promise_warm(targets)
    for suite, variant in (
        ("policy_loss", LAYOUT),
        ("policy_loss", MASK),
        ("token_gae", FUSED),
        ("segment", FUSED),
    ):
        targets.add(
            f"warm, {_NAMES[suite].split(',')[0]}, {variant}: exponent of the growth with tokens",
            "<= 1.1",
            targets.results.slope("tokens", suite, variant, WARM),
            lambda value: value <= 1.1,
            "",
        )


def _promise_cold(targets: Targets) -> None:
    """Promise what holds in training, where a model has run in between."""
    results = targets.results
    for variant in (LAYOUT, MASK):
        ours, eager, floor = (
            results.get("policy_loss", TURNS, one, mode=COLD) for one in (variant, EAGER, FLOOR)
        )
        label = f"cold, steppo_loss, {TURNS}, {variant}"
        targets.at_most(label, FLOOR, floor, 1.5, ours)
        targets.faster(label, EAGER, eager, 6, ours)
    for suite, label in (
        ("step_gae", "step_gae"),
        ("value_loss", "step_value_loss"),
        ("segment", "StepLayout.from_mask"),
    ):
        ours, floor = (results.get(suite, TURNS, one, mode=COLD) for one in (FUSED, FLOOR))
        targets.at_most(f"cold, {label}, {TURNS}", FLOOR, floor, 2, ours)


def _promise_warm(targets: Targets) -> None:
    """Promise what holds where a call is repeated, and what memory it takes."""
    results = targets.results

    def faster(
        suite: str, case: str, peer: Variant, factor: float, ours: Variant, label: str
    ) -> None:
        of_peer, of_ours = (results.get(suite, case, one, mode=WARM) for one in (peer, ours))
        targets.faster(f"warm, {label}", peer, of_peer, factor, of_ours)

    for case in (ROWS, TURNS):
        label = f"steppo_loss, {case}"
        faster("policy_loss", case, EAGER, 15, LAYOUT, label)
        faster("policy_loss", case, COMPILED, 4, LAYOUT, label)
        if case == ROWS and results.peers["verl"]:
            faster("policy_loss", case, GSPO, 10, LAYOUT, label)
        if results.peers["verl"]:
            for variant in (LAYOUT, MASK):
                token = f"steppo_loss, ratio a token, {case}, {variant}"
                faster("token_loss", case, VANILLA, 10, variant, token)
        for variant in (LAYOUT, MASK):
            line = results.get("policy_loss", case, variant, mode=WARM)
            # The mask form has to touch less: its share stands in the table.
            if variant == LAYOUT:
                targets.add(
                    f"warm, {label}: share of copy bandwidth",
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
    for call in _CALLS:
        ours, bare = (results.get(_OVERHEAD, call, one, mode=WARM) for one in (FUSED, BARE))
        beyond = results.beyond(ours, bare)
        targets.add(
            f"warm, {call}: a forward call beyond a bare one",
            "<= 12 us",
            None if beyond is None else 1e6 * beyond,
            lambda value: value <= 12,
            " us",
        )
    faster("token_gae", "tokens 64x8192", VERL_LOOP, 200, FUSED, "token GAE, 64x8192")
    single = results.get("token_gae", "tokens 64x8192", FUSED, 1, WARM)
    targets.add(
        "warm, token GAE, 64x8192, one thread: cost of a token",
        "<= 3 ns",
        None if single is None else single.over_turns("ns_per_token"),
        lambda value: value <= 3,
        " ns",
    )
    faster("step_gae", "rows 2688x512", TABLES, 5, FUSED, "step GAE, 2688x512")


def blocks(results: Results) -> list[Block]:
    """Return what stands on the page."""
    found: list[Block] = [
        Plot("Times of the variants", "speed", draw_speed),
        _overhead(results),
        *_sections(results),
    ]
    if results.curves:
        places = results.places("tokens")
        found += [
            Table(
                "Growth: ns/token by number of tokens",
                ("curve", "caches", "exponent", *(f"{size:.0e}" for size in places)),
                _growth_rows(results),
            ),
            _resident(results),
            Plot("Cost against tokens", "growth", draw_growth),
        ]
    return found


def _overhead(results: Results) -> Table:
    """Return what a call on a small batch costs beyond one that only makes the outputs."""
    rows = []
    for line in results.lines.values():
        if line.suite != _OVERHEAD or line.variant == BARE.name:
            continue
        bare = results.get(line.suite, line.case, BARE, line.threads, line.mode)
        beyond = results.beyond(line, bare)
        rows.append(
            (
                line.case,
                line.mode,
                time_text(line.median),
                "" if bare is None else time_text(bare.median),
                number(results.ratio(line, bare), "x"),
                "" if beyond is None else time_text(beyond),
            )
        )
    return Table(
        "The cost of a call: forward with a gradient wanted, beside a bare `autograd.Function` "
        "with as many outputs (`step_gae`: beside the allocation of its two)",
        ("function", "caches", "median", "bare", "over bare", "beyond bare"),
        rows,
    )


def _sections(results: Results) -> list[Block]:
    """Return for each suite and case a table, and the floor where there is one."""
    tables: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    floors = set()
    for line in results.lines.values():
        if line.suite == _OVERHEAD:
            continue
        variant = _OURS.get(line.suite, FUSED)
        ours = results.get(line.suite, line.case, variant, line.threads, line.mode)
        ratio = None if line is ours else results.ratio(line, ours)
        fraction, gbps = line.over_turns("copy_fraction"), line.over_turns("gbps")
        same_size = line.over_turns("copy_gbps_same_size")
        memory = line.over_turns("extra_bytes_per_token")
        if line.variant == FLOOR.name:
            floors.add((line.suite, line.case))
        tables.setdefault((line.suite, line.case), []).append(
            (
                line.variant,
                line.mode,
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
    found: list[Block] = []
    for (suite, case), rows in tables.items():
        found.append(Table(f"{_NAMES[suite]}: {case}", _COLUMNS, rows))
        if (suite, case) in floors:
            found.append(f"Floor: a `torch.add(out=)` that moves as much as {STATED[suite]}.")
    return found


def _growth_rows(results: Results) -> list[tuple[str, ...]]:
    """Return for each curve its exponent and its ns/token by size."""
    rows = []
    for (name, suite, variant, mode), curve in sorted(
        results.curves.items(), key=lambda one: MODES.index(one[0][3])
    ):
        slope = results.slope(name, suite, Variant(variant), mode)
        rows.append(
            (
                f"{_NAMES[suite].split(',')[0]}, {variant}",
                mode,
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
        for (_, suite, variant, _), curve in results.curves.items()
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
