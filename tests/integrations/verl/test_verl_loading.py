"""verl finds the package by itself, and a failure to load is loud."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The entry point is looked up where Python starts: a folder without old metadata of the package.
_REGISTERED = """
import sys
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
found = [name in POLICY_LOSS_REGISTRY for name in ("steppo", "capo")]
found += ["step_gae" in ADV_ESTIMATOR_REGISTRY, "steppo_sync" in TRAINER_REGISTRY]
print("registered", *found, file=sys.stderr)
"""
ALL, NONE = "registered True True True True", "registered False False False False"


def run(program: str, folder, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("first", ["import verl", "import steppo_kernels.integrations.verl"])
def test_it_is_registered_whatever_is_imported_first(first, tmp_path):
    done = run(first + _REGISTERED, tmp_path)
    assert (done.returncode, ALL in done.stderr) == (0, True), done.stderr


def test_it_is_registered_by_name_where_plugins_are_off(tmp_path):
    off = {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = run("import verl" + _REGISTERED, tmp_path, **off)
    assert NONE in done.stderr, done.stderr
    named = off | {"VERL_USE_EXTERNAL_MODULES": "steppo_kernels.integrations.verl"}
    done = run("import verl" + _REGISTERED, tmp_path, **named)
    assert ALL in done.stderr, done.stderr


def test_without_transfer_queue_there_are_losses_and_no_trainer(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind, hidden = u.find_spec, 'transfer_queue'\n"
        "u.find_spec = lambda name, *rest: None if name == hidden else find(name, *rest)\n"
    )
    program = _REGISTERED.replace(
        "from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY", "TRAINER_REGISTRY = {}"
    )
    done = run(program, tmp_path, PYTHONPATH=str(tmp_path))
    assert "registered True True" in done.stderr, done.stderr
    assert "is not registered" not in done.stderr


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("verl.workers.config", "the policy losses `steppo` and `capo` are not registered"),
        ("verl.trainer.ppo.v1", "the trainer `steppo_sync` is not registered"),
    ],
)
def test_a_failure_to_load_is_logged_with_its_traceback(module, says, tmp_path):
    """verl swallows what its plugins raise."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe()
        while name == {module!r} and (frame := frame.f_back):
            if "integrations/verl" in frame.f_code.co_filename:
                raise ImportError("broken on purpose")
sys.meta_path.insert(0, Broken())
"""
    )
    done = run("import verl; print(verl.__version__)", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    assert "ImportError: broken on purpose" in done.stderr
    assert "Traceback" in done.stderr


def test_a_missing_verl_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "verl":
            raise ModuleNotFoundError("No module named 'verl'", name="verl")
sys.meta_path.insert(0, Hidden())
"""
    )
    done = run("import steppo_kernels.integrations.verl", tmp_path, PYTHONPATH=str(tmp_path))
    assert "ModuleNotFoundError: verl: it is not installed" in done.stderr
    assert "pip install 'verl[verl-core]==" in done.stderr
