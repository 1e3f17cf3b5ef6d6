"""What is promised of backend `cuda` on an H100, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Callable

from ..report.targets import Target
from .cases import SIZES
from .on_head import linear_loss
from .on_kept_sets import kept_sets
from .on_logits import log_probs, logits_loss
from .on_tokens import LAYOUT, MASK, PER_STEP, policy_loss, step_gae, token_gae
from .problem import Case
from .results import Results, Row, beyond, in_kernels, ratio, seconds, wall
from .variants import BARE, CUDA, LIGER

GPU = "H100"

Read = Callable[[Row | None], float | None]


def is_for(device: str) -> bool:
    """Whether the targets are for a device of this name."""
    return GPU in device


def targets(results: Results) -> list[Target]:
    """Return every promise with what was measured."""
    sizes, found = SIZES["full"], []

    def get(case: Case) -> Row | None:
        return results.get(case.name, CUDA)

    def at_most(case: Case, read: Read, limit: float, unit: str, what: str) -> None:
        scale = {"us": 1e6, "ms": 1e3, "": 1.0}[unit]
        value = read(get(case))
        found.append(
            _at_most(f"{case.name}: {what}", None if value is None else scale * value, limit, unit)
        )

    small, large = sizes.policy
    for kind in (LAYOUT, MASK):
        forward, both = (policy_loss(small, kind, backward=on) for on in (False, True))
        at_most(forward, in_kernels, 12, "us", "in kernels")
        at_most(forward, _launches, 1, "", "launches")
        launches = [_launches(get(case)) for case in (forward, both)]
        backward = None if None in launches else launches[1] - launches[0]  # type: ignore[operator]
        found.append(_at_most(f"{both.name}: launches of backward", backward, 1, ""))
        at_most(policy_loss(large, kind, backward=True), wall, 60, "us", "wall")
        # Of the smaller batch: the host does not wait for its kernel.
        more = beyond(get(forward), results.get(forward.name, BARE))
        what = f"{forward.name}: wall beyond a bare autograd.Function"
        found.append(_at_most(what, None if more is None else 1e6 * more, 15, "us"))
    at_most(step_gae(*sizes.rows, PER_STEP), in_kernels, 8, "us", "in kernels")
    at_most(token_gae(sizes.tokens), in_kernels, 8, "us", "in kernels")
    rows, vocabulary = sizes.logits[0]
    at_most(log_probs(rows, vocabulary, backward=False), seconds, 0.84, "ms", "device")
    at_most(log_probs(rows, vocabulary, backward=True), seconds, 2.5, "ms", "device")
    loss = logits_loss(sizes.loss)
    found.append(
        _at_least(f"{loss.name}: {LIGER} over it", ratio(results.get(loss.name, LIGER), get(loss)))
    )
    for live, limit in ((1.0, 50.0), (0.3, 27.0)):
        at_most(linear_loss(*sizes.head, live), seconds, limit, "ms", "device")
    of_sets, (count, *_) = sizes.kept
    for trained, limit in ((False, 1.0), (True, 2.0)):
        at_most(kept_sets(of_sets, count, trained=trained), seconds, limit, "ms", "device")
    return found


def _launches(row: Row | None) -> float | None:
    return None if row is None else row["launches"]


def _at_most(name: str, value: float | None, limit: float, unit: str) -> Target:
    met = None if value is None else value <= limit
    return Target(name, f"<= {limit:g}{unit and ' '}{unit}", value, met, f" {unit}".rstrip())


def _at_least(name: str, value: float | None, limit: float = 1.3) -> Target:
    met = None if value is None else value >= limit
    return Target(name, f">= {limit:g}x", value, met, "x")
