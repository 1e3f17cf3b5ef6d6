"""The CUDA kernels of the policy loss, on the host, against the reference in fp64."""

from __future__ import annotations

import random

import pytest
import torch
from batches import Batch, random_batch
from methods import METHODS
from reference_operators import OPERATORS

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.backends.compiled import policy_loss
from steppo_kernels.config import KL_ESTIMATORS, REDUCTIONS
from steppo_kernels.layout.step_layout import require_layout

_REFERENCE, _REFERENCE_MASKED = OPERATORS["policy_loss"], OPERATORS["policy_loss_masked"]


def rows_of(batch: Batch) -> StepLayout:
    """A row a step, in no order; some rows are empty."""
    count = batch.mask.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return StepLayout.from_rows(batch.mask, [i % 3 for i in range(count)], order.tolist())


LAYOUTS = {
    "runs": lambda batch: batch.layout,
    "rows": rows_of,
    "tokens": lambda batch: batch.layout.per_token(),
    "trajectories": lambda batch: batch.layout.per_trajectory(),
}


def arguments(seed: int, batch: Batch, layout: StepLayout, config: StepPOConfig, dtype):
    """Draw which optional arguments there are, and their numbers."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def maybe(value, chance=0.5):
        return value if rng.random() < chance else None

    def of(low, high, *shape):
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(dtype)

    def flat(name):
        return getattr(batch, name).to(dtype).reshape(-1)

    count, num_tokens = layout.num_steps, batch.mask.numel()
    advantages_per_token, weights_per_token = rng.random() < 0.5, rng.random() < 0.5
    size = num_tokens if advantages_per_token else count
    weights = of(0.0, 2.0, num_tokens if weights_per_token else count)
    weights[::5] = 0.0
    advantages = of(-1.0, 1.0, size)
    advantages[::4] = 0.0
    weights = maybe(weights)
    bounds = config.surrogate != "soft" and rng.random() < 0.5
    entropy = flat("entropy") if config.entropy_coef else maybe(flat("entropy"), 0.2)
    return (
        flat("log_probs"),
        entropy,
        maybe(flat("old_log_probs"), 0.9),
        advantages,
        flat("ref_log_probs") if config.kl_coef else None,
        weights,
        maybe(of(0.0, 1.0, count)),
        of(0.05, 0.5, count) if bounds else None,
        of(0.05, 0.5, count) if bounds else None,
        maybe(torch.tensor(0.01, dtype=torch.float64)),
        maybe(torch.tensor(3.5, dtype=torch.float64)),
        require_layout(layout).steps,
        config.kernel,
        advantages_per_token,
        weights is not None and weights_per_token,
        True,
        entropy is not None,
    )


def of_mask(args, mask):
    """The arguments of the mask form, where advantages and weights are given per token."""
    log_probs, entropy, old, _, reference, *_, center, normalizer, _, config, _, _, grad, other = (
        args
    )
    spread = torch.randn(mask.numel(), generator=torch.Generator().manual_seed(2)).to(old.dtype)
    given = log_probs, entropy, old, spread, reference, spread.abs().floor()
    needs = grad, other
    return *given, center, normalizer, mask.reshape(-1), mask.shape[-1], config, *needs


def in_fp64(args):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    ]


def check(found, exact, tolerance: float) -> None:
    """Compare loss, metrics, log-ratios and gradients, which lack their scale."""
    loss, metrics, *others, scale = found
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(loss.double(), exact[0].double(), **close)
    torch.testing.assert_close(metrics, exact[1], **close)
    if len(others) == 3:
        torch.testing.assert_close(others.pop(0).double(), exact[2].double(), **close)
    for grad, expected in zip(others, exact[-3:-1], strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            torch.testing.assert_close(grad.double() * scale, expected, **close)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_on_every_layout(cuda, method, where):
    for seed in range(3):
        rng = random.Random(f"{method} {where} {seed}")
        batch = random_batch(seed, 5, 40, ratio=method.ratio, log_ratios=(-0.8, 0.8))
        clip = rng.choice([None, (0.3, 0.2)]) if method.ratio != "token" else None
        config = method.config(
            reduction=rng.choice(REDUCTIONS),
            kl_coef=rng.choice([0.0, 0.1]),
            kl_estimator=rng.choice(KL_ESTIMATORS),
            entropy_coef=rng.choice([0.0, 0.05]),
            token_clip=clip,
        )
        args = arguments(rng.randrange(1000), batch, LAYOUTS[where](batch), config, torch.float64)
        check(policy_loss.policy_loss(cuda, *args), _REFERENCE(*args), 1e-11)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_method_on_a_mask(cuda, method, reduction):
    """Runs that end with a chunk, behind it, and in the middle; rows of any length."""
    for length in (7, 700):
        batch = random_batch(length, 3, length, ratio=method.ratio, log_ratios=(-0.8, 0.8))
        clip = (0.3, 0.2) if method.ratio != "token" and length == 7 else None
        config = method.config(reduction=reduction, kl_coef=0.1, entropy_coef=0.05, token_clip=clip)
        args = arguments(3, batch, batch.layout, config, torch.float64)
        old = batch.old_log_probs.double().reshape(-1)
        args = of_mask((*args[:2], old, *args[3:]), batch.mask)
        found = policy_loss.policy_loss_masked(cuda, *args)
        check(found, _REFERENCE_MASKED(*args), 1e-11)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_fp32(cuda, method):
    batch = random_batch(2, 4, 60, ratio=method.ratio, log_ratios=(-0.5, 0.5))
    args = arguments(7, batch, batch.layout, method.config(kl_coef=0.1), torch.float32)
    check(policy_loss.policy_loss(cuda, *args), _REFERENCE(*in_fp64(args)), 3e-5)


@pytest.mark.parametrize("tolerance", [1e-11, 3e-5], ids=["fp64", "fp32"])
@pytest.mark.parametrize("length", [1, 2, 4, 7, 8, 14, 15, 300, 600])
@pytest.mark.parametrize("method", ["geometric", "token", "centered"])
def test_lanes_of_a_step(cuda, method, length, tolerance):
    """How many lanes take a step, or a block, depends on their mean length, about twice `length`.

    One step is longer than what its lanes load together. A reference makes a call that is not a
    plain one.
    """
    mask = torch.zeros(7, 10 * length, dtype=torch.bool)
    mask[:, :length] = True
    mask[6, : 9 * length] = True
    layout, generator = StepLayout.from_mask(mask), torch.Generator().manual_seed(length)
    dtype = torch.float64 if tolerance < 1e-6 else torch.float32
    new, old, reference, spread = (
        torch.randn((4, mask.numel()), generator=generator, dtype=torch.float64) / 10
    ).to(dtype)
    config = StepPOConfig(ratio=method, clip_low=0.05, clip_high=0.05)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64).to(dtype)
    steps = require_layout(layout).steps
    for given, of_token in ((advantages, False), (spread, True)):
        for other in (None, reference):
            options = [other, *[None] * 6]
            tail = steps, config.kernel, of_token, False, True, False
            args = (new, None, old, given, *options, *tail)
            exact = _REFERENCE(*in_fp64(args))
            check(policy_loss.policy_loss(cuda, *args), exact, tolerance)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 0), (2, 5000)], ids=str)
def test_sizes(cuda, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.9
    layout = StepLayout.from_mask(mask)
    new = torch.randn(mask.numel(), dtype=torch.float64) / 10
    config = StepPOConfig(clip_low=0.05, clip_high=0.05)
    args = (
        new, None, torch.zeros_like(new), torch.ones(layout.num_steps, dtype=torch.float64),
        *[None] * 7, require_layout(layout).steps, config.kernel, False, False, True, False,
    )  # fmt: skip
    check(policy_loss.policy_loss(cuda, *args), _REFERENCE(*args), 1e-11)
    given = new, None, torch.zeros_like(new), torch.ones_like(new), *[None] * 4
    args = (*given, mask.reshape(-1), shape[1], config.kernel, True, False)
    found = policy_loss.policy_loss_masked(cuda, *args)
    check(found, _REFERENCE_MASKED(*args), 1e-11)


@pytest.mark.parametrize("length", [191, 192, 193, 384, 511, 512, 513, 1024, 1500])
def test_runs_at_the_borders_of_chunks(cuda, length):
    """A chunk ends at a multiple of the words that a warp loads, whichever that is."""
    mask = torch.zeros(5, length, dtype=torch.bool)
    for border in range(32, length, 32):
        mask[0, border - 2 : border + 2] = True
        mask[1, border - 9 : border] = True
        mask[2, border : border + 9] = True
    mask[3, 100:] = True
    mask[4, :-1] = True
    new = torch.randn(mask.numel(), dtype=torch.float64) / 10
    config = StepPOConfig(clip_low=0.05, clip_high=0.05, reduction="trajectory_mean")
    given = new, None, torch.zeros_like(new), torch.ones_like(new), *[None] * 4
    args = (*given, mask.reshape(-1), length, config.kernel, True, False)
    check(policy_loss.policy_loss_masked(cuda, *args), _REFERENCE_MASKED(*args), 1e-11)


@pytest.mark.parametrize("off", [0, 1, 15])
@pytest.mark.parametrize("length", [2047, 2048, 2064, 4099, 6150])
def test_warps_count_the_runs_of_a_row(cuda, length, off):
    """Each counts them, in packs of 16 bytes wherever the row begins, and adds some of them.

    Blocks take many chunks after each other, of which some are full of runs and others empty. A run
    may end thousands of tokens behind its chunk. What lies before the mask is not of it.
    """
    generator = torch.Generator().manual_seed(length + off)
    mask = (torch.rand(3 * length + off, generator=generator) < 0.5)[off:]
    assert mask.data_ptr() % 16 == off
    mask[: length // 2], mask[-length // 3 :] = False, True
    mask[length - 3 : 2 * length] = torch.arange(length + 3) < length - off
    if off > 0:
        mask.as_strided((off,), (1,), 0).fill_(True)
    now, spread = torch.randn((2, 3 * length), generator=generator, dtype=torch.float64) / 10
    given = now, None, torch.zeros_like(now), spread, None, None, None, None, mask
    for reduction in REDUCTIONS:
        config = StepPOConfig(clip_low=0.05, clip_high=0.05, reduction=reduction)
        exact = _REFERENCE_MASKED(*given, length, config.kernel, True, False)
        for most_blocks in (1, 2, 0):
            cuda.kernels.order(length + most_blocks, 2, most_blocks)
            found = policy_loss.policy_loss_masked(cuda, *given, length, config.kernel, True, False)
            check(found, exact, 1e-11)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 14])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_groups_of_lanes_take_short_steps_together(cuda, method, count):
    """Of one or of many chunks, up to 64 tokens each, with longer ones in between or not."""
    lengths = [3, 64, 63, 1, 65, 40, 8, 9, 300, 64, 31, 1100, 128, 2][:count]
    row = [ones for length in lengths for ones in (*[True] * length, False, False)]
    apart = [ones for length in lengths for ones in (*[True] * length, *[False] * 400)]
    generator = torch.Generator().manual_seed(count)
    for tokens in (row, apart[: 40 * len(row)]):
        mask = torch.tensor([tokens, [not one for one in tokens], tokens])
        now, spread, reference = (
            torch.randn((3, mask.numel()), generator=generator, dtype=torch.float64) / 10
        )
        of_step = torch.full_like(now, 0.7)
        old = torch.zeros_like(now)
        for advantages, other in ((of_step, None), (spread, reference)):
            config = method.config(
                kl_coef=0.0 if other is None else 0.1, reduction=REDUCTIONS[count % len(REDUCTIONS)]
            )
            given = now, None, old, advantages, other, None, None, None, mask.reshape(-1)
            tail = mask.shape[1], config.kernel, True, False
            exact = _REFERENCE_MASKED(*given, *tail)
            for most_blocks in (1, 0):
                cuda.kernels.order(count, 2, most_blocks)
                found = policy_loss.policy_loss_masked(cuda, *given, *tail)
                check(found, exact, 1e-11)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_block_shares_long_steps(cuda, method):
    """Of 1024 tokens on, and with shorter ones in the same chunks: on a mask and on a layout."""
    mask = torch.zeros(4, 5000, dtype=torch.bool)
    mask[0, :1023], mask[0, 1024:2048], mask[0, 2050:2060] = True, True, True
    mask[1, 5:] = mask[2, 4000:] = mask[3] = True
    generator = torch.Generator().manual_seed(8)
    new, spread, reference, weights, entropy = (
        torch.randn((5, mask.numel()), generator=generator, dtype=torch.float64) / 10
    )
    old, layout = torch.zeros_like(new), StepLayout.from_mask(mask)
    clip = (0.3, 0.2) if method.ratio != "token" else None
    config = method.config(kl_coef=0.1, entropy_coef=0.05, token_clip=clip)
    steps = require_layout(layout).steps
    for advantages, extra in ((spread, True), (spread, False), (torch.full_like(new, 0.7), True)):
        other = reference if extra else None
        given = new, entropy, old, advantages, other, weights if extra else None
        if not extra:
            given, config = (new, None, *given[2:]), StepPOConfig(clip_low=0.05, clip_high=0.05)
        needs = True, extra
        of_steps = [None, None, None, None, None, steps, config.kernel, True, extra, *needs]
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            args = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in given]
            args_of_mask = *args, None, None, mask.reshape(-1), 5000, config.kernel, *needs
            exact = _REFERENCE_MASKED(*in_fp64(args_of_mask))
            check(policy_loss.policy_loss_masked(cuda, *args_of_mask), exact, tolerance)
            exact = _REFERENCE(*in_fp64(args), *of_steps)
            check(policy_loss.policy_loss(cuda, *args, *of_steps), exact, tolerance)


@pytest.mark.parametrize("most_blocks", [1, 2, 0])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 10, 16, 31, 32, 33, 65, 700])
def test_a_warp_takes_a_step_where_there_are_no_more(cuda, count, most_blocks):
    """Else groups of lanes take short ones; 0, 1 or 3 of them are longer.

    A step of one token in every second place is as much as a chunk can hold.
    """
    generator = torch.Generator().manual_seed(count)
    for longer in (0, 1, 3):
        mask = torch.zeros(2, 1536 * 5, dtype=torch.bool)
        mask[0, : 2 * count : 2] = True
        for k in range(longer):
            mask[1, 300 * k : 300 * k + 70 + k] = True
        now, spread = torch.randn((2, mask.numel()), generator=generator, dtype=torch.float64) / 10
        config = StepPOConfig(clip_low=0.05, clip_high=0.05, reduction="trajectory_mean")
        given = now, None, torch.zeros_like(now), spread, None, None, None, None, mask.reshape(-1)
        tail = mask.shape[1], config.kernel, True, False
        exact = _REFERENCE_MASKED(*given, *tail)
        cuda.kernels.order(count, 2, most_blocks)
        check(policy_loss.policy_loss_masked(cuda, *given, *tail), exact, 1e-11)


@pytest.mark.parametrize("most_blocks", [1, 2, 0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_block_shares_every_long_step(cuda, reduction, most_blocks):
    """One after the other: rows of 1536 tokens have 8 chunks, of which the first has a step.

    The last ones end at the row's end, at the end of a chunk, and in the words behind one.
    """
    mask = torch.ones(7, 1536, dtype=torch.bool)
    mask[4, 1152:], mask[5, 1200:], mask[6, 1216:] = False, False, False
    generator = torch.Generator().manual_seed(3)
    now, spread = torch.randn((2, mask.numel()), generator=generator, dtype=torch.float64) / 10
    config = StepPOConfig(clip_low=0.05, clip_high=0.05, reduction=reduction)
    given = now, None, torch.zeros_like(now), spread, None, None, None, None, mask.reshape(-1)
    exact = _REFERENCE_MASKED(*given, 1536, config.kernel, True, False)
    cuda.kernels.order(5, 2, most_blocks)
    check(
        policy_loss.policy_loss_masked(cuda, *given, 1536, config.kernel, True, False), exact, 1e-11
    )


def test_a_mask_may_have_any_byte_but_0(cuda):
    mask = torch.tensor([0, 1, 2, 0, 255, 0], dtype=torch.uint8).view(torch.bool)
    new = torch.full((6,), 0.1, dtype=torch.float64)
    given = new, None, torch.zeros_like(new), torch.ones_like(new), *[None] * 4
    tail = 6, StepPOConfig().kernel, True, False
    found = policy_loss.policy_loss_masked(cuda, *given, mask, *tail)
    check(found, _REFERENCE_MASKED(*given, mask.view(torch.uint8) != 0, *tail), 1e-11)


@pytest.mark.parametrize("shape", [(1, 40000), (3, 16384), (2, 16385)], ids=str)
def test_runs_of_long_rows_are_counted_once(cuda, shape):
    """By a launch before, whose counts are forgotten: those of the call after are its own."""
    rows, length = shape
    config = StepPOConfig(clip_low=0.05, clip_high=0.05, reduction="trajectory_mean")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(shape, generator=generator) < 0.6
        now, spread = torch.randn((2, rows * length), generator=generator, dtype=torch.float64)
        given = now, None, now + 0.1, spread, None, None, None, None
        tail = length, config.kernel, True, False
        found = policy_loss.policy_loss_masked(cuda, *given, mask.reshape(-1), *tail)
        check(found, _REFERENCE_MASKED(*given, mask.reshape(-1), *tail), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ratio", ["geometric", "product", "centered"])
@pytest.mark.parametrize("longest", [3, 20, 300])
def test_a_plain_call_has_the_bits_of_another(cuda, dtype, ratio, longest):
    """It has a kernel of its own; weights of 1, which change nothing, ask for the general one."""
    batch = random_batch(11, 16, longest)
    config = StepPOConfig(ratio=ratio, clip_low=0.05, clip_high=0.05)
    new, old = (x.reshape(-1).to(dtype) for x in (batch.log_probs, batch.old_log_probs))
    steps = require_layout(batch.layout).steps
    advantages = torch.randn(steps.num_steps, generator=torch.Generator().manual_seed(1)).to(dtype)

    def call(weights):
        given = new, None, old, advantages, None, None, weights, None, None, None, None
        tail = steps, config.kernel, False, False, True, False
        return policy_loss.policy_loss(cuda, *given, *tail)

    def masked_call(weights):
        given = new, None, old, spread, None, weights, None, None, batch.mask.reshape(-1)
        return policy_loss.policy_loss_masked(
            cuda, *given, batch.mask.shape[-1], config.kernel, True, False
        )

    spread = torch.where(batch.mask.reshape(-1), advantages[steps.step_ids.reshape(-1).long()], 0)
    for run, ones in ((call, torch.ones_like(advantages)), (masked_call, torch.ones_like(new))):
        for one, same in zip(run(None), run(ones), strict=True):
            assert (one is None and same is None) or torch.equal(one, same)


def test_bits_do_not_depend_on_the_order_of_threads(cuda):
    batch = random_batch(3, 16, 300)
    config = StepPOConfig(ratio="centered", kl_coef=0.1, entropy_coef=0.1)
    args = arguments(1, batch, batch.layout, config, torch.float32)
    masked = of_mask((*args[:2], batch.old_log_probs.reshape(-1), *args[3:]), batch.mask)
    found = []
    for seed in range(4):
        cuda.kernels.order(seed, 1 + seed)
        one = policy_loss.policy_loss(cuda, *args)
        found.append((*one, *policy_loss.policy_loss_masked(cuda, *masked)))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one.nan_to_num(), same.nan_to_num())


def test_numbers_may_come_by_value(cuda, monkeypatch):
    """As a GPU is given those of the CPU."""
    batch = random_batch(7, 6, 50)
    args = arguments(1, batch, batch.layout, StepPOConfig(ratio="centered"), torch.float64)
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (0.01, 3.5))
    args = (*args[:2], batch.old_log_probs.reshape(-1).double(), *args[3:9], *numbers, *args[11:])
    masked = of_mask(args, batch.mask)
    calls = ((policy_loss.policy_loss, args), (policy_loss.policy_loss_masked, masked))
    by_address = [call(cuda, *given) for call, given in calls]
    found = []

    def by_value(value: torch.Tensor, _: torch.Tensor) -> tuple[int, float]:
        found.append(value.item())
        return 0, found[-1]

    monkeypatch.setattr(policy_loss, "number", by_value)
    for (call, given), expected in zip(calls, by_address, strict=True):
        for one, same in zip(call(cuda, *given), expected, strict=True):
            assert (one is None and same is None) or torch.equal(one, same)
    assert found == [0.01, 3.5, 0.01, 3.5]


def test_a_nan_stays_in_its_step(cuda):
    batch = random_batch(5, 6, 50)
    step = batch.layout.step_lengths.argmax()
    at = batch.layout.token_index[batch.layout.step_offsets[step]]
    batch.log_probs.view(-1)[at] = torch.nan
    args = arguments(3, batch, batch.layout, StepPOConfig(), torch.float64)
    check(policy_loss.policy_loss(cuda, *args), _REFERENCE(*args), 1e-11)
