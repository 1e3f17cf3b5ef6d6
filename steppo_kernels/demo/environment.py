"""FrozenLake told in words: a multi-turn text task whose only reward comes at the end.

The lake is gymnasium's own ``FrozenLakeEnv`` without slipping. Every episode draws a lake, a goal and a start
cell at least ``min_distance`` moves away from it. The agent is told the compass offset of the goal and what lies
in the four cells next to it, and answers with a short sentence that names a direction.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

Cell = tuple[int, int]
Lake = tuple[str, ...]

# In the order of FrozenLake's action numbers: left, down, right, up.
DIRECTIONS = ("west", "south", "east", "north")
MOVES: dict[str, Cell] = {"west": (0, -1), "south": (1, 0), "east": (0, 1), "north": (-1, 0)}
COMPASS_ORDER = ("north", "east", "south", "west")
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
    """Reads the direction out of an action sentence.

    Args:
        text: what the agent said, without the chat template's end token.

    Returns:
        One of ``DIRECTIONS``, or None where ``text`` is not exactly one of the known sentences.
    """
    match = _ACTION.fullmatch(text)
    return None if match is None else match.group(1)


def random_action(rng: np.random.Generator) -> str:
    """A well-formed action sentence with a uniformly random opening and direction."""
    opening = ACTION_OPENINGS[rng.integers(len(ACTION_OPENINGS))]
    return f"{opening} {DIRECTIONS[rng.integers(len(DIRECTIONS))]}."


def make_lakes(count: int, *, size: int = 4, seed: int = 0, exclude: Sequence[Lake] = ()) -> list[Lake]:
    """Draws distinct lakes with gymnasium's map generator.

    Start and goal marks are taken off: an episode draws its own.

    Args:
        count: number of lakes.
        size: cells on each side.
        seed: seed of the first map; the following maps use the following integers.
        exclude: lakes that must not come out again, for a held-out set.

    Returns:
        ``count`` lakes as tuples of ``size`` strings over ``F`` (ice) and ``H`` (hole).
    """
    seen = set(exclude)
    lakes: list[Lake] = []
    # Small lakes with few holes repeat; the bound only turns an impossible request into an error.
    for map_seed in range(seed, seed + 1000 * count):
        rows = generate_random_map(size=size, p=0.8, seed=map_seed)
        lake = tuple(row.replace("S", "F").replace("G", "F") for row in rows)
        if lake not in seen:
            seen.add(lake)
            lakes.append(lake)
        if len(lakes) == count:
            return lakes
    raise ValueError(f"count: found only {len(lakes)} distinct {size}x{size} lakes, expected {count}")


def distances(lake: Lake, goal: Cell) -> dict[Cell, int]:
    """Counts the moves over ice from each cell of a lake to ``goal``; unreachable cells are left out."""
    found = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for move in MOVES.values():
            nxt = (cell[0] + move[0], cell[1] + move[1])
            if nxt not in found and _tile(lake, nxt) == "F":
                found[nxt] = found[cell] + 1
                queue.append(nxt)
    return found


def _tile(lake: Lake, cell: Cell) -> str | None:
    row, column = cell
    inside = 0 <= row < len(lake) and 0 <= column < len(lake[0])
    return lake[row][column] if inside else None


class TextFrozenLake(gymnasium.Env[str, str]):
    """A frozen lake whose observations and actions are sentences.

    Reaching the goal pays 1 and ends the episode, a hole ends it with 0, and after ``max_turns`` turns it ends with
    0 as well. A sentence that ``parse_action`` does not know uses up a turn, moves nobody and is answered with
    "I did not understand.". Walking against the shore uses up a turn too.

    Args:
        lakes: lakes an episode is drawn from.
        max_turns: turns an episode may take.
        min_distance: fewest moves between the drawn start and the goal. A straight way always exists: one that
            never leads away from the goal.
    """

    def __init__(self, lakes: Sequence[Lake], *, max_turns: int = 10, min_distance: int = 2) -> None:
        if not lakes:
            raise ValueError("lakes: got an empty sequence, expected at least one lake")
        self.lakes = list(lakes)
        self.max_turns = max_turns
        self.min_distance = min_distance
        self.observation_space = spaces.Text(MAX_TEXT_LENGTH)
        self.action_space = spaces.Text(MAX_TEXT_LENGTH, min_length=0)
        self.path: list[Cell] = []
        self._turns = 0
        self._distances: dict[tuple[Lake, Cell], dict[Cell, int]] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draws a lake, a goal and a start cell, and tells the first observation.

        Args:
            seed: seed of the draw.
            options: ``lake``, ``goal`` and ``start`` fix what would be drawn.

        Returns:
            The observation, and an info dict.
        """
        super().reset(seed=seed)
        fixed = options or {}
        while True:
            lake: Lake = fixed.get("lake") or self.lakes[self.np_random.integers(len(self.lakes))]
            ice = [(r, c) for r, row in enumerate(lake) for c, tile in enumerate(row) if tile == "F"]
            goal: Cell = fixed.get("goal") or ice[self.np_random.integers(len(ice))]
            key = (lake, goal)
            if key not in self._distances:
                self._distances[key] = distances(lake, goal)
            # Where every way leads around, four neighbouring cells are too little to find it by.
            starts = [
                (row, column)
                for (row, column), moves in self._distances[key].items()
                if moves >= self.min_distance
                and moves == abs(row - goal[0]) + abs(column - goal[1])
            ]
            if "start" in fixed:
                starts = [fixed["start"]]
            # A goal walled in by holes has no start far enough away: draw again.
            if starts:
                break
            if "lake" in fixed and "goal" in fixed:
                raise ValueError(f"options: no start is {self.min_distance} moves from goal {goal}")
        start = starts[self.np_random.integers(len(starts))]
        self.lake, self.goal = lake, goal
        marks = {goal: "G", start: "S"}
        desc = [
            "".join(marks.get((r, c), tile) for c, tile in enumerate(row))
            for r, row in enumerate(lake)
        ]
        self._lake_env = FrozenLakeEnv(desc=desc, is_slippery=False)
        self._lake_env.reset(seed=int(self.np_random.integers(2**31)))
        self._turns = 0
        self.path = [start]
        return self._describe(), {"outcome": None, "malformed": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Plays one turn.

        Args:
            action: the agent's sentence.

        Returns:
            Observation, reward, terminated, truncated and info. ``info["outcome"]`` is None, ``"goal"``,
            ``"hole"`` or ``"time"``; ``info["malformed"]`` tells whether the sentence was understood.
        """
        self._turns += 1
        direction = parse_action(action)
        reward, terminated = 0.0, False
        if direction is not None:
            state, pay, terminated, _, _ = self._lake_env.step(DIRECTIONS.index(direction))
            reward = float(pay)
            self.path.append(divmod(int(state), self._lake_env.ncol))
        truncated = not terminated and self._turns >= self.max_turns
        if terminated:
            outcome, text = ("goal", GOAL_TEXT) if reward > 0 else ("hole", HOLE_TEXT)
        elif truncated:
            outcome, text = "time", TIME_TEXT
        else:
            outcome = None
            text = self._describe() if direction else f"{MISUNDERSTOOD} {self._describe()}"
        info = {"outcome": outcome, "malformed": direction is None}
        return text, reward, terminated, truncated, info

    def _describe(self) -> str:
        row, column = self.path[-1]
        south, east = self.goal[0] - row, self.goal[1] - column
        way = ("south" if south > 0 else "north") * bool(south)
        way += ("east" if east > 0 else "west") * bool(east)
        holes = [side for side in COMPASS_ORDER if self._is_hole(side)]
        near = ", ".join(f"{side} {HOLE}" for side in holes) or NO_HOLES
        return f"Goal {way}. {near.capitalize()}."

    def _is_hole(self, direction: str) -> bool:
        row, column = self.path[-1]
        return _tile(self.lake, (row + MOVES[direction][0], column + MOVES[direction][1])) == "H"
