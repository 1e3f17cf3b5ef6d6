"""`steppo-kernels validate` must find what is wrong, so here things are."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_operators import OPERATORS
from torch import Tensor
from typer.testing import CliRunner

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.backends import choice, operators, registry
from steppo_kernels.cli import main
from steppo_kernels.cli import validate as validation
from steppo_kernels.cli.validate.case import Case, Problem
from steppo_kernels.cli.validate.draw import Draw, border, more_batches
from steppo_kernels.cli.validate.run import relative_error
from steppo_kernels.config import RATIOS
from steppo_kernels.outputs import POLICY_METRICS

CPU = torch.device("cpu")
Spoil = Callable[..., Any]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand the reference in for the CPU backend, with one operator spoiled."""
    launcher = operators.launcher

    def set_wrong(wrong: str = "", spoil: Spoil = lambda *outputs: outputs) -> None:
        def launch(backend: str, name: str) -> Callable[..., Any]:
            if backend == "reference":
                return launcher(backend, name)
            run = OPERATORS.get(name) or launcher("reference", name)
            if name != wrong:
                return run

            def spoiled(*args: Any) -> Any:
                outputs = run(*args)
                if outputs is None:
                    # What it computes is written into its first argument.
                    spoil(args[0])
                    return None
                return spoil(*outputs) if isinstance(outputs, tuple) else spoil(outputs)

            return spoiled

        monkeypatch.setattr(registry, "launcher", launch)

    monkeypatch.setattr(
        choice,
        "unavailable",
        lambda name, device: None if name in ("reference", "cpu") else "not here",
    )
    set_wrong()
    return set_wrong


def run(*words: str, operation: str = "") -> tuple[int, dict[str, Any]]:
    """Run the command on the stand-in; return its exit code and what it printed."""
    found = CliRunner().invoke(
        main,
        [
            "validate",
            "--backend",
            "cpu",
            "--seed",
            "3",
            "--batches",
            "1",
            "--json",
            "--operation",
            operation,
            *words,
        ],
    )
    assert found.exit_code in (0, 1), found.output
    return found.exit_code, json.loads(found.output)


@pytest.mark.filterwarnings("error:.*got torch:UserWarning")
def test_a_right_backend_passes(native):
    code, found = run()
    assert (code, found["ok"]) == (0, True), [row for row in found["rows"] if not row["ok"]]
    assert {row["operation"] for row in found["rows"]} == {
        case.operation for case in validation.CASES
    }


def _entry(number: int, change: Callable[[Tensor], Tensor]) -> Spoil:
    """Spoil one of the outputs."""

    def spoil(*outputs: Tensor) -> Any:
        changed = list(outputs)
        if outputs[number] is not None:
            changed[number] = change(outputs[number].clone())
        return tuple(changed) if len(changed) > 1 else changed[0]

    return spoil


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Change the first entry that is not 0."""

    def changed(value: Tensor) -> Tensor:
        where = value.nonzero()
        if len(where):
            value[tuple(where[0])] = change(value[tuple(where[0])])
        return value

    return changed


def _off(value: Tensor) -> Tensor:
    return value * (1 + 1e-4)


WRONG = [
    ("StepLayout.from_mask", "count_steps", _entry(0, lambda row_steps: row_steps.flip(0))),
    ("StepLayout.from_mask", "lay_out_runs", _entry(0, lambda ids: ids.clamp_max(1))),
    ("StepLayout.from_mask", "lay_out_runs", _entry(0, lambda ids: ids.to(torch.int64))),
    ("StepLayout.from_mask", "lay_out_runs", _entry(1, lambda index: index.flip(0))),
    ("StepLayout.from_step_ids", "segment_ids", _entry(0, lambda ids: ids.clamp_max(1))),
    ("StepLayout.from_rows", "segment_rows", _entry(0, lambda ids: ids.clamp_max(1))),
    ("StepLayout.from_markers", "mark_actions", _entry(0, lambda mask: ~mask)),
    ("StepLayout.per_token", "compact", _entry(0, lambda index: index.flip(0))),
    ("StepLayout.per_trajectory", "compact", _entry(0, lambda index: index.flip(0))),
    ("broadcast_to_tokens", "broadcast_to_tokens", _entry(0, _first(_off))),
    ("broadcast_to_tokens", "broadcast_to_tokens", _entry(0, lambda value: value + 1e-3)),
    ("broadcast_to_tokens", "sum_over_steps", _entry(0, _first(lambda value: value + 1e-1))),
    ("step_gae", "step_gae", _entry(0, _off)),
    ("step_gae", "step_gae", _entry(1, _off)),
    ("step_gae", "step_gae", lambda advantages, returns: (returns, returns)),
    ("step_value_loss", "value_loss", _entry(0, _off)),
    ("step_value_loss", "value_loss", _entry(1, _off)),
    ("step_value_loss", "value_loss", _entry(2, lambda grad: -grad)),
    ("step_value_loss", "value_loss", _entry(2, lambda grad: grad + 1e-30)),
    ("steppo_loss", "policy_loss", _entry(0, lambda loss: loss + 1e-4)),
    ("steppo_loss", "policy_loss", _entry(1, _off)),
    ("steppo_loss", "policy_loss", _entry(2, _off)),
    ("steppo_loss", "policy_loss", _entry(3, _off)),
    ("steppo_loss", "policy_loss", _entry(3, lambda grad: grad + 1e-30)),
    ("steppo_loss", "policy_loss", _entry(4, _off)),
    ("steppo_loss (mask)", "policy_loss_masked", _entry(0, lambda loss: loss + 1e-4)),
    ("steppo_loss (mask)", "policy_loss_masked", _entry(1, _off)),
    ("steppo_loss (mask)", "policy_loss_masked", _entry(2, _off)),
    ("steppo_loss (mask)", "policy_loss_masked", _entry(3, _off)),
    ("step_log_ratios", "sum_over_steps", _entry(0, _off)),
    ("rollout_weights", "sum_over_steps", _entry(0, _off)),
    ("token_log_probs", "token_log_probs", _entry(0, _off)),
    ("token_log_probs", "token_log_probs", _entry(1, _off)),
    ("token_log_probs", "token_log_probs_backward", lambda out: out.mul_(1 + 1e-4)),
    ("token_log_probs", "token_log_probs_backward", lambda out: out.add_(1e-30)),
    ("steppo_loss_from_logits", "token_log_probs_backward", lambda out: out.mul_(1 + 1e-4)),
    ("linear_token_log_probs", "head_logits", lambda out: out.mul_(1 + 1e-4)),
    ("linear_steppo_loss", "token_log_probs_backward", lambda out: out.mul_(1 + 1e-3)),
    ("linear_steppo_loss", "head_logits", lambda out: out.mul_(1 + 1e-3)),
]


@pytest.mark.parametrize(("operation", "name", "spoil"), WRONG)
def test_a_wrong_output_is_missed(native, operation, name, spoil):
    native(name, spoil)
    code, found = run("--dtype", "float32", operation=operation)
    assert (code, found["ok"]) == (1, False)
    missed = {row["operation"] for row in found["rows"] if not row["ok"]}
    assert operation in missed
    # Nothing that does not use the operator is blamed.
    assert all(operation in name for name in missed)


def _without_the_last(out: Tensor) -> None:
    out[-1:] = 0


@pytest.mark.parametrize(
    ("dtype", "spoil"),
    [
        (torch.bfloat16, lambda out: out.mul_(1.1)),
        (torch.float16, lambda out: out.mul_(1.02)),
        (torch.bfloat16, _without_the_last),
        (torch.float16, _without_the_last),
    ],
)
def test_each_head_in_half_precision_is_held_to_its_yardstick(native, dtype, spoil):
    """More draws make the yardstick steady, and leave it too short for a gradient that is wrong."""
    heads = [case for case in validation.CASES if case.more_draws]
    assert {case.operation for case in heads} == {"linear_token_log_probs", "linear_steppo_loss"}
    options = {"seed": 3, "batches": 1, "dtypes": (dtype,)}
    assert all(row.ok for row in validation.validate(heads, ["cpu"], CPU, **options))
    native("token_log_probs_backward", spoil)
    # Of kept sets, another operator forms the gradient, in fp32.
    whole = [case for case in heads if case.variant != "kept sets"]
    rows = validation.validate(whole, ["cpu"], CPU, **options)
    assert [row.variant for row in rows if row.ok] == []
    assert all(row.output.startswith("grad_") for row in rows)


def test_a_lucky_batch_is_not_the_yardstick():
    """Plain PyTorch errs by chance: here not at all on the batch that is checked."""
    errs = itertools.cycle((0.0, *(0.01 * number for number in range(1, 9))))

    def draw_problem(draw: Draw) -> Problem:
        by = next(errs)

        def run(inputs: Any, backend: str) -> dict[str, Tensor]:
            exact = inputs["x"].dtype == torch.float64
            error = 0.0 if exact else by if backend == "reference" else 0.08
            return {"y": torch.tensor([1.0 + error], dtype=torch.float64)}

        return Problem(run, {"x": draw.rounded(torch.ones(1))})

    def check(more_draws: int, dtype: torch.dtype) -> Any:
        case = Case("it", "", draw_problem, more_draws=more_draws)
        (row,) = validation.validate([case], ["cpu"], CPU, seed=1, batches=1, dtypes=(dtype,))
        return row

    row = check(8, torch.bfloat16)
    assert row.ok
    # The mean of the other eight.
    assert (row.batches, row.plain) == (1, pytest.approx(0.045))
    errs = itertools.repeat(0.0)
    assert not check(8, torch.bfloat16).ok
    errs = itertools.cycle((0.0, 0.5))
    # Only half precision, and only where it is asked for, has more draws.
    assert not check(0, torch.bfloat16).ok
    next(errs)
    assert not check(8, torch.float32).ok


@pytest.mark.parametrize("batches", [1, 3, 8, 11])
def test_more_batches_are_new_and_of_the_kinds_that_are_checked(batches):
    numbers = more_batches(batches, 8)
    assert len(set(numbers) - set(range(batches))) == 8
    assert {number % 8 for number in numbers} == {number % 8 for number in range(batches)}


@pytest.mark.parametrize("metric", range(len(POLICY_METRICS)))
def test_each_metric_of_the_policy_loss_is_looked_at(native, metric):
    def spoil(loss: Tensor, metrics: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        changed = metrics.clone()
        changed[metric] += 1e-3
        return loss, changed, *rest

    native("policy_loss_masked", spoil)
    last = [case for case in validation.CASES if case.operation == "steppo_loss (mask)"][-1:]
    (row,) = validation.validate(last, ["cpu"], CPU, seed=3, batches=1, dtypes=(torch.float32,))
    assert not row.ok
    assert row.output == f"metrics.{POLICY_METRICS[metric]}"


def test_a_leak_from_masked_slots_is_missed(native, monkeypatch):
    def leaks(per_step: Tensor, step_ids: Tensor) -> Tensor:
        # Multiplies by the mask instead of selecting.
        return per_step[step_ids.clamp_min(0).long()] * (step_ids >= 0)

    def launch(backend: str, name: str, before: Any = operators.launcher) -> Any:
        wrong = (backend, name) == ("cpu", "broadcast_to_tokens")
        return leaks if wrong else before(backend, name)

    monkeypatch.setattr(registry, "launcher", launch)
    code, _ = run("--batches", "60", operation="broadcast_to_tokens")
    assert code == 1


def test_another_answer_in_a_second_run_is_missed(native):
    # Far below every bound.
    flips = itertools.cycle((1 - 2e-16, 1 + 3e-16))
    native("step_gae", _entry(1, lambda returns: returns * next(flips)))
    code, found = run(operation="step_gae")
    assert code == 1
    assert "a second run gives other bits" in found["rows"][0]["note"]


def test_nan_is_missed(native):
    native("step_gae", _entry(0, lambda advantages: advantages * torch.nan))
    code, found = run(operation="step_gae")
    assert code == 1
    assert "not finite" in found["rows"][0]["note"]


def test_a_backend_that_raises_is_missed_and_named(native):
    def fail(*outputs: Tensor) -> None:
        raise RuntimeError("the abacus jams\nat bead 7")

    native("step_gae", fail)
    code, found = run(operation="step_gae")
    assert code == 1
    assert all("RuntimeError: the abacus jams (batch 0)" in row["note"] for row in found["rows"])


def test_a_miss_is_told_in_the_table_and_below(native):
    native("step_gae", _entry(0, _off))
    found = CliRunner().invoke(
        main, ["validate", "--batches", "1", "--operation", "step_gae", "--seed", "3"]
    )
    assert found.exit_code == 1
    assert "x bound" in found.output
    assert "--seed 3 repeats this" in found.output
    # The reference beside it is right.
    assert "No native backend" not in found.output
    assert "ok" in found.output


def test_a_reference_that_raises_is_a_miss_of_everything(native, monkeypatch):
    def fail(*args: Any) -> None:
        raise IndexError("out of beads")

    monkeypatch.setattr(registry, "launcher", lambda backend, name: fail)
    code, found = run(operation="step_gae")
    assert code == 1
    assert "the reference: IndexError: out of beads" in found["rows"][0]["note"]


class Clock:
    """A clock on which every look takes a second: a combination is begun at each."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 1.0
        return self._now


def test_every_operation_comes_first_where_time_is_short(native, monkeypatch):
    operations = list(dict.fromkeys(case.operation for case in validation.CASES))
    full, _ = _limited(None)

    def limited(seconds: float, seed: int = 3) -> tuple[list[Any], int]:
        monkeypatch.setattr("steppo_kernels.cli.validate.run.time", Clock())
        return _limited(seconds, seed)

    # The first is begun before the clock is looked at again.
    rows, late = limited(len(operations) - 0.5)
    assert [row.operation for row in rows] == operations
    assert len(rows) + late == len(full)
    # A row is what it would have been, and another seed draws others.
    assert all(row in full for row in rows)
    assert limited(len(operations) - 0.5)[0] == rows
    other, _ = limited(len(operations) - 0.5, seed=4)
    assert {(row.variant, row.dtype) for row in other} != {(row.variant, row.dtype) for row in rows}
    # With time for all, all are there, in the order that they have without a limit.
    assert limited(1e9) == (full, 0)
    # Without any, one is.
    assert len(limited(-1.0)[0]) == 1


def _limited(seconds: float | None, seed: int = 3) -> tuple[list[Any], int]:
    late: list[int] = []
    seen: Counter[str] = Counter()
    cases = []
    for case in validation.CASES:
        seen[case.operation] += 1
        cases += [case] if seen[case.operation] <= 2 else []
    rows = validation.validate(
        cases,
        ["cpu"],
        CPU,
        seed=seed,
        batches=1,
        dtypes=(torch.float32, torch.float64),
        seconds=seconds,
        on_late=late.append,
    )
    return rows, sum(late)


def test_what_was_not_begun_is_said_and_is_no_miss(native, monkeypatch):
    words = ["validate", "--backend", "cpu", "--batches", "1", "--operation", "step_gae"]
    words += ["--dtype", "float32", "--dtype", "float64", "--seed", "3"]

    def last_line(*more: str) -> tuple[int, str]:
        monkeypatch.setattr("steppo_kernels.cli.validate.run.time", Clock())
        found = CliRunner().invoke(main, [*words, *more])
        return found.exit_code, found.output.splitlines()[-1]

    repeats = "(--seed 3 repeats this)"
    all_ok = f"8 combinations of call, backend and dtype, 8 batches: all ok {repeats}"
    assert last_line() == last_line("--seconds", "600") == (0, all_ok)
    assert last_line("--seconds", "1.5") == (
        0,
        "2 combinations of call, backend and dtype, 2 batches: all ok, 6 more not begun, as the "
        f"time was up {repeats}",
    )
    monkeypatch.setattr("steppo_kernels.cli.validate.run.time", Clock())
    code, found = run("--seconds", "1.5", "--dtype", "float32", operation="step_gae")
    assert (code, found["ok"], found["not_begun"]) == (0, True, 2)
    assert "not_begun" not in run("--dtype", "float32", operation="step_gae")[1]
    native("step_gae", _entry(0, _off))
    code, said = last_line("--seconds", "1.5")
    assert code == 1
    assert "2 missed, 6 more not begun" in said


def test_batches_depend_on_nothing_but_the_seed(native):
    dtypes = (torch.float32,)
    cases = [case for case in validation.CASES if case.operation == "step_gae"]
    options = {"seed": 1, "batches": 2, "dtypes": dtypes}
    alone = validation.validate(cases[-1:], ["cpu"], CPU, **options)
    among = validation.validate(cases, ["reference", "cpu"], CPU, **options)
    assert among[-1] == alone[0]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", range(8))
@pytest.mark.parametrize("dtype", validation.DTYPES)
def test_drawn_units_keep_clear_of_their_borders(kind, dtype, ratio):
    """No number of a batch is nearer to a border than rounding in fp32 can carry it."""
    from steppo_kernels.cli.validate import policy_loss as drawn

    draw = Draw(11, f"clear {ratio}", kind, dtype, CPU)
    layout = StepLayout.from_mask(draw.mask(), backend="reference")
    is_token = ratio == "token"
    variant = drawn._Variant(
        "",
        {"ratio": ratio},
        dual_clip=True,
        log_ratio_max=True,
        token_clip=not is_token,
        advantages="per token",
    )
    inputs = drawn._inputs(draw, variant, layout, per_token=False)
    config = drawn._keep_clear(StepPOConfig(ratio=ratio), variant, inputs, layout, {})
    tokens = layout.token_index
    old, new = (inputs[name].double().view(-1)[tokens] for name in ("old_log_probs", "log_probs"))
    z = new - old
    if not is_token:
        low, high = config.token_clip
        sides = inputs["advantages"].view(-1)[tokens] < 0
        assert all(abs(z - edge).min() > 5e-6 for edge in (-low, high) if len(z))
        z = torch.where(sides, z.clamp(min=-low), z.clamp(max=high))
    units = z
    if not is_token:
        center = z.mean() if ratio == "centered" else 0.0
        power = {"geometric": 1.0, "product": 0.0, "centered": 0.5}[ratio]
        units = [
            center + (part - center).sum() / len(part) ** power
            for a, b in itertools.pairwise(layout.step_offsets.tolist())
            for part in (z[a:b],)
        ]
    for log_ratio in units:
        assert abs(log_ratio - config.log_ratio_max) > 5e-6
        value = log_ratio.clamp(max=config.log_ratio_max).exp()
        for edge in (1 - config.clip_low, 1 + config.clip_high, config.dual_clip):
            assert abs(value - edge) > 5e-6


@pytest.mark.parametrize("kind", range(8))
def test_drawn_probabilities_keep_clear_of_their_bounds(kind):
    from steppo_kernels.cli.validate import policy_loss as drawn

    draw = Draw(12, "clear", kind, torch.float32, CPU)
    layout = StepLayout.from_mask(draw.mask(), backend="reference")
    chosen = {"ratio": "token", "surrogate": "tv"}
    inputs = drawn._inputs(draw, drawn._Variant("", chosen), layout, per_token=False)
    config = drawn._keep_clear(
        StepPOConfig(**chosen), drawn._Variant("", chosen), inputs, layout, {}
    )
    old, new = (
        inputs[name].double().view(-1)[layout.token_index].exp()
        for name in ("old_log_probs", "log_probs")
    )
    for edge in (config.clip_high, -config.clip_low):
        assert all(abs(new - old - edge) > 5e-6)


def test_border_lies_in_a_gap_with_values_on_both_sides():
    values = torch.tensor([0.5, 1.1, 1.2, 1.3, 1.9, 2.0], dtype=torch.float64)
    assert border(values, 1.0, 7.0, least=1e-3) == pytest.approx(1.6)
    assert border(values, 2.0, 7.0, least=1e-3) == 7.0
    # A gap too narrow to be trusted.
    assert border(values, 1.0, 7.0, least=1.0) > 2.0


def test_relative_error():
    exact = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert relative_error(exact.float(), exact) == 0.0
    assert relative_error(torch.tensor([0.1, 2.0]), exact) == pytest.approx(0.05)
    assert relative_error(torch.tensor([0.1, 0.0]), torch.zeros(2)) == torch.inf
    # A single number is a sum that may cancel.
    assert relative_error(torch.tensor(0.1), torch.tensor(0.0)) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 0])) == 2.0
