"""Padding, buckets and packing."""

import numpy as np
import pytest

from srlm_jax import batching


def test_bucket_is_the_smallest_that_holds():
  assert batching.bucket(32, (64, 32, 48)) == 32
  assert batching.bucket(33, (64, 32, 48)) == 48
  with pytest.raises(ValueError, match="65 tokens.*64"):
    batching.bucket(65, (64, 32, 48))


@pytest.mark.parametrize(
  ("smallest", "largest", "expected"),
  [(32, 128, (32, 48, 64, 96, 128)), (32, 100, (32, 48, 64, 96, 100)), (32, 32, (32,)), (32, 20, (20,))],
)
def test_doubling_buckets(smallest, largest, expected):
  assert batching.doubling_buckets(smallest, largest) == expected


def test_pad_fills_on_the_right_and_adds_rows():
  np.testing.assert_array_equal(batching.pad([[1, 2], [3]], 3, 3, fill=9), [[1, 2, 9], [3, 9, 9], [9, 9, 9]])


def test_pack_lays_examples_side_by_side():
  examples = [batching.Example((1, 2, 3), 1), batching.Example((4, 5, 6), 2), batching.Example((7, 8), 0)]
  rows = batching.pack(examples, 5)
  assert len(rows) == 2
  np.testing.assert_array_equal(rows[0]["tokens"], [1, 2, 3, 7, 8])
  np.testing.assert_array_equal(rows[0]["segments"], [1, 1, 1, 2, 2])
  np.testing.assert_array_equal(rows[0]["positions"], [0, 1, 2, 0, 1])
  np.testing.assert_array_equal(rows[0]["targets"], [False, True, True, True, True])
  np.testing.assert_array_equal(rows[1]["segments"], [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(rows[1]["targets"], [False, False, True, False, False])


def test_unpacked_is_one_example_a_row():
  examples = [batching.Example((1,), 0)] * 4
  assert len(batching.pack(examples, 5, packed=False)) == 4


def test_an_example_longer_than_a_row_is_an_error_and_never_cut():
  with pytest.raises(ValueError, match="6 tokens does not fit a row of 5"):
    batching.pack([batching.Example((1,) * 6, 0)], 5)


def test_packing_loses_nothing():
  rng = np.random.default_rng(0)
  examples = [batching.Example(tuple(rng.integers(1, 99, rng.integers(1, 30))), 0) for _ in range(500)]
  rows = batching.pack(examples, 64)
  found = sorted(
    tuple(row["tokens"][row["segments"] == segment].tolist())
    for row in rows
    for segment in range(1, row["segments"].max() + 1)
  )
  assert found == sorted(tuple(int(t) for t in example.tokens) for example in examples)
  assert sum((row["segments"] > 0).sum() for row in rows) > 0.9 * 64 * len(rows)


def texts(batch):
  """Each example with its positions and targets, sorted."""
  found = []
  for row in range(len(batch["tokens"])):
    for segment in range(1, batch["segments"][row].max() + 1):
      inside = batch["segments"][row] == segment
      found.append(tuple(tuple(batch[name][row][inside].tolist()) for name in ("tokens", "positions", "targets")))
  return sorted(found)


def stacked(rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_compact_keeps_every_example_and_knows_few_shapes():
  rng, shapes, before, after = np.random.default_rng(0), set(), 0, 0
  for _ in range(60):
    lengths = np.clip(rng.lognormal(4, 0.7, 16).astype(int), 2, 256)
    examples = [batching.Example(tuple(rng.integers(1, 99, n)), int(rng.integers(1, n))) for n in lengths]
    batch = stacked(batching.pack(examples, 256, packed=False))
    small = batching.compact(batch, 2)
    assert texts(small) == texts(batch)
    for number, example in enumerate(examples if "owners" in small else ()):
      np.testing.assert_array_equal(small["tokens"][small["owners"] == number], example.tokens)
    shapes.add(small["tokens"].shape)
    before, after = before + batch["tokens"].size, after + small["tokens"].size
  assert len(shapes) <= 12 and all(rows % 2 == 0 for rows, _ in shapes)
  assert after < 0.55 * before


def test_compact_gives_each_device_its_rows():
  batch = stacked(batching.pack([batching.Example((5, 6), 1)] * 8, 64, packed=False))
  assert batching.compact(batch, 8)["tokens"].shape == (8, 16)
  assert batching.compact(batch, 1)["tokens"].shape == (1, 16)


def test_compact_leaves_what_cannot_shrink():
  batch = stacked(batching.pack([batching.Example((1,) * 40, 3)] * 4, 40, packed=False))
  small = batching.compact(batch, 1)
  assert all(np.array_equal(small[name], batch[name]) for name in batch)
  nothing = stacked([batching.empty_row(8)] * 2)
  assert batching.compact(nothing, 1)["tokens"].shape == (2, 8)


def test_compact_keeps_an_example_without_targets_and_several_in_a_row():
  rows = batching.pack([batching.Example((1, 2, 3), 3), batching.Example((4, 5), 1)], 32)
  batch = stacked([*rows, batching.empty_row(32)])
  small = batching.compact(batch, 1)
  assert small["tokens"].shape == (1, 8) and texts(small) == texts(batch)


@pytest.mark.parametrize(("targets", "room"), [(1, 10), (10, 10), (11, 20), (30, 30), (31, None)])
def test_places_are_where_the_targets_are(targets, room):
  """40 predictions: quarters of them are compiled."""
  batch = stacked(batching.pack([batching.Example((1,) * 41, 41 - targets)], 41))
  found = batching.with_places(batch)
  if room is None:
    assert "places" not in found
  else:
    np.testing.assert_array_equal(found["places"], [*range(40 - targets, 40), *[40] * (room - targets)])


def test_a_segments_first_token_is_no_place():
  batch = stacked(batching.pack([batching.Example((1, 2), 0), batching.Example((3, 4), 0)], 24))
  assert batching.with_places(batch)["places"].tolist()[:3] == [0, 2, 23]
