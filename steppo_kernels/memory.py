"""Memory that is kept for the next step: `release` gives it back."""

from .log_probs.memory import release

__all__ = ["release"]
