"""What the evaluations of a run say, as tables and as claims of the paper that hold here or do not."""

from collections.abc import Mapping, Sequence
from typing import Any

from srlm_jax import paper, tables
from srlm_jax.lineage import label
from srlm_jax.tables import Cell, Table

# Model name → the facts that the evaluate stage committed, in the order of the models: baseline, m1, m2, …
Measured = Mapping[str, Mapping[str, Any]]

# Metric → its name and its decimals; None for a share, shown in per cent.
METRICS: dict[str, tuple[str, int | None]] = {
  "pairwise": ("pairwise accuracy, %", None),
  "five_best": ("5-best, %", None),
  "exact_match": ("exact match, %", None),
  "spearman": ("Spearman", 3),
  "kendall": ("Kendall τ", 3),
  "pairwise_strict": ("pairwise, a tie is wrong, %", None),
  "tie_rate": ("tied pairs, %", None),
  "unreadable": ("responses without a score, %", None),
  "undefined": ("prompts without a correlation, %", None),
}
DEFINITIONS = (
  "Pairwise accuracy: of the pairs of replies that the judge did not tie, the share ordered as people ordered them; "
  "the strict variant counts a tie as wrong. 5-best: of the replies with the full score, the share that people ranked "
  "first. Exact match: prompts whose every pair is ordered as people did. Spearman and Kendall τ-b: mean over prompts; "
  "those where all scores are equal have none and are left out (last line). Replies without a readable judgement are "
  "left out of their prompt and break its exact match. Brackets: 95 % bootstrap interval over prompts."
)
TRUTH: dict[str, tuple[str, int | None]] = {
  "score": ("oracle, of 5", 2),
  "perfect": ("perfect, %", None),
  "content": ("content right, %", None),
}


def following_table(measured: Measured) -> Table:
  """How well each model follows instructions, and how long its answers are."""
  truth = TRUTH if all("oracle" in facts for facts in measured.values()) else {}
  rows = []
  for name, facts in measured.items():
    rows.append(
      tables.row(
        label(name),
        *(tables.estimate(facts["oracle"][key], digits) for key, (_, digits) in truth.items()),
        *(tables.number(facts["characters"][key], 1) for key in ("mean", "median", "p90")),
        tables.number(facts["tokens"]["mean"], 1),
        Cell(tables.number(facts["cut"]), f"of {facts['answers']:,}"),
        tables.number(paper.CHARACTERS.get(name)),
      )
    )
  sizes = (
    "characters, mean",
    "median",
    "90th percentile",
    "tokens, mean",
    "cut by the limit",
    "characters in the paper",
  )
  columns = ("model", *(title for title, _ in truth.values()), *sizes)
  note = "The paper's lengths are AlpacaEval 2.0's. Content right: share of an instruction's parts that are complete."
  return Table("following", "Held-out instructions", columns, tuple(rows), note, paper=(len(columns) - 1,))


def duel_facts(measured: Measured) -> dict[tuple[str, str], Mapping[str, Any]]:
  """(model, other) → their duel; each model's predecessor first."""
  return {
    (name, other): found
    for name, facts in measured.items()
    for other, found in sorted(facts.get("duels", {}).items(), key=lambda item: item[0], reverse=True)
    if found["win"] is not None
  }


def judges(measured: Measured) -> str:
  """Who decided the duels, by what the evaluations say; "" where they do not."""
  names = [found["judge"] for found in duel_facts(measured).values() if "judge" in found]
  return " and ".join(label(name) for name in dict.fromkeys(names))


def duels_table(measured: Measured, grader: str) -> Table:
  """Head to head, beside the paper's."""
  rows = []
  for (name, other), found in duel_facts(measured).items():
    theirs = paper.DUELS.get((name, other), (None,) * 3)
    ours = [tables.percent(found[key]) for key in ("win", "tie", "loss")]
    counts = Cell(tables.number(found["comparisons"]), f"on {found['prompts']:,} prompts")
    rows.append(
      tables.row(
        f"{label(name)} over {label(other)}",
        *ours,
        tables.estimate(found["net"], signed=True),
        counts,
        tables.number(found["unreadable"]),
        *(tables.percent(share) for share in theirs),
      )
    )
  columns = ("", "win, %", "tie, %", "loss, %", "win − loss", "comparisons", "unreadable", "win", "tie", "loss")
  who = judges(measured) or {"oracle": "the world's oracle", "judge": "a judge model"}.get(grader, grader)
  orders = "" if grader == "oracle" else ", each pair in both orders, a disagreement being a tie"
  note = f"Decided by {who}{orders}; the paper's by GPT-4 on 256 prompts. "
  note += "An interval that does not hold 0 is a difference."
  if spent := [facts["endpoint"] for facts in measured.values() if "endpoint" in facts]:
    replies, tokens_in, tokens_out, cost = (
      sum(one[key] for one in spent) for key in ("replies", "tokens_in", "tokens_out", "cost")
    )
    price = f", cost {cost:,.2f}" if cost else ""
    asked = sum(one.get("asked", 0) for one in spent)
    of = f" of {asked:,}, those in this cache" if replies < asked else ""
    note += f" {replies:,} verdicts of the endpoint{of}: {tokens_in:,} tokens in, {tokens_out:,} out{price}."
  return Table("duels", "Head to head", columns, tuple(rows), note, paper=(7, 8, 9))


def judging_table(measured: Measured) -> Table:
  """The five reward-model metrics of each model and what qualifies them, beside the paper's Table 4."""
  theirs = ("baseline", "m1", "m2", "m3", "five_bucket")
  rows = []
  for metric, (title, digits) in METRICS.items():
    ours = [tables.estimate(facts["judge"]["metrics"][metric], digits) for facts in measured.values()]
    known = [paper.JUDGING.get(metric, {}).get(name) for name in theirs]
    quoted = [tables.percent(value) if digits is None else tables.number(value, digits) for value in known]
    rows.append(tables.row(title, *ours, *quoted))
  heads = ("SFT", "M1", "M2", "M3", "SFT, 5 grades")
  columns = ("", *(label(name) for name in measured), *heads)
  places = tuple(range(1 + len(measured), len(columns)))
  return Table("judging", "Agreement with people's ranks", columns, tuple(rows), DEFINITIONS, paper=places)


def expected_table(measured: Measured) -> Table:
  """The reward-model metrics of scores from the probabilities of the digits, beside those of sampled votes."""
  rows = []
  for metric, (title, digits) in METRICS.items():
    if metric == "five_best":  # An expected score is never a full 5.
      continue
    for how, facts_of in (("sampled votes", "judge"), ("expected score", "expected")):
      ours = [tables.estimate(facts[facts_of]["metrics"][metric], digits) for facts in measured.values()]
      rows.append(tables.row(f"{title}, {how}", *ours))
  columns = ("", *(label(name) for name in measured))
  return Table("expected", "Two ways to score: sampled votes, and the digits' probabilities", columns, tuple(rows))


def votes_table(measured: Measured) -> Table:
  """How many votes on held-out replies were readable, and why the others were not."""
  reasons = sorted({reason for facts in measured.values() for reason in facts["judge"]["votes"]} - {"readable"})
  rows = [
    tables.row(
      label(name), *(tables.number(facts["judge"]["votes"].get(reason, 0)) for reason in ("readable", *reasons))
    )
    for name, facts in measured.items()
  ]
  return Table("votes", "Votes on held-out replies", ("model", "readable", *reasons), tuple(rows))


def _above(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Cell:
  """Whether `upper` is above `lower` beyond both intervals."""
  if None in (lower["low"], upper["low"]):
    return Cell("open: one of them has no readable votes", tone="open")
  if upper["low"] > lower["high"]:
    return Cell("yes", tone="good")
  if upper["high"] < lower["low"]:
    return Cell("no, the other way round", tone="bad")
  return Cell("open: the intervals overlap", tone="open")


def _net(found: Mapping[str, Any]) -> Cell:
  """Whether a duel is won beyond its interval."""
  net = found["net"]
  if net["low"] is None:
    return Cell("not measured", tone="open")
  if net["low"] > 0:
    return Cell("yes", tone="good")
  return (
    Cell("no, the other way round", tone="bad") if net["high"] < 0 else Cell("open: the interval holds 0", tone="open")
  )


def _arrow(values: Sequence[str]) -> str:
  return " → ".join(values)


def _judge_claim(lower: str, upper: str, measured: Measured) -> tuple[Cell, ...]:
  estimates = [measured[name]["judge"]["metrics"]["pairwise"] for name in (lower, upper)]
  here = _arrow([tables.percent(one["value"]) for one in estimates])
  theirs = _arrow([tables.percent(paper.JUDGING["pairwise"].get(name)) for name in (lower, upper)])
  return tables.row(
    f"{label(upper)} judges better than {label(lower)} (pairwise accuracy, %)", here, theirs, _above(*estimates)
  )


def _duel_claim(lower: str, upper: str, measured: Measured) -> tuple[Cell, ...] | None:
  found, theirs = duel_facts(measured).get((upper, lower)), paper.DUELS.get((upper, lower))
  if not found:
    return None
  verdict, than = _net(found), f"better than {label(lower)}"
  if upper == "m1":  # EFT must not cost the other skill: the paper finds M1 and the baseline on a par.
    than = f"no worse than {label(lower)}"
    kinder = {"good": Cell("yes, even better", tone="good"), "bad": Cell("no, worse", tone="bad")}
    if found["net"]["low"] is not None:
      verdict = kinder.get(verdict.tone, Cell("no difference seen", tone="good"))
  here = f"{tables.percent(found['win'])} : {tables.percent(found['loss'])}"
  quoted = f"{tables.percent(theirs[0])} : {tables.percent(theirs[2])}" if theirs else tables.MISSING
  return tables.row(f"{label(upper)} answers {than} (win : loss, %)", here, quoted, verdict)


def _length_claim(lower: str, upper: str, measured: Measured) -> tuple[Cell, ...]:
  before, after = (measured[name]["characters"]["mean"] for name in (lower, upper))
  theirs = _arrow([tables.number(paper.CHARACTERS.get(name)) for name in (lower, upper)])
  verdict = "not measured"
  if before and after:
    growth = after / before
    verdict = f"{'about the same' if abs(growth - 1) < 0.02 else 'yes' if growth > 1 else 'no'}, × {growth:.2f}"
  here = _arrow([tables.number(before, 1), tables.number(after, 1)])
  return tables.row(f"{label(upper)}'s answers are longer than {label(lower)}'s (characters)", here, theirs, verdict)


def claims_table(measured: Measured) -> Table:
  """What the paper claims of two successive models, beside what this run shows."""
  names, rows = list(measured), []
  for lower, upper in zip(names, names[1:], strict=False):
    rows += [_duel_claim(lower, upper, measured), _judge_claim(lower, upper, measured)]
    rows += [_length_claim(lower, upper, measured)] if upper != "m1" else []
  note = "Yes and no are said only beyond the 95 % interval. Growth of length is no merit: it is what to look out for."
  columns = ("the paper's finding", "here", "paper", "does it hold here?")
  kept = tuple(row for row in rows if row is not None)
  return Table("claims", "The paper's findings, and this run's", columns, kept, note, words=(0, 3), paper=(2,))


def summary(measured: Measured) -> list[str]:
  """The run in a few sentences, all computed from its figures."""
  sentences, tuned = [], {name: facts for name, facts in measured.items() if name != "baseline"}
  scores = [facts["oracle"]["score"]["value"] for facts in tuned.values() if "oracle" in facts]
  if len(scores) > 1 and len(scores) == len(tuned):
    rising = all(first < second for first, second in zip(scores, scores[1:], strict=False))
    order = " < ".join(label(name) for name in tuned)
    figures = _arrow([tables.number(score, 2) for score in scores])
    sentences.append(f"{order} in oracle quality: {'yes' if rising else 'no'} ({figures} of 5).")
  previous = dict(zip(list(measured)[1:], measured, strict=False))
  for (name, other), found in duel_facts(measured).items():
    if previous.get(name) == other and name != "m1":
      net, beyond = tables.estimate(found["net"], signed=True), "yes" if _net(found).tone == "good" else "no"
      shares = f"{tables.percent(found['win'])} % wins, {tables.percent(found['loss'])} % losses"
      sentences.append(
        f"{label(name)} over {label(other)}: {shares}, net {net.text} {net.small}; "
        f"better beyond the 95 % interval: {beyond}."
      )
  if measured:
    pairwise = {label(name): facts["judge"]["metrics"]["pairwise"]["value"] for name, facts in measured.items()}
    shown = ", ".join(
      f"{name} {tables.percent(value)} %" if value is not None else f"{name} none (no pair of readable votes)"
      for name, value in pairwise.items()
    )
    sentences.append(f"As judges, pairwise accuracy: {shown}.")
  return sentences


def headline(measured: Measured) -> dict[str, Any]:
  """The main figures, for the report's manifest."""
  return {
    "models": {
      name: {
        "oracle": facts["oracle"]["score"]["value"] if "oracle" in facts else None,
        "pairwise": facts["judge"]["metrics"]["pairwise"]["value"],
        "characters": facts["characters"]["mean"],
      }
      for name, facts in measured.items()
    },
    "duels": {
      f"{name} over {other}": {"win": found["win"], "loss": found["loss"], "net": found["net"]}
      for (name, other), found in duel_facts(measured).items()
    },
  }
