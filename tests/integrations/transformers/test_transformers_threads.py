"""Calls of a patched model beside each other: in threads, in each other, in replicas, compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from tiny_models import LENGTH, ROWS, VOCAB, WIDTH, Batch, gradients, make

from steppo_kernels.integrations.transformers import (
    LogProbBatch,
    StepPOBatch,
    patch_lm_head,
    patch_of,
)


def _both(model: Any, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Everything that is called of a model, each without an effect on the others."""
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}

    def log_probs() -> Tensor:
        with torch.no_grad():
            return model(**batch.inputs, steppo=LogProbBatch(batch.layout)).log_probs

    def loss() -> Tensor:
        request = StepPOBatch(batch.old_noise - 4, batch.advantages, batch.layout)
        with torch.enable_grad():
            out = model(**batch.inputs, steppo=request).loss
            return torch.autograd.grad(out, model.get_output_embeddings().weight)[0]

    def plain() -> Tensor:
        with torch.no_grad():
            return model(**batch.inputs).logits

    def plain_loss() -> Tensor:
        with torch.enable_grad():
            out = model(**batch.inputs, labels=batch.ids).loss
            return torch.autograd.grad(out, model.get_output_embeddings().weight)[0]

    def generated() -> Tensor:
        return model.generate(batch.ids[:1, :5], **options)

    return {
        "log-probs": log_probs,
        "loss": loss,
        "plain": plain,
        "plain loss": plain_loss,
        "generated": generated,
    }


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_threads_are_each_as_alone(family: str) -> None:
    """As generation beside training; a scale is measured by whoever comes first."""
    model, batch = make(family, torch.float32).eval(), Batch(torch.float32)
    patch_lm_head(model)
    calls = _both(model, batch)
    alone = {name: call() for name, call in calls.items()}
    patch_of(model).remove()
    patch_lm_head(model)
    start = threading.Barrier(len(calls))
    wrong: dict[str, Any] = {}

    def run(name: str) -> None:
        start.wait()
        try:
            for _ in range(6):
                if not torch.equal(calls[name](), alone[name]):
                    wrong[name] = "another result"
        except Exception as error:
            wrong[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == {}


@pytest.mark.parametrize("where", ["layer", "before the head", "after the head", "after the model"])
@pytest.mark.parametrize("inner", ["plain", "generated", "log-probs", "loss"])
def test_calls_in_each_other(inner: str, where: str) -> None:
    model, batch = make("granite", torch.float32).eval(), Batch(torch.float32)
    patch_lm_head(model)
    calls = _both(model, batch)
    alone = {name: call() for name, call in calls.items()}
    seen: list[Tensor] = []
    depth = 0

    def hook(*args: Any) -> None:
        nonlocal depth
        if depth == 0:
            depth = 1
            seen.append(calls[inner]())
            depth = 0

    {
        "layer": model.model.layers[0].register_forward_hook,
        "before the head": model.lm_head.register_forward_pre_hook,
        "after the head": model.lm_head.register_forward_hook,
        "after the model": model.register_forward_hook,
    }[where](hook)
    for outer in ("log-probs", "loss", "plain"):
        assert torch.equal(calls[outer](), alone[outer])
        assert torch.equal(seen.pop(), alone[inner])


def test_a_model_in_the_call_of_another() -> None:
    """As a reference model whose log-probs a hook asks for."""
    model, other, batch = make("llama"), make("cohere"), Batch()
    for each in (model, other):
        patch_lm_head(each)
    request = LogProbBatch(batch.layout)
    expected = [each(**batch.inputs, steppo=request).log_probs for each in (model, other)]
    seen: list[Tensor] = []
    model.model.register_forward_hook(
        lambda *_: seen.extend(
            (
                other(**batch.inputs, steppo=request).log_probs,
                other(**batch.inputs).logits,
                # A head alone is the head.
                other.lm_head(torch.ones(2, WIDTH, dtype=torch.float64)),
            )
        )
    )
    got = model(**batch.inputs, steppo=request).log_probs
    assert torch.equal(got, expected[0])
    assert torch.equal(seen[0], expected[1])
    assert seen[1].shape == (ROWS, LENGTH, VOCAB)
    assert seen[2].shape == (2, VOCAB)


def test_whole_calls_that_are_recomputed_in_backward() -> None:
    model, batch = make("granite"), Batch()
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    model(**batch.inputs, steppo=request).loss.backward()
    expected = gradients(model)
    torch.utils.checkpoint.checkpoint(
        lambda: model(**batch.inputs, steppo=request).loss, use_reentrant=False
    ).backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name])


def _replica(module: nn.Module, scale: float) -> nn.Module:
    """A replica as of `torch.nn.DataParallel`, with parameters that are tensors of its own."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, _replica(child, scale))
    for name, parameter in module._parameters.items():
        replica.__dict__[name] = None if parameter is None else parameter.detach() * scale
    return replica


def test_replicas() -> None:
    """Plain calls are those of the replica; a batch of steps is not split with its tokens."""
    model, batch = make("llama"), Batch()
    with torch.no_grad():
        expected = _replica(model, 0.5)(**batch.inputs).logits
        assert not torch.allclose(expected, model(**batch.inputs).logits)
        patch_lm_head(model)
        replica = _replica(model, 0.5)
        assert torch.equal(replica(**batch.inputs).logits, expected)
        with pytest.raises(RuntimeError, match="on a replica of the patched model"):
            replica(**batch.inputs, steppo=LogProbBatch(batch.layout))
        again = model(**batch.inputs, steppo=LogProbBatch(batch.layout)).log_probs
    assert again.shape == (ROWS, LENGTH)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["model", "forward"])
def test_plain_calls_compile_in_one_graph(what: str) -> None:
    model, batch = make("llama"), Batch()
    expected = model(**batch.inputs).logits
    patch_lm_head(model)
    torch._dynamo.reset()
    compiled = torch.compile(
        model if what == "model" else model.forward, backend="eager", fullgraph=True
    )
    request = LogProbBatch(batch.layout)
    for _ in range(2):
        assert torch.equal(compiled(**batch.inputs).logits, expected)
        # Neither knows of the other.
        assert model(**batch.inputs, steppo=request).log_probs.shape == (ROWS, LENGTH)


@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_keep_what_was_compiled_for_them() -> None:
    """In calls with `steppo` too, all but the head is compiled."""
    model, batch = make("llama"), Batch()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    expected = model(**batch.inputs, steppo=request).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    counts = []
    for _ in range(3):
        torch.testing.assert_close(compiled(**batch.inputs, steppo=request).loss, expected)
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[1] == counts[2]
    products = [node for graph in graphs for node in graph.graph.nodes if "linear" in str(node)]
    # Those of one layer at least, of which the other may be the same graph.
    assert len(products) >= 7


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_compiled_alone() -> None:
    model, batch = make("granite"), Batch()
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    expected = model(**batch.inputs, steppo=request).log_probs
    plain = model(**batch.inputs).logits
    torch._dynamo.reset()
    model.lm_head.compile(backend="eager")
    for _ in range(2):
        assert torch.equal(model(**batch.inputs, steppo=request).log_probs, expected)
        assert torch.equal(model(**batch.inputs).logits, plain)
