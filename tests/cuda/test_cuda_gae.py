"""The CUDA kernels of step_gae, on the host."""

from __future__ import annotations

import pytest
import torch
from cuda_layouts import layout_of

from steppo_kernels import StepLayout
from steppo_kernels.backends import operators
from steppo_kernels.backends.compiled import gae
from steppo_kernels.layout.step_layout import require_layout

# Rows of warps and of blocks; the last but one ends within a tile of each.
_SHAPES = [(0, 5), (1, 1), (1, 7), (3, 0), (5, 33), (40, 61), (300, 3), (3, 2500), (2, 4099)]
_FORMS = ["mask", "rows", "tokens", "trajectories", "kept", "strangers", "numbered"]


class Case:
    """Random inputs; what no step may take is NaN or infinite."""

    def __init__(self, steps, dtype, *, per_token=(True, True), truncated=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.steps, self.dtype, self.per_token = steps, dtype, per_token
        num_tokens = steps.step_ids.numel()

        def normal(count):
            return torch.randn(count, dtype=torch.float64, generator=generator).to(dtype)

        self.rewards = normal(num_tokens if per_token[0] else steps.num_steps)
        if per_token[0]:
            stray = (steps.step_ids.view(-1) < 0).nonzero().squeeze(1)
            self.rewards[stray[::3]] = torch.nan
            self.rewards[stray[1::5]] = torch.inf
        per_step = torch.full((steps.num_steps,), torch.nan, dtype=dtype)
        per_step[steps.trajectory_steps] = normal(len(steps.trajectory_steps))
        self.values = per_step
        if per_token[1]:
            self.values = torch.full((num_tokens,), torch.nan, dtype=dtype)
            if num_tokens:
                self.values[steps.state_index] = per_step
        self.bootstrap = normal(steps.num_trajectories) if truncated else None

    def given(self, config, dtype=None):
        """Return the arguments of the operator."""
        tensors = (
            None if tensor is None else tensor.to(dtype or self.dtype)
            for tensor in (self.rewards, self.values, self.bootstrap)
        )
        return (*tensors, self.steps.timeline, config, *self.per_token, self.steps.along_rows)

    def on(self, cuda, config):
        """Return advantages and returns."""
        return gae.step_gae(cuda, *self.given(config))

    def exact(self, config):
        """Return the same in fp64, from the reference."""
        return operators.launcher("reference", "step_gae")(*self.given(config, torch.float64))

    def check(self, cuda, config):
        """Compare the two; differences are weighed against the largest of all numbers."""
        exact = self.exact(config)
        self._compare(self.on(cuda, config), exact)
        if self.steps.along_rows:
            # What goes along rows may also be taken step by step.
            before, self.steps = self.steps, self.steps._replace()
            assert not self.steps.along_rows
            self._compare(self.on(cuda, config), exact)
            self.steps = before

    def _compare(self, outputs, wanted):
        for found, exact in zip(outputs, wanted, strict=True):
            assert found.dtype == self.dtype
            finite = exact[exact.isfinite()].abs()
            size = max(float(finite.max()), 1.0) if len(finite) else 1.0
            near = 16 * torch.finfo(torch.float32).eps if found.dtype == torch.float32 else 1e-11
            torch.testing.assert_close(
                found.double(), exact, rtol=0, atol=near * size, equal_nan=True
            )
            assert not found[~_members(self.steps)].any()


def _members(steps):
    found = torch.zeros(steps.num_steps, dtype=torch.bool)
    found[steps.trajectory_steps] = True
    return found


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("form", _FORMS)
def test_agrees_with_the_reference(cuda, form, shape):
    steps = layout_of(form, shape)
    has_tokens = steps.step_ids.numel() > 0
    for seed, (per_token, truncated, config) in enumerate(
        [
            ((True, has_tokens), True, (0.99, 0.95, 0.0)),
            ((True, False), False, (1.0, 1.0, 1.0)),
            ((False, has_tokens), True, (0.9, 0.0, 1.0)),
            ((False, False), True, (0.0, 1.0, 0.0)),
        ]
    ):
        dtype = torch.float64 if seed % 2 else torch.float32
        Case(steps, dtype, per_token=per_token, truncated=truncated, seed=seed).check(cuda, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_token", [(False, False), (True, True)], ids=str)
def test_many_steps(cuda, dtype, per_token):
    """More than one block whitens."""
    Case(layout_of("tokens", (7, 9001)), dtype, per_token=per_token).check(cuda, (1.0, 0.97, 1.0))


@pytest.mark.parametrize(
    "lengths", [[1], [31, 32, 33, 0, 1], [4097], [511, 512, 513, 1025]], ids=str
)
def test_trajectories_end_anywhere_in_a_tile(cuda, lengths):
    total = sum(lengths)
    rows = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    ones = torch.ones(total, dtype=torch.bool)
    steps = require_layout(
        StepLayout.from_mask(ones, cu_seqlens=rows, boundaries=ones, backend="reference")
    )
    for whiten in (0.0, 1.0):
        Case(steps, torch.float64).check(cuda, (1.0, 0.99, whiten))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_tensors_may_begin_anywhere(cuda, offset):
    for shape in [(5, 33), (2, 2051)]:
        for dtype in (torch.float32, torch.float64):
            case = Case(layout_of("mask", shape), dtype)
            for name in ("rewards", "values"):
                tensor = getattr(case, name)
                setattr(case, name, torch.cat((tensor.new_zeros(offset), tensor))[offset:])
            case.check(cuda, (0.99, 0.95, 1.0))
            ids = case.steps.step_ids.view(-1)
            moved = torch.cat((ids.new_zeros(offset), ids))[offset:]
            case.steps = case.steps._replace(step_ids=moved, along_rows=case.steps.along_rows)
            case.check(cuda, (0.99, 0.95, 1.0))


@pytest.mark.parametrize("form", ["mask", "trajectories", "strangers"])
def test_bits_do_not_depend_on_the_order_of_threads(cuda, form):
    case = Case(layout_of(form, (90, 25)), torch.float32)
    found = []
    for seed in range(5):
        cuda.kernels.order(seed, 1 + seed % 3)
        found.append(case.on(cuda, (0.99, 0.95, 1.0)))
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_rewards_outside_of_actions(cuda):
    """They go to the latest step before them, at the head of a row to its first step."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1]])
    steps = require_layout(StepLayout.from_mask(mask, backend="reference"))
    case = Case(steps, torch.float64, per_token=(True, False), truncated=False)
    case.values.zero_()
    case.rewards = 10.0 ** torch.arange(21, dtype=torch.float64)
    case.rewards[4], case.rewards[17] = torch.nan, torch.inf
    advantages, _ = case.on(cuda, (0.0, 1.0, 0.0))
    expected = [1111.0, 1.1e6, 1e14 + 1e15 + 1e16 + 1e18 + 1e19, 1e20]
    torch.testing.assert_close(
        advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0.0
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["rewards", "values", "bootstrap"])
@pytest.mark.parametrize("config", [(1.0, 1.0), (0.9, 1e-30), (0.9, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_what_is_not_finite_spreads_as_in_the_recursion(cuda, bad, name, config, of_tokens):
    for shape in [(3, 60), (2, 1500)]:
        steps = layout_of("tokens", shape)
        case = Case(steps, torch.float64, per_token=(of_tokens, of_tokens))
        tensor = getattr(case, name)
        if of_tokens and name != "bootstrap":
            tensor[steps.token_index[steps.num_steps // 2]] = bad
        else:
            tensor[len(tensor) // 2] = bad
        for whiten in (0.0, 1.0):
            case.check(cuda, (*config, whiten))


# Rows of a warp each, and of a block each; 512 and 4096 tokens are what these take at once in fp32.
@pytest.mark.parametrize("length", [40, 300, 700, 9000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_with_prompts_and_gaps(cuda, length, share, dtype):
    """The rewards before the first step, between steps and behind the last one reach their step."""
    generator = torch.Generator().manual_seed(length)
    prompts = torch.tensor([0, 1, length // 3, length // 2 + 5, length - 1, length])
    place = torch.arange(length)
    is_action = torch.rand(len(prompts), length, generator=generator) < share
    # Steps of up to some tokens, which others of no step may lie between.
    numbers = (torch.rand(len(prompts), length, generator=generator) < 0.3).cumsum(1)
    ids = torch.where(is_action & (place >= prompts[:, None]), numbers, -1)
    for layout in (
        StepLayout.from_step_ids(ids, backend="reference"),
        StepLayout.from_mask(ids >= 0, backend="reference"),
        StepLayout.from_step_ids(ids, backend="reference").per_token(),
        StepLayout.from_mask(ids >= 0, backend="reference").per_trajectory(),
    ):
        steps = require_layout(layout)
        assert steps.along_rows
        for per_token, config in (((True, True), (0.99, 0.95, 1.0)), ((True, False), (1, 1, 0))):
            Case(steps, dtype, per_token=per_token, seed=length).check(cuda, config)


def test_rows_of_a_packed_batch_begin_anywhere(cuda):
    """Those of others, in front of a row and behind it, are none of its own."""
    lengths = torch.tensor([1, 0, 3, 9, 8, 7, 600, 5, 4097, 0, 16, 1])
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 3, (int(rows[-1]),), generator=generator)
    for row in range(len(lengths)):
        own = ids[rows[row] : rows[row + 1]]
        own.copy_(torch.where(own < 0, -1, (own == 2).cumsum(0)))
    layout = StepLayout.from_step_ids(ids, cu_seqlens=rows, backend="reference")
    steps = require_layout(layout)
    for dtype in (torch.float32, torch.float64):
        Case(steps, dtype).check(cuda, (0.97, 0.9, 1.0))


def test_a_tile_of_a_row_has_one_step_or_none(cuda):
    ids = torch.full((2, 9000), -1)
    ids[0, 4] = ids[0, 8999] = ids[1, 8000] = 0
    steps = require_layout(StepLayout.from_step_ids(ids, backend="reference"))
    case = Case(steps, torch.float64)
    case.check(cuda, (0.5, 0.5, 0.0))


def test_a_bad_reward_of_a_token_stays_in_its_step(cuda):
    steps = layout_of("mask", (3, 2500))
    case = Case(steps, torch.float32)
    case.rewards[steps.token_index[2000]] = torch.nan
    case.rewards[steps.token_index[3000]] = torch.inf
    case.check(cuda, (0.0, 1.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (700, 1), (20000, 1), (3, 2000)], ids=str)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_equal_advantages_have_no_spread(cuda, shape, dtype, of_tokens):
    ones = torch.ones(shape)
    steps = require_layout(StepLayout.from_mask(ones, boundaries=ones, backend="reference"))
    case = Case(steps, dtype, per_token=(of_tokens, of_tokens), truncated=False)
    case.rewards.fill_(0.1)
    case.values.fill_(0.7)
    advantages, returns = case.on(cuda, (0.0, 1.0, 1.0))
    assert not advantages.any()
    assert (returns == returns[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 512), (3, 8192)], ids=str)
@pytest.mark.parametrize("values_per_token", [False, True])
def test_a_prompt_ends_where_tokens_of_a_warp_begin(cuda, shape, values_per_token, dtype):
    """All tokens of the warp begin steps, and the first one gets the rewards of the prompt."""
    ids = torch.arange(shape[1]).repeat(shape[0], 1)
    # The numbers of the last row's steps begin at no multiple of 16 bytes.
    for row, prompt in enumerate([0, shape[1] // 2 + 3, shape[1] // 2]):
        ids[row, :prompt] = -1
    steps = require_layout(StepLayout.from_step_ids(ids, backend="reference"))
    for config in [(0.99, 0.95, 1.0), (0.0, 1.0, 0.0)]:
        Case(steps, dtype, per_token=(True, values_per_token)).check(cuda, config)


@pytest.mark.parametrize("place", [0, 1, 300, -2, -1])
@pytest.mark.parametrize("shape", [(1, 40), (2, 3000)], ids=str)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_an_advantage_far_from_all_others(cuda, place, shape, of_tokens):
    """The spread loses no digits to it, wherever it lies."""
    ones = torch.ones(shape)
    steps = require_layout(StepLayout.from_mask(ones, boundaries=ones, backend="reference"))
    case = Case(steps, torch.float64, per_token=(of_tokens, of_tokens))
    case.rewards[place % shape[1]] = 1e9
    config = (0.0, 1.0, 1.0)
    found, exact = case.on(cuda, config)[0], case.exact(config)[0]
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
