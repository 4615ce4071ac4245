"""The map: equal on every call, and what belongs together lies together."""

import numpy as np
import pytest

from srlm_jax import tsne

KINDS = ["IFT"] * 40 + ["EFT"] * 40 + ["AIFT1"] * 40


def clouds() -> np.ndarray:
  """IFT and AIFT in one cloud, EFT in another."""
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(120, 16)).astype(np.float32)
  vectors[40:80, 0] += 30
  return vectors + 100  # A feature that all share says nothing.


def test_a_map_is_equal_on_every_call_and_another_seed_s_is_another() -> None:
  (one, left), (two, _), (three, _) = (tsne.layout(clouds(), 10.0, seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, two)
  assert one.shape == (120, 2) and np.isfinite(one).all() and left > 0
  assert one.shape == three.shape


def test_clouds_stay_apart_and_mixed_ones_mixed() -> None:
  found = tsne.neighbours(clouds(), KINDS, 10, 0)
  assert list(found) == ["IFT", "EFT", "AIFT1"]
  assert all(sum(row.values()) == pytest.approx(1) for row in found.values())
  assert found["EFT"]["EFT"] > 0.95 and found["IFT"]["EFT"] < 0.05
  assert 0.3 < found["IFT"]["AIFT1"] < 0.7
  points, _ = tsne.layout(clouds(), 10.0, 0)
  eft, rest = points[40:80], np.concatenate([points[:40], points[80:]])
  between = np.linalg.norm(eft.mean(0) - rest.mean(0))
  assert between > np.linalg.norm(eft - eft.mean(0), axis=1).mean()


def test_few_and_strange_vectors() -> None:
  points, _ = tsne.layout(np.eye(5), 30.0, 0)  # Perplexity is lowered.
  assert points.shape == (5, 2)
  points, _ = tsne.layout(np.repeat(np.eye(2), 6, axis=0), 30.0, 0)  # Most are equal.
  assert np.isfinite(points).all()
  with pytest.raises(ValueError, match="all 8 vectors are equal"):
    tsne.layout(np.ones((8, 3)), 30.0, 0)
  with pytest.raises(ValueError, match=r"4 vectors: a map needs at least 5"):
    tsne.layout(np.eye(4), 30.0, 0)
  with pytest.raises(ValueError, match="some hold NaN or infinity"):
    tsne.layout(np.full((9, 3), np.nan), 30.0, 0)
