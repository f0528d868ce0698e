import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from metarec_fast.data import Vocabulary
from tests.examples import examples

AWKWARD = ["007", "7", "", " 7", "7 ", "\u00e9", "e\u0301", "🛒", "👩‍👩‍👧", "日本", "a\0", "a", "\ufeffx", "a\tb\n"]


def stored(vocabulary):
    return Vocabulary.from_arrays(load(save(vocabulary.to_arrays())))


@examples(60)
@given(st.lists(st.text(), unique=True))
def test_strings_survive_verbatim(ids):
    vocabulary = stored(Vocabulary(ids))
    assert not vocabulary.is_integer
    assert vocabulary.decode(np.arange(len(ids))) == ids
    assert vocabulary.encode(ids).tolist() == list(range(len(ids)))


def test_awkward_strings_stay_apart():
    vocabulary = stored(Vocabulary(AWKWARD))
    assert list(vocabulary) == AWKWARD
    assert vocabulary.encode(AWKWARD[::-1]).tolist() == list(range(len(AWKWARD)))[::-1]


@examples(60)
@given(st.lists(st.integers(-(2**70), 2**70) | st.integers(-(2**63), 2**64 - 1), unique=True, min_size=1))
def test_integers_are_exact_or_strings(ids):
    vocabulary = stored(Vocabulary(ids))
    fits = (min(ids) >= -(2**63) and max(ids) < 2**63) or (min(ids) >= 0 and max(ids) < 2**64)
    assert vocabulary.is_integer == fits
    expected = ids if fits else [str(value) for value in ids]
    assert list(vocabulary) == expected
    assert vocabulary.encode(expected).tolist() == list(range(len(ids)))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_integer_arrays_of_any_width(dtype):
    ids = np.array([3, 0, np.iinfo(dtype).max, 1], dtype)
    vocabulary = Vocabulary(ids)
    assert list(vocabulary) == ids.tolist()
    assert vocabulary.encode(ids).tolist() == [0, 1, 2, 3]
    assert vocabulary.encode(ids).dtype == np.int64


def test_large_integers_do_not_meet_floats():
    near = [2**53, 2**53 + 1, 2**62 + 1, 2**62]
    assert Vocabulary(near).encode(np.array(near[::-1], np.uint64)).tolist() == [3, 2, 1, 0]
    assert Vocabulary([2**63, 2**63 + 1]).encode([2**63 + 1]).tolist() == [1]
    with pytest.raises(ValueError, match=f"unknown id {2**63}"):
        Vocabulary(near).encode(np.array([2**63], np.uint64))
    with pytest.raises(ValueError, match="unknown id -1"):
        Vocabulary([2**63, 2**64 - 1]).encode(np.array([-1]))


@pytest.mark.parametrize(
    ("ids", "queries", "message"),
    [
        (["a", "b"], ["a", "c", "d"], "unknown id 'c'"),
        (["7"], [7], r"unknown id 7 \(ids here are strings, got int\)"),
        ([7], ["7"], r"unknown id '7' \(ids here are integers, got str\)"),
        ([1], [True], "got bool"),
        ([1], [1.0], "got float"),
        ([1, 5, 9], [5, 6], "unknown id 6"),
        ([1], [2**80], f"unknown id {2**80}"),
        ([], ["a"], "unknown id 'a'"),
        (["a"], [["a"]], "unknown id"),
        (["a"], [None], "unknown id None"),
    ],
)
def test_unknown_ids_are_named(ids, queries, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(ids).encode(queries)
    assert queries[-1] not in Vocabulary(ids)


def test_membership_and_empty_queries():
    assert "a" in Vocabulary(["a"])
    assert 3 in Vocabulary([3])
    for vocabulary in (Vocabulary(), Vocabulary(["a"]), Vocabulary([1])):
        assert vocabulary.encode([]).shape == (0,)
        assert vocabulary.decode([]) == []


def test_equality_tells_integers_from_strings():
    assert Vocabulary([7]) == Vocabulary(np.array([7], np.uint8))
    assert Vocabulary([7]) != Vocabulary(["7"])
    assert Vocabulary(["a", "b"]) != Vocabulary(["b", "a"])


@pytest.mark.parametrize("ids", [["a", "b", "a"], [1, 2, 1], np.array([4, 4])])
def test_repeated_ids_are_refused(ids):
    with pytest.raises(ValueError, match="distinct"):
        Vocabulary(ids)


@pytest.mark.parametrize("ids", [["a", 1], [1.0], [True], [None], "abc", b"abc"])
def test_other_kinds_are_refused(ids):
    with pytest.raises(TypeError, match="ids must be"):
        Vocabulary(ids)


def test_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogate"):
        Vocabulary(["\ud83d"])


@pytest.mark.parametrize("index", [-1, 2, 2**40])
def test_decode_outside(index):
    for vocabulary in (Vocabulary(["a", "b"]), Vocabulary([1, 2])):
        with pytest.raises(IndexError, match=str(index)):
            vocabulary.decode([0, index])
    with pytest.raises(TypeError, match="integers"):
        Vocabulary(["a"]).decode([0.0])


def test_decoded_integers_are_plain():
    assert json.dumps(Vocabulary([3, 4]).decode([1])) == "[4]"


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"utf8": np.zeros(2, np.uint8)},
        {"integers": np.zeros(2, np.float64)},
        {"integers": np.zeros((2, 1), np.int64)},
        {"utf8": np.array([97, 98], np.uint8), "offsets": np.array([0, 1])},
        {"utf8": np.array([97, 98], np.uint8), "offsets": np.array([0, 3, 2])},
        {"utf8": np.array([97, 98], np.uint8), "offsets": np.array([1, 2])},
        {"utf8": np.array([97, 98], np.uint8), "offsets": np.array([0.0, 2.0])},
        {"utf8": np.array([97, 98], np.uint8), "offsets": np.array([], np.int64)},
        {"utf8": np.array([0xC3], np.uint8), "offsets": np.array([0, 1])},
        {"utf8": np.array([97, 97], np.uint8), "offsets": np.array([0, 1, 2])},
    ],
)
def test_damaged_arrays_are_refused(arrays):
    with pytest.raises(ValueError):
        Vocabulary.from_arrays(arrays)


@examples(60)
@given(st.lists(st.text(), unique=True))
def test_packed_strings_are_the_strings(ids):
    arrays = {key: value.copy() for key, value in Vocabulary(ids).to_arrays().items()}
    for value in arrays.values():
        value.flags.writeable = False
    packed = Vocabulary.from_arrays(arrays, distinct=True)
    assert len(packed) == len(ids) and list(packed) == ids and packed == Vocabulary(ids)
    assert packed.decode(np.arange(len(ids))[::-1]) == ids[::-1]
    assert packed.encode(ids).tolist() == list(range(len(ids)))
    assert all(value in packed for value in ids) and "\0absent" not in packed
    stored_again = packed.to_arrays()
    assert all(np.array_equal(stored_again[key], arrays[key]) for key in arrays)


@pytest.mark.parametrize(
    "arrays",
    [
        {"utf8": np.array([97, 97], np.uint8), "offsets": np.array([0, 1, 2])},
        {"integers": np.array([5, 3, 5])},
    ],
)
def test_promised_distinct_ids_are_checked_by_the_first_look_up(arrays):
    vocabulary = Vocabulary.from_arrays(arrays, distinct=True)
    with pytest.raises(ValueError, match="distinct"):
        vocabulary.encode(vocabulary.decode([0]))
