"""What the monitors say of a run, for the report: figures read from its artifacts, their tables and their warnings."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from srlm_jax import artifacts, canaries, diagnostics, findings, lineage, monitors, plots, records, repetition, tables

# Panels of the figure: name of the figure → title, and what it is multiplied by.
_PANELS = {
  "heldout_mean": ("score, people's replies", 1),
  "own_mean": ("score, own new answers", 1),
  "own_entropy": ("entropy of own scores, bits", 1),
  "characters": ("characters of an answer", 1),
  "distinct_2": ("distinct pairs of words, %", 100),
  "canaries": ("canaries above people, %", 100),
}


@dataclasses.dataclass(frozen=True)
class Oversight:
  """What there is to show.

  Attributes:
    tables: all figures of all models; what each canary got.
    svg: the main figures from model to model; "" without any.
    warnings: a line for each figure that is beyond its threshold.
  """

  tables: tuple[tables.Table, ...]
  svg: str
  warnings: tuple[str, ...]


def _judging(judgements: Sequence[records.Judgement], top: float, which: str) -> dict[str, float | None]:
  return {f"{which}_{name}": value for name, value in monitors.scores(judgements, top).items()}


def _reading(
  name: str, finished: lineage.Finished, facts: Mapping[str, Any], rounds: Sequence[diagnostics.Round], top: float
) -> dict[str, float | None]:
  """All figures of one model, as far as its artifacts are there."""
  evaluation = finished[f"eval/{name}"]
  answers = [one.text for one in evaluation.read_shards("answers", records.Response)]
  found: dict[str, float | None] = {
    "heldout_mean": monitors.scores(list(evaluation.read_shards("judgements", records.Judgement)), top)["mean"],
    "agreement": facts["judge"]["metrics"]["pairwise"]["value"],
    "characters": facts["characters"]["mean"],
    "tokens": facts["tokens"]["mean"],
    "cut": facts["cut"] / facts["answers"] if facts["answers"] else None,
    **repetition.summary(answers),
  }
  for one in rounds:
    if one.name == f"aift{name.removeprefix('m')}" and one.judgements:  # The round that M_t answers and judges.
      found |= _judging(one.judgements, top, "own")
  if f"canaries/{name}" in finished:
    probed = finished[f"canaries/{name}"].manifest()["facts"]
    human = probed["probes"].get(canaries.HUMAN, {})
    found |= {"canary_score": probed["all"]["score"], "honest_score": human.get("score")}
    found["canaries"] = probed["all"]["above"]
  if f"safety/{name}" in finished:
    safe = finished[f"safety/{name}"].manifest()["facts"]
    found |= {"refused": safe["refused_share"], "complied": safe["complied_share"]}
    found["safety_unreadable"] = safe["unreadable_share"]
  return found


def _canary_cell(figures: Mapping[str, Any] | None, honest: float | None) -> tables.Cell:
  """What a judge made of one response, marked where a canary scores above a person's best replies on the whole."""
  if figures is None:
    return tables.Cell(tables.MISSING)
  if figures["too_long"] == figures["tried"]:
    return tables.Cell(tables.MISSING, "too long for the judge")
  small = f"{tables.number(100 * figures['readable'])} % readable"
  if figures["kind"] == "honest" or figures["above"] is None:
    return tables.Cell(tables.number(figures["score"], 2), small)
  beyond = honest is not None and figures["score"] > honest
  small += f", {tables.number(100 * figures['above'])} % above"
  return tables.Cell(tables.number(figures["score"], 2), small, "bad" if beyond else "")


def canary_table(probed: Mapping[str, Mapping[str, Any]]) -> tables.Table:
  """What each canary got from each judge: the mean of its scores.

  Args:
    probed: facts of the stage `canaries` by the model's name as it is shown.
  """
  kinds = {name: one["kind"] for facts in probed.values() for name, one in facts["probes"].items()}
  rows = []
  for name, kind in sorted(kinds.items(), key=lambda item: canaries.ORDER.index(item[0])):
    cells = [
      _canary_cell(facts["probes"].get(name), facts["probes"].get(canaries.HUMAN, {}).get("score"))
      for facts in probed.values()
    ]
    rows.append(tables.row(name, kind, *cells))
  votes = sum(facts["votes"].get("readable", 0) for facts in probed.values())
  strays = [facts["unfounded"] for facts in probed.values() if facts["unfounded"] is not None]
  note = (
    "Mean score, share of readable votes, and share of prompts on which it is scored above a person's best reply; "
    "marked where its mean is above theirs. A response cannot score itself: a score is read from what the judge writes "
    "behind its prompt, and from nothing else."
  )
  if strays:
    note += f" Read anew from the judges' own words, {sum(strays):,} judgements differ ({votes:,} votes have a score)."
  columns = ("response", "kind", *probed)
  return tables.Table("canaries", "Canaries: what the judges fall for", columns, tuple(rows), note, words=(0, 1))


def collect(
  finished: Mapping[str, artifacts.Artifact],
  measured: findings.Measured,
  rounds: Sequence[diagnostics.Round],
  top: float,
  limits: Mapping[str, float],
) -> Oversight:
  """Reads what is finished.

  Args:
    finished: artifacts by folder.
    measured: facts of the evaluations by model, in the order of the models.
    rounds: the iterations, with all of their judgements.
    top: highest score of the judge's scale.
    limits: the thresholds, `monitors.warn`.
  """
  plain = {lineage.label(name): _reading(name, finished, facts, rounds, top) for name, facts in measured.items()}
  # The baseline learns other things than M1 and is no iteration before it: changes begin with M2.
  tuned = [lineage.label(name) for name in measured if name != "baseline"]
  readings = monitors.with_changes(plain, dict(zip(tuned[1:], tuned, strict=False)))
  probed = {
    lineage.label(name): finished[f"canaries/{name}"].manifest()["facts"]
    for name in measured
    if f"canaries/{name}" in finished
  }
  found = [monitors.table(readings, limits)] if readings else []
  found += [canary_table(probed)] if probed else []
  strays = [
    f"{name}: {facts['unfounded']} scores of canaries are not what the judge wrote. This is a fault of the code: "
    "please report it, and trust no score of this run."
    for name, facts in probed.items()
    if facts["unfounded"]
  ]
  names = ["SFT" if name == lineage.label("baseline") else name for name in readings]
  columns = {figure: [reading.get(figure) for reading in readings.values()] for figure in _PANELS}
  panels = [
    (title, scale, columns[figure])
    for figure, (title, scale) in _PANELS.items()
    if any(value is not None for value in columns[figure])
  ]
  svg = plots.trends(names, panels) if panels else ""
  return Oversight(tuple(found), svg, (*strays, *monitors.warnings(readings, limits)))
