"""The critic's loss inside of verl, against loops in fp64."""

from __future__ import annotations

import pytest
import torch
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.config import CriticConfig

from steppo_kernels.integrations.verl import step_critic_loss

CLIP = 0.3
# Prompt lengths and masks of the responses: one begins with no action, one is padding.
PROMPTS = (2, 3, 1, 4)
MASKS = ([1, 1, 0], [0, 1], [0, 0], [1])


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows_of_all", [4, 9])
def test_each_row_with_an_action_trains_the_value_at_the_end_of_its_prompt(ranks, rows_of_all):
    made = torch.Generator().manual_seed(0)
    lengths = [prompt + len(mask) for prompt, mask in zip(PROMPTS, MASKS, strict=True)]
    model = torch.randn(sum(lengths), generator=made, dtype=torch.float64).requires_grad_()
    ends = _offsets(lengths)[1:].tolist()
    firsts = [end - len(mask) - 1 for mask, end in zip(MASKS, ends, strict=True)]
    old = model.detach()[firsts] + torch.tensor([0.1, -0.6, 0.0, 0.2], dtype=torch.float64)
    returns = torch.randn(len(MASKS), generator=made, dtype=torch.float64)
    data = get_tensordict(
        {
            "prompts": nested([torch.zeros(n, dtype=torch.long) for n in PROMPTS]),
            "responses": nested([torch.zeros(len(mask), dtype=torch.long) for mask in MASKS]),
            "response_mask": nested([torch.tensor(mask) for mask in MASKS]),
            # Only the first entry is read: nothing is said of the others.
            "values": nested([_first(x, len(m)) for x, m in zip(old, MASKS, strict=True)]),
            "returns": nested([_first(x, len(m)) for x, m in zip(returns, MASKS, strict=True)]),
        },
        non_tensor_dict={"dp_size": ranks, "global_batch_size": rows_of_all},
    )
    config = CriticConfig(strategy="fsdp2", ppo_micro_batch_size_per_gpu=1, cliprange_value=CLIP)
    outputs = {"values": torch.nested.nested_tensor_from_jagged(model, _offsets(lengths))}
    loss, metrics = step_critic_loss(config, outputs, data)
    (gradient,) = torch.autograd.grad(loss, model)

    total, wanted, clipped = 0.0, torch.zeros_like(model), []
    for row, (mask, at) in enumerate(zip(MASKS, firsts, strict=True)):
        if not any(mask):
            continue
        value, past, target = model[at].item(), old[row].item(), returns[row].item()
        near = past + min(max(value - past, -CLIP), CLIP)
        plain, bounded = (value - target) ** 2, (near - target) ** 2
        total += 0.5 * max(plain, bounded)
        clipped.append(bounded > plain)
        if plain >= bounded:
            wanted[at] = value - target
    share = ranks / rows_of_all
    assert loss.item() == pytest.approx(total * share)
    assert torch.allclose(gradient, wanted * share)
    assert wanted.any()
    assert any(clipped)
    assert metrics["critic/vf_clipfrac"] == pytest.approx(sum(clipped) / len(clipped))
    assert metrics["critic/vf_loss"].aggregate() == pytest.approx(total * share)


def _first(value: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat((value[None], value.new_full((length - 1,), torch.nan)))


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
