"""A patched model that is trained for 20 steps, in one process and on two ranks in all ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import torch
import transformers
from context_attention import attention
from data_parallel_models import FSDP_RUNS
from split_models import mesh_of, whole
from tiny_models import CONFIG, LENGTH, Batch, make, unfused
from torch import Tensor, distributed, nn
from worlds import Worlds

from steppo_kernels import StepLayout, steppo_loss
from steppo_kernels.distributed import ContextShard
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head

STEPS, BATCHES = 20, 4
# Each rank's rows of a batch that is split by rows.
ROWS_OF = ([0, 1], [2])
# Two heads of keys and values, so that there is one for each rank.
SETTINGS = {"num_key_value_heads": 2}


class Taken(NamedTuple):
    """A batch with the log-probs of the policies that acted and that is the reference."""

    batch: Batch
    old: Tensor
    ref: Tensor

    @property
    def normalizer(self) -> Tensor:
        return self.batch.layout.reduction_weights(CONFIG.reduction)[1]


def batches() -> list[Taken]:
    model, found = make(**OF_MODEL), []
    for seed in range(BATCHES):
        batch = Batch(seed=10 + seed)
        with torch.no_grad():
            now = unfused(model, batch)[0]
        # Near enough for a part of the steps to be clipped in the course of it.
        found.append(Taken(batch, now + 0.1 * batch.old_noise, now + batch.ref_noise))
    return found


OF_MODEL: dict[str, Any] = {"family": "llama", **SETTINGS}
Loss = Callable[[Any, Taken], Tensor]


def of_rows(rows: list[int], parts: int) -> Loss:
    """Return the loss of some rows on a rank, where gradients are averaged over so many."""

    def loss(model: Any, taken: Taken) -> Tensor:
        batch = taken.batch
        is_own = torch.isin(batch.layout.step_rows, torch.tensor(rows))
        request = StepPOBatch(
            taken.old[rows],
            batch.advantages[is_own],
            StepLayout.from_mask(batch.mask[rows]),
            config=CONFIG,
            ref_log_probs=taken.ref[rows],
            normalizer=taken.normalizer / parts,
        )
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        found: Tensor = model(**inputs, steppo=request).loss
        return found

    return loss


def of_columns(model: Any, taken: Taken) -> Tensor:
    """Return the loss of all columns on a rank that has the states of some."""
    batch = taken.batch
    shard = ContextShard.zigzag(LENGTH)
    columns = shard.columns

    def at_states(values: Tensor) -> Tensor:
        return torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)

    ids, mask = at_states(batch.ids), at_states(batch.mask)
    request = LogProbBatch(
        mask[:, columns], shifted=True, token_ids=ids[:, columns], return_entropy=True
    )
    positions = columns.expand(len(ids), -1)
    out = model(batch.ids[:, columns], position_ids=positions, steppo=request)
    log_probs, entropy = shard.whole(out.log_probs, out.entropy)
    return steppo_loss(
        log_probs,
        at_states(taken.old),
        batch.advantages,
        StepLayout.from_mask(mask),
        config=CONFIG,
        ref_log_probs=at_states(taken.ref),
        entropy=entropy,
    ).loss


def add_up(model: nn.Module) -> None:
    """Add up the gradients of the ranks."""
    for parameter in model.parameters():
        distributed.all_reduce(parameter.grad)


def train(model: Any, loss: Loss, after_backward: Callable[[Any], None] | None = None) -> Any:
    """Return the parameters after all steps, as one process has them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, foreach=False)
    every = batches()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, every[step % BATCHES]).backward()
        if after_backward is not None:
            after_backward(model)
        optimizer.step()
    return {
        name.removeprefix("module."): whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
    }


def patched() -> Any:
    model = make(**OF_MODEL)
    patch_lm_head(model)
    return model


def with_fsdp(mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = patched()
    for module in (*model.model.layers, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    return model


def split(mesh: Any) -> Any:
    """Return a model whose layers and head are split over ranks."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = patched()
    by_rows = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    plan: dict[str, Any] = {
        name: ColwiseParallel() if name.rsplit(".", 1)[-1] in by_rows else RowwiseParallel()
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    parallelize_module(model.model, mesh, plan)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return model


def with_columns() -> Any:
    transformers.AttentionInterface.register("over_ranks", attention)
    model = make(**OF_MODEL, attn_implementation="over_ranks")
    patch_lm_head(model)
    return model


def trained(rank: int, size: int) -> list[str]:
    """Return what is wrong with the parameters after training on ranks."""
    mesh = mesh_of(size)
    every = [0, 1, 2]
    start = {name: value.detach().clone() for name, value in make(**OF_MODEL).named_parameters()}
    expected = train(patched(), of_rows(every, 1))
    wrong = [
        f"{name}: does not move"
        for name, value in expected.items()
        if float((value - start[name]).abs().max()) < 0.01
    ]
    replicated = nn.parallel.DistributedDataParallel(patched())
    found = {
        "DDP": train(replicated, of_rows(ROWS_OF[rank], size)),
        "TP": train(split(mesh), of_rows(every, 1)),
        "CP": train(with_columns(), of_columns, add_up),
    }
    if FSDP_RUNS:
        found["FSDP2"] = train(with_fsdp(mesh), of_rows(ROWS_OF[rank], size))
    for way, parameters in found.items():
        if parameters.keys() != expected.keys():
            wrong.append(f"{way}: has {sorted(parameters.keys() ^ expected.keys())} too, or not")
            continue
        for name, value in expected.items():
            worst = float((parameters[name] - value).abs().max())
            if not worst <= 1e-12:
                wrong.append(f"{way}: {name} is off by {worst:.1e}")
    return wrong


def test_twenty_steps_end_with_the_same_parameters(worlds: Worlds) -> None:
    assert worlds.run(2, trained) == [[], []]
