"""What an H100 could do with the kernels of the vocabulary level at best, from their machine code.

``python -m benchmarks.triton_account`` compiles them for sm_90, counts the instructions and bytes
of their inner loops, and prints the tables of ``triton_account.md``; with ``--write`` it puts them
there, between the comments that name them. Needs Triton but no GPU: nothing is run or timed.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.tools.disasm import get_sass

from steppo_kernels.lm_head import Head, check_chunk

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import triton_compile

_PAGE = Path(__file__).with_suffix(".md")

# H100 SXM5: the rates of its data sheet, and of the CUDA programming guide for compute capability
# 9.0 (results a clock and processor). The clock is what the tensor cores' peak implies.
_BANDWIDTH = 3.35e12
_FLOPS = 989e12
_PROCESSORS = 132
_CLOCK = _FLOPS / (_PROCESSORS * 4096)
_REGISTERS, _MOST_WARPS, _MOST_BLOCKS, _SHARED = 65536, 64, 32, 228 * 1024
_ISSUE, _ALU, _SPECIAL = 128, 64, 16
# Of a load under load: what has to be in flight for full bandwidth follows from it.
_LATENCY = 0.8e-6
# What is asked of the kernels, and what matrix products reach on this GPU (reported by others for
# cuBLAS: 684 to 769 TFLOP/s).
_MEMORY_SHARE, _PRODUCT_SHARE = 0.85, 0.74

# Instructions of the pipe that does 64 results a clock: comparisons, integers, conversions.
_ALU_NAMES = {
    "FMNMX", "FSETP", "FSEL", "FSET", "ISETP", "SEL", "IADD3", "VIADD", "LEA", "LOP3", "SHF",
    "PRMT", "PLOP3", "P2R", "R2P", "MOV", "F2FP", "I2FP", "IMNMX", "VIMNMX",
}  # fmt: skip
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_ROWS, _HIDDEN, _VOCABULARY = 8192, 4096, 151_936
_SHAPES = {"aligned": (2, 3, 4096), "any": (2, 3, 4099)}
_BRANCH = re.compile(r"(@!?U?P\d+ )?BRA\S* (?:!?U?P\w+, )?(LBB\d+)")


@dataclass(frozen=True)
class Loop:
    """An inner loop: what a thread does in one round, branches that lead over code taken."""

    names: Counter[str]
    loaded: int
    stored: int

    @property
    def instructions(self) -> int:
        """All of them: each takes a slot of the scheduler."""
        return sum(self.names.values())

    @property
    def alu(self) -> int:
        """Those of the slower pipe."""
        return sum(self.names[name] for name in _ALU_NAMES)

    @property
    def special(self) -> int:
        """Exponentials, reciprocals, roots."""
        return self.names["MUFU"]


def loops(sass: str) -> list[Loop]:
    """Return the loops of a kernel that read or write memory."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if line.startswith("LBB"):
            labels[line.rstrip(":\n")] = len(code)
        elif "\t" in line:
            code.append(line.split("\t")[1].strip())
    found = []
    for last, text in enumerate(code):
        back = _BRANCH.match(text)
        if back and labels[back[2]] < last:
            loop = _loop(code, labels, labels[back[2]], last)
            if loop.loaded or loop.stored:
                found.append(loop)
    return found


def _loop(code: list[str], labels: dict[str, int], first: int, last: int) -> Loop:
    names: Counter[str] = Counter()
    loaded = stored = 0
    at = first
    while at <= last:
        name, *marks = re.sub(r"^@!?U?P\w+ ", "", code[at]).split()[0].rstrip(";").split(".")
        names[name] += 1
        width = next((_WIDTHS[mark] for mark in marks if mark in _WIDTHS), 4)
        loaded += width if name == "LDG" else 0
        stored += width if name == "STG" else 0
        branch = _BRANCH.match(code[at])
        # The branch over the block that holds the token is taken in all blocks but one.
        skips = branch and branch[1] and at < labels[branch[2]] <= last
        at = labels[branch[2]] if branch and skips else at + 1
    return Loop(names, loaded, stored)


def warps_at_once(report: dict[str, Any]) -> int:
    """Return the warps that a processor holds of a kernel."""
    warps = report["threads"] // 32
    of_warp = 256 * math.ceil(report["registers"] / 8)
    shared = 1024 + report["shared"]
    blocks = min(
        _REGISTERS // (of_warp * warps), _MOST_WARPS // warps, _MOST_BLOCKS, _SHARED // shared
    )
    return blocks * warps


def logits_kernels() -> list[str]:
    """Return the lines of the table of the kernels that read logits."""
    lines = [
        "| kernel | logits | regs | warps / SM | widest move | KB in flight / SM "
        "| bytes | issued | ALU | MUFU | memory ms | issue ms | ALU ms | MUFU ms | bound by |",
        "|" + "---|" * 15,
    ]
    seen = set()
    for rows, shape in _SHAPES.items():
        for each in triton_compile.logits_launches(shape):
            kernel, report = triton_compile.compiled(each, "sm_90")
            case = [part for part in report["case"] if part not in ("aligned", "fp64", "fp16")]
            dtype, *extras = case or [""]
            if dtype not in ("bf16", "fp32"):
                continue
            name = "backward" if "backward" in report["kernel"] else "forward"
            for loop in loops(get_sass(kernel.asm["cubin"])):
                part = "zeros" if not loop.loaded else " + ".join([name, *reversed(extras)])
                key = part, dtype, rows
                if key not in seen:
                    seen.add(key)
                    lines.append(_line(part, f"{dtype}, {rows}", report, loop, dtype))
    return lines


def _line(part: str, logits: str, report: dict[str, Any], loop: Loop, dtype: str) -> str:
    size = {"bf16": 2, "fp32": 4}[dtype]
    elements = (loop.loaded or loop.stored) // size
    moved = (loop.loaded + loop.stored) / elements
    total = _ROWS * _VOCABULARY
    seconds = {"memory": total * moved / _BANDWIDTH}
    for name, count, rate in (
        ("issue", loop.instructions, _ISSUE),
        ("ALU", loop.alu, _ALU),
        ("MUFU", loop.special, _SPECIAL),
    ):
        seconds[name] = total * count / elements / (_PROCESSORS * _CLOCK * rate)
    warps = warps_at_once(report)
    cells = [
        part, logits, str(report["registers"]), str(warps),
        "128 bits" if report["wide_loads"] or report["wide_stores"] else f"{8 * size} bits",
        f"{warps * 32 * (loop.loaded or loop.stored) / 1024:.0f}",
        f"{moved:.0f}", f"{loop.instructions / elements:.1f}", f"{loop.alu / elements:.1f}",
        f"{loop.special / elements:.2f}",
        *(f"{1e3 * value:.2f}" for value in seconds.values()),
        max(seconds, key=seconds.__getitem__),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class Part:
    """What a part of the one-pass loss does: operations of matrix products, or bytes."""

    name: str
    formula: str
    flops: float = 0.0
    moved: float = 0.0

    def seconds(self, product_share: float, memory_share: float) -> float:
        """Return its time at these shares of the peaks."""
        return self.flops / (product_share * _FLOPS) + self.moved / (memory_share * _BANDWIDTH)


def parts(live: float, chunk: int) -> list[Part]:
    """Return the parts of the one-pass loss, bf16, `live` of whose rows have a gradient."""
    rows, hidden, vocabulary = _ROWS, _HIDDEN, _VOCABULARY
    chunks = math.ceil(rows / chunk)
    product, weight, logits = rows * hidden * vocabulary, vocabulary * hidden, rows * vocabulary
    # The product of the only chunk is the gradient, to be scaled.
    several = chunks > 1
    return [
        Part("logits = H W'", "2 M d V", flops=2 * product),
        Part("row statistics", "2 M V bytes", moved=2 * logits),
        Part("gradient rows", "4 f M V bytes", moved=4 * live * logits),
        Part("dH = dZ W", "2 f M d V", flops=2 * live * product),
        Part("dW = dZ' H", "2 f M d V", flops=2 * live * product),
        Part("... added in fp32", "(8 n - 4) V d bytes", moved=(8 * chunks - 4) * weight * several),
        Part("... its product in bf16", "4 n V d bytes", moved=4 * chunks * weight * several),
        Part("dW rounded, scaled", "10 V d bytes", moved=(10 if several else 4) * weight),
    ]


def one_pass() -> list[str]:
    """Return the lines of the table of the one-pass loss, with the chunk that a GPU gets."""
    chunk = default_chunk()
    lines = [
        f"n = {math.ceil(_ROWS / chunk)} chunks of {chunk} rows.",
        "",
        "| part | work | f = 1: peaks | f = 1: in practice | f = 0.3: peaks "
        "| f = 0.3: in practice |",
        "|---|---|---|---|---|---|",
    ]
    totals = [0.0] * 4
    for one, few in zip(parts(1.0, chunk), parts(0.3, chunk), strict=True):
        times = [
            part.seconds(*shares)
            for part in (one, few)
            for shares in ((1.0, 1.0), (_PRODUCT_SHARE, _MEMORY_SHARE))
        ]
        totals = [total + time for total, time in zip(totals, times, strict=True)]
        lines.append(_row(one.name, one.formula, times))
    return [*lines, _row("**total**", "", totals)]


def _row(name: str, formula: str, times: list[float]) -> str:
    return f"| {name} | {formula} | " + " | ".join(f"{1e3 * time:.1f} ms" for time in times) + " |"


def chunks() -> list[str]:
    """Return the lines of the table of chunk sizes."""
    lines = [
        "| rows of a chunk | logits of a chunk | f = 1: peaks | f = 1: in practice "
        "| f = 0.3: peaks | f = 0.3: in practice |",
        "|---|---|---|---|---|---|",
    ]
    for chunk in (512, 1024, 2048, default_chunk(), _ROWS):
        times = [
            sum(part.seconds(*shares) for part in parts(live, chunk))
            for live in (1.0, 0.3)
            for shares in ((1.0, 1.0), (_PRODUCT_SHARE, _MEMORY_SHARE))
        ]
        size = f"{2 * chunk * _VOCABULARY / 2**30:.2f} GiB"
        lines.append(_row(str(chunk), size, times))
    return lines


def changes() -> list[str]:
    """Return the lines of the table of what would make the one-pass loss faster, step by step."""
    steps: list[tuple[str, set[str]]] = [
        ("as it is", set()),
        ("dW's products add to it themselves, in fp32", {"... added", "... its product"}),
        ("rounding also scales it", {"dW rounded"}),
    ]
    lines = ["| change, with those above | f = 1: in practice | f = 0.3 |", "|---|---|---|"]
    without: set[str] = set()
    for name, removed in steps:
        without |= removed
        times = []
        for live in (1.0, 0.3):
            seconds = sum(
                part.seconds(_PRODUCT_SHARE, _MEMORY_SHARE)
                for part in parts(live, default_chunk())
                if not part.name.startswith(tuple(without))
            )
            if "dW rounded" in without:
                # Still read in fp32 and written in bf16.
                rounded = Part("", "", moved=6 * _VOCABULARY * _HIDDEN)
                seconds += rounded.seconds(_PRODUCT_SHARE, _MEMORY_SHARE)
            times.append(f"{1e3 * seconds:.1f} ms")
        lines.append(f"| {name} | {times[0]} | {times[1]} |")
    return [*lines, "| target | 52 ms | 28 ms |"]


def default_chunk() -> int:
    """Return the rows of a chunk on a GPU if none are given."""
    weight = torch.empty((_VOCABULARY, _HIDDEN), dtype=torch.bfloat16, device="meta")
    return check_chunk(None, _ROWS, Head(weight, None, None, 1.0, 0.0, "triton"))


def device() -> list[str]:
    """Return the lines of what is assumed of the GPU."""
    need = _BANDWIDTH / _PROCESSORS * _LATENCY / 1024
    slots = _PROCESSORS * _CLOCK * _ISSUE / (_BANDWIDTH * _MEMORY_SHARE / 2)
    once = 2 * _ROWS * _VOCABULARY / (_MEMORY_SHARE * _BANDWIDTH)
    return [
        f"- memory {_BANDWIDTH / 1e12:.2f} TB/s, bf16 products {_FLOPS / 1e12:.0f} TFLOP/s, "
        f"{_PROCESSORS} SMs, {_CLOCK / 1e9:.2f} GHz (what that peak implies)",
        f"- a clock and SM: {_ISSUE} results issued, at most {_ALU} of them of the ALU pipe "
        f"(comparisons, integers, conversions), {_SPECIAL} of MUFU (exponentials)",
        f"- with a latency of {1e6 * _LATENCY:.1f} us under load, {need:.0f} KB in flight an SM "
        "keep the memory busy",
        f"- at {_MEMORY_SHARE:.0%} of the bandwidth, a bf16 logit that is read once leaves "
        f"{slots:.0f} instructions, one that is also written {2 * slots:.0f}",
        f"- the target, {_MEMORY_SHARE:.0%} of it at {_ROWS} x {_VOCABULARY} in bf16, is "
        f"{1e3 * once:.2f} ms forward and {2e3 * once:.2f} ms backward",
    ]


_TABLES = {
    "device": device, "kernels": logits_kernels, "one pass": one_pass, "chunks": chunks,
    "changes": changes,
}  # fmt: skip


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {_PAGE.name}")
    write = parser.parse_args().write
    page = _PAGE.read_text() if write else ""
    for name, table in _TABLES.items():
        text = "\n".join(table())
        print(f"{name}\n\n{text}\n")
        if write:
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, rest = page.split(begin)
            page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    if write:
        _PAGE.write_text(page)


if __name__ == "__main__":
    main()
