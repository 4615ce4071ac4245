"""Metrics against figures worked out by hand, and against judges whose figures are known: the canaries."""

import dataclasses
import math
import time

import numpy as np
import pytest
import scipy.stats

from srlm_jax import metrics


def ranked(prompts: int, seed: int = 0) -> list[list[float]]:
  """Human rankings of two to four responses, in random order."""
  rng = np.random.default_rng(seed)
  return [rng.permutation(rng.integers(2, 5)).tolist() for _ in range(prompts)]


def values(result: dict[str, metrics.Estimate]) -> dict[str, float | None]:
  return {name: estimate.value for name, estimate in result.items()}


def test_two_prompts_worked_out_by_hand() -> None:
  result = metrics.reward_model_metrics(
    ranks=[[0, 1, 2], [1, 0]],
    # Prompt 1: pairs (5, 5) tied, (5, 3) right, (5, 3) right. Prompt 2: the worse response scores higher: wrong.
    scores=[[5, 5, 3], [5, 2]],
  )
  assert list(result) == [
      "pairwise", "pairwise_strict", "tie_rate", "exact_match", "spearman", "kendall", "five_best", "unreadable",
      "undefined",
  ]  # fmt: skip
  spearman = 1.5 / math.sqrt(2 * 1.5)  # Ranks 3, 2, 1 against 2.5, 2.5, 1: covariance 1.5, squares 2 and 1.5.
  kendall = 2 / math.sqrt(3 * 2)  # Two concordant pairs; 3 pairs untied on one side, 2 on the other.
  assert values(result) == pytest.approx(
    {
      "pairwise": 2 / 3,
      "pairwise_strict": 2 / 4,
      "tie_rate": 1 / 4,
      "exact_match": 0 / 2,
      "spearman": (spearman - 1) / 2,
      "kendall": (kendall - 1) / 2,
      "five_best": 1 / 3,
      "unreadable": 0.0,
      "undefined": 0.0,
    }
  )
  assert {name: estimate.count for name, estimate in result.items()} == {
      "pairwise": 3, "pairwise_strict": 4, "tie_rate": 4, "exact_match": 2, "spearman": 2, "kendall": 2, "five_best": 3,
      "unreadable": 5, "undefined": 2,
  }  # fmt: skip
  assert result["pairwise"].left_out == 1


def test_canary_oracle_judge_is_right_everywhere() -> None:
  ranks = ranked(60)
  result = metrics.reward_model_metrics(ranks, [[5 - rank for rank in prompt] for prompt in ranks])
  for name in ("pairwise", "pairwise_strict", "exact_match", "spearman", "kendall", "five_best"):
    assert result[name].value == pytest.approx(1.0), name
    assert (result[name].low, result[name].high) == pytest.approx((1.0, 1.0)), name
  assert result["tie_rate"].value == 0 and result["unreadable"].value == 0 and result["undefined"].value == 0


def test_canary_reversed_judge_is_wrong_everywhere() -> None:
  ranks = ranked(60)
  # The last of each prompt gets the full five.
  result = metrics.reward_model_metrics(ranks, [[5 - max(prompt) + rank for rank in prompt] for prompt in ranks])
  for name in ("pairwise", "pairwise_strict", "exact_match", "five_best"):
    assert result[name].value == 0, name
  for name in ("spearman", "kendall"):
    assert result[name].value == pytest.approx(-1.0), name
    assert (result[name].low, result[name].high) == pytest.approx((-1.0, -1.0)), name
  assert result["tie_rate"].value == 0


@pytest.mark.parametrize("score, five_best", [(4, None), (5, 1 / 3)])
def test_canary_constant_judge_ties_everything(score: float, five_best: float | None) -> None:
  result = metrics.reward_model_metrics([[0, 1, 2]] * 10, [[score] * 3] * 10)
  assert result["tie_rate"].value == 1 and result["undefined"].value == 1
  assert result["pairwise"] == metrics.Estimate(None, None, None, count=0, left_out=30)
  assert result["spearman"] == result["kendall"] == metrics.Estimate(None, None, None, count=0, left_out=10)
  assert result["pairwise_strict"].value == 0 and result["exact_match"].value == 0
  assert result["five_best"].value == (None if five_best is None else pytest.approx(five_best))


def test_canary_random_judge_is_at_chance() -> None:
  ranks = ranked(400, seed=1)
  rng = np.random.default_rng(2)
  result = metrics.reward_model_metrics(ranks, [rng.uniform(0, 4, len(prompt)).tolist() for prompt in ranks])
  for name, chance in {"pairwise": 0.5, "pairwise_strict": 0.5, "spearman": 0.0, "kendall": 0.0}.items():
    estimate = result[name]
    assert estimate.low <= chance <= estimate.high, name
    assert 0.02 < estimate.high - estimate.low < 0.2, name
  assert result["five_best"].value is None


def test_canary_generous_judge_gains_by_dropped_ties_alone() -> None:
  # Nearly everything gets 4; the one pair told apart is right.
  result = metrics.reward_model_metrics([[0, 1]] * 20, [[4, 4]] * 19 + [[4, 3]])
  assert result["pairwise"].value == 1 and result["pairwise"].count == 1
  assert result["pairwise_strict"].value == pytest.approx(1 / 20)
  assert result["tie_rate"].value == pytest.approx(19 / 20)


def test_canary_unreadable_judge_is_counted_and_not_scored() -> None:
  result = metrics.reward_model_metrics([[0, 1], [0, 1, 2]], [[None, None], [None, 4, 2]])
  assert result["unreadable"].value == pytest.approx(3 / 5) and result["unreadable"].count == 5
  assert result["pairwise"].value == 1 and result["pairwise"].count == 1
  assert result["exact_match"].count == 2 and result["exact_match"].value == 0  # No whole ordering was given.
  assert result["spearman"].count == 1 and result["spearman"].left_out == 1
  # One prompt alone shows no spread.
  assert result["pairwise"].low is None and result["pairwise"].high is None


def test_the_best_reply_stays_best_when_its_judgement_is_unreadable() -> None:
  result = metrics.reward_model_metrics([[0, 1], [0, 1]], [[None, 5], [5, 1]])
  assert result["five_best"].value == pytest.approx(1 / 2)


def test_the_best_remaining_reply_counts_as_first_where_rank_0_was_filtered_away() -> None:
  assert metrics.reward_model_metrics([[1, 2], [3, 2]], [[5, 4], [5, 4]])["five_best"].value == pytest.approx(1 / 2)


def test_pairs_that_people_tied_are_skipped() -> None:
  result = metrics.reward_model_metrics([[0, 0, 1], [1, 1]], [[3, 5, 2], [4, 1]])
  assert result["pairwise"].count == 2 and result["pairwise"].value == 1
  assert result["tie_rate"].count == 2
  assert result["exact_match"].count == 1 and result["exact_match"].value == 1
  assert result["spearman"].count == 1 and result["spearman"].left_out == 1
  assert result["five_best"].value == 1


def test_exact_match_is_broken_by_an_unreadable_reply() -> None:
  # Of three prompts that people ordered one is whole; in the second the pairs left are right; the fourth has no order.
  ranks, scores = [[0, 1, 2], [0, 1, 2], [0, 1], [1, 1]], [[5, 4, 1], [5, None, 1], [None, None], [3, 2]]
  exact = metrics.reward_model_metrics(ranks, scores)["exact_match"]
  assert (exact.value, exact.count, exact.left_out) == (pytest.approx(1 / 3), 3, 1)


def test_exact_match_is_broken_by_a_tie_and_by_one_wrong_pair() -> None:
  result = metrics.reward_model_metrics([[0, 1, 2]] * 3, [[5, 3, 1], [5, 3, 3], [3, 5, 1]])
  assert result["exact_match"].value == pytest.approx(1 / 3)


def test_prompts_weigh_alike_in_correlations_and_pairs_alike_in_accuracy() -> None:
  # One prompt of four all right (6 pairs), one of two wrong (1 pair).
  result = metrics.reward_model_metrics([[0, 1, 2, 3], [0, 1]], [[4, 3, 2, 1], [1, 2]])
  assert result["pairwise"].value == pytest.approx(6 / 7)
  assert result["spearman"].value == pytest.approx((1 - 1) / 2)


def test_votes_averaged_in_another_order_still_tie() -> None:
  result = metrics.reward_model_metrics([[0, 1]] * 2, [[(0.1 + 0.2 + 0.3) / 3, (0.3 + 0.2 + 0.1) / 3]] * 2)
  assert (0.1 + 0.2 + 0.3) / 3 != (0.3 + 0.2 + 0.1) / 3
  assert result["tie_rate"].value == 1 and result["undefined"].value == 1


def test_five_best_asks_for_the_scales_own_top() -> None:
  ranks, scores = [[0, 1], [0, 1]], [[10, 9], [5, 10]]
  assert metrics.reward_model_metrics(ranks, scores, top=10)["five_best"].value == pytest.approx(1 / 2)
  with pytest.raises(ValueError, match="above the scale's top 5"):
    metrics.reward_model_metrics(ranks, scores)


@pytest.mark.parametrize(
  "ranks, scores, message",
  [
    ([[0, 1]], [], "ranks of 1 prompts but scores of 0"),
    ([[0, 1], [0, 1]], [[1, 2], [3]], "prompt 1: 2 ranks but 1 scores"),
    ([[0, math.nan]], [[1, 2]], "ranks .* must be finite"),
    ([[0, 1]], [[1, math.nan]], "Pass None"),
  ],
)
def test_input_that_cannot_be_is_refused(ranks: list, scores: list, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    metrics.reward_model_metrics(ranks, scores)


def test_no_prompts_give_no_figures() -> None:
  for name, estimate in metrics.reward_model_metrics([], []).items():
    assert estimate == metrics.Estimate(None, None, None, 0), name
  assert metrics.reward_model_metrics([[]], [[]])["undefined"].value == 1


def test_reward_model_metrics_are_quick_and_reproducible() -> None:
  ranks = ranked(600, seed=3)
  rng = np.random.default_rng(4)
  scores = [rng.integers(0, 6, len(prompt)).tolist() for prompt in ranks]
  start = time.process_time()
  first = metrics.reward_model_metrics(ranks, scores, seed=5)
  assert time.process_time() - start < 2.0  # About 0.5 s on an idle core.
  assert first == metrics.reward_model_metrics(ranks, scores, seed=5)
  other = metrics.reward_model_metrics(ranks, scores, seed=6)
  assert values(first) == values(other)
  assert first["pairwise"].low != other["pairwise"].low


def test_interval_agrees_with_the_formula_for_independent_prompts() -> None:
  outcomes = [[float(place % 2)] for place in range(400)]
  estimate = metrics.mean_with_interval(outcomes, resamples=4000)
  half = 1.96 * 0.5 / math.sqrt(400)
  assert estimate.value == pytest.approx(0.5) and estimate.count == 400
  assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.006)
  narrow = metrics.mean_with_interval(outcomes, confidence=0.5, resamples=4000)
  assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * 0.5 / math.sqrt(400), abs=0.006)


def test_interval_agrees_with_scipys_bootstrap_of_a_ratio() -> None:
  rng = np.random.default_rng(7)
  groups = [rng.normal(1, 1, rng.integers(1, 5)).tolist() for _ in range(80)]
  sums, counts = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
  reference = scipy.stats.bootstrap(
      (sums, counts), lambda above, below, axis: above.sum(axis) / below.sum(axis), paired=True, method="percentile",
      n_resamples=4000, rng=np.random.default_rng(8),
  ).confidence_interval  # fmt: skip
  estimate = metrics.mean_with_interval(groups, resamples=4000)
  assert estimate.value == pytest.approx(sums.sum() / counts.sum())
  assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high), abs=0.02)


def test_interval_resamples_prompts_not_responses() -> None:
  rng = np.random.default_rng(9)
  flat = rng.integers(0, 2, 100)
  together = metrics.mean_with_interval([[float(value)] * 9 for value in flat])
  apart = metrics.mean_with_interval([[float(value)] for value in flat for _ in range(9)])
  assert together.value == apart.value
  # Nine copies of one answer are no evidence: the honest interval is three times as wide.
  assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(3, rel=0.2)


def test_mean_with_interval_weighs_values_and_counts_the_missing() -> None:
  estimate = metrics.mean_with_interval([[1.0, 2.0, None], [6.0], [], [None]])
  assert estimate.value == pytest.approx(3.0)
  assert estimate.count == 3 and estimate.left_out == 2
  assert 1.5 <= estimate.low <= 3 <= estimate.high <= 6
  assert metrics.mean_with_interval([]) == metrics.Estimate(None, None, None, 0)
  assert metrics.mean_with_interval([[1.0, 3.0]]) == metrics.Estimate(2.0, None, None, 2)
  with pytest.raises(ValueError, match=r"values\[1\].*finite"):
    metrics.mean_with_interval([[1.0], [math.inf]])


@pytest.mark.parametrize("settings", [{"confidence": 1.0}, {"confidence": 95}, {"resamples": 0}])
def test_impossible_bootstraps_are_refused(settings: dict) -> None:
  with pytest.raises(ValueError, match=next(iter(settings))):
    metrics.mean_with_interval([[1.0], [2.0]], **settings)


@pytest.mark.parametrize(
  "first, second, outcome",
  [
    ("A", "B", 1),
    ("B", "A", -1),
    ("A", "A", 0),
    ("B", "B", 0),
    ("tie", "tie", 0),
    ("A", "tie", 0),
    ("tie", "A", 0),
    (None, "B", None),
    ("A", None, None),
    (None, None, None),
  ],
)
def test_both_orders(first: str | None, second: str | None, outcome: int | None) -> None:
  assert metrics.both_orders(first, second) == outcome


def test_canary_judge_with_a_favourite_place_decides_nothing() -> None:
  result = metrics.duel([[metrics.both_orders("A", "A")] for _ in range(20)])
  assert (result.win, result.tie, result.loss) == (0, 1, 0)
  assert (result.net.low, result.net.value, result.net.high) == (0, 0, 0)


def test_a_verdict_that_is_none_of_the_words_is_refused() -> None:
  with pytest.raises(ValueError, match="'C'"):
    metrics.both_orders("C", "A")


def test_duel_worked_out_by_hand() -> None:
  result = metrics.duel([[1, 1, 0, -1], [1, 0], [], [-1, 1]])
  assert (result.win, result.tie, result.loss) == (4 / 8, 2 / 8, 2 / 8)
  assert result.net.value == pytest.approx(2 / 8)
  assert result.prompts == 3 and result.comparisons == 8 and result.net.count == 8
  assert 0 <= result.net.low <= 2 / 8 <= result.net.high <= 1 / 2


def test_duel_of_the_papers_size_tells_a_win_from_a_draw() -> None:
  # Paper: M2-M1 142 : 84 : 30 and M1-SFT 78 : 99 : 79 of 256 prompts.
  won = metrics.duel([[1]] * 142 + [[0]] * 84 + [[-1]] * 30)
  drawn = metrics.duel([[1]] * 78 + [[0]] * 99 + [[-1]] * 79)
  spread = math.sqrt((142 + 30) / 256 - (112 / 256) ** 2) / math.sqrt(256)
  assert won.net.value == pytest.approx(112 / 256)
  assert won.net.low == pytest.approx(112 / 256 - 1.96 * spread, abs=0.02)
  assert drawn.net.low < 0 < drawn.net.high


def test_canary_a_model_against_itself_swaps_sign_with_the_sides() -> None:
  outcomes = [[1, 0], [-1, -1], [0, 1], [1, 1]]
  ours = metrics.duel(outcomes)
  theirs = metrics.duel([[-outcome for outcome in group] for group in outcomes])
  assert (ours.win, ours.loss) == (theirs.loss, theirs.win)
  assert (ours.net.value, ours.net.low, ours.net.high) == pytest.approx(
    (-theirs.net.value, -theirs.net.high, -theirs.net.low)
  )


def test_duel_without_comparisons_and_with_an_unreadable_one() -> None:
  empty = metrics.duel([[], []])
  assert (empty.win, empty.tie, empty.loss, empty.net.value, empty.prompts) == (None, None, None, None, 0)
  for wrong in (None, 2, 0.5):
    with pytest.raises(ValueError, match=r"outcomes\[1\]"):
      metrics.duel([[1], [wrong]])


def test_histogram_of_whole_scores_and_of_averaged_votes() -> None:
  assert metrics.histogram([0, 5, 5, 4, None], 0, 5) == metrics.Histogram((0, 1, 2, 3, 4, 5), (1, 0, 0, 0, 1, 2), 1)
  votes = metrics.histogram([total / 3 for total in range(16)], 0, 5, step=1 / 3)
  assert votes.counts == (1,) * 16
  assert votes.centres == pytest.approx([total / 3 for total in range(16)])
  assert metrics.histogram([1.5, 1.49], 1, 5).counts == (1, 1, 0, 0, 0)
  assert metrics.histogram([], 1, 2) == metrics.Histogram((1, 2), (0, 0), 0)


@pytest.mark.parametrize("step", [0, -1, 0.3, 10])
def test_histogram_refuses_a_step_that_does_not_divide_the_scale(step: float) -> None:
  with pytest.raises(ValueError, match="step"):
    metrics.histogram([1], 0, 5, step=step)


@pytest.mark.parametrize("score", [-0.1, 6, math.nan])
def test_histogram_refuses_scores_outside_the_scale(score: float) -> None:
  with pytest.raises(ValueError, match="outside the scale"):
    metrics.histogram([1, score], 0, 5)


def test_length_summary() -> None:
  assert metrics.length_summary(range(1, 12)) == metrics.LengthSummary(mean=6, median=6, p90=10, count=11)
  assert metrics.length_summary([0, 10]) == metrics.LengthSummary(mean=5, median=5, p90=9, count=2)
  assert metrics.length_summary([]) == metrics.LengthSummary(None, None, None, 0)
  with pytest.raises(ValueError, match="-3"):
    metrics.length_summary([4, -3])


def test_estimates_are_frozen_and_plain() -> None:
  estimate = metrics.duel([[1], [0]]).net
  with pytest.raises(dataclasses.FrozenInstanceError):
    estimate.value = 0.0
  assert {type(value) for value in dataclasses.asdict(estimate).values()} == {float, int}
