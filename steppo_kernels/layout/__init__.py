"""Which tokens form which step: `StepLayout`, how it is built, and per-step numbers on tokens."""
