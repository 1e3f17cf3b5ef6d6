"""README and docs: every Python block runs, links lead somewhere, numbers are those of results."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from steppo_kernels.outputs import POLICY_METRICS, ROLLOUT_METRICS, VALUE_METRICS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "python/README.md")),
    ROOT / "csrc/cuda/README.md",
    ROOT / "benchmarks/cuda_account.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README_LINES = 140

# What blocks need beside the package, and what they import of it. Trainers are not installed here:
# their own suites run their pages.
_OPTIONAL = {"transformers": "transformers", "trl": "steppo_kernels.integrations.trl"}

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A Python block of a page, the line where it begins, and what it is said to print."""

    page: Path
    line: int
    code: str
    prints: str | None


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            found.append(Block(page, line, match[1], match[2]))
    return found


def name_of(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line + 1}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", blocks(), ids=name_of)
def test_block_runs_by_itself_and_prints_what_the_page_says(block):
    for package, name in _OPTIONAL.items():
        if re.search(rf"^(from|import) {name}\b", block.code, re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")
    printed = io.StringIO()
    # Tracebacks show the lines of the page.
    code = compile("\n" * block.line + block.code, str(block.page), "exec")
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    if block.prints is not None:
        assert printed.getvalue() == block.prints


def test_each_page_that_shows_calls_has_blocks():
    shown = {block.page.name for block in blocks()}
    assert {"README.md", "layouts.md", "hidden_states.md", "parts_of_a_batch.md"} <= shown
    assert {"algorithms.md", "metrics.md", "numerics.md", "trainers.md"} <= shown


def test_every_fence_is_a_block_that_runs_or_what_one_prints():
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page.name
        assert set(fences[::2]) <= {"python", "text"}, page.name
        # Each text follows a block.
        of_page = [block for block in blocks() if block.page == page]
        assert fences.count("python") == len(of_page), page.name
        assert fences.count("text") == sum(block.prints is not None for block in of_page), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_map_of_cuda_kernels_names_every_file_and_operator():
    folder = ROOT / "csrc/cuda"
    named = set(re.findall(r"`(\w[\w.]+)`", (folder / "README.md").read_text()))
    lists = (ROOT / "csrc/include/steppo").glob("*operators.inc")
    lines = "".join(path.read_text() for path in lists if path.name != "cpu_operators.inc")
    assert set(re.findall(r"^STEPPO_OPERATOR\((\w+),", lines, re.M)) <= named
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert {name for name in named if "." in name} == files


def test_every_page_of_docs_is_linked_in_the_readme():
    links = _LINK.findall((ROOT / "README.md").read_text())
    linked = {link.partition("#")[0] for link in links}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_readme_is_short_and_its_two_commands_are_targets():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for line in targets for name in line.split()}
    named = set(re.findall(r"(?:^    |`)make ([\w-]+)", text, re.M))
    assert {"demo", "test"} <= named <= targets


def doc_numbers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.doc_numbers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_numbers_are_those_of_the_results():
    done = doc_numbers()
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_first_screen_shows_measured_numbers():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("<!-- measured:"))
    assert first < 10


def test_a_number_that_the_results_do_not_hold_is_found_and_replaced(tmp_path):
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"^(\d+ ms) \| linear_loss .* fused \| time$", readme, re.MULTILINE)[1]
    page = tmp_path / "page.md"
    page.write_text(readme.replace(shown, "1 ms"))
    done = doc_numbers(str(page))
    assert done.returncode == 1
    assert done.stdout == f"page.md: 1 ms is now {shown}\n", done.stderr
    doc_numbers("--write", str(page))
    assert page.read_text() == readme
    page.write_text(readme.replace(f"**{shown}", "**"))
    assert doc_numbers(str(page)).stdout == f"page.md: {shown}: the section does not show it\n"


def test_a_number_is_cold_unless_the_list_says_otherwise(tmp_path):
    def entry(variant: str, mode: str, turn: int, microseconds: float) -> dict[str, Any]:
        place = {"suite": "overhead", "case": "a loss", "variant": variant, "mode": mode}
        return {
            "stats": {"median": 1e-6 * microseconds},
            "extra_info": place | {"threads": 2, "turn": turn, "tokens": 1},
        }

    times = {
        ("fused", "cold"): 90,
        ("bare", "cold"): 40,
        ("fused", "warm"): 18,
        ("bare", "warm"): 8,
    }
    entries = [entry(*key, turn, time + turn) for key, time in times.items() for turn in range(3)]
    machine = {"family": "steps", "peers": {}, "threads": 2}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"machine_info": machine, "benchmarks": entries}))
    page = tmp_path / "page.md"
    listed = {
        "91 us": "fused | time",
        "90 us": "fused | time | cold",
        "19 us": "fused | time | warm",
        "50 us": "fused : bare | beyond | 2",
        "10 us": "fused : bare | beyond | 2 | warm",
        "2.11x": "fused : bare | ratio | warm | 2",
    }
    lines = "".join(f"{shown} | overhead | a loss | {place}\n" for shown, place in listed.items())
    page.write_text(f"<!-- measured: {results}\n{lines}-->\n{', '.join(listed)}\n")
    assert doc_numbers(str(page)).stdout == "page.md: 90 us is now 91 us\n"


def gpu_results(folder: Path) -> Path:
    """Write results of a GPU: a loss of two variants, a copy, and two targets."""
    case = {"function": "a_loss", "how": "forward", "shape": "[8, 8]", "smaller": ""}
    seconds = {"cuda": [2e-6, 4e-6, 3e-6], "Liger GRPO, Triton": [8e-6, 8e-6, 9e-6]}
    rows = [
        case
        | {"variant": name, "device": device, "wall": [10 * one for one in device]}
        | {"kernel_seconds": device[0], "moved": 3000, "operations": None, "peak_bytes": 2**21}
        for name, device in seconds.items()
    ]
    target = {"name": "a_loss: device", "wanted": "<= 2 us", "measured": 3.0, "unit": " us"}
    other = target | {"name": "a_loss: launches", "measured": None, "met": None}
    document = {
        "rates": {"copy": 2e9, "product": 1e12},
        "targets": [target | {"met": False, "verdict": "MISSED"}, other | {"verdict": "-"}],
        "rows": rows,
    }
    path = folder / "gpu_check.json"
    path.write_text(json.dumps(document))
    return path


def test_numbers_of_a_gpu_are_found_in_lists_and_tables_and_replaced(tmp_path):
    results, page = gpu_results(tmp_path), tmp_path / "page.md"
    right = f"""\
<!-- measured: {results}
3.00x | a_loss, forward... | Liger GRPO, Triton : cuda | ratio
20 us | a_loss, forward, [8, 8] | cuda | least wall
2 GB/s | rates | copy | rate
-->
Liger's takes 3.00x, 20 us, and a copy 2 GB/s.

<!-- measured table: {results} -->

| time | cuda | cuda, wall | cuda, in kernels | others |
|---|---|---|---|---|
| `a_loss`, forward, [8, 8] | 3.0 us; 50 %; 2 MiB | 30 us | 2.0 us | **8 us** (Liger GRPO, Triton) |

<!-- measured targets: {results} -->

| target | wanted | measured | verdict | why |
|---|---|---|---|---|
| a_loss: device | <= 2 us | 3 us | MISSED | a reason |
| a_loss: launches | <= 2 us | - | not measured | |
"""
    page.write_text(right)
    done = doc_numbers(str(page))
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    wrong = {
        "3.00x": "3.10x",
        "3.0 us;": "3.1 us;",
        "50 %": "51 %",
        "| 30 us": "| 31 us",
        "**8 us**": "**9 us**",
        "| MISSED": "| met",
    }
    changed = right
    for good, bad in wrong.items():
        changed = changed.replace(good, bad)
    page.write_text(changed)
    done = doc_numbers("--write", str(page))
    assert (done.returncode, done.stdout.count(" is now ")) == (1, len(wrong)), done.stdout
    assert page.read_text() == right
    # A target without a row, a case without results.
    page.write_text(right.replace("| a_loss: launches | <= 2 us | - | not measured | |\n", ""))
    assert doc_numbers(str(page)).stdout == "page.md: no row is now a_loss: launches\n"
    page.write_text(right.replace("`a_loss`, forward", "`a_loss`, backward"))
    assert "a_loss, backward, [8, 8]: not in the results" in doc_numbers(str(page)).stderr


def test_the_table_of_versions_has_those_of_the_lock_and_the_minima():
    table = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs/installation.md").read_text(),
        re.MULTILINE,
    )
    locked: dict[str, set[str]] = {}
    lock = (ROOT / "uv.lock").read_text()
    for name, version in re.findall(r'^name = "(.+)"\nversion = "(.+)"$', lock, re.MULTILINE):
        locked.setdefault(name, set()).add(version)
    project = (ROOT / "pyproject.toml").read_text()
    assert {"torch", "triton", "transformers", "accelerate", "peft"} <= {row[0] for row in table}
    for name, version, _, oldest in table:
        assert version in locked[name], f"{name}: {version}, the lock has {locked[name]}"
        minimum = re.search(rf'"{name}>=([\d.]+)', project)
        if name != "torch":
            assert minimum, name
            assert f"{oldest}.".startswith(f"{minimum[1]}."), f"{name}: {oldest}, {minimum[1]}"


def test_the_readme_says_what_the_page_measured_of_the_clip_range():
    printed = next(block.prints for block in blocks() if block.prints and "ppo" in block.code)
    text = " ".join((ROOT / "README.md").read_text().split())
    for line in printed.splitlines()[:2]:
        spread, _, of_tokens, _ = line.split()
        assert spread in text, spread
        assert of_tokens.replace("%", " %") in text, of_tokens


def test_every_metric_is_explained():
    text = (ROOT / "docs/metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    parts = re.split("\n## (?:The critic|Rollout weights)\n", text)
    every = POLICY_METRICS, VALUE_METRICS, ROLLOUT_METRICS
    assert all(f"`{name}`" in "".join(rows) for names in every for name in names)
    for names, part in zip(every, parts, strict=True):
        explained = {
            name
            for line in part.splitlines()
            if line.startswith("| `")
            for name in re.findall(r"`(\w+)`", line.split("|")[1])
        }
        assert explained == set(names)
