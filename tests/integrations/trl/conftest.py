"""Without TRL, nothing here is collected; `make test-trl` fails then."""

from __future__ import annotations

import importlib.util
import os

# TRL asks a server for its version otherwise, and warns of rollouts and environments.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["*.py"]
