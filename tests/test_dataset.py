"""Prepared training sets: the same order every time, each row once an epoch, any step at any time."""

from etils import epath
import numpy as np
import pytest

from srlm_jax import dataset

ROWS = [
  {
    "tokens": np.array([number, 2 * number], np.int32),
    "targets": np.array([number % 2 == 0, True]),
    "reference": np.array([-number / 3, number / 3], np.float32),
  }
  for number in range(7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
  path = epath.Path(tmp_path_factory.mktemp("dataset")) / "dataset"
  dataset.write(path, ROWS)
  return path


def order(folder: epath.Path, steps: int, size: int = 3, seed: int = 0) -> list[int]:
  batches = dataset.batches(folder, size, seed)
  return [int(row) for step in range(steps) for row in batches[step]["tokens"][:, 0]]


def test_rows_come_back_as_they_were(folder: epath.Path) -> None:
  batch = dataset.batches(folder, 7, seed=0)[0]
  assert {name: value.dtype for name, value in batch.items()} == {
    "tokens": np.int32, "targets": np.bool_, "reference": np.float32,
  }  # fmt: skip
  for place, number in enumerate(batch["tokens"][:, 0]):
    for name, value in ROWS[number].items():
      np.testing.assert_array_equal(batch[name][place], value)
  assert dataset.count(folder) == 7


def test_every_row_is_seen_once_an_epoch(folder: epath.Path) -> None:
  seen = order(folder, 7)  # Three epochs; batches of three rows span them.
  epochs = [seen[start : start + 7] for start in (0, 7, 14)]
  assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3  # Shuffled anew,
  assert tuple(range(7)) not in {tuple(epoch) for epoch in epochs}  # and shuffled at all.


def test_the_order_is_the_seeds_alone(folder: epath.Path) -> None:
  assert order(folder, 7) == order(folder, 7)
  assert order(folder, 7, size=7)[:21] == order(folder, 7)
  assert order(folder, 7, seed=1) != order(folder, 7)


def test_a_step_is_the_same_after_reopening(folder: epath.Path) -> None:
  first = dataset.batches(folder, 3, seed=4)
  wanted = [first[step]["tokens"] for step in range(6)]
  again = dataset.batches(folder, 3, seed=4)
  for step in (5, 0, 3, 5):  # Straight to a step, back, and twice.
    np.testing.assert_array_equal(again[step]["tokens"], wanted[step])


def test_a_batch_larger_than_the_set_repeats_it(folder: epath.Path) -> None:
  seen = order(folder, 1, size=10)
  assert sorted(seen[:7]) == list(range(7)) and len(seen) == 10


def test_no_rows_are_refused(tmp_path: epath.Path) -> None:
  with pytest.raises(ValueError, match="no training example to write"):
    dataset.write(tmp_path, [])
