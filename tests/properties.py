"""Hypothesis with a number of examples that depends on the backend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import hypothesis


def examples(count: int = 40, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Like `hypothesis.given`, for a test with the fixture ``target``.

    In the interpreter it draws few examples: every kernel of a call takes tenths of a second there.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        names = [name for name in inspect.signature(check).parameters if name not in strategies]

        @functools.wraps(check)
        def test(**fixtures: Any) -> None:
            @hypothesis.settings(max_examples=4 if fixtures["target"].interpreted else count)
            @hypothesis.given(**strategies)
            def run(**drawn: Any) -> None:
                check(**fixtures, **drawn)

            run()

        # pytest reads the fixtures from the signature.
        del test.__wrapped__
        test.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        )
        return test

    return decorate
