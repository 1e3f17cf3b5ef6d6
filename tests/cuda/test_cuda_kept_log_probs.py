"""The CUDA kernels of log-probs over kept sets, on the host: sets of any length, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from steppo_kernels.backends.compiled import kept_log_probs as launcher
from steppo_kernels.backends.records import Sets

# A lane takes none, one or several ids of a set, which it loads four at a time.
LENGTHS = [0, 1, 31, 32, 33, 127, 128, 129, 1000, 2, 0, 5]
DTYPES = [torch.float32, torch.float64]
_ERRORS = {torch.float32: 4e-6, torch.float64: 1e-13}


class Case:
    """Tokens in another order than that of their sets; where their ids are, and what is asked."""

    def __init__(self, dtype, lengths, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        offsets = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        self.sets = Sets(torch.empty(int(offsets[-1]), dtype=torch.int32), offsets)
        draw = {"generator": generator, "dtype": torch.float64}
        self.logits = (4 * torch.randn(int(offsets[-1]), **draw)).to(dtype)
        self.rows = torch.randperm(len(lengths), generator=generator)
        counts = self.lengths[self.rows]
        self.places = (torch.rand(len(lengths), **draw) * counts).long()
        self.places[counts == 0] = -1
        self.places[::4] = -1
        self.places[1:2] = (counts[1:2] - 1).clamp(max=0)
        self.places[2:3] = counts[2:3] - 1
        self.temperatures = torch.linspace(0.5, 2.0, len(lengths), dtype=torch.float64)
        self.grads = torch.randn((2, len(lengths)), **draw).to(dtype)
        self.grads[:, 3:4] = 0.0

    def forward(self, cuda, temperatures, temperature=1.0, softcap=0.0, need_entropy=True):
        given = self.places, self.rows, self.sets, temperatures, temperature, softcap
        return launcher.kept_log_probs(cuda, self.logits, *given, need_entropy)

    def backward(self, cuda, out, sums, grads, temperatures, temperature=1.0, softcap=0.0):
        given = self.places, self.rows, self.sets, temperatures, temperature, softcap
        entropy, top, log_sum = sums
        of_entropy = None if grads[1] is None else entropy
        launcher.kept_log_probs_backward(
            cuda, out, self.logits, *given, top, log_sum, of_entropy, *grads
        )
        return out

    def exact(self, temperatures, temperature=1.0, softcap=0.0):
        """Return log-probs, entropies and log-sums with a graph, and the logits of the pairs."""
        x = self.logits.double().clone().requires_grad_()
        z = softcap * torch.tanh(x / softcap) if softcap else x
        found = []
        for i, row in enumerate(self.rows.tolist()):
            t = temperature if temperatures is None else float(temperatures[i])
            mine = z[int(self.sets.offsets[row]) : int(self.sets.offsets[row + 1])] / t
            lse = mine.logsumexp(0)
            log_p = mine - lse
            place = int(self.places[i])
            zero = x.new_zeros(())
            own = log_p[place] if place >= 0 else zero
            rest = -lse if len(mine) else zero
            entropy = torch.where(log_p.isneginf(), 0, -log_p.exp() * log_p).sum()
            # Without its id, the gradient of a log-prob is that of the others.
            found.append((own, entropy, own if place >= 0 else rest))
        return x, *(torch.stack(column) for column in zip(*found, strict=True))


def close(found, expected):
    error = _ERRORS[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error, equal_nan=True)


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sets_of_any_length(cuda, dtype, softcap):
    case = Case(dtype, LENGTHS)
    for given in ((case.temperatures, 1.0, softcap), (None, 0.7, softcap)):
        found = case.forward(cuda, *given)
        x, log_probs, entropy, of_gradient = case.exact(*given)
        close(found[0], log_probs.detach())
        close(found[1], entropy.detach())
        counts = case.lengths[case.rows]
        assert found[2][counts == 0].isneginf().all()
        assert found[3][counts == 0].isneginf().all()
        bare = case.forward(cuda, *given, need_entropy=False)
        assert torch.equal(bare[0], found[0])
        assert bare[1].numel() == 0
        for grads in ((case.grads[0], None), (case.grads[0], case.grads[1])):
            total = (of_gradient * grads[0].double()).sum()
            if grads[1] is not None:
                total = total + (entropy * grads[1].double()).sum()
            (expected,) = torch.autograd.grad(total, x, retain_graph=True)
            apart = torch.full_like(case.logits, torch.nan)
            case.backward(cuda, apart, found[1:], grads, *given)
            close(apart, expected)
            before = case.logits.clone()
            case.backward(cuda, case.logits, found[1:], grads, *given)
            assert torch.equal(case.logits, apart)
            case.logits = before
            cuda.kernels.order(7, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_tokens_are_left_as_they_are(cuda, dtype):
    """Tokens without a gradient get 0, and their logits are not read; more tokens than a block."""
    case = Case(dtype, [n % 7 for n in range(60)])
    sums = case.forward(cuda, None)[1:]
    whole = torch.full_like(case.logits, 9.0)
    case.backward(cuda, whole, sums, tuple(case.grads), None)
    of_rows = [case.sets.offsets[[row, row + 1]].tolist() for row in case.rows.tolist()]
    case.grads[:, 10:30] = 0.0
    for begin, end in of_rows[10:30]:
        case.logits[begin:end] = torch.nan
    case.rows, case.places, case.grads = case.rows[:40], case.places[:40], case.grads[:, :40]
    out = torch.full_like(case.logits, 9.0)
    case.backward(cuda, out, tuple(x[:40].contiguous() for x in sums), tuple(case.grads), None)
    for i, (begin, end) in enumerate(of_rows):
        mine = out[begin:end]
        if i < 10 or 30 <= i < 40:
            assert torch.equal(mine, whole[begin:end])
        else:
            assert (mine == (0 if i < 40 else 9)).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-16, 1e-10, 1e10, 1e16, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_temperature(cuda, dtype, temperature):
    case = Case(dtype, [7, 150, 33, 4, 9])
    case.logits[12] = -torch.inf
    found = case.forward(cuda, None, temperature)
    x, log_probs, entropy, of_gradient = case.exact(None, temperature)
    close(found[0], log_probs.detach())
    close(found[1], entropy.detach())
    out = torch.full_like(case.logits, torch.nan)
    case.backward(cuda, out, found[1:], (case.grads[0], None), None, temperature)
    (expected,) = torch.autograd.grad((of_gradient * case.grads[0].double()).sum(), x)
    error = 10 * _ERRORS[dtype]
    torch.testing.assert_close(
        (out.double() * temperature).nan_to_num(),
        (expected * temperature).nan_to_num(),
        rtol=error,
        atol=error,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_confident_token_keeps_its_precision(cuda, dtype):
    case = Case(dtype, [5000])
    case.rows, case.places = torch.tensor([0]), torch.tensor([4321])
    case.logits[:] = 0
    case.logits[4321] = 30
    log_probs, entropy, *_ = case.forward(cuda, None)
    others = 4999 * math.exp(-30)
    error = 1e-5 if dtype == torch.float32 else 1e-12
    assert log_probs.item() == pytest.approx(-math.log1p(others), rel=error)
    assert entropy.item() == pytest.approx(others * 31, rel=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite(cuda, dtype):
    """Words at -inf have no share; a set with NaN or +inf is NaN, and others are themselves."""
    case = Case(dtype, [40, 40, 40, 40])
    case.rows, case.places = torch.arange(4), torch.tensor([3, 3, 3, -1])
    case.temperatures = case.temperatures[:4]
    sets = case.logits.view(4, 40)
    sets[0, ::2] = -torch.inf
    sets[1, 35] = torch.nan
    sets[2, 35] = torch.inf
    sets[3, 1:] = -torch.inf
    log_probs, entropy, top, log_sum = case.forward(cuda, None)
    _, expected, exact_entropy, _ = case.exact(None)
    close(log_probs[[0, 3]], expected.detach()[[0, 3]])
    close(entropy[[0, 3]], exact_entropy.detach()[[0, 3]])
    assert log_probs[1:3].isnan().all()
    assert entropy[1:3].isnan().all()
    assert top[3] == sets[3, 0]
    assert log_sum[3] == 0


def test_no_tokens(cuda):
    case = Case(torch.float32, LENGTHS)
    case.rows, case.places = case.rows[:0], case.places[:0]
    found = case.forward(cuda, None)
    assert [value.numel() for value in found] == [0] * 4
    out = torch.full_like(case.logits, 9.0)
    case.backward(cuda, out, found[1:], tuple(case.grads[:, :0]), None)
    assert (out == 9).all()
