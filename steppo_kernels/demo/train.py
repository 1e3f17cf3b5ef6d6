"""The training loop: rollouts, step-level GAE, and the fused clipped loss."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .. import Metrics, StepLayout, StepPOConfig, step_gae, step_value_loss, steppo_loss
from ..backends.choice import Backend
from .agent import Agent
from .environment import TextFrozenLake, parse_action
from .rollout import Rollouts, collect
from .text import ChatText

# What one action of the MDP is. Nothing else differs between the methods.
LEVELS: dict[str, Callable[[StepLayout], StepLayout]] = {
    "StepPO": lambda layout: layout,
    "PPO": StepLayout.per_token,
    "GSPO": StepLayout.per_trajectory,
}


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of the reinforcement learning, the same for every method.

    Attributes:
        iterations: rounds of rollouts and updates.
        episodes: episodes a round.
        epochs: passes over a round's episodes.
        minibatches: optimizer steps a pass.
        learning_rate: peak learning rate of AdamW, decayed linearly to a tenth.
        gamma: discount factor.
        lam: lambda of GAE.
        clip: half-width of the ratio's trust region.
        value_clip: largest move of a value away from its rollout's value that still pays.
        value_coef: weight of the value loss.
        kl_coef: weight of the KL penalty against the agent as it came out of the warm-up; it keeps
            up the action format and the exploration. Decays to zero over the second half.
        max_grad_norm: gradients are scaled down to this norm.
    """

    iterations: int = 40
    episodes: int = 96
    epochs: int = 3
    minibatches: int = 4
    learning_rate: float = 2e-3
    gamma: float = 0.95
    lam: float = 0.95
    clip: float = 0.1
    value_clip: float = 0.5
    value_coef: float = 0.5
    kl_coef: float = 0.2
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class IterationReport:
    """What one round did.

    Attributes:
        iteration: 1 for the first round.
        success: share of the round's sampled episodes that reached the goal.
        turns: mean turns of an episode.
        malformed: share of the actions that were not understood.
        metrics: those of the losses, merged over the round's optimizer steps; means over these of
            the loss and of the norm of the gradients.
        tokens: tokens of the round's conversations, prompts included.
        rollout_seconds, update_seconds: wall-clock time.
    """

    iteration: int
    success: float
    turns: float
    malformed: float
    metrics: dict[str, float]
    tokens: int
    rollout_seconds: float = field(compare=False)
    update_seconds: float = field(compare=False)

    @property
    def tokens_per_second(self) -> float:
        """Return the conversation tokens a second of rollout and update together."""
        return self.tokens / (self.rollout_seconds + self.update_seconds)


@dataclass(frozen=True)
class TrajectoryTrace:
    """One trajectory of a round as the update saw it.

    Attributes:
        iteration: the round it was played in.
        lake: rows of the map.
        goal: the goal's cell.
        path: the start, then the cell after each step.
        actions: the agent's sentences, one a step; a note where one was not understood.
        outcome: ``"goal"``, ``"hole"`` or ``"time"``.
        values: [S'] value before each step, from the rollout's value head.
        advantages: [S'] whitened step advantages.
        ratios: [S'] step ratio of the updated policy to the rollout's policy.
        clip: half-width of the ratio's trust region.
    """

    iteration: int
    lake: list[str]
    goal: tuple[int, int]
    path: list[tuple[int, int]]
    actions: list[str]
    outcome: str
    values: list[float]
    advantages: list[float]
    ratios: list[float]
    clip: float


@dataclass(frozen=True)
class _Batch:
    """A round with everything its updates need. Steps are the method's actions."""

    rollouts: Rollouts
    layout: StepLayout
    old_log_probs: Tensor
    ref_log_probs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


class Trainer:
    """Training of one agent with one method.

    Args:
        agent: trained in place.
        text: tokenizer and template.
        method: a name in `LEVELS`.
        config: hyper-parameters.
        seed: seed of the episodes, the sampled tokens and the order of the minibatches.
        backend: backend of the kernels.
    """

    def __init__(
        self,
        agent: Agent,
        text: ChatText,
        *,
        method: str = "StepPO",
        config: TrainConfig | None = None,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        if method not in LEVELS:
            raise ValueError(f"method: got {method!r}, expected one of {', '.join(LEVELS)}")
        self.agent = agent
        self.reference = copy.deepcopy(agent).requires_grad_(False)
        self.text = text
        self.method = method
        self.config = config or TrainConfig()
        self.backend = backend
        self.envs = [TextFrozenLake() for _ in range(self.config.episodes)]
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            agent.parameters(), lr=self.config.learning_rate, weight_decay=0.0
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.1, total_iters=self.config.iterations
        )
        self.iteration = 0

    @property
    def loss_config(self) -> StepPOConfig:
        """Return the loss of the coming round."""
        config = self.config
        remaining = 1 - self.iteration / config.iterations
        return StepPOConfig(
            clip_low=config.clip,
            clip_high=config.clip,
            kl_coef=config.kl_coef * min(1.0, 2 * remaining),
        )

    def train_iteration(self) -> IterationReport:
        """Play one round and learn from it."""
        started = time.perf_counter()
        rollouts = self._play()
        played = time.perf_counter()
        batch = self._assess(rollouts)
        metrics = self._update(batch)
        self.schedule.step()
        self.iteration += 1
        self.last_batch = batch
        return IterationReport(
            iteration=self.iteration,
            success=rollouts.success,
            turns=sum(rollouts.turns) / len(rollouts.turns),
            malformed=rollouts.malformed / sum(rollouts.turns),
            metrics=metrics,
            tokens=rollouts.num_tokens,
            rollout_seconds=played - started,
            update_seconds=time.perf_counter() - played,
        )

    def _play(self) -> Rollouts:
        seeds = self.rng.integers(2**31, size=len(self.envs)).tolist()
        return collect(self.agent, self.text, self.envs, seeds=seeds, generator=self.generator)

    @torch.no_grad()
    def _assess(self, rollouts: Rollouts) -> _Batch:
        """Compute values, log-probabilities and advantages under the policy that played."""
        layout = LEVELS[self.method](
            StepLayout.from_mask(rollouts.action_mask, backend=self.backend)
        )
        states = self.agent.states(rollouts.token_ids, rollouts.attention_mask)
        old_values = self.agent.values(states)
        old_log_probs = self.agent.log_probs(states, rollouts.token_ids, rollouts.action_mask)
        ref_states = self.reference.states(rollouts.token_ids, rollouts.attention_mask)
        ref_log_probs = self.reference.log_probs(
            ref_states, rollouts.token_ids, rollouts.action_mask
        )
        # The row shows how many turns are gone: running out of time is an outcome that the agent
        # sees coming, not a cut through an episode that goes on. So nothing is bootstrapped.
        estimate = step_gae(
            rollouts.rewards,
            old_values,
            layout,
            gamma=self.config.gamma,
            lam=self.config.lam,
            backend=self.backend,
        )
        return _Batch(
            rollouts=rollouts,
            layout=layout,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            old_values=old_values,
            advantages=estimate.advantages,
            returns=estimate.returns,
        )

    def _update(self, batch: _Batch) -> dict[str, float]:
        config, rollouts = self.config, batch.rollouts
        lengths = rollouts.attention_mask.sum(1)
        policies: list[Metrics] = []
        values: list[Metrics] = []
        history: list[Tensor] = []
        for _ in range(config.epochs):
            order = torch.from_numpy(self.rng.permutation(len(lengths)))
            for part in order.chunk(config.minibatches):
                # Ascending, so that the minibatch's steps come in the order of the batch's.
                rows = part.sort().values
                columns = int(lengths[rows].max())
                steps = torch.isin(batch.layout.step_rows, rows)

                def pick(table: Tensor, rows: Tensor = rows, columns: int = columns) -> Tensor:
                    return table[rows, :columns]

                token_ids, action_mask = pick(rollouts.token_ids), pick(rollouts.action_mask)
                layout = LEVELS[self.method](
                    StepLayout.from_mask(action_mask, backend=self.backend)
                )
                states = self.agent.states(token_ids, pick(rollouts.attention_mask))
                policy = steppo_loss(
                    self.agent.log_probs(states, token_ids, action_mask),
                    pick(batch.old_log_probs),
                    batch.advantages[steps],
                    layout,
                    config=self.loss_config,
                    ref_log_probs=pick(batch.ref_log_probs),
                    backend=self.backend,
                )
                value = step_value_loss(
                    self.agent.values(states),
                    batch.returns[steps],
                    layout,
                    old_values=pick(batch.old_values),
                    clip=config.value_clip,
                    backend=self.backend,
                )
                self.optimizer.zero_grad()
                (policy.loss + config.value_coef * value.loss).backward()
                norm = torch.nn.utils.clip_grad_norm_(self.agent.parameters(), config.max_grad_norm)
                self.optimizer.step()
                policies.append(policy.metrics)
                values.append(value.metrics)
                history.append(torch.stack((policy.loss.detach(), norm)))
        loss, grad_norm = torch.stack(history).mean(0).tolist()
        return {
            **Metrics.merge(policies).as_dict(),
            "loss": loss,
            "value_loss": Metrics.merge(values).as_dict()["value_loss"],
            "grad_norm": grad_norm,
        }

    @torch.no_grad()
    def trace(self) -> TrajectoryTrace:
        """Return the last round's longest successful trajectory, or else its longest one.

        For a method whose steps are the turns.
        """
        batch, rollouts = self.last_batch, self.last_batch.rollouts
        row = max(
            range(len(self.envs)),
            key=lambda i: (rollouts.outcomes[i] == "goal", rollouts.turns[i]),
        )
        steps = (batch.layout.step_rows == row).nonzero().squeeze(-1)
        states = self.agent.states(rollouts.token_ids, rollouts.attention_mask)
        update = steppo_loss(
            self.agent.log_probs(states, rollouts.token_ids, rollouts.action_mask),
            batch.old_log_probs,
            batch.advantages,
            batch.layout,
            config=self.loss_config,
            ref_log_probs=batch.ref_log_probs,
            backend=self.backend,
        )
        assert update.step_log_ratio is not None
        offsets = batch.layout.step_offsets
        spans = [batch.layout.token_index[offsets[s] : offsets[s + 1]] for s in steps.tolist()]
        flat_ids = rollouts.token_ids.flatten()
        env = self.envs[row]
        return TrajectoryTrace(
            iteration=self.iteration,
            lake=env.lake,
            goal=env.goal,
            path=list(env.path),
            actions=[
                action if parse_action(action) else "(not understood)"
                for action in (self.text.sentence(flat_ids[span].tolist()) for span in spans)
            ],
            outcome=rollouts.outcomes[row],
            values=batch.old_values.flatten()[batch.layout.state_index[steps]].tolist(),
            advantages=batch.advantages[steps].tolist(),
            ratios=update.step_log_ratio[steps].exp().tolist(),
            clip=self.config.clip,
        )


@dataclass(frozen=True)
class Evaluation:
    """Success of an agent that is not learning meanwhile.

    Attributes:
        sampled: share of the episodes won with sampled actions, the way the agent trains.
        greedy: share won with the likeliest token at each place.
        turns: mean turns of the sampled episodes.
        malformed: share of the sampled actions that were not understood.
        episodes: number of episodes of each kind.
    """

    sampled: float
    greedy: float
    turns: float
    malformed: float
    episodes: int


def evaluate(agent: Agent, text: ChatText, *, episodes: int, seed: int) -> Evaluation:
    """Play the same drawn episodes with sampled and with greedy actions."""
    envs = [TextFrozenLake() for _ in range(episodes)]
    seeds = np.random.default_rng(seed).integers(2**31, size=episodes).tolist()
    generator = torch.Generator().manual_seed(seed)
    sampled = collect(agent, text, envs, seeds=seeds, generator=generator)
    greedy = collect(agent, text, envs, seeds=seeds)
    return Evaluation(
        sampled=sampled.success,
        greedy=greedy.success,
        turns=sum(sampled.turns) / episodes,
        malformed=sampled.malformed / sum(sampled.turns),
        episodes=episodes,
    )
