"""What is taken from rows of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks


class Targets(NamedTuple):
    """What to take from N rows of logits.

    Attributes:
        token_ids: int64 ``[N]``, or ``[N, K]`` for K ids of each row.
        mask: bool ``[N]``, the rows that count; None is all.
        temperatures: fp64 ``[N]``, or None: then `temperature` is that of all rows.
        softcap: logits are capped to +- this before; 0 is off.
    """

    token_ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    softcap: float

    @classmethod
    def of(
        cls,
        token_ids: Tensor,
        mask: Tensor | None,
        temperature: float | Tensor,
        shape: torch.Size,
        device: torch.device,
        *,
        several: bool = False,
    ) -> Targets:
        """Return the checked arguments of a call on logits of N tokens; `mask` is checked.

        With `several`, tokens may have K ids.
        """
        if several:
            ids = ids_of(token_ids, shape, device)
        else:
            ids = checks.token_ids("token_ids", token_ids, shape, device)
        every, number = checks.temperature("temperature", temperature, shape, device, mask)
        return cls(ids, mask, every, number, 0.0)

    @property
    def scale(self) -> float | Tensor:
        """The temperature: fp64 ``[N]``, or a number for all."""
        return self.temperature if self.temperatures is None else self.temperatures

    def rows(self) -> Tensor:
        """Return the rows that count, int64."""
        if self.mask is not None:
            return self.mask.nonzero().squeeze(1)
        return torch.arange(len(self.token_ids), device=self.token_ids.device)


def token_shape(token_ids: object, shape: torch.Size) -> torch.Size:
    """Return the shape of tokens whose values have this one: that of the ids, if it is flat."""
    if not isinstance(token_ids, Tensor) or not _has_several(token_ids, shape):
        return checks.token_shape(token_ids, shape)
    leading = token_ids.shape[:-1]
    return leading if shape == (leading.numel(),) else shape


def ids_of(token_ids: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return ids of tokens of this shape as int64: flat, or ``[N, K]`` if each has K.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not isinstance(token_ids, Tensor) or not _has_several(token_ids, shape):
        return checks.token_ids("token_ids", token_ids, shape, device)
    count = token_ids.shape[-1]
    if count == 0:
        raise ValueError(
            f"token_ids: got shape {tuple(token_ids.shape)}, expected at least one id of each token"
        )
    every = checks.token_ids("token_ids", token_ids, token_ids.shape, device)
    return every.view(-1, count)


def entropy_shape(token_ids: Tensor, shape: torch.Size) -> torch.Size:
    """Return the shape of entropies: that of the ids, without K if they have that dimension.

    `shape` is that of rows of logits or of hidden states without their last dimension.
    """
    is_one = token_ids.shape[-1:] == (1,) and token_ids.shape[:-1] == shape
    has_ids = is_one or _has_several(token_ids, shape)
    return token_ids.shape[:-1] if has_ids else token_ids.shape


def one_id(token_ids: Tensor, name: str) -> None:
    """Raise if tokens have K ids, which the argument of this name does not go with."""
    if token_ids.dim() == 2:
        raise ValueError(
            f"{name}: got it with {token_ids.shape[1]} ids of each token, expected one id each"
        )


def _has_several(token_ids: Tensor, shape: torch.Size) -> bool:
    """Return whether ids have one dimension more than tokens of this shape, and so more ids."""
    if token_ids.is_nested or token_ids.dim() < 2:
        return False
    leading = token_ids.shape[:-1]
    # As many ids as tokens are one each, in any shape that these can have. Of no tokens, shapes
    # tell, but for those of flat rows.
    if token_ids.numel() == 0 == shape.numel():
        return len(shape) > 1 and leading == shape
    is_flat = len(shape) == 1 and token_ids.numel() == shape.numel()
    if is_flat or checks.same_order(token_ids.shape, shape):
        return False
    if leading.numel() != shape.numel():
        return False
    return len(shape) == 1 or checks.same_order(leading, shape)
