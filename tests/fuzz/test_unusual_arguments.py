"""Every argument of every public function replaced by what nobody expects, in other processes.

What comes back is a named error or the right result. `make sanitize` runs the same cases under
AddressSanitizer, where a read beside a tensor's memory is a crash too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import steppo_kernels
from fuzz.subjects import covered, replaced, subjects

_TESTS = Path(__file__).parents[1]
_PACKAGE = Path(steppo_kernels.__file__).parents[1]

# How the subjects are spread over processes, by how their names begin.
_GROUPS = {
    "layouts": ("from_", "keep", "per_t", "to", "reduction_weights", "StepPOConfig", "check_"),
    "rows and sets": ("token_log_probs", "steppo_loss_from_logits", "linear", "support "),
    "steps": ("broadcast", "step_", "StepValue", "steppo_loss", "StepPOLoss", "rollout", "group"),
}


def group_of(name: str) -> str:
    """Return the group whose beginning of the name is the longest."""
    fitting = {
        len(start): group
        for group, starts in _GROUPS.items()
        for start in starts
        if name.startswith(start)
    }
    return fitting[max(fitting)]


@pytest.mark.parametrize("group", _GROUPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_unusual_arguments_are_refused_by_name_or_read_right(backend: str, group: str) -> None:
    names = [subject.name for subject, _ in replaced() if group_of(subject.name) == group]
    worker = [sys.executable, "-m", "fuzz.crash_worker", backend, *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PACKAGE), str(_TESTS)])}
    done = subprocess.run(worker, env=environment, cwd=_TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *wrong, counts = [json.loads(line) for line in done.stdout.splitlines()]
    report = "\n".join(" | ".join(case) for case in wrong)
    assert not wrong, f"{len(wrong)} of {counts['tried']} cases:\n{report}\n{done.stderr[-3000:]}"
    # UndefinedBehaviorSanitizer may report and go on.
    assert "runtime error:" not in done.stderr, done.stderr[-3000:]
    # Fewer would mean that the unusual forms were not made.
    assert counts["tried"] > 1000


def test_every_public_function_and_parameter_is_replaced() -> None:
    public, called = covered()
    assert public <= called
    tried = {(s.function.__qualname__, name) for s, names in replaced() for name in names}
    for subject in subjects():
        for parameter in subject.parameters:
            known = (subject.function.__qualname__, parameter) in tried
            assert known or parameter == "backend"
