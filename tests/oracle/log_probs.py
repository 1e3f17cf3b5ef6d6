"""Log-probs and entropies of logits, the head before them, and their gradients, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def log_probs(logits: Vector, token: int, temperature: float) -> tuple[float, float]:
    """Return the log-prob of a token and the entropy of softmax(logits / temperature)."""
    logs = _log_softmax(logits, temperature)
    return logs[token], -math.fsum(math.exp(log) * log for log in logs)


def log_prob_gradients(
    logits: Vector, token: int, temperature: float, upstream: float, of_entropy: float
) -> list[float]:
    """Return the gradient of `upstream` log-prob + `of_entropy` entropy of each logit."""
    logs = _log_softmax(logits, temperature)
    probs = [math.exp(log) for log in logs]
    entropy = -math.fsum(p * log for p, log in zip(probs, logs, strict=True))
    return [
        (upstream * ((v == token) - p) - of_entropy * p * (log + entropy)) / temperature
        for v, (p, log) in enumerate(zip(probs, logs, strict=True))
    ]


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


def _log_softmax(logits: Vector, temperature: float) -> list[float]:
    scaled = [logit / temperature for logit in logits]
    highest = max(scaled)
    total = math.log(math.fsum(math.exp(logit - highest) for logit in scaled))
    return [logit - highest - total for logit in scaled]
