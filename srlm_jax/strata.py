"""Duels and lengths by what the instruction asks for: category, complexity, expected length (paper §3.2): pure numbers.

The strata of a dimension divide the duels: each is in one of them, or its instruction has no readable class.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from srlm_jax import classes, metrics, records

Facts = dict[str, dict[str, dict[str, Any]]]  # Dimension → stratum → figures.


def readable(found: Iterable[records.PromptClass]) -> dict[str, records.PromptClass]:
  """The classes that were read, by prompt id."""
  return {one.prompt_id: one for one in found if not one.reason}


def _ordered(groups: Mapping[str, Any], order: Sequence[str]) -> list[str]:
  """The strata that occur, in their order; ValueError for one that is in no order."""
  strange = sorted(set(groups) - set(order))
  if strange:
    raise ValueError(f"stratum {strange[0]!r} is none of {', '.join(order)}: the classes were made with other lists.")
  return [name for name in order if name in groups]


def duels(
  found: Iterable[records.Duel], known: Mapping[str, records.PromptClass], options: classes.Options
) -> tuple[Facts, int]:
  """Win, tie, loss and net with its interval in each stratum, and how many duels have no class.

  Args:
    found: duels of two models.
    known: the readable classes by prompt id.
    options: their lists, for the order.

  Returns:
    For each dimension and stratum the fields of `metrics.Duel` and the number of "unreadable" duels in it; and the
    number of duels whose instruction has no readable class, which are in no stratum.
  """
  given = list(found)
  kept = [duel for duel in given if duel.prompt_id in known]
  facts: Facts = {}
  for dimension in classes.DIMENSIONS:
    groups: dict[str, dict[str, list[int]]] = {}  # Stratum → prompt → outcomes.
    unreadable: dict[str, int] = {}
    for duel in kept:
      name = classes.stratum(known[duel.prompt_id], dimension)
      outcomes = groups.setdefault(name, {}).setdefault(duel.prompt_id, [])
      unreadable[name] = unreadable.get(name, 0) + (duel.outcome is None)
      if duel.outcome is not None:
        outcomes.append(duel.outcome)
    facts[dimension] = {
      name: {**dataclasses.asdict(metrics.duel(list(groups[name].values()))), "unreadable": unreadable[name]}
      for name in _ordered(groups, options.order(dimension))
    }
  return facts, len(given) - len(kept)


def lengths(
  answers: Iterable[records.Response], known: Mapping[str, records.PromptClass], options: classes.Options
) -> Facts:
  """Mean, median and 90th percentile of the answers' characters in each stratum; those without a class are left out."""
  given = [(known[one.prompt_id], len(one.text)) for one in answers if one.prompt_id in known]
  facts: Facts = {}
  for dimension in classes.DIMENSIONS:
    groups: dict[str, list[int]] = {}
    for one, length in given:
      groups.setdefault(classes.stratum(one, dimension), []).append(length)
    facts[dimension] = {
      name: dataclasses.asdict(metrics.length_summary(groups[name]))
      for name in _ordered(groups, options.order(dimension))
    }
  return facts
