"""What an H100 could do with the kernels of the vocabulary level at best, from their machine code.

``python -m benchmarks.triton_account`` compiles them for sm_90, counts the instructions and bytes
of their inner loops, and prints the numbers of ``triton_account.md``; with ``--write`` it puts them
there, between the comments that name them. Needs Triton but no GPU: nothing is run or timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.tools.disasm import get_sass

from steppo_kernels.log_probs import lm_head

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import compiled_kernels

_PAGE = Path(__file__).with_suffix(".md")

# H100 SXM5: the rates of its data sheet, and of the CUDA programming guide for compute capability
# 9.0 (results a clock and processor). The clock is what the tensor cores' peak implies.
_BANDWIDTH = 3.35e12
_MEMORY = 80 * 10**9
_FLOPS = 989e12
_PROCESSORS = 132
_CLOCK = _FLOPS / (_PROCESSORS * 4096)
_RATES = {"issue": 128, "ALU": 64, "MUFU": 16, "LSU": 32}
_SECTOR = 32
# Assumed: how long a load takes when the memory is busy, at best and at worst. What has to be in
# flight for full bandwidth follows from it.
_LATENCIES = 0.8e-6, 1.3e-6
# What is asked of the kernels, and of the one-pass loss by the share of rows with a gradient.
_MEMORY_SHARE = 0.85
_TARGETS = {1.0: 52e-3, 0.3: 28e-3}
# What matrix products reach on this GPU (reported by others for cuBLAS: 684 to 769 TFLOP/s).
_PRODUCT_SHARE = 0.74

# Instructions of the pipe that does 64 results a clock: comparisons, integers, conversions.
_ALU_NAMES = {
    "FMNMX",
    "FSETP",
    "FSEL",
    "FSET",
    "ISETP",
    "SEL",
    "IADD3",
    "VIADD",
    "LEA",
    "LOP3",
    "SHF",
    "PRMT",
    "PLOP3",
    "P2R",
    "R2P",
    "MOV",
    "F2FP",
    "I2FP",
    "IMNMX",
    "VIMNMX",
}
# Operations on floating-point numbers; comparisons, selections and conversions are none.
_OPERATIONS = {"FADD": 1, "FMUL": 1, "FFMA": 2, "FMNMX": 1, "MUFU": 1}
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_ROWS, _HIDDEN, _VOCABULARY = 8192, 4096, 151_936
_SHAPES = {"aligned": (2, 3, 4096), "any": (2, 3, 4099)}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SIZES = {"*bf16": 2, "*fp32": 4, "*fp64": 8, "*i64": 8, "*i1": 1}
# What a row without a gradient reads to know it.
_READ_BY_ZEROS = {"p_mask", "p_rows", "p_grad_log_probs", "p_grad_entropy"}
# Rows of a chunk where the changes are accounted for: with the default there is one chunk.
_SMALL_CHUNK = 2048
_BRANCH = re.compile(r"(@!?U?P\d+ )?BRA\S* (?:!?U?P\w+, )?(LBB\d+)")


@dataclass(frozen=True)
class Loop:
    """An inner loop: what a thread does in one round, branches that lead over code taken.

    Attributes:
        names: instructions.
        loads, stores: those of global memory, by their bytes.
    """

    names: Counter[str]
    loads: Counter[int]
    stores: Counter[int]

    @property
    def loaded(self) -> int:
        """Bytes."""
        return sum(width * count for width, count in self.loads.items())

    @property
    def stored(self) -> int:
        """Bytes."""
        return sum(width * count for width, count in self.stores.items())

    @property
    def counts(self) -> dict[str, int]:
        """Instructions by what limits them; all of them take a slot of a scheduler."""
        return {
            "issue": sum(self.names.values()),
            "ALU": sum(self.names[name] for name in _ALU_NAMES),
            "MUFU": self.names["MUFU"],
            "LSU": sum(self.loads.values()) + sum(self.stores.values()),
        }

    @property
    def operations(self) -> int:
        """Operations on floating-point numbers."""
        return sum(self.names[name] * each for name, each in _OPERATIONS.items())


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
            if loop.loads or loop.stores:
                found.append(loop)
    return found


def _loop(code: list[str], labels: dict[str, int], first: int, last: int) -> Loop:
    names: Counter[str] = Counter()
    moves: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    at = first
    while at <= last:
        name, *marks = re.sub(r"^@!?U?P\w+ ", "", code[at]).split()[0].rstrip(";").split(".")
        names[name] += 1
        if name in moves:
            moves[name][next((_WIDTHS[mark] for mark in marks if mark in _WIDTHS), 4)] += 1
        branch = _BRANCH.match(code[at])
        # The branch over the block that holds the token is taken in all blocks but one.
        skips = branch and branch[1] and at < labels[branch[2]] <= last
        at = labels[branch[2]] if branch and skips else at + 1
    return Loop(names, moves["LDG"], moves["STG"])


@dataclass(frozen=True)
class Kernel:
    """A kernel that reads logits, or the part of one that zeros rows.

    Attributes:
        part: what it does.
        dtype, rows: of the logits; whether rows are aligned.
        registers, threads, warps: of a thread; of a program; that a processor holds at once.
        loop: its inner loop.
        row_bytes: what a row moves beside its logits, if it carries all it can.
    """

    part: str
    dtype: str
    rows: str
    registers: int
    threads: int
    warps: int
    loop: Loop
    row_bytes: int

    @property
    def logits(self) -> int:
        """Logits of a thread in one round."""
        return (self.loop.loaded or self.loop.stored) // _DTYPES[self.dtype].itemsize

    @property
    def moved(self) -> float:
        """Bytes of a row."""
        each = (self.loop.loaded + self.loop.stored) / self.logits
        return _VOCABULARY * each + self.row_bytes

    @property
    def operations(self) -> float:
        """Operations of a row."""
        return _VOCABULARY * self.loop.operations / self.logits

    @property
    def seconds(self) -> dict[str, float]:
        """Times of all rows if one limit were the only one."""
        all_logits = _ROWS * _VOCABULARY / self.logits
        return {"memory": _ROWS * self.moved / _BANDWIDTH} | {
            name: all_logits * count / (_PROCESSORS * _CLOCK * _RATES[name])
            for name, count in self.loop.counts.items()
        }

    @property
    def in_flight(self) -> int:
        """Bytes that a processor's warps ask for at once."""
        return 32 * self.warps * self.loop.loaded

    def shares(self, latency: float) -> dict[str, float]:
        """Return the share of the bandwidth that each other limit leaves, with this latency.

        Between its loads a warp at least issues its instructions. Nothing waits for stores.
        """
        seconds = self.seconds
        memory = seconds.pop("memory")
        found = {"memory": 1.0} | {name: memory / each for name, each in seconds.items() if each}
        if self.in_flight:
            rate = self.in_flight / (latency + self.loop.counts["issue"] / _CLOCK)
            both = (self.loop.loaded + self.loop.stored) / self.loop.loaded
            found["latency"] = _PROCESSORS * rate * both / _BANDWIDTH
        return found

    def share(self, latency: float) -> float:
        """Return the least of them."""
        return min(self.shares(latency).values())

    @property
    def worst_share(self) -> float:
        """The share with the long latency, and no cache between warps.

        A warp's neighbouring logits then are one sector more if they do not begin at one.
        """
        width = 32 * min(self.loop.loads or self.loop.stores)
        extra = 1 if self.rows == "aligned" else 1 + _SECTOR / width
        return min(self.share(_LATENCIES[1]), 1 / extra)

    @property
    def verdict(self) -> str:
        """Whether the share that is asked for is met on paper."""
        if self.share(_LATENCIES[0]) < _MEMORY_SHARE:
            return "no"
        return "yes" if self.worst_share >= _MEMORY_SHARE else "doubtful"


@functools.cache
def logits_kernels() -> list[Kernel]:
    """Compile the kernels that read logits."""
    found: dict[tuple[str, str, str], Kernel] = {}
    for (rows, shape), (dtype, torch_dtype) in itertools.product(_SHAPES.items(), _DTYPES.items()):
        # Of a head in bf16, logits are fp32 and gradients bf16.
        halves = (False, True) if dtype == "fp32" else (False,)
        for halved, softcap, entropy in itertools.product(halves, (False, True), (False, True)):
            call = functools.partial(
                compiled_kernels.logits,
                shape,
                torch_dtype,
                entropy=entropy,
                softcap=softcap,
                halved=halved,
            )
            for each in compiled_kernels.recorded(call):
                kernel, report = compiled_kernels.compiled(each, "sm_90")
                source, *_ = compiled_kernels.specialized(each, compiled_kernels.TARGETS["sm_90"])
                carried = {
                    name: _SIZES[kind]
                    for name, kind in source.signature.items()
                    if kind in _SIZES and name not in ("p_logits", "p_grad")
                }
                name = report["part"]
                for loop in loops(get_sass(kernel.asm["cubin"])):
                    part, row = name, sum(carried.values())
                    if not loop.loads:
                        part = "zeros"
                        row = sum(carried[key] for key in carried.keys() & _READ_BY_ZEROS)
                    new = Kernel(
                        part,
                        dtype,
                        rows,
                        report["registers"],
                        report["threads"],
                        report["warps"],
                        loop,
                        row,
                    )
                    found.setdefault((part, dtype, rows), new)
    order = [part for part, *_ in found]
    return sorted(found.values(), key=lambda each: (each.rows, each.dtype, order.index(each.part)))


def code() -> list[str]:
    """Return the lines of the table of what the kernels are compiled to."""
    lines = _header(
        "kernel",
        "logits",
        "registers",
        "warps / SM",
        "loads",
        "stores",
        "KB in flight / SM",
        "operations",
        "instructions",
        "ALU",
        "MUFU",
    )
    for each in logits_kernels():
        counts = each.loop.counts
        moves = [
            " + ".join(f"{count} x {8 * width} bits" for width, count in sorted(found.items()))
            or "none"
            for found in (each.loop.loads, each.loop.stores)
        ]
        lines.append(
            _cells(
                each.part,
                f"{each.dtype}, {each.rows}",
                each.registers,
                each.warps,
                *moves,
                f"{each.in_flight / 1024:.0f}",
                f"{each.loop.operations / each.logits:.1f}",
                *(f"{counts[name] / each.logits:.1f}" for name in ("issue", "ALU")),
                f"{counts['MUFU'] / each.logits:.2f}",
            )
        )
    return lines


def tokens() -> list[str]:
    """Return the lines of the table of what a token costs."""
    lines = _header(
        "kernel",
        "logits",
        "bytes",
        "operations",
        "instructions",
        *(f"{name} ms" for name in ("memory", *_RATES)),
        "bound by",
        "bandwidth",
        f"{_MEMORY_SHARE:.0%} met",
    )
    for each in logits_kernels():
        seconds, shares = each.seconds, each.shares(_LATENCIES[0])
        instructions = _VOCABULARY * each.loop.counts["issue"] / each.logits
        lines.append(
            _cells(
                each.part,
                f"{each.dtype}, {each.rows}",
                f"{each.moved:,.0f}",
                f"{each.operations / 1e6:.2f} M",
                f"{instructions / 1e6:.2f} M",
                *(f"{1e3 * value:.2f}" for value in seconds.values()),
                min(shares, key=shares.__getitem__),
                f"{min(shares.values()):.0%}",
                each.verdict,
            )
        )
    return lines


def targets() -> list[str]:
    """Return the lines that say where the target of the kernels is met."""
    lines = []
    for verdict, text in (
        ("yes", "met on paper"),
        ("doubtful", "doubtful: met with the short latency and caches that merge sectors"),
        ("no", "missed on paper"),
    ):
        lines.append(f"- **{text}**:")
        for dtype, rows in itertools.product(_DTYPES, _SHAPES):
            found = [
                each
                for each in logits_kernels()
                if (each.dtype, each.rows, each.verdict) == (dtype, rows, verdict)
            ]
            if found:
                names = ", ".join(
                    f"{each.part} ({each.share(_LATENCIES[0]):.0%})"
                    if verdict == "no"
                    else f"{each.part} ({each.worst_share:.0%} at worst)"
                    if verdict == "doubtful"
                    else each.part
                    for each in found
                )
                lines.append(f"    - {dtype}, {rows}: {names}")
        if lines[-1].endswith("**:"):
            lines[-1] += " none"
    programs = [_PROCESSORS * each.warps * 32 // each.threads for each in logits_kernels()]
    lines.append(
        f"- a program a row: fewer rows than {min(programs)} to "
        f"{max(programs)}, by the kernel, do not fill the GPU once"
    )
    return lines


@dataclass(frozen=True)
class Part:
    """What a part of the one-pass loss does, as sums of products of the page's letters.

    Attributes:
        name: what it is.
        work: operations of matrix products.
        moved: bytes; those of a product move while it computes.
        vector: operations of a token outside of products.
    """

    name: str
    work: str
    moved: str
    vector: float = 0.0

    def operations(self, sizes: dict[str, float]) -> float:
        """Return how many there are."""
        return _amount(self.work, sizes) + self.vector * sizes["M"]

    def bytes(self, sizes: dict[str, float]) -> float:
        """Return how many it moves."""
        return _amount(self.moved, sizes)

    def seconds(self, sizes: dict[str, float], product: float, memory: float) -> float:
        """Return its time at these shares of the peaks."""
        computes = _amount(self.work, sizes) / (product * _FLOPS)
        return max(computes, self.bytes(sizes) / (memory * _BANDWIDTH))


def _amount(work: str, sizes: dict[str, float]) -> float:
    """Return what a formula such as "2 f M V + 4 V d" comes to."""
    return sum(
        math.prod(sizes[factor] if factor in sizes else float(factor) for factor in term.split())
        for term in work.split(" + ")
        if term
    )


def sizes_of(live: float, chunk: int) -> dict[str, float]:
    """Return what the letters of formulas stand for."""
    return {
        "M": _ROWS,
        "d": _HIDDEN,
        "V": _VOCABULARY,
        "f": live,
        "n": math.ceil(_ROWS / chunk),
        "s": math.ceil(_VOCABULARY / lm_head._SLICE),
    }


def parts(live: float, chunk: int, changed: int = 0) -> list[Part]:
    """Return the parts of the one-pass loss in bf16, with the first `changed` changes made."""
    chunks = math.ceil(_ROWS / chunk)
    vector = {
        each.part: each.operations
        for each in logits_kernels()
        if (each.dtype, each.rows) == ("fp32", "aligned")
    }
    found = [
        Part("logits = H W'", "2 M d V", "2 n V d + 2 M d + 4 M V"),
        Part("row statistics", "", "4 M V", vector["forward"]),
        Part("gradient rows", "", "6 f M V", live * vector["backward + halved"]),
        Part("dH = dZ W", "2 f M d V", "2 f M V + 2 n V d + 2 f M d"),
    ]
    read = "2 f M V + 2 s f M d"
    if chunks == 1:
        return [
            *found,
            Part("dW = dZ' H", "2 f M d V", f"{read} + 2 V d"),
            Part("dW scaled", "", "4 V d"),
        ]
    # The first product is written, the others are added to what is read.
    summed = f"{8 * chunks - 4} V d"
    if changed:
        found.append(Part("dW += dZ' H", "2 f M d V", f"{read} + {summed}"))
    else:
        found += [
            Part("dW = dZ' H", "2 f M d V", read),
            Part("... its product in bf16", "", "4 n V d"),
            Part("... added in fp32", "", summed),
        ]
    return [*found, Part("dW rounded, scaled", "", "6 V d" if changed > 1 else "10 V d")]


def _times(chunk: int, changed: int = 0) -> list[list[float]]:
    """Return the times of each part: by f, at the peaks and in practice."""
    shares = ((1.0, 1.0), (_PRODUCT_SHARE, _MEMORY_SHARE))
    columns = [
        [part.seconds(sizes_of(live, chunk), *share) for part in parts(live, chunk, changed)]
        for live in _TARGETS
        for share in shares
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _totals(chunk: int, changed: int = 0) -> list[float]:
    return [sum(column) for column in zip(*_times(chunk, changed), strict=True)]


def one_pass() -> list[str]:
    """Return the lines of the table of the one-pass loss, with the chunk that a GPU gets."""
    chunk = default_chunk()
    sizes = sizes_of(1.0, chunk)
    lines = [
        f"n = {sizes['n']} of {chunk} rows, s = {sizes['s']}; KB are thousands of bytes.",
        "",
        *_header(
            "part",
            "operations",
            "bytes",
            "operations a token, f = 1",
            "bytes a token, f = 1",
            *_COLUMNS,
        ),
    ]
    found = parts(1.0, chunk)
    for part, times in zip(found, _times(chunk), strict=True):
        lines.append(
            _cells(
                part.name,
                part.work or "none in products",
                part.moved,
                *_a_token([part], sizes),
                *_milliseconds(times),
            )
        )
    lines.append(
        _cells("**total**", "", "", *_a_token(found, sizes), *_milliseconds(_totals(chunk)))
    )
    few = sizes_of(0.3, chunk)
    operations, moved = _a_token(parts(0.3, chunk), few)
    totals = _totals(chunk)[1::2]
    met = ", ".join(
        f"f = {live:g}: {1e3 * total:.1f} ms of {1e3 * target:.0f} ms, "
        + ("met" if total <= target else "missed")
        for (live, target), total in zip(_TARGETS.items(), totals, strict=True)
    )
    return [
        *lines,
        "",
        f"A token takes {operations} operations and moves {moved} at f = 0.3.",
        f"Targets, in practice, on paper: {met}.",
    ]


def _a_token(found: list[Part], sizes: dict[str, float]) -> tuple[str, str]:
    """Return operations and bytes of a token."""
    operations = sum(part.operations(sizes) for part in found) / _ROWS
    moved = sum(part.bytes(sizes) for part in found) / _ROWS
    return f"{operations / 1e6:,.1f} M", f"{moved / 1e3:,.0f} KB"


def chunks() -> list[str]:
    """Return the lines of the table of chunk sizes."""
    lines = _header("rows of a chunk", "n", "logits of a chunk", *_COLUMNS)
    for chunk in sorted({512, 1024, _SMALL_CHUNK, default_chunk()}):
        size = f"{4 * chunk * _VOCABULARY / 2**30:.2f} GiB"
        lines.append(_cells(chunk, math.ceil(_ROWS / chunk), size, *_milliseconds(_totals(chunk))))
    return lines


def changes() -> list[str]:
    """Return the lines of the table of what would make several chunks cheaper, step by step."""
    lines = _header(f"{_SMALL_CHUNK} rows, change, with those above", *_COLUMNS)
    for changed, name in enumerate(
        (
            "as it is",
            "dW's products add to it themselves, in fp32",
            "rounding also scales it",
        )
    ):
        lines.append(_cells(name, *_milliseconds(_totals(_SMALL_CHUNK, changed))))
    targets = (cell for target in _TARGETS.values() for cell in ("", f"{1e3 * target:.0f} ms"))
    return [*lines, _cells("target", *targets)]


_COLUMNS = [f"f = {live:g}: {how}" for live in _TARGETS for how in ("peaks", "in practice")]


def _header(*names: str) -> list[str]:
    return [_cells(*names), "|" + "---|" * len(names)]


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _milliseconds(times: list[float]) -> list[str]:
    return [f"{1e3 * time:.1f} ms" for time in times]


def default_chunk() -> int:
    """Return the rows of a chunk on a GPU if none are given."""
    weight = torch.empty((_VOCABULARY, _HIDDEN), dtype=torch.bfloat16, device="meta")
    head = lm_head.Head(weight, None, None, 1.0, 0.0, "triton")
    return min(_ROWS, lm_head.rows_within(_MEMORY // lm_head._GPU_SHARE, head))


def device() -> list[str]:
    """Return the lines of what is assumed."""
    short, long = (_BANDWIDTH / _PROCESSORS * each / 1024 for each in _LATENCIES)
    slots = _PROCESSORS * _CLOCK * _RATES["issue"] / (_BANDWIDTH * _MEMORY_SHARE / 2)
    once = 2 * _ROWS * _VOCABULARY / (_MEMORY_SHARE * _BANDWIDTH)
    return [
        f"- M = {_ROWS}, d = {_HIDDEN}, V = {_VOCABULARY:,}, bf16 where nothing else is said",
        f"- data sheet: {_MEMORY / 1e9:.0f} GB at {_BANDWIDTH / 1e12:.2f} TB/s, bf16 products "
        f"{_FLOPS / 1e12:.0f} TFLOP/s, {_PROCESSORS} SMs, {_CLOCK / 1e9:.2f} GHz (what that peak "
        "implies)",
        f"- a clock and SM: {_RATES['issue']} results issued, at most {_RATES['ALU']} of them of "
        f"the ALU pipe (comparisons, integers, conversions), {_RATES['MUFU']} of MUFU "
        f"(exponentials), {_RATES['LSU']} loads or stores (LSU)",
        f"- assumed, not of the data sheet: a load takes {1e6 * _LATENCIES[0]:.1f} to "
        f"{1e6 * _LATENCIES[1]:.1f} us under load, so that {short:.0f} to {long:.0f} KB in flight "
        "an SM keep the memory busy",
        f"- *in practice*: products at {_PRODUCT_SHARE:.0%} of the peak, which others report for "
        f"cuBLAS, the rest at {_MEMORY_SHARE:.0%} of the bandwidth",
        f"- at {_MEMORY_SHARE:.0%} of the bandwidth, a bf16 logit that is read once leaves "
        f"{slots:.0f} instructions, one that is also written {2 * slots:.0f}",
        f"- the target, {_MEMORY_SHARE:.0%} of it at {_ROWS} x {_VOCABULARY} in bf16, is "
        f"{1e3 * once:.2f} ms forward and {2e3 * once:.2f} ms backward",
    ]


_TABLES = {
    "device": device,
    "code": code,
    "tokens": tokens,
    "targets": targets,
    "one pass": one_pass,
    "chunks": chunks,
    "changes": changes,
}


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
