"""CUDA graphs: a replay reads what is in the inputs then, and gives the bits of a call that runs.

They need a GPU, which the kernels on the host are not.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    step_gae,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
    token_log_probs,
)
from steppo_kernels.backends import choice

if why := choice.unavailable("cuda", torch.device("cuda")):
    pytest.skip(f"cuda: {why}", allow_module_level=True)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BACKEND = "cuda"
CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.2)
# Several blocks of every kernel; rows of logits that 16 bytes do not divide.
ROWS, LENGTH = 9, 3000
TOKENS, VOCABULARY = (2, 40), 5003
REPLAYS = 12

Tensors = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


class Work(NamedTuple):
    """A function whose inputs stay where they are, and numbers for them by seed."""

    inputs: Tensors
    draw: Callable[[int], Tensors]
    call: Callable[[Tensors], Outputs]

    def fill(self, seed: int) -> None:
        for name, value in self.draw(seed).items():
            self.inputs[name].detach().copy_(value)

    def run(self) -> Outputs:
        return self.call(self.inputs)


def work(draw: Callable[[int], Tensors], leaf: str | None, call: Callable[..., Outputs]) -> Work:
    inputs = {name: value.to(DEVICE) for name, value in draw(0).items()}
    if leaf is not None:
        inputs[leaf].requires_grad_()
    return Work(inputs, draw, call)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_mask(seed: int) -> torch.Tensor:
    return normal(ROWS, LENGTH, seed=seed) < 0.8


def layout() -> StepLayout:
    return StepLayout.from_mask(drawn_mask(99).to(DEVICE), backend="reference")


def tokens(*names: str) -> Callable[[int], Tensors]:
    """Numbers for every token."""
    return lambda seed: {
        name: 0.1 * normal(ROWS, LENGTH, seed=10 * seed + k) for k, name in enumerate(names)
    }


def with_gradient(loss: torch.Tensor, leaf: torch.Tensor) -> Outputs:
    return loss.detach(), *torch.autograd.grad(loss, leaf, torch.ones_like(loss))


def policy_loss() -> Work:
    steps = layout()

    def draw(seed: int) -> Tensors:
        advantages = normal(steps.num_steps, seed=seed)
        return tokens("log_probs", "old")(seed) | {"advantages": advantages}

    def call(x: Tensors) -> Outputs:
        out = steppo_loss(
            x["log_probs"], x["old"], x["advantages"], steps, config=CONFIG, backend=BACKEND
        )
        return out.metrics.values, *with_gradient(out.loss, x["log_probs"])

    return work(draw, "log_probs", call)


def policy_loss_masked() -> Work:
    def draw(seed: int) -> Tensors:
        return tokens("log_probs", "old", "advantages")(seed) | {"mask": drawn_mask(seed)}

    def call(x: Tensors) -> Outputs:
        out = steppo_loss(
            x["log_probs"], x["old"], x["advantages"], x["mask"], config=CONFIG, backend=BACKEND
        )
        return out.metrics.values, *with_gradient(out.loss, x["log_probs"])

    return work(draw, "log_probs", call)


def gae() -> Work:
    steps = layout()

    def call(x: Tensors) -> Outputs:
        out = step_gae(x["rewards"], x["values"], steps, backend=BACKEND)
        return out.advantages, out.returns

    return work(tokens("rewards", "values"), None, call)


def value_loss() -> Work:
    steps = layout()

    def draw(seed: int) -> Tensors:
        return tokens("values", "old")(seed) | {"returns": normal(steps.num_steps, seed=seed)}

    def call(x: Tensors) -> Outputs:
        out = step_value_loss(
            x["values"], x["returns"], steps, old_values=x["old"], clip=0.1, backend=BACKEND
        )
        return out.metrics.values, *with_gradient(out.loss, x["values"])

    return work(draw, "values", call)


def drawn_logits(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": 2 * normal(*TOKENS, VOCABULARY, seed=seed).to(torch.bfloat16),
        "ids": torch.randint(VOCABULARY, TOKENS, generator=generator),
        "upstream": normal(*TOKENS, seed=seed),
    }


def log_probs(*, in_place: bool = False) -> Work:
    def call(x: Tensors) -> Outputs:
        found, entropy = token_log_probs(
            x["logits"],
            x["ids"],
            return_entropy=True,
            inplace_backward=in_place,
            backend=BACKEND,
        )
        grads = torch.autograd.grad((found, entropy), x["logits"], (x["upstream"], x["upstream"]))
        return found.detach(), entropy.detach(), *grads

    return work(drawn_logits, "logits", call)


def log_probs_in_place() -> Work:
    return log_probs(in_place=True)


def logits_loss() -> Work:
    steps = StepLayout.from_mask(normal(*TOKENS, seed=5).to(DEVICE) < 0.8, backend="reference")
    advantages = normal(steps.num_steps, seed=6).to(DEVICE)

    def call(x: Tensors) -> Outputs:
        out = steppo_loss_from_logits(
            x["logits"], x["ids"], None, advantages, steps, config=CONFIG, backend=BACKEND
        )
        return with_gradient(out.loss, x["logits"])

    return work(drawn_logits, "logits", call)


WORKS = {
    make.__name__: make
    for make in (
        policy_loss,
        policy_loss_masked,
        gae,
        value_loss,
        log_probs,
        log_probs_in_place,
        logits_loss,
    )
}


@pytest.fixture(params=WORKS.values(), ids=WORKS)
def make(request: pytest.FixtureRequest) -> Callable[[], Work]:
    return request.param


def captured(subject: Work) -> tuple[Callable[[], None], Outputs]:
    """Return what replays a graph of a call, and the outputs that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        subject.fill(0)
        subject.run()
    torch.cuda.current_stream().wait_stream(side)
    subject.fill(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = subject.run()
    return graph.replay, outputs


def eager(subject: Work, seed: int) -> list[torch.Tensor]:
    """Return what a call gives of numbers, which are those of the inputs again after it."""
    subject.fill(seed)
    found = [value.clone() for value in subject.run()]
    subject.fill(seed)
    return found


def assert_same(found: Outputs | list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for k, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        differs = int((got != wanted).sum())
        assert torch.equal(got, wanted), f"output {k}: {differs} of {wanted.numel()} differ"


def test_a_replay_reads_what_is_in_the_inputs_then(make: Callable[[], Work]) -> None:
    subject = make()
    replay, outputs = captured(subject)
    results = []
    for seed in (1, 2, 3):
        expected = eager(subject, seed)
        for output in outputs:
            # What a replay does not write is seen. Gradients in place are written to the logits.
            if output.data_ptr() not in {value.data_ptr() for value in subject.inputs.values()}:
                output.fill_(-1)
        replay()
        assert_same(outputs, expected)
        results.append(expected)
    assert not torch.equal(results[0][-1], results[1][-1])


def test_a_replay_can_be_repeated(make: Callable[[], Work]) -> None:
    subject = make()
    replay, outputs = captured(subject)
    expected = eager(subject, 1)
    for _ in range(REPLAYS):
        subject.fill(1)
        replay()
        assert_same(outputs, expected)


def test_two_graphs_and_eager_calls_run_side_by_side(make: Callable[[], Work]) -> None:
    """Each on a stream of its own: none may use what another keeps between its launches."""
    subjects = [make() for _ in range(3)]
    graphs = [captured(subject) for subject in subjects[:2]]
    expected = [eager(subject, seed) for seed, subject in enumerate(subjects)]
    streams = [torch.cuda.Stream() for _ in subjects]
    drawn = [
        {name: value.to(DEVICE) for name, value in subject.draw(seed).items()}
        for seed, subject in enumerate(subjects)
    ]
    found: list[tuple[int, list[torch.Tensor]]] = []
    torch.cuda.synchronize()
    for _ in range(REPLAYS):
        for k, (subject, stream) in enumerate(zip(subjects, streams, strict=True)):
            with torch.cuda.stream(stream):
                for name, value in drawn[k].items():
                    subject.inputs[name].detach().copy_(value)
                if k < len(graphs):
                    replay, outputs = graphs[k]
                    replay()
                else:
                    outputs = subject.run()
                found.append((k, [value.clone() for value in outputs]))
    torch.cuda.synchronize()
    for k, results in found:
        assert_same(results, expected[k])


FIRST_CALLS = {
    "policy_loss_masked": "steppo_loss(x, old, advantages, mask, backend='cuda').loss",
    "policy_loss": "steppo_loss(x, old, per_step, steps, backend='cuda').loss",
    "gae": "step_gae(old, advantages, steps, backend='cuda').advantages",
    "value_loss": "step_value_loss(x, per_step, steps, backend='cuda').loss",
    "log_probs": "token_log_probs(logits, ids, backend='cuda')",
    # The layout is asked for its mask for the first time.
    "logits_loss": "steppo_loss_from_logits(logits, ids, None, one, row, backend='cuda').loss",
}


@pytest.mark.parametrize("call", FIRST_CALLS.values(), ids=FIRST_CALLS)
def test_the_first_call_of_a_process_can_be_captured(call: str) -> None:
    """Nothing of the kernels has been loaded, and no workspace made, before the capture."""
    program = f"""
        import torch
        from steppo_kernels import StepLayout, step_gae, step_value_loss, steppo_loss
        from steppo_kernels import steppo_loss_from_logits, token_log_probs

        generator = torch.Generator().manual_seed(0)
        x, old, advantages = torch.randn((3, {ROWS}, {LENGTH}), generator=generator).cuda()
        logits = torch.randn(({ROWS}, {VOCABULARY}), generator=generator).cuda()
        ids = torch.arange({ROWS}).cuda()
        mask = old < 0.8
        x, old = (0.1 * x).requires_grad_(), 0.1 * old
        steps = StepLayout.from_mask(mask, backend="reference")
        per_step = torch.randn(steps.num_steps, generator=generator).cuda()
        row = StepLayout.from_mask(ids >= 0, backend="reference")
        one = torch.full((1,), 0.7).cuda()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = {call}
        found.detach().fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        expected = {call}
        assert torch.equal(found, expected), (found, expected)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
