"""Log-probs and entropies of logits, the head before them, and their gradients, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def log_probs(
    logits: Vector, token: int, temperature: float, kept: Sequence[int] | None = None
) -> tuple[float, float]:
    """Return the log-prob of a token and the entropy of softmax(logits / temperature).

    With `kept`, the softmax is over those ids.
    """
    logs = _log_softmax(logits, temperature, kept)
    return logs[token], -math.fsum(math.exp(log) * log for log in logs.values())


def log_prob_gradients(
    logits: Vector,
    token: int,
    temperature: float,
    upstream: float,
    of_entropy: float,
    kept: Sequence[int] | None = None,
) -> list[float]:
    """Return the gradient of `upstream` log-prob + `of_entropy` entropy of each logit."""
    logs = _log_softmax(logits, temperature, kept)
    entropy = -math.fsum(math.exp(log) * log for log in logs.values())
    slopes = [0.0] * len(logits)
    for v, log in logs.items():
        p = math.exp(log)
        slope = upstream * ((v == token) - p) - of_entropy * p * (log + entropy)
        slopes[v] = slope / temperature
    return slopes


def head_logits(
    hidden: Vector, weight: Sequence[Vector], bias: Vector | None, softcap: float | None
) -> list[float]:
    """Return the logits of a hidden state."""
    logits = []
    for v, row in enumerate(weight):
        raw = math.fsum(h * w for h, w in zip(hidden, row, strict=True))
        raw += bias[v] if bias is not None else 0.0
        logits.append(raw if softcap is None else softcap * math.tanh(raw / softcap))
    return logits


def head_gradients(
    hidden: Vector,
    weight: Sequence[Vector],
    logits: Vector,
    softcap: float | None,
    of_logits: Vector,
    weight_sums: list[list[float]],
    bias_sums: list[float],
) -> list[float]:
    """Add a token's gradients to those of weight and bias; return that of its hidden state."""
    of_hidden = [0.0] * len(hidden)
    for v, slope in enumerate(of_logits):
        raw = slope if softcap is None else slope * (1.0 - (logits[v] / softcap) ** 2)
        bias_sums[v] += raw
        for k in range(len(hidden)):
            of_hidden[k] += raw * weight[v][k]
            weight_sums[v][k] += raw * hidden[k]
    return of_hidden


def _log_softmax(
    logits: Vector, temperature: float, kept: Sequence[int] | None
) -> dict[int, float]:
    """Return log p by id."""
    ids = range(len(logits)) if kept is None else kept
    scaled = {v: logits[v] / temperature for v in ids}
    highest = max(scaled.values())
    total = math.log(math.fsum(math.exp(logit - highest) for logit in scaled.values()))
    return {v: logit - highest - total for v, logit in scaled.items()}
