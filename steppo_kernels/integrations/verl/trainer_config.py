"""The settings of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ...config import one_of

Rewards = Literal["rm_scores", "last", "extra_fields"]
REWARDS = ("rm_scores", "last", "extra_fields")

STEP_REWARD = "step_reward"

# verl reads it from the node of a trainer.
_OF_VERL = ("parameter_sync_step",)


@dataclass(frozen=True)
class StepPOTrainerConfig:
    """What the trainer reads from its node, ``+trainer.v1.steppo_sync.<name>=...``.

    Attributes:
        rewards: where the reward of a step is. ``"rm_scores"``: in the scores of its row, as they
            are. ``"last"``: as that, but only in the last row of a trajectory; verl's agent loop
            copies the score of the last row onto all others. ``"extra_fields"``: a number that the
            agent loop left in the row's `extra_fields`, under `reward_key`. None is
            ``"rm_scores"`` with a warning if they look copied.
        reward_key: see `rewards`.
        bootstrap_key: if an agent loop cuts trajectories off, it appends a row whose prompt is the
            state after the last step and whose response is masked, with True under this key in
            `extra_fields`. The value of that state then follows the last step, which without it
            counts as the end of the trajectory. None: there are no such rows.
        whiten: as in `step_gae`.

    Raises:
        ValueError, TypeError: naming the setting.

    Example:
        >>> from steppo_kernels.integrations.verl import StepPOTrainerConfig
        >>> StepPOTrainerConfig.of_node("steppo_sync", {"rewards": "last"}).rewards
        'last'
    """

    rewards: Rewards | None = None
    reward_key: str = STEP_REWARD
    bootstrap_key: str | None = None
    whiten: bool = True

    def __post_init__(self) -> None:
        if self.rewards is not None:
            one_of("rewards", self.rewards, REWARDS)
        for name in ("reward_key", "bootstrap_key"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and name == "bootstrap_key")):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a key, a string")
        if self.reward_key != STEP_REWARD and self.rewards != "extra_fields":
            raise ValueError(
                f"reward_key: got {self.reward_key!r} with rewards={self.rewards}, expected "
                "rewards=extra_fields: nothing else reads it"
            )
        if not isinstance(self.whiten, bool):
            raise TypeError(f"whiten: got {type(self.whiten).__name__}, expected true or false")

    @classmethod
    def of_node(cls, name: str, node: Mapping[str, Any]) -> StepPOTrainerConfig:
        """Return the settings of the trainer's node, which is called `name`."""
        own = {field.name for field in fields(cls)}
        unknown = set(node) - own - set(_OF_VERL)
        if unknown:
            raise ValueError(
                f"trainer.v1.{name}: got {', '.join(sorted(unknown))}, expected "
                f"{', '.join(sorted(own))}"
            )
        return cls(**{key: value for key, value in node.items() if key in own})

    @property
    def reads_extra_fields(self) -> bool:
        """Whether rows have to bring their `extra_fields`."""
        return self.rewards == "extra_fields" or self.bootstrap_key is not None
