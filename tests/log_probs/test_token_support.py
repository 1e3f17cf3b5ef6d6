"""TokenSupport: four ways to build one, what it refuses, and that nothing changes it."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from kept_cases import KINDS, mask_of, support_of

from steppo_kernels import TokenSupport
from steppo_kernels.log_probs.kept_sets import PART

_IDS, _OFFSETS = torch.tensor([5, 1, 5, 7, 2]), torch.tensor([0, 3, 3, 5])


def sets_of(support):
    """The sets as lists, token by token."""
    ends = support.offsets.tolist()
    return [support.ids.tolist()[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_sets(kind):
    mask = mask_of(kind, 6, 11).view(2, 3, 11)
    wanted = [row.nonzero().squeeze(1).tolist() for row in mask.view(6, 11)]
    longest = max(map(len, wanted)) + 2
    padded = torch.full((2, 3, longest), -7)
    for at, row in enumerate(wanted):
        # Padding is anywhere in a set.
        padded.view(6, -1)[at, 1 : 1 + len(row)] = torch.tensor(row[::-1], dtype=torch.int64)
    is_sampled = mask.any(-1)
    ways = [
        TokenSupport.from_mask(mask),
        TokenSupport.from_mask(mask.float()),
        TokenSupport.from_padded(padded, pad=-7),
        TokenSupport.from_padded(padded.int(), pad=-7),
        support_of(mask.view(6, 11), shape=(2, 3)),
        TokenSupport.from_lists([row for row in wanted if row], is_sampled),
        TokenSupport.from_lists(wanted, torch.ones(2, 3)),
    ]
    for made in ways:
        assert sets_of(made) == wanted
        assert made.shape == (2, 3)
        assert made.ids.dtype == torch.int32
        assert made.offsets.dtype == torch.int64
        assert made.counts.tolist() == mask.sum(-1).tolist()
        assert made.num_pairs == int(mask.sum())
        assert len(made) == 2


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TokenSupport(), TypeError, "TokenSupport: got a call"),
        (lambda: TokenSupport.from_csr([1], _OFFSETS), TypeError, "ids: got list"),
        (lambda: TokenSupport.from_csr(_IDS.float(), _OFFSETS), TypeError, "ids: got torch.float"),
        (lambda: TokenSupport.from_csr(_IDS[None], _OFFSETS), ValueError, "ids: got shape"),
        (lambda: TokenSupport.from_csr(_IDS, _OFFSETS[:-1]), ValueError, "offsets: got 0 to 3"),
        (lambda: TokenSupport.from_csr(_IDS, _OFFSETS[1:]), ValueError, "offsets: got 3 to 5"),
        (lambda: TokenSupport.from_csr(_IDS, _OFFSETS[:0]), ValueError, "offsets: got none"),
        (
            lambda: TokenSupport.from_csr(_IDS, torch.tensor([0, 4, 3, 5])),
            ValueError,
            "offsets: got numbers that descend",
        ),
        (lambda: TokenSupport.from_csr(-_IDS, _OFFSETS), ValueError, "ids: got the id -7"),
        (lambda: TokenSupport.from_csr(_IDS + 2**31, _OFFSETS), ValueError, "ids: got the id"),
        (lambda: TokenSupport.from_csr(_IDS, _OFFSETS, shape=(2,)), ValueError, "shape: got"),
        (lambda: TokenSupport.from_csr(_IDS, _OFFSETS, missing="nan"), ValueError, "missing: got"),
        (lambda: TokenSupport.from_padded(_IDS), ValueError, "ids: got shape"),
        (lambda: TokenSupport.from_padded(_IDS[None], pad=1.0), TypeError, "pad: got float"),
        (lambda: TokenSupport.from_padded(_IDS[None] - 9), ValueError, "ids: got the id -8"),
        (lambda: TokenSupport.from_mask(torch.tensor([[2]])), ValueError, "mask: got the value 2"),
        (lambda: TokenSupport.from_mask(torch.tensor([True])), ValueError, "mask: got shape"),
        (lambda: TokenSupport.from_lists([[1]], torch.ones(2)), ValueError, "sets: got 1 sets"),
        (lambda: TokenSupport.from_padded(_IDS[None], pad=10**30), ValueError, "pad: got 1000"),
        (lambda: TokenSupport.from_csr(_IDS, _OFFSETS, shape=3), TypeError, "shape: got int"),
        (lambda: TokenSupport.from_lists([[0.5]], torch.ones(1)), TypeError, "sets: got float in"),
        (lambda: TokenSupport.from_lists([[True]], torch.ones(1)), TypeError, "sets: got bool in"),
        (
            lambda: TokenSupport.from_lists([[1], None], torch.ones(2)),
            TypeError,
            "sets: got NoneType as the set of token 1",
        ),
        (lambda: TokenSupport.from_lists([1], torch.ones(1)), TypeError, "sets: got int as"),
        (lambda: TokenSupport.from_lists([[2**70]], torch.ones(1)), ValueError, "sets: got the id"),
        (lambda: TokenSupport.from_lists("ab", torch.ones(2)), TypeError, "sets: got str"),
        (lambda: TokenSupport.from_lists([[-1]], torch.ones(1)), ValueError, "sets: got the id -1"),
    ],
)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make()


def test_it_shares_no_memory_and_does_not_change():
    ids, offsets = _IDS.int(), _OFFSETS.clone()
    support = TokenSupport.from_csr(ids, offsets)
    wanted = sets_of(support)
    ids.zero_()
    offsets.zero_()
    for name in ("ids", "offsets", "counts"):
        getattr(support, name).zero_()
        with pytest.raises(FrozenInstanceError):
            setattr(support, name, 1)
        with pytest.raises(FrozenInstanceError):
            delattr(support, name)
    assert sets_of(support) == wanted == [[1, 5], [], [2, 7]]


@pytest.mark.parametrize("device", [None, 1.0, torch.float32, torch.ones(1)])
def test_no_device(device):
    with pytest.raises(TypeError, match=r"^device: got "):
        TokenSupport.from_csr(_IDS, _OFFSETS).to(device)


def test_a_device_without_memory():
    with pytest.raises(ValueError, match=r"^device: got meta, "):
        TokenSupport.from_csr(_IDS, _OFFSETS).to("meta")


def test_sets_of_an_empty_vocabulary():
    support = TokenSupport.from_mask(torch.empty((2, 3, 0), dtype=torch.bool))
    assert support.shape == (2, 3)
    assert support.num_pairs == 0


def test_other_sets_have_another_digest():
    """Those of as many ids, of the same ids in other tokens, and in another order of tokens."""
    several = [
        [[0, 1], [2]],
        [[0, 2], [1]],
        [[0], [1, 2]],
        [[1, 2], [0]],
        [[0, 3], [2]],
        [[0], [2]],
    ]
    digests = [
        TokenSupport.from_lists(sets, torch.ones(2))._held.digest
        for sets in (*several, [[2, 0], [2, 0]], [[2], []])
    ]
    assert len(set(digests)) == len(digests)
    again = TokenSupport.from_lists([[1, 0], [2, 2]], torch.ones(2))
    assert again._held.digest == digests[0]


def test_copies_and_files():
    support = TokenSupport.from_csr(_IDS, _OFFSETS, shape=(1, 3), missing="full")
    assert copy.copy(support) is copy.deepcopy(support) is support
    file = io.BytesIO()
    torch.save(support, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for again in (copy.copy(support), copy.deepcopy(support), loaded):
        assert repr(again) == repr(support)
        assert sets_of(again) == sets_of(support)
    state = support.__getstate__()
    state["ids"] = -state["ids"]
    with pytest.raises(ValueError, match=r"^ids: got the id -7"):
        pickle.loads(pickle.dumps(support)).__setstate__(state)


def test_inference_mode_and_a_default_device():
    """What is made once outlives the modes in which it was made."""
    with torch.inference_mode():
        support = TokenSupport.from_csr(_IDS, _OFFSETS)
        _ = support._held.by_id, support._held._keys
    tensors = [*support._held.sets, *support._held.by_id, support._held._keys]
    assert not any(tensor.is_inference() for tensor in tensors)
    with torch.device("meta"):
        support = TokenSupport.from_csr(_IDS, _OFFSETS)
        assert {tensor.device.type for tensor in support._held.by_id} == {"cpu"}


def test_slices_are_those_of_the_tokens():
    mask = mask_of("some empty", 12, 7).view(3, 4, 7)
    support = TokenSupport.from_mask(mask)
    for index in (
        (slice(None), slice(1, None)),
        1,
        (2, 3),
        ([2, 0, 2],),
        torch.tensor([True, False, True]),
        (slice(None), -1),
        (slice(0, 0),),
        ...,
        None,
    ):
        part = support[index]
        assert part.shape == mask[index].shape[:-1]
        assert sets_of(part) == sets_of(TokenSupport.from_mask(mask[index][None]))
    with pytest.raises(IndexError):
        _ = support[3]


def test_an_object_that_no_constructor_made_is_refused():
    with pytest.raises(TypeError, match="no constructor made"):
        _ = object.__new__(TokenSupport).ids


@pytest.mark.parametrize("tokens", [1, PART, PART + 1, 2 * PART, 2 * PART + 1])
@pytest.mark.parametrize("kind", ["full", "everywhere", "random", "empty"])
def test_the_index_has_every_pair_once_in_the_order_of_ids(kind, tokens):
    held = TokenSupport.from_mask(mask_of(kind, tokens, 9))._held
    index, ids, every = held.by_id, held.sets.ids, held.tokens
    pairs = index.pairs
    assert sorted(pairs.tolist()) == list(range(held.num_pairs))
    assert index.tokens.tolist() == every[pairs].tolist()
    order = list(zip(ids[pairs].tolist(), index.tokens.tolist(), strict=True))
    assert order == sorted(order)
    assert index.ids.tolist() == sorted(set(ids.tolist()))
    borders = index.parts.tolist()
    assert borders[0] == 0
    assert borders[-1] == held.num_pairs
    slots, parts_of = [], {}
    for part, (first, last) in enumerate(itertools.pairwise(borders)):
        owner = int(index.part_ids[part])
        assert 0 < last - first <= PART
        assert set(ids[pairs[first:last]].tolist()) == {int(index.ids[owner])}
        parts_of.setdefault(owner, []).append(int(index.part_slots[part]))
    long = [owner for owner, of_id in parts_of.items() if len(of_id) > 1]
    assert index.long_ids.tolist() == long
    for owner, of_id in parts_of.items():
        if owner not in long:
            assert of_id == [-1]
        else:
            place = long.index(owner)
            first, last = index.long_slots[place : place + 2].tolist()
            assert of_id == list(range(first, last))
            slots += of_id
    assert slots == list(range(index.num_slots))


def test_places_and_ranges():
    support = TokenSupport.from_csr(_IDS, _OFFSETS)
    held = support._held
    rows = torch.arange(3)
    assert held.places(torch.tensor([5, 5, 2]), rows).tolist() == [1, -1, 0]
    assert held.places(torch.tensor([2, 1, 7]), rows).tolist() == [-1, -1, 1]
    # Ids that are none, next to which other tokens have theirs.
    for bad in (-1, 2**31, 2**31 + 1, 2**40, -(2**31) + 1):
        assert held.places(torch.tensor([bad, bad, bad]), rows).tolist() == [-1, -1, -1]
    part = held.within(2, 4)
    assert part.sets.ids.tolist() == [3, 0]
    assert part.sets.offsets.tolist() == [0, 1, 1, 2]
    assert held.within(2, 4) is part
    assert held.within(0, 8) is held
