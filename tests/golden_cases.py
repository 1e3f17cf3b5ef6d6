"""Files of numbers that other implementations found, and how close to them a result must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from batches import Error

from steppo_kernels import StepLayout

FOLDER = Path(__file__).parent / "peers" / "golden"
DTYPES = [torch.float64, torch.float32]
_EPS = torch.finfo(torch.float32).eps


def load(path):
    """Return the arrays of a file as tensors, and its texts as strings."""
    with np.load(path) as arrays:
        return {
            name: str(arrays[name])
            if arrays[name].dtype.kind == "U"
            else torch.from_numpy(np.array(arrays[name]))
            for name in arrays.files
        }


def one_row_a_step(arrays, target):
    rows = arrays["response_mask"].shape[0]
    return StepLayout.from_rows(
        arrays["response_mask"].to(target.device),
        list(range(rows)),
        [0] * rows,
        backend="reference",
    )


def check(compute, expected, target, dtype, bound=1e-10, scales=()):
    """Compare ``compute(target, dtype)`` with golden results, by name.

    `scales`: how much larger than the result the sum of absolute terms is, where it is.
    """
    found = compute(target, dtype)
    bounds = dict.fromkeys(expected, bound)
    if dtype == torch.float32:
        plain = compute(type(target)("reference", "cpu"), dtype)
        # The reference may be right by luck; an eps of what is summed is nobody's error.
        bounds = {
            name: 2 * Error.between(plain[name], value).largest + _EPS * dict(scales).get(name, 1.0)
            for name, value in expected.items()
        }
        assert max(bounds.values()) < 1e-3
    for name, value in expected.items():
        assert found[name].dtype == dtype, name
        assert Error.between(found[name], value).largest <= bounds[name], name
