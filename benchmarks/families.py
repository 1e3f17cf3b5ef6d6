"""The two families of suites: their files, and the folder of what these share.

``python -m benchmarks.families NAME`` prints the files of a family, for pytest.
"""

from __future__ import annotations

import sys
from pathlib import Path

_SUITES = {
    "steps": (
        "layout/bench_segment.py",
        "layout/bench_broadcast.py",
        "losses/bench_overhead.py",
        "losses/bench_gae.py",
        "losses/bench_policy_loss.py",
        "losses/bench_value_loss.py",
        "losses/bench_step_log_ratios.py",
        "losses/bench_rollout_weights.py",
    ),
    "vocabulary": (
        "log_probs/bench_token_log_probs.py",
        "log_probs/bench_linear_log_probs.py",
        "losses/bench_logits_loss.py",
        "losses/bench_linear_loss.py",
        "losses/bench_linear_curves.py",
    ),
}
FAMILIES = tuple(_SUITES)


def files(family: str) -> list[str]:
    """Return the paths of a family's suites."""
    return [str(Path(__file__).parent / name) for name in _SUITES[family]]


if __name__ == "__main__":
    print(*files(sys.argv[1]))
