"""Which reward belongs to which step, from what rollouts return and environments hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

# What a rollout calls them in its output, and what the attribute of an environment is called.
NAME = "step_rewards"


class StepRewards:
    """The rewards of the steps of one generation, on this rank.

    An environment appends to its `step_rewards` whenever it gives a reward. Lengths of these lists
    are noted before each message of the model: what came between two messages belongs to the first
    of them, be it of one call of a tool, of several, or of none.
    """

    def __init__(self) -> None:
        self._lengths: list[list[int]] = []
        self._of_rollout: Sequence[Any] | None = None
        self._environments: Sequence[Any] | None = None

    def clear(self) -> None:
        """Begin a generation."""
        self.__init__()  # type: ignore[misc]

    def note_rollout(self, fields: dict[str, Any]) -> None:
        """Take the rewards that a `rollout_func` returned, if it did."""
        self._of_rollout = fields.get(NAME)

    def note_message(self, environments: Sequence[Any] | None) -> None:
        """Note how many rewards there are before a message of the model, and after the last."""
        if environments is not None and all(hasattr(one, NAME) for one in environments):
            self._environments = environments
            self._lengths.append([len(_rewards(one)) for one in environments])

    def of_steps(self, runs: Sequence[int]) -> list[list[float] | None]:
        """Return the rewards of the steps of each completion; None of one that has no score.

        Args:
            runs: how many steps each completion has. One with none, such as a truncated one that
                is masked, has no rewards.

        Raises:
            ValueError: there are none, or they are not those of the steps.
        """
        if self._of_rollout is not None:
            found = _one_each(self._of_rollout, runs)
        elif self._environments is not None and len(self._lengths) > 1:
            found = self._by_message(self._environments, runs)
        elif self._environments is not None:
            found = _one_each([_rewards(one) for one in self._environments], runs)
        else:
            raise ValueError(
                f"step_reward_source: got 'steps' or 'both' without {NAME}, expected them from the "
                "output of rollout_func, one list for each completion, or as an attribute of each "
                "environment; 'final' takes the rewards of reward functions alone"
            )
        for row, rewards in enumerate(found):
            for reward in rewards or ():
                if not math.isfinite(reward):
                    raise ValueError(
                        f"{NAME}: got {reward} in completion {row}, expected finite numbers, or "
                        "None in the place of its list for a completion without a score"
                    )
        return found

    def _by_message(
        self, environments: Sequence[Any], runs: Sequence[int]
    ) -> list[list[float] | None]:
        found: list[list[float] | None] = []
        for row, (environment, count) in enumerate(zip(environments, runs, strict=True)):
            rewards, lengths = _rewards(environment), [one[row] for one in self._lengths]
            if lengths[0] != 0:
                raise ValueError(
                    f"{NAME}: got {lengths[0]} of environment {row} right after its reset, "
                    "expected none: reset has to empty the list"
                )
            if len(rewards) != lengths[-1]:
                raise ValueError(
                    f"{NAME}: got {len(rewards) - lengths[-1]} more of environment {row} while its "
                    "reward was asked for, expected them while the model acts"
                )
            of_messages = [
                sum(map(float, rewards[begin:end])) for begin, end in itertools.pairwise(lengths)
            ]
            if count and any(of_messages[count:]):
                raise ValueError(
                    f"{NAME}: got rewards of environment {row} after {len(of_messages)} messages, "
                    f"expected those of its {count} steps: messages without a token of a tool "
                    "between them make one step"
                )
            found.append([*of_messages, *[0.0] * count][:count])
        return found


def _rewards(environment: Any) -> list[Any]:
    """Return the list that an environment holds."""
    held = getattr(environment, NAME)
    if not isinstance(held, list):
        raise TypeError(
            f"{NAME}: got {type(held).__name__} of {type(environment).__name__}, expected a list: "
            "TRL takes a public method for a tool"
        )
    return held


def _one_each(given: Sequence[Any], runs: Sequence[int]) -> list[list[float] | None]:
    """Return the rewards, one for each step."""
    if len(given) != len(runs):
        raise ValueError(
            f"{NAME}: got {len(given)} lists, expected one for each of {len(runs)} completions"
        )
    for row, (rewards, count) in enumerate(zip(given, runs, strict=True)):
        if rewards is not None and count and len(rewards) != count:
            raise ValueError(
                f"{NAME}: got {len(rewards)} of completion {row}, expected {count}, one for each "
                "run of ones in env_mask: turns without a token of the environment between them "
                "make one step"
            )
    return [None if one is None else [float(reward) for reward in one] for one in given]


def by_source(
    source: str,
    given: Sequence[list[float] | None],
    runs: Sequence[int],
    scores: Sequence[float],
) -> list[list[float] | None]:
    """Return the rewards of the steps of each completion, as `step_reward_source` says.

    Args:
        source: ``"steps"``, ``"final"`` or ``"both"``.
        given: the rewards of steps; nothing is looked at for ``"final"``.
        runs: how many steps each completion has.
        scores: what reward functions gave each completion, NaN for nothing.

    Raises:
        ValueError: a score is infinite.
    """
    if source == "steps":
        return list(given)
    found: list[list[float] | None] = []
    for row, (count, score) in enumerate(zip(runs, scores, strict=True)):
        rewards = [0.0] * count if source == "final" else given[row]
        if math.isinf(score):
            raise ValueError(
                f"reward_funcs: got {score} for completion {row}, expected finite numbers, or None "
                "for a completion without a score"
            )
        if rewards is None or math.isnan(score):
            found.append(None)
        else:
            found.append([*rewards[:-1], *(reward + score for reward in rewards[-1:])])
    return found


def checked_rollout(rollout: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a `rollout_func` whose output is looked at before TRL takes it."""

    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        completions = output.get("completion_ids", ())
        for row, ids in enumerate(completions):
            if len(ids) == 0:
                raise ValueError(
                    f"completion_ids: got no token in completion {row}, expected at least one"
                )
        for name in ("env_mask", "logprobs"):
            given = output.get(name)
            if given is None:
                continue
            lengths, expected = [len(one) for one in given], [len(ids) for ids in completions]
            if lengths != expected:
                raise ValueError(
                    f"{name}: got rows of {lengths} entries, expected those of completion_ids, "
                    f"{expected}"
                )
        return output

    return checked


def own_reward_functions(environment: Any) -> list[Any] | None:
    """Return a reward function for TRL, which asks for one; None where environments have theirs.

    Args:
        environment: an `environment_factory`, or several by their names, or None.
    """
    factories = environment.values() if isinstance(environment, dict) else [environment]
    has_reward = any(hasattr(one, "get_reward") for one in factories)
    return None if has_reward else [sum_of_step_rewards]


def sum_of_step_rewards(
    *, step_rewards: Sequence[Any] = (), environments: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """Return the sum over the steps of each completion, a reward function of TRL.

    An environment with a reward of its own has None: before there is one, a factory that is no
    class does not show whether it has.
    """
    given: list[Any] = list(step_rewards)
    if not given:
        given = [getattr(one, NAME, None) for one in environments or ()]
        if not given or None in given:
            raise ValueError(
                f"reward_funcs: got None without {NAME}, expected them of rollout_func or of each "
                "environment, or a reward function"
            )
        given = [
            None if hasattr(one, "get_reward") else rewards
            for one, rewards in zip(environments or (), given, strict=True)
        ]
    return [None if one is None else float(sum(one)) for one in given]
