"""The lock is that of pyproject.toml, exact, and without CUDA: checked without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
# What the environments of the Makefile install.
_LISTS = {
    "test": (
        *("--extra", "demo", "--extra", "example", "--extra", "triton"),
        *("--group", "test", "--group", "lint"),
    ),
    "bench": ("--group", "bench"),
    "trl": ("--extra", "example", "--group", "trl"),
    "verl": ("--group", "verl"),
    "skyrl": ("--group", "skyrl"),
    "weights": ("--only-group", "weights"),
}


@pytest.fixture
def uv(tmp_path):
    """Runs the uv of the environment, with an empty cache, and returns what it prints."""
    program = Path(sys.executable).parent / "uv"
    if not (program.exists() and (_ROOT / "uv.lock").exists()):
        pytest.skip("uv is not in this environment, or the package is installed without its lock")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments, "--offline", "--cache-dir", tmp_path],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_lock_is_that_of_pyproject(uv):
    uv("lock", "--check")


@pytest.mark.parametrize("name", _LISTS)
def test_a_list_has_exact_versions_and_no_cuda(uv, name):
    exported = uv("export", "--locked", "--no-emit-project", "--no-header", *_LISTS[name])
    listed = [line for line in exported.splitlines() if re.match(r"[a-z0-9]", line)]
    assert listed
    for line in listed:
        assert re.match(r"[\w.-]+==[\w.!+-]+( ;|\s*\\?$)", line), line
        assert not line.startswith(("nvidia-", "cuda-")), line
    made = (_ROOT / "Makefile").read_text()
    # One rule serves several groups, and one list several rules.
    usual = re.search(r"^USUAL := (.+)$", made, re.MULTILINE)
    assert usual is not None
    expanded = made.replace("$(@F)", name).replace("$*", name).replace("$(USUAL)", usual[1])
    assert " ".join(_LISTS[name]) in expanded
    if name != "weights":
        torch = re.search(r"^TORCH \?= (torch==\S+)$", made, re.MULTILINE)
        assert torch is not None
        assert any(line.startswith(torch[1]) for line in listed)
