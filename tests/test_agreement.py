"""Majorities and agreement, against published and hand-computed examples."""

import pytest

from srlm_jax import agreement


def test_a_majority_is_more_than_half() -> None:
  assert agreement.majority([1, 1, -1]) == 1
  assert agreement.majority([-1]) == -1
  assert agreement.majority([0, 0, 0, 1]) == 0
  for none in ([], [1, 0, -1], [1, -1], [1, 1, 0, -1]):
    assert agreement.majority(none) is None


def test_pairs_that_agree() -> None:
  # 1 of 3 pairs, 3 of 3, and one thing with one vote.
  assert agreement.pairwise([[1, 1, 0], [-1, -1, -1], [1]]) == (4 / 6, 6)
  assert agreement.pairwise([[1]]) == (None, 0)


# The worked example of Wikipedia's article on Fleiss' kappa (1971): ten subjects, fourteen raters, five categories;
# P = 0.378, Pe = 0.213, kappa = 0.210.
PUBLISHED = (
  *((0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1)),
  *((7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)),
)


def test_kappa_is_the_published_one() -> None:
  votes = [[category for category, count in enumerate(row) for _ in range(count)] for row in PUBLISHED]
  assert agreement.fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)
  # With equal numbers of votes the share of equal pairs is Fleiss' P.
  assert agreement.pairwise(votes)[0] == pytest.approx(0.378, abs=5e-4)


def test_kappa_at_its_ends() -> None:
  assert agreement.fleiss_kappa([[1, 1], [0, 0], [-1, -1, -1]]) == pytest.approx(1)
  assert agreement.fleiss_kappa([[1, 0], [0, 1]]) == pytest.approx(-1)
  assert agreement.fleiss_kappa([[1, 1], [1, 1]]) is None  # One category alone: chance would agree, too.
  assert agreement.fleiss_kappa([[1], []]) is None


def test_things_may_have_different_numbers_of_votes() -> None:
  # Shares of equal pairs 1/3 and 1; 4 of 5 votes are 1: (2/3 - 17/25) / (1 - 17/25).
  assert agreement.fleiss_kappa([[1, 1, 0], [1, 1], [0]]) == pytest.approx((2 / 3 - 17 / 25) / (8 / 25))
