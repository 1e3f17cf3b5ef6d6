"""From logits, or hidden states and an output head, to the log-probs of the tokens taken."""
