"""What each CUDA kernel moves at once: 16 bytes in its loop, or less by design.

Kernels are named by regular expressions that match a whole name.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cuda_machine_code import wide_moves
from machine_loops import Flow

_HALF = "steppo::(Half|BFloat16)"
# Loads of 16 bytes that a thread has under way in rows of logits.
_LOADS = {"float": 4, "double": 1, _HALF: 4}
# Numbers that are computed with take so many times the bytes of those that are moved.
_WIDENED = {"float": 1, "double": 1, _HALF: 2}


class Moves(NamedTuple):
    """The least that a kernel moves 16 bytes at once, as numbers of loads and of stores.

    Attributes:
        loops: for each of these there is a loop that has as many, beside those of loops in it.
        once: what is outside of all loops, where the threads of a grid take one piece each.
    """

    loops: tuple[tuple[int, int], ...] = ()
    once: tuple[int, int] = (0, 0)

    def are_in(self, flow: Flow) -> bool:
        """Whether a kernel has as many."""
        in_loops = [wide_moves(loop.own) for loop in flow.loops]
        places = [(self.once, [wide_moves(flow.once)])]
        places += [(least, in_loops) for least in self.loops]
        return all(
            any(loads >= least[0] and stores >= least[1] for loads, stores in found)
            for least, found in places
        )


STREAMS = {
    "broadcast_kernel<float, true>": Moves(once=(1, 1)),
    "broadcast_kernel<double, true>": Moves(once=(1, 2)),
    r"fill_kernel<\w+, true>": Moves(once=(0, 1)),
    f"scale_gradient_kernel<(float, float|double, double|{_HALF}, {_HALF}), true>": Moves(
        once=(1, 1)
    ),
    f"scale_gradient_kernel<float, {_HALF}, true>": Moves(once=(2, 1)),
    "count_ids_kernel": Moves(((1, 0),)),
    # Tokens are numbered without those of no step, so that what is written begins anywhere.
    "place_ids_kernel": Moves(((1, 0),)),
    "count_runs_kernel": Moves(((2, 0),)),
    "number_runs_kernel": Moves(((2, 0), (0, 1))),
    "count_new_ids_kernel": Moves(((2, 0),)),
    "number_ids_kernel": Moves(((2, 1),)),
    # 16 bytes of ids are of 4 tokens, whose mask is 4 bytes.
    "segment_rows_kernel": Moves(((0, 1),)),
    r"rewards_kernel<float, \d+, true>": Moves(((4, 0),)),
    r"rewards_kernel<double, \d+, true>": Moves(((6, 0),)),
    r"gae_rows_kernel<float, \d+>": Moves(((8, 4),)),
    r"gae_rows_kernel<double, \d+>": Moves(((7, 4),)),
    # Ids of all tokens. What tokens of actions have is read by step, and a step begins anywhere.
    r"policy_loss_kernel<\w+, \d+, \d>": Moves(((2, 0),)),
    # The mask along long steps and whole rows. A chunk of it becomes words by a ballot of lanes, a
    # byte each, and what tokens of actions have is read by step.
    r"policy_loss_masked_kernel<\w+, \d>": Moves(((4, 0),)),
    **{
        rf"token_log_probs_kernel<{logits}, \w+, \w+>": Moves(((loads, 0),))
        for logits, loads in _LOADS.items()
    },
    # Packs of gradients that are no packs of logits, as their rows begin elsewhere, have a loop of
    # their own, which loads number by number.
    r"token_log_probs_backward_kernel<float, float, \w+, \w+>": Moves(((2, 2),)),
    rf"token_log_probs_backward_kernel<float, {_HALF}, \w+, \w+>": Moves(((2, 1),)),
    rf"token_log_probs_backward_kernel<{_HALF}, {_HALF}, \w+, \w+>": Moves(((2, 2),)),
    # Zeros are. Gradients in fp64 are written number by number.
    r"token_log_probs_backward_kernel<double, double, \w+, \w+>": Moves(((0, 1),)),
    # A loop takes rows of the weight, 8 loads at once. The one around it takes parts of sets: the
    # hidden state, and for a direction the row of the token itself and what is stored.
    **{
        rf"kept_head_kernel<{rows}, \d+, {packs}, true, {also}>": Moves(((8, 0), of_part))
        for rows, widened in _WIDENED.items()
        for packs in (2, 4)
        for also, of_part in (("false", (packs, 0)), ("true", (2 * packs, packs * widened)))
    },
    **{
        f"scale_directions_kernel<{rows}, true>": Moves(((widened, 1),))
        for rows, widened in _WIDENED.items()
    },
    # A warp stores its sum when all rows of the weight are added.
    f"kept_hidden_gradient_kernel<(float, float|double, double|{_HALF}, {_HALF}), true>": Moves(
        ((8, 0),), once=(0, 1)
    ),
    f"kept_hidden_gradient_kernel<{_HALF}, float, true>": Moves(((8, 0),), once=(0, 2)),
    # A sum of some tokens of an id is no gradient yet: it is stored number by number, as in its row
    # one number more follows.
    r"kept_weight_gradient_kernel<[\w:]+, true>": Moves(((4, 0), (0, 1))),
}

# By design these move less at once.
PIECES = {
    # They are launched for addresses or sizes that are no multiples of 16 bytes.
    r"(broadcast|fill)_kernel<\w+, false>": "any address",
    r"scale_gradient_kernel<[\w:]+, [\w:]+, false>": "any address",
    r"rewards_kernel<\w+, \d+, false>": "any address",
    r"kept_head_kernel<[\w:]+, \d+, \d, false, \w+>": "rows of any size",
    r"kept_hidden_gradient_kernel<[\w:]+, [\w:]+, false>": "rows of any size",
    r"(kept_weight_gradient|scale_directions)_kernel<[\w:]+, false>": "rows of any size",
    # What they read or write lies anywhere.
    r"sum_kernel<\w+>": "tokens by the index of their step",
    r"center_kernel<\w+>": "tokens by the index of actions",
    r"masked_center_kernel<\w+>": "tokens where the mask is set, and nothing of others",
    r"value_loss_kernel<\w+>": "states by the index of their step",
    r"gae_kernel<\w+, \d+, \d>": "the steps of a trajectory by their index",
    r"(mark|whiten)_kernel<\w+>": "the steps of trajectories by their index",
    "measure_kernel": "the first and the last token of a step by their index",
    r"kept_log_probs(_backward)?_kernel<\w+, \w+>": "the set of a token, which begins anywhere",
    r"join_parts_kernel<[\w:]+>": "sums whose rows have one number more, that of the bias",
    # A warp reads a line at once all the same.
    "count_runs_of_rows_kernel": "a byte of the mask a lane, which a ballot makes words of",
    r"join_directions_kernel<[\w:]+>": "a column a thread; only long sets are joined",
    # They read or write little beside what they compute, or beside other launches of a call.
    "mark_actions_kernel": "ids that are compared with sequences, from each token on",
    "trajectories_kernel": "numbers of steps, in arrays of several types",
    r"order_kernel<\w+>": "two numbers a row of logits, in one block",
}


def find_moves(name: str) -> Moves:
    """Return what a kernel has to move, which is nothing where it moves pieces by design."""
    found = [moves for names, moves in STREAMS.items() if re.fullmatch(names, name)]
    found += [Moves() for names in PIECES if re.fullmatch(names, name)]
    assert len(found) == 1, f"{name}: expected in STREAMS or in PIECES of cuda_moves.py, and once"
    return found[0]
