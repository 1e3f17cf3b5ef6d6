"""What a logit costs the kernels that read rows of them: instructions, and what these take."""

from __future__ import annotations

import re

import cuda_machine_code

from ..triton_account.assumptions import BANDWIDTH, CLOCK, PROCESSORS, RATES, ROWS, VOCABULARY
from ..triton_account.machine_code import loop_of
from ..triton_account.text import cells, header

_LIMITS = ("issue", "ALU", "MUFU")
_NAME = re.compile(r"token_log_probs(_backward)?_kernel<(.*), (true|false), (true|false)>")
_BYTES = {"float": 4, "BFloat16": 2, "Half": 2}


def table() -> list[str]:
    """Return the lines of the table: kernels of rows in fp32 and in halves, on an H100."""
    lines = header(
        "kernel",
        "logits, gradients",
        *(f"{limit} a logit" for limit in _LIMITS),
        "memory ms",
        *(f"{limit} ms" for limit in _LIMITS),
    )
    for kernel in cuda_machine_code.kernels("90"):
        found = _NAME.match(kernel.name.replace("steppo::", ""))
        if found is None or "double" in found[2] or "Half" in found[2]:
            continue
        types = found[2].split(", ")
        loop = loop_of(kernel.stream)
        logits = loop.loaded / _BYTES[types[0]]
        each = [loop.counts[limit] / logits for limit in _LIMITS]
        moved = (loop.loaded + loop.stored) / logits
        capped, also = found[3] == "true", found[4] == "true"
        lines.append(
            cells(
                " + ".join(
                    ["backward" if found[1] else "forward"]
                    + ["entropy"] * also
                    + ["softcap"] * capped
                ),
                ", ".join(types),
                *(f"{count:.1f}" for count in each),
                f"{1e3 * ROWS * VOCABULARY * moved / BANDWIDTH:.2f}",
                *(
                    f"{1e3 * ROWS * VOCABULARY * count / (RATES[limit] * PROCESSORS * CLOCK):.2f}"
                    for limit, count in zip(_LIMITS, each, strict=True)
                ),
            )
        )
    return lines
