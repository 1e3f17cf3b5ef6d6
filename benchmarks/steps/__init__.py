"""What the suites on log-probs, values and rewards of tokens share; results/steps.md."""
