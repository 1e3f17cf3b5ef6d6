"""An attention model that is trained in parallel ends with the parameters of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from context_attention import of_all_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worlds import Worlds

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    distributed,
    linear_steppo_loss,
    step_gae,
    step_value_loss,
)
from steppo_kernels.distributed import (
    ContextShard,
    batch_reduction,
    context_linear_steppo_loss,
    merge_metrics,
)

STEPS, RANKS, ROWS, LENGTH, SIZE, VOCABULARY = 20, 2, 5, 16, 8, 13
CONFIG = StepPOConfig(clip_low=0.02, clip_high=0.02, reduction="token_mean")


class Model(nn.Module):
    """One layer of causal attention, a head and a value head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = nn.Embedding(VOCABULARY, SIZE)
            self.places = nn.Embedding(LENGTH, SIZE)
            self.attention = nn.Linear(SIZE, 3 * SIZE)
            self.value = nn.Linear(SIZE, 1)
            self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.double()

    def forward(self, ids: Tensor, shard: ContextShard | None = None) -> tuple[Tensor, Tensor]:
        """Return the hidden states and the values of tokens; with a shard, of those of the rank."""
        places = torch.arange(LENGTH) if shard is None else shard.columns
        x = self.tokens(ids) + self.places(places)
        queries, keys, values = self.attention(x).chunk(3, -1)
        of_keys = places
        if shard is not None:
            keys, values = (of_all_ranks(one, 1, shard) for one in (keys, values))
            of_keys = torch.arange(LENGTH)
        scores = queries @ keys.transpose(1, 2)
        scores = scores.masked_fill(of_keys[None, :] > places[:, None], -torch.inf)
        hidden = x + scores.softmax(-1) @ values
        return hidden, self.value(hidden)[..., 0]


class Rows(NamedTuple):
    """Rows of the batch. Ids are shifted already: position i predicts ``taken[i]``."""

    ids: Tensor
    taken: Tensor
    mask: Tensor
    old: Tensor
    rewards: Tensor

    @staticmethod
    def drawn() -> Rows:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        mask = torch.rand((ROWS, LENGTH), generator=generator) < 0.7
        with torch.no_grad():
            model = Model()
            logits = model.head(model(ids[:, :-1])[0])
        old = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        rewards = torch.rand((ROWS, LENGTH), generator=generator).double()
        return Rows(ids[:, :-1], ids[:, 1:], mask, old, rewards)

    def take(self, rows: slice) -> Rows:
        return Rows(*(one[rows] for one in self))


def trained(loss: Callable[[Model, Model], Tensor], wrapped: Any, reduced: Any) -> Any:
    """Return the parameters after some steps of SGD, and the losses on the way."""
    model = Model()
    outer = wrapped(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, outer)
        value.backward()
        reduced(model)
        optimizer.step()
        losses.append(float(value.detach()))
    return {name: p.detach().clone() for name, p in model.named_parameters()}, losses


def alone(batch: Rows) -> Any:
    layout = StepLayout.from_mask(batch.mask)

    def loss(model: Model, outer: Model) -> Tensor:
        hidden, values = outer(batch.ids)
        gae = step_gae(batch.rewards, values.detach(), layout)
        constants = (batch.old, gae.advantages, layout)
        policy = linear_steppo_loss(
            hidden, model.head.weight, batch.taken, *constants, config=CONFIG
        )
        return policy.loss + 0.1 * step_value_loss(values, gae.returns, layout).loss

    return trained(loss, lambda model: model, lambda model: None)


def over_data(batch: Rows, rank: int) -> Any:
    """DDP: the first rank has one row, the second one has the others."""
    own = batch.take((slice(0, 1), slice(1, ROWS))[rank])
    layout = StepLayout.from_mask(own.mask)

    class Whole(nn.Module):
        """The loss stands within the model, so that DDP sees the use of every parameter."""

        def __init__(self, model: Model) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            hidden, values = self.model(own.ids)
            gae = distributed.step_gae(own.rewards, values.detach(), layout)
            tokens = batch_reduction(layout, "token_mean").normalizer
            steps = batch_reduction(layout, "step_mean").normalizer
            policy = linear_steppo_loss(
                hidden,
                self.model.head.weight,
                own.taken,
                own.old,
                gae.advantages,
                layout,
                config=CONFIG,
                normalizer=tokens,
            )
            value = step_value_loss(values, gae.returns, layout, normalizer=steps)
            merged = merge_metrics(policy.metrics)
            assert merged["num_tokens"] == batch.mask.sum()
            return policy.loss + 0.1 * value.loss

    return trained(
        lambda model, outer: outer(),
        lambda model: DistributedDataParallel(Whole(model)),
        lambda model: None,
    )


def over_context(batch: Rows) -> Any:
    layout, shard = StepLayout.from_mask(batch.mask), ContextShard.zigzag(LENGTH)
    ids, taken = shard.local(batch.ids, batch.taken)

    def loss(model: Model, outer: Model) -> Tensor:
        hidden, own_values = outer(ids, shard)
        values = shard.whole(own_values)
        gae = step_gae(batch.rewards, values.detach(), layout)
        constants = (batch.old, gae.advantages, layout, shard)
        policy = context_linear_steppo_loss(
            hidden, model.head.weight, taken, *constants, config=CONFIG
        )
        return policy.loss + 0.1 * step_value_loss(values, gae.returns, layout).loss

    def add_up(model: Model) -> None:
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)

    return trained(loss, lambda model: model, add_up)


def in_three_ways(rank: int, size: int) -> list[Any]:
    batch = Rows.drawn()
    return [alone(batch), over_data(batch, rank), over_context(batch)]


def test_same_parameters_after_training(worlds: Worlds) -> None:
    every = worlds.run(RANKS, in_three_ways)
    (expected, losses), *_ = every[0]
    # It learns, which the later steps depend on.
    assert losses[-1] < losses[0] - 0.01
    start = dict(Model().named_parameters())
    for name, value in expected.items():
        assert not torch.allclose(value, start[name].detach(), atol=1e-4), name
    for rank, ways in enumerate(every):
        for way, (found, _) in zip(("alone", "data", "context"), ways, strict=True):
            for name, value in expected.items():
                error = float((found[name] - value).abs().max())
                assert error < 1e-12, f"{way}, rank {rank}, {name}: {error}"
    of_data = [sum(losses) / RANKS for losses in zip(*(ways[1][1] for ways in every), strict=True)]
    assert max(abs(a - b) for a, b in zip(of_data, losses, strict=True)) < 1e-12
    assert every[0][2][1] == every[1][2][1]
