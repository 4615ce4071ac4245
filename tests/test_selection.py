"""The choice among checkpoints: which steps are candidates, who wins, when it is over, and what the report shows."""

import dataclasses

import pytest

from srlm_jax import selection


def trials(*nets: float | None, every: int = 200) -> list[selection.Trial]:
  """One trial of 8 prompts for each net; None: no comparison was readable."""
  made = []
  for number, net in enumerate(nets):
    wins = [] if net is None else [[1 if net > 0 else -1]] * round(8 * abs(net))
    ties = [] if net is None else [[0]] * (8 - len(wins))
    made.append(selection.trial(every * (number + 1), every * number, wins + ties, 8 if net is None else 0))
  return made


@pytest.mark.parametrize(
  ("every", "steps", "wanted"),
  [(200, 496, [200, 400, 496]), (200, 400, [200, 400]), (200, 200, [200]), (200, 199, []), (1, 2, [1, 2])],
)
def test_candidates_are_each_so_many_steps_and_the_end(every: int, steps: int, wanted: list[int]) -> None:
  assert selection.candidates(every, steps) == wanted


@pytest.mark.parametrize(
  ("nets", "patience", "wanted"),
  [
    ([0.5], 1, (200, False)),
    ([0.5, 0.25, -0.125], 1, (400, True)),
    ([-0.5], 1, (0, True)),  # Where training started is better.
    ([0.5, 0.0], 1, (400, False)),  # A draw is no loss,
    ([0.5, None], 1, (400, False)),  # nor is a judge who cannot be read.
    ([0.5, -0.5], 2, (200, False)),
    ([0.5, -0.5, -0.5], 2, (200, True)),
    ([0.5, -0.5, 0.25, -0.5], 2, (600, False)),  # Not in a row.
  ],
)
def test_the_last_that_did_not_lose_is_kept(nets: list[float | None], patience: int, wanted: tuple[int, bool]) -> None:
  assert selection.decide(trials(*nets), patience) == wanted


def test_a_trial_counts_the_outcomes() -> None:
  one = selection.trial(400, 200, [[1], [-1], [-1], [0], []], 1)
  assert (one.win, one.tie, one.loss, one.net["value"]) == (0.25, 0.25, 0.5, -0.25) and one.lost
  assert (one.prompts, one.comparisons, one.unreadable) == (4, 4, 1)
  assert one.net["low"] <= -0.25 <= one.net["high"]
  assert selection.sentence(one).startswith("step 400 against 200: win 25.0, tie 25.0, loss 50.0 %, net −25.0 [")
  nothing = selection.trial(200, 0, [], 3)
  assert not nothing.lost and "no readable comparison, 3 unreadable" in selection.sentence(nothing)


def test_the_facts_are_the_curve_and_what_was_taken() -> None:
  curve = trials(0.5, -0.5)
  found = selection.facts(curve, 1, 600, "oracle")
  assert (found["chosen"], found["stopped"], found["planned"], found["judge"]) == (200, True, 600, "oracle")
  assert [one["lost"] for one in found["curve"]] == [False, True]
  assert found["curve"][0] == dataclasses.asdict(curve[0]) | {"lost": False}
  assert not selection.facts(curve, 1, 400, "oracle")["stopped"]  # All steps were done by then.


def test_the_table_and_the_sentences_say_which_became_the_model() -> None:
  found = {
    "M1": selection.facts(trials(0.5, -0.5), 1, 600, "writer"),
    "M2": selection.facts(trials(-0.5), 1, 200, "writer"),
  }
  rows = [[cell.text for cell in row] for row in selection.table(found).rows]
  assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
    ("M1", "200", "0", "the model"), ("M1", "400", "200", "lost"), ("M2", "200", "0", "lost"),
  ]  # fmt: skip
  assert rows[0][3:7] == ["50.0", "50.0", "0.0", "+50.0"]
  assert selection.sentences(found) == [
    "M1: training stopped at step 400 of 600; the model is that of step 200 (judge: writer).",
    "M2: all 200 steps were trained; the model is the one where training started (judge: writer).",
  ]
