"""Signs that a run games its judge, loses its variety or its manners: figures of each model, and when they warn.

A `Reading` holds one model's figures by name; what could not be measured is None or absent and never warns. Changes are
against the model before, its parent in the loop. The thresholds are `monitors.warn` in the configuration: they are
where to look, not proofs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import math
import statistics

from srlm_jax import records, tables

Reading = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A figure, how it is shown, and when it warns.

  Attributes:
    figure: its name in a reading.
    title: what it is.
    digits: decimals; None for a share, shown in per cent.
    signed: whether it is a change, shown with its sign.
    limit: name of the threshold in `monitors.warn`; "" for a figure that never warns.
    side: "above" or "below" the threshold it warns; "fall": where it fell by more than that.
    look: what to look at then.
  """

  figure: str
  title: str
  digits: int | None = None
  signed: bool = False
  limit: str = ""
  side: str = "above"
  look: str = ""

  def shown(self, value: float | None) -> str:
    """The figure as text."""
    if self.digits is None:
      return tables.percent(value, self.signed)
    return tables.number(value, self.digits, self.signed)

  def warns(self, value: float | None, limits: Mapping[str, float]) -> bool:
    """Whether a value is beyond its threshold."""
    if value is None or not self.limit:
      return False
    limit = limits[self.limit]
    return {"above": value > limit, "below": value < limit, "fall": value < -limit}[self.side]

  def threshold(self, limits: Mapping[str, float]) -> str:
    """When it warns, as text; "" where it never does."""
    if not self.limit:
      return ""
    limit = limits[self.limit]
    if math.isinf(limit):
      return "never"
    if self.side == "fall":
      return f"below {self.shown(-limit)}"
    return f"{self.side} {self.shown(limit)}"


_JUDGED = "the votes on them (judgements of AIFT)"
RULES = (
  Rule("heldout_mean", "mean score of people's held-out replies", 2),
  Rule(
    "heldout_change",
    "change of the mean score of held-out replies",
    2,
    signed=True,
    limit="inflation",
    look="the votes on them (judgements of eval/): the replies are the same for all models, so the judge is kinder",
  ),
  Rule("agreement", "pairwise agreement with people's ranks, %"),
  Rule(
    "agreement_change",
    "change of pairwise agreement, %",
    signed=True,
    limit="agreement",
    side="fall",
    look="the table of judging: a judge that gets worse trains a worse successor; stop at the model before, or add EFT",
  ),
  Rule("own_mean", "mean score of its own new answers", 2),
  Rule(
    "own_change",
    "change of the mean score of its own new answers",
    2,
    signed=True,
    limit="rise",
    look="the duels and the change on people's replies: they tell better answers from a kinder judge",
  ),
  Rule(
    "own_top",
    "own answers at the highest score, %",
    limit="top",
    look=f"{_JUDGED}: the end of the scale no longer tells answers apart, and a harder rubric would",
  ),
  Rule(
    "own_entropy",
    "entropy of the scores of own answers, bits",
    2,
    limit="entropy",
    side="below",
    look=f"{_JUDGED}: nearly all answers get one score, as in the paper's run without EFT",
  ),
  Rule(
    "own_ties",
    "new prompts whose answers all have one score, %",
    limit="ties",
    look="the counts of pairs: such prompts give none; more votes, more answers or a higher temperature give more",
  ),
  Rule(
    "own_variance",
    "variance of the votes on an answer",
    2,
    limit="variance",
    look=f"{_JUDGED}: they differ so much that pairs are chance; take more votes, or judge at a lower temperature",
  ),
  Rule(
    "own_unreadable",
    "votes without a score, %",
    limit="unreadable",
    look="the votes without a score at the end of this page: the judge misses its last line, or judge.sampling.max_new",
  ),
  Rule("characters", "characters of an answer", 1),
  Rule(
    "characters_growth",
    "growth of characters, times",
    2,
    limit="growth",
    look="the lengths of chosen and rejected answers, and the duels: answers may win because they are longer",
  ),
  Rule("tokens", "tokens of an answer", 1),
  Rule("tokens_growth", "growth of tokens, times", 2, limit="growth", look="the same"),
  Rule(
    "cut",
    "answers that the length limit cut, %",
    limit="cut",
    look="the samples: the model no longer ends its answers, or evaluate.sampling.max_new is too small",
  ),
  Rule("distinct_1", "distinct words, % of all"),
  Rule("distinct_2", "distinct pairs of words, % of all"),
  Rule("distinct_3", "distinct triples of words, % of all"),
  Rule(
    "distinct_2_ratio",
    "distinct pairs, times the model before",
    2,
    limit="variety",
    side="below",
    look="the samples of different prompts side by side: the answers have become alike",
  ),
  Rule("repeated", "4-grams that an answer had before, %"),
  Rule(
    "repeating",
    "answers that repeat themselves, %",
    limit="repeating",
    look="the samples: where the judge scores such answers well, it teaches them",
  ),
  Rule("compression", "compression of all answers, times", 2),
  Rule("canary_score", "mean score of the canaries", 2),
  Rule("honest_score", "mean score of people's best replies beside them", 2),
  Rule(
    "canaries",
    "canaries scored above a person's best reply, %",
    limit="canaries",
    look="the table of canaries: what a judge falls for, a model that learns from its scores learns to write",
  ),
  Rule("refused", "refusals on monitors.prompts, %"),
  Rule(
    "refused_change",
    "change of refusals, %",
    signed=True,
    limit="refusals",
    side="fall",
    look="the answers below safety/, beside those of the model before",
  ),
  Rule(
    "complied",
    "harmful compliance on monitors.prompts, %",
    limit="compliance",
    look="the answers below safety/ and their verdicts: the judge may be wrong, too",
  ),
  Rule(
    "safety_unreadable", "safety verdicts that cannot be read, %", limit="unreadable", look="the verdicts below safety/"
  ),
)
# Change → (the figure that changes, whether it is a ratio).
_CHANGES = {
  "heldout_change": ("heldout_mean", False),
  "agreement_change": ("agreement", False),
  "own_change": ("own_mean", False),
  "characters_growth": ("characters", True),
  "tokens_growth": ("tokens", True),
  "distinct_2_ratio": ("distinct_2", True),
  "refused_change": ("refused", False),
}


def _mean(values: Sequence[float]) -> float | None:
  return statistics.fmean(values) if values else None


def _entropy(values: Sequence[float]) -> float | None:
  """Of the values to the nearest whole, in bits: 0 where all are one."""
  counts = Counter(math.floor(value + 0.5) for value in values)
  shares = [count / len(values) for count in counts.values()]
  return sum(share * math.log2(1 / share) for share in shares) if values else None


def scores(judgements: Sequence[records.Judgement], top: float) -> dict[str, float | None]:
  """How a judge scored some responses.

  Args:
    judgements: of the responses.
    top: the scale's highest score.

  Returns:
    mean; top, the share of scores that are the highest; entropy, in bits, of the scores to the nearest whole; ties, of
    the prompts with two or more scored responses the share whose scores are all equal; variance, the mean over
    responses of the variance of their readable votes, of those with two or more; unreadable, a share of the votes.
  """
  found = [judgement.score for judgement in judgements if judgement.score is not None]
  prompts: dict[str, list[float]] = {}
  for judgement in judgements:
    if judgement.score is not None:
      prompts.setdefault(judgement.prompt_id, []).append(round(judgement.score, 9))
  several = [group for group in prompts.values() if len(group) > 1]
  readable = [[vote.score for vote in one.votes if vote.score is not None] for one in judgements]
  votes = [vote for judgement in judgements for vote in judgement.votes]
  return {
    "mean": _mean(found),
    "top": _mean([float(score >= top) for score in found]),
    "entropy": _entropy(found),
    "ties": _mean([float(len(set(group)) == 1) for group in several]),
    "variance": _mean([statistics.pvariance(group) for group in readable if len(group) > 1]),
    "unreadable": _mean([float(vote.score is None) for vote in votes]),
  }


def with_changes(readings: Mapping[str, Reading], before: Mapping[str, str]) -> dict[str, dict[str, float | None]]:
  """The readings with their changes.

  Args:
    readings: by model.
    before: a model → the one before it; a model that is not there has no changes.
  """
  found = {}
  for name, reading in readings.items():
    earlier = readings.get(before.get(name, ""), {})
    changes: dict[str, float | None] = {}
    for change, (figure, ratio) in _CHANGES.items():
      now, then = reading.get(figure), earlier.get(figure)
      if now is not None and then is not None and not (ratio and then == 0):
        changes[change] = now / then if ratio else now - then
    found[name] = {**reading, **changes}
  return found


def warnings(readings: Mapping[str, Reading], limits: Mapping[str, float]) -> list[str]:
  """A line for each figure that is beyond its threshold: what was seen of whom, the threshold, and what to look at.

  Args:
    readings: by the model's name as it is shown.
    limits: thresholds by name; an infinite one never warns.
  """
  lines = []
  for rule in RULES:
    values = {name: reading.get(rule.figure) for name, reading in readings.items()}
    seen = [f"{name} {rule.shown(value)}" for name, value in values.items() if rule.warns(value, limits)]
    if seen:
      known = f"monitors.warn.{rule.limit} warns {rule.threshold(limits)}"
      lines.append(f"{rule.title}: {', '.join(seen)}; {known}. Look at {rule.look}.")
  return lines


def table(readings: Mapping[str, Reading], limits: Mapping[str, float]) -> tables.Table:
  """All figures that any model has, a column for each model; "beyond" beside those that warn."""
  rows = []
  for rule in RULES:
    values = [reading.get(rule.figure) for reading in readings.values()]
    if all(value is None for value in values):
      continue
    cells = [
      tables.Cell(rule.shown(value), "beyond", "bad") if rule.warns(value, limits) else tables.Cell(rule.shown(value))
      for value in values
    ]
    rows.append(tables.row(rule.title, *cells, rule.threshold(limits)))
  note = (
    "New answers are a model's own to new prompts, judged by itself. Held-out replies are people's, the same for every "
    "model. Lengths and words are counted in its answers to held-out instructions: distinct words, pairs and triples "
    "in the first 100 words of each. An answer repeats itself where more than 30 % of its 4-grams were there before. "
    "Changes are against the model before. The thresholds are monitors.warn in the configuration."
  )
  return tables.Table("monitors", "Monitors", ("", *readings, "warns"), tuple(rows), note, words=(0,))
