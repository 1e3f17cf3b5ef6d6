"""Cases of the functions on log-probs, values and masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels.config import DEFAULT_CONFIG, Reduction
from steppo_kernels.outputs import POLICY_METRICS

from ..gates import assert_close
from ..steps.cases import PolicyCase, policy_case, rows_mask
from ..variants import Variant
from .bare import bare
from .problem import BOTH, FORWARD, Call, Case, Name, Outputs, Problem, backends
from .variants import BARE, COMPILED, EAGER

GAMMA, LAM = 0.99, 0.95
# fp32 against fp64: losses and gradients, and a recursion over thousands of tokens.
_TOLERANCE, _RECURSION = 2e-5, 1e-4
LAYOUT, MASK = "layout", "mask"
# The forward pass forms the gradient, and backward scales it.
FORMED = f"{FORWARD}, gradient formed"
PER_STEP, OF_ROWS, PER_TOKEN = "per step", "rewards of tokens, a row a step", "per token"


def policy_loss(
    shape: str, kind: str, *, backward: bool, reduction: Reduction = DEFAULT_CONFIG.reduction
) -> Case:
    """Return the case of `steppo_loss` on a layout or on a mask."""
    passes = BOTH if backward else FORMED
    named = [kind, passes] if reduction == DEFAULT_CONFIG.reduction else [kind, reduction, passes]
    name = Name("steppo_loss", ", ".join(named), shape)
    return Case(name, functools.partial(_policy_loss, shape, kind, backward, reduction))


def _policy_loss(
    shape: str, kind: str, backward: bool, reduction: Reduction, device: torch.device
) -> Problem:
    case, config = policy_case(shape), sk.StepPOConfig(reduction=reduction)
    x = case.log_probs.detach().to(device).requires_grad_()
    old, layout = case.old_log_probs.to(device), case.layout.to(device)
    steps: sk.StepLayout | Tensor = layout
    advantages = case.advantages.to(device)
    if kind == MASK:
        steps, advantages = case.mask.to(device), case.token_advantages.to(device)

    def loss(backend: Any) -> Tensor:
        return sk.steppo_loss(x, old, advantages, steps, config=config, backend=backend).loss

    def compiled() -> Callable[[], Tensor]:
        def reference(x: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
            return sk.steppo_loss(
                x, old, advantages, layout, config=config, backend="reference"
            ).loss

        found = torch.compile(reference, dynamic=False, fullgraph=True)
        return lambda: found(x, old, advantages)

    runs, left_out = backends(device)
    losses = {variant: functools.partial(loss, backend) for variant, backend in runs.items()}
    if backward:
        losses[EAGER] = functools.partial(loss, "reference")
        if kind == LAYOUT and device.type == "cuda":
            losses[COMPILED] = compiled()
    # A loss and metrics; where steps are known beforehand, their log-ratios as well.
    outputs = [((), torch.float32), ((len(POLICY_METRICS),), torch.float64)]
    if kind == LAYOUT:
        outputs.append(((layout.num_steps,), torch.float32))
    nothing = bare(x, *outputs)
    losses[BARE] = lambda: nothing()[0]
    return Problem(
        {variant: _call(one, x, backward=backward) for variant, one in losses.items()},
        _policy_check(case, config, x, device),
        moved=case.bytes_to_touch(with_layout=kind == LAYOUT),
        floors=(BARE,),
        left_out=left_out,
    )


def _policy_check(
    case: PolicyCase, config: sk.StepPOConfig, x: Tensor, device: torch.device
) -> Callable[[Variant, Outputs], float]:
    wide = x.detach().double().requires_grad_()
    wanted = sk.steppo_loss(
        wide,
        case.old_log_probs.to(device).double(),
        case.advantages.to(device).double(),
        case.layout.to(device),
        config=config,
        backend="reference",
    ).loss
    # The loss is a mean of about S terms of about 1 and either sign.
    return _loss_check(x, wide, wanted, _TOLERANCE * case.layout.num_steps**-0.5, ~case.mask)


def _call(loss: Callable[[], Tensor], x: Tensor, *, backward: bool) -> Call:
    """Return the call of a loss. An upstream gradient that is there costs no launch."""
    if not backward:
        return lambda: (loss(),)
    one = x.new_ones(())

    def both() -> Outputs:
        found = loss()
        return found, *torch.autograd.grad(found, x, one)

    return both


def _loss_check(
    x: Tensor, wide: Tensor, wanted: Tensor, allowed: float, outside: Tensor | None
) -> Callable[[Variant, Outputs], float]:
    """Return the check of a loss and its gradient, which is 0 at the positions `outside`."""
    (wanted_grad,) = torch.autograd.grad(wanted, wide)
    expected = wanted.item()

    def check(variant: Variant, outputs: Outputs) -> float:
        loss = outputs[0]
        grad = outputs[1] if len(outputs) > 1 else torch.autograd.grad(loss, x)[0]
        error = abs(loss.item() - expected)
        if not error <= allowed:
            raise AssertionError(f"{variant}: loss {loss.item()}, expected {expected}")
        assert_close(f"{variant}: gradient", grad, wanted_grad, _TOLERANCE)
        if outside is not None and bool(grad[outside.to(grad.device)].any()):
            raise AssertionError(f"{variant}: a masked token has a gradient")
        return error

    return check


def value_loss(shape: str) -> Case:
    """Return the case of `step_value_loss`, with a value a token."""
    return Case(Name("step_value_loss", BOTH, shape), functools.partial(_value_loss, shape))


def _value_loss(shape: str, device: torch.device) -> Problem:
    case = policy_case(shape)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(case.mask.shape, generator=generator)
    # A tenth of the values has moved by more than the clip range of 0.5.
    old = (values + 0.3 * torch.randn(case.mask.shape, generator=generator)).to(device)
    returns = torch.randn(case.layout.num_steps, generator=generator).to(device)
    x, layout = values.to(device).requires_grad_(), case.layout.to(device)

    def loss(backend: Any) -> Tensor:
        return sk.step_value_loss(x, returns, layout, old_values=old, backend=backend).loss

    wide = x.detach().double().requires_grad_()
    wanted = sk.step_value_loss(
        wide, returns.double(), layout, old_values=old.double(), backend="reference"
    ).loss
    runs, left_out = backends(device)
    every = {**runs, EAGER: "reference"}
    steps = layout.num_steps
    return Problem(
        {
            variant: _call(functools.partial(loss, backend), x, backward=True)
            for variant, backend in every.items()
        },
        _loss_check(x, wide, wanted, _TOLERANCE, None),
        # Of each step two values, where they stand, the return and the length; every gradient.
        moved=24 * steps + 4 * x.numel(),
        left_out=left_out,
    )


def step_gae(trajectories: int, steps: int, length: int, kind: str) -> Case:
    """Return the case of `step_gae` on steps, with numbers of steps or rewards of tokens."""
    name = Name("step_gae", kind, f"{trajectories * steps} steps, rows of {length}")
    return Case(name, functools.partial(_row_gae, trajectories, steps, length, kind))


def _row_gae(
    trajectories: int, steps: int, length: int, kind: str, device: torch.device
) -> Problem:
    """A row is a step, and its reward stands at its last token, as trainers have it."""
    rows, generator = trajectories * steps, torch.Generator().manual_seed(0)
    mask = rows_mask(rows, length, generator)
    numbers = torch.arange(rows)
    layout = sk.StepLayout.from_rows(mask, numbers // steps, numbers % steps).to(device)
    rewards, values = torch.randn((2, rows), generator=generator).to(device)
    moved = 20 * rows
    if kind == OF_ROWS:
        last = mask.sum(1, keepdim=True) - 1
        rewards = torch.zeros(mask.shape).scatter_(1, last, rewards.cpu()[:, None]).to(device)
        values = torch.randn(mask.shape, generator=generator).to(device)
        # Every reward; of each step a value, four numbers that say where it is, two results.
        moved = 4 * mask.numel() + 44 * rows
    return _gae(rewards, values, layout, moved, device)


def token_gae(shape: str) -> Case:
    """Return the case of `step_gae` on steps of one token: all of a batch."""
    return Case(Name("step_gae", PER_TOKEN, shape), functools.partial(_token_gae, shape))


def _token_gae(shape: str, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(tuple(map(int, shape.split("x"))), dtype=torch.bool)
    rewards = (0.1 * torch.randn(mask.shape, generator=generator)).to(device)
    values = torch.randn(mask.shape, generator=generator).to(device)
    layout = sk.StepLayout.from_mask(mask).per_token().to(device)
    # Of each token a reward and a step id; a value, where it is and where its step is; two results.
    return _gae(rewards, values, layout, 36 * mask.numel(), device)


def _gae(
    rewards: Tensor, values: Tensor, layout: sk.StepLayout, moved: int, device: torch.device
) -> Problem:
    def advantages(backend: Any, dtype: torch.dtype = torch.float32) -> Outputs:
        out = sk.step_gae(
            rewards.to(dtype), values.to(dtype), layout, gamma=GAMMA, lam=LAM, backend=backend
        )
        return out.advantages, out.returns

    wanted = advantages("reference", torch.float64)

    def check(variant: Variant, outputs: Outputs) -> float:
        for name, got, expected in zip(("advantages", "returns"), outputs, wanted, strict=True):
            assert_close(f"{variant}: {name}", got, expected, _RECURSION)
        return float((outputs[0] - wanted[0]).abs().max())

    runs, left_out = backends(device)
    every = {**runs, EAGER: "reference"}
    calls: dict[Variant, Call] = {
        variant: functools.partial(advantages, backend) for variant, backend in every.items()
    }
    calls[BARE] = bare(rewards, *((out.shape, torch.float32) for out in wanted))
    return Problem(
        calls,
        check,
        moved=moved,
        floors=(BARE,),
        left_out=left_out,
    )


def from_mask(shape: str) -> Case:
    """Return the case of `StepLayout.from_mask`."""
    return Case(Name("StepLayout", "from_mask", shape), functools.partial(_from_mask, shape))


def _from_mask(shape: str, device: torch.device) -> Problem:
    case = policy_case(shape)
    mask, wanted = case.mask.to(device), case.layout.to(device).tensors()

    def build(backend: Any) -> Outputs:
        # What a call costs is the layout, and not the copies that `tensors` returns.
        layouts.append(sk.StepLayout.from_mask(mask, backend=backend))
        del layouts[:-1]
        return ()

    layouts: list[sk.StepLayout] = []

    def check(variant: Variant, _: Outputs) -> float:
        for name, got in layouts[-1].tensors().items():
            if not torch.equal(got, wanted[name]):
                raise AssertionError(f"{variant}: {name} differs")
        return 0.0

    runs, left_out = backends(device)
    every = {**runs, EAGER: "reference"}
    return Problem(
        {variant: functools.partial(build, backend) for variant, backend in every.items()},
        check,
        moved=mask.nbytes + sum(value.nbytes for value in wanted.values()),
        left_out=left_out,
    )
