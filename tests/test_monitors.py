"""Monitors: figures of made records, worked out by hand, and when they warn."""

import math

import pytest

from srlm_jax import config, monitors, records

LIMITS = config.base().monitors.warn.to_dict()


def judgement(prompt: str, sample: int, *votes: float | None) -> records.Judgement:
  readable = [vote for vote in votes if vote is not None]
  return records.Judgement(
    prompt_id=prompt,
    sample=sample,
    votes=tuple(records.Vote(text="", score=vote, reason="" if vote is not None else "no_score") for vote in votes),
    score=sum(readable) / len(readable) if readable else None,
  )


def test_scores_by_hand() -> None:
  found = monitors.scores(
    [
      judgement("p", 0, 4, 4, 5),
      judgement("p", 1, 4, None, 2),
      judgement("q", 0, 5, 5),
      judgement("q", 1, 5, 5),
      judgement("r", 0, None),
    ],
    top=5,
  )
  assert found["mean"] == pytest.approx((13 / 3 + 3 + 5 + 5) / 4)
  assert found["top"] == 0.5
  assert found["entropy"] == pytest.approx(1.5)  # 4, 3, 5, 5: 1/4, 1/4, 1/2.
  assert found["ties"] == 0.5  # p differs, q is a tie, r has no two scores.
  assert found["variance"] == pytest.approx((2 / 9 + 1 + 0 + 0) / 4)
  assert found["unreadable"] == pytest.approx(2 / 11)


def test_collapsed_scores_have_no_entropy() -> None:
  found = monitors.scores([judgement(f"p{n // 2}", n % 2, 4, 4) for n in range(8)], top=5)
  assert (found["entropy"], found["ties"], found["top"], found["variance"]) == (0, 1, 0, 0)


def test_equal_means_are_a_tie_whatever_their_last_bit() -> None:
  one, other = judgement("p", 0, 0.1, 0.7, 0.2), judgement("p", 1, 0.7, 0.2, 0.1)
  shifted = other.model_copy(update={"score": (one.score or 0) + 1e-12})
  assert monitors.scores([one, shifted], top=5)["ties"] == 1


def test_nothing_gives_no_figures() -> None:
  assert set(monitors.scores([], top=5).values()) == {None}
  assert set(monitors.scores([judgement("p", 0, None)], top=5).values()) == {None, 1.0}  # The vote is unreadable.


def test_changes_are_against_the_model_before() -> None:
  readings = {
    "M1": {"heldout_mean": 2.0, "characters": 100.0, "agreement": 0.8, "distinct_2": 0.0},
    "M2": {"heldout_mean": 2.5, "characters": 160.0, "agreement": None, "distinct_2": 0.5},
  }
  found = monitors.with_changes(readings, {"M2": "M1"})
  assert found["M1"] == readings["M1"]
  assert found["M2"]["heldout_change"] == 0.5 and found["M2"]["characters_growth"] == 1.6
  assert "agreement_change" not in found["M2"] and "distinct_2_ratio" not in found["M2"]  # Nothing, or by zero.


def test_the_thresholds_are_those_of_the_configuration() -> None:
  assert {rule.limit for rule in monitors.RULES} - {""} == set(LIMITS)
  figures = [rule.figure for rule in monitors.RULES]
  assert len(set(figures)) == len(figures) and set(monitors._CHANGES) <= set(figures)
  assert all(rule.look for rule in monitors.RULES if rule.limit)


@pytest.mark.parametrize("rule", [rule for rule in monitors.RULES if rule.limit], ids=lambda rule: rule.figure)
def test_each_warns_beyond_its_threshold_and_not_at_it(rule: monitors.Rule) -> None:
  limit = LIMITS[rule.limit]
  edge = -limit if rule.side == "fall" else limit
  beyond = edge + (0.01 if rule.side == "above" else -0.01)
  for value, count in ((edge, 0), (beyond, 1), (2 * edge - beyond, 0), (None, 0)):
    lines = monitors.warnings({"M2": {rule.figure: value}}, LIMITS)
    assert len(lines) == count, value
    if lines:
      assert lines[0].startswith(f"{rule.title}: M2 {rule.shown(value)}; monitors.warn.{rule.limit} warns ")
      assert rule.threshold(LIMITS) in lines[0] and "Look at " in lines[0]
  never = -math.inf if rule.side == "below" else math.inf
  assert monitors.warnings({"M2": {rule.figure: beyond}}, {**LIMITS, rule.limit: never}) == []
  assert rule.threshold({rule.limit: never}) == "never"


def test_a_warning_in_full() -> None:
  readings = {"M2": {"characters_growth": 1.42}, "M3": {"characters_growth": 1.64, "own_entropy": 0.47}}
  assert monitors.warnings(readings, LIMITS) == [
    "entropy of the scores of own answers, bits: M3 0.47; monitors.warn.entropy warns below 0.50. Look at the votes on "
    "them (judgements of AIFT): nearly all answers get one score, as in the paper's run without EFT.",
    "growth of characters, times: M3 1.64; monitors.warn.growth warns above 1.50. Look at the lengths of chosen and "
    "rejected answers, and the duels: answers may win because they are longer.",
  ]


def test_the_table_shows_what_there_is_and_marks_what_is_beyond() -> None:
  found = monitors.table({"M1": {"cut": 0.5}, "M2": {"cut": 0.01, "agreement": 0.8}}, LIMITS)
  assert found.columns == ("", "M1", "M2", "warns")
  assert [[cell.text for cell in row] for row in found.rows] == [
    ["pairwise agreement with people's ranks, %", "–", "80.0", ""],
    ["answers that the length limit cut, %", "50.0", "1.0", "above 5.0"],
  ]
  assert [(cell.small, cell.tone) for cell in found.rows[1]] == [("", ""), ("beyond", "bad"), ("", ""), ("", "")]
