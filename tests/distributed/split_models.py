"""Patched models whose head is split over ranks, next to the same model in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import Batch, fused_batch, gradients, make, old_and_ref
from torch import Tensor, distributed, nn

from steppo_kernels.integrations.transformers import LogProbBatch, patch_lm_head

# Releases before lose the plan of the head, and 4 cannot run one of a layer with a bias.
SPLITS_HEADS = importlib.util.find_spec("transformers.distributed.tensor_parallel") is not None


@contextlib.contextmanager
def launched(rank: int, size: int) -> Iterator[None]:
    """Set what a launcher sets, which transformers reads."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def mesh_of(size: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))


def whole(value: Any) -> Tensor:
    """Return a tensor as one process has it."""
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def split_head(
    layout: str = "replicate", *, is_local: bool = True, by_sequence: bool = False
) -> Callable[[nn.Module, Any], None]:
    """Return what splits the head of a model by torch's own tensor parallelism."""

    def split(model: nn.Module, mesh: Any) -> None:
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleOutput,
            parallelize_module,
        )

        outputs = {"replicate": Replicate(), "shard": Shard(-1)}[layout]
        plan: dict[str, Any] = {
            "lm_head": ColwiseParallel(
                input_layouts=Shard(1) if by_sequence else Replicate(),
                output_layouts=outputs,
                use_local_output=is_local,
            )
        }
        if by_sequence:
            plan["model.norm"] = PrepareModuleOutput(
                output_layouts=Replicate(), desired_output_layouts=Shard(1)
            )
        parallelize_module(model, mesh, plan)

    return split


def split_with_embedding(model: Any, mesh: Any) -> None:
    """Split head and embedding, which share one DTensor afterwards."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    embedding = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, {"model.embed_tokens": embedding})
    split_head()(model, mesh)
    model.lm_head.weight = model.model.embed_tokens.weight


@dataclass
class SplitCase:
    """A model that one process has, and how ranks split its head.

    Attributes:
        name: what a failure calls it.
        family: of `tiny_models`.
        split: what is done to the model on each rank.
        settings: of the model's own.
        patch_first: whether the model is patched before it is split.
        width: how many of the first ids a hook keeps, in both.
    """

    name: str
    family: str
    split: Callable[[nn.Module, Any], None]
    settings: dict[str, Any]
    patch_first: bool = False
    width: int | None = None


def replicate(model: Any, mesh: Any) -> None:
    """Make the weight of the head a DTensor that all ranks have whole."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    def place(_: Any, inputs: Any, mesh: Any) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    distribute_module(model.lm_head, mesh, None, place, lambda _, made, __: made.to_local())


def cut_after(
    split: Callable[[nn.Module, Any], None], width: int
) -> Callable[[nn.Module, Any], None]:
    """Return what splits a head, and keeps so many of the first ids of its logits."""

    def split_and_cut(model: Any, mesh: Any) -> None:
        split(model, mesh)
        model.lm_head.register_forward_hook(lambda *given: given[-1][..., :width])

    return split_and_cut


def cut_alone(model: Any, width: int) -> None:
    cut_after(lambda *_: None, width)(model, None)


CASES = [
    SplitCase("replicate", "llama", split_head(), {}),
    SplitCase("replicate-dtensor", "llama", split_head(is_local=False), {}),
    SplitCase("shard", "llama", split_head("shard"), {}),
    SplitCase("shard-dtensor", "llama", split_head("shard", is_local=False), {}),
    SplitCase("patched-first", "llama", split_head(), {}, patch_first=True),
    SplitCase("few-ids", "llama", split_head(), {"vocab_size": 4}),
    SplitCase("few-ids-shard", "gemma2", split_head("shard"), {"vocab_size": 4}),
    SplitCase("bias", "phi", split_head(), {}),
    SplitCase("bias-shard", "phi", split_head("shard"), {}),
    SplitCase("tied", "qwen2", split_with_embedding, {}),
    SplitCase("tied-softcap", "gemma2", split_with_embedding, {}),
    SplitCase("apart-from-embedding", "qwen2", split_head(), {}),
    SplitCase("softcap-shard", "gemma2", split_head("shard"), {}),
    SplitCase("softcap-shard-dtensor", "gemma2", split_head("shard", is_local=False), {}),
    SplitCase("scale", "granite", split_head(), {}),
    SplitCase("scale-shard", "cohere", split_head("shard"), {}),
    SplitCase("whole-dtensor", "phi", replicate, {}),
    SplitCase("cut", "llama", cut_after(split_head(), 40), {}, width=40),
    # Fewer ids than the first rank has.
    SplitCase("cut-short", "granite", cut_after(split_head(), 12), {}, width=12),
    SplitCase(
        "cut-dtensor",
        "llama",
        cut_after(split_head("shard", is_local=False), 40),
        {},
        width=40,
    ),
]
# The tokens of a sequence are split evenly over two ranks alone.
BY_SEQUENCE = SplitCase("by-sequence", "llama", split_head(by_sequence=True), {})


def batch_of(vocabulary: int | None) -> Batch:
    """Return a batch whose tokens are among the first ids."""
    batch = Batch()
    if vocabulary is not None:
        batch.ids %= vocabulary
    return batch


def found_by(model: Any, batch: Batch, values: dict[str, Any]) -> dict[str, Tensor]:
    """Return losses, log-probs, entropies and gradients of a patched model."""
    out = model(**batch.inputs, steppo=fused_batch(batch, values))
    out.loss.backward()
    found = {f"loss.{name}": whole(grad) for name, grad in gradients(model).items()}
    found["loss"] = out.loss.detach()
    request = LogProbBatch(batch.layout, return_entropy=True, chunk_tokens=7)
    out = model(**batch.inputs, steppo=request)
    (out.log_probs.square() + 0.3 * out.entropy).sum().backward()
    found |= {f"log_probs.{name}": whole(grad) for name, grad in gradients(model).items()}
    found |= {"log_probs": out.log_probs.detach(), "entropy": out.entropy.detach()}
    with torch.no_grad():
        out = model(**batch.inputs, steppo=request)
    found["log_probs of no_grad"] = out.log_probs
    return found


def of_shared(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients with that of the head in that of an embedding that it is to be tied to."""
    for name in [name for name in found if name.endswith("lm_head.weight")]:
        embedding = name.replace("lm_head", "model.embed_tokens")
        if name not in expected:
            found[embedding] = found[embedding] + found.pop(name)
    return found


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return what differs by more than rounding of fp64."""
    wrong = [f"{name}: only on one side" for name in found.keys() ^ expected.keys()]
    for name in found.keys() & expected.keys():
        scale = max(1e-6, float(expected[name].abs().max()))
        worst = float((found[name] - expected[name]).abs().max())
        if not worst <= 1e-11 * scale:
            wrong.append(f"{name}: off by {worst:.1e} of {scale:.1e}")
    return sorted(wrong)


def bits_differ(value: Tensor) -> bool:
    """Return whether ranks have a tensor with different bits: it is told to all of them."""
    every = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, value.contiguous())
    return not all(torch.equal(one, value) for one in every)


def check_case(case: SplitCase, size: int) -> list[str]:
    """Return what is wrong with a case on this rank."""
    batch = batch_of(case.width or case.settings.get("vocab_size"))
    plain = make(case.family, **case.settings)
    if case.width is not None:
        cut_alone(plain, case.width)
    patch_lm_head(plain)
    values = old_and_ref(plain, batch)
    expected = found_by(plain, batch, values)
    logits = plain(**batch.inputs).logits.detach()
    model = make(case.family, **case.settings)
    patch = patch_lm_head(model) if case.patch_first else None
    case.split(model, mesh_of(size))
    before = whole(model(**batch.inputs).logits).detach()
    patch = patch or patch_lm_head(model)
    found = of_shared(found_by(model, batch, values), expected)
    wrong = differences(found, expected)
    wrong += [f"{name}: other bits on other ranks" for name in ("loss", "log_probs", "entropy")
              if bits_differ(found[name])]  # fmt: skip
    between = whole(model(**batch.inputs).logits).detach()
    patch.remove()
    after = whole(model(**batch.inputs).logits).detach()
    if not (torch.equal(before, between) and torch.equal(before, after)):
        wrong.append("plain calls give other logits")
    if before.shape == logits.shape and differences({"": before}, {"": logits}):
        wrong.append("the split model has other logits")
    return [f"{case.name}: {what}" for what in wrong]
