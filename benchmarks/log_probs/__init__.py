"""What log-probs cost, from logits and from hidden states."""
