"""Every Triton kernel compiles for every GPU, without one, and is what it should be."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steppo_kernels

pytest.importorskip("triton")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MODULES = [
    path.stem for path in Path(steppo_kernels.__file__).parent.glob("backends/triton/[!_]*.py")
]
LOGITS = ("token_log_probs_kernel", "token_log_probs_backward_kernel")
ASKED = ("entropy", "softcap")
DTYPES = ("bf16", "fp16", "fp32", "fp64")
# These gather rows of hidden states or of a weight.
HEAD = ("kept_head_kernel", "kept_hidden_gradient_kernel", "kept_weight_gradient_kernel")
# These walk along rows; the others gather, as the first one does if it is given a layout.
WIDE = {
    "log_ratio_sum_kernel",
    "segment_kernel",
    "segment_rows_kernel",
    "compact_kernel",
    "broadcast_kernel",
    "policy_loss_kernel",
    "policy_loss_by_token_kernel",
    "policy_loss_masked_kernel",
    "finish_policy_loss_kernel",
}


def run_tool(folder: Path, *words: str) -> Any:
    """Run `tools/compiled_kernels.py` in a process of its own, as this one may interpret Triton."""
    tools = Path(__file__).parents[2] / "tools"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(tools.parent), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(tools / "compiled_kernels.py"), *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reports(arch: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel as it is compiled for an architecture."""
    found = run_tool(tmp_path_factory.mktemp("triton"), arch)
    print("\n" + _table(found))
    return found


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys by which Triton's cache knows launches."""
    return run_tool(tmp_path_factory.mktemp("triton"))


def test_every_kernel_compiles_without_spills(reports: list[dict[str, Any]]) -> None:
    kernels = {
        name
        for module in MODULES
        for name in vars(importlib.import_module(f"steppo_kernels.backends.triton.{module}"))
        if name.endswith("_kernel")
    }
    assert {report["kernel"] for report in reports} == kernels
    assert [report for report in reports if report["spills"]] == []


def test_rows_are_loaded_128_bits_at_a_time(reports: list[dict[str, Any]]) -> None:
    wide = {report["kernel"] for report in reports if report["wide_loads"]}
    narrow = {report["kernel"] for report in reports if not report["wide_loads"]}
    assert wide >= WIDE
    assert narrow & WIDE <= {"log_ratio_sum_kernel"}


def test_logits_move_128_bits_at_a_time(reports: list[dict[str, Any]]) -> None:
    cases = dict.fromkeys(LOGITS, 0)
    for report in reports:
        kernel, wide = report["kernel"], "aligned" in report["case"]
        if kernel in cases:
            cases[kernel] += wide
            assert (report["wide_loads"] > 0) == wide, report
            # Gradients or zeros are written, those of fp32 logits perhaps as bf16.
            stores = (1 if "halved" in report["case"] else 2) * report["wide_loads"]
            stores = stores if "backward" in kernel else 0
            assert report["wide_stores"] == stores, report
    assert all(cases.values())


def test_kept_rows_move_128_bits_at_a_time(reports: list[dict[str, Any]]) -> None:
    found = [report for report in reports if report["kernel"] in HEAD]
    for report in found:
        assert (report["wide_loads"] > 0) == ("aligned" in report["case"]), report
    seen = {(each["kernel"], each["case"][0], "aligned" in each["case"]) for each in found}
    assert seen == set(itertools.product(HEAD, DTYPES, (False, True)))


def test_logits_are_compiled_with_all_that_can_be_asked(
    reports: list[dict[str, Any]], arch: str
) -> None:
    """The GPU of the account has every combination, the others every pair."""
    cases = {
        (report["kernel"], report["case"][0], *(part in report["case"] for part in ASKED))
        for report in reports
        if report["kernel"] in LOGITS and "aligned" in report["case"]
    }
    axes = LOGITS, DTYPES, (False, True), (False, True)
    together = len(axes) if arch == "sm_90" else 3
    for chosen in itertools.combinations(range(len(axes)), together):
        # The two kernels are launched together.
        if 0 in chosen:
            seen = {tuple(case[place] for place in chosen) for case in cases}
            assert seen == set(itertools.product(*(axes[place] for place in chosen)))


def test_offsets_of_tensors_have_64_bits(reports: list[dict[str, Any]]) -> None:
    """No test holds 2^31 elements: the code that would reach them is read instead."""
    narrow = {report["kernel"] for report in reports if report["narrow"]}
    # It numbers partial sums, of which there are at most 1024.
    assert narrow <= {"finish_policy_loss_kernel"}
    for report in reports:
        strides = {
            (pointer, width, scalar)
            for pointer, width, scalars in report["offsets"]
            for scalar in scalars
            if "stride" in scalar
        }
        expected = {("p_logits", "i64", "stride_b"), ("p_logits", "i64", "stride_t")}
        if "backward" in report["kernel"]:
            expected |= {("p_grad", "i64", "grad_stride_b"), ("p_grad", "i64", "grad_stride_t")}
        # The row of a token itself is read where there are gradients of its log-prob.
        own = {("p_weight", "i64", "weight_stride")} if report["kernel"] == HEAD[0] else set()
        assert strides - own == (expected if report["kernel"] in LOGITS else set()), report


@pytest.mark.parametrize("arch", ["sm_90"], indirect=True)
def test_as_many_warps_fit_as_the_account_of_an_h100_says(reports: list[dict[str, Any]]) -> None:
    """`python -m benchmarks.triton_account --write` writes the page anew."""
    page = (Path(__file__).parents[2] / "benchmarks" / "triton_account.md").read_text()
    expected = {
        (part, f"{dtype}, {rows}"): int(warps)
        for part, dtype, rows, warps in re.findall(
            r"^\| ([\w +]+) \| (\w+), (\w+) \| \d+ \| (\d+) \|",
            page.split("<!-- code -->")[1].split("<!-- end of code -->")[0],
            re.MULTILINE,
        )
    }
    seen = set()
    for report in reports:
        if report["kernel"] in LOGITS:
            rows = "aligned" if "aligned" in report["case"] else "any"
            case = report["part"], f"{report['case'][0]}, {rows}"
            if case in expected:
                seen.add(case)
                assert report["warps"] >= expected[case], report
    assert seen == {case for case in expected if case[0] != "zeros"}
    # Forward and backward of two dtypes, and backward of fp32 to bf16.
    assert len(seen) == 2 * 4 * (2 * 2 + 1)


def test_a_new_vocabulary_compiles_nothing(keys: dict[str, Any]) -> None:
    """Kernels depend on whether rows are aligned, and not on their number or strides."""
    for group in keys["logits"]:
        assert all(each == group[0] for each in group)


def test_a_new_length_compiles_nothing(keys: dict[str, Any]) -> None:
    aligned, other_aligned, ragged, other_ragged = keys["lengths"]
    assert aligned == other_aligned
    assert ragged == other_ragged


def _table(reports: list[dict[str, Any]]) -> str:
    columns = ("arch", "kernel", "case", "threads", "registers", "spills", "shared", "wide_loads")
    reports = [report | {"case": " ".join(report["case"])} for report in reports]
    rows = [[str(report[column]) for column in columns] for report in reports]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (columns, *rows)
    ]
    return "\n".join(lines)
