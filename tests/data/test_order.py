"""The order of examples is a function of (seed, position) alone, and an epoch shows every example once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from stabletrain.data.order import batch_indices


def concatenated(seed: int, count: int, batch_size: int, batches: int) -> np.ndarray:
    """The first `batches` batches, end to end."""
    return np.concatenate([batch_indices(seed, position, count, batch_size) for position in range(batches)])


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (10, 3), (7, 7), (5, 13), (1, 4), (3, 1)])
def test_every_index_appears_once_in_each_epoch(count: int, batch_size: int) -> None:
    """Whether the batch size divides the count, is larger than it, or is one."""
    epochs = 4
    order = concatenated(0, count, batch_size, -(-epochs * count // batch_size))[: epochs * count]
    for epoch in order.reshape(epochs, count):
        assert sorted(epoch) == list(range(count))


def test_epochs_and_seeds_have_different_orders() -> None:
    """Shuffled anew each epoch, and by each seed."""
    first, second = concatenated(0, 50, 50, 2).reshape(2, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_indices(1, 0, 50, 50))
    assert not np.array_equal(second, batch_indices(1, 0, 50, 50))  # (0, epoch 1) is not (1, epoch 0)


def test_a_batch_does_not_depend_on_which_were_asked_for_before() -> None:
    """Also not through what is remembered of other epochs, seeds and sizes."""
    forwards = [batch_indices(3, position, 11, 4) for position in range(60)]
    for position in np.random.default_rng(0).permutation(60):
        batch_indices(4, int(position), 13, 5)
        np.testing.assert_array_equal(batch_indices(3, int(position), 11, 4), forwards[position])


def test_a_returned_batch_can_be_written_to_without_changing_the_order() -> None:
    """A caller who changes its batch does not change the next one's."""
    batch = batch_indices(0, 0, 8, 8)
    expected = batch.copy()
    batch[:] = -1
    np.testing.assert_array_equal(batch_indices(0, 0, 8, 8), expected)


def test_the_order_is_the_same_in_another_process_and_as_recorded() -> None:
    """A recorded order: runs must be resumable with another version of this program, of NumPy, on another machine."""
    recorded = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert batch_indices(0, 0, 10, 10).tolist() == recorded
    code = "from stabletrain.data.order import batch_indices; print(batch_indices(0, 0, 10, 10).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(recorded)


def test_positions_of_an_index_are_uniform() -> None:
    """Over many epochs an index stands at each place equally often: chi-squared below the 0.1 % point."""
    count, epochs = 8, 4000
    order = concatenated(5, count, count, epochs).reshape(epochs, count)
    observed = np.array([[np.sum(order[:, place] == index) for index in range(count)] for place in range(count)])
    chi_squared = float(np.sum((observed - epochs / count) ** 2 / (epochs / count)))
    assert chi_squared < 85.4  # the 99.9 % quantile for (8 - 1)^2 = 49 degrees of freedom


@pytest.mark.parametrize("arguments", [(0, 0, 0, 4), (0, -1, 5, 4), (0, 0, 5, 0), (-1, 0, 5, 4)])
def test_nonsense_is_refused(arguments: tuple[int, int, int, int]) -> None:
    """An empty set, a negative position or seed, an empty batch."""
    with pytest.raises(ValueError, match="no batch"):
        batch_indices(*arguments)
