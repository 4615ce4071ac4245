"""Prepared training sets: the same order every time, each row once an epoch, any step at any time."""

import os

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


def test_writing_says_nothing(tmp_path: epath.Path, capfd: pytest.CaptureFixture[str]) -> None:
  dataset.write(tmp_path / "set", ROWS)
  assert capfd.readouterr().out == ""


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


def files(folder: epath.Path) -> list[epath.Path]:
  return sorted(epath.Path(root) / name for root, _, names in os.walk(folder) for name in names)


def test_a_flipped_bit_is_found_before_a_row_is_read(tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path) / "pairs" / "dataset"
  dataset.write(folder, ROWS)
  names = {str(path.relative_to(folder)) for path in files(folder)}
  assert names == {
    "digests.json",
    *(
      f"rows/1.0.0/{name}" for name in ("dataset_info.json", "features.json", "rows-train.array_record-00000-of-00001")
    ),
  }
  for path in files(folder):
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
      damaged = bytearray(whole)
      damaged[place] ^= 1
      path.write_bytes(bytes(damaged))
      with pytest.raises(ValueError, match=rf"{path.name} is damaged .*: delete .*/pairs and run its stage again"):
        dataset.batches(folder, 3, seed=0)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}\)? ?is missing|has no digests.json"):
      dataset.batches(folder, 3, seed=0)
    path.write_bytes(whole)
  assert order(folder, 7) == order(folder, 7)


def test_a_set_that_was_being_written_is_none(tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  folder = epath.Path(tmp_path) / "dataset"
  dataset.write(folder, ROWS[:3])

  def killed(*_: object) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(dataset.storage, "write", killed)
    dataset.write(folder, ROWS)
  with pytest.raises(ValueError, match="is no whole training set"):
    dataset.batches(folder, 3, seed=0)
  dataset.write(folder, ROWS)
  assert dataset.count(folder) == 7
