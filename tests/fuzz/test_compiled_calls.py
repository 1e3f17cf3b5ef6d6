"""A call of every public function in compiled code gives what a plain call gives.

Torches that cannot trace the package call its functions as they are. There is one torch here, which
the package takes for an older one in one case: it decides by the version alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steppo_kernels
from fuzz.subjects import subjects

_TESTS = Path(__file__).parents[1]
_PACKAGE = Path(steppo_kernels.__file__).parents[1]
# They compute nothing that has gradients, and any torch traces them.
_ALWAYS_TRACED = {"support to", "reduction_weights"}


@pytest.mark.parametrize("version", [torch.__version__, "2.10.0"], ids=["this", "older"])
def test_compiled_calls_are_as_plain_ones(version: str) -> None:
    worker = [sys.executable, "-m", "fuzz.compile_worker", "cpu", version]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PACKAGE), str(_TESTS)])}
    done = subprocess.run(worker, env=environment, cwd=_TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    graphs = json.loads(done.stdout)
    assert {name: found for name, found in graphs.items() if isinstance(found, str)} == {}
    assert graphs.keys() == {subject.name for subject in subjects()}
    in_graphs = {name for name, count in graphs.items() if count}
    if torch.torch_version.TorchVersion(version) < "2.11":
        assert in_graphs <= _ALWAYS_TRACED
    else:
        assert in_graphs > {"steppo_loss", "step_gae", "token_log_probs", *_ALWAYS_TRACED}
