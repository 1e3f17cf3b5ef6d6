"""The tests and other people's packages: which test touches one, their versions, deprecations."""

from __future__ import annotations

import ast
import functools
import logging
import platform
import re
from importlib import metadata
from pathlib import Path

import pytest

# Shown above each run.
SHOWN = (
    "torch", "triton", "transformers", "tokenizers", "accelerate", "peft", "gguf", "jinja2",
    "gymnasium", "matplotlib", "numpy", "typer", "rich", "hypothesis", "pytest", "pytest-xdist",
    "setuptools", "pybind11", "ninja",
)  # fmt: skip

# A test is marked `third_party` where its file imports one of these, itself or by a helper.
# Every test needs torch and pytest; Triton's interpreter runs kernels for tests marked by others.
_TOUCHED = re.compile(
    r"(accelerate|gguf|gymnasium|hypothesis|jinja2|matplotlib|peft|rich|tokenizers|transformers"
    r"|typer|steppo_kernels\.(cli|demo|integrations))(\.|$)"
)
_HELPERS = {path.stem: path for path in Path(__file__).parent.rglob("*.py")}


def versions() -> str:
    """Return the versions of the packages that are shown, where they are installed."""
    found = [f"python {platform.python_version()}"]
    for name in SHOWN:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is missing")
    return ", ".join(found)


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests that touch other people's packages."""
    for item in items:
        if touches(item.path):
            item.add_marker(pytest.mark.third_party)


@functools.cache
def touches(path: Path) -> bool:
    """Whether a file of the tests imports other people's packages, itself or by a helper."""
    names = imports(path)
    helpers = {_HELPERS[name] for name in names if name in _HELPERS} - {path}
    return any(map(_TOUCHED.match, names)) or any(map(touches, helpers))


@functools.cache
def needs(path: Path, package: str) -> bool:
    """Whether a file of the tests imports a package, itself or by a helper."""
    names = imports(path)
    helpers = {_HELPERS[name] for name in names if name in _HELPERS} - {path}
    return any(name.partition(".")[0] == package for name in names) or any(
        needs(helper, package) for helper in helpers
    )


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, by the names that stand there."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


# A later filter goes before an earlier one.
_FILTERS = (
    "error::DeprecationWarning",
    "error::FutureWarning",
    "error::PendingDeprecationWarning",
    # What packages call of one another, and of themselves, is not ours: peft of transformers, and
    # torch's compiler where it is imported and where it traces an autograd function.
    "default:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "default:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "default:`torch.jit.script` is deprecated:DeprecationWarning",
    "default:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
)


class _DeprecationsRaise(logging.Handler):
    """Raises what is logged of a deprecated call, where transformers writes some of them."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            raise DeprecationWarning(f"{record.name}: {message}")


def refuse_deprecated_calls(config: pytest.Config) -> None:
    """Let a deprecated call be an error, warned of or logged, from here on."""
    for line in _FILTERS:
        config.addinivalue_line("filterwarnings", line)
    for name in ("", "transformers"):  # The second does not hand its records on to the first.
        logging.getLogger(name).addHandler(_DeprecationsRaise())
