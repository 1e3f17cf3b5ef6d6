"""Compile what the Triton launchers launch, for GPUs that need not be there, and read the result.

Run as a script, in a process without TRITON_INTERPRET: `python compiled_kernels.py ARCH` prints
JSON, and without ARCH the keys of Triton's cache. The launchers run on CPU tensors, with the launch
itself replaced by a recorder: so what is compiled is what a GPU would be asked to run.
`benchmarks/triton_account` reads the machine code of the same launches.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import kept_launches
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton_offsets import offsets

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.backends import operators
from steppo_kernels.backends.triton import launch
from steppo_kernels.config import RATIOS, SURROGATES
from steppo_kernels.layout.step_layout import require_layout

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LENGTHS = (4096, 3600, 2051, 2077)
# Hidden sizes where rows are aligned and where they are not.
KEPT_SIZES = (LENGTHS[0], LENGTHS[2])
# Rows, tokens of a row, vocabulary: what is alike in each group is whether rows are aligned.
LOGITS_SHAPES = (
    [(2, 3, 4096), (1, 5, 151_936), (3, 1, 152_064), (7, 2, 32_000), (2, 17, 128)],
    [(2, 3, 4099), (1, 5, 50_257), (3, 1, 151_669), (7, 2, 32_001), (2, 17, 129)],
)
LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Compiled with everything that can be asked; the others with every pair of what can be asked.
WHOLE = "sm_90"
# What a row of logits may carry beside its token.
CARRIED = ("mask", "temperatures", "rows")
# A processor of sm_90: registers, bytes of shared memory, warps and blocks at most.
_REGISTERS, _SHARED, _MOST_WARPS, _MOST_BLOCKS = 65536, 228 * 1024, 64, 32
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def recorded(call: Callable[[], object]) -> list[Launch]:
    """Return the kernel launches of `call`, which do nothing."""
    launches: list[Launch] = []

    def record(
        kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        assert len(grid) == 1, kernel.__name__
        assert 1 <= grid[0] < 2**31, kernel.__name__
        launches.append((kernel, args, options))

    # What a kernel is depends on TRITON_INTERPRET.
    kinds = (JITFunction, InterpretedFunction)
    runs = [kind.run for kind in kinds]
    for kind in kinds:
        kind.run = record
    try:
        call()
    finally:
        for kind, run in zip(kinds, runs, strict=True):
            kind.run = run
    return launches


def specialized(each: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any], str]:
    """Return the source of the kernel that Triton compiles for a launch, its options and key."""
    kernel, args, given = each
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **given)
    key = f"{kernel.__name__} {specialization} {options}"
    parsed, signature, constexprs, attrs = kernel._pack_args(
        backend, given, bound, specialization, options
    )
    return ASTSource(kernel, signature, constexprs, attrs), parsed.__dict__, key


def batch(rows: int, length: int, run: int) -> StepLayout:
    """Return a layout of `rows` rows that act in runs of `run` tokens, each after a pause."""
    mask = (torch.arange(rows * length) % (run + 1) != 0).view(rows, length)
    return StepLayout.from_mask(mask, backend="reference")


def policy(
    layout: StepLayout,
    config: StepPOConfig,
    *,
    full: bool,
    masked: bool = False,
    by_token: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Launch the policy loss: with everything that a batch can carry, or with as little.

    `by_token` says whether advantages are per token; with everything they are, if it does not.
    """
    held = require_layout(layout)
    tokens = torch.zeros(held.step_ids.numel(), dtype=dtype)
    extra = tokens if full else None
    given = (tokens, extra, tokens, tokens, extra, extra)
    normalizer = torch.zeros((), dtype=torch.float64) if full else None
    if masked:
        mask = held.step_ids.view(-1) >= 0
        operators.launcher("triton", "policy_loss_masked")(
            *given, None, normalizer, mask, held.shape[-1], config.kernel, True, full
        )
    else:
        # Only a soft surrogate has no bounds.
        bounds = extra if config.surrogate != "soft" else None
        operators.launcher("triton", "policy_loss")(
            *given,
            None,
            bounds,
            bounds,
            None,
            normalizer,
            held.steps,
            config.kernel,
            full if by_token is None else by_token,
            full,
            True,
            full,
        )


def logits(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    entropy: bool,
    softcap: bool,
    carried: tuple[str, ...] = CARRIED,
    halved: bool = False,
) -> None:
    """Launch the kernels that read logits, on rows that carry what `carried` names.

    With `halved`, the gradients of fp32 logits are bf16, in the first half of each row.
    """
    values = torch.zeros(shape, dtype=dtype)[:, : max(1, shape[1] - 1)]
    grad = torch.empty(values.shape, dtype=dtype)
    if halved:
        grad = values.view(torch.bfloat16)[..., : shape[2]]
    rows = values.shape[0] * values.shape[1]
    # A slice, which need not begin at 16 bytes.
    ids = torch.zeros(rows + 1, dtype=torch.int64)[1:]
    one = torch.zeros(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    targets = (
        ids,
        ids == 0 if "mask" in carried else None,
        one.double() if "temperatures" in carried else None,
        1.0,
        30.0 if softcap else 0.0,
    )
    if_entropy = one if entropy else None
    operators.launcher("triton", "token_log_probs")(values, *targets, entropy)
    operators.launcher("triton", "token_log_probs_backward")(
        grad,
        values,
        *targets,
        one.double(),
        one.double(),
        if_entropy,
        one,
        if_entropy,
        ids if "rows" in carried else None,
    )


def logits_launches(shape: tuple[int, int, int], *, whole: bool = True) -> list[Launch]:
    """Return launches of the kernels that read logits: on aligned rows, with all that can be asked.

    What rows carry is read in one way whatever the dtype: in bf16 they carry any choice, else all.
    Rows that are not aligned have every dtype, two of them with everything only. Where the launches
    need not be whole, aligned rows have each pair of dtype, entropy and softcap, carry all or
    nothing, and rows that are not aligned have everything only.
    """
    work = list(itertools.product((False, True), repeat=2))
    is_aligned = shape[2] % 16 == 0
    choices = [
        carried
        for count in range((len(CARRIED) if whole else 1) if is_aligned else 0)
        for carried in itertools.combinations(CARRIED, count)
    ]

    def everything() -> None:
        for at, dtype in enumerate(LOGITS_DTYPES):
            is_first = is_aligned or (whole and dtype in (torch.bfloat16, torch.float32))
            for entropy, softcap in work if is_first else work[-1:]:
                if whole or not is_aligned or (at + entropy + softcap) % 2 == 0:
                    logits(shape, dtype, entropy=entropy, softcap=softcap)
        for entropy, softcap in work if whole else (work[0], work[-1]):
            logits(shape, torch.float32, entropy=entropy, softcap=softcap, halved=True)
        for carried, (entropy, softcap) in zip(choices, itertools.cycle(work), strict=False):
            logits(shape, torch.bfloat16, entropy=entropy, softcap=softcap, carried=carried)

    return recorded(everything)


def policies(length: int, *, whole: bool) -> None:
    """Launch the policy loss with every surrogate.

    Ratios and advantages are those of tokens, in both forms; where the launches are whole, also
    those of steps, fp64, batches that carry little, and each tile of steps.
    """
    layout = batch(4, length, 511)
    for at, surrogate in enumerate(SURROGATES):
        token = StepPOConfig(ratio="token", surrogate=surrogate, reduction="token_mean")
        policy(layout, token, full=True)
        policy(layout, token, full=True, masked=True)
        if not whole:
            continue
        policy(layout, token, full=False, by_token=False)
        for masked in (False, True):
            policy(layout, token, full=True, masked=masked, dtype=torch.float64)
        if surrogate != "tv":
            ratio = RATIOS[at % RATIOS.index("token")]
            pooled = StepPOConfig(ratio=ratio, surrogate=surrogate, token_clip=(0.1, 0.1))
            policy(layout, pooled, full=True, by_token=False)
            policy(layout, pooled, full=True)
            policy(layout, pooled, full=True, masked=True)
    for size in (1, 20, 200) if whole else ():
        tile = batch(4, length, size)
        policy(tile, StepPOConfig(ratio="centered"), full=True)
        policy(tile, StepPOConfig(ratio="token"), full=False, by_token=False)


def launches(length: int = LENGTHS[0], *, whole: bool = True) -> list[Launch]:
    """Return launches of every kernel that works on tokens, on rows of `length` of them."""
    layout = batch(4, length, 511)
    held = require_layout(layout)
    flat_ids, offsets = held.step_ids.view(-1), held.row_offsets
    mask = flat_ids >= 0
    tokens, steps = torch.zeros(mask.numel()), torch.zeros(layout.num_steps)
    ids = flat_ids.to(torch.int64)
    rich = StepPOConfig(ratio="centered", reduction="trajectory_mean")
    run = operators.launcher

    def everything() -> None:
        run("triton", "segment_mask")(mask, mask, offsets)
        run("triton", "segment_ids")(ids, offsets)
        run("triton", "segment_rows")(mask.view(4, length), torch.ones(4, dtype=torch.bool))
        marks, two = torch.tensor([1, 2]), torch.tensor([0, 2])
        run("triton", "mark_actions")(ids, offsets, marks, two, marks, marks, two)
        run("triton", "compact")(flat_ids, layout.num_steps, layout.num_tokens)
        run("triton", "row_trajectories")(offsets, held.token_index, held.step_offsets)
        run("triton", "broadcast_to_tokens")(steps, flat_ids)
        run("triton", "sum_over_steps")(tokens, layout.token_index, layout.step_offsets)
        run("triton", "order_live_rows")(tokens, tokens, False)
        run("triton", "order_live_rows")(tokens.double(), None, True)
        run("triton", "step_gae")(
            tokens, tokens, torch.zeros(4), held.timeline, (0.99, 0.95, 1.0), True, True, True
        )
        run("triton", "step_gae")(
            tokens, tokens, None, held.timeline, (1.0, 1.0, 0.0), False, False, False
        )
        run("triton", "value_loss")(
            tokens, steps, tokens, None, None, held.states, (0.5, 0.0), True, False, True, True
        )
        run("triton", "value_loss")(
            steps, tokens, None, steps, None, held.states, (0.5, 1.0), False, True, False, True
        )
        for size in (1, 20, 200, 511):
            policy(batch(4, length, size), StepPOConfig(), full=False)
        policy(layout, rich, full=True, by_token=False)
        policy(layout, rich, full=True)
        policy(layout, rich, full=True, masked=True)
        policy(layout, StepPOConfig(), full=False, masked=True)
        policy(layout, StepPOConfig(ratio="product"), full=True, masked=True)
        policies(length, whole=whole)

    return recorded(everything)


def kept(size: int, *, whole: bool = True) -> list[Launch]:
    """Return launches of every kernel of kept sets, on hidden states of this size."""
    return recorded(lambda: kept_launches.everything(size, whole=whole))


def keys(found: list[Launch]) -> list[str]:
    """Return what Triton's cache knows the launches by: equal keys compile once."""
    return sorted({specialized(each, TARGETS["sm_90"])[2] for each in found})


def compiled(each: Launch, arch: str) -> tuple[Any, dict[str, Any]]:
    """Compile the kernel of a launch; return that and its resources and widest global load."""
    target = TARGETS[arch]
    source, options, key = specialized(each, target)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        kernel = triton.compile(source, target=target, options=options)
    case = _case(source)
    found: dict[str, Any] = {
        "kernel": source.fn.__name__,
        "arch": arch,
        "key": key,
        "case": case,
        "part": _part(source.fn.__name__, case),
        "threads": kernel.metadata.num_warps * target.warp_size,
        "shared": kernel.metadata.shared,
        **offsets(kernel.asm["ttir"]),
    }
    if target.backend == "cuda":
        found |= _cuda(kernel.asm["ptx"], log.getvalue())
        return kernel, found | {"warps": _warps(found)}
    return kernel, found | _hip(kernel.asm["amdgcn"])


def _case(source: ASTSource) -> list[str]:
    """Return what tells launches of the kernels that read logits, or a head's rows, apart."""
    pointers = (f"p_{name}" for name in ("weight", "hidden", "grad_weight", "logits"))
    first = next((name for name in pointers if name in source.signature), None)
    if first is None:
        return []
    constants = {source.fn.arg_names[at]: value for (at,), value in source.constants.items()}
    given = [name for name, kind in source.signature.items() if kind != "constexpr"]
    return [
        source.signature[first].strip("*"),
        *(name.lower() for name in ("ALIGNED", "SOFTCAP", "HALVED") if constants.get(name)),
        *(name for name in ("entropy", *CARRIED, "bias", "grad_bias") if f"p_{name}" in given),
    ]


def _part(kernel: str, case: list[str]) -> str:
    """Return what a kernel that reads logits does, as `benchmarks/triton_account.md` names it."""
    name = "backward" if "backward" in kernel else "forward"
    return " + ".join([name, *(each for each in ("entropy", "softcap", "halved") if each in case)])


def _warps(found: dict[str, Any]) -> int:
    """Return the warps that a processor of sm_90 holds of a kernel."""
    warps = found["threads"] // 32
    registers = 256 * math.ceil(found["registers"] / 8) * warps
    blocks = (_REGISTERS // registers, _SHARED // (1024 + found["shared"]), _MOST_WARPS // warps)
    return min(*blocks, _MOST_BLOCKS) * warps


def _cuda(ptx: str, log: str) -> dict[str, Any]:
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spills": _number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        "wide_loads": len(re.findall(r"ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx)),
    }


def _hip(code: str) -> dict[str, Any]:
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", code),
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", code)
        + _number(r"\.private_segment_fixed_size:\s*(\d+)", code),
        # Scalar registers go to lanes of vector registers, not to memory.
        "moved": _number(r"\.sgpr_spill_count:\s*(\d+)", code),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, (pattern, text)
    return int(match[1])


def reports(arch: str) -> list[dict[str, Any]]:
    """Return what `compiled` finds for an architecture, once for each kernel that it caches."""
    launch.warp_size = TARGETS[arch].warp_size
    every = [
        *launches(whole=arch == WHOLE),
        *(each for size in KEPT_SIZES for each in kept(size, whole=arch == WHOLE)),
        *(
            each
            for group in LOGITS_SHAPES
            for each in logits_launches(group[0], whole=arch == WHOLE)
        ),
    ]
    distinct = {specialized(each, TARGETS[arch])[2]: each for each in every}
    return [compiled(each, arch)[1] for each in distinct.values()]


def keys_by_size() -> dict[str, list[Any]]:
    """Return the keys of launches on rows of each length or size, and on logits of each shape.

    The lengths are alike in what a kernel may depend on: divisible by 16 or not.
    """
    return {
        "lengths": [keys(launches(length) + kept(length)) for length in LENGTHS],
        "logits": [[keys(logits_launches(shape)) for shape in group] for group in LOGITS_SHAPES],
    }


if __name__ == "__main__":
    print(json.dumps(reports(sys.argv[1]) if len(sys.argv) > 1 else keys_by_size()))
