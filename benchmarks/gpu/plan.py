"""The stages of the check: what is run, for how long, and what its output means."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import sanitizer
from .cases import GROUPS
from .facts import architecture, is_there, toolkit_program
from .measure import GRACE
from .running import FAILED, PASSED, Finished, Task, Verdict, last_line
from .tally import NO_TIME

STAGES = ("build", "info", "graphs", "tests", "validate", "bench", "sanitizers", "benchmarks")

# Seconds, of the whole and of its parts. What runs at a time is limited alike, and what the others
# leave of the whole is for the measurement.
_WHOLE = 475.0
_BUILD, _INFO = 140.0, 20.0
# After this time no test is begun and no combination validated. The last of them may then take as
# long as a compiler does, however short the rest is.
_BEGIN, _TO_END = 110.0, 45.0
# What `steppo-kernels bench` may take of a dry run. Its times are not kept: others run beside it.
_BENCH_DRY = 10.0
# Tests that run for so much longer are broken off: pytest then has time to write what it counted.
_GRACE = 30.0
# What the measurement may take beyond its time: for the case that it is at, and to begin and end.
_LAST_CASE = GRACE + 10.0

_SEED, _BATCHES = "20261126", "2"
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_OF_TRITON = ("float32", "bfloat16")
_GRAPHS = "tests/cuda/test_cuda_graphs.py"
# On a CPU, in the place of all tests that need a GPU.
_SOME_TESTS = "tests/ground/test_config.py"
# So many faults of `bench` are named.
_NAMED = 3
# Processes of pytest: other checks run beside them.
_MOST_PROCESSES = 8
# A pool of compilers for each process that compiles would be more than there are cores.
_ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@dataclass(frozen=True)
class Options:
    """How a check is run.

    Attributes:
        device: what is checked; on a CPU everything is run that needs no GPU, on tiny inputs.
        work: a folder for outputs and results.
        patience: what every limit is multiplied by.
        stages: those that are wanted.
        only: part of the names of the cases that are measured.
        groups: those whose cases are measured.
    """

    device: torch.device
    work: Path
    patience: float = 1.0
    stages: tuple[str, ...] = STAGES
    only: str = ""
    groups: tuple[str, ...] = GROUPS

    @property
    def is_dry(self) -> bool:
        """Whether it is a dry run, on a CPU."""
        return self.device.type == "cpu"

    @property
    def rows(self) -> Path:
        """Where the measurements go."""
        return self.work / "rows.json"

    @property
    def measured(self) -> Path:
        """Where it stands when cases were last measured, by earlier results of the device."""
        return self.work / "measured.json"

    @property
    def counts(self) -> Path:
        """Where the counts of tests go."""
        return self.work / "counts.json"

    @property
    def backend(self) -> str:
        """The backend that the check is about."""
        return "cpu" if self.is_dry else "cuda"

    @property
    def limit_of_checks(self) -> float:
        """Seconds after which a check beside others is stopped."""
        return _BEGIN * self.patience + _TO_END


def phases(options: Options, now: Callable[[], float] = time.monotonic) -> Iterator[list[Task]]:
    """Yield the tasks; those of a list run at the same time, and nothing beside what is timed.

    A list is made when it is asked for: the measurement takes the time that is left then.
    """
    end = now() + _WHOLE * options.patience

    def wanted(*tasks: Task) -> list[Task]:
        return [task for task in tasks if task.stage in options.stages]

    yield wanted(_build(options))
    yield wanted(_info(options))
    checks = (_graphs, _tests, _validate, _bench, _sanitizers)
    yield wanted(*(task for check in checks for task in check(options)))
    yield wanted(_benchmarks(options, end - now()))


def _python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def _build(options: Options) -> Task:
    environment = {"STEPPO_BUILD_CUDA": "0"}
    if not options.is_dry:
        environment = {
            "STEPPO_BUILD_CUDA": "1",
            "STEPPO_CUDA_ARCHS": architecture(options.device),
        }
    return Task(
        "build",
        "build",
        _python("pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."),
        _BUILD * options.patience,
        environment,
    )


def _info(options: Options) -> Task:
    def judge(done: Finished) -> Verdict:
        """Return what runs on the device; the backend that is checked has to."""
        text = done.log.read_text()
        if done.code:
            return Verdict(FAILED, last_line(done.log))
        found = _document(text)["backends"]
        kind = options.device.type
        runs = [name for name, one in found.items() if kind in one["devices"]]
        if options.backend not in runs:
            return Verdict(FAILED, f"no {options.backend}: {found[options.backend]['why_not']}")
        return Verdict(PASSED, f"{', '.join(runs)} on {kind}")

    words = _python("steppo_kernels", "info", "--json")
    return Task("info", "info", words, _INFO * options.patience, judge=judge)


def _document(text: str) -> dict[str, Any]:
    """Return the JSON that an output has, with warnings before and after it."""
    begin = re.search(r"^\{", text, re.M)
    if begin is None:
        raise ValueError("no line begins with a brace")
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text, begin.start())[0]
    return found


def _pytest(*words: str) -> list[str]:
    return _python("pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *words)


def _graphs(options: Options) -> list[Task]:
    why_not = "CUDA graphs need a GPU" if options.is_dry else _why_no_pytest()
    words = _pytest("-m", "gpu", _GRAPHS)
    return [Task("graphs", "graphs", words, options.limit_of_checks, why_not=why_not)]


def _why_no_pytest() -> str:
    return "" if is_there("pytest") else "pytest is not installed"


def _tests(options: Options) -> list[Task]:
    if why := _why_no_pytest():
        return [Task("tests", "tests", why_not=why)]
    counts = options.counts
    counts.unlink(missing_ok=True)
    seconds = _BEGIN * options.patience
    words = ["-p", "benchmarks.gpu.in_time", f"--in-time={seconds:.0f}", f"--grace={_GRACE:.0f}"]
    words.append(f"--counts={counts}")
    # Another day has other cases first.
    drawn = f"--draw={date.today().toordinal()}"
    words.append(drawn)
    # A file that cannot be imported is a failure, and the others run all the same.
    words.append("--continue-on-collection-errors")
    lacks = []
    if is_there("xdist"):
        processes = max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2))
        # Items are handed out in their order, a few at a time.
        words += ["-n", str(processes), "--dist=load", "--maxschedchunk=8"]
    else:
        lacks.append("one process, as pytest-xdist is not installed")
    if not is_there("hypothesis"):
        lacks.append("without the files that need hypothesis, which is not installed")
    if options.is_dry:
        words += ["-m", "not gpu", _SOME_TESTS]
    else:
        words += ["-m", "gpu", f"--ignore={_GRAPHS}", "tests"]

    def judge(done: Finished) -> Verdict:
        if not counts.exists():
            return Verdict(FAILED, f"no test was collected; {last_line(done.log)}")
        found = json.loads(counts.read_text())
        said = [f"{found[key]} {key}" for key in ("passed", "failed", "skipped")]
        if found["not_begun"]:
            is_up = found["ended"] == NO_TIME
            why = f" in {seconds:.0f} s" if is_up else f": {found['ended'] or 'it was broken off'}"
            said.append(f"{found['not_begun']} not begun{why}")
        if found["first_after"] is not None:
            said.append(f"the first after {found['first_after']:.0f} s")
        if found["broken_off"]:
            first, ran = next(iter(found["broken_off"].items()))
            said.append(f"{len(found['broken_off'])} broken off, as {first} after {ran:.0f} s")
        if found["lost_by"]:
            said.append(f"{len(found['lost_by'])} lost the device, first {found['lost_by'][0]}")
        word = PASSED if done.code == 0 and found["passed"] else FAILED
        return Verdict(word, f"{', '.join([*said, *lacks])} ({drawn} repeats their order)")

    command = _pytest(*words)
    return [Task("tests", "tests", command, options.limit_of_checks, _ONE_COMPILER, judge)]


def _validate(options: Options) -> list[Task]:
    def task(backend: str, dtypes: tuple[str, ...], name: str) -> Task:
        words = ["validate", "--device", str(options.device), "--backend", backend]
        words += ["--seed", _SEED, "--batches", "1" if options.is_dry else _BATCHES]
        words += ["--seconds", f"{_BEGIN * options.patience:.0f}"]
        for dtype in dtypes:
            words += ["--dtype", dtype]
        command = _python("steppo_kernels", *words)
        return Task("validate", name, command, options.limit_of_checks)

    if options.is_dry:
        return [task("cpu", _DTYPES[:1], "validate cpu")]
    # Triton compiles a kernel anew for every variant and dtype, and has no time for all of them.
    of_triton = [task("triton", (dtype,), f"validate triton {dtype}") for dtype in _OF_TRITON]
    return [task("cuda", _DTYPES, "validate cuda"), *of_triton]


def _bench(options: Options) -> list[Task]:
    def judge(done: Finished) -> Verdict:
        """Return how many rows the output has; some of the backend that is checked have times."""
        try:
            rows = _document(done.log.read_text(errors="replace"))["rows"]
        except (KeyError, ValueError):
            return Verdict(FAILED, f"no JSON; {last_line(done.log)}")
        counts = Counter(row["status"] for row in rows)
        said = [f"{len(rows)} rows", *(f"{count} {status}" for status, count in counts.items())]
        said += [
            ", ".join(str(row[key]) for key in ("operation", "variant", "implementation", "note"))
            for row in rows
            if row["status"] in ("wrong", "failed")
        ][:_NAMED]
        ours = [row for row in rows if row["implementation"] == options.backend]
        if not any(row["ms"] for row in ours):
            said.append(f"none of {options.backend} has a time")
            return Verdict(FAILED, "; ".join(said))
        return Verdict(FAILED if done.code else PASSED, "; ".join(said))

    seconds = _BENCH_DRY if options.is_dry else _BEGIN
    words = ["bench", "--device", str(options.device), "--json"]
    words += ["--seconds", f"{seconds * options.patience:.0f}"]
    command = _python("steppo_kernels", *words)
    return [Task("bench", "bench", command, options.limit_of_checks, _ONE_COMPILER, judge)]


def _sanitizers(options: Options) -> list[Task]:
    limit = options.limit_of_checks
    program = _python("benchmarks.gpu.every_operator", "--device", str(options.device))
    program += ["--backend", options.backend]
    plain = Task("sanitizers", "every operator", program, limit)
    if options.is_dry:
        return [plain, Task("sanitizers", "sanitizers", why_not="their tools look at a GPU")]
    path = toolkit_program(sanitizer.PROGRAM)
    if path is None:
        why = f"{sanitizer.PROGRAM} is not on PATH, in CUDA_HOME or in /usr/local/cuda*/bin"
        return [plain, Task("sanitizers", "sanitizers", why_not=why)]
    tools = [
        Task(
            "sanitizers",
            tool,
            [*sanitizer.words(path, tool), *program],
            limit,
            sanitizer.ENVIRONMENT,
            sanitizer.judge,
        )
        for tool in sanitizer.TOOLS
    ]
    return [plain, *tools]


def _benchmarks(options: Options, limit: float) -> Task:
    options.rows.unlink(missing_ok=True)
    seconds = limit - _LAST_CASE
    words = ["--device", str(options.device), "--size", "tiny" if options.is_dry else "full"]
    words += ["--seconds", f"{seconds:.0f}", "--out", str(options.rows), "--only", options.only]
    words += ["--groups", ",".join(options.groups), "--measured", str(options.measured)]
    return Task("benchmarks", "benchmarks", _python("benchmarks.gpu.measure", *words), limit)
