"""Compiles a call of every public function, and compares it with the plain call.

Run as a program with a backend, and the version that torch says it has while the package is
imported. It prints a JSON object: what is wrong with the results of a subject, or how many graphs
its call became.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

# The package asks once, when it is imported.
_NEWER, torch.__version__ = torch.__version__, TorchVersion(sys.argv[2])

from fuzz.crash_worker import difference, of_kind, results  # noqa: E402
from fuzz.subjects import Subject, subjects  # noqa: E402
from fuzz.ways import Case  # noqa: E402

torch.__version__ = _NEWER


def compiled(subject: Subject, backend: str) -> str | int:
    """Return what differs from a plain call, else the number of graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(subject.function, backend=counter)
    try:
        found = results(subject._replace(function=function), backend, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    plain = results(subject, backend, {})
    wrong = difference(found, plain, Case("compiled", None)) or of_kind(found, plain)
    return wrong or counter.frame_count


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    backend = sys.argv[1]
    print(json.dumps({subject.name: compiled(subject, backend) for subject in subjects()}))


if __name__ == "__main__":
    main()
