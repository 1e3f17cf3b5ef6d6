"""Calls the functions with unusual arguments, in processes that may die.

Run as a program with a backend and names of subjects. It prints one line of JSON for each
failure (subject, argument, replacement, what happened) and a last one with the number of cases.
Each subject is tried in a fork, so that a crash is one failure and the next case goes on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple, TextIO

import torch

from fuzz.subjects import Subject, cases, replaced
from fuzz.ways import MODES, Case, of_tensor
from steppo_kernels import StepLayout, StepPOConfig, TokenSupport

# Longest that a case may take.
_SECONDS = 20
_MEMORY = 16 << 30
# Modes in which nothing has a gradient.
_WITHOUT = ("called under no_grad", "called under inference_mode")
_CONFIG = {field.name for field in dataclasses.fields(StepPOConfig)}


def main() -> None:
    backend, names = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "STEPPO_SANITIZED" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    preload()
    tried = 0
    for subject, parameters in replaced():
        if subject.name in names:
            tried += run_in_forks(subject, parameters, backend)
    print(json.dumps({"tried": tried}), flush=True)


def preload() -> None:
    """Let torch load, once and not in each fork, what it loads when such tensors are used."""
    for case in of_tensor(torch.ones(2, 3)):
        if case.name in ("jagged", "fake", "sparse", "quantised"):
            with contextlib.suppress(Exception):
                case.made.reshape(-1).sum()


def run_in_forks(subject: Subject, parameters: list[str], backend: str) -> int:
    """Try every case of a subject; behind one that kills its process, go on in another."""
    begin, last, status, begun = 0, ["", ""], 1, True
    while status and begun:
        begun = False
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with os.fdopen(writer, "w", buffering=1) as out:
                Trial(subject, backend, out).run(parameters, begin)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                kind, *rest = json.loads(line)
                if kind == "case":
                    begun = True
                    begin, *last = rest
                else:
                    print(json.dumps([subject.name, *last, *rest]), flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            print(json.dumps([subject.name, *last, f"the process died: {how}"]), flush=True)
        begin += 1
    return begin


class Trial:
    """The cases of one subject on one backend."""

    def __init__(self, subject: Subject, backend: str, out: TextIO) -> None:
        self.subject, self.backend, self.out = subject, backend, out
        self.ordinary = results(subject, backend, {})

    def run(self, parameters: list[str], begin: int) -> None:
        for number, (parameter, case) in enumerate(self.cases(parameters)):
            if number < begin:
                continue
            print(json.dumps(["case", number, parameter, case.name]), file=self.out)
            signal.alarm(_SECONDS)
            wrong = self.judge(parameter, case)
            signal.alarm(0)
            if wrong:
                print(json.dumps(["wrong", wrong]), file=self.out)

    def cases(self, parameters: list[str]) -> Iterator[tuple[str, Case]]:
        for parameter in parameters:
            for case in cases(self.subject, parameter):
                yield parameter, case
        for name, mode in MODES.items():
            yield "", Case(f"called under {name}", mode)

    def judge(self, parameter: str, case: Case) -> str | None:
        """Return what is wrong about a call with a replaced argument."""
        try:
            if parameter:
                got = results(self.subject, self.backend, {parameter: case.made})
            else:
                with case.made():
                    got = results(self.subject, self.backend, {})
        except Exception as error:
            return unnamed(self.subject, error)
        if not parameter:
            wrong = difference(got, self.ordinary, case)
            return wrong or (None if case.name in _WITHOUT else of_kind(got, self.ordinary))
        if case.plain is None:
            return None
        if case.plain is self.subject.ordinary(parameter):
            return difference(got, self.ordinary, case)
        try:
            want = results(self.subject, self.backend, {parameter: case.plain})
        except Exception as error:
            return f"no error, but with an ordinary argument {error!r:.120}"
        return difference(got, want, case)


def unnamed(subject: Subject, error: Exception) -> str | None:
    """Return what is wrong about an error: its type, or that it names no argument."""
    text = f"{type(error).__name__}: {error}"[:160]
    if not isinstance(error, (ValueError, TypeError, RuntimeError)):
        return text
    named = re.match(r"(\w+)[\w.\[\]]*: ", str(error))
    known = {*subject.parameters, "layout", "support", *_CONFIG}
    return None if named and named[1] in known else text


class Results(NamedTuple):
    """The result of a call: tensors in the order of their fields, and gradients by argument."""

    values: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def results(subject: Subject, backend: str, changed: dict[str, object]) -> Results:
    """Call a function and its backward."""
    arguments = {**subject.arguments, **changed}
    leaves = {}
    for name in subject.leaves:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach() if name in changed else value.clone()
            # A tensor of inference mode, for one, takes no gradient.
            with contextlib.suppress(RuntimeError):
                arguments[name] = leaves[name] = value.requires_grad_()
    if "backend" in subject.parameters:
        arguments["backend"] = backend
    found = list(tensors(subject.function(**arguments)))
    summed = [one.sum() for one in found if one.grad_fn is not None and one.is_floating_point()]
    if summed:
        sum(summed).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Results([one.detach() for one in found], gradients)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result, in the order of its fields."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, StepLayout):
        # A copy has what the layout holds, whatever was written to what it once showed.
        for _, held in sorted(copy.deepcopy(value).tensors().items()):
            yield held
    elif isinstance(value, TokenSupport):
        yield from (value.ids, value.offsets)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for held in value.values():
            yield from tensors(held)
    elif isinstance(value, (tuple, list)):
        for held in value:
            yield from tensors(held)


def difference(got: Results, want: Results, case: Case) -> str | None:
    """Return where two results differ; what half precision rounds is let pass."""
    if len(got.values) != len(want.values):
        return f"{len(got.values)} results, expected {len(want.values)}"
    coarse = isinstance(case.made, torch.Tensor) and case.made.element_size() <= 2
    tolerance = 3e-2 if coarse or "autocast" in case.name else 1e-4
    pairs = [
        (f"result {at}", *pair) for at, pair in enumerate(zip(got.values, want.values, strict=True))
    ]
    pairs += [
        (f"gradient of {name}", got.gradients[name], want.gradients[name])
        for name in got.gradients.keys() & want.gradients.keys()
    ]
    for name, *pair in pairs:
        if pair[0].device != pair[1].device:
            return f"{name} is on {pair[0].device}"
        one, two = (tensor.double().flatten() for tensor in pair)
        if one.shape != two.shape:
            return f"{name} has {one.numel()} entries, expected {two.numel()}"
        if not torch.allclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"{name} is {one.tolist()!s:.90}, expected {two.tolist()!s:.90}"
    return None


def of_kind(got: Results, want: Results) -> str | None:
    """Return which gradient is missing, or what has another dtype."""
    if got.gradients.keys() != want.gradients.keys():
        return f"gradients of {sorted(got.gradients)}, expected those of {sorted(want.gradients)}"
    pairs = {
        f"result {at}": pair for at, pair in enumerate(zip(got.values, want.values, strict=True))
    }
    for name, gradient in want.gradients.items():
        pairs[f"gradient of {name}"] = (got.gradients[name], gradient)
    for name, (one, two) in pairs.items():
        if one.dtype != two.dtype:
            return f"{name} is {one.dtype}, expected {two.dtype}"
    return None


if __name__ == "__main__":
    main()
