"""`make gpu-check` without a GPU: what it runs, what it makes of failures, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import every_operator, measure, plan, report, running, sanitizer
from benchmarks.gpu import targets as promises
from benchmarks.gpu.cases import SIZES, cases
from benchmarks.gpu.clock import Launches, counted
from benchmarks.gpu.on_tokens import LAYOUT, policy_loss
from benchmarks.gpu.plan import Options
from benchmarks.gpu.problem import that_fit
from benchmarks.gpu.results import Results
from benchmarks.gpu.running import FAILED, LATE, PASSED, SKIPPED, Finished, Outcome, Task
from benchmarks.gpu.tally import NO_TIME
from benchmarks.gpu.variants import BARE, CUDA, LIGER
from steppo_kernels.backends import choice
from steppo_kernels.backends.modules import module_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_dry_run_writes_a_page(tmp_path: Path) -> None:
    words = ["-m", "benchmarks.gpu", "--device", "cpu", "--stages", "info,benchmarks"]
    done = python(*words, "--only", "step_value_loss", "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "work/gpu_check.json").read_text())
    assert [one["word"] for one in found["stages"]] == [PASSED, PASSED]
    assert {row["variant"] for row in found["rows"]} >= {"eager"}
    assert found["machine"]["torch"] == torch.__version__
    assert found["rates"].keys() == {"copy", "product"}
    page = (tmp_path / "work/gpu_check.md").read_text()
    assert "## step_value_loss, forward + backward, turns 4x512" in page
    assert "Targets on an H100, which this is not" in page
    assert "===== benchmarks" in (tmp_path / "work/gpu_check.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu", "--stages", "nothing"], "expected some of build, info"),
        (["--device", "cpu", "--groups", "head,heads"], "got heads, expected some of tokens, log"),
        (["--device", "xpu"], "expected a GPU such as cuda:0, or cpu"),
    ],
)
def test_arguments_are_checked(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        command_line.main([*words, "--work", str(tmp_path / "work")])
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_a_stage_that_fails_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes after it runs, and the page is written."""
    tasks = [
        [Task(name, name, [sys.executable, "-c", f"raise SystemExit({code})"], 60.0)]
        for name, code in (("build", 1), ("info", 0))
    ]
    monkeypatch.setattr(command_line, "phases", lambda options: tasks)
    assert command_line.run(Options(CPU, tmp_path), tmp_path) == 1
    assert capsys.readouterr().err == "failed: build\n"
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| build | FAILED |" in page
    assert "| info | passed |" in page


def test_every_operator_is_called() -> None:
    """The program that the sanitizers look at leaves none out."""
    if why := choice.why_not_cpu():
        pytest.skip(why)
    kernels = module_of("cpu")
    called: set[str] = set()
    table = (ROOT / "csrc/include/steppo/operators.inc").read_text()
    names = {
        line.partition("(")[2].partition(",")[0]
        for line in table.splitlines()
        if line.startswith("STEPPO_OPERATOR(")
    }
    before = {name: getattr(kernels, name) for name in names}
    for name, call in before.items():
        setattr(kernels, name, _noting(name, call, called))
    try:
        every_operator.run(CPU, "cpu")
    finally:
        for name, call in before.items():
            setattr(kernels, name, call)
    assert names - called == set()


def _noting(name: str, call: Any, called: set[str]) -> Any:
    def noting(*args: Any) -> Any:
        called.add(name)
        return call(*args)

    return noting


# What is planned for a GPU.


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(plan, "architecture", lambda device: "90")
    monkeypatch.setattr(plan, "toolkit_program", lambda name: f"/toolkit/bin/{name}")
    return Options(torch.device("cuda:0"), tmp_path)


@pytest.mark.parametrize("patience", [1.0, 2.0])
def test_the_whole_takes_less_than_eight_minutes(options: Options, patience: float) -> None:
    """Also if everything but the measurement takes all of its time."""
    clock, stages, tasks = SimpleNamespace(now=0.0), set(), []
    given = Options(options.device, options.work, patience)
    for tasks in plan.phases(given, lambda: clock.now):
        clock.now += max(task.limit for task in tasks)
        stages |= {task.stage for task in tasks}
    assert stages == set(plan.STAGES)
    assert 7 * 60 * patience < clock.now < 8 * 60 * patience
    # The last is the measurement. It ends by itself, and writes what it has.
    (last,) = tasks
    seconds = float(last.words[last.words.index("--seconds") + 1])
    assert 120 * patience < seconds < last.limit - measure.GRACE


def tasks_of(options: Options) -> dict[str, Task]:
    return {task.name: task for tasks in plan.phases(options) for task in tasks}


def test_the_build_is_for_this_gpu(options: Options) -> None:
    build = tasks_of(options)["build"]
    assert build.environment == {"STEPPO_BUILD_CUDA": "1", "STEPPO_CUDA_ARCHS": "90"}
    assert list(build.words[1:5]) == ["-m", "pip", "install", "--no-build-isolation"]
    assert "--no-deps" in build.words


def test_what_has_no_time_for_all_ends_by_itself(options: Options) -> None:
    tasks = tasks_of(options)
    validated = [task for name, task in tasks.items() if name.startswith("validate ")]
    assert len(validated) == 3
    seconds = [float(t.words[t.words.index("--seconds") + 1]) for t in validated]
    tests = tasks["tests"]
    (in_time,) = (word for word in tests.words if word.startswith("--in-time="))
    for begin, task in zip((*seconds, float(in_time[10:])), (*validated, tests), strict=True):
        assert begin + 30 <= task.limit
    # What is broken off is counted before the stage is stopped.
    (grace,) = (word for word in tests.words if word.startswith("--grace="))
    assert float(grace[8:]) >= 30
    assert float(in_time[10:]) + float(grace[8:]) + 15 <= tests.limit


def test_nothing_runs_beside_what_is_timed(options: Options) -> None:
    assert [task.name for task in list(plan.phases(options))[-1]] == ["benchmarks"]


def test_what_is_missing_is_said(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"xdist", "hypothesis"}
    monkeypatch.setattr(plan, "is_there", lambda name: name not in missing)
    monkeypatch.setattr(plan, "toolkit_program", lambda name: None)
    tasks = tasks_of(options)
    assert "-n" not in tasks["tests"].words
    (options.work / "counts.json").write_text(
        json.dumps(
            {"passed": 3, "failed": 0, "skipped": 1, "not_begun": 7, "first_after": 31.2}
            | {"broken_off": {"test_x.py::test_slow": 40.2}}
            | {"ended": NO_TIME, "lost_by": ["test_x.py::test_x"], "failures": []}
        )
    )
    said = tasks["tests"].judge(Finished(0, options.work / "log")).said
    parts = ["3 passed", "7 not begun in 110 s", "1 lost the device, first test_x.py::test_x"]
    parts += ["the first after 31 s", "1 broken off, as test_x.py::test_slow after 40 s"]
    for part in (*parts, "pytest-xdist is not", "hypothesis, which is not"):
        assert part in said
    assert "compute-sanitizer is not on PATH" in tasks["sanitizers"].why_not
    missing.add("pytest")
    tasks = tasks_of(options)
    assert tasks["tests"].why_not == tasks["graphs"].why_not == "pytest is not installed"


def test_info_wants_the_backend_that_is_checked(options: Options) -> None:
    info = tasks_of(options)["info"]
    log = options.work / "info.txt"
    backends = {"cuda": {"devices": [], "why_not": "not built: no nvcc"}}
    log.write_text(f"a warning\n{json.dumps({'backends': backends})}\n")
    assert info.judge(Finished(0, log)) == (FAILED, "no cuda: not built: no nvcc")
    backends["cuda"]["devices"] = ["cuda"]
    log.write_text(json.dumps({"backends": backends}))
    assert info.judge(Finished(0, log)) == (PASSED, "cuda on cuda")


def bench_row(implementation: str, status: str, ms: float | None) -> dict[str, Any]:
    row = {"operation": "gae", "variant": "per step", "implementation": implementation}
    return row | {"status": status, "ms": ms, "note": "off by 1"}


@pytest.mark.parametrize(
    ("code", "rows", "word", "said"),
    [
        (0, [("eager", "ok", 1.0), ("cuda", "ok", 1.0)], PASSED, "2 rows; 2 ok"),
        (0, [("cuda", "ok", 1.0), ("cuda", "no time", None)], PASSED, "2 rows; 1 ok; 1 no time"),
        (
            1,
            [("cuda", "ok", 1.0), ("triton", "wrong", None)],
            FAILED,
            "2 rows; 1 ok; 1 wrong; gae, per step, triton, off by 1",
        ),
        (
            0,
            [("eager", "ok", 1.0), ("cuda", "no time", None)],
            FAILED,
            "2 rows; 1 ok; 1 no time; none of cuda has a time",
        ),
        (0, [], FAILED, "0 rows; none of cuda has a time"),
        (1, None, FAILED, "no JSON; Error: no such device"),
    ],
)
def test_bench_has_to_end_well_and_to_write_times(
    code: int, rows: list[Any] | None, word: str, said: str, options: Options
) -> None:
    task = tasks_of(options)["bench"]
    assert task.words[2:6] == ["steppo_kernels", "bench", "--device", "cuda:0"]
    assert float(task.words[task.words.index("--seconds") + 1]) + 30 <= task.limit
    log = options.work / "bench.txt"
    text = "Error: no such device"
    if rows is not None:
        text = json.dumps({"ok": not code, "rows": [bench_row(*row) for row in rows]})
    log.write_text(f"a {{warning}}\n{text}\n")
    assert task.judge(Finished(code, log)) == (word, said)
    if rows is not None:
        # What a library says at its exit comes after it.
        log.write_text(f"{log.read_text()}leaked {{1}}\n")
        assert task.judge(Finished(code, log)) == (word, said)


def test_a_dry_run_of_bench_passes(tmp_path: Path) -> None:
    if why := choice.why_not_cpu():
        pytest.skip(why)
    task = tasks_of(Options(CPU, tmp_path))["bench"]
    words = [*task.words, "--operation", "gae"]
    (found,) = running.side_by_side([replace(task, words=words)], ROOT, tmp_path)
    assert found.word == PASSED, found.said


# Running.


def test_a_task_that_fails_hides_no_other(tmp_path: Path) -> None:
    def task(name: str, program: str, limit: float = 60.0, why_not: str = "") -> Task:
        return Task(name, name, [sys.executable, "-c", program], limit, why_not=why_not)

    tasks = [
        task("bad", "print('so far'); raise SystemExit('and no further')"),
        task("good", "print('done')"),
        task("absent", "", why_not="there is none"),
        Task("missing", "missing", ["/no/such/program"], 1.0),
        task("endless", "print('hello', flush=True); import time; time.sleep(600)", 1.0),
    ]
    found = running.side_by_side(tasks, tmp_path, tmp_path)
    assert [one.word for one in found] == [FAILED, PASSED, SKIPPED, FAILED, LATE]
    assert [one.is_bad for one in found] == [True, False, False, True, True]
    said = [one.said for one in found]
    assert said[:3] == ["and no further", "done", "there is none"]
    assert "No such file" in said[3]
    assert said[4].startswith("stopped after 1 s")
    assert found[4].seconds < 30
    assert (tmp_path / "bad.txt").read_text() == "so far\nand no further\n"
    assert "hello" in (tmp_path / "endless.txt").read_text()


@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        (0, "== ERROR SUMMARY: 0 errors", (PASSED, "ERROR SUMMARY: 0 errors")),
        (sanitizer.FOUND, "== ERROR SUMMARY: 2 errors", (FAILED, "ERROR SUMMARY: 2 errors")),
        (1, "Traceback\n== ERROR SUMMARY: 0 errors", (FAILED, "ERROR SUMMARY: 0 errors")),
        (
            0,
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            (PASSED, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
        ),
        (0, "26 calls agree", (FAILED, "there is no summary; 26 calls agree")),
        (255, "= Error: Device not supported", (SKIPPED, None)),
    ],
)
def test_what_a_sanitizer_says(code: int, text: str, verdict: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"========= COMPUTE-SANITIZER\n{text}\n")
    word, said = sanitizer.judge(Finished(code, log))
    assert word == verdict[0]
    assert verdict[1] in (None, said)


def test_tests_are_collected_without_hypothesis() -> None:
    program = textwrap.dedent("""
        import sys
        import pytest

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "hypothesis":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        words = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        sys.exit(pytest.main([*words, "tests/layout"]))
    """)
    done = python("-c", program)
    assert done.returncode == 0, done.stdout
    assert "test_immutable.py" in done.stdout
    assert "test_keep.py" not in done.stdout


# What the rows mean.


def row(case: Any, variant: Any, seconds: float, **entries: Any) -> dict[str, Any]:
    found = {
        **case.name._asdict(),
        "variant": variant.name,
        "device": [seconds] * 3,
        "wall": [2 * seconds] * 3,
        "kernel_seconds": seconds / 2,
        "launches": 1,
        "copies": 0,
        "peak_bytes": 2**20,
        "moved": 10**6,
        "operations": None,
        "smaller": "",
        "error": 1e-6,
    }
    return found | entries


def test_targets_are_judged_on_the_gpu_that_they_are_for() -> None:
    small, large = SIZES["full"].policy
    forward, both = (policy_loss(small, LAYOUT, backward=on) for on in (False, True))
    wide = policy_loss(large, LAYOUT, backward=True)
    loss = next(c for c in cases("full") if c.name.function == "steppo_loss_from_logits")
    results = Results(
        {
            "rows": [
                # 12 us are allowed in kernels, and 60 us in all.
                row(forward, CUDA, 20e-6),
                # Host times are twice as long: these are 14 us apart.
                row(forward, BARE, 13e-6),
                row(both, CUDA, 30e-6, launches=3),
                row(wide, CUDA, 31e-6),
                row(loss, CUDA, 1e-3),
                row(loss, LIGER, 1.4e-3),
            ]
        }
    )
    found = {target.name: target for target in promises.targets(results)}
    assert found[f"{forward.name}: in kernels"].text == "10 us"
    assert found[f"{forward.name}: in kernels"].verdict == "met"
    assert found[f"{forward.name}: launches"].verdict == "met"
    assert found[f"{forward.name}: wall beyond a bare autograd.Function"].text == "14 us"
    assert found[f"{both.name}: launches of backward"].verdict == "MISSED"
    assert found[f"{wide.name}: wall"].verdict == "MISSED"
    assert found[f"{loss.name}: {LIGER} over it"].text == "1.4x"
    assert sum(target.verdict == "not measured" for target in found.values()) == len(found) - 6
    assert report.verdicts(results, "NVIDIA H100 80GB HBM3") == list(found.values())
    assert report.verdicts(results, "NVIDIA H200") == []


def test_inputs_that_were_made_smaller_meet_no_target() -> None:
    forward = policy_loss(SIZES["full"].policy[0], LAYOUT, backward=False)
    results = Results({"rows": [row(forward, CUDA, 1e-6, smaller="half of it")]})
    assert all(target.met is None for target in promises.targets(results))


def test_the_page_has_a_table_for_each_case(tmp_path: Path) -> None:
    forward = policy_loss(SIZES["full"].policy[0], LAYOUT, backward=False)
    name = forward.name._asdict()
    out = [{**name, "variant": LIGER.name, "why": "not installed: liger_kernel"}] * 3
    results = Results(
        {
            "rates": {"copy": 1e11, "product": 1e14},
            "rows": [row(forward, CUDA, 2e-5), row(forward, LIGER, 4e-5)],
            "left_out": out,
            "failures": [{**name, "variant": CUDA.name, "why": "it | raised"}],
        }
    )
    machine = {"device": "NVIDIA H100", "driver": "580", "capability": "9.0", "cores": 16}
    machine |= {"multiprocessors": 132, "memory_gib": 79.6, "l2_mib": 50.0, "host": "a CPU"}
    machine |= {"peers": {"trl": "1.16.0"}, "date": "2026-01-01"}
    machine |= dict.fromkeys(("cuda", "torch", "triton", "python", "steppo_kernels"), "1")
    failed_tests = [
        {"why": "ValueError: no | number", "count": 1, "tests": ["test_x.py::test_one"]},
        {"why": "CUDA error", "count": 9, "tests": ["test_x.py::test_a", "test_x.py::test_b"]},
    ]
    outcomes = [Outcome("build", PASSED, 3.0, "built")]
    assert report.TOO_LATE not in report.stages(outcomes)
    outcomes.append(Outcome("info", LATE, 20.0, "stopped after 20 s"))
    report.write(tmp_path, machine, outcomes, results, failed_tests)
    page = (tmp_path / "gpu_check.md").read_text()
    wanted = "| cuda | 20 us | 10 us | 40 us |  | 1 | 0 | 50 | 50 % | 1 MiB | 1.0e-06 |"
    assert wanted in page
    assert "40 us | 20 us | 80 us | 2x |" in page
    assert "| Liger GRPO, Triton | 3 cases | not installed: liger_kernel |" in page
    assert "it \\| raised" in page
    assert "| build | passed | 3 s | built |" in page
    # The page says what the word means, right below the table.
    late = page.index("| info | TOO LATE | 20 s | stopped after 20 s |")
    assert late < page.index("TOO LATE is a stage that was stopped") < page.index("## Failures of")
    often = page.index("| 9 | CUDA error | test_x.py::test_a; test_x.py::test_b; and 7 more |")
    once = page.index("| 1 | ValueError: no \\| number | test_x.py::test_one |")
    assert page.index("## Failures of tests") < often < once
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(found["rows"]) == 2
    assert {target["verdict"] for target in found["targets"]} == {"met", "not measured"}


def test_launches_are_counted_apart_from_copies() -> None:
    def event(name: str, kind: DeviceType, microseconds: float) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=kind, time_range=span)

    events = [
        event("cudaLaunchKernel", DeviceType.CPU, 9.0),
        event("policy_loss_kernel", DeviceType.CUDA, 3.0),
        event("Memset (Device)", DeviceType.CUDA, 1.0),
        event("elementwise_kernel", DeviceType.CUDA, 2.0),
    ]
    assert counted(events) == Launches(2, pytest.approx(5e-6), 1)


def test_inputs_are_halved_until_they_fit() -> None:
    assert that_fit(8192, 10, 0, None) == 8192
    assert that_fit(8192, 10, 100, 82020) == 8192
    assert that_fit(8192, 10, 100, 82019) == 4096
    assert that_fit(8, 10, 100, 0) == 1
