"""Inputs, peers' variants, timing and the machine's own limits, shared by every suite.

Each variant of a case is timed in several short turns, one variant after the other in every turn,
so that a change of the machine's speed meets all of them; a ratio is taken within a turn and
reported as the median over the turns. Nothing is timed before its results agree with the fp64
reference.

glibc hands freed blocks back to the system until the process has freed a large one: before that,
every variant would pay for fresh pages in each call. A training process has freed many, so one is
freed here before anything is timed.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels import backends

TURNS, GROWTH_TURNS = 5, 3
# The default is read before anything changes it.
DEFAULT_THREADS = torch.get_num_threads()
THREADS = tuple(dict.fromkeys((DEFAULT_THREADS, 1)))
# What else runs shows here; the timings want an idle machine.
LOAD_BEFORE = os.getloadavg()[0]

# The largest size for which glibc still moves its threshold (32 MB).
torch.empty(2**25 - 4096, dtype=torch.uint8)

# Of one variant in one turn. A slow call is its own warm-up, and one round a turn has to do.
_SECONDS, _MAX_ROUNDS = 0.12, 200
_SLOW = 0.05
# Well beyond any last-level cache: tensors of 256 MB, read and written.
_COPY_BYTES = 512 * 2**20
_COPY_ROUNDS = 5

# The width of the band around the clip bounds in which fp32 and fp64 may decide differently.
_CLIP_MARGIN = 1e-6


@dataclass(frozen=True)
class Run:
    """One timing: a variant of a case in one turn."""

    case: str
    variant: str
    threads: int
    turn: int

    def __str__(self) -> str:
        return f"{self.case}-{self.variant}-{self.threads}thr-{self.turn}".replace(" ", "_")


def runs(
    case: str, variants: Iterable[str], threads: Iterable[int] = THREADS, turns: int | None = None
) -> list[Run]:
    """Return the timings of a case, the variants side by side in each turn."""
    names = tuple(variants)
    return [
        Run(case, variant, count, turn)
        for count in threads
        for turn in range(TURNS if turns is None else turns)
        for variant in names
    ]


def fused_backend() -> backends.Backend:
    """Return the compiled backend that is measured, or raise saying why there is none."""
    if why := backends.why_not_cpu():
        raise RuntimeError(f"the C++ backend cannot run here: {why}")
    return "cpu"


@dataclass(frozen=True)
class PolicyCase:
    """Inputs of `steppo_loss`; `advantages` are per step, `token_advantages` the same per token."""

    mask: Tensor
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    token_advantages: Tensor
    layout: sk.StepLayout

    @property
    def tokens(self) -> int:
        """All positions, masked ones included."""
        return self.mask.numel()

    def bytes_to_touch(self, *, with_layout: bool) -> int:
        """Return what one forward + backward has to move at least.

        Counted once each: log-probs and old log-probs of the action tokens (fp32), the advantage
        of each step, the arrays that say which tokens those are, and the gradient of every token
        (fp32, written). The arrays are the token index and the step offsets of the layout, int64,
        or the mask, one byte a token. Intermediate passes, metrics and whatever else a variant
        reads or writes do not count, so this is the same number for all variants of a case.
        """
        action, steps = self.layout.num_tokens, self.layout.num_steps
        where = 8 * action + 8 * (steps + 1) if with_layout else self.tokens
        return 4 * 2 * action + 4 * steps + where + 4 * self.tokens


def rows_mask(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return right-padded responses of 32 to `length` tokens, one step a row."""
    sizes = torch.randint(32, length + 1, (rows, 1), generator=generator)
    return torch.arange(length) < sizes


def turns_mask(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return multi-turn rows: actions of about 47 tokens, 24 % of all, between observations."""
    mean_action, share = 47.0, 0.24
    mean_observation = mean_action * (1 - share) / share
    pairs = int(2.5 * length / (mean_action + mean_observation)) + 8

    def sizes(mean: float) -> Tensor:
        uniform = torch.rand((rows, pairs), generator=generator).clamp_min(1e-6)
        # Rounding down takes half a token off on average.
        return 1 + (-(mean - 0.5) * uniform.log()).to(torch.int64)

    observations, actions = sizes(mean_observation), sizes(mean_action)
    # The rows begin anywhere in their first observation.
    observations[:, 0] = observations[:, 0] // 2
    starts = (observations + actions).cumsum(1) - actions
    # Between a start and the end that follows it, one more start than ends has been passed.
    change = torch.zeros((rows, length + 1), dtype=torch.int32)
    one = torch.ones_like(starts, dtype=torch.int32)
    change.scatter_add_(1, starts.clamp_max(length), one)
    change.scatter_add_(1, (starts + actions).clamp_max(length), -one)
    return change.cumsum(1)[:, :length] > 0


@functools.cache
def policy_case(case: str) -> PolicyCase:
    """Return the inputs of a case: ``rows`` or ``turns``, then the shape, as in ``rows 64x8192``.

    The log-ratios are those of one optimizer step, and no step lies within `_CLIP_MARGIN` of a clip
    bound, where the last bit of a sum would decide which branch it takes.
    """
    kind, rows, length = _parse(case)
    generator = torch.Generator().manual_seed(0)
    make = rows_mask if kind == "rows" else turns_mask
    mask = make(rows, length, generator)
    layout = sk.StepLayout.from_mask(mask)
    old = -torch.rand(mask.shape, generator=generator) - 0.01
    new = old + 0.01 * torch.randn(mask.shape, generator=generator)
    bounds = torch.tensor(
        [1 - sk.StepPOConfig().clip_low, 1 + sk.StepPOConfig().clip_high]
    ).double()
    z = (new - old).double().view(-1)[layout.token_index]
    mean = torch.segment_reduce(z, "mean", offsets=layout.step_offsets)
    close = ((mean.exp()[:, None] - bounds).abs() < _CLIP_MARGIN).any(1)
    new += 1e-4 * sk.broadcast_to_tokens(close.float(), layout)
    advantages = torch.randn(layout.num_steps, generator=generator)
    return PolicyCase(
        mask=mask,
        log_probs=new.requires_grad_(),
        old_log_probs=old,
        advantages=advantages,
        token_advantages=sk.broadcast_to_tokens(advantages, layout),
        layout=layout,
    )


def _parse(case: str) -> tuple[str, int, int]:
    kind, shape = case.split(" ")
    rows, length = shape.split("x")
    return kind, int(rows), int(length)


def policy_step(
    case: PolicyCase, loss: Callable[[], Tensor]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return one forward + backward of `loss`, and what resets the gradient before it."""

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]

    def reset() -> None:
        case.log_probs.grad = None

    return step, reset


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise unless the error is below `tolerance` times `expected`, as root mean squares."""
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: got shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = (got - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    if not float(error / scale) <= tolerance:
        raise AssertionError(
            f"{name}: off by {float(error / scale):.1e} of the expected root mean square, "
            f"allowed is {tolerance:.0e}; nothing is timed"
        )


def measure(
    benchmark: Any,
    run: Run,
    call: Callable[[], object],
    *,
    tokens: int,
    bytes_to_touch: int = 0,
    setup: Callable[[], object] | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Time `call` in rounds (`setup` untimed before each) and note what the report reads.

    Args:
        benchmark: the fixture of pytest-benchmark.
        run: what is timed.
        call: the variant.
        tokens: what ns/token divides by.
        bytes_to_touch: what GB/s counts; 0 leaves it out.
        setup: e.g. a reset of gradients.
        info: anything else to keep.
    """

    def prepare() -> None:
        if setup is not None:
            setup()

    with threads(run.threads):
        for _ in range(2):
            prepare()
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            if once > _SLOW:
                break
        rounds = min(_MAX_ROUNDS, math.ceil(_SECONDS / once))
        benchmark.group = f"{run.case}, {run.threads} threads"
        benchmark.pedantic(
            call, setup=prepare, rounds=rounds, warmup_rounds=3 if once < _SLOW else 0
        )
        seconds = benchmark.stats.stats.median
        noted = {
            "case": run.case,
            "variant": run.variant,
            "threads": run.threads,
            "turn": run.turn,
            "tokens": tokens,
            "ns_per_token": seconds * 1e9 / tokens,
            **(info or {}),
        }
        if bytes_to_touch:
            copy = copy_bandwidth(_COPY_BYTES, run.threads, run.case, run.turn)
            same_size = copy_bandwidth(bytes_to_touch, run.threads, run.case, run.turn)
            noted |= {
                "bytes": bytes_to_touch,
                "gbps": bytes_to_touch / seconds / 1e9,
                "copy_gbps": copy / 1e9,
                "copy_fraction": bytes_to_touch / seconds / copy,
                "copy_gbps_same_size": same_size / 1e9,
            }
        benchmark.extra_info.update(noted)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def copy_bandwidth(num_bytes: int, num_threads: int, case: str, turn: int) -> float:
    """Return the bytes a second of a `torch.Tensor.copy_` that reads and writes `num_bytes`.

    Measured by the process that is measured, once for each turn of each case, so that it is as
    slow as the machine is then. Working sets that stay in a cache move faster than the 512 MB that
    are the machine's line; those of a case's own size are shown next to it.
    """
    del case, turn
    source = torch.ones(num_bytes // 8)
    target = torch.zeros_like(source)
    rounds = _COPY_ROUNDS if num_bytes >= _COPY_BYTES else 25
    times = []
    with threads(num_threads):
        for _ in range(rounds + 1):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
    return 8 * source.numel() / statistics.median(times[1:])


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated during `call`, above what it had before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def peak_resident_bytes(call: Callable[[], object]) -> int | None:
    """Return by how much the peak of resident memory grows, or None where it cannot be told.

    This sees every allocation, also those of compiled code that torch does not count. For large
    inputs only: it counts pages, and the allocator must not hold some from before.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (AttributeError, OSError):
        return None

    def kilobytes(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    before = kilobytes("VmRSS")
    call()
    return 1024 * (kilobytes("VmHWM") - before)


def machine() -> dict[str, Any]:
    """Return where and when the numbers were taken."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": DEFAULT_THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steppo_kernels": sk.__version__,
        "load": round(LOAD_BEFORE, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
