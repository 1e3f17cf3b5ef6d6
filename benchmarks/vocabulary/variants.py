"""The variants of the suites from logits and from hidden states."""

from __future__ import annotations

from ..variants import Variant

_FUSED, _LIGHTER, _LIGHTEST = "#0b6e4f", "#54a98b", "#9ccdb9"
_EAGER, _EAGER_LIGHTER = "#c0504d", "#d98880"
_COMPILED, _COMPILED_LIGHTER = "#e0a030", "#ecc67a"
_LIGER, _LIGER_LIGHTER, _TRL, _PRODUCT = "#7a5ea8", "#a994c9", "#4a78b5", "#444444"

FUSED = Variant("fused", _FUSED, "o")
EAGER = Variant("eager", _EAGER, "^")
EAGER_ACTIONS = Variant("eager, action tokens", _EAGER_LIGHTER)
LIGER_SCALED = Variant("Liger scaled CE", _LIGER_LIGHTER, project="liger-kernel")
TRL_CHUNKED = Variant("TRL chunked", _TRL, project="trl")

# On logits that are there.
EAGER_HALF = Variant("eager bf16", _EAGER)
EAGER_FLOAT = Variant("eager fp32", _EAGER_LIGHTER)
COMPILED_FLOAT = Variant("torch.compile fp32", _COMPILED)
TRL_SELECTIVE = Variant("TRL selective", _TRL, project="trl")
TOKEN_LOG_PROBS = (FUSED, EAGER_HALF, EAGER_FLOAT, COMPILED_FLOAT, TRL_SELECTIVE)

IN_PLACE = Variant("fused, in place", _FUSED)
IN_PLACE_SLICE = Variant("fused, in place, of a slice", _LIGHTER)
OF_SLICE = Variant("fused, of a slice", _LIGHTEST)
LOGITS_LOSS = (
    *(variant.timed(turns=3) for variant in (IN_PLACE, IN_PLACE_SLICE, FUSED, OF_SLICE)),
    *(variant.timed(turns=3, rounds=1) for variant in (EAGER_HALF, EAGER_FLOAT)),
)

# From hidden states.
BARE_PRODUCT = Variant("bare product", _PRODUCT)
LINEAR_LOG_PROBS = tuple(
    variant.timed(turns=3, rounds=2)
    for variant in (FUSED, BARE_PRODUCT, EAGER_ACTIONS, LIGER_SCALED, TRL_CHUNKED)
)

TWO_CHUNKS = Variant("fused, 2 chunks", _LIGHTER)
TWICE = Variant("fused, twice the products", _LIGHTEST)
PRODUCTS = Variant("bare products", _PRODUCT)
PRODUCTS_KEPT = Variant("bare products, kept memory", _PRODUCT)
COMPILED = Variant("torch.compile", _COMPILED)
COMPILED_ACTIONS = Variant("torch.compile, action tokens", _COMPILED_LIGHTER)
CCE = Variant("CCE torch_compile", project="cut-cross-entropy")
TORCH_LINEAR = Variant("F.linear_cross_entropy", project="torch 2.13")
TORCH_LINEAR_CHUNK = Variant("F.linear_cross_entropy, chunk", project="torch 2.13")
LIGER = Variant("Liger grpo", _LIGER, "D", project="liger-kernel")
LIGER_ACTIONS = Variant("Liger grpo, action tokens", _LIGER_LIGHTER, project="liger-kernel")
# Those that take long take part in fewer turns. What is compared most closely is called twice a
# turn, and once before, untimed: a system that takes freed memory back from an idle process would
# let whoever comes first in a turn pay for it.
LINEAR_LOSS = (
    *(variant.timed(turns=5, rounds=2) for variant in (FUSED, PRODUCTS, PRODUCTS_KEPT)),
    *(variant.timed(turns=3, rounds=2) for variant in (TWO_CHUNKS, TWICE)),
    EAGER.timed(turns=3, rounds=1),
    EAGER_ACTIONS.timed(turns=3, rounds=2),
    COMPILED.timed(turns=3, rounds=1),
    *(variant.timed(turns=3, rounds=2) for variant in (COMPILED_ACTIONS, CCE, TORCH_LINEAR)),
    TORCH_LINEAR_CHUNK.timed(turns=1, rounds=1),
    LIGER_SCALED.timed(turns=3, rounds=1),
    *(variant.timed(turns=2, rounds=1) for variant in (TRL_CHUNKED, LIGER)),
    LIGER_ACTIONS.timed(turns=1, rounds=1),
)

NONE_CLIPPED = Variant("none clipped", rounds=2)
MOST_CLIPPED = Variant("7 of 10 clipped", rounds=2)

_FUSED_CURVE = FUSED.timed(turns=3, rounds=3)
_EAGER_CURVES = (EAGER.timed(turns=2, rounds=1), EAGER_ACTIONS.timed(turns=2, rounds=3))
_LIGER_CURVE = LIGER.timed(turns=1, rounds=1)
CURVES = {
    "share": (_FUSED_CURVE, *_EAGER_CURVES, _LIGER_CURVE),
    "live": (_FUSED_CURVE, TWICE.timed(turns=2, rounds=3), _EAGER_CURVES[1]),
    "vocabulary": (_FUSED_CURVE, *_EAGER_CURVES, _LIGER_CURVE),
}

ALL = tuple(dict.fromkeys((*TOKEN_LOG_PROBS, *LOGITS_LOSS, *LINEAR_LOG_PROBS, *LINEAR_LOSS)))
