"""FrozenLake told in words: a multi-turn text task whose only reward comes at the end.

The lake is gymnasium's 4x4 map without slipping. Every episode starts on a random cell. The agent
is told where the goal lies and which of the four cells next to it are holes, and answers with a
short sentence that names a direction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.toy_text.frozen_lake import MAPS, FrozenLakeEnv

Cell = tuple[int, int]

# In the order of FrozenLake's action numbers: left, down, right, up.
DIRECTIONS = ("west", "south", "east", "north")
MOVES: dict[str, Cell] = {"west": (0, -1), "south": (1, 0), "east": (0, 1), "north": (-1, 0)}
HOLE = "hole"
NO_HOLES = "ice all around"

ACTION_OPENINGS = ("Go", "I go", "I will walk", "My next move is")
SYSTEM_PROMPT = "Cross the frozen lake. Reach the goal, avoid every hole. Answer with one move."
MISUNDERSTOOD = "I did not understand."
GOAL_TEXT = "You reached the goal."
HOLE_TEXT = "You fell into a hole."
TIME_TEXT = "The time is up."

MAX_TEXT_LENGTH = 512

_ACTION = re.compile(rf"(?:{'|'.join(ACTION_OPENINGS)}) ({'|'.join(DIRECTIONS)})\.")


def parse_action(text: str) -> str | None:
    """Return the direction that an action sentence names.

    Args:
        text: what the agent said, without the chat template's end token.

    Returns:
        One of `DIRECTIONS`, or None where `text` is not exactly one of the known sentences.
    """
    match = _ACTION.fullmatch(text)
    return None if match is None else match.group(1)


def random_action(rng: np.random.Generator) -> str:
    """Return a well-formed action sentence with a uniformly random opening and direction."""
    opening = ACTION_OPENINGS[rng.integers(len(ACTION_OPENINGS))]
    return f"{opening} {DIRECTIONS[rng.integers(len(DIRECTIONS))]}."


class TextFrozenLake(gymnasium.Env[str, str]):
    """A frozen lake whose observations and actions are sentences.

    Reaching the goal pays 1 and ends the episode, a hole ends it with 0, and after `max_turns`
    turns it ends with 0 as well. A sentence that `parse_action` does not know uses up a turn, moves
    nobody and is answered with "I did not understand.". Walking against the shore uses one up too.

    Args:
        lake: rows over ``S`` and ``F`` (both ice), ``H`` (hole) and one ``G`` (goal). Episodes
            start on any ice.
        max_turns: turns an episode may take.

    Attributes:
        path: the start, then the cell after each turn.
    """

    def __init__(self, lake: Sequence[str] = tuple(MAPS["4x4"]), *, max_turns: int = 8) -> None:
        # FrozenLakeEnv draws the start among all cells marked S.
        self.lake = [row.replace("F", "S") for row in lake]
        if sum(row.count("G") for row in self.lake) != 1:
            raise ValueError(f"lake: got {list(lake)}, expected exactly one goal G")
        self.goal: Cell = next((r, row.index("G")) for r, row in enumerate(self.lake) if "G" in row)
        self.max_turns = max_turns
        self.observation_space = spaces.Text(MAX_TEXT_LENGTH)
        self.action_space = spaces.Text(MAX_TEXT_LENGTH, min_length=0)
        self.path: list[Cell] = []
        self._frozen_lake = FrozenLakeEnv(desc=self.lake, is_slippery=False)
        self._turns = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode on a random cell.

        Args:
            seed: seed of the draw.
            options: ``start``, a (row, column) on ice, replaces the draw.

        Returns:
            The first observation and an info dict like that of `step`.
        """
        super().reset(seed=seed)
        state, _ = self._frozen_lake.reset(seed=seed)
        start = divmod(int(state), self._frozen_lake.ncol)
        if options and "start" in options:
            start = options["start"]
            if self._tile(start) != "S":
                raise ValueError(f"options: got start {start}, expected a cell of ice")
            self._frozen_lake.s = start[0] * self._frozen_lake.ncol + start[1]
        self._turns = 0
        self.path = [start]
        return self._describe(), {"outcome": None, "malformed": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn.

        Args:
            action: the agent's sentence.

        Returns:
            Observation, reward, terminated, truncated and info. ``info["outcome"]`` is None,
            ``"goal"``, ``"hole"`` or ``"time"``; ``info["malformed"]`` tells that the sentence was
            not understood.
        """
        self._turns += 1
        direction = parse_action(action)
        reward, terminated = 0.0, False
        cell = self.path[-1]
        if direction is not None:
            state, pay, terminated, _, _ = self._frozen_lake.step(DIRECTIONS.index(direction))
            reward, cell = float(pay), divmod(int(state), self._frozen_lake.ncol)
        self.path.append(cell)
        truncated = not terminated and self._turns >= self.max_turns
        outcome = None
        if terminated:
            outcome, text = ("goal", GOAL_TEXT) if reward > 0 else ("hole", HOLE_TEXT)
        elif truncated:
            outcome, text = "time", TIME_TEXT
        else:
            text = self._describe() if direction else f"{MISUNDERSTOOD} {self._describe()}"
        info = {"outcome": outcome, "malformed": direction is None}
        return text, reward, terminated, truncated, info

    def _describe(self) -> str:
        row, column = self.path[-1]
        south, east = self.goal[0] - row, self.goal[1] - column
        way = ("south" if south > 0 else "north") * bool(south)
        way += ("east" if east > 0 else "west") * bool(east)
        holes = [
            f"{side} {HOLE}"
            for side, move in MOVES.items()
            if self._tile((row + move[0], column + move[1])) == "H"
        ]
        return f"Goal {way}. {(', '.join(holes) or NO_HOLES).capitalize()}."

    def _tile(self, cell: Cell) -> str | None:
        row, column = cell
        inside = 0 <= row < len(self.lake) and 0 <= column < len(self.lake[0])
        return self.lake[row][column] if inside else None
