"""The tiny world's judges: their texts by hand and against the oracle, their carelessness in numbers."""

import collections
import re

import numpy as np
import pytest

from srlm_jax import world, world_judges

TWO = "Give me three birds then count from 9 to 12."


def _score_of_fields(text: str) -> int:
  """The score that follows from a judgement's own written fields."""
  done, labels = re.findall(r"done (\w+)", text), re.findall(r"label (\w+)", text)
  score = 0
  if set(done) != {"none"}:
    score = 1
    if not {"none", "little"} & set(done):
      score = 2
      if set(done) == {"full"}:
        score = 3
        if set(labels) == {"yes"} and "opening yes." in text:
          score = 4 + ("extra no." in text)
  return score


def test_judgements_tell_the_truth() -> None:
  rng = np.random.default_rng(7)
  for number in range(2000):
    text = world.instruction(rng)
    response = world.answer(world.parse(text), rng, ("human", "worse", "flawless", "lost")[number % 4])
    verdict = world_judges.judgement(text, response)
    score = int(re.fullmatch(r"[^\n]+\nScore: ([0-5])", verdict)[1])
    assert score == _score_of_fields(verdict) == world.oracle(text, response)
    assert f"points {' '.join('12345'[:score]) or 'none'}.\n" in verdict
    assert world_judges.noisy_judgement(text, response, rng, noise=0.0) == verdict


@pytest.mark.parametrize(
  "response,check",
  [
    (
      "Sure! birds: crow swan owl. numbers: 9 10 11 12.",
      "birds asked 3 got crow 1 swan 2 owl 3 done full label yes. numbers asked 9 to 12 got 9 10 11 12 done full label "
      "yes. opening yes. extra no. points 1 2 3 4 5.\nScore: 5",
    ),
    (
      "crow crow cod. 9 11. Let me know.",
      "birds asked 3 got crow 1 crow again cod wrong done little label no. numbers asked 9 to 12 got 9 11 skip done "
      "half label no. opening no. extra yes. points 1.\nScore: 1",
    ),
    (
      "No idea.",
      "birds asked 3 got none done none label no. numbers asked 9 to 12 got none done none label no. opening no. "
      "extra yes. points none.\nScore: 0",
    ),
  ],
)
def test_judgement_by_hand(response: str, check: str) -> None:
  assert world_judges.judgement(TWO, response) == check


def test_categories_instead_of_points() -> None:
  assert world_judges.judgement(TWO, "No idea.", low=1).endswith(" opening no. extra yes.\nScore: 1")
  perfect = "Sure! birds: crow swan owl. numbers: 9 10 11 12."
  verdict = world_judges.judgement(TWO, perfect, low=1)
  assert verdict.endswith(" opening yes. extra no.\nScore: 5") and "points" not in verdict
  rng = np.random.default_rng(0)
  assert world_judges.noisy_judgement(TWO, perfect, rng, noise=0.0, low=1) == verdict
  assert {world_judges.noisy_judgement(TWO, "No idea.", rng, 0.9, 1)[-1] for _ in range(500)} <= set("12345")


def test_noisy_judgements_are_imperfect_and_favour_four() -> None:
  writers, rng = np.random.default_rng(5), np.random.default_rng(8)
  texts = [world.instruction(writers) for _ in range(3000)]
  pairs = [(text, world.answer(world.parts_of(text), writers, "human")) for text in texts]
  given = [int(world_judges.noisy_judgement(*pair, rng, 0.5)[-1]) for pair in pairs]
  true = [world.oracle(*pair) for pair in pairs]
  assert 0.2 < np.mean(np.equal(given, true)) < 0.6
  assert 0.3 < np.corrcoef(given, true)[0, 1] < 0.85
  assert collections.Counter(given).most_common(1)[0][0] == 4
  with pytest.raises(ValueError, match="Sing"):
    world_judges.judgement("Sing.", "")
