"""Patched models whose head is split by tensor parallelism: what one process has, and failures."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import torch
import transformers
from collectives import counted, error_of
from split_models import (
    BY_SEQUENCE,
    CASES,
    SPLITS_HEADS,
    check_case,
    cut_after,
    differences,
    found_by,
    launched,
    mesh_of,
    split_head,
)
from tiny_models import Batch, fused_batch, make, old_and_ref
from torch import distributed, nn
from worlds import Worlds

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.integrations.transformers import LogProbBatch, patch_lm_head, patch_of

# What splits a model cannot be pickled: ranks are told names.
EVERY = {case.name: case for case in (*CASES, BY_SEQUENCE)}


def wrong_cases(rank: int, size: int, names: list[str]) -> list[str]:
    return [what for name in names for what in check_case(EVERY[name], size)]


@pytest.mark.parametrize("size", [2, 3])
def test_as_in_one_process(worlds: Worlds, size: int) -> None:
    assert len(EVERY) == len(CASES) + 1
    names = [name for name in EVERY if size == 2 or name != BY_SEQUENCE.name]
    assert worlds.run(size, wrong_cases, names) == [[]] * size


# The plans of transformers


def by_plan(rank: int, size: int, folder: str, families: list[str]) -> list[str]:
    """Return what is wrong with whole models that transformers splits; also, which it does."""
    wrong = []
    for family in families:
        saved = make(family, num_key_value_heads=2)
        path = f"{folder}/{family}"
        if rank == 0:
            saved.save_pretrained(path)
        distributed.barrier()
        kind, options = type(saved), {"dtype": torch.float64, "attn_implementation": "eager"}
        plain = kind.from_pretrained(path, **options).train()
        with launched(rank, size):
            model = kind.from_pretrained(path, tp_plan="auto", **options).train()
        if not hasattr(model.model.layers[0].self_attn.q_proj.weight, "placements"):
            wrong.append(f"{family}: no DTensor in its body")
        is_split = hasattr(model.lm_head.weight, "placements")
        if is_split != SPLITS_HEADS:
            wrong.append(f"{family}: its head is {'split' if is_split else 'whole'}")
        batch = Batch()
        before = model(**batch.inputs).logits
        patch_lm_head(plain)
        patch = patch_lm_head(model)
        values = old_and_ref(plain, batch)
        expected, found = (found_by(one, batch, values) for one in (plain, model))
        wrong += [f"{family}: {what}" for what in differences(found, expected)]
        between = model(**batch.inputs).logits
        with torch.no_grad():
            quick = model(**batch.inputs).logits
        patch.remove()
        after = model(**batch.inputs).logits
        with torch.no_grad():
            if not torch.equal(quick, model(**batch.inputs).logits):
                wrong.append(f"{family}: plain calls without gradients give other logits")
        if not (torch.equal(before, between) and torch.equal(before, after)):
            wrong.append(f"{family}: plain calls give other logits")
    return wrong


def test_plans_of_transformers(worlds: Worlds, tmp_path: Path) -> None:
    from torch.distributed.tensor import distribute_tensor

    if "src_data_rank" not in inspect.signature(distribute_tensor).parameters:
        pytest.skip("transformers' tensor parallelism needs a newer torch")
    families = ["llama", "qwen2", "gemma2"]
    if SPLITS_HEADS:
        families.append("phi")
    elif not transformers.__version__.startswith("4."):
        pytest.skip("this transformers has parts that are plain tensors")
    assert worlds.run(2, by_plan, str(tmp_path), families) == [[], []]


# Failures


def spoiled(what: str, batch: Batch, values: dict[str, Any], model: Any) -> tuple[Any, Any]:
    """Return a batch with something wrong in it, and a hook that is to be removed."""
    if what == "layout":
        return fused_batch(batch, values, StepLayout.from_mask(batch.mask[:, :-1])), None
    if what == "advantages":
        return fused_batch(batch, {**values, "advantages": batch.advantages[:-1]}), None
    if what == "token ids":
        ids = batch.ids.clone()
        ids[batch.mask] = 1000
        return fused_batch(batch, values, token_ids=ids), None
    if what == "config":
        return fused_batch(batch, values, config=StepPOConfig(clip_low=0.1)), None
    if what == "kind":
        return LogProbBatch(batch.layout), None

    calls = []

    def after_head(*given: Any) -> Any:
        calls.append(what)
        if what == "error after the head" or len(calls) == 2:
            raise OSError("a disk is full")
        if what == "error in the second evaluation":
            return None
        made = given[-1].clone()
        made[..., 0] += 1
        return made

    return fused_batch(batch, values), model.lm_head.register_forward_hook(after_head)


_AFTER_THE_HEAD = (
    "RuntimeError: model: rank 1 of model's tensor-parallel group raised OSError: a disk is full"
)
# What the ranks raise of which one is given something wrong: that one, and the others.
FAILURES = {
    # The first call, which finds that there is a scale.
    "error in the second evaluation": (
        "OSError: a disk is full",
        _AFTER_THE_HEAD,
    ),
    "layout": (r"ValueError: layout: got shape \(3, 13\)", r"rank 1 of tp_group raised ValueError"),
    "advantages": ("ValueError: advantages: got", "rank 1 of tp_group raised ValueError"),
    "token ids": ("ValueError: input_ids|ValueError: token_ids", "rank 1 of tp_group raised"),
    "config": ("ValueError: tp_group: its ranks got different", "config is .* on rank"),
    "kind": ("ValueError: tp_group: its ranks got different", "function is .* on rank"),
    "error after the head": (
        "OSError: a disk is full",
        _AFTER_THE_HEAD,
    ),
    "changed logits": ("ValueError: model: changes its logits", "^ValueError|^RuntimeError"),
}


def failures(rank: int, size: int, layout: str) -> list[tuple[str, str, list[str]]]:
    """Return what each failure raises, and what is wrong with the call after it."""
    found = []
    batch = Batch()
    plain, model = make("granite"), make("granite")
    patch_lm_head(plain)
    values = old_and_ref(plain, batch)
    expected = found_by(plain, batch, values)
    split_head(layout)(model, mesh_of(size))
    patch_lm_head(model)
    for what in FAILURES:
        request, hook = fused_batch(batch, values), None
        if rank == 1:
            request, hook = spoiled(what, batch, values, model)
        error = error_of(lambda request=request: model(**batch.inputs, steppo=request))
        if hook is not None:
            hook.remove()
        model.zero_grad()
        found.append((what, error, differences(found_by(model, batch, values), expected)))
    return found


@pytest.mark.parametrize(("size", "layout"), [(2, "replicate"), (3, "shard")])
def test_ranks_hear_of_failures(worlds: Worlds, size: int, layout: str) -> None:
    import re

    for rank, found in enumerate(worlds.run(size, failures, layout)):
        assert [what for what, *_ in found] == list(FAILURES)
        for what, error, wrong in found:
            own, others = FAILURES[what]
            pattern = own if rank == 1 else others
            assert re.search(pattern, error), f"{what} on rank {rank}: {error}"
            assert wrong == [], f"after {what} on rank {rank}"


def spread(head: nn.Module, size: int) -> None:
    """Split the rows of a head over the second of two dimensions of a mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )

    def split(_: Any, module: Any, mesh: Any) -> None:
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [whole_on, Shard(0)]))

    def place(_: Any, inputs: Any, mesh: Any) -> Any:
        return DTensor.from_local(inputs[0], mesh, [whole_on] * 2, run_check=False)

    whole_on = Replicate()
    mesh = init_device_mesh("cpu", (1, size))
    distribute_module(head, mesh, split, place, lambda _, made, __: made.full_tensor())


def refused(rank: int, size: int) -> list[str]:
    """Return the errors for heads that are split in another way."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh, batch, found = mesh_of(size), Batch(), []

    def add(model: nn.Module) -> None:
        patch = patch_lm_head(model)
        request = LogProbBatch(batch.layout)
        found.append(error_of(lambda: model(**batch.inputs, steppo=request)))
        patch.remove()
        model(**batch.inputs)

    by_columns = make("llama")
    plan = {"lm_head": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(by_columns, mesh, plan)
    add(by_columns)
    # As transformers 5.0 has it.
    parts: Any = make("llama")
    parts.lm_head._hf_device_mesh = mesh
    add(parts)
    in_two = make("llama")
    spread(in_two.lm_head, size)
    add(in_two)
    # As many ids as a rank has of its own.
    ambiguous = make("llama")
    cut_after(split_head(), -(-53 // size))(ambiguous, mesh)
    add(ambiguous)
    return found


def test_other_splits_are_refused(worlds: Worlds) -> None:
    for by_columns, parts, in_two, ambiguous in worlds.run(2, refused):
        assert "output head is a DTensor over 2 dimensions of a mesh in its forward" in in_two
        assert "model: the weight of its output head: got a DTensor placed as (S" in by_columns
        assert "expected Shard(0)" in by_columns
        assert parts.startswith("TypeError: model: the weight of its output head is a plain tensor")
        assert ambiguous.startswith("ValueError: model's tensor-parallel group: its ranks got diff")


def words(rank: int, size: int) -> list[list[str]]:
    batch, model = Batch(), make("llama")
    split_head()(model, mesh_of(size))
    patch_lm_head(model)
    values = {"old_log_probs": batch.old_noise - 4, "advantages": batch.advantages}
    found = []
    for chunk in (1000, 8):
        with counted() as collectives:
            request = fused_batch(batch, values, chunk_tokens=chunk, config=StepPOConfig())
            model(**batch.inputs, steppo=request).loss.backward()
        found.append(collectives.names)
        with counted() as collectives, torch.no_grad():
            model(**batch.inputs, steppo=LogProbBatch(batch.layout, chunk_tokens=chunk))
        found.append(collectives.names)
    return found


def test_words_of_a_call(worlds: Worlds) -> None:
    """One more than those of the functions."""
    tokens = int(Batch().mask.sum())
    for loss, log_probs, chunked_loss, chunked_log_probs in worlds.run(2, words):
        assert loss.count("all_reduce") == chunked_loss.count("all_reduce") == 1
        assert loss.count("all_gather") == 1 + 1 + 1 + 1
        assert log_probs == ["all_gather"] * (1 + 1 + 1 + 1)
        assert chunked_loss.count("all_gather") == 1 + 4 + 1 + 1
        assert chunked_log_probs == ["all_gather"] * (1 + -(-tokens // 8) + 1 + 1)


def in_turned_order(rank: int, size: int) -> str:
    """Parts in the place of a weight, as they are without gradients, over ranks that descend."""
    from torch.distributed.device_mesh import DeviceMesh

    from steppo_kernels.integrations.transformers.tensor_parallel import part_of

    head = torch.nn.Linear(4, 6, bias=False)
    head.weight = torch.nn.Parameter(head.weight.detach()[3 * rank : 3 * rank + 3])
    assert part_of(head, DeviceMesh("cpu", [0, 1])).start == 3 * rank
    return error_of(lambda: part_of(head, DeviceMesh("cpu", [1, 0])))


def test_ranks_that_do_not_ascend(worlds: Worlds) -> None:
    for error in worlds.run(2, in_turned_order):
        assert error.startswith("ValueError: model: the weight of its output head: got a DTensor")
        assert "[1, 0]" in error


# What else may be around it


def surrounded(rank: int, size: int) -> list[str]:
    """Return what is wrong with copies, hooks, compiled and checkpointed models."""
    batch, wrong = Batch(), []
    model = make("llama")
    split_head("shard", is_local=False)(model, mesh_of(size))
    patch = patch_lm_head(model)
    values = old_and_ref(make("llama"), batch)
    expected = found_by(model, batch, values)

    def compare(what: str, other: Any) -> None:
        found = found_by(other, batch, values)
        wrong.extend(f"{what}: {one}" for one in differences(found, expected))

    twin = copy.deepcopy(model)
    if patch_of(twin) in (None, patch):
        wrong.append("a copy has no patch of its own")
    compare("copy", twin)
    # Dynamo of older ones cannot trace a layout.
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
        compiled = torch.compile(twin, backend="eager")
        loss = compiled(**batch.inputs, steppo=fused_batch(batch, values)).loss.detach()
        wrong += [f"compiled: {one}" for one in differences({"": loss}, {"": expected["loss"]})]
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    compare("checkpointed", twin)
    seen: list[str] = []
    for where, add in (
        ("before", model.lm_head.register_forward_pre_hook),
        ("after", model.lm_head.register_forward_hook),
        ("back", model.lm_head.register_full_backward_hook),
    ):
        add(lambda *_, where=where: seen.append(where))
    model(**batch.inputs, steppo=fused_batch(batch, values)).loss.backward()
    if seen != ["before", "after", "back"]:
        wrong.append(f"hooks of the head: {seen}")
    return wrong


def test_what_else_may_be_around_it(worlds: Worlds) -> None:
    assert worlds.run(2, surrounded) == [[], []]
