"""What calls at the sizes of the targets have to do, and the time that this takes at the least."""

from __future__ import annotations

from typing import NamedTuple

from ..triton_account.assumptions import (
    BANDWIDTH,
    FLOPS,
    HIDDEN,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    ROWS,
    VOCABULARY,
)

# Assumed, not of the data sheet: from the first block's start to the last one's end of a launch
# that does nothing; a load that misses the caches; the last block's turn, which is a fence, an
# atomic, the loads of what others left and their sum.
LAUNCH, LOAD, LAST_BLOCK = 1.5e-6, 0.7e-6, 2e-6

# 64 rows of 8192 tokens, a quarter of which are actions, in steps of 48.
_TOKENS = 64 * 8192
_ACTIONS, _STEPS = _TOKENS // 4, _TOKENS // 4 // 48


class Work(NamedTuple):
    """A call.

    Attributes:
        target: seconds on the device, None where only the rate counts.
        launches: kernels that it runs.
        loads: that wait for one another, from the first to the last launch.
        num_bytes: read once or written once.
        operations: of matrix products.
        last_blocks: launches in which the last block adds up.
    """

    name: str
    target: float | None
    launches: int
    loads: int
    num_bytes: float
    operations: float = 0.0
    last_blocks: int = 0

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
        target,
        12,
        12,
        moved,
        products,
        1,
    )


WORKS = (
    Work(
        "steppo_loss with gradient, layout, [64, 8192]",
        12e-6,
        1,
        3,
        # Index and two log-probs of an action, id and gradient of a token, numbers of a step.
        16 * _ACTIONS + 8 * _TOKENS + 32 * _STEPS,
        last_blocks=1,
    ),
    Work(
        "steppo_loss with gradient, mask, [64, 8192]",
        12e-6,
        1,
        3,
        # Mask and gradient of a token, two log-probs and an advantage of an action.
        5 * _TOKENS + 12 * _ACTIONS,
        last_blocks=1,
    ),
    Work("its backward", None, 1, 2, 8 * _TOKENS),
    Work(
        "step_gae, 64 rows of 42 steps, rewards and values of steps",
        8e-6,
        1,
        4,
        # Where a step lies, its reward, its value and two results.
        2688 * (8 + 4 + 4 + 8),
        last_blocks=1,
    ),
    Work(
        "step_gae, every token a step, [64, 8192]",
        8e-6,
        4,
        # Four turns of three loads each for a block's 2,048 steps, before them a row's rewards.
        3 + 4 * 3 + 2,
        # Zeros and sums of the rewards, where each step lies, its value, results, and whitening.
        _TOKENS * (4 + 4 + 8 + 8 + 8 + 4 + 4 + 4 + 8 + 8),
        last_blocks=1,
    ),
    Work(
        f"token_log_probs, bf16, [{ROWS}, {VOCABULARY:,}]",
        0.84e-3,
        1,
        2,
        2.0 * ROWS * VOCABULARY,
    ),
    Work(
        "the same and its backward in place",
        2.5e-3,
        2,
        4,
        3 * 2.0 * ROWS * VOCABULARY,
    ),
    head(1.0),
    head(0.3),
)


def table() -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| call | launches | loads that wait | MB | TFLOP | floor | estimate | target | on paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for work in WORKS:
        verdict = "" if work.target is None else "met" if work.estimate <= work.target else "missed"
        lines.append(
            f"| {work.name} | {work.launches} | {work.loads} | {work.num_bytes / 1e6:.1f} | "
            f"{work.operations / 1e12:.1f} | {_time(work.floor)} | {_time(work.estimate)} | "
            f"{'' if work.target is None else _time(work.target)} | {verdict} |"
        )
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"
