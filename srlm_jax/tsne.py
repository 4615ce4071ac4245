"""Vectors as points of a plane (t-SNE, as in the paper's figure of IFT, EFT and AIFT), and who is whose neighbour."""

from collections.abc import Sequence

import numpy as np
import threadpoolctl

COMPONENTS = 50  # Principal components that the neighbours are sought in: the usual first step.
FEWEST = 5  # Points that a map needs.


def _reduced(vectors: np.ndarray, seed: int) -> np.ndarray:
  """Centred, of length 1, in at most `COMPONENTS` dimensions: what few large features say in every text is gone."""
  from sklearn import decomposition  # Here: it takes seconds, and one stage alone needs it.

  if len(vectors) < FEWEST:
    raise ValueError(f"{len(vectors)} vectors: a map needs at least {FEWEST}. Raise analysis.points.")
  if not np.isfinite(vectors).all():
    raise ValueError("vectors must be finite: some hold NaN or infinity. Look at what made them.")
  if not np.ptp(vectors, axis=0).any():
    raise ValueError(f"all {len(vectors)} vectors are equal, so there is nothing to map. Look at what made them.")
  centred = np.asarray(vectors, np.float64) - np.mean(vectors, axis=0, dtype=np.float64)
  lengths = np.linalg.norm(centred, axis=1, keepdims=True)
  unit = centred / np.where(lengths > 0, lengths, 1.0)
  count = min(COMPONENTS, *unit.shape)
  return decomposition.PCA(
    count, svd_solver="full" if unit.size < 10**6 else "randomized", random_state=seed
  ).fit_transform(unit)


def layout(vectors: np.ndarray, perplexity: float, seed: int) -> tuple[np.ndarray, float]:
  """t-SNE: a point for each vector, near where their directions are alike; equal on every call with one seed.

  Args:
    vectors: float [N, D], N at least 5.
    perplexity: how many neighbours a point has, about; lowered where there are too few points.
    seed: of what is drawn.

  Returns:
    float64 [N, 2], and the divergence (nats) that is left between the neighbourhoods here and there.
  """
  from sklearn import manifold

  # One thread: several add up in any order, and t-SNE makes other maps of other last bits.
  with threadpoolctl.threadpool_limits(1):
    reduced = _reduced(vectors, seed)
    perplexity = min(perplexity, (len(reduced) - 1) / 3)
    made = manifold.TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    points = made.fit_transform(reduced)
  return np.asarray(points, np.float64), float(made.kl_divergence_)


def neighbours(vectors: np.ndarray, kinds: Sequence[str], count: int, seed: int) -> dict[str, dict[str, float]]:
  """Of what kind each kind's `count` nearest neighbours are, on average: shares that sum to 1.

  Measured before t-SNE, which keeps neighbourhoods only roughly.
  """
  from sklearn import neighbors as nearest

  with threadpoolctl.threadpool_limits(1):
    reduced = _reduced(vectors, seed)
    count = min(count, len(reduced) - 1)
    found = nearest.NearestNeighbors(n_neighbors=count).fit(reduced).kneighbors(return_distance=False)
  own = np.asarray(kinds)
  names = list(dict.fromkeys(kinds))
  return {name: {other: float(np.mean(own[found[own == name]] == other)) for other in names} for name in names}
