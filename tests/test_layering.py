"""Which layer may know which: csrc knows nothing of Python or torch, python/ holds only glue."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steppo_kernels

_ROOT = Path(__file__).parent.parent
_PACKAGE = Path(steppo_kernels.__file__).parent
_CPP = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}


def sources(folder: str) -> list[Path]:
    found = [path for path in (_ROOT / folder).rglob("*") if path.suffix in _CPP]
    if not (_ROOT / folder).is_dir():
        pytest.skip(f"no {folder}/: the package is installed without its sources")
    assert found, f"no C++ source in {folder}/"
    return found


def code(path: Path) -> str:
    """The text without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Top-level modules that a Python file imports, relative ones as the package's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("steppo_kernels" if node.level else str(node.module).split(".")[0])
    return found


def test_csrc_knows_neither_torch_nor_python():
    foreign = re.compile(r"^(torch|ATen|c10|pybind11|nanobind|Python\.h|pyconfig\.h)")
    for path in sources("csrc"):
        bad = [name for name in includes(path) if foreign.match(name)]
        assert not bad, f"{path.name} includes {bad}"
        assert not re.search(r"\b(at|c10|torch|py)::", code(path)), path.name


def test_python_folder_holds_only_bindings():
    for path in sources("python"):
        text = code(path)
        for pattern, what in (
            (r"<<<|>>>|__global__|__device__", "CUDA"),
            (r"\b(for|while|do|switch|goto)\b|\bif\b(?! constexpr)", "a loop or a branch"),
        ):
            found = re.search(pattern, text)
            assert found is None, f"{path.name} holds {what}: {found.group()}"
        allowed = re.compile(r"^(steppo/.*|pybind11/.*|c?[a-z_]+)$")
        outside = [
            name
            for name in includes(path)
            if not allowed.match(name) and not (path.parent / name).exists()
        ]
        assert not outside, f"{path.name} includes {outside}"


def test_the_reference_imports_only_torch():
    for path in (_PACKAGE / "reference").glob("*.py"):
        foreign = imports(path) - {"torch", "steppo_kernels", "__future__", "math", "typing"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_kernels_do_not_import_one_another():
    for backend, others in {
        "cpu": {"reference", "triton", "cuda"},
        "triton": {"reference", "cpu", "cuda"},
        "reference": {"cpu", "triton", "cuda"},
    }.items():
        for path in (_PACKAGE / backend).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 2:
                    first = str(node.module or "").split(".")[0]
                    names = {first} | {alias.name for alias in node.names}
                    assert not names & others, f"{backend}/{path.name} imports {names & others}"


def test_one_stem_an_operation_in_every_layer():
    stems = {path.stem for path in (_PACKAGE / "reference").glob("[!_]*.py")}
    assert {"gae", "policy_loss", "value_loss", "segment", "broadcast"} <= stems
    for folder in ("cpu", "triton"):
        present = {path.stem for path in (_PACKAGE / folder).glob("*.py")}
        assert stems <= present, f"{folder}/ lacks {sorted(stems - present)}"
    assert stems <= {path.stem.removeprefix("test_") for path in Path(__file__).parent.iterdir()}


def test_import_is_light():
    """`import steppo_kernels` imports no optional dependency and initialises no GPU."""
    program = (
        "import sys, torch; before = set(sys.modules); import steppo_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new & {'triton', 'transformers', 'typer', 'trl', 'verl', 'numpy'})); "
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=_ROOT
    )
    assert done.stdout.split("\n")[:2] == ["", "False"]
