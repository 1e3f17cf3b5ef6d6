"""What a model does to its logits after the output head, as its configuration says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Stand for logits: what the model makes of them shows what it would have made of the logits.
PROBE = (-40.0, -2.0, -0.25, 0.5, 1.0, 25.0)
# Rounding of a model that returns logits in bf16.
_TOLERANCE = 1e-2

# Attributes of a model's configuration by which its forward multiplies or divides logits.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"


class Scaling(NamedTuple):
    """What a model does to its logits: caps them, if it does, and multiplies them."""

    softcap: float | None
    scale: float

    def temperature(self, temperature: Any) -> Any:
        """Return the temperature that has the effect of `temperature` and the scale together."""
        return temperature if self.scale == 1.0 else temperature / self.scale

    def compare(self, made: object) -> None:
        """Raise unless `made` is what this makes of the probe."""
        expected = torch.tensor(PROBE, dtype=torch.float32, device="cpu")
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        expected = self.scale * expected
        values = made.detach().float().cpu() if isinstance(made, Tensor) else expected[:0]
        if values.shape != (1, 1, len(PROBE)) or not torch.allclose(
            values[0, 0], expected, rtol=_TOLERANCE, atol=0.0
        ):
            raise ValueError(
                "model: changes its logits after the output head in a way that is not known here; "
                f"supported are the settings {_SOFTCAP}, {', '.join(_MULTIPLIERS)} and "
                f"{', '.join(_DIVISORS)} of its configuration, here softcap {self.softcap} and "
                f"scale {self.scale:g}. It made {values.flatten().tolist()} of {list(PROBE)}, "
                f"expected {expected.tolist()}"
            )


def scaling_of(model: PreTrainedModel) -> Scaling:
    """Return what the model's configuration says that happens to logits."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    return Scaling(getattr(config, _SOFTCAP, None), scale)
