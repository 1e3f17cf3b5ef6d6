"""The C++ compiler, and how it compiles the bindings."""

import os
import shlex
import shutil
import subprocess

from . import CannotBuild


def find_compiler() -> list[str]:
    """Return the C++ compiler as a list of words: that of CXX, or one that machines have.

    Raises:
        CannotBuild: it is not there.
    """
    named = os.environ.get("CXX", "").strip()
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for words in map(shlex.split, candidates):
        if shutil.which(words[0]):
            return words
    raise CannotBuild(f"no C++ compiler ({', '.join(candidates)}) when it was installed")


def version_of(compiler: list[str]) -> str:
    """Return the line with which a C++ compiler names itself."""
    return subprocess.check_output([*compiler, "--version"], text=True).splitlines()[0]


def binding_flags(includes: list[str], compiler: str) -> list[str]:
    """Return the flags of the bindings, which tell the name of a compiler."""
    import pybind11

    folders = (*includes, pybind11.get_include())
    return [*(f"-I{path}" for path in folders), f'-DSTEPPO_COMPILER="{compiler}"']
