"""The C++ kernels for each instruction set, not only for the one that this machine prefers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steppo_kernels.backends import choice

_ROOT = Path(__file__).parents[2]
_CALL = (
    "import sys, torch; from steppo_kernels import StepLayout; "
    "print(StepLayout.from_mask(torch.ones(1, 2), backend=sys.argv[1]).num_steps)"
)


def python(isa: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python with STEPPO_ISA set to `isa`."""
    if why := choice.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    environment = {
        **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
        "STEPPO_ISA": isa,
    }
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_set(isa):
    found = python(isa, "-c", "from steppo_kernels import _C_cpu; _C_cpu.isa()")
    if "ValueError: STEPPO_ISA" in found.stderr:
        pytest.skip(found.stderr.splitlines()[-1])
    assert found.returncode == 0, found.stderr
    # Tests that do not depend on the kernels have no mark and are not run again.
    tests = [path for path in _ROOT.glob("tests/*/test_*.py") if path != Path(__file__)]
    marked = [str(path) for path in sorted(tests) if "pytest.mark.isa" in path.read_text()]
    options = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")
    selected = ("-m", "isa", "-k", "not triton and not reference")
    done = python(isa, "-m", "pytest", *options, *selected, *marked)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_each_instruction_set_is_taken_or_refused():
    """By name, and an empty name is none."""
    program = "from steppo_kernels import _C_cpu as m; print(m.isa(), m.isas(), sep='\\n')"
    best, listed = python("", "-c", program).stdout.splitlines()
    compiled = listed.split(", ")
    runs = compiled[: compiled.index(best) + 1]
    for isa in compiled:
        found = python(isa, "-c", program)
        if isa in runs:
            assert found.stdout.splitlines() == [isa, listed]
        else:
            assert f"STEPPO_ISA: got '{isa}'" in found.stderr
            assert found.stderr.rstrip().endswith(": " + ", ".join(runs))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_unknown_instruction_set(backend):
    """An error, and not a C++ backend that is said to be missing."""
    found = python("abacus", "-c", _CALL, backend)
    assert found.returncode != 0
    assert "ValueError: STEPPO_ISA: got 'abacus', expected what this CPU runs: baseline" in (
        found.stderr
    )
    assert "not built" not in found.stderr


def test_unknown_instruction_set_leaves_the_reference():
    assert python("abacus", "-c", _CALL, "reference").stdout.strip() == "1"


def test_unknown_instruction_set_on_the_command_line():
    found = python("abacus", "-m", "steppo_kernels", "info")
    assert found.returncode == 2
    assert found.stderr.startswith("STEPPO_ISA: got 'abacus', expected")
    assert found.stdout == ""


# Compilers put these into every object: a pointer to data, and a call of std::terminate.
_HARMLESS = re.compile(r"DW\.ref\.|__clang_call_terminate$")


def shared_names(objects: Path) -> list[str]:
    """Return what the linker would take from an object for other objects as well.

    That is every symbol of an instruction set's objects that is not local and has no name of that
    instruction set's namespace: say, an inline function of the standard library.
    """
    found = []
    for path in sorted(objects.glob("*.avx*.o")):
        isa = path.suffixes[-2][1:]
        own = f"6steppo3cpu{len(isa)}{isa}"
        listing = subprocess.run(
            ["nm", "-P", "--defined-only", str(path)], capture_output=True, text=True, check=True
        )
        for line in listing.stdout.splitlines():
            name, kind = line.split()[:2]
            is_shared = kind.isupper() or kind in "uvw"
            if is_shared and own not in name and not _HARMLESS.match(name):
                found.append(f"{path.name}: {name}")
    return found


def test_code_of_an_instruction_set_is_not_shared():
    """The linker keeps one copy of a name: it could be one that other CPUs cannot run."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    folders = {path.parent for path in (_ROOT / "build").glob("temp*/**/*.avx*.o")}
    if not folders:
        pytest.skip("no objects in build/: the package was not built from this folder on x86")
    assert [name for folder in folders for name in shared_names(folder)] == []
