"""Patched models under DDP and FSDP2: the rows of a batch on ranks and in micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from split_models import differences, split_head, whole
from tiny_models import CONFIG, Batch, gradients, make, old_and_ref
from torch import Tensor, nn

from steppo_kernels import StepLayout
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head

# On a CPU, with this torch.
FSDP_RUNS = hasattr(torch.cpu.Stream, "record_event")

# The rows of each micro-batch, by ranks: some are of a row that another rank has too, some of none.
ROWS_OF: dict[int, list[list[list[int]]]] = {
    1: [[[0], [1], [2]]],
    2: [[[0, 1], [1]], [[2], []]],
    4: [[[0], [1]], [[2], []], [[], []], [[1, 2], [0]]],
}


def mesh_in_two(dims: tuple[int, int], names: tuple[str, str]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", dims, mesh_dim_names=names)


class Rows:
    """Some rows of a batch, of which only the tokens of some are actions."""

    def __init__(
        self, batch: Batch, values: dict[str, Tensor], rows: list[int], divided_by: float
    ) -> None:
        """Take the rows; without one, those of the first row without an action."""
        kept = rows or [0]
        mask = batch.mask[kept] if rows else torch.zeros_like(batch.mask[kept])
        self.inputs = {name: value[kept] for name, value in batch.inputs.items()}
        self.layout = StepLayout.from_mask(mask)
        is_own = torch.isin(batch.layout.step_rows, torch.tensor(rows, dtype=torch.int64))
        total = batch.layout.reduction_weights(CONFIG.reduction)[1]
        self.request = StepPOBatch(
            values["old_log_probs"][kept],
            values["advantages"][is_own],
            self.layout,
            config=CONFIG,
            ref_log_probs=values["ref_log_probs"][kept],
            normalizer=total / divided_by,
        )


@dataclass
class DataCase:
    """A way to train on several ranks.

    Attributes:
        name: what a failure calls it.
        wrap: what makes, of a model and a mesh with the dimensions `dims`, what is trained.
        dims: two sizes; None is as many as there are ranks, and 1.
        names: of the dimensions.
        data: those over which the batch is split.
        skipped: within which all but the last micro-batch run.
        settings: of the model.
    """

    name: str
    wrap: Callable[[Any, Any], nn.Module]
    family: str = "llama"
    dims: tuple[int, int] | None = None
    names: tuple[str, str] = ("dp", "tp")
    data: tuple[str, ...] = ("dp",)
    skipped: Callable[[Any], contextlib.AbstractContextManager[None]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def sharded(
    *,
    has_own_unit: bool = True,
    dimensions: str | tuple[str, ...] = "dp",
    split: Callable[[Any, Any], None] | None = None,
    is_offloaded: bool = False,
    is_checkpointed: bool = False,
    patch_first: bool = False,
    **options: Any,
) -> Callable[[Any, Any], nn.Module]:
    """Return what wraps a model with FSDP2, its head a unit of its own or part of the root."""

    def wrap(model: Any, mesh: Any) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        if patch_first:
            patch_lm_head(model)
        if split is not None:
            split(model, mesh["tp"])
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if is_offloaded:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for module in (*model.model.layers, *[model.lm_head] * has_own_unit, model):
            fully_shard(module, mesh=mesh[dimensions], **options)
        if not patch_first:
            patch_lm_head(model)
        wrapped: nn.Module = model
        return wrapped

    return wrap


def replicated(**options: Any) -> Callable[[Any, Any], nn.Module]:
    """Return what wraps a model with DDP."""

    def wrap(model: Any, mesh: Any) -> nn.Module:
        patch_lm_head(model)
        return nn.parallel.DistributedDataParallel(
            model, process_group=mesh["dp"].get_group(), **options
        )

    return wrap


@contextlib.contextmanager
def without_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def no_sync(model: Any) -> contextlib.AbstractContextManager[None]:
    found: contextlib.AbstractContextManager[None] = model.no_sync()
    return found


SHARDED = [
    DataCase("root", sharded(has_own_unit=False)),
    DataCase("unit", sharded()),
    DataCase("root-kept", sharded(has_own_unit=False, reshard_after_forward=False)),
    DataCase("unit-kept", sharded(reshard_after_forward=False)),
    DataCase("patched-first", sharded(patch_first=True)),
    DataCase("tied", sharded(has_own_unit=False), "qwen2"),
    DataCase("softcap", sharded(has_own_unit=False), "gemma2"),
    DataCase("scale", sharded(), "granite"),
    DataCase("unsynchronized", sharded(), skipped=without_sync),
    DataCase("unsynchronized-root", sharded(has_own_unit=False), skipped=without_sync),
    DataCase("checkpointed", sharded(is_checkpointed=True)),
    DataCase("offloaded", sharded(is_offloaded=True)),
    DataCase("ddp", replicated()),
    DataCase("ddp-no-sync", replicated(), skipped=no_sync),
]


def hybrid(dims: tuple[int, int]) -> DataCase:
    """Return FSDP2 over the second of two dimensions, replicated over the first."""
    names = ("replicate", "shard")
    return DataCase(f"hybrid-{dims}", sharded(dimensions=names), dims=dims, names=names, data=names)


def in_two(dims: tuple[int, int], name: str, split: Any, **options: Any) -> DataCase:
    """Return FSDP2 over the first of two dimensions, and a head that is split over the second."""
    return DataCase(f"{name}-{dims}", sharded(split=split, **options), dims=dims)


def two_dimensional(dims: tuple[int, int]) -> list[DataCase]:
    return [
        hybrid(dims),
        in_two(dims, "split", split_head()),
        in_two(dims, "split-root", split_head(), has_own_unit=False),
        in_two(dims, "split-kept", split_head("shard"), reshard_after_forward=False),
    ]


EVERY = {
    case.name: case
    for case in (*SHARDED, *(c for d in ((1, 2), (2, 1), (2, 2)) for c in two_dimensional(d)))
}


def check_data(case: DataCase, size: int) -> list[str]:
    """Return which gradients differ from those of one process on this rank."""
    batch = Batch()
    plain = make(case.family, **case.settings)
    patch_lm_head(plain)
    values = old_and_ref(plain, batch)
    mesh = mesh_in_two(case.dims or (size, 1), case.names)
    rank, count = 0, 1
    for name in case.data:
        dimension = mesh[name]
        rank, count = rank * dimension.size() + dimension.get_local_rank(), count * dimension.size()
    parts = ROWS_OF[count][rank]
    for rows in (rows for parts in ROWS_OF[count] for rows in parts):
        part = Rows(batch, values, rows, 1)
        plain(**part.inputs, steppo=part.request).loss.backward()
    expected = gradients(plain)
    model = case.wrap(make(case.family, **case.settings), mesh)
    wrong = []
    # The second backward is of gathered weights that were freed after the first.
    for repeat in range(2):
        for index, rows in enumerate(parts):
            part = Rows(batch, values, rows, count)
            is_last = index == len(parts) - 1
            skipped = None if is_last or case.skipped is None else case.skipped(model)
            with torch.no_grad():
                model(**part.inputs, steppo=LogProbBatch(part.layout))
            with skipped or contextlib.nullcontext():
                model(**part.inputs, steppo=part.request).loss.backward()
        found = {name: whole(grad) for name, grad in gradients(model).items()}
        wrong += [f"{case.name}, {repeat}: {what}" for what in differences(found, expected)]
    return wrong
