"""The variants of the suites on log-probs, values and rewards."""

from __future__ import annotations

from ..variants import Variant

FUSED = Variant("fused", "#0b6e4f", "o")
EAGER = Variant("eager", "#c0504d", "^")
PAIR = (FUSED, EAGER)
# What nothing can be faster than (floors.py).
FLOOR = Variant("floor", "#444444", "_")

LAYOUT = Variant("fused, layout", "#0b6e4f", "o")
MASK = Variant("fused, mask", "#54a98b")
COMPILED = Variant("torch.compile", "#e0a030")
GSPO = Variant("verl gspo", "#7a5ea8", project="verl")
POLICY_LOSS = (LAYOUT, MASK, EAGER, COMPILED, GSPO, FLOOR)

VANILLA = Variant("verl vanilla", "#7a5ea8", project="verl")
# Without TRL its formula stands in for its own loss.
TRL = Variant("TRL token loss", "#4a78b5", project="trl")
TRL_FORMULA = Variant("TRL token loss (formula)", "#4a78b5")
TOKEN_LOSS = (LAYOUT, MASK, EAGER, VANILLA, TRL, TRL_FORMULA)
GSPO_TOKEN = (LAYOUT, MASK, EAGER, GSPO)

VERL_WEIGHTS = Variant("verl rollout correction", "#7a5ea8", project="verl")
ROLLOUT_WEIGHTS = (*PAIR, VERL_WEIGHTS)

# A call that makes the outputs and does nothing else.
BARE = Variant("bare")
OVERHEAD = (FUSED, BARE)

# Without verl a loop that is held to it stands in for its own.
VERL_LOOP = Variant("verl loop", "#7a5ea8")
TOKEN_GAE = (FUSED, VERL_LOOP)

PER_TOKEN = Variant("fused, per token", "#54a98b")
WITH_LAYOUT = Variant("fused, layout + per token", "#9ccdb9")
TABLES = Variant("authors' tables", "#4a78b5")
STEP_GAE = (FUSED, PER_TOKEN, WITH_LAYOUT, TABLES)

ALL = tuple(dict.fromkeys((*PAIR, *POLICY_LOSS, *TOKEN_LOSS, *OVERHEAD, *TOKEN_GAE, *STEP_GAE)))
