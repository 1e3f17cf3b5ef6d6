"""The CUDA kernels of the head over kept sets, on the host: packs, long sets and long ids."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels.backends.compiled import kept_head, kept_head_gradients
from steppo_kernels.log_probs.kept_sets import PART, KeptSets

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Rows of less than a pack, of one, of packs that lanes have none of, of all lanes, of several
# slices, and of more than a lane loads at once.
SIZES = [0, 3, 8, 40, 256, 264, 1032, 2056]
# Rounding, relative to the sum of the sizes of what is added up.
_ERRORS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.half: 1e-3, torch.bfloat16: 8e-3}


def wide_of(dtype):
    return torch.promote_types(dtype, torch.float32)


def sets_of(lengths, vocabulary, seed=0):
    """Return sets of so many ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randperm(vocabulary, generator=generator)[:length].sort().values for length in lengths
    ]
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    return KeptSets(torch.cat(ids).int(), offsets, vocabulary - 1, has_empty=0 in lengths)


def placed(values, offset, apart=0):
    """Return rows that begin `offset` numbers after an aligned address, `apart` from each other."""
    rows, size = values.shape
    memory = values.new_full((offset + rows * (size + apart),), torch.nan)
    found = memory[offset:].view(rows, size + apart)[:, :size]
    found.copy_(values)
    return found


class Head:
    """What the operators read; some pairs have no gradient."""

    def __init__(self, sets, vocabulary, dtype, size, offset=0, apart=0):
        generator = torch.Generator().manual_seed(size + vocabulary)
        draw = {"generator": generator, "dtype": torch.float64}
        self.held, self.dtype = sets, dtype
        tokens = sets.num_tokens
        self.hidden = placed(torch.randn((tokens, size), **draw).to(dtype), offset)
        self.weight = placed(torch.randn((vocabulary, size), **draw).to(dtype), offset, apart)
        self.bias = torch.randn(vocabulary, **draw).to(dtype)
        self.grad = torch.randn(sets.num_pairs, **draw).to(wide_of(dtype))
        self.grad[::3] = 0.0
        self.rows = torch.randperm(tokens, generator=generator)[: -(-3 * tokens // 4)]
        self.pairs = sets.tokens, sets.sets.ids.long()

    def logits(self, cuda):
        found = torch.full((self.held.num_pairs,), torch.nan, dtype=wide_of(self.dtype))
        given = self.hidden, self.weight, self.bias, self.rows, self.held.sets, ()
        kept_head.kept_logits(cuda, found, *given)
        return found

    def hidden_gradient(self, cuda, out):
        given = self.grad, self.weight, self.rows, self.held.sets
        kept_head_gradients.kept_hidden_gradient(cuda, out, *given)
        return out

    def weight_gradient(self, cuda, out, of_bias=None, compact=False):
        given = self.grad, self.hidden, self.held.by_id, compact
        kept_head_gradients.kept_weight_gradient(cuda, out, of_bias, *given)
        return out

    def check_logits(self, found):
        tokens, ids = self.pairs
        terms = self.hidden.double()[tokens], self.weight.double()[ids]
        bias = self.bias.double()[ids]
        exact = (terms[0] * terms[1]).sum(1) + bias
        sizes = (terms[0] * terms[1]).abs().sum(1) + bias.abs()
        mine = torch.isin(tokens, self.rows)
        error = ((found.double() - exact).abs() / sizes)[mine]
        assert error.numel() == 0 or error.max() <= _ERRORS[found.dtype]

    def check_hidden_gradient(self, found):
        tokens, ids = self.pairs
        terms = self.grad.double()[:, None] * self.weight.double()[ids]
        self._check(found[self.rows], summed(terms, tokens, len(found))[:, self.rows])
        others = torch.ones(len(found), dtype=torch.bool)
        others[self.rows] = False
        assert (found[others] == 9).all()

    def check_weight_gradient(self, found, compact=False):
        tokens, ids = self.pairs
        terms = self.grad.double()[:, None] * self.hidden.double().nan_to_num()[tokens]
        exact = summed(terms, ids, len(self.weight))
        kept = self.held.by_id.ids.long()
        if compact:
            self._check(found, exact[:, kept])
            return
        self._check(found[kept], exact[:, kept])
        others = torch.ones(len(found), dtype=torch.bool)
        others[kept] = False
        assert not found[others].any()

    def _check(self, found, exact_and_sizes):
        exact, sizes = exact_and_sizes
        assert ((found.double() - exact).abs() <= _ERRORS[found.dtype] * sizes).all()


def summed(terms, rows, count):
    """Return the sums of terms that belong to a row, and those of their sizes."""
    zeros = torch.zeros((2, count, terms.shape[1]), dtype=torch.float64)
    return zeros.index_add_(1, rows, torch.stack((terms, terms.abs())))


def nines(rows, size, dtype, offset=0):
    return placed(torch.full((rows, size), 9.0, dtype=dtype), offset)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_begin_anywhere(cuda, dtype, size):
    """Packs or numbers: sums of rows are the same to the last bit."""
    sets = sets_of([3, 0, 9, 40, 1, 12], 50)
    gradients = []
    for offset, apart in ((0, 0), (0, 8), (1, 0), (0, 1), (8, 3)):
        head = Head(sets, 50, dtype, size, offset, apart)
        head.check_logits(head.logits(cuda))
        for out_dtype in {dtype, wide_of(dtype)}:
            for to in (0, 1):
                out = nines(6, size, out_dtype, to)
                head.check_hidden_gradient(head.hidden_gradient(cuda, out))
                gradients.append((out_dtype, out))
                of_weight = nines(50, size, dtype, to)
                head.check_weight_gradient(head.weight_gradient(cuda, of_weight))
                gradients.append(("weight", of_weight))
    first = dict(reversed(gradients))
    assert all(torch.equal(found, first[kind]) for kind, found in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_share_sets_of_any_length(cuda, dtype):
    """There are more tokens than a block finds at once, and sets that are longer than its share."""
    lengths = [n % 4 for n in range(600)]
    lengths[7], lengths[256], lengths[599] = 900, 700, 300
    head = Head(sets_of(lengths, 1000), 1000, dtype, 24)
    found = head.logits(cuda)
    head.check_logits(found)
    head.check_hidden_gradient(head.hidden_gradient(cuda, nines(600, 24, dtype)))
    head.check_weight_gradient(head.weight_gradient(cuda, nines(1000, 24, dtype)))
    # Which block takes a pair does not matter: alone, a set has the same logits.
    tokens = torch.tensor([256, 7])
    alone = Head(sets_of(lengths, 1000), 1000, dtype, 24)
    alone.rows = tokens
    mine = torch.isin(alone.pairs[0], tokens) & torch.isin(alone.pairs[0], head.rows)
    assert torch.equal(alone.logits(cuda)[mine], found[mine])


@pytest.mark.parametrize("size", [1, 40, 520])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_of_many_tokens(cuda, dtype, size):
    """Short parts lie between those of long ids, and a part or an id may have no gradient."""
    tokens = 3 * PART + 5
    mask = torch.zeros((tokens, 9), dtype=torch.bool)
    mask[:, 2] = mask[:, 3] = mask[: PART + 1, 6] = True
    mask[7, [0, 1, 4, 5, 7]] = True
    mask[40:90, 8] = True
    ids = mask.nonzero()
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    held = KeptSets(ids[:, 1].int(), offsets, 8, has_empty=False)
    head = Head(held, 9, dtype, size)
    of_id = ids[:, 1]
    head.grad[(of_id == 3) & (ids[:, 0] >= PART) & (ids[:, 0] < 2 * PART)] = 0
    head.grad[(of_id == 4) | (of_id == 8)] = 0
    # A token without a gradient is not read.
    head.grad[ids[:, 0] == 11] = 0
    head.hidden[11] = torch.nan
    assert held.by_id.num_slots == 4 + 4 + 2
    for compact in (False, True):
        found = nines(9, size, dtype)
        of_bias = torch.full((9,), 9.0, dtype=wide_of(dtype))
        head.weight_gradient(cuda, found, of_bias, compact)
        head.check_weight_gradient(found, compact)
        exact = torch.zeros(9, dtype=torch.float64).index_add_(0, of_id, head.grad.double())
        torch.testing.assert_close(of_bias.double(), exact, rtol=1e-5, atol=1e-5)
        assert not found[[4, 8]].any()
        bare = head.weight_gradient(cuda, nines(9, size, dtype), None, compact)
        assert torch.equal(bare, found)
        cuda.kernels.order(7, 2)
        assert torch.equal(head.weight_gradient(cuda, nines(9, size, dtype), None, compact), found)


# Rows that a block of fewer threads takes, of more, and of more loads of a thread.
WIDTHS = {torch.float32: [36, 600, 1100, 3000], torch.float64: [36, 300, 600, 1500]}
WIDTHS |= {dtype: [36, 1200, 2200, 6000] for dtype in (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_set_is_joined_of_its_parts(cuda, monkeypatch, dtype, place):
    """The gradient of a log-prob is the same, wherever in the set its own id is."""
    size, lengths = WIDTHS[dtype][place], [1, 3, 4, 30, 2, 0, 33, 3]
    sets = sets_of(lengths, 40)
    for offset in (0, 1):
        head = Head(sets, 40, dtype, size, offset)
        # Logits of about 1, as those of models are: their errors are small then.
        head.hidden *= size**-0.5
        rows = torch.tensor([6, 0, 1, 3, 4, 7])
        places = torch.tensor([32, 0, 2, 13, -1, 1])
        found = {}
        for part in (512, 3):
            monkeypatch.setattr(kept_head, "_PART", part)
            logits = torch.full((sets.num_pairs,), torch.nan, dtype=wide_of(dtype))
            directions = torch.full((len(rows), size), torch.nan, dtype=wide_of(dtype))
            given = head.hidden, head.weight, head.bias, places, rows, sets.sets, None, 0.7, 0.0
            kept_head.kept_directions(cuda, logits, directions, *given)
            again = torch.full_like(directions, torch.nan)
            cuda.kernels.order(11, 2, 3)
            kept_head.kept_directions(cuda, logits.clone(), again, *given)
            assert torch.equal(again, directions)
            found[part] = logits, directions
        head.rows = rows
        head.check_logits(found[3][0])
        of_rows = torch.isin(sets.tokens, rows)
        assert torch.equal(found[3][0][of_rows], found[512][0][of_rows])
        exact = directions_of(head, rows, places, 0.7)
        scale = head.weight.double().abs().amax() / 0.7
        for _, directions in found.values():
            assert ((directions.double() - exact).abs() <= _ERRORS[wide_of(dtype)] * scale).all()


def directions_of(head, rows, places, temperature):
    """Return the gradients of log-probs by hidden states: minus those of p where there is no id."""
    found = []
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        begin, end = head.held.sets.offsets[row : row + 2].tolist()
        kept = head.weight.double()[head.held.sets.ids[begin:end].long()]
        bias = head.bias.double()[head.held.sets.ids[begin:end].long()]
        p = ((kept @ head.hidden.double()[row] + bias) / temperature).softmax(0)
        own = torch.zeros_like(p)
        if place >= 0:
            own[place] = 1.0
        found.append((own - p) @ kept / temperature)
    return torch.stack(found)


def test_an_infinite_gradient_reaches_its_own_rows_alone(cuda):
    """Terms that are loaded together with it belong to others."""
    head = Head(sets_of([5, 4, 6], 8), 8, torch.float32, 16)
    head.rows = torch.arange(3)
    head.grad[5] = torch.inf
    head.grad[11] = torch.nan
    of_hidden = head.hidden_gradient(cuda, nines(3, 16, torch.float32))
    bad = ~of_hidden.isfinite().all(1)
    assert bad.tolist() == [False, True, True]
    of_weight = head.weight_gradient(cuda, nines(8, 16, torch.float32))
    bad = ~of_weight.isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == sorted({int(head.pairs[1][p]) for p in (5, 11)})


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_kept(cuda, dtype, lengths):
    ids = torch.empty(0, dtype=torch.int32)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    head = Head(KeptSets(ids, offsets, -1, has_empty=bool(lengths)), 4, dtype, 16)
    head.rows = torch.arange(len(lengths))
    assert head.logits(cuda).numel() == 0
    assert not head.hidden_gradient(cuda, nines(len(lengths), 16, dtype)).any()
    assert not head.weight_gradient(cuda, nines(4, 16, dtype)).any()
    head.rows = head.rows[:0]
    assert (head.hidden_gradient(cuda, nines(len(lengths), 16, dtype)) == 9).all()
