"""The variants of the suites on log-probs, values and rewards."""

from __future__ import annotations

from ..variants import Variant

FUSED = Variant("fused", "#0b6e4f", "o")
EAGER = Variant("eager", "#c0504d", "^")
PAIR = (FUSED, EAGER)

LAYOUT = Variant("fused, layout", "#0b6e4f", "o")
MASK = Variant("fused, mask", "#54a98b")
COMPILED = Variant("torch.compile", "#e0a030")
GSPO = Variant("verl gspo", "#7a5ea8", project="verl")
POLICY_LOSS = (LAYOUT, MASK, EAGER, COMPILED, GSPO)

# Without verl a loop that is held to it stands in for its own.
VERL_LOOP = Variant("verl loop", "#7a5ea8")
TOKEN_GAE = (FUSED, VERL_LOOP)

PER_TOKEN = Variant("fused, per token", "#54a98b")
WITH_LAYOUT = Variant("fused, layout + per token", "#9ccdb9")
TABLES = Variant("authors' tables", "#4a78b5")
STEP_GAE = (FUSED, PER_TOKEN, WITH_LAYOUT, TABLES)

ALL = tuple(dict.fromkeys((*PAIR, *POLICY_LOSS, *TOKEN_GAE, *STEP_GAE)))
