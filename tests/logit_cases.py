"""Random logits, everything that `token_log_probs` gives for them, and plain PyTorch beside it."""

from __future__ import annotations

import torch

from steppo_kernels import token_log_probs

HALVES = [torch.bfloat16, torch.float16]


DTYPES = [torch.float32, *HALVES, torch.float64]


def draw(seed, rows, vocabulary, scale=2.0, shift=0.0, temperature=1.0):
    """Logits in fp64 and tokens of that policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, vocabulary), dtype=torch.float64, generator=generator)
    logits = logits * scale + shift
    policy = (logits / temperature).softmax(-1)
    return logits, torch.multinomial(policy, 1, generator=generator).squeeze(1)


def upstream(*shape, dtype=torch.float64, seed=7):
    """Gradients of log-probs and entropies, of both signs and different in every row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, *shape), dtype=torch.float64, generator=generator).to(dtype)


def plain(logits, ids, temperature=1.0):
    """What a trainer writes, in the dtype of the logits."""
    log_p = torch.log_softmax(logits / temperature, -1)
    log_probs = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def fused(backend, **options):
    def compute(logits, ids, temperature=1.0):
        return token_log_probs(
            logits, ids, temperature=temperature, return_entropy=True, backend=backend, **options
        )

    return compute


def results(compute, logits, ids, *args, grads=None):
    """Return everything that `compute` gives, by name; `grads` are its upstream gradients."""
    logits = logits.detach().clone().requires_grad_()
    values = dict(zip(("log_probs", "entropy"), compute(logits, ids, *args), strict=True))
    grads = upstream(*ids.shape) if grads is None else grads
    found = {name: value.detach() for name, value in values.items()}
    for (name, value), grad in zip(values.items(), grads, strict=True):
        (found[f"grad_of_{name}"],) = torch.autograd.grad(
            value, logits, grad.to(value.device, value.dtype), retain_graph=True
        )
    return found


def on(target, *tensors):
    return [value.to(target.device) for value in tensors]


def assert_same_rows(target, found, expected, name=""):
    """Rows give the same bits wherever they lie.

    The kernels of cuda divide a row at addresses, and so it adds up in another order elsewhere.
    """
    if target.backend != "cuda":
        assert torch.equal(found, expected), name
        return
    eps = 8 * torch.finfo(torch.float32).eps
    rtol = max(eps, torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=eps, msg=lambda m: f"{name}: {m}")
