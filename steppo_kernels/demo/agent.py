"""The agent: a small Qwen3 causal language model with a value head."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM


class Agent(nn.Module):
    """A Qwen3 language model and a linear value head on the same hidden states.

    Everything is aligned to the token that follows: entry i of `states` is what the model knows
    *before* token i, so the value at i is that of the state before token i, and the distribution
    at i is the one that token i was drawn from.

    Args:
        vocab_size: size of the tokenizer's vocabulary.
        hidden_size: width of the model.
        layers: number of decoder layers.
        heads: attention heads.
        pad_id: id of the padding token.
        max_length: longest row in tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 4,
        pad_id: int = 0,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden_size // heads,
            max_position_embeddings=max_length,
            # The default 0.02 is made for widths in the thousands; a narrow model hardly learns
            # from it at first.
            initializer_range=0.5 * hidden_size**-0.5,
            tie_word_embeddings=False,
            pad_token_id=pad_id,
            # Rows have a few hundred tokens: the default base of millions would leave most
            # dimensions of the rotary embedding constant.
            rope_theta=100.0,
            attn_implementation="sdpa",
        )
        self.language_model = Qwen3ForCausalLM(config)
        # transformers called the argument `past_key_values` at first.
        takes = inspect.signature(self.language_model.model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self.value_head = nn.Linear(hidden_size, 1)
        # Before training no state is better than another.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def states(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden state before each token.

        Args:
            token_ids: [B, T]; rows may be padded on either side.
            attention_mask: [B, T], 1 at real tokens.

        Returns:
            [B, T, d]; entry i has seen the tokens before i only, the first entry is zero.
        """
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = self.language_model.model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)

    def values(self, states: Tensor) -> Tensor:
        """Return the values [B, T] of `states` [B, T, d]; position i is before token i."""
        values: Tensor = self.value_head(states)
        return values.squeeze(-1)

    def log_probs(self, states: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probability of each token given the tokens before it.

        Args:
            states: [B, T, d] of `states`.
            token_ids: [B, T].
            mask: bool [B, T]; only these positions are computed.

        Returns:
            [B, T]; 0 where `mask` is False.
        """
        logits = self.language_model.lm_head(states[mask])
        chosen = -nn.functional.cross_entropy(logits, token_ids[mask], reduction="none")
        return torch.zeros_like(states[..., 0]).masked_scatter(mask, chosen)

    def next_logits(
        self,
        token_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        last: Tensor,
        cache: DynamicCache,
    ) -> Tensor:
        """Return the logits of each row's next token, with the rows' past in a cache.

        Args:
            token_ids: [A, Q] tokens to append, padded on the right.
            attention_mask: [A, C + Q], 1 at the real tokens of the cached columns and the new.
            positions: [A, Q] position of each new token in its own row.
            last: [A] index into Q of each row's last real token.
            cache: keys and values of the C columns before; grows by Q.

        Returns:
            [A, V].
        """
        hidden = self.language_model.model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: cache},
        ).last_hidden_state
        rows = torch.arange(len(last), device=last.device)
        logits: Tensor = self.language_model.lm_head(hidden[rows, last])
        return logits
