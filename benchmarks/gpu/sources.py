"""Which sources a check has run: digests by unit, and what git says of the working tree.

Numbers outlive the kernels that they were measured with. `tools/gpu_sources.py` compares the
digests of kept results with the sources of now.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Kernels that are compiled while they run, and what launches those of all GPU backends.
FOLDERS = tuple(f"steppo_kernels/backends/{name}" for name in ("triton", "compiled", "gpu"))
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.M)
_DIGITS = 12


def sources(root: Path) -> dict[str, Any]:
    """Return the digests of the units below a repository's root, and its state in git or None."""
    return {"git": _git(root), "digests": digests(root)}


def digests(root: Path) -> dict[str, str]:
    """Return a digest of each unit.

    A unit is a file of `csrc/cuda` that is compiled, with all headers of `csrc` that it includes,
    or the Python files of one of `FOLDERS`.
    """
    units = {path: _with_headers(path, root) for path in (root / "csrc/cuda").glob("*.cu")}
    units |= {root / folder: (root / folder).rglob("*.py") for folder in FOLDERS}
    return {
        path.relative_to(root).as_posix(): _digest(files, root)
        for path, files in sorted(units.items())
    }


def _digest(files: Iterable[Path], root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        name, content = path.relative_to(root).as_posix().encode(), path.read_bytes()
        # Lengths keep the end of a file from passing for the begin of the next.
        found.update(b"%d %s %d " % (len(name), name, len(content)))
        found.update(content)
    return found.hexdigest()[:_DIGITS]


def _with_headers(path: Path, root: Path) -> set[Path]:
    """Return a file and what it includes, and what that includes, as far as it is of `csrc`."""
    seen, todo = set[Path](), [path]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += _included(one, root)
    return seen


def _included(path: Path, root: Path) -> Iterator[Path]:
    for name in _INCLUDE.findall(path.read_text()):
        for folder in (path.parent, root / "csrc/include"):
            if (folder / name).is_file():
                yield Path(os.path.normpath(folder / name))
                break


def _git(root: Path) -> str | None:
    """Return the commit, and whether files differ from it; None without git or a repository."""
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
