"""Several annotators' votes on the same things: the majority, and how far they agree: pure numbers."""

from collections import Counter
from collections.abc import Hashable, Sequence
import itertools


def majority(votes: Sequence[int]) -> int | None:
  """The vote that more than half of them are; None where there is none, as of one win, one tie and one loss."""
  for vote, count in Counter(votes).items():
    if 2 * count > len(votes):
      return vote
  return None


def pairwise(votes: Sequence[Sequence[Hashable]]) -> tuple[float | None, int]:
  """Of all pairs of votes on one thing, the share that are equal, and how many pairs there are; None without any."""
  pairs = [one == other for group in votes for one, other in itertools.combinations(group, 2)]
  return (sum(pairs) / len(pairs) if pairs else None), len(pairs)


def fleiss_kappa(votes: Sequence[Sequence[Hashable]]) -> float | None:
  """Fleiss' kappa (1971): agreement beyond what chance would give; 1 is perfect, 0 is chance.

  Things may have different numbers of votes: each counts with its own share of equal pairs. Those with fewer than two
  votes say nothing and are left out.

  Args:
    votes: for each thing the categories that its annotators chose.

  Returns:
    None where it is undefined: no thing has two votes, or all votes are of one category.
  """
  counts = [Counter(group) for group in votes if len(group) > 1]
  totals = [sum(count.values()) for count in counts]
  if not counts:
    return None
  observed = sum(
    (sum(number**2 for number in count.values()) - total) / (total * (total - 1))
    for count, total in zip(counts, totals, strict=True)
  ) / len(counts)
  together = sum(counts, Counter[Hashable]())
  chance = sum((number / sum(totals)) ** 2 for number in together.values())
  return (observed - chance) / (1 - chance) if chance < 1 else None
