"""Calls every operator of a backend on small inputs: a program for compute-sanitizer.

``python -m benchmarks.gpu.every_operator --device cuda:0 --backend cuda``

The inputs are made on the CPU and copied. Little runs beside the kernels of the backend, where each
launch takes long. Results are compared with those of the reference on the CPU, in fp64.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk

from ..gates import assert_close

Inputs = dict[str, Tensor]
# A function of inputs and a backend. Its first result is differentiated by inputs that need it.
Function = Callable[[Any, Any], tuple[Tensor, ...]]

# So many tokens that a batch is the work of several blocks; few for the head, which takes them in
# chunks.
_ROWS, _LENGTH, _FEW = 5, 1000, 70
# Rows of logits that 16 bytes do not divide, and rows that they do.
_VOCABULARIES = (67, 4096)
_HIDDEN, _CHUNK = 16, 24
# More tokens than an id has in one part, and so many words that rows of their weight are gathered.
_SOME, _LARGE = 110, 2000
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.02}
_CONFIGS = (
    sk.StepPOConfig(clip_low=0.2, clip_high=0.2),
    sk.StepPOConfig(ratio="token", clip_low=0.2, clip_high=0.2, reduction="token_mean"),
    sk.StepPOConfig(ratio="centered", clip_low=0.2, clip_high=0.2),
)


def run(device: torch.device, backend: str) -> list[str]:
    """Call every operator; return the names of the calls.

    Raises:
        AssertionError: a result is not that of the reference.
    """
    names = []
    for name, inputs, call in _calls():
        got = _results(inputs, call, device, backend, torch.float32)
        wanted = _results(inputs, call, torch.device("cpu"), "reference", torch.float64)
        for k, (one, other) in enumerate(zip(got, wanted, strict=True)):
            if one.is_floating_point():
                allowed = _ALLOWED.get(one.dtype, _ALLOWED[torch.float32])
                assert_close(f"{name}, result {k}", one.cpu(), other, allowed)
            else:
                assert torch.equal(one.cpu(), other), f"{name}, result {k} differs"
        names.append(name)
    return names


def _results(
    inputs: Inputs,
    call: Function,
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return results and gradients of inputs that are moved; fp32 ones take `dtype`."""
    moved: Inputs = {}
    for name, value in inputs.items():
        wide = value.is_floating_point() and (
            value.dtype == torch.float32 or backend == "reference"
        )
        moved[name] = value.to(dtype) if wide else value.clone()
        moved[name] = moved[name].to(device).requires_grad_(value.requires_grad)
    found = call(moved, backend)
    leaves = [value for value in moved.values() if value.requires_grad]
    if not leaves:
        return found
    upstream = torch.linspace(-1.0, 1.0, found[0].numel(), dtype=torch.float64)
    upstream = upstream.view(found[0].shape) if found[0].dim() else torch.ones(())
    grads = torch.autograd.grad(found[0], leaves, upstream.to(device, found[0].dtype))
    return (*(value.detach() for value in found), *grads)


def _calls() -> Iterator[tuple[str, Inputs, Function]]:
    """Yield names, inputs and functions."""
    yield from _layouts()
    yield from _on_steps()
    yield from _policy_losses()
    yield from _on_logits()
    yield from _on_hidden_states()
    yield from _on_kept_sets()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _mask(length: int = _LENGTH) -> Tensor:
    """Return rows of several steps, one of them without any."""
    mask = torch.rand((_ROWS, length), generator=_generator()) < 0.7
    mask[1] = False
    return mask


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _leaf(*shape: int, seed: int = 1) -> Tensor:
    return _normal(*shape, seed=seed).requires_grad_()


def _layouts() -> Iterator[tuple[str, Inputs, Function]]:
    mask, generator = _mask(), _generator()
    borders = torch.rand(mask.shape, generator=generator) < 0.2
    ids = torch.randint(4, mask.shape, generator=generator)

    def of(make: Callable[[Any, Any], sk.StepLayout]) -> Function:
        return lambda x, backend: tuple(make(x, backend).tensors().values())

    yield (
        "from_mask",
        {"mask": mask, "borders": borders},
        of(lambda x, b: sk.StepLayout.from_mask(x["mask"], boundaries=x["borders"], backend=b)),
    )
    numbers = torch.where(mask, torch.arange(_LENGTH) // 9, -1)
    yield (
        "from_step_ids",
        {"ids": numbers},
        of(lambda x, b: sk.StepLayout.from_step_ids(x["ids"], backend=b)),
    )
    rows = torch.arange(_ROWS)
    yield (
        "from_rows",
        {"mask": mask, "valid": rows != 2},
        of(
            lambda x, b: sk.StepLayout.from_rows(
                x["mask"], rows // 2, rows % 2, valid=x["valid"], backend=b
            )
        ),
    )
    yield (
        "from_markers",
        {"ids": ids, "valid": torch.rand(mask.shape, generator=generator) < 0.9},
        of(
            lambda x, b: sk.StepLayout.from_markers(
                x["ids"], [0, 1], 2, valid=x["valid"], backend=b
            )
        ),
    )


def _layout(x: Any, backend: Any) -> sk.StepLayout:
    return sk.StepLayout.from_mask(x["mask"], backend=backend)


def _by_rows(x: Any, backend: Any) -> sk.StepLayout:
    """Return rows as steps, those without a token left out."""
    rows = torch.arange(_ROWS)
    valid = x["mask"].any(1)
    return sk.StepLayout.from_rows(x["mask"], rows // 2, rows, valid=valid, backend=backend)


def _on_steps() -> Iterator[tuple[str, Inputs, Function]]:
    mask = _mask()
    steps, shape = sk.StepLayout.from_mask(mask, backend="reference").num_steps, mask.shape

    def spread(x: Any, backend: Any) -> tuple[Tensor, ...]:
        return (sk.broadcast_to_tokens(x["numbers"], _layout(x, backend), backend=backend),)

    yield "broadcast_to_tokens", {"mask": mask, "numbers": _leaf(steps)}, spread

    def advantages(
        x: Any, backend: Any, *, per_token: bool = False, by_rows: bool = False
    ) -> tuple[Tensor, ...]:
        layout = _by_rows(x, backend) if by_rows else _layout(x, backend)
        layout = layout.per_token() if per_token else layout
        out = sk.step_gae(
            x["rewards"], x["values"], layout, bootstrap_values=x.get("ends"), backend=backend
        )
        return out.advantages, out.returns

    of_tokens = {"mask": mask, "rewards": _normal(*shape), "values": _normal(*shape, seed=2)}
    yield "step_gae of tokens", of_tokens | {"ends": _normal(_ROWS, seed=3)}, advantages
    yield "step_gae per token", of_tokens, lambda x, b: advantages(x, b, per_token=True)
    # Trajectories that are not rows; some steps are in none.
    yield "step_gae by rows", of_tokens, lambda x, b: advantages(x, b, by_rows=True)
    of_steps = {"mask": mask, "rewards": _normal(steps), "values": _normal(steps, seed=2)}
    yield "step_gae of steps", of_steps, advantages

    def value_loss(x: Any, backend: Any) -> tuple[Tensor, ...]:
        return (
            sk.step_value_loss(
                x["values"],
                x["returns"],
                _layout(x, backend),
                old_values=x["old"],
                step_weights=x.get("weights"),
                backend=backend,
            ).loss,
        )

    returns = _normal(steps, seed=5)
    for kind, size in (("tokens", tuple(shape)), ("steps", (steps,))):
        old = _normal(*size) + 0.4 * _normal(*size, seed=4)
        inputs = {"mask": mask, "values": _leaf(*size), "old": old, "returns": returns}
        yield f"step_value_loss of {kind}", inputs, value_loss
        inputs = {
            **inputs,
            "returns": _normal(*shape, seed=6),
            "weights": _normal(steps, seed=7).abs(),
        }
        yield f"step_value_loss of {kind}, returns of tokens, weights", inputs, value_loss


def _policy_losses() -> Iterator[tuple[str, Inputs, Function]]:
    mask = _mask()
    layout = sk.StepLayout.from_mask(mask, backend="reference")
    advantages = _normal(layout.num_steps, seed=6)
    spread = sk.broadcast_to_tokens(advantages, layout, backend="reference")
    old = -_normal(*mask.shape).abs()
    # What is small against the bounds: no rounding decides what is clipped.
    inputs = {
        "mask": mask,
        "log_probs": (old + 0.02 * _normal(*mask.shape, seed=7)).requires_grad_(),
        "old": old,
        "reference": old + 0.1 * _normal(*mask.shape, seed=8),
        "entropy": _normal(*mask.shape, seed=9).abs().requires_grad_(),
    }

    def loss(x: Any, backend: Any, config: sk.StepPOConfig, *, masked: bool) -> tuple[Tensor, ...]:
        found = sk.steppo_loss(
            x["log_probs"],
            x["old"],
            x["advantages"],
            x["mask"] if masked else _layout(x, backend),
            config=config,
            ref_log_probs=x["reference"],
            entropy=x["entropy"],
            backend=backend,
        )
        return (found.loss,)

    for config, masked in itertools.product(_CONFIGS, (False, True)):
        name = f"steppo_loss of a {'mask' if masked else 'layout'}, ratio {config.ratio}"
        yield (
            name,
            inputs | {"advantages": spread if masked else advantages},
            functools.partial(loss, config=config, masked=masked),
        )


def _on_logits() -> Iterator[tuple[str, Inputs, Function]]:
    """Log-probs of a slice, as a causal LM's logits are, in place and not."""

    def log_probs(x: Any, backend: Any, *, in_place: bool) -> tuple[Tensor, ...]:
        found, entropy = sk.token_log_probs(
            x["logits"].clone()[:, :-1],
            x["ids"],
            mask=x["mask"],
            temperature=x["temperature"],
            return_entropy=True,
            inplace_backward=in_place,
            backend=backend,
        )
        return found + entropy, entropy

    rows, length = 2, 6
    for vocabulary, dtype, in_place in itertools.product(_VOCABULARIES, _ALLOWED, (False, True)):
        logits = 2 * _normal(rows, length + 1, vocabulary)
        inputs = {
            "logits": logits.to(dtype).requires_grad_(),
            "ids": torch.randint(vocabulary, (rows, length), generator=_generator()),
            "mask": torch.arange(length) % 3 != 1,
            "temperature": 1.0 + 0.1 * torch.arange(rows * length).view(rows, length),
        }
        inputs["mask"] = inputs["mask"].expand(rows, length).clone()
        name = f"token_log_probs, V {vocabulary}, {dtype}{', in place' if in_place else ''}"
        yield name, inputs, functools.partial(log_probs, in_place=in_place)


def _on_hidden_states() -> Iterator[tuple[str, Inputs, Function]]:
    """The head, some of whose rows have no gradient, in several chunks."""
    mask, vocabulary = _mask(_FEW), _VOCABULARIES[0]
    layout = sk.StepLayout.from_mask(mask, backend="reference")
    advantages = _normal(layout.num_steps, seed=6)
    inputs = {
        "mask": mask,
        "hidden": _leaf(*mask.shape, _HIDDEN),
        "weight": (0.1 * _normal(vocabulary, _HIDDEN, seed=2)).requires_grad_(),
        "ids": torch.randint(vocabulary, mask.shape, generator=_generator()),
        "advantages": advantages,
    }

    def log_probs(x: Any, backend: Any) -> tuple[Tensor, ...]:
        found = sk.linear_token_log_probs(
            x["hidden"],
            x["weight"],
            x["ids"],
            mask=x["mask"],
            chunk_tokens=_CHUNK,
            backend=backend,
        )
        assert isinstance(found, Tensor)
        # Every second token has no gradient.
        return (torch.where(torch.arange(_FEW, device=found.device) % 2 == 0, found, 0.0),)

    def loss(x: Any, backend: Any) -> tuple[Tensor, ...]:
        found = sk.linear_steppo_loss(
            x["hidden"],
            x["weight"],
            x["ids"],
            x["old"],
            x["advantages"],
            _layout(x, backend),
            chunk_tokens=_CHUNK,
            config=_CONFIGS[0],
            backend=backend,
        )
        return (found.loss,)

    with torch.no_grad():
        old = sk.linear_token_log_probs(
            inputs["hidden"], inputs["weight"], inputs["ids"], backend="reference"
        )
    assert isinstance(old, Tensor)
    # Every second step is clipped.
    moved = 0.5 * advantages.sign() * (torch.arange(layout.num_steps) % 2)
    old = old - sk.broadcast_to_tokens(moved, layout, backend="reference")
    yield "linear_token_log_probs", inputs, log_probs
    yield "linear_steppo_loss", inputs | {"old": old}, loss


def _on_kept_sets() -> Iterator[tuple[str, Inputs, Function]]:
    """The head over sets of three ids, one of which is that of more tokens than a part has."""
    mask, vocabulary = _mask(_SOME), _LARGE
    ids = torch.randint(vocabulary, mask.shape, generator=_generator())
    kept = torch.stack((ids, (ids + 9) % vocabulary, torch.full_like(ids, 7)), -1)

    def log_probs(x: Any, backend: Any) -> tuple[Tensor, ...]:
        found, entropy = sk.linear_token_log_probs(
            x["hidden"],
            x["weight"],
            x["ids"],
            bias=x["bias"],
            mask=x["mask"],
            return_entropy=True,
            support=sk.TokenSupport.from_padded(x["kept"]),
            backend=backend,
        )
        return found + entropy, entropy

    # Rows that are made of 16 bytes, and rows that are not.
    for size, dtype in itertools.product((_HIDDEN, _HIDDEN - 1), _ALLOWED):
        leaves = {
            "hidden": _normal(*mask.shape, size),
            "weight": 0.3 * _normal(vocabulary, size, seed=2),
            "bias": _normal(vocabulary, seed=3),
        }
        inputs = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
        name = f"linear_token_log_probs over kept sets, d {size}, {dtype}"
        yield name, inputs | {"mask": mask, "ids": ids, "kept": kept}, log_probs


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args(arguments)
    names = run(torch.device(options.device), options.backend)
    print(f"{len(names)} calls agree with the reference")


if __name__ == "__main__":
    main()
