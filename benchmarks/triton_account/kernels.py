"""The kernels that read logits, compiled for sm_90, and what limits each of them."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

from triton.tools.disasm import get_sass

from .assumptions import (
    BANDWIDTH,
    CLOCK,
    DTYPES,
    LATENCIES,
    MEMORY_SHARE,
    PROCESSORS,
    RATES,
    ROWS,
    SECTOR,
    SHAPES,
    VOCABULARY,
)
from .machine_code import Loop, loops

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import compiled_kernels

SIZES = {"*bf16": 2, "*fp32": 4, "*fp64": 8, "*i64": 8, "*i1": 1}
# What a row without a gradient reads to know it.
READ_BY_ZEROS = {"p_mask", "p_rows", "p_grad_log_probs", "p_grad_entropy"}


@dataclass(frozen=True)
class Kernel:
    """A kernel that reads logits, or the part of one that zeros rows.

    Attributes:
        part: what it does.
        dtype, rows: of the logits; whether rows are aligned.
        registers, threads, warps: of a thread; of a program; that a processor holds at once. They
            are those of rows that carry all or nothing, whichever need more registers.
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
        return (self.loop.loaded or self.loop.stored) // DTYPES[self.dtype].itemsize

    @property
    def moved(self) -> float:
        """Bytes of a row."""
        each = (self.loop.loaded + self.loop.stored) / self.logits
        return VOCABULARY * each + self.row_bytes

    @property
    def operations(self) -> float:
        """Operations of a row."""
        return VOCABULARY * self.loop.operations / self.logits

    @property
    def seconds(self) -> dict[str, float]:
        """Times of all rows if one limit were the only one."""
        all_logits = ROWS * VOCABULARY / self.logits
        return {"memory": ROWS * self.moved / BANDWIDTH} | {
            name: all_logits * count / (PROCESSORS * CLOCK * RATES[name])
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
            rate = self.in_flight / (latency + self.loop.counts["issue"] / CLOCK)
            both = (self.loop.loaded + self.loop.stored) / self.loop.loaded
            found["latency"] = PROCESSORS * rate * both / BANDWIDTH
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
        extra = 1 if self.rows == "aligned" else 1 + SECTOR / width
        return min(self.share(LATENCIES[1]), 1 / extra)

    @property
    def verdict(self) -> str:
        """Whether the share that is asked for is met on paper."""
        if self.share(LATENCIES[0]) < MEMORY_SHARE:
            return "no"
        return "yes" if self.worst_share >= MEMORY_SHARE else "doubtful"


@functools.cache
def logits_kernels() -> list[Kernel]:
    """Compile the kernels that read logits."""
    found: dict[tuple[str, str, str], Kernel] = {}
    for (rows, shape), (dtype, torch_dtype) in itertools.product(SHAPES.items(), DTYPES.items()):
        # The logits of a head in bf16 are fp32, and their gradients bf16.
        halves = (False, True) if dtype == "fp32" else (False,)
        # A row that carries nothing beside its token may need more registers.
        for carries, halved, softcap, entropy in itertools.product(
            (compiled_kernels.CARRIED, ()), halves, (False, True), (False, True)
        ):
            call = functools.partial(
                compiled_kernels.logits,
                shape,
                torch_dtype,
                entropy=entropy,
                softcap=softcap,
                carried=carries,
                halved=halved,
            )
            for each in compiled_kernels.recorded(call):
                kernel, report = compiled_kernels.compiled(each, "sm_90")
                source, *_ = compiled_kernels.specialized(each, compiled_kernels.TARGETS["sm_90"])
                carried = {
                    name: SIZES[kind]
                    for name, kind in source.signature.items()
                    if kind in SIZES and name not in ("p_logits", "p_grad")
                }
                name = report["part"]
                for loop in loops(get_sass(kernel.asm["cubin"])):
                    part, row = name, sum(carried.values())
                    if not loop.loads:
                        part = "zeros"
                        row = sum(carried[key] for key in carried.keys() & READ_BY_ZEROS)
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
                    first = found.setdefault((part, dtype, rows), new)
                    if new.warps < first.warps:
                        fewest = replace(first, registers=new.registers, warps=new.warps)
                        found[part, dtype, rows] = fewest
    order = [part for part, *_ in found]
    return sorted(found.values(), key=lambda each: (each.rows, each.dtype, order.index(each.part)))
