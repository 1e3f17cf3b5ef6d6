"""What calls at the sizes of the targets have to do, and the time that this takes at the least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..gpu.cases import SIZES
from ..gpu.on_head import linear_loss
from ..gpu.on_kept_sets import kept_sets
from ..gpu.on_logits import log_probs
from ..gpu.on_tokens import LAYOUT, MASK, PER_STEP, policy_loss, step_gae, token_gae
from ..gpu.problem import Case
from ..gpu.results import Results, Row, in_kernels, seconds
from ..gpu.variants import CUDA
from ..triton_account.assumptions import (
    BANDWIDTH,
    FLOPS,
    HIDDEN,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    ROWS,
    VOCABULARY,
)
from .runs import Run

# Assumed, not of the data sheet: from the first block's start to the last one's end of a launch
# that does nothing; a load that misses the caches; the last block's turn, which is a fence, an
# atomic, the loads of what others left and their sum.
LAUNCH, LOAD, LAST_BLOCK = 1.5e-6, 0.7e-6, 2e-6

# 64 rows of 8192 tokens, a quarter of which are actions, in steps of 48.
_TOKENS = 64 * 8192
_ACTIONS, _STEPS = _TOKENS // 4, _TOKENS // 4 // 48

# The sizes of the cases that are measured, which are those of the targets.
_SIZES = SIZES["full"]
_FORWARD, _MASKED, _BOTH = (
    policy_loss(_SIZES.policy[0], kind, backward=backward)
    for kind, backward in ((LAYOUT, False), (MASK, False), (LAYOUT, True))
)


class Work(NamedTuple):
    """A call.

    Attributes:
        target: seconds on the device, None where only the rate counts.
        launches: kernels that it runs.
        loads: that wait for one another, from the first to the last launch.
        num_bytes: read once or written once.
        operations: of matrix products.
        last_blocks: launches in which the last block adds up.
        case: what `make gpu-check` measures of it, None if it does not.
        read: the seconds of that which the estimate is of.
        less: a case that is part of `case` and not of this call.
    """

    name: str
    case: Case | None
    target: float | None
    launches: int
    loads: int
    num_bytes: float
    operations: float = 0.0
    last_blocks: int = 0
    read: Callable[[Row | None], float | None] = in_kernels
    less: Case | None = None

    def measured(self, results: Results) -> float | None:
        """Seconds of a run, None if it has none."""
        if self.case is None:
            return None
        found = [
            self.read(results.get(case.name, CUDA))
            for case in (self.case, self.less)
            if case is not None
        ]
        if None in found:
            return None
        return found[0] - sum(found[1:])  # type: ignore[operator, arg-type]

    @property
    def floor(self) -> float:
        """Seconds for bytes and operations at full rate."""
        return max(self.num_bytes / BANDWIDTH, self.operations / FLOPS)

    @property
    def estimate(self) -> float:
        """Seconds in practice: rates as others reach them, and what launches and loads take."""
        moved = self.num_bytes / (MEMORY_SHARE * BANDWIDTH)
        computed = self.operations / (PRODUCT_SHARE * FLOPS)
        waits = self.launches * LAUNCH + self.loads * LOAD + self.last_blocks * LAST_BLOCK
        return moved + computed + waits


def head(live: float) -> Work:
    """Return the one-pass loss at a share of rows with a gradient, its logits in fp32."""
    rows = ROWS * VOCABULARY
    moved = 4 * rows * (1 + 1) + live * (4 + 2) * rows
    products = 2 * ROWS * HIDDEN * VOCABULARY * (1 + 2 * live)
    target = {1.0: 50e-3, 0.3: 27e-3}[live]
    return Work(
        f"linear_steppo_loss, {ROWS} x {HIDDEN} x {VOCABULARY:,}, f = {live}",
        linear_loss(*_SIZES.head, live),
        target,
        12,
        12,
        moved,
        products,
        1,
        read=seconds,
    )


def kept(ids: int) -> tuple[Work, ...]:
    """Return the passes over the head where each token keeps so many ids, in bf16.

    Every pair of a token and an id moves a row of the weight or of the hidden states. No row is
    assumed to be in a cache: the ids are drawn from all with the same chance. A policy has
    favourites, whose rows are there.
    """
    pairs, row = ROWS * ids, 2 * HIDDEN
    # A row of each pair, its id or token, its logit or the gradient of it.
    gathered = pairs * (row + 4 + 4)
    of_tokens = ROWS * (row + 8 + 16)
    directions = 4 * ROWS * HIDDEN
    scaled = ROWS * (4 * HIDDEN + row + 4 + 8)
    # Logits are read, and written over with their gradients.
    softmax = 4 * pairs + 40 * ROWS
    # The gradient of the weight is zeroed before rows of ids are written.
    of_ids = VOCABULARY * (row + (1 - (1 - ids / VOCABULARY) ** ROWS) * (row + 24))
    sizes = f"{ROWS} tokens x {ids} ids, d = {HIDDEN}"
    forward = gathered + of_tokens + directions
    of_weight = gathered + 12 * pairs + of_ids
    frozen, trained = (1e-3, 2e-3) if ids == 20 else (None, None)
    measured = [kept_sets(_SIZES.kept[0], ids, trained=on) for on in (False, True)]
    # Where a token is, its set, its ids, the weight; of a part, its entries, a gradient, a token.
    return (
        Work(f"kept_logits, {sizes}", None, None, 1, 4, gathered + of_tokens),
        Work(f"kept_directions, {sizes}", None, None, 2, 5, forward),
        Work(f"kept_hidden_gradient, {sizes}", None, None, 1, 4, gathered + of_tokens),
        Work(f"kept_weight_gradient, {sizes}", None, None, 2, 4, of_weight),
        Work(
            f"log-probs and dH, {sizes}",
            measured[0],
            frozen,
            4,
            9,
            forward + softmax + scaled,
            read=seconds,
        ),
        Work(
            f"log-probs, dH and dW, {sizes}",
            measured[1],
            trained,
            7,
            15,
            forward + 3 * softmax + scaled + of_weight,
            read=seconds,
        ),
    )


WORKS = (
    Work(
        "steppo_loss with gradient, layout, [64, 8192]",
        _FORWARD,
        12e-6,
        1,
        3,
        # Index and two log-probs of an action, id and gradient of a token, numbers of a step.
        16 * _ACTIONS + 8 * _TOKENS + 32 * _STEPS,
        last_blocks=1,
    ),
    Work(
        "steppo_loss with gradient, mask, [64, 8192]",
        _MASKED,
        12e-6,
        1,
        3,
        # Mask and gradient of a token, two log-probs and an advantage of an action.
        5 * _TOKENS + 12 * _ACTIONS,
        last_blocks=1,
    ),
    Work("backward of either", _BOTH, None, 1, 2, 8 * _TOKENS, less=_FORWARD),
    Work(
        "step_gae, 64 rows of 42 steps, rewards and values of steps",
        step_gae(*_SIZES.rows, PER_STEP),
        8e-6,
        1,
        4,
        # Where a step lies, its reward, its value and two results.
        2688 * (8 + 4 + 4 + 8),
        last_blocks=1,
    ),
    Work(
        "step_gae, every token a step, [64, 8192]",
        token_gae(_SIZES.tokens),
        8e-6,
        2,
        # Where a row begins, its first step, and the token of that, and meanwhile the first of two
        # turns of 4,096 tokens; the second one; then whitening.
        3 + 1 + 2,
        # Id, reward, value, two results, and whitening.
        _TOKENS * (4 + 4 + 4 + 8 + 8),
        last_blocks=1,
    ),
    Work(
        f"token_log_probs, bf16, [{ROWS}, {VOCABULARY:,}]",
        log_probs(ROWS, VOCABULARY, backward=False),
        0.84e-3,
        1,
        2,
        2.0 * ROWS * VOCABULARY,
        read=seconds,
    ),
    Work(
        "the same and its backward in place",
        log_probs(ROWS, VOCABULARY, backward=True),
        2.5e-3,
        2,
        4,
        3 * 2.0 * ROWS * VOCABULARY,
        read=seconds,
    ),
    head(1.0),
    head(0.3),
    *kept(20),
    *kept(512),
)


def table(runs: Sequence[Run], others: Sequence[Run]) -> list[str]:
    """Return the lines of the table.

    Args:
        runs: what was measured; a call is read from the first one that has it.
        others: what other GPUs measured.
    """
    lines = [
        "| call | launches | loads that wait | MB | TFLOP | floor | estimate | measured | target |"
        " on paper | on the GPU | on another |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for work in WORKS:
        measured, run = _first(work, runs)
        other, other_run = _first(work, others)
        beside = "" if other is None or other_run is None else f"{_time(other)} ({other_run.gpu})"
        shown = "" if measured is None else _time(measured)
        lines.append(
            f"| {work.name} | {work.launches} | {work.loads} | {work.num_bytes / 1e6:.1f} | "
            f"{work.operations / 1e12:.1f} | {_time(work.floor)} | {_time(work.estimate)} | "
            f"{shown}{'' if run is None or run is runs[0] else f' ({run.when})'} | "
            f"{'' if work.target is None else _time(work.target)} | "
            f"{_verdict(work.estimate, work.target)} | {_verdict(measured, work.target)} | "
            f"{beside} |"
        )
    return lines


def _first(work: Work, runs: Sequence[Run]) -> tuple[float | None, Run | None]:
    """Return what was measured of a call, and the first run that has it."""
    found = ((work.measured(run.results), run) for run in runs)
    return next((one for one in found if one[0] is not None), (None, None))


def _verdict(value: float | None, target: float | None) -> str:
    if value is None or target is None:
        return ""
    return "met" if value <= target else "missed"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"
