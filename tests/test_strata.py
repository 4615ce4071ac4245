"""Duels and lengths by what is asked for: the strata add up to the whole."""

import pytest

from srlm_jax import classes, metrics, records, strata

OPTIONS = classes.Options(("facts", "coding"), ("short", "long"))


def known() -> dict[str, records.PromptClass]:
  rows = (("p0", "facts", 2, "short"), ("p1", "coding", 7, "long"), ("p2", "facts", 7, "short"))
  found = [records.PromptClass(prompt_id=name, category=c, complexity=n, length=size) for name, c, n, size in rows]
  return strata.readable([*found, classes.unreadable("p3", "hm", "no_category")])


def duel(prompt: str, outcome: int | None, sample: int = 0) -> records.Duel:
  return records.Duel(prompt_id=prompt, sample=sample, outcome=outcome)


DUELS = [
  *(duel("p0", 1), duel("p0", -1, 1), duel("p1", 1), duel("p1", None, 1)),
  *(duel("p2", 0), duel("p2", 1, 1), duel("p3", -1), duel("p3", -1, 1)),
]


def test_each_duel_is_in_one_stratum_of_each_dimension() -> None:
  facts, without = strata.duels(DUELS, known(), OPTIONS)
  assert without == 2
  whole = metrics.duel([[1, -1], [1], [0, 1]])
  for dimension in classes.DIMENSIONS:
    parts = facts[dimension].values()
    assert sum(one["comparisons"] for one in parts) == whole.comparisons == 5
    assert sum(one["prompts"] for one in parts) == whole.prompts == 3
    assert sum(one["unreadable"] for one in parts) == 1
    for share in ("win", "tie", "loss"):
      assert sum(one[share] * one["comparisons"] for one in parts) / 5 == pytest.approx(getattr(whole, share))
    assert sum(one["net"]["value"] * one["comparisons"] for one in parts) / 5 == pytest.approx(whole.net.value)
  assert list(facts["category"]) == ["facts", "coding"] and list(facts["complexity"]) == ["2", "7"]
  assert facts["category"]["coding"]["win"] == 1.0 and facts["category"]["coding"]["unreadable"] == 1
  assert facts["complexity"]["7"]["comparisons"] == 3 and facts["complexity"]["7"]["net"]["low"] is not None


def test_lengths_are_those_of_the_stratum_s_answers() -> None:
  def answer(prompt: str, text: str) -> records.Response:
    return records.Response(prompt_id=prompt, prompt="?", sample=0, text=text, tokens=(2,), finished=True)

  answers = [answer("p0", "ab"), answer("p1", "abcdef"), answer("p2", "abcd"), answer("p3", "x" * 99)]
  facts = strata.lengths(answers, known(), OPTIONS)
  assert {name: one["mean"] for name, one in facts["category"].items()} == {"facts": 3.0, "coding": 6.0}
  assert {name: one["count"] for name, one in facts["length"].items()} == {"short": 2, "long": 1}


def test_classes_of_another_template_are_refused() -> None:
  with pytest.raises(ValueError, match="stratum 'coding' is none of a, b"):
    strata.duels(DUELS, known(), classes.Options(("a", "b"), ("short", "long")))
