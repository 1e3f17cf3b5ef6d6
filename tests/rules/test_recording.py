"""What records operators of torch is refused: it would not see what kernels write."""

from __future__ import annotations

import pytest
import torch
from fuzz.crash_worker import results, tensors
from fuzz.subjects import subjects
from torch.fx.experimental.proxy_tensor import make_fx

from steppo_kernels.backends import choice


def of_one_tensor(subject, backend):
    """Return a subject's call as a function of one tensor, and that tensor."""
    name, *_ = subject.leaves

    def call(value):
        given = {**subject.arguments, "backend": backend, name: value}
        return next(tensors(subject.function(**given)))

    return call, subject.arguments[name]


# Modules are called on the backend that is the fastest.
@pytest.mark.parametrize(
    "subject",
    [one for one in subjects() if one.leaves and "backend" in one.parameters],
    ids=lambda one: one.name,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_recorded_call_raises(kernel, subject):
    subject = subject.on(kernel.device)
    call, value = of_one_tensor(subject, kernel.backend)
    with pytest.raises(RuntimeError, match=r"backend: got .* within torch\.jit\.trace"):
        torch.jit.trace(call, (value,), check_trace=False)
    # Some look at values first, which torch refuses.
    with pytest.raises(RuntimeError, match=r"within torch\.jit\.trace|value out of a tracing"):
        make_fx(call)(value)
    # Nothing is left behind.
    results(subject, kernel.backend, {})


@pytest.mark.parametrize(
    "record",
    [lambda call, x: torch.jit.trace(call, (x,)), lambda call, x: make_fx(call)(x)],
    ids=["torch.jit.trace", "make_fx"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_refused_where_its_backend_is_chosen(record):
    """Before anything is computed: sizes are tensors of the CPU while torch.jit.trace records."""

    def doubled(backend):
        def call(x):
            choice.resolve(backend, x.device)
            return 2 * x

        return call

    x = torch.ones(2)
    assert record(doubled("reference"), x)(x).tolist() == [2, 2]
    for backend in ("cpu", "auto"):
        with pytest.raises(RuntimeError, match=r"^backend: got a call of 'cpu' within torch"):
            record(doubled(backend), x)
