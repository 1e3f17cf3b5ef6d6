"""A build.ninja, in which every object has flags of its own, and what ninja makes of it."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from . import CompilerFailed


class NinjaFile:
    """The lines of a build.ninja that links objects to one module."""

    def __init__(self, module: str) -> None:
        """Take the name of the module's file."""
        self._module = module
        self._lines: list[str] = []
        self._objects: list[str] = []

    def rule(self, name: str, command: list[str], rest: str, *, has_depfile: bool = True) -> None:
        """Add a rule: the words of a program, and how ninja's variables follow them."""
        self._lines += [f"rule {name}", f"  command = {_escape(shlex.join(command))} {rest}"]
        if has_depfile:
            self._lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, name: str, flags: list[str]) -> None:
        """Add an object."""
        self._objects.append(name)
        self._lines.append(f"build {name}: {rule} {_escape_path(source)}")
        self._lines.append(f"  flags = {_escape(shlex.join(flags))}")

    def link(self, rule: str, flags: list[str]) -> None:
        """Add the module, which is made of all objects."""
        self._lines.append(f"build {_escape_path(self._module)}: {rule} {' '.join(self._objects)}")
        self._lines.append(f"  flags = {_escape(shlex.join(flags))}")

    def run(self, folder: Path, *, is_quiet: bool) -> Path:
        """Build in a folder what has changed there; return the module.

        Raises:
            CompilerFailed: a command failed; the text is what it complained of first.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self._lines) + "\n")
        options = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        options += ["--quiet"] if is_quiet else []
        said = []
        with subprocess.Popen(
            [_find_ninja(), "-C", str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as ninja:
            assert ninja.stdout is not None
            for line in ninja.stdout:
                print(line, end="", flush=True)
                said.append(line.strip())
        if ninja.returncode:
            raise CompilerFailed(f"a compiler failed when it was installed: {first_error(said)}")
        return folder / self._module


def first_error(said: list[str]) -> str:
    """Return the first complaint of a compiler, or of the first that ninja saw fail."""
    starts = [index for index, line in enumerate(said) if line.startswith("FAILED:")]
    # The line after the mark is the command.
    after = [line for line in said[starts[0] + 2 :] if line] if starts else said
    complaints = (line for line in after if re.search(r"error|fatal|not found", line, re.I))
    return next(complaints, after[0] if after else "it said nothing")


def _escape_path(path: Path | str) -> str:
    """Return a path escaped for a build line, where blanks separate."""
    return _escape(str(path)).replace(" ", "$ ")


def _escape(text: str) -> str:
    """Return `text` with the characters that ninja reads escaped."""
    return text.replace("$", "$$").replace(":", "$:").replace("\n", "$\n")


def _find_ninja() -> str:
    """Return the ninja of the build environment."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")
