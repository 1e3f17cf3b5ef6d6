"""What the suites from logits and hidden states share; results/vocabulary.md."""
