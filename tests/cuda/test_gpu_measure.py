"""The measurement of `make gpu-check`, on a CPU: what is wrong is not timed, and what dies is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import measure, on_logits, worker
from benchmarks.gpu.bare import bare
from benchmarks.gpu.cases import cases
from benchmarks.gpu.clock import HostClock, Turn
from benchmarks.gpu.problem import Case, Name, Problem
from benchmarks.gpu.variants import BARE, CPU, EAGER, LIGER, OURS, PRODUCTS
from steppo_kernels.backends import choice

NAME = Name("a function", "in some way", "4, 5")


class Still(HostClock):
    """A clock that calls once a turn, and looks at no memory."""

    def turn(self, call: Any, reset: Any) -> Turn:
        if reset is not None:
            reset()
        call()
        return Turn(None, 1.0)

    def peak(self, call: Any, reset: Any) -> int:
        return 0


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(worker, "clock_of", Still)
    monkeypatch.setattr(worker, "TURNS", 2)
    return io.StringIO()


def measured(case: Case, lines: io.StringIO, seconds: float = 600.0, **without: str) -> list[Any]:
    found = worker.Worker(torch.device("cpu"), lines, seconds)
    found.run(case, without)
    return [json.loads(line) for line in lines.getvalue().splitlines()]


def kinds(found: list[Any], kind: str) -> dict[str, Any]:
    return {line["variant"]: line for line in found if line["kind"] == kind}


@pytest.mark.parametrize("case", cases("tiny"), ids=lambda case: str(case.name))
def test_every_case_is_right(case: Case, lines: io.StringIO) -> None:
    found = measured(case, lines)
    assert kinds(found, "failure") == {}
    rows = kinds(found, "row")
    ours = {EAGER.name} if ", gradient formed" not in case.name.how else set()
    ours |= set() if choice.why_not_cpu() else {CPU.name}
    assert ours <= rows.keys()
    assert all(len(row["wall"]) == 2 for row in rows.values())
    floors = {BARE.name, PRODUCTS.name}
    assert all((row["error"] is None) == (name in floors) for name, row in rows.items())
    without = {"steppo_loss_from_logits", "step_value_loss", "StepLayout"}
    without |= {"linear_token_log_probs over sets"}
    assert len(floors & rows.keys()) == (case.name.function not in without)
    assert all(row["moved"] is None for name, row in rows.items() if name in floors)


def problem(**calls: Any) -> Case:
    """A case whose right answer is 1."""
    variants = {"cpu": CPU, "eager": EAGER, "liger": LIGER}

    def check(variant: Any, outputs: Any) -> float:
        if outputs != (1,):
            raise AssertionError(f"{variant}: got {outputs[0]}")
        return 0.0

    return Case(
        NAME, lambda device: Problem({variants[k]: call for k, call in calls.items()}, check)
    )


def raises() -> Any:
    raise RuntimeError("no such\nkernel")


def test_what_is_wrong_is_not_timed(lines: io.StringIO) -> None:
    found = measured(problem(cpu=lambda: (2,), eager=lambda: (1,), liger=lambda: (3,)), lines)
    assert kinds(found, "failure").keys() == {"cpu"}
    assert kinds(found, "failure")["cpu"]["why"] == "AssertionError: cpu: got 2"
    assert kinds(found, "left out").keys() == {LIGER.name}
    assert kinds(found, "row").keys() == {"eager"}


def test_what_raises_keeps_no_other_from_running(lines: io.StringIO) -> None:
    found = measured(problem(cpu=raises, liger=raises, eager=lambda: (1,)), lines)
    assert kinds(found, "failure")["cpu"]["why"] == "RuntimeError: no such kernel"
    assert kinds(found, "left out")[LIGER.name]["why"] == "RuntimeError: no such kernel"
    assert kinds(found, "row").keys() == {"eager"}


def test_no_case_is_begun_when_the_time_is_up(lines: io.StringIO) -> None:
    found = measured(problem(cpu=lambda: (1,)), lines, seconds=-1.0)
    assert [line["kind"] for line in found] == ["not begun"]


def test_a_gpu_that_answers_no_more_ends_the_process(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = worker.Worker(torch.device("cpu"), lines, 600.0)
    monkeypatch.setattr(subject, "_is_lost", lambda: True)
    with pytest.raises(worker.DeviceLost, match="no such kernel"):
        subject.run(problem(cpu=raises, eager=lambda: (1,)), {})
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert kinds(found, "failure").keys() == kinds(found, "lost").keys() == {"cpu"}


# A worker that ends while it measures some variants, and notes what it was asked.
STUB = """
import json, os, pathlib, signal, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
plan = json.loads(options["--plan"])
out = open(options["--lines"], "a")
def write(kind, **entries):
    out.write(json.dumps({"kind": kind, **entries}) + "\\n")
    out.flush()
with open("asked.jsonl", "a") as asked:
    asked.write(json.dumps(plan) + "\\n")
if plan["rates"]:
    write("rates", copy=1.0, product=2.0)
names = json.loads(os.environ["NAMES"])
for number, without in plan["cases"]:
    name = names[number]
    write("begin", **name)
    write("left out", **name, variant="quack cross entropy", why="not installed")
    for variant, does in (("cpu", CPU_DOES), ("CCE", PEER_DOES)):
        write("call", **name, variant=variant)
        if variant not in without and number == 0:
            exec(does)
    write("row", **name, variant="eager")
    write("end", **name)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
LOST = "write('lost', **name, variant=variant, why='it is lost');{failure} sys.exit(3)"
FAILS = "write('failure', **name, variant=variant, why='it is lost');"
SLEEPS = "import time; time.sleep(600)"


@pytest.mark.parametrize(
    ("cpu_does", "peer_does", "failures", "why", "processes"),
    [
        ("pass", "pass", {}, "", 1),
        (KILLED, "pass", {"cpu": "the process ended by signal 9"}, "", 2),
        ("pass", KILLED, {}, "the process ended by signal 9", 2),
        (KILLED, KILLED, {"cpu": "the process ended by signal 9"}, "", 3),
        (LOST.format(failure=FAILS), "pass", {"cpu": "it is lost"}, "", 2),
        ("pass", LOST.format(failure=""), {}, "it is lost", 2),
        (SLEEPS, "pass", {"cpu": "it had not returned after 5 s"}, "", 2),
    ],
)
def test_a_process_that_ends_is_followed_by_another(
    cpu_does: str,
    peer_does: str,
    failures: dict[str, str],
    why: str,
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = STUB.replace("CPU_DOES", repr(cpu_does)).replace("PEER_DOES", repr(peer_does))
    (tmp_path / "stub_worker.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAMES", json.dumps([case.name._asdict() for case in cases("tiny")]))
    monkeypatch.setattr(measure, "_SILENCE", 5.0 if cpu_does == SLEEPS else 100.0)
    found = measure.measure("cpu", "tiny", 300.0, "steppo_loss, layout", worker="stub_worker")
    assert {line["variant"]: line["why"] for line in found.failures} == failures
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [plan["rates"] for plan in asked] == [True] + [False] * (processes - 1)
    assert found.rates == {"copy": 1.0, "product": 2.0}
    # Every case is there once, with what was left out of it.
    wanted = [case.name for case in cases("tiny") if "steppo_loss, layout" in str(case.name)]
    assert [Name(r["function"], r["how"], r["shape"]) for r in found.rows] == wanted
    assert len(found.left_out) == len(wanted)
    if why:
        assert asked[-1]["cases"][0] == [0, {"CCE": why}]


def test_a_process_that_does_not_begin_is_a_failure(tmp_path: Path) -> None:
    found = measure.measure("cpu", "tiny", 60.0, "step_gae", worker="no_such_worker")
    assert [line["why"] for line in found.failures] == ["the process ended with 1"]
    assert found.rows == []


def test_a_case_that_is_cut_off_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = STUB.replace("CPU_DOES", repr(SLEEPS)).replace("PEER_DOES", "'pass'")
    (tmp_path / "stub_worker.py").write_text(program.replace("number == 0", "number == 1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAMES", json.dumps([case.name._asdict() for case in cases("tiny")]))
    monkeypatch.setattr(measure, "GRACE", 2.0)
    found = measure.measure("cpu", "tiny", 2.0, "steppo_loss, layout", worker="stub_worker")
    assert found.failures == []
    assert len(found.rows) == 1
    assert {line["why"] for line in found.left_out[1:]} == {"no time was left"}


def test_no_time_leaves_every_case_out() -> None:
    found = measure.measure("cpu", "tiny", 0.0, "step_gae")
    assert {line["why"] for line in found.left_out} == {"no time was left"}
    assert len(found.left_out) == sum("step_gae" in str(case.name) for case in cases("tiny"))


def test_every_backend_of_a_gpu_is_ours() -> None:
    assert {variant.name for variant in OURS} == {"cuda", "triton", "cpu", "eager"}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_bare_function_records_a_gradient_where_one_is_wanted(in_place: bool) -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    outputs = ((), torch.float32), ((5,), torch.float64)
    first, second = bare(x, *outputs, in_place=in_place)()
    assert (first.shape, second.shape, second.dtype) == ((), (5,), torch.float64)
    assert first.requires_grad
    assert not second.requires_grad
    (grad,) = torch.autograd.grad(first, x)
    assert grad.shape == x.shape
    assert (grad.data_ptr() == x.data_ptr()) == in_place
    assert not any(found.requires_grad for found in bare(x.detach(), *outputs)())


def test_logits_of_an_operation_are_a_tensor_of_their_own_in_the_same_memory() -> None:
    leaf = torch.zeros(2, 3, 4, requires_grad=True)
    logits = on_logits._Operation.apply(leaf)
    assert logits.grad_fn is not None
    assert logits._base is None
    assert logits.data_ptr() == leaf.data_ptr()
    (grad,) = torch.autograd.grad(logits[:, :-1].sum(), leaf)
    assert grad[:, :-1].eq(1).all()
