"""The order of rows with a gradient: every row is there once, and the host waits once a chunk."""

from __future__ import annotations

import pytest
import torch
from batches import Error
from grids import grid
from head_cases import head_case, plain_log_probs, plain_loss, waits

from steppo_kernels import StepPOConfig, linear_steppo_loss, linear_token_log_probs
from steppo_kernels.backends import operators

# Nothing, and the borders of what a warp, a program and a block of kernels take.
_SIZES = (0, 1, 31, 33, 2047, 2048, 2049, 4095, 4097, 9001)


def expected(live, ascending):
    """The order by loops: rows from the count on fill the places of dead rows before it."""
    alive = [i for i, is_live in enumerate(live) if is_live]
    dead = [i for i, is_live in enumerate(live) if not is_live]
    if not ascending:
        late = iter([i for i in alive if i >= len(alive)])
        alive = [j if live[j] else next(late) for j in range(len(alive))]
    return alive + dead, len(alive)


def drawn(size, share):
    return torch.rand(size, generator=torch.Generator().manual_seed(size)) < share


_LIVE = {
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "the first": lambda n: torch.arange(n) == 0,
    "the last": lambda n: torch.arange(n) == n - 1,
    "the later half": lambda n: torch.arange(n) >= n // 2,
    "few": lambda n: drawn(n, 0.1),
    "most": lambda n: drawn(n, 0.8),
}


def check(target, live, grad, grad_entropy=None):
    for ascending in (False, True):
        order, count = operators.launcher(target.backend, "order_live_rows")(
            *(None if x is None else x.to(target.device) for x in (grad, grad_entropy)), ascending
        )
        assert order.dtype == count.dtype == torch.int64
        assert count.shape == ()
        assert (order.tolist(), int(count)) == expected(live.tolist(), ascending)


@grid(live=_LIVE, size=_SIZES, interpreted={"size": [0, 1, 33, 2049, 4097]})
def test_every_row_is_where_it_belongs(target, live, size):
    check(target, live(size), live(size) * torch.linspace(-1.0, -0.5, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_but_0_is_a_gradient(target, dtype):
    """The smallest, NaN and infinity; of the log-prob or of the entropy."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    grad = torch.tensor([0.0, tiny, -0.0, torch.nan, torch.inf, 0.0, -1.0], dtype=dtype)
    check(target, torch.tensor([0, 1, 0, 1, 1, 0, 1]).bool(), grad)
    other = torch.tensor([-tiny, 0.0, -0.0, 0.0, torch.nan, torch.nan, 0.0], dtype=dtype)
    check(target, torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool(), grad, other)
    check(target, torch.tensor([1, 0, 0, 0, 1, 1, 0]).bool(), torch.zeros_like(grad), other)


def test_the_host_waits_for_nothing(target):
    grad = drawn(40, 0.5).float().to(target.device)
    with waits() as counter:
        for ascending in (False, True):
            operators.launcher(target.backend, "order_live_rows")(grad, grad, ascending)
    assert counter.count == 0


# Two of five steps are clipped, so that every chunk has rows of both kinds.
_CONFIGS = {
    "one pass": StepPOConfig(clip_low=0.02, clip_high=0.02),
    "with entropy": StepPOConfig(clip_low=0.02, clip_high=0.02, entropy_coef=0.1),
    "longer than a chunk": StepPOConfig(ratio="centered", clip_low=0.02, clip_high=0.02),
}


@grid(config=_CONFIGS, dtype=[torch.float32, torch.float16], chunk=[20, 40, 1000])
def test_the_loss_waits_once_a_chunk(kernel, config, dtype, chunk):
    """Beside what is looked at of tensors on a CPU, with and without gradients."""
    if kernel.backend == "cpu":
        pytest.skip("on a CPU there is nothing to wait for")
    case = head_case(3, rows=3, length=40).to(dtype, kernel.device)

    def loss(chunk):
        with waits() as counter:
            found = linear_steppo_loss(
                case.hidden,
                case.weight,
                case.token_ids,
                case.old_log_probs,
                case.advantages,
                case.layout,
                bias=case.bias,
                config=config,
                chunk_tokens=chunk,
                backend=kernel.backend,
            ).loss
        return found, counter.count

    # The first call of a process asks a GPU what its products give.
    loss(chunk)
    found, count = loss(chunk)
    with torch.no_grad():
        (_, looks), (_, as_many) = loss(chunk), loss(1000)
    assert looks == as_many
    sizes = list(groups(case.layout.step_offsets.tolist(), chunk))
    assert len(sizes) > 1 or chunk == 1000
    assert count - looks == (1 if config.ratio == "centered" else len(sizes))
    if dtype == torch.float32:
        exact = head_case(3, rows=3, length=40).to(torch.float64)
        wanted = plain_loss(exact, {"bias": exact.bias}, config=config).loss
        grads = case.gradients(found)
        for name, grad in exact.gradients(wanted).items():
            assert Error.between(grads[name], grad).largest <= 1e-4, name


def groups(borders, chunk):
    """The tokens of the chunks: whole steps, as many as fit."""
    begin = borders[0]
    for border, following in zip(borders, [*borders[1:], None], strict=True):
        if following is None or following - begin > chunk:
            if border > begin:
                yield begin, border
            begin = border


@pytest.mark.parametrize("chunk", [10, 1000])
def test_the_gradient_of_log_probs_waits_once(kernel, chunk):
    if kernel.backend == "cpu":
        pytest.skip("on a CPU there is nothing to wait for")
    case = head_case(4, rows=3, length=30).to(torch.float32, kernel.device)
    found = linear_token_log_probs(
        case.hidden,
        case.weight,
        case.token_ids,
        mask=case.mask,
        chunk_tokens=chunk,
        backend=kernel.backend,
    )
    with waits() as counter:
        grads = case.gradients(found[:, ::2].sum(), "weight")
    assert counter.count == 1
    wanted = case.gradients(plain_log_probs(case)[0][:, ::2].sum(), "weight")
    assert Error.between(grads["grad_weight"], wanted["grad_weight"]).largest <= 1e-4


def test_waits_are_counted():
    """The test of the test."""
    x = torch.arange(4.0)
    for wait in (
        lambda: x[x > 1],
        lambda: x.clone().index_put_((x > 1,), x[0]),
        lambda: x.nonzero(),
        lambda: float(x[0]),
        lambda: bool((x > 1).any()),
        lambda: x.masked_select(x > 1),
        lambda: torch.equal(x, x),
        lambda: x.repeat_interleave(x.long()),
    ):
        with waits() as counter:
            wait()
        assert counter.count == 1
    with waits() as counter:
        x[x.long()].repeat_interleave(x.long(), output_size=6).add_(1.0)
    assert counter.count == 0
