"""Print the account of the Triton kernels, or write it into its page (`--write`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..tables_of_page import renew
from .assumptions import (
    BANDWIDTH,
    CLOCK,
    FLOPS,
    HIDDEN,
    LATENCIES,
    MEMORY,
    MEMORY_SHARE,
    PROCESSORS,
    PRODUCT_SHARE,
    RATES,
    ROWS,
    VOCABULARY,
)
from .kernel_tables import code, targets, tokens
from .one_pass import changes, chunks, one_pass

_PAGE = Path(__file__).parents[1] / "triton_account.md"


def device() -> list[str]:
    """Return the lines of what is assumed."""
    short, long = (BANDWIDTH / PROCESSORS * each / 1024 for each in LATENCIES)
    slots = PROCESSORS * CLOCK * RATES["issue"] / (BANDWIDTH * MEMORY_SHARE / 2)
    once = 2 * ROWS * VOCABULARY / (MEMORY_SHARE * BANDWIDTH)
    return [
        f"- M = {ROWS}, d = {HIDDEN}, V = {VOCABULARY:,}, bf16 where nothing else is said",
        f"- data sheet: {MEMORY / 1e9:.0f} GB at {BANDWIDTH / 1e12:.2f} TB/s, bf16 products "
        f"{FLOPS / 1e12:.0f} TFLOP/s, {PROCESSORS} SMs, {CLOCK / 1e9:.2f} GHz (what that peak "
        "implies)",
        f"- a clock and SM: {RATES['issue']} results issued, at most {RATES['ALU']} of them of "
        f"the ALU pipe (comparisons, integers, conversions), {RATES['MUFU']} of MUFU "
        f"(exponentials), {RATES['LSU']} loads or stores (LSU)",
        f"- assumed, not of the data sheet: a load takes {1e6 * LATENCIES[0]:.1f} to "
        f"{1e6 * LATENCIES[1]:.1f} us under load, so that {short:.0f} to {long:.0f} KB in flight "
        "an SM keep the memory busy",
        f"- *in practice*: products at {PRODUCT_SHARE:.0%} of the peak, which others report for "
        f"cuBLAS, the rest at {MEMORY_SHARE:.0%} of the bandwidth",
        f"- at {MEMORY_SHARE:.0%} of the bandwidth, a bf16 logit that is read once leaves "
        f"{slots:.0f} instructions, one that is also written {2 * slots:.0f}",
        f"- the target, {MEMORY_SHARE:.0%} of it at {ROWS} x {VOCABULARY} in bf16, is "
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
    renew(_TABLES, _TABLES, _PAGE if parser.parse_args().write else None)


if __name__ == "__main__":
    main()
