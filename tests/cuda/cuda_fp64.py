"""Where CUDA kernels that compute in fp32 may use the units for fp64 in their loops."""

from __future__ import annotations

import re

from cuda_machine_code import FP64, FP64_CONVERSION, Kernel

# Kernels of logits and of rows of the head, of fp32 or of halves. `join_directions_kernel` is not
# among them: it takes columns of sets that are longer than a part, and for each column of a part a
# power in fp64.
IN_FP32 = (
    r"(token_log_probs|kept_log_probs|kept_head|kept_(hidden|weight)_gradient|scale_directions"
    r"|join_parts)\w*<(?!.*double)"
)
# They have one loop more, number by number, for temperatures that are out of the range of fp32.
_HAS_FP64_LOOP = r"(token|kept)_log_probs(_backward)?_kernel<"
# What loops may have besides, in a turn: arithmetic, and conversions from and to fp64.
#
# A turn of `kept_head_kernel` takes 2 or 4 rows of the weight, and a lane the logit of one of them.
# The exponents of two powers are formed in fp64, as temperatures may be any, and the softcap is
# compared with 0. The loop around it takes parts of sets, and what it does once a part is not
# counted.
#
# `kept_log_probs_backward_kernel` takes 4 logits a turn, and converts each result twice: it is one
# of two, the other of which is in fp64.
#
# For sm_100 a compiler converts the softcap anew for each pack of 8 logits, instead of keeping it.
_MOST_OF_TURN = {
    r"kept_head_kernel<.*, true>": (7, 7),
    r"kept_log_probs_backward_kernel<": (0, 8),
    r"token_log_probs_kernel<steppo::Half, true": (0, 4),
}


def complaints(kernel: Kernel) -> list[str]:
    """Return what a kernel of `IN_FP32` does wrong."""
    limits = (most for names, most in _MOST_OF_TURN.items() if re.match(names, kernel.name))
    most_arithmetic, most_conversions = next(limits, (0, 0))
    found = []
    if re.search(r"\bBRX", kernel.code):
        found.append("a branch by a table, behind which loops are not found")
    in_fp64, in_fp32 = [], []
    for loop in kernel.flow.loops:
        if most_arithmetic > 0 and not loop.is_innermost:
            continue
        text = "\n".join(loop.own)
        if len(FP64.findall(text)) > most_arithmetic:
            in_fp64.append(text)
            continue
        in_fp32.append(text)
        if (number := len(FP64_CONVERSION.findall(text))) > most_conversions:
            found.append(f"{number} conversions in a loop, expected at most {most_conversions}")
    wanted = 1 if re.match(_HAS_FP64_LOOP, kernel.name) else 0
    if len(in_fp64) != wanted:
        found.append(f"{len(in_fp64)} loops in fp64, expected {wanted}")
    if any(".128" in text for text in in_fp64):
        found.append("a loop in fp64 moves 16 bytes at once")
    if wanted and not any("MUFU.EX2" in text for text in in_fp32):
        found.append("no loop in fp32 has a power")
    return found
