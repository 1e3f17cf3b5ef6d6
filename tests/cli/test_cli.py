"""The command line: what it prints, what it exits with."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import steppo_kernels
from steppo_kernels.backends import choice, modules
from steppo_kernels.cli import main
from steppo_kernels.cli import validate as validation


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize("command", [(), ("info",), ("validate",), ("bench",), ("demo",)])
def test_help_says_what_a_command_is_for(command):
    found = run(*command, "--help")
    assert found.exit_code == 0
    text = " ".join(found.output.split())
    expected = {
        (): "info validate bench demo",
        ("info",): "or why not",
        ("validate",): "against the fp64 reference",
        ("bench",): "next to plain PyTorch and torch.compile",
        ("demo",): "Train a small agent",
    }[command]
    assert all(word in text for word in expected.split())


def test_version():
    found = run("--version")
    assert found.exit_code == 0
    assert found.output.split() == ["steppo-kernels", steppo_kernels.__version__]


def test_package_does_not_import_the_command_line():
    # What torch may import by itself does not count.
    code = (
        "import sys, torch; before = set(sys.modules); import steppo_kernels;"
        "print({'typer', 'rich', 'steppo_kernels.cli'} & (set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_module_is_the_command():
    command = [sys.executable, "-m", "steppo_kernels", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert steppo_kernels.__version__ in found.stdout


def test_info_names_every_backend_and_device():
    found = run("info")
    assert found.exit_code == 0
    for word in ("reference", "cpu", "triton", "cuda", torch.__version__, "threads"):
        assert word in found.output


def test_info_as_json_agrees_with_the_dispatch():
    found = json.loads(run("info", "--json").output)
    assert found["versions"]["steppo-kernels"] == steppo_kernels.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    cpu = torch.device("cpu")
    for name, backend in found["backends"].items():
        assert ("cpu" in backend["devices"]) == (choice.unavailable(name, cpu) is None)
        assert backend["available"] == (backend["why_not"] is None)
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["auto"] == choice.resolve("auto", cpu)


def test_info_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(choice, "unavailable", _only_the_reference)
    found = run("info")
    assert found.exit_code == 0
    assert "no compiler was found" in found.output


def test_info_shows_the_words_of_a_compiler_as_they_are(monkeypatch):
    said = "error: [/no] unused variable [-Werror]"
    monkeypatch.setattr(
        choice, "unavailable", lambda name, _: None if name == "reference" else said
    )
    assert said in run("info").output


def test_info_names_the_instruction_set(monkeypatch):
    module = types.SimpleNamespace(
        isa=lambda: "abacus", isas=lambda: "baseline, abacus", compiler=lambda: "hand 1.0"
    )
    found = json.loads(_info_of("cpu", module, monkeypatch, "--json"))["backends"]["cpu"]["details"]
    assert (found["instruction_set"], found["compiler"]) == ("abacus", "hand 1.0")
    assert "baseline" in found["compiled_for"]


def test_info_names_what_the_cuda_kernels_were_built_for(monkeypatch):
    module = types.SimpleNamespace(
        on_host=False,
        architectures="80 90+PTX",
        compiler="nvcc 13.0.88",
        versions=lambda: (13020, 12080),
    )
    found = json.loads(_info_of("cuda", module, monkeypatch, "--json"))["backends"]["cuda"]
    assert found["details"] == {
        "compiled_for": ["80", "90+PTX"],
        "compiler": "nvcc 13.0.88",
        "built_with_cuda": "12.8",
        "driver_runs_cuda": "13.2",
    }
    shown = " ".join(_info_of("cuda", module, monkeypatch).replace("│", " ").split())
    assert "driver runs cuda 13.2" in shown


def test_info_says_that_the_cuda_kernels_are_those_of_tests(monkeypatch):
    module = types.SimpleNamespace(on_host=True)
    assert "on the host by tests" in _info_of("cuda", module, monkeypatch)


def _info_of(backend: str, module: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What `info` prints where one backend runs, whose module is another."""
    monkeypatch.setattr(
        choice, "unavailable", lambda name, _: None if name == backend else "no compiler was found"
    )
    monkeypatch.setattr(modules, "module_of", {backend: module}.__getitem__)
    # `auto` was resolved with the modules that are there.
    monkeypatch.setattr(choice, "resolve", lambda name, device: backend)
    found = run("info", *words)
    assert found.exit_code == 0, found.output
    return found.output


def _only_the_reference(name: str, device: torch.device) -> str | None:
    return None if name == "reference" else "no compiler was found"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("operation", dict.fromkeys(case.operation for case in validation.CASES))
def test_validate_passes(backend, operation):
    if why := choice.unavailable(backend, torch.device("cpu")):
        pytest.skip(f"{backend}: {why}")
    words = "validate", "--seed", "5", "--backend", backend, "--operation", operation
    # All kinds of batches in one dtype, and all dtypes on one kind.
    for more in (("--dtype", "float32"), ("--batches", "1")):
        found = run(*words, "--device", "cpu", *more)
        assert found.exit_code == 0, found.output
        assert "all ok" in found.output
        assert "MISS" not in found.output


def test_validate_passes_where_kernels_are_interpreted():
    cpu = torch.device("cpu")
    if why := choice.unavailable("triton", cpu):
        pytest.skip(f"triton: {why}")
    # One call of each operation, with a seed of small batches: kernels run in Python here.
    cases = {case.operation: case for case in validation.CASES}.values()
    rows = validation.validate(cases, ["triton"], cpu, seed=243, batches=1, dtypes=(torch.float32,))
    assert [row for row in rows if not row.ok] == []
    assert len(rows) == len(cases)


if torch.cuda.is_available():

    @pytest.mark.gpu
    def test_validate_passes_on_a_gpu():
        # Triton compiles each variant anew, and there is no time for all of them.
        found = run("validate", "--seed", "5", "--device", "cuda", "--seconds", "20")
        assert found.exit_code == 0, found.output


def test_validate_draws_a_fresh_seed_and_shows_it():
    words = "validate", "--backend", "reference", "--operation", "from_rows", "--json"
    one, other = (json.loads(run(*words).output) for _ in range(2))
    assert one["seed"] != other["seed"]
    again = json.loads(run(*words, "--seed", str(one["seed"])).output)
    assert again == one


def test_validate_as_json():
    found = json.loads(
        run(
            "validate",
            "--backend",
            "reference",
            "--operation",
            "step_gae",
            "--json",
            "--seed",
            "1",
            "--batches",
            "2",
        ).output
    )
    assert found["ok"] is True
    assert (found["seed"], found["batches"]) == (1, 2)
    assert [row["dtype"] for row in found["rows"]] == ["float64", "float32", "bfloat16", "float16"]
    assert all(row["ok"] and row["error"] <= row["bound"] for row in found["rows"])


def test_validate_verbose_shows_each_way_to_call():
    words = "validate", "--backend", "reference", "--operation", "step_gae", "--batches", "1"
    assert run(*words).output.count("step_gae") == 4
    assert run(*words, "-v").output.count("step_gae") == 16


def test_validate_says_that_no_native_backend_was_checked(monkeypatch):
    monkeypatch.setattr(choice, "unavailable", _only_the_reference)
    found = run("validate", "--operation", "step_gae", "--batches", "1")
    assert found.exit_code == 0
    assert "No native backend was checked" in found.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("validate", "--backend", "abacus"), "expected one of auto, reference, cpu"),
        (("validate", "--backend", "auto"), "it picks one"),
        (("validate", "--device", "toaster"), "expected one of cpu"),
        (("validate", "--device", "cuda:99"), "expected one of cpu"),
        (("validate", "--operation", "abacus"), "expected part of one of"),
        (("validate", "--dtype", "int8"), "expected one of float64"),
        (("validate", "--batches", "0"), "Invalid value for '--batches'"),
        (("bench", "--backend", "abacus"), "expected one of auto, reference, cpu"),
        (("bench", "--device", "toaster"), "expected one of cpu"),
        (("bench", "--operation", "abacus"), "expected part of one of"),
        (("bench", "--seconds", "0"), "Invalid value for '--seconds'"),
        (("demo", "--backend", "abacus"), "expected one of auto, reference, cpu"),
        (("demo", "--seeds", "2"), "got it without --compare"),
        (("abacus",), "No such command"),
    ],
)
def test_what_is_unknown_is_refused(words, expected):
    found = run(*words)
    assert found.exit_code == 2
    # The message stands in a frame that may break its lines.
    text = " ".join(found.output.replace("│", " ").split())
    assert expected in text


def test_a_backend_that_does_not_run_here_is_refused(monkeypatch):
    monkeypatch.setattr(choice, "why_not_cuda", lambda: "torch sees no GPU")
    for command in ("validate", "bench", "demo"):
        found = run(command, "--backend", "cuda")
        assert found.exit_code == 2
        assert "does not run here" in " ".join(found.output.replace("│", " ").split())


def _fake_demo(monkeypatch, run_demo) -> None:
    module = types.SimpleNamespace(run_demo=run_demo)
    original = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *rest, **more: (
            module if name == "steppo_kernels.demo" else original(name, *rest, **more)
        ),
    )


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    seen = {}
    _fake_demo(monkeypatch, lambda **options: seen.update(options))
    found = run(
        "demo",
        "--out",
        str(tmp_path),
        "--seed",
        "3",
        "--seeds",
        "2",
        "--compare",
        "--backend",
        "reference",
    )
    assert found.exit_code == 0, found.output
    assert seen == {
        "out_dir": tmp_path,
        "seed": 3,
        "seeds": 2,
        "compare": True,
        "backend": "reference",
    }


def test_demo_by_default_writes_beside_the_caller(monkeypatch):
    seen = {}
    _fake_demo(monkeypatch, lambda **options: seen.update(options))
    assert run("demo").exit_code == 0
    assert seen["out_dir"] == Path("demo_out")
    assert (seen["backend"], seen["compare"]) == ("auto", False)


def test_demo_says_where_it_cannot_write(monkeypatch, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("")
    _fake_demo(monkeypatch, lambda out_dir, **_: out_dir.mkdir(parents=True, exist_ok=True))
    for out in (taken, taken / "folder"):
        found = run("demo", "--out", str(out))
        assert found.exit_code == 2
        assert "--out" in found.output


def test_demo_without_its_packages_says_how_to_get_them(monkeypatch):
    def run_demo(**options: object) -> None:
        raise ModuleNotFoundError("No module named 'gymnasium'", name="gymnasium.spaces")

    _fake_demo(monkeypatch, run_demo)
    found = run("demo")
    assert found.exit_code == 1
    assert "gymnasium" in found.output
    assert "pip install '.[demo]'" in found.output
