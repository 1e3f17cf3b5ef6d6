"""The sources that `make gpu-check` records, and what has changed since results were measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import facts, report, sources
from benchmarks.gpu.results import Results
from benchmarks.gpu.running import PASSED, Outcome
from tools import gpu_sources

ROOT = Path(__file__).parents[2]
PYTHON = {f"steppo_kernels/backends/{name}" for name in ("triton", "compiled", "gpu")}

FILES = {
    "csrc/cuda/one.cu": '#include "near.cuh"\n#include <cstdint>\n#include "of_no_one.h"\n',
    "csrc/cuda/two.cu": '  #  include "steppo/far.h"\n',
    "csrc/cuda/near.cuh": '#include "steppo/deep.h"\n',
    "csrc/include/steppo/deep.h": '#pragma once\n#include "../../cuda/near.cuh"\n',
    "csrc/include/steppo/far.h": "// nothing\n",
    "csrc/cuda/not_included.cuh": "",
    "steppo_kernels/backends/triton/gae.py": "x = 1\n",
    "steppo_kernels/backends/compiled/gae.py": "x = 1\n",
    "steppo_kernels/backends/gpu/deeper/head.py": "x = 1\n",
    "steppo_kernels/backends/reference/gae.py": "x = 1\n",
}
ONE, TWO = "csrc/cuda/one.cu", "csrc/cuda/two.cu"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("file", "units"),
    [
        ("csrc/cuda/one.cu", [ONE]),
        ("csrc/cuda/near.cuh", [ONE]),
        ("csrc/include/steppo/deep.h", [ONE]),
        ("csrc/include/steppo/far.h", [TWO]),
        ("csrc/cuda/not_included.cuh", []),
        ("steppo_kernels/backends/gpu/deeper/head.py", ["steppo_kernels/backends/gpu"]),
        ("steppo_kernels/backends/triton/gae.py", ["steppo_kernels/backends/triton"]),
        ("steppo_kernels/backends/reference/gae.py", []),
        ("csrc/cuda/three.cu", ["csrc/cuda/three.cu"]),
        ("steppo_kernels/backends/compiled/new.py", ["steppo_kernels/backends/compiled"]),
    ],
)
def test_a_digest_is_of_a_unit_and_all_that_it_includes(
    file: str, units: list[str], tree: Path
) -> None:
    before = sources.digests(tree)
    assert before.keys() == {ONE, TWO, *PYTHON}
    path = tree / file
    path.write_text((path.read_text() if path.exists() else "") + "# more\n")
    assert gpu_sources.changed(before, sources.digests(tree)) == units


def test_text_that_moves_to_another_file_is_a_change(tree: Path) -> None:
    folder = tree / "steppo_kernels/backends/triton"
    (folder / "b.py").write_text("y = 1\nz = 1\n")
    before = sources.digests(tree)
    (folder / "b.py").rename(folder / "c.py")
    assert gpu_sources.changed(before, sources.digests(tree)) != []


def test_every_compiled_file_of_this_repository_is_a_unit() -> None:
    found = sources.digests(ROOT)
    compiled = {f"csrc/cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert found.keys() == compiled | PYTHON
    assert len(set(found.values())) == len(found)
    # A header that lies beside the unit, and those of another folder.
    files = sources._with_headers(ROOT / "csrc/cuda/gae.cu", ROOT)
    names = {path.relative_to(ROOT / "csrc").as_posix() for path in files}
    assert {"cuda/gae_tile.cuh", "include/steppo/records.inc"} < names
    assert "cuda/kept_head.cu" not in names


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_says_which_commit_it_is(tree: Path) -> None:
    assert sources.sources(tree)["git"] is None
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = sources.sources(tree)["git"]
    assert len(commit) >= 7
    (tree / ONE).write_text("")
    assert sources.sources(tree)["git"] == f"{commit}-dirty"


def test_git_that_is_not_installed_is_no_failure(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert sources.sources(tree)["git"] is None


def test_the_results_hold_the_sources(tmp_path: Path) -> None:
    found = facts.facts(torch.device("cpu"))
    assert found["sources"] == sources.sources(ROOT)
    found["sources"]["git"] = "1234abc"
    assert f"steppo_kernels {found['steppo_kernels']} of 1234abc" in facts.headline(found)
    report.write(tmp_path, found, [], Results({}))
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert gpu_sources.recorded(written) == sources.digests(ROOT)


def results(tree: Path, **of_sources: Any) -> Path:
    path = tree / "benchmarks/results/a-gpu/gpu_check.json"
    path.parent.mkdir(parents=True)
    stages = [Outcome("build", PASSED, 1.0, "")._asdict()]
    path.write_text(json.dumps({"machine": {"device": "a GPU", **of_sources}, "stages": stages}))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = gpu_sources.main([*words])
    return code, capsys.readouterr().out.splitlines()


def test_what_has_changed_since_is_named(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results(tree, sources={"git": "1234abc", "digests": sources.digests(tree)})
    words, name = ("--root", str(tree), "--pages"), "benchmarks/results/a-gpu/gpu_check.json"
    assert run(capsys, *words) == (0, [f"{name}: as they are (1234abc)"])
    (tree / ONE).write_text("")
    (tree / "csrc/cuda/three.cu").write_text("")
    # Results that are out of date are none that are wrong.
    wanted = f"{name}: changed since: {ONE}, csrc/cuda/three.cu (1234abc)"
    assert run(capsys, *words) == (0, [wanted])
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"stages": []}))
    wanted = wanted.replace("1234abc", "1234abc; the run has not built them")
    assert run(capsys, *words) == (0, [wanted])


def test_a_claim_about_a_unit_that_has_changed_is_untrue(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results(tree, sources={"git": None, "digests": sources.digests(tree)})
    name, page = path.relative_to(tree), tree / "page.md"
    page.write_text(f"Text.\n\n<!-- as measured: {name} |\n{ONE}, {TWO} -->\n")
    words = ("--root", str(tree), "--pages", str(page))
    assert run(capsys, *words) == (0, [f"{name}: as they are (no commit)"])
    (tree / TWO).write_text("")
    code, lines = run(capsys, *words)
    assert (code, lines[1:]) == (1, [f"page.md: {TWO} has changed since {name}"])
    (tree / TWO).unlink()
    code, lines = run(capsys, *words)
    assert (code, lines[1:]) == (1, [f"page.md: {TWO}: there is no such unit"])


def test_results_without_digests_are_not_recorded(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, page = results(tree).relative_to(tree), tree / "page.md"
    page.write_text(f"<!-- as measured: {name} | {ONE} -->\n")
    words = ("--root", str(tree), "--pages", str(page))
    assert run(capsys, *words) == (0, [f"{name}: not recorded"])


def test_the_claims_of_all_pages_are_true(capsys: pytest.CaptureFixture[str]) -> None:
    """Every kept result loads, with digests or without."""
    code, lines = run(capsys)
    assert code == 0, lines
    kept = list((ROOT / "benchmarks/results").rglob("gpu_check.json"))
    assert len(lines) == len(kept) > 0
