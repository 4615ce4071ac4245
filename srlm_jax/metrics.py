"""How good a judge is against people, and one model against another (the paper's "Evaluation Metrics"): pure numbers.

Every figure is an `Estimate`: its value, a bootstrap interval, and what it rests on. The interval resamples prompts,
not responses or pairs, because those of one prompt are not independent; it is a percentile interval, seeded and hence
reproducible. A figure that rests on nothing is None, never 0 or NaN.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np
import scipy.stats

# Means of votes that are equal on paper may differ in their last bit; scores are compared after rounding to this.
_DECIMALS = 9


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A share or a mean over `count` things, with its interval.

  Attributes:
    value: the figure; None where `count` is 0.
    low: lower end of the interval; None where fewer than two prompts contribute, as one prompt shows no spread.
    high: upper end of it.
    count: the denominator: pairs, prompts, responses or values.
    left_out: how many such things could not enter and are missing from `count`: tied, undefined or unreadable ones.
  """

  value: float | None
  low: float | None
  high: float | None
  count: int
  left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Duel:
  """One model against another: shares of the comparisons (they sum to 1; None without any), and win minus loss."""

  win: float | None
  tie: float | None
  loss: float | None
  net: Estimate
  prompts: int  # Those with at least one comparison.
  comparisons: int


@dataclasses.dataclass(frozen=True)
class Histogram:
  """How many scores lie nearest to each centre; `unreadable` counts the responses without a score."""

  centres: tuple[float, ...]
  counts: tuple[int, ...]
  unreadable: int


@dataclasses.dataclass(frozen=True)
class LengthSummary:
  """Lengths in the caller's unit (alpaca_eval counts characters); None where there are none."""

  mean: float | None
  median: float | None
  p90: float | None
  count: int


def _ratio_estimates(
  numerators: np.ndarray, denominators: np.ndarray, confidence: float, resamples: int, seed: int
) -> list[Estimate]:
  """Ratios of sums over prompts, each with its percentile bootstrap interval.

  Args:
    numerators: (prompts, figures) what each prompt adds to the top of each figure.
    denominators: (prompts, figures) what it adds to the bottom; 0 where it says nothing about that figure.
    confidence: of the interval, in (0, 1).
    resamples: number of bootstrap samples; all figures share them.
    seed: of the resampling.
  """
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does.")
  if resamples < 1:
    raise ValueError(f"resamples={resamples} must be at least 1; 1000 is usual.")
  prompts, figures = numerators.shape
  table = np.concatenate([numerators, denominators], axis=1)
  totals = table.sum(axis=0)
  sums = np.zeros((resamples, 2 * figures))
  rng = np.random.default_rng(seed)
  for row in range(resamples if prompts else 0):
    # How often each prompt was drawn: one product then serves all figures, in memory that does not grow with resamples.
    sums[row] = np.bincount(rng.integers(prompts, size=prompts), minlength=prompts) @ table
  tail = (1 - confidence) / 2
  estimates = []
  for top, bottom in zip(range(figures), range(figures, 2 * figures), strict=True):
    value = float(totals[top] / totals[bottom]) if totals[bottom] else None
    low = high = None
    if np.count_nonzero(denominators[:, top]) >= 2:
      drawn = sums[:, bottom] > 0  # A resample may miss every prompt that says something.
      if drawn.any():
        ratios = sums[drawn, top] / sums[drawn, bottom]
        low, high = (float(end) for end in np.quantile(ratios, [tail, 1 - tail]))
    estimates.append(Estimate(value, low, high, count=int(totals[bottom])))
  return estimates


def mean_with_interval(
  values: Sequence[Sequence[float | None]], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Estimate:
  """The mean of all values, which come grouped by prompt; None among them is left out and counted.

  Every value weighs the same, so a prompt with more values weighs more. `count` is the number of values.
  """
  kept = [[value for value in group if value is not None] for group in values]
  for place, group in enumerate(kept):
    if not np.isfinite(group).all():
      raise ValueError(f"values[{place}]={group} must be finite. Pass None for a missing value.")
  sums = np.array([[float(sum(group))] for group in kept]).reshape(-1, 1)
  counts = np.array([[float(len(group))] for group in kept]).reshape(-1, 1)
  [estimate] = _ratio_estimates(sums, counts, confidence, resamples, seed)
  return dataclasses.replace(estimate, left_out=sum(map(len, values)) - estimate.count)


def _check_prompt(place: int, ranks: Sequence[float], scores: Sequence[float | None], top: float) -> None:
  """ValueError where the ranks and scores of one prompt cannot be what they are said to be."""
  if len(ranks) != len(scores):
    raise ValueError(f"prompt {place}: {len(ranks)} ranks but {len(scores)} scores. Give one of each per response.")
  if not np.isfinite(np.asarray(ranks, float)).all():
    raise ValueError(f"prompt {place}: ranks {list(ranks)} must be finite. Leave unranked responses out.")
  for score in scores:
    if score is not None and not np.isfinite(score):
      raise ValueError(f"prompt {place}: score {score} must be finite. Pass None for an unreadable judgement.")
    if score is not None and score > top + 10.0**-_DECIMALS:
      raise ValueError(f"prompt {place}: score {score} is above the scale's top {top}. Pass the rubric's own top.")


def _correlations(quality: np.ndarray, scores: np.ndarray) -> tuple[float, float] | None:
  """Spearman's rho and Kendall's tau-b; None where undefined: fewer than two responses, or either side constant."""
  if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(quality) == 0:
    return None
  spearman = scipy.stats.spearmanr(quality, scores).statistic
  kendall = scipy.stats.kendalltau(quality, scores).statistic
  return float(spearman), float(kendall)


# The columns of the table that the reward-model metrics divide, and which columns each metric divides.
_COLUMNS = (
    "right", "decided", "tied", "pairs", "exact", "ordered", "spearman", "kendall", "defined", "undefined", "best_top",
    "top", "unreadable", "responses", "prompts",
)  # fmt: skip
_RATIOS = {
  "pairwise": ("right", "decided"),
  "pairwise_strict": ("right", "pairs"),
  "tie_rate": ("tied", "pairs"),
  "exact_match": ("exact", "ordered"),
  "spearman": ("spearman", "defined"),
  "kendall": ("kendall", "defined"),
  "five_best": ("best_top", "top"),
  "unreadable": ("unreadable", "responses"),
  "undefined": ("undefined", "prompts"),
}


def _count_prompt(ranks: Sequence[float], scores: Sequence[float | None], top: float) -> dict[str, float]:
  """What one prompt adds to each of `_COLUMNS`."""
  readable = [place for place, score in enumerate(scores) if score is not None]
  quality = -np.asarray([ranks[place] for place in readable], float)  # Rank 0 is best, so larger is better now.
  given = np.round(np.asarray([scores[place] for place in readable], float), _DECIMALS)
  first, second = np.triu_indices(len(readable), k=1)
  people = np.sign(quality[first] - quality[second])
  judge = np.sign(given[first] - given[second])[people != 0]
  people = people[people != 0]  # Where people saw no difference there is nothing to get right.
  ordered = len(set(ranks)) > 1
  pairs, right, tied = len(people), int((judge == people).sum()), int((judge == 0).sum())
  correlations = _correlations(quality, given)
  spearman, kendall = correlations or (0.0, 0.0)
  at_top = given == np.round(top, _DECIMALS)
  # First among all replies of the prompt, those included whose judgement was unreadable.
  best = quality == -min(ranks, default=0.0)
  return {
      "right": right, "decided": pairs - tied, "tied": tied, "pairs": pairs,
      "exact": float(ordered and right == pairs and len(readable) == len(scores)), "ordered": float(ordered),
      "spearman": spearman, "kendall": kendall, "defined": float(correlations is not None),
      "undefined": float(correlations is None), "best_top": int((at_top & best).sum()), "top": int(at_top.sum()),
      "unreadable": len(scores) - len(readable), "responses": len(scores), "prompts": 1.0,
  }  # fmt: skip


def reward_model_metrics(
  ranks: Sequence[Sequence[float]],
  scores: Sequence[Sequence[float | None]],
  confidence: float = 0.95,
  resamples: int = 1000,
  seed: int = 0,
  top: float = 5.0,
) -> dict[str, Estimate]:
  """Agreement of a judge's scores with people's rankings (the paper's reward-model metrics).

  A response without a score is left out of its prompt. A pair that people ranked equal is skipped throughout.

    pairwise: of the pairs that the judge did not tie, the share ordered as people ordered them; ties in `left_out`.
    pairwise_strict: the same share of all pairs, a tie being wrong.
    tie_rate: the share of pairs that the judge tied.
    exact_match: of the prompts whose responses people ordered, the share whose every pair is ordered as people did; a
      tie breaks it, and so does a response without a score.
    spearman, kendall: mean over prompts of Spearman's rho and Kendall's tau-b between human quality and score. A prompt
      where they are undefined (one response, all scores equal, all ranks equal) is in `left_out`, not averaged as 0.
    five_best: of the responses with the scale's highest score, the share that people ranked first in their prompt.
    unreadable: the share of responses without a score.
    undefined: the share of prompts whose correlations are undefined.

  Args:
    ranks: human ranks per prompt and response, 0 best, possibly tied.
    scores: the judge's scores in the same order, larger is better; None where unreadable.
    confidence: of the bootstrap intervals over prompts.
    resamples: number of bootstrap samples.
    seed: of the bootstrap.
    top: the scale's highest score, 5 in the paper.
  """
  if len(ranks) != len(scores):
    raise ValueError(f"ranks of {len(ranks)} prompts but scores of {len(scores)}. Give both for each prompt.")
  for place, (prompt_ranks, prompt_scores) in enumerate(zip(ranks, scores, strict=True)):
    _check_prompt(place, prompt_ranks, prompt_scores, top)
  rows = [_count_prompt(*prompt, top) for prompt in zip(ranks, scores, strict=True)]
  columns = {name: np.array([row[name] for row in rows], float) for name in _COLUMNS}
  numerators = np.stack([columns[above] for above, _ in _RATIOS.values()], axis=1)
  denominators = np.stack([columns[below] for _, below in _RATIOS.values()], axis=1)
  estimates = _ratio_estimates(numerators, denominators, confidence, resamples, seed)
  metrics = dict(zip(_RATIOS, estimates, strict=True))
  total = {name: int(column.sum()) for name, column in columns.items() if name not in ("spearman", "kendall")}
  left_out = {
    "pairwise": total["tied"],
    "exact_match": total["prompts"] - total["ordered"],
    "spearman": total["undefined"],
    "kendall": total["undefined"],
  }
  return {name: dataclasses.replace(estimate, left_out=left_out.get(name, 0)) for name, estimate in metrics.items()}


def both_orders(first: str | None, second: str | None) -> int | None:
  """The outcome of judging two answers in both orders: +1 our answer won, 0 tie, -1 it lost (the paper's head-to-head).

  Args:
    first: verdict with our answer shown as A: "A", "B", "tie", or None where unreadable.
    second: verdict with our answer shown as B.

  Returns:
    None where either is unreadable, for the caller to count. Verdicts that disagree are a tie, so that a judge with a
    liking for a place decides nothing.
  """
  for verdict in (first, second):
    if verdict not in ("A", "B", "tie", None):
      raise ValueError(f'verdict {verdict!r} must be "A", "B", "tie" or None. Parse the judgement first.')
  if first is None or second is None:
    return None
  if (first, second) == ("A", "B"):
    return 1
  if (first, second) == ("B", "A"):
    return -1
  return 0


def duel(outcomes: Sequence[Sequence[int]], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Duel:
  """Head to head over comparisons grouped by prompt: +1 a win, 0 a tie, -1 a loss; the interval resamples prompts."""
  for place, group in enumerate(outcomes):
    if any(outcome not in (-1, 0, 1) for outcome in group):
      raise ValueError(f"outcomes[{place}]={list(group)} must be +1, 0 or -1. Leave out unreadable ones.")
  net = mean_with_interval(outcomes, confidence=confidence, resamples=resamples, seed=seed)
  flat = [outcome for group in outcomes for outcome in group]
  win, tie, loss = (flat.count(outcome) / len(flat) if flat else None for outcome in (1, 0, -1))
  return Duel(win, tie, loss, net, prompts=sum(len(group) > 0 for group in outcomes), comparisons=len(flat))


def histogram(scores: Sequence[float | None], low: float, high: float, step: float = 1.0) -> Histogram:
  """Counts scores by the nearest of low, low + step, …, high; midway goes up.

  The means of n votes on whole numbers are exactly the centres of step = 1 / n.
  """
  bins = (high - low) / step if step > 0 else -1.0
  if bins < 1 or not np.isclose(bins, round(bins)):
    raise ValueError(f"step={step} must be positive and divide the scale {low} … {high} evenly. Change step.")
  readable = np.array([score for score in scores if score is not None], float)
  outside = readable[~((readable >= low) & (readable <= high))]
  if outside.size:
    raise ValueError(f"score {outside[0]} is outside the scale {low} … {high}. Pass the rubric's own ends.")
  # Rounded first: 1/3 on a grid of 1/6 must not fall below its own centre for a last bit.
  places = np.floor(np.round((readable - low) / step, _DECIMALS) + 0.5).astype(int)
  counts = np.bincount(places, minlength=round(bins) + 1)
  centres = np.linspace(low, high, round(bins) + 1)
  return Histogram(tuple(centres.tolist()), tuple(counts.tolist()), unreadable=len(scores) - len(readable))


def length_summary(lengths: Sequence[int]) -> LengthSummary:
  """Mean, median and 90th percentile (linear between neighbours) of some lengths."""
  if any(length < 0 for length in lengths):
    raise ValueError(f"length {min(lengths)} is negative. Pass numbers of characters or tokens.")
  if not lengths:
    return LengthSummary(None, None, None, 0)
  median, p90 = np.quantile(lengths, [0.5, 0.9])
  return LengthSummary(float(np.mean(lengths)), float(median), float(p90), len(lengths))
