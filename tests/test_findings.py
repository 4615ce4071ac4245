"""Claims that follow from figures, where they do not hold."""

import made_run

from srlm_jax import findings


def test_a_lost_duel_and_a_worse_judge_are_said_to_be_so() -> None:
  measured = {
    "m1": made_run.evaluation(3.0, (0.8, 0.75, 0.85), {}),
    "m2": made_run.evaluation(2.0, (0.6, 0.55, 0.65), {"m1": made_run.duel(0.1, 0.5, (-0.5, -0.3))}),
  }
  verdicts = [row[3] for row in findings.claims_table(measured).rows]
  assert [cell.tone for cell in verdicts] == ["bad", "bad", ""]
  assert findings.summary(measured)[:2] == [
    "M1 < M2 in oracle quality: no (3.00 → 2.00 of 5).",
    "M2 over M1: 10.0 % wins, 50.0 % losses, net −40.0 [−50.0, −30.0]; better beyond the 95 % interval: no.",
  ]


def test_a_judge_without_readable_votes_is_no_zero() -> None:
  measured = {
    "baseline": made_run.evaluation(2.0, (0.5, 0.4, 0.6), {}),
    "m1": made_run.evaluation(2.0, (0.8, 0.7, 0.9), {}),
  }
  measured["baseline"]["judge"]["metrics"] = dict.fromkeys(findings.METRICS, made_run.estimate(None, count=0))
  [claim] = findings.claims_table(measured).rows
  assert [cell.text for cell in claim[1:]] == ["– → 80.0", "65.1 → 78.7", "open: one of them has no readable votes"]
  assert findings.summary(measured) == [
    "As judges, pairwise accuracy: SFT baseline none (no pair of readable votes), M1 80.0 %."
  ]


def test_expected_scores_stand_beside_sampled_votes() -> None:
  measured = {name: made_run.evaluation(3.0, (0.8, 0.7, 0.9), {}) for name in ("m1", "m2")}
  table = findings.expected_table(measured)
  assert table.columns == ("", "M1", "M2") and len(table.rows) == 2 * (len(findings.METRICS) - 1)
  first, second = (row for row in table.rows if row[0].text.startswith("pairwise accuracy"))
  assert first[0].text.endswith("sampled votes") and second[0].text.endswith("expected score")
  assert first[1].text != second[1].text
