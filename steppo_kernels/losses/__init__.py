"""Advantages and losses of steps, from log-probs, from logits and from hidden states."""
