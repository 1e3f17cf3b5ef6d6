"""Runs the cases and judges the answers."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import choice
from ...backends.choice import Backend
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw, more_batches

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What a backend may err beside twice the error of plain PyTorch: another order of a sum, another
# exp. Half precision is computed in fp32.
_FLOOR = {torch.float64: 1e-10}
_FP32_FLOOR = 16 * torch.finfo(torch.float32).eps
# What the reference itself may err in a lower precision: it has no yardstick but itself.
_PLAIN_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Row:
    """The verdict on one way to call an operation, over all batches.

    Attributes:
        operation, variant: see `Case`.
        backend, device: what ran.
        dtype: of the floating inputs; empty where there are none.
        output: the result that comes nearest to its bound, or exceeds it most.
        error: its largest error, relative to the largest entry of the exact result; of a single
            number relative to 1 where that is larger.
        plain: the error of plain PyTorch in the same dtype: the largest over the batches or, if it
            is larger, the mean over `Case.more_draws`. None where it is the backend itself.
        bound: what the error may be.
        batches: how many batches were run.
        note: what is wrong, empty if nothing is.
    """

    operation: str
    variant: str
    backend: str
    device: str
    dtype: str
    output: str
    error: float
    plain: float | None
    bound: float
    batches: int
    note: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.note

    @property
    def strain(self) -> tuple[bool, float]:
        """Orders rows by how near to a miss they are."""
        return not self.ok, self.error / self.bound if self.bound else self.error


class _Combination(NamedTuple):
    """What is checked at a time: a case in a dtype, on backends that get the same batches."""

    case: Case
    dtype: torch.dtype
    names: list[str]
    small: bool


class Miss(Exception):
    """An answer is wrong in a way that is not a matter of size."""


def validate(
    cases: Iterable[Case],
    names: Sequence[str],
    device: torch.device,
    *,
    seed: int,
    batches: int,
    dtypes: Sequence[torch.dtype] = DTYPES,
    seconds: float | None = None,
    on_case: Callable[[str], None] = lambda name: None,
    on_late: Callable[[int], None] = lambda count: None,
) -> list[Row]:
    """Check backends on a device.

    Args:
        cases: what to check.
        names: backends that run on `device`.
        device: where the tensors lie.
        seed: of the batches; the same seed gives the same batches whatever else is chosen.
        batches: number of batches of each case in each dtype.
        dtypes: dtypes of the floating inputs.
        seconds: until when another case in a dtype is begun; the first is begun in any case. Then
            the seed draws their order, and all operations have had one before one has a second.
            None for no limit.
        on_case: is told what is being checked.
        on_late: is told how many rows are missing, as their time never came.

    Returns:
        One row a case, backend and dtype.
    """
    begin = time.monotonic()
    every = list(_combinations(cases, names, device, dtypes))
    order = range(len(every)) if seconds is None else _drawn(every, seed)
    found: dict[int, list[Row]] = {}
    for number, place in enumerate(order, 1):
        if found and seconds is not None and time.monotonic() - begin > seconds:
            break
        case, dtype, group, small = every[place]
        on_case(f"{number} of {len(every)}: {case.operation} {case.variant}".strip())
        with warnings.catch_warnings():
            # Halves are drawn for their roundings, and ratios on both sides of any range.
            warnings.filterwarnings("ignore", message=r"\w+: got torch\.b?float16")
            warnings.filterwarnings("ignore", message="config: got .* with the default clip range")
            found[place] = _check(case, group, device, dtype, seed, batches, small=small)
    on_late(sum(len(one.names) for place, one in enumerate(every) if place not in found))
    return list(itertools.chain.from_iterable(found[place] for place in sorted(found)))


def _combinations(
    cases: Iterable[Case],
    names: Sequence[str],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> Iterator[_Combination]:
    # Kernels that are interpreted, a line of Python at a time, get small batches of their own.
    interpreted = {"triton"} if device.type == "cpu" and choice.triton_interprets() else set()
    groups = (
        ([name for name in names if name not in interpreted], False),
        ([name for name in names if name in interpreted], True),
    )
    for case in cases:
        for dtype in (torch.float32,) if case.exact else dtypes:
            for group, small in groups:
                if group:
                    yield _Combination(case, dtype, group, small)


def _drawn(every: Sequence[_Combination], seed: int) -> list[int]:
    """Return the places of combinations in rounds; one of every operation is in the first."""
    places = list(range(len(every)))
    random.Random(seed).shuffle(places)
    seen: Counter[str] = Counter()
    rounds: dict[int, int] = {}
    for place in places:
        operation = every[place].case.operation
        rounds[place] = seen[operation]
        seen[operation] += 1
    # Sorting keeps the drawn order within a round.
    return sorted(places, key=rounds.__getitem__)


def widest(rows: Iterable[Row]) -> list[Row]:
    """Return of each operation, backend, device and dtype the row that is nearest to a miss."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = row.operation, row.backend, row.device, row.dtype
        if key not in found or row.strain > found[key].strain:
            found[key] = row
    return list(found.values())


class _Tally:
    """Errors of one backend in one case and dtype, by output, the largest over the batches."""

    def __init__(self) -> None:
        self.errors: dict[str, tuple[float, float]] = {}
        self.more: dict[str, list[float]] = {}
        self.batches = 0
        self.note = ""

    def add(self, exact: Outputs, plain: Outputs, answer: Outputs) -> None:
        """Compare one answer."""
        for name, want in exact.items():
            error, expected = relative_error(answer[name], want), relative_error(plain[name], want)
            before = self.errors.get(name, (0.0, 0.0))
            self.errors[name] = max(before[0], error), max(before[1], expected)

    def add_draw(self, exact: Outputs, plain: Outputs) -> None:
        """Measure the yardstick on one more draw."""
        for name, want in exact.items():
            # Zeros say nothing of rounding.
            if bool((want != 0).any()):
                self.more.setdefault(name, []).append(relative_error(plain[name], want))

    def row(self, case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> Row:
        """Judge the errors."""
        output, error, plain, bound, note = "", 0.0, 0.0, 0.0, self.note
        most = -1.0
        for name, (own, largest) in self.errors.items():
            more = self.more.get(name, [0.0])
            expected = max(largest, sum(more) / len(more))
            allowed = 0.0 if case.exact else _bound(backend, dtype, expected)
            over = own / allowed if allowed else own
            if over > most:
                most, output, error, plain, bound = over, name, own, expected, allowed
        if not note and error > bound:
            if case.exact:
                note = "differs"
            elif error == torch.inf:
                note = "not 0, though the exact result is all 0"
            else:
                note = f"error {error / bound:.3g} x bound"
        return Row(
            operation=case.operation,
            variant=case.variant,
            backend=backend,
            device=str(device),
            dtype="" if case.exact else str(dtype).removeprefix("torch."),
            output=output,
            error=error,
            plain=None if backend == "reference" else plain,
            bound=bound,
            batches=self.batches,
            note=note,
        )


def _bound(backend: str, dtype: torch.dtype, plain: float) -> float:
    floor = _FLOOR.get(dtype, _FP32_FLOOR)
    if backend != "reference":
        return 2.0 * plain + floor
    return _PLAIN_LIMIT.get(dtype, floor)


def _check(
    case: Case,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    batches: int,
    *,
    small: bool,
) -> list[Row]:
    tallies = {name: _Tally() for name in names}
    more = more_batches(batches, case.more_draws if dtype.itemsize == 2 else 0)
    for batch in (*range(batches), *more):
        draw = Draw(seed, f"{case.operation} {case.variant}", batch, dtype, device, small=small)
        try:
            with _one_thread():
                problem = case.draw(draw)
                spoiled = _spoil(problem, draw)
                exact = problem.run(
                    {name: value.double() for name, value in problem.inputs.items()}, "reference"
                )
                plain = problem.run(spoiled, "reference")
        except Exception as error:
            for tally in tallies.values():
                tally.note = tally.note or f"the reference: {_told(error, batch)}"
            break
        for name, tally in tallies.items():
            if tally.note:
                continue
            if batch >= batches:
                tally.add_draw(exact, plain)
                continue
            tally.batches += 1
            try:
                answer = _answer(problem, spoiled, name, exact, plain)
            except Exception as error:
                tally.note = _told(error, batch)
            else:
                tally.add(exact, plain, answer)
    return [tally.row(case, name, device, dtype) for name, tally in tallies.items()]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: batches are small, and threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _told(error: Exception, batch: int) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{'' if isinstance(error, Miss) else f'{type(error).__name__}: '}{text} (batch {batch})"


def _spoil(problem: Problem, draw: Draw) -> dict[str, Tensor]:
    """Return the inputs with NaN and infinities in the slots that must not matter."""
    spoiled = dict(problem.inputs)
    for name, unread in problem.unread.items():
        value = spoiled[name]
        junk = value.new_tensor([torch.nan, torch.inf, -torch.inf])
        spoiled[name] = torch.where(unread, junk[draw.integers(0, 2, *value.shape)], value)
    return spoiled


def _is_zero(output: str, exact: Tensor) -> Tensor:
    """Return where a gradient is 0, and not only because a probability was rounded to 1."""
    is_zero = exact == 0
    return is_zero.all(-1) if output == "grad_logits" else is_zero


def _answer(problem: Problem, inputs: Inputs, name: str, exact: Outputs, plain: Outputs) -> Outputs:
    """Run a backend twice and check what does not depend on sizes of errors."""
    backend: Backend = name  # type: ignore[assignment]
    # The threads of a native backend are part of what is checked.
    with _one_thread() if name == "reference" else contextlib.nullcontext():
        answer, again = problem.run(inputs, backend), problem.run(inputs, backend)
    if answer.keys() != plain.keys():
        raise Miss(f"gives {', '.join(answer)}, expected {', '.join(plain)}")
    for output, expected in plain.items():
        got = answer[output]
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise Miss(
                f"{output}: got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} "
                f"{tuple(expected.shape)}"
            )
        if got.device != expected.device:
            raise Miss(f"{output}: got it on {got.device}, expected it on {expected.device}")
        if not _same_bits(got, again[output]):
            raise Miss(f"{output}: a second run gives other bits")
        if got.is_floating_point() and not bool(got.isfinite().all()):
            raise Miss(f"{output}: not finite")
        if output.startswith("grad_") and bool((got[_is_zero(output, exact[output])] != 0).any()):
            raise Miss(f"{output}: not 0 where it is exactly 0")
    return answer


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # As bytes, NaN equals itself and -0 is not 0.
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest entry of `exact`.

    A single number is a sum of terms of about 1, which may cancel: its scale is at least 1. Of
    integers it is how many differ.
    """
    if not exact.is_floating_point():
        return float((actual != exact).sum()) if actual.shape == exact.shape else torch.inf
    if exact.numel() == 0:
        return 0.0
    want = exact.double()
    scale = float(want.abs().max())
    if exact.dim() == 0:
        scale = max(scale, 1.0)
    error = float((actual.double() - want).abs().max())
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0.0 else torch.inf
