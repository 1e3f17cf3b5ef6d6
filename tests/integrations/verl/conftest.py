"""The suite of verl's integration: it is collected where verl is installed (`make test-verl`)."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]
