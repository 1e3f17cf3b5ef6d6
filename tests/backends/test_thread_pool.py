"""The threads of the C++ kernels: what they share with the process around them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from steppo_kernels import StepLayout, StepPOConfig, step_gae, steppo_loss
from steppo_kernels.backends import choice

_ROOT = Path(__file__).parents[2]
_NATIVE = _ROOT / "tests/native/pool.cpp"

pytestmark = pytest.mark.skipif(
    choice.why_not_cpu() is not None, reason=f"cpu: {choice.why_not_cpu()}"
)

# Enough tokens for four threads of a loss.
_ROWS, _LENGTH = 1024, 1024
# Programs call a kernel and nothing of torch that runs on several threads: what OpenMP does where a
# thread cannot be made, or in a child of fork, would end them.
_SETUP = f"""
import os, resource, sys, threading, time
import torch
from steppo_kernels import _C_cpu
torch.set_num_threads(1)
count = {_ROWS * _LENGTH}
step_ids = (torch.arange(count) // 100).to(torch.int32)
per_step = torch.randn(count // 100 + 1)
expected = per_step[step_ids]
found = torch.empty_like(expected)
broadcast = 0, per_step.data_ptr(), step_ids.data_ptr(), count, found.data_ptr()

def call(threads):
    found.zero_()
    _C_cpu.broadcast_to_tokens(broadcast, (threads, 0, 0, 0))
    return torch.equal(found, expected)

def threads_now():
    return len(os.listdir("/proc/self/task"))
"""


def run(program: str, setup: str = _SETUP) -> str:
    """Run a program in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", setup + program],
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def batch(denormal=False):
    """Log-probs of a million tokens; with `denormal`, much of it is below the normal range."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(_ROWS, _LENGTH, generator=generator) < 0.9
    x, old, advantages = (torch.randn(mask.shape, generator=generator) / 8 for _ in range(3))
    if denormal:
        small = torch.rand(mask.shape, generator=generator) < 0.5
        x = torch.where(small, 1e-39 * x, x)
        old = torch.where(small, 1e-39 * old, old)
        advantages = 1e-36 * advantages
    return mask, x, old, advantages


def results(mask, x, old, advantages):
    """Every output of the loss of a mask and of a layout, and of the advantages."""
    found = []
    config = StepPOConfig(clip_low=0.9, clip_high=9.0, kl_coef=1e-38)
    layout = StepLayout.from_mask(mask, backend="cpu")
    for steps in (mask, layout):
        y = x.clone().requires_grad_()
        out = steppo_loss(
            y,
            old,
            advantages,
            steps,
            config=config,
            ref_log_probs=old,
            is_weights=advantages,
            backend="cpu",
        )
        out.loss.backward()
        found += [out.loss.detach(), out.metrics.values, y.grad]
    adv = step_gae(advantages, x, layout, whiten=False, backend="cpu")
    return [*found, adv.advantages, adv.returns]


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        kind = torch.int32 if one.dtype == torch.float32 else torch.int64
        assert torch.equal(one.view(kind), other.view(kind))


def test_denormal_numbers_come_out_the_same_whatever_the_caller_flushes(threads_restored):
    """The mode of floating-point numbers is a thread's own, and only the caller's is changed."""
    if not torch.set_flush_denormal(False):
        pytest.skip("torch cannot flush denormal numbers on this CPU")
    inputs = batch(denormal=True)
    torch.set_num_threads(1)
    expected = results(*inputs)
    grad = expected[2]
    assert ((grad != 0) & (grad.abs() < torch.finfo(torch.float32).tiny)).any()
    try:
        for flushes in (True, False):
            for count in (1, 4):
                torch.set_num_threads(count)
                torch.set_flush_denormal(flushes)
                found = results(*inputs)
                # The caller's mode is as it was.
                assert (torch.tensor([1e-39]) * 1.0 == 0).item() == flushes
                torch.set_flush_denormal(False)
                assert_same_bits(found, expected)
    finally:
        torch.set_flush_denormal(False)


def test_threads_that_are_made_while_the_caller_flushes_do_not():
    """New threads take the mode of the one that makes them."""
    program = """
from steppo_kernels import StepLayout, step_gae
mask = torch.ones(2000, 500, dtype=torch.bool)
layout = StepLayout.from_mask(mask, boundaries=mask)
rewards = torch.full((layout.num_steps,), 1e-40)
bits = []
for flushes, threads in ((True, 4), (False, 1)):
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flushes)
    found = step_gae(rewards, torch.zeros_like(rewards), layout, whiten=False, backend="cpu")
    torch.set_flush_denormal(False)
    bits.append(found.advantages.view(torch.int32))
assert bits[0].all()
assert torch.equal(*bits)
"""
    run(program)


def test_calls_of_several_threads_at_once_are_each_as_alone(threads_restored):
    torch.set_num_threads(4)
    inputs = [batch(), batch(denormal=True)]
    expected = [results(*one) for one in inputs]
    wrong = []

    def work(k):
        try:
            for _ in range(3):
                assert_same_bits(results(*inputs[k % 2]), expected[k % 2])
        except BaseException as error:
            wrong.append(error)

    callers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thread_that_cannot_be_made_is_done_without():
    """Without room for its stack, no thread begins; once there is some, one does."""
    program = """
assert call(1)
before = threads_now()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    sys.exit("a thread could be made after all")
assert call(4)
assert call(4)
assert threads_now() == before
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert call(4)
print(threads_now() - before)
"""
    assert run(program) == "3"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="has no fork")
def test_a_child_of_fork_has_threads_of_its_own():
    program = """
assert call(4)
before = threads_now()
for _ in range(2):
    child = os.fork()
    if child == 0:
        good = threads_now() == 1 and call(1) and call(4) and threads_now() == 4 and call(4)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert call(4)
    # A thread of somebody else may have ended meanwhile.
    assert threads_now() <= before
"""
    run(program)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="has no fork")
@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_child_of_fork_does_not_wait_for_the_threads_of_its_parent(is_loaded):
    """Only torch has made threads, and the kernels are first called in the child."""
    load = "from steppo_kernels import _C_cpu"
    program = f"""
torch.set_num_threads(4)
torch.randn(1 << 22).exp_()
torch.set_num_threads(1)
child = os.fork()
if child == 0:
    {load}
    os._exit(0 if call(4) and call(4) else 1)
deadline = time.monotonic() + 20
while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
    time.sleep(0.01)
if ended == (0, 0):
    os.kill(child, 9)
print(ended[0] == child and ended[1] == 0)
"""
    assert run(program, _SETUP if is_loaded else _SETUP.replace(load, "")) == "True"


def test_a_process_ends_while_its_threads_still_call():
    """Daemon threads are cut off wherever they are, without a crash or a hang."""
    program = """
calls = [0] * 3
def work(k):
    while True:
        _C_cpu.broadcast_to_tokens(broadcast, (4, 0, 0, 0))
        calls[k] += 1
for k in range(3):
    threading.Thread(target=work, args=(k,), daemon=True).start()
while min(calls) < 3:
    time.sleep(0.01)
print("done")
"""
    assert run(program) == "done"


def test_an_exception_of_a_task_reaches_the_caller_and_leaves_the_pool_usable(tmp_path):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or not _NATIVE.exists():
        pytest.skip("there is no C++ compiler, or the package is installed without its sources")
    command = [compiler, "-std=c++17", "-O1", "-pthread", "-I", str(_ROOT / "csrc/include")]
    command += ["-I", str(_ROOT / "csrc/cpu"), str(_ROOT / "csrc/cpu/parallel.cpp"), str(_NATIVE)]
    subprocess.run([*command, "-o", str(tmp_path / "pool")], check=True)
    done = subprocess.run(
        [tmp_path / "pool"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "pool: exceptions and nested calls\n"), done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_calls_run_on_the_threads_that_torch_has():
    """Threads of another pool would wait for the cores, which torch's keep for a while."""
    program = """
import ctypes
torch.set_num_threads(2)
torch.randn(1 << 22).exp_()
before = threads_now()
assert call(2)
print(hasattr(ctypes.CDLL(None), "GOMP_parallel"), threads_now() - before)
"""
    is_known, made = run(program).split()
    if is_known == "False":
        pytest.skip("this torch has no OpenMP runtime, or keeps its names to itself")
    assert made == "0"
