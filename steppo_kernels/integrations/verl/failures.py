"""Failures that nobody would hear of otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_INSTALL = "pip install 'verl[verl-core]==0.9.1'"


@contextmanager
def reported(consequence: str) -> Iterator[None]:
    """Log an exception as an error, with what follows from it, and let it go on.

    verl swallows what its plugins raise.

    Args:
        consequence: what does not work because of the exception.

    Raises:
        ModuleNotFoundError: verl is missing; the message says what to install.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "verl":
            raise ModuleNotFoundError(
                f"verl: it is not installed, expected {_INSTALL}", name="verl"
            ) from error
        logging.getLogger(__name__).exception("steppo_kernels: %s", consequence)
        raise
