"""n-gram divergences against dictionaries and hand examples; the floor always beside the value."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from stabletrain.metrics import text
from stabletrain.metrics.text import TextReference, count_ngrams, divergence_scalars, jensen_shannon_divergence


def lines(count, length, vocabulary, seed=0):
    """Lines of a Markov chain, so that n-grams repeat."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random((count, length)) < 0.7, 1, generator.integers(0, vocabulary, (count, length)))
    return np.cumsum(steps, axis=1) % vocabulary


def dictionary_divergence(first, second, order):
    """The definition with dictionaries of tuples, and SciPy's distance."""

    def counts(rows):
        return Counter(tuple(row[i : i + order]) for row in rows.tolist() for i in range(len(row) - order + 1))

    p, q = counts(first), counts(second)
    keys = sorted({*p, *q})
    return jensenshannon([p[key] for key in keys], [q[key] for key in keys], base=2) ** 2


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("vocabulary", [7, 3000], ids=["keys of one integer", "keys of two integers"])
def test_against_dictionaries(order, vocabulary):
    first, second = lines(40, 12, vocabulary), lines(25, 12, vocabulary, seed=1)
    found = jensen_shannon_divergence(count_ngrams(first, order, vocabulary), count_ngrams(second, order, vocabulary))
    assert found == pytest.approx(dictionary_divergence(first, second, order), abs=1e-12)


def test_hand_example():
    """p = (1/2, 1/2, 0), q = (0, 1/2, 1/2): the shared half is equal, the other half disjoint: 1/2 bit."""
    first, second = (count_ngrams(np.array([row]), 1, 3) for row in ([0, 1], [1, 2]))
    assert jensen_shannon_divergence(first, second) == pytest.approx(0.5, abs=1e-15)


def test_limits():
    ngrams = count_ngrams(lines(10, 8, 5), 3, 5)
    assert jensen_shannon_divergence(ngrams, ngrams) == 0.0
    other = count_ngrams(np.array([[0, 0, 0]]), 3, 5)
    disjoint = count_ngrams(np.array([[1, 1, 1]]), 3, 5)
    assert jensen_shannon_divergence(other, disjoint) == 1.0


def test_windows_do_not_cross_lines():
    ngrams = count_ngrams(np.array([[0, 1], [2, 3]]), 2, 4)
    assert ngrams.total == 2


def test_counting_in_chunks_changes_nothing(monkeypatch):
    whole = count_ngrams(lines(50, 10, 6), 4, 6)
    monkeypatch.setattr(text, "WINDOWS_AT_ONCE", 20)
    parts = count_ngrams(lines(50, 10, 6), 4, 6)
    np.testing.assert_array_equal(whole.keys, parts.keys)
    np.testing.assert_array_equal(whole.counts, parts.counts)


def test_the_floor_is_that_of_as_many_held_out_lines():
    train, held_out, made = lines(300, 12, 9), lines(70, 12, 9, seed=1), lines(20, 12, 9, seed=2)
    reference = TextReference(train, held_out, 9, orders=(1, 4))
    found = reference.compare(made)
    for order in (1, 4):
        assert found[order].value == pytest.approx(dictionary_divergence(made, train, order), abs=1e-12)
        floor = np.mean([dictionary_divergence(held_out[i * 20 : (i + 1) * 20], train, order) for i in range(3)])
        assert found[order].floor == pytest.approx(floor, abs=1e-12)
        assert found[order].draws == 3
        assert found[order].excess == pytest.approx(found[order].value - found[order].floor)
    scalars = divergence_scalars(found)
    assert set(scalars) == {"jsd1_20", "jsd1_20_floor", "jsd4_20", "jsd4_20_floor"}


def test_real_text_is_at_the_floor_and_few_lines_have_a_high_one():
    """The finite-sample bias that the floor is there for."""
    train, held_out = lines(2000, 12, 9), lines(600, 12, 9, seed=1)
    reference = TextReference(train, held_out, 9, orders=(4,))
    few, many = (reference.compare(lines(count, 12, 9, seed=2))[4] for count in (20, 300))
    assert few.floor > 2 * many.floor
    assert abs(few.excess) < 0.2 * few.floor
    assert abs(many.excess) < 0.2 * many.floor


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="outside a vocabulary of 3"):
        count_ngrams(np.array([[0, 3]]), 1, 3)
    with pytest.raises(ValueError, match="have no 3-grams"):
        count_ngrams(np.array([[0, 1]]), 3, 3)
    with pytest.raises(ValueError, match="more than can be counted"):
        count_ngrams(np.zeros((1, 9), int), 6, 1 << 30)
    with pytest.raises(ValueError, match="do not compare"):
        jensen_shannon_divergence(*(count_ngrams(np.array([[0, 1]]), order, 3) for order in (1, 2)))
    with pytest.raises(ValueError, match="at least as many held-out lines"):
        TextReference(lines(9, 8, 3), lines(4, 8, 3), 3).compare(lines(5, 8, 3))
