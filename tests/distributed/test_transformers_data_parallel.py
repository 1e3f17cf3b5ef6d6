"""Gradients of patched models under DDP and FSDP2, with and without a head that is split."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import torch
import transformers
from data_parallel_models import EVERY, FSDP_RUNS, SHARDED, check_data, two_dimensional
from split_models import SPLITS_HEADS, differences, found_by, launched
from tiny_models import Batch, make, old_and_ref
from torch import distributed
from worlds import Worlds

from steppo_kernels.integrations.transformers import patch_lm_head

pytestmark = pytest.mark.skipif(not FSDP_RUNS, reason="FSDP2 of this torch needs a GPU")


def wrong_cases(rank: int, size: int, names: list[str]) -> list[str]:
    return [what for name in names for what in check_data(EVERY[name], size)]


def test_gradients_are_those_of_the_whole_batch(worlds: Worlds) -> None:
    assert worlds.run(2, wrong_cases, [case.name for case in SHARDED]) == [[], []]


@pytest.mark.parametrize("dims", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_in_two_dimensions(worlds: Worlds, dims: tuple[int, int]) -> None:
    size = dims[0] * dims[1]
    names = [case.name for case in two_dimensional(dims)]
    assert worlds.run(size, wrong_cases, names) == [[]] * size


def by_config(rank: int, size: int, folder: str) -> list[str]:
    """Return what is wrong with a model that transformers puts on a mesh of both."""
    saved = make("qwen2", num_key_value_heads=2)
    if rank == 0:
        saved.save_pretrained(folder)
    distributed.barrier()
    kind, options = type(saved), {"dtype": torch.float64, "attn_implementation": "eager"}
    plain = kind.from_pretrained(folder, **options).train()
    spread = transformers.distributed.DistributedConfig(fsdp_size=size // 2, tp_size=2)
    with launched(rank, size):
        model = kind.from_pretrained(folder, distributed_config=spread, **options).train()
    patch_lm_head(plain)
    patch_lm_head(model)
    batch = Batch()
    values = old_and_ref(plain, batch)
    # FSDP averages what all its ranks find alike here.
    expected, found = (found_by(one, batch, values) for one in (plain, model))
    return differences(found, expected)


def test_config_of_transformers(worlds: Worlds, tmp_path: Path) -> None:
    if not SPLITS_HEADS:
        pytest.skip("this transformers has no mesh of both")
    assert worlds.run(4, by_config, str(tmp_path)) == [[]] * 4
