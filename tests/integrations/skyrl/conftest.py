"""The suite of SkyRL's integration, collected where SkyRL is installed (`make test-skyrl`)."""

from __future__ import annotations

import importlib.util
import sys
import typing

if importlib.util.find_spec("skyrl"):
    collect_ignore_glob = []
    if sys.version_info < (3, 12):
        import typing_extensions

        # SkyRL 0.3.0 hands typing's to pydantic, which takes it from Python 3.12 on.
        typing.TypedDict = typing_extensions.TypedDict
else:
    collect_ignore_glob = ["test_*.py"]
