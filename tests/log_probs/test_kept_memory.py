"""Memory that is kept: lent to one caller at a time, kept for the next, in any mode of torch."""

from __future__ import annotations

import threading

import pytest
import torch
from head_cases import head_case
from torch._subclasses.fake_tensor import FakeTensorMode

from steppo_kernels import linear_steppo_loss, linear_token_log_probs
from steppo_kernels.log_probs import memory

pytestmark = pytest.mark.unpoisoned

_CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> object:
    memory.release()
    yield
    memory.release()


def place(count, dtype=torch.float32) -> int:
    with memory.scratch((count,), dtype, _CPU) as block:
        assert block.shape == (count,)
        assert block.dtype == dtype
        block.zero_()
        return block.data_ptr()


def test_is_kept_for_the_next_call_that_it_is_large_enough_for():
    first = place(1000)
    assert place(500) == first
    place(1001)
    assert [block.numel() for block in memory._kept_scratch] == [1001]
    place(250, torch.float64)
    assert [block.dtype for block in memory._kept_scratch] == [torch.float64]
    memory.release()
    assert not memory._kept_scratch


def test_is_not_kept_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_BYTES", 4000)
    place(1001)
    assert not memory._kept_scratch
    assert place(1000) == memory._kept_scratch[0].data_ptr()


def test_is_lent_once_at_a_time():
    place(32)
    with (
        memory.scratch((8, 4), torch.float32, _CPU) as one,
        memory.scratch((8, 4), torch.float32, _CPU) as two,
    ):
        assert one.data_ptr() != two.data_ptr()
    assert len(memory._kept_scratch) == 1


def test_comes_back_from_a_caller_that_raises():
    with pytest.raises(KeyError), memory.scratch((8,), torch.float32, _CPU) as block:
        raise KeyError
    assert memory._kept_scratch[0].data_ptr() == block.data_ptr()


def test_of_fake_tensors_is_not_kept():
    with FakeTensorMode(), memory.scratch((8, 4), torch.float32, _CPU) as block:
        assert block.shape == (8, 4)
        assert type(memory.gradient((8, 4), torch.float32, _CPU)) is not torch.Tensor
    assert not memory._kept_scratch
    first = place(32)
    with FakeTensorMode(), memory.scratch((8, 4), torch.float32, _CPU) as block:
        assert type(block) is not torch.Tensor
    assert place(32) == first


def test_default_device_of_torch_is_not_its_own():
    with torch.device("meta"):
        place(32)
        gradient = memory.gradient((8, 4), torch.float32, _CPU)
    assert memory._kept_scratch[0].device == _CPU
    assert gradient.device == _CPU


def gradient(*shape, dtype=torch.bfloat16):
    made = memory.gradient(shape, dtype, _CPU)
    assert made.shape == shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert not made._is_view()
    return made.zero_()


@pytest.mark.skipif(memory._ALONE is None, reason="this torch does not count references")
def test_of_a_gradient_is_used_again_when_nothing_has_it(monkeypatch):
    for hold in (
        lambda one: one[2:, :1].detach(),
        lambda one: one.view(torch.int16).numpy(),
        torch.from_dlpack,
        torch.Tensor.untyped_storage,
    ):
        one = gradient(8, 4)
        place = one.data_ptr()
        holder = hold(one)
        del one
        assert gradient(8, 4).data_ptr() != place
        del holder
    place = gradient(8, 4).data_ptr()
    for shape in ((8, 4), (4, 8), (32,)):
        assert gradient(*shape).data_ptr() == place
    assert gradient(16, dtype=torch.float32).data_ptr() == place
    # Not by a gradient that is smaller: release() would not give the rest back.
    gradient(4)
    assert memory._kept_gradient[0].nbytes() == 8
    memory.release()
    assert not memory._kept_gradient
    monkeypatch.setattr(memory, "KEPT_GRADIENT_BYTES", 63)
    gradient(8, 4)
    assert not memory._kept_gradient
    assert gradient(0, 4).numel() == 0


def test_a_gradient_is_a_tensor_as_any():
    """Resized, it is no longer what the next one needs; shared, it is another process's too."""
    for change in (
        lambda one: one.resize_(100, 100),
        lambda one: one.untyped_storage().resize_(0),
        lambda one: one.share_memory_(),
    ):
        one = gradient(8, 4)
        change(one)
        del one
        again = gradient(8, 4)
        assert again.untyped_storage().nbytes() == 64
        assert not again.is_shared()
        assert not again.any()


def test_without_counts_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "_ALONE", None)
    gradient(8, 4)
    assert not memory._kept_gradient


def test_the_weight_gets_its_gradient_without_a_copy(kernel):
    """The next step's gradient takes the same memory, whatever is in it by then."""
    case = head_case(4, rows=3, length=20).to(torch.float32, kernel.device)
    leaves = case.hidden, case.weight, case.bias

    def step():
        for leaf in leaves:
            leaf.grad = None
        run(case, kernel)[1].backward()
        return case.weight.grad

    expected = step().clone()
    place = case.weight.grad.data_ptr()
    kept = case.weight.grad
    assert torch.equal(step(), expected)
    assert case.weight.grad.data_ptr() != place
    assert torch.equal(kept, expected)
    second = case.weight.grad.data_ptr()
    case.weight.grad.fill_(torch.nan)
    case.weight.grad = None
    # The second step's memory is free again, and holds NaN.
    case.hidden.grad = None
    assert torch.equal(step(), expected)
    if kernel.device == "cpu" and memory._ALONE is not None:
        assert case.weight.grad.data_ptr() == second
    run(case, kernel)[1].backward()
    torch.testing.assert_close(case.weight.grad, 2 * expected)


def test_compiled_code_with_changing_sizes(kernel):
    """Kept memory would become an input of the graph, of a size that it was not compiled for."""
    weight = torch.randn((11, 6), device=kernel.device)

    def step(hidden, ids):
        return linear_token_log_probs(torch.tanh(hidden), weight, ids, backend=kernel.backend).sum()

    compiled = torch.compile(step, backend="aot_eager")
    for count in (3, 5, 2, 7):
        hidden = torch.randn((count, 6), device=kernel.device, requires_grad=True)
        ids = torch.arange(count, device=kernel.device)
        found = torch.autograd.grad(compiled(hidden, ids), hidden)[0]
        assert torch.equal(found, torch.autograd.grad(step(hidden, ids), hidden)[0])


def run(case, kernel):
    old = linear_token_log_probs(
        case.hidden, case.weight, case.token_ids, mask=case.mask, backend=kernel.backend
    )
    loss = linear_steppo_loss(
        case.hidden,
        case.weight,
        case.token_ids,
        case.old_log_probs,
        case.advantages,
        case.layout,
        chunk_tokens=8,
        backend=kernel.backend,
    ).loss
    return old, loss


def test_serves_inference_mode_and_training_in_turn(kernel):
    case = head_case(3, rows=3, length=20).to(torch.float32, kernel.device)
    with torch.inference_mode():
        expected = run(case, kernel)
    old, loss = run(case, kernel)
    loss.backward()
    torch.autograd.grad(old.sum(), case.hidden)
    with torch.inference_mode():
        again = run(case, kernel)
    for values in (expected, again):
        assert torch.equal(values[0], old)
        assert torch.equal(values[1], loss)


def test_outlives_inference_mode():
    with torch.inference_mode():
        place(8)
    assert not memory._kept_scratch[0].is_inference()


def test_stale_contents_do_not_show(kernel):
    case = head_case(4, rows=3, length=20).to(torch.float32, kernel.device)
    clean = run(case, kernel)
    with memory.scratch((10**5,), torch.float32, _CPU) as block:
        block.fill_(torch.nan)
    found = run(case, kernel)
    grads = [case.gradients(loss) for _, loss in (clean, found)]
    assert torch.equal(clean[0], found[0])
    assert torch.equal(clean[1], found[1])
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name])


def test_threads_do_not_share_it(kernel):
    if kernel.backend != "cpu":
        pytest.skip("the interpreter is not made for threads")
    cases = [head_case(seed, rows=4, length=60, vocabulary=999) for seed in range(4)]
    cases = [case.to(torch.float32) for case in cases]
    expected = [run(case, kernel) for case in cases]
    wrong = []

    def work(case, wanted):
        for _ in range(20):
            if not all(map(torch.equal, run(case, kernel), wanted)):
                wrong.append(case)

    workers = [
        threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
