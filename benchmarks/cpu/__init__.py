"""The losses and estimators on log-probs, values and rewards of tokens; results/cpu.md."""
