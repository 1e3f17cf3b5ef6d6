"""The order in which `make gpu-check` measures: some of every group, and the oldest first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import measure, plan
from benchmarks.gpu.cases import GROUPS, SIZES, cases, groups
from benchmarks.gpu.order import in_order, last_measured
from benchmarks.gpu.plan import Options
from benchmarks.gpu.problem import Name

CPU = torch.device("cpu")
OLD, NEW = "2026-11-26 13:16 UTC", "2026-11-27 15:16 UTC"


def name(text: str) -> Name:
    return Name(text, "forward", "[1]")


def results(path: Path, date: str, *names: Name) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [one._asdict() | {"variant": "cuda"} for one in names]
    path.write_text(json.dumps({"machine": {"date": date}, "rows": rows}))


def test_every_group_has_a_case_in_each_round_and_the_oldest_first() -> None:
    found = {
        "first": [name("a"), name("b"), name("c"), name("d")],
        "second": [name("e"), name("f")],
        "third": [name("g")],
    }
    # Nothing is known: the order is that of the groups and of the cases.
    assert [one.function for one in in_order(found, {})] == list("aegbfcd")
    measured = {str(name(text)): NEW for text in "abe"} | {str(name("f")): OLD, str(name("c")): OLD}
    assert [one.function for one in in_order(found, measured)] == list("dgfceab")


def test_a_run_takes_up_where_the_ones_before_ended(tmp_path: Path) -> None:
    """With time for five cases, each run measures some of every group, and together all."""
    names = {group: [case.name for case in of_group] for group, of_group in groups("full").items()}
    for run in range(max(map(len, names.values()))):
        begun = in_order(names, last_measured([tmp_path], "gpu_check.json"))[:5]
        assert all(set(begun) & set(of_group) for of_group in names.values())
        results(tmp_path / f"{run}/gpu_check.json", f"2026-11-01 {run:02}:00 UTC", *begun)
    found = last_measured([tmp_path], "gpu_check.json")
    assert found.keys() == {str(one) for of_group in names.values() for one in of_group}


def test_the_latest_of_all_results_counts(tmp_path: Path) -> None:
    results(tmp_path / "gpu/gpu_check.json", OLD, name("a"), name("b"))
    results(tmp_path / "gpu/first/gpu_check.json", NEW, name("a"))
    results(tmp_path / "out/gpu_check.json", NEW, name("c"))
    # A machine was taken away while it wrote.
    (tmp_path / "gpu/second").mkdir()
    (tmp_path / "gpu/second/gpu_check.json").write_text('{"machine": {"da')
    folders = (tmp_path / "gpu", tmp_path / "out", tmp_path / "none")
    found = last_measured(folders, "gpu_check.json")
    assert found == {str(name("a")): NEW, str(name("b")): OLD, str(name("c")): NEW}


@pytest.mark.parametrize("size", SIZES)
def test_the_groups_have_all_cases(size: str) -> None:
    found = groups(size)
    assert tuple(found) == GROUPS
    every = [case.name for case in cases(size)]
    assert len(every) == len(set(every)) == sum(map(len, found.values()))
    heads = {case.name.function for case in found["head"]}
    assert heads == {"linear_steppo_loss", "linear_token_log_probs"}
    assert {case.name.function for case in found["kept"]} == {"linear_token_log_probs over sets"}


# A worker that measures nothing, and notes what it was asked.
STUB = """
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
names = json.loads(os.environ["NAMES"])
with open(options["--lines"], "a") as out:
    def write(kind, **entries):
        out.write(json.dumps({"kind": kind, **entries}) + "\\n")
    plan = json.loads(options["--plan"])
    write("rates", copy=1.0, product=2.0)
    open("asked.json", "w").write(json.dumps([names[number] for number, _ in plan["cases"]]))
    for number, without in plan["cases"]:
        write("begin", **names[number])
        write("row", **names[number], variant="eager")
        write("end", **names[number])
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stub_worker.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAMES", json.dumps([case.name._asdict() for case in cases("tiny")]))
    return tmp_path / "asked.json"


def test_cases_are_measured_in_this_order_and_written_in_theirs(asked: Path) -> None:
    every = [case.name for case in cases("tiny")]
    measured = {str(one): NEW for one in every[:3]}
    found = measure.measure("cpu", "tiny", 60.0, worker="stub_worker", measured=measured)
    of_groups = {group: [c.name for c in of_group] for group, of_group in groups("tiny").items()}
    order = [Name(**one) for one in json.loads(asked.read_text())]
    assert order == in_order(of_groups, measured)
    assert order[0] == every[3]
    assert [Name(r["function"], r["how"], r["shape"]) for r in found.rows] == every


def test_some_groups_alone_are_measured(asked: Path) -> None:
    measure.measure("cpu", "tiny", 60.0, worker="stub_worker", wanted=("head", "kept"))
    order = [Name(**one) for one in json.loads(asked.read_text())]
    wanted = [case.name for group in ("head", "kept") for case in groups("tiny")[group]]
    assert sorted(order) == sorted(wanted)


def test_the_check_hands_on_groups_and_what_was_measured(tmp_path: Path) -> None:
    (task,) = list(plan.phases(Options(CPU, tmp_path, groups=("head", "kept"))))[-1]
    words = dict(zip(task.words, task.words[1:], strict=False))
    assert words["--groups"] == "head,kept"
    assert words["--measured"] == str(tmp_path / "measured.json")


def test_results_are_read_before_they_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(tmp_path / "out/gpu_check.json", OLD, name("a"))
    # A stage has run, and the page of this run is written.
    monkeypatch.setattr(command_line, "phases", lambda options: [[]])
    work = tmp_path / "work"
    work.mkdir()
    command_line.run(Options(CPU, work, stages=("info",)), tmp_path / "out")
    assert json.loads((tmp_path / "out/gpu_check.json").read_text())["rows"] == []
    assert json.loads((work / "measured.json").read_text()) == {str(name("a")): OLD}
