"""From logits or hidden states to log-probs and losses; results/vocabulary.md."""
