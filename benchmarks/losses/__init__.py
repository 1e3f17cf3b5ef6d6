"""What advantages and losses cost, from log-probs, logits and hidden states."""
