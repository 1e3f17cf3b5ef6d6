"""Devices as a caller names them."""

from __future__ import annotations

import torch


def device_of(value: object) -> torch.device:
    """Return the device that the argument `device` names.

    Raises:
        ValueError, TypeError: naming it.
    """
    if isinstance(value, torch.device):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        got = value if isinstance(value, torch.dtype) else type(value).__name__
        raise TypeError(f"device: got {got}, expected a device")
    try:
        return torch.device(value)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device: got {value!r}, expected a device") from error
