"""`steppo-kernels bench`: what it times, that it checks first, what it prints and exits with."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import need_whole_graphs
from typer.testing import CliRunner, Result

import steppo_kernels
from steppo_kernels import StepLayout
from steppo_kernels.backends import choice, operators, registry
from steppo_kernels.cli import bench as benchmark
from steppo_kernels.cli import main
from steppo_kernels.cli.bench import run as runs
from steppo_kernels.cli.bench import timing
from steppo_kernels.cli.bench.case import Case, Problem, Size, first_as
from steppo_kernels.cli.bench.trial import Trial, Wrong, exact_answer

CPU = torch.device("cpu")

# Public names that compute nothing, or call a function that has cases of its own.
NOT_TIMED = {
    "Metrics",
    "RolloutWeights",
    "StepAdvantages",
    "StepPOConfig",
    "StepPOLoss",
    "StepPOOutput",
    "StepValueLoss",
    # Called once, before training.
    "check_step_ends",
    "__version__",
    "TokenSupport",
}

REPORT = "version date load machine seconds took ok left_out rows"
ROW = (
    "operation variant size device implementation dtype status note error ms iqr_ms turns speedup "
    "gb_per_s device_ms peak_mib"
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Leave the smallest size of each case, and two short turns."""
    small = [
        replace(case, sizes={kind: sizes[:1] for kind, sizes in case.sizes.items()})
        for case in benchmark.CASES
    ]
    monkeypatch.setattr(benchmark, "CASES", tuple(small))
    monkeypatch.setattr(timing, "_SLICE", 1e-4)
    monkeypatch.setattr(timing, "_MOST_TURNS", 2)


@pytest.fixture
def native(monkeypatch) -> Callable[..., None]:
    """Let the reference's launcher of `step_gae` be that of the CPU backend, with `spoil` after."""

    def set_wrong(spoil: Callable[..., Any]) -> None:
        launcher = operators.launcher

        def launch(backend: str, name: str) -> Callable[..., Any]:
            if backend != "cpu":
                return launcher(backend, name)
            return lambda *args: spoil(*launcher("reference", name)(*args))

        monkeypatch.setattr(registry, "launcher", launch)

    monkeypatch.setattr(
        choice,
        "unavailable",
        lambda name, device: None if name in ("reference", "cpu") else "not here",
    )
    return set_wrong


@pytest.fixture
def compiles(monkeypatch) -> Callable[[Callable[..., Any]], None]:
    """Let `torch.compile` be another function, and have time."""

    def set_compiler(compiler: Callable[..., Any]) -> None:
        monkeypatch.setattr(torch, "compile", compiler)
        monkeypatch.setattr(runs, "_ONE_COMPILE", 0.0)

    return set_compiler


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", *words])


def found_rows(*words: str, code: int = 0) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the JSON of `step_gae` on the CPU, and its rows by implementation."""
    options = "--operation", "step_gae", "--seconds", "60", "--device", "cpu", "--json"
    result = run(*options, *words)
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    return found, {row["implementation"]: row for row in found["rows"]}


def test_every_public_function_is_timed():
    timed = {case.operation for case in benchmark.CASES}
    constructors = {
        f"StepLayout.{name}"
        for name, member in inspect.getmembers(StepLayout, inspect.ismethod)
        if name.startswith("from_")
    }
    public = set(steppo_kernels.__all__) - NOT_TIMED - {"StepLayout"}
    assert timed == public | constructors
    assert set(steppo_kernels.__all__) >= NOT_TIMED


def test_every_case_has_sizes_for_each_kind_of_device():
    assert all(set(case.sizes) == {"cpu", "cuda"} for case in benchmark.CASES)


@pytest.mark.parametrize("number", range(len(benchmark.CASES)))
def test_every_case_passes_and_what_is_compiled_computes_the_same(compiles, number):
    # The compiler itself takes seconds a case.
    compiles(lambda call, **options: call)
    names = [name for name in ("cpu",) if choice.unavailable(name, CPU) is None]
    case = benchmark.CASES[number]
    rows = benchmark.bench([case], names, CPU, seconds=60.0)
    assert [row.implementation for row in rows] == ["eager", "torch.compile", *names]
    for row in rows:
        if row.implementation == "torch.compile" and row.status == "not compiled":
            assert row.note
            continue
        assert (row.status, row.note) == ("ok", "")
        assert row.ms > 0
        assert row.turns >= 1
        assert row.speedup > 0
        assert row.operation.startswith("linear") == (row.gb_per_s is None)


def test_what_is_said_not_to_compile_does_not():
    tried = []
    for case in benchmark.CASES:
        problem = case.draw(case.sizes["cpu"][0], CPU)
        # Dynamo takes the operator of these two as it is, so that nothing is left to compile.
        if problem.why_not_compiled and case.operation not in ("step_gae", "step_returns"):
            tried.append(case.operation)
            torch.compiler.reset()
            call = torch.compile(problem.call, fullgraph=True, backend="eager")
            with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                Trial(problem).answer(call, "reference")
    assert {"steppo_loss", "StepLayout.from_mask"} <= set(tried)


def test_json_has_the_machine_and_every_number():
    found, rows = found_rows("--backend", "reference")
    assert set(found) == set(REPORT.split())
    assert found["version"] == steppo_kernels.__version__
    assert found["machine"]["threads"] == 1
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["seconds"] == 60.0
    assert found["ok"] is True
    assert list(rows) == ["eager", "torch.compile"]
    assert all(set(row) == set(ROW.split()) for row in rows.values())
    eager = rows["eager"]
    assert (eager["status"], eager["dtype"], eager["device"]) == ("ok", "float32", "cpu")
    assert eager["ms"] > 0
    assert eager["speedup"] == 1.0
    assert (eager["device_ms"], eager["peak_mib"]) == (None, None)
    assert rows["torch.compile"]["status"] == "not compiled"
    assert rows["torch.compile"]["ms"] is None


def test_bytes_are_inputs_read_once_and_outputs_written_once():
    case = next(case for case in benchmark.CASES if case.operation == "token_log_probs")
    problem = case.draw(Size(2, 8, 100), CPU)
    # bf16 logits, int64 ids, fp32 results.
    assert problem.moved == 2 * 8 * (2 * 100 + 8 + 4)


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda advantages, returns: (advantages * 1.01, returns), "advantages: off by"),
        (lambda advantages, returns: (advantages, returns * torch.nan), "returns: off by nan"),
        (lambda advantages, returns: (advantages[1:], returns), "advantages: got shape"),
        (lambda advantages, returns: (advantages, returns.double()), "returns: got torch.float64"),
    ],
)
def test_a_wrong_variant_is_shown_and_not_timed(native, spoil, note):
    native(spoil)
    found, rows = found_rows("--backend", "cpu", code=1)
    assert found["ok"] is False
    assert rows["cpu"]["status"] == "wrong"
    assert note in rows["cpu"]["note"]
    assert rows["cpu"]["ms"] is None
    assert rows["eager"]["status"] == "ok"


def test_a_wrong_layout_is_shown():
    case = next(case for case in benchmark.CASES if case.operation == "StepLayout.from_mask")
    problem = case.draw(case.sizes["cpu"][0], CPU)
    trial, exact = Trial(problem), exact_answer(problem)
    assert trial.check(exact, exact) == 0.0
    changed = exact["step_ids"].clone()
    changed[-1, -1] += 1
    with pytest.raises(Wrong, match="step_ids: differs"):
        trial.check({**exact, "step_ids": changed}, exact)


def test_a_variant_that_raises_is_shown(native):
    def fail(*outputs: Any) -> None:
        raise RuntimeError("the abacus jams\nat bead 7")

    native(fail)
    _, rows = found_rows("--backend", "cpu", code=1)
    assert (rows["cpu"]["status"], rows["cpu"]["ms"]) == ("failed", None)
    assert rows["cpu"]["note"] == "RuntimeError: the abacus jams"
    result = run("--operation", "step_gae", "--seconds", "60", "--backend", "cpu")
    assert result.exit_code == 1
    assert "FAILED step_gae, forward, 8x512, cpu, cpu: RuntimeError" in result.output


def test_a_variant_that_raises_while_it_is_timed_is_shown(native):
    calls = itertools.count()

    def fail(*outputs: Any) -> Any:
        if next(calls) > 3:
            raise RuntimeError("out of beads")
        return outputs

    native(fail)
    _, rows = found_rows("--backend", "cpu", code=1)
    assert (rows["cpu"]["status"], rows["cpu"]["ms"]) == ("failed", None)
    assert rows["eager"]["ms"] > 0


def test_a_reference_that_raises_is_a_fault_of_every_variant(monkeypatch):
    def fail(*args: Any) -> None:
        raise IndexError("out of beads")

    monkeypatch.setattr(registry, "launcher", lambda backend, name: fail)
    _, rows = found_rows("--backend", "reference", code=1)
    assert {row["note"] for row in rows.values()} == {"the reference: IndexError: out of beads"}


def value_rows(seconds: float = 60.0) -> dict[str, benchmark.Row]:
    """Return the rows of `step_value_loss` beside its compiled form."""
    cases = [case for case in benchmark.CASES if case.operation == "step_value_loss"]
    rows = benchmark.bench(cases, ["reference"], CPU, seconds=seconds)
    return {row.implementation: row for row in rows}


def test_what_torch_compile_makes_is_timed_beside_the_others(compiles):
    need_whole_graphs()
    made = []
    compiler = torch.compile

    def compiled(call: Any, **options: Any) -> Any:
        made.append(options)
        return compiler(call, backend="aot_eager", **options)

    compiles(compiled)
    rows = value_rows()
    assert made == [{"fullgraph": True, "dynamic": False}]
    assert rows["torch.compile"].status == "ok"
    assert rows["torch.compile"].ms > 0
    assert rows["torch.compile"].turns == rows["eager"].turns


def test_a_wrong_compiler_is_a_fault_and_one_that_raises_is_none(compiles):
    compiles(lambda call, **options: lambda *args: 2 * call(*args)[0])
    row = value_rows()["torch.compile"]
    assert row.status == "wrong"
    assert row.is_fault

    def fail(*args: Any) -> None:
        raise RuntimeError("no compiler was found")

    compiles(lambda call, **options: fail)
    row = value_rows()["torch.compile"]
    assert (row.status, row.note) == ("not compiled", "RuntimeError: no compiler was found")
    assert not row.is_fault


def test_nothing_is_compiled_shortly_before_the_end(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    row = value_rows(0.9 * runs._ONE_COMPILE)["torch.compile"]
    assert (row.status, row.is_fault) == ("no time", False)


def test_nothing_is_compiled_where_others_have_the_cores(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(runs, "load", lambda: 10.0 * os.cpu_count())
    assert value_rows(9.0 * runs._ONE_COMPILE)["torch.compile"].status == "no time"


def test_what_has_no_time_says_so(monkeypatch):
    cases = [case for case in benchmark.CASES if case.operation == "step_gae"]
    rows = benchmark.bench(cases, ["reference"], CPU, seconds=0.0)
    assert {row.status for row in rows} == {"no time"}
    monkeypatch.setattr(benchmark, "bench", lambda *args, **options: rows)
    result = run("--operation", "step_gae", "--device", "cpu")
    assert result.exit_code == 0
    assert "2 of 2 had no time: --seconds gives more" in " ".join(result.output.split())


def test_the_largest_sizes_come_first(monkeypatch):
    drawn = []

    def draw(size: Size, device: torch.device) -> Problem:
        drawn.append(size)
        return Problem(
            lambda inputs, backend: inputs["x"] + 1,
            {"x": torch.ones(size.rows)},
            first_as("y"),
            why_not_compiled="it is too simple",
        )

    sizes = {"cpu": (Size(1, 1), Size(2, 1))}
    cases = [Case(name, "", sizes, draw) for name in ("one", "other")]
    rows = benchmark.bench(cases, [], CPU, seconds=60.0)
    assert [size.rows for size in drawn] == [2, 2, 1, 1]
    order = [f"{row.operation} {row.size}" for row in rows[::2]]
    assert order == ["one 1x1", "one 2x1", "other 1x1", "other 2x1"]


def test_variants_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_TURNS", 5)
    seen: list[str] = []
    steps = {
        "slow": lambda: (seen.append("slow"), time.sleep(2e-3)),
        "fast": lambda: (seen.append("fast"), time.sleep(5e-4)),
    }
    soon = time.monotonic() + 0.05
    times, raised = timing.in_turns(steps, soon, soon + 10.0)
    assert raised == {}
    order = [name for name, _ in itertools.groupby(seen)]
    assert order == ["slow", "fast"] * times["slow"].turns
    assert 3 <= times["slow"].turns == times["fast"].turns <= 5
    assert times["slow"].speedup == 1.0
    assert times["fast"].speedup > 1.0
    assert times["slow"].median >= 2e-3


def test_a_late_case_has_one_turn():
    now = time.monotonic()
    times, _ = timing.in_turns({"it": lambda: time.sleep(1e-3)}, now, now)
    assert times["it"].turns == 1


class _Event:
    """Stands in for a CUDA event on a clock that the tests move."""

    clock = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.clock

    def elapsed_time(self, other: _Event) -> float:
        return (other.at - self.at) * 1e3


def test_device_time_leaves_out_what_runs_ahead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_FILL_BYTES", 16)
    fills = []

    def zero(self: torch.Tensor) -> torch.Tensor:
        fills.append(self)
        _Event.clock += 1e-4
        return self

    monkeypatch.setattr(torch.Tensor, "zero_", zero)

    def step() -> None:
        _Event.clock += 3e-5

    found = timing.device_seconds(step, 9.5e-4, CPU)
    assert found == pytest.approx(3e-5)
    # Ten of them take as long as the call, and one more is begun.
    assert len(fills) == timing._EVENT_ROUNDS * (1 + 11)


def test_backends_that_are_imitated_are_left_out():
    imitated = [
        name
        for name, is_imitated in (
            ("triton", choice.triton_interprets()),
            ("cuda", choice.cuda_on_host()),
        )
        if is_imitated
    ]
    if not imitated:
        pytest.skip("no kernel of a GPU runs on the CPU here")
    found, rows = found_rows()
    assert set(rows) == {"eager", "torch.compile", "cpu"} - (
        {"cpu"} if choice.why_not_cpu() else set()
    )
    assert [line.split()[0] for line in found["left_out"]] == imitated
    assert "triton is left out" in run("--operation", "gae", "--seconds", "60").output
    for name in imitated:
        result = run("--backend", name)
        assert result.exit_code == 2
        assert f"{name} is left out" in " ".join(result.output.replace("│", " ").split())


def test_the_table_has_each_variant_and_the_reasons():
    result = run("--operation", "step_gae", "--seconds", "60", "--device", "cpu")
    assert result.exit_code == 0
    for word in ("8x512", "eager", "torch.compile", "x eager", "GB/s", "UTC", torch.__version__):
        assert word in result.output
    assert "not compiled (step_gae): the loop over the steps" in result.output


if torch.cuda.is_available():

    @pytest.mark.gpu
    @pytest.mark.unpoisoned
    def test_bench_passes_on_a_gpu():
        result = run("--device", "cuda", "--seconds", "30", "--json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        timed = [row for row in rows if row["ms"]]
        assert timed
        assert [row for row in timed if row["device_ms"] <= 0 or row["peak_mib"] <= 0] == []
