"""What compute-sanitizer is asked, and what its answers mean."""

from __future__ import annotations

import re

from .running import FAILED, PASSED, SKIPPED, Finished, Verdict, last_line

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The exit code of the tool if it finds something. The program that it runs has others.
FOUND = 86

# Every tensor is memory of its own: what a kernel reads beside it is an error then, and so is what
# it reads of fresh memory.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_SUMMARY = re.compile(r"=+ +((?:ERROR|RACECHECK) SUMMARY: .*)")
# Virtual machines may keep the tools from the device. They say so before the program begins.
_REFUSED = "Device not supported"


def words(path: str, tool: str) -> list[str]:
    """Return the command that a program is appended to."""
    return [
        path,
        f"--tool={tool}",
        f"--error-exitcode={FOUND}",
        "--print-limit=20",
        # Importing torch asks the driver for functions that it need not have.
        *(["--report-api-errors=no"] if tool == "memcheck" else []),
    ]


def judge(done: Finished) -> Verdict:
    """Return what a tool found. Without a summary it has not looked."""
    text = done.log.read_text(errors="replace")
    if _REFUSED in text:
        return Verdict(SKIPPED, f"{PROGRAM} says: {_REFUSED}")
    summaries = _SUMMARY.findall(text)
    if not summaries:
        return Verdict(FAILED, f"there is no summary; {last_line(done.log)}")
    return Verdict(FAILED if done.code else PASSED, summaries[-1])
