"""What a model does to logits after its output head, measured on a few rows that stand for them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The largest value of a probe is 2 to this. A softcap that is far above it cannot be seen.
_LARGE = 13
# Relative differences up to these are rounding. Models may round to fp32 where they return fp64.
_TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_FLOAT_TOLERANCE = 2.0**-20
# Two measurements of one model may differ by this, as compiled code orders operations anew.
_SAME = 1e-9


class LogitMap(NamedTuple):
    """What a model makes of a logit z: ``scale * softcap * tanh(z / softcap)``.

    Attributes:
        softcap: None where there is none: then it is ``scale * z``.
        scale: above 0.
        width: how many of the first token ids it keeps; None is all.
    """

    softcap: float | None = None
    scale: float = 1.0
    width: int | None = None

    def of(self, logits: Tensor) -> Tensor:
        """Return what the model makes of `logits`."""
        logits = logits[..., : self.width]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.scale == 1.0 else self.scale * logits

    def temperature(self, temperature: Any) -> Any:
        """Return the temperature that has the effect of `temperature` and the scale together."""
        is_number = isinstance(temperature, (int, float, Tensor)) and temperature is not True
        return temperature / self.scale if is_number and self.scale != 1.0 else temperature

    def is_close(self, other: LogitMap) -> bool:
        """Return whether both are the same but for rounding."""
        softcaps = self.softcap or math.inf, other.softcap or math.inf
        return (
            self.width == other.width
            and math.isclose(*softcaps, rel_tol=_SAME)
            and math.isclose(self.scale, other.scale, rel_tol=_SAME)
        )


def probe(width: int, device: torch.device) -> Tensor:
    """Return logits fp64 ``[2, 2, width]`` for a head that has so many of them.

    In each column there are a tiny and a moderate value, and a large one of either sign. No two
    columns have the same ones, so that none can be left out, moved or changed alone without a
    difference. Two rows and two positions show a change of the first or the last alone.
    """
    ramp = (torch.arange(width, dtype=torch.float64, device=device) + 1) / width
    # Far from each other where columns are neighbours.
    mixed = (ramp * width * 0.6180339887498949).frac()
    # Numbers of any dtype: what does nothing but round gives them back.
    tiny = 2.0**-12 * (1.0 + (mixed * 128).floor() / 128)
    large = torch.exp2(1.0 + (_LARGE - 1) * ramp)
    moderate = 32.0 * mixed - 16.0
    return torch.stack((tiny, large, moderate, -large.flip(0))).view(2, 2, width)


def measure(made: object, width: int, device: torch.device) -> LogitMap:
    """Return what a model does to logits, from what it made of the `probe`.

    Raises:
        ValueError: it does something else than to scale and to cap all of them alike.
    """
    given = probe(width, device)
    values = _values(made, given)
    kept = values.shape[-1]
    x, y = given[0, :, :kept], values[0]
    largest, cap = float(x[1, -1]), float(y[1, -1])
    scale, softcap, tolerance = 1.0, None, _tolerance(made)
    # Each is found with the other, of which it depends little.
    for _ in range(4):
        # The middle one, as single columns are compared with it below.
        scale = float((y[0] / LogitMap(softcap).of(x[0])).median())
        before = softcap
        softcap = _softcap(largest, cap / scale, tolerance) if scale > 0 else None
        if softcap == before:
            break
    if abs(scale - 1.0) <= _SAME:
        scale = 1.0
    found = LogitMap(softcap, scale, None if kept == width else kept)
    check(found, made, given)
    return found


def check(expected: LogitMap, made: object, given: Tensor) -> None:
    """Raise unless `expected` is what a model made of the probe `given`."""
    values, wanted = _values(made, given), expected.of(given)
    tolerance = _tolerance(made)
    # The absolute part is what half precision cannot tell from 0.
    allowed = tolerance * wanted.abs() + (2.0**-24 if tolerance > _FLOAT_TOLERANCE else 0.0)
    if values.shape != wanted.shape:
        said = f"{values.shape[-1]} token ids are left, expected {wanted.shape[-1]}"
    elif expected.scale <= 0:
        said = f"its scale is {expected.scale:g}, expected one above 0"
    elif bool((wrong := ~((values - wanted).abs() <= allowed)).any()):
        *_, column = at = tuple(wrong.nonzero()[0].tolist())
        said = (
            f"the logit {float(given[at]):g} of token id {column} became {float(values[at]):g}, "
            f"expected {float(wanted[at]):g} by the scale and the softcap that fit best"
        )
    else:
        return
    raise ValueError(
        "model: changes its logits after the output head by more than one scale and one softcap: "
        f"{said}. {WAY_OUT}"
    )


WAY_OUT = (
    "A hook on the head or on the model, a subclass or the model's own forward does it; "
    "steppo_loss_from_logits and token_log_probs take the logits that the model returns"
)


def _values(made: object, given: Tensor) -> Tensor:
    """Return in fp64 what a model made of the probe `given`, of all token ids or the first."""
    if (
        isinstance(made, Tensor)
        and made.is_floating_point()
        and made.dim() == given.dim()
        and made.shape[:-1] == given.shape[:-1]
        and 0 < made.shape[-1] <= given.shape[-1]
    ):
        return made.detach().to(given.device, torch.float64)
    what = type(made).__name__
    if isinstance(made, Tensor):
        what = f"{made.dtype} of shape {tuple(made.shape)}"
    raise ValueError(
        f"model: made {what} of the logits of shape {tuple(given.shape)} that its output head "
        f"returned, expected as many. {WAY_OUT}"
    )


def _softcap(value: float, capped: float, tolerance: float) -> float | None:
    """Return the softcap that makes `capped` of `value`; None if it is far above."""
    share = capped / value
    if not 0.0 < share < 1.0 - tolerance:
        return None
    # tanh(t) / t falls from 1 to 0, below 1 / t.
    low, high = 0.0, 1.0 / share
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        is_low = middle == 0.0 or math.tanh(middle) / middle > share
        low, high = (middle, high) if is_low else (low, middle)
    return value / high


def _tolerance(made: object) -> float:
    dtype = made.dtype if isinstance(made, Tensor) else torch.float64
    return _TOLERANCE.get(dtype, _FLOAT_TOLERANCE)
