"""Which layer may know which: csrc knows nothing of Python or torch, python/ holds only glue."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steppo_kernels

_ROOT = Path(__file__).parents[2]
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
    """The headers that turn Python values into C++ ones look at them; the bindings do not."""
    forbidden = {
        "CUDA": r"<<<|>>>|__global__|__device__",
        "a loop": r"\b(for|while|do|switch|goto)\b",
    }
    branches = {"a branch": r"\bif\b(?! constexpr)"}
    names = {path.name for path in sources("python")}
    assert {"bindings_cpu.cpp", "cast.h", "records.h"} <= names
    for path in sources("python"):
        text = code(path)
        own = forbidden if path.name in ("cast.h", "records.h") else {**forbidden, **branches}
        for what, pattern in own.items():
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
    for path in (_PACKAGE / "backends/reference").glob("*.py"):
        standard = {"__future__", "collections", "math", "typing"}
        foreign = imports(path) - {"torch", "steppo_kernels"} - standard
        assert not foreign, f"{path.name} imports {foreign}"


# The wings from the ground up, each a floor: a module imports from its own floor or one below.
_FLOORS = (
    (
        "config",
        "outputs",
        "checks",
        "csr",
        "devices",
        "inference",
        "pickling",
        "ranks",
        "_version",
        "_C_cpu",
        "backends.records",
        "backends.modules",
    ),
    ("backends.reference", "backends.compiled", "backends.triton", "backends.gpu"),
    (
        "backends.registry",
        "backends.kept_operators",
        "backends.operators",
        "backends.derivatives",
        "backends.fakes",
        "backends.saved",
        "backends.untraced",
    ),
    ("backends.choice",),
    ("layout", "log_probs", "memory"),
    ("losses",),
    ("integrations", "distributed"),
    ("demo",),
    ("cli",),
)
# Wings on one floor that know nothing of each other.
_APART = (
    ("backends.reference", "backends.compiled", "backends.triton", "backends.gpu"),
    ("layout", "log_probs"),
)


def module_of(path: Path) -> str:
    """The dotted name of a file inside of the package; "" is the package itself."""
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere in it, by their dotted names."""
    parts = path.relative_to(_PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) + 1 - node.level], *filter(None, [node.module])]
            names = [".".join(["steppo_kernels", *base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {
            name.removeprefix("steppo_kernels").removeprefix(".")
            for name in names
            if name.split(".")[0] == "steppo_kernels"
        }
    return found


def place_of(module: str) -> tuple[int, str] | None:
    """The floor and the wing of a module; None for the public names of the package itself."""
    for floor, wings in enumerate(_FLOORS):
        for wing in wings:
            if f"{module}.".startswith(f"{wing}."):
                return floor, wing
    return None


def test_every_module_has_a_floor():
    homeless = {"", "__main__", "backends"}
    modules = {module_of(path) for path in _PACKAGE.rglob("*.py")}
    assert {module for module in modules if place_of(module) is None} == homeless


def test_imports_go_downhill():
    for path in _PACKAGE.rglob("*.py"):
        module = module_of(path)
        if (here := place_of(module)) is None:
            continue
        for name in own_imports(path):
            there = place_of(name)
            if there is None:
                # The public names stand on top: the demo and the command line may use them.
                assert here[1] in ("demo", "cli"), f"{module} imports the package itself: {name}"
                continue
            assert there[0] <= here[0], f"{module} imports {name} upward"
            assert here[0] > 0, f"{module} is ground and imports {name}"
            apart = any(
                here[1] != there[1] and {here[1], there[1]} <= set(wings) for wings in _APART
            )
            assert not apart, f"{module} imports {name}, which stands beside it"


def test_modules_of_the_package_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    modules = {module_of(path) for path in _PACKAGE.rglob("*.py")}
    for path in _PACKAGE.rglob("*.py"):
        names = {name if name in modules else name.rpartition(".")[0] for name in own_imports(path)}
        graph[module_of(path)] = names - {module_of(path)}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_one_stem_an_operation_in_every_layer():
    backends = _PACKAGE / "backends"
    parts = {"reductions", "surrogates", "vocabulary_shard"}
    stems = {path.stem for path in (backends / "reference").glob("[!_]*.py")} - parts
    assert {"gae", "policy_loss", "value_loss", "segment", "broadcast"} <= stems
    for folder in ("compiled", "triton"):
        folders = ("triton", "gpu") if folder == "triton" else (folder,)
        present = {path.stem for name in folders for path in (backends / name).glob("*.py")}
        assert stems <= present, f"{folder}/ lacks {sorted(stems - present)}"
    for name in (f"csrc/cpu/{stem}.cpp" for stem in stems):
        assert not (_ROOT / "csrc").is_dir() or (_ROOT / name).exists(), name
    tested = {path.stem.removeprefix("test_") for path in Path(__file__).parents[1].rglob("*.py")}
    assert stems <= tested, sorted(stems - tested)


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


@pytest.mark.parametrize("folder", ["steppo_kernels", "tools", "benchmarks", "examples"])
def test_nothing_stands_on_the_tests(folder):
    modules = {path.stem for path in (_ROOT / "tests").rglob("*.py")} - {"__init__", "conftest"}
    for path in (_ROOT / folder).rglob("*.py"):
        foreign = imports(path) & (modules | {"tests", "conftest"})
        own = {sibling.stem for sibling in path.parent.iterdir()}
        assert not foreign - own, f"{path.name} imports {foreign - own}"
