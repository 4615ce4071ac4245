"""The paper's closer look for the report: duels by what is asked for, the map of the prompts, human evaluations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from srlm_jax import classes, human_eval, lineage, plots, tables
from srlm_jax.lineage import label
from srlm_jax.tables import Cell, Table

TITLES = {"category": "By category", "complexity": "By complexity, 1 to 10", "length": "By expected length"}


class Part(NamedTuple):
  """A section of the report; plots are (SVG, caption)."""

  name: str
  title: str
  text: str
  tables: tuple[Table, ...]
  plots: tuple[tuple[str, str], ...] = ()


def parts(finished: lineage.Finished) -> list[Part]:
  """The sections about which something is there."""
  return [part for part in (_strata(finished), _map(finished), _human(finished)) if part]


def _facts(finished: lineage.Finished, begins: str) -> dict[str, Mapping[str, Any]]:
  """The facts of the finished artifacts of the analysis whose name begins so, by the rest of it."""
  folder = f"analysis/{begins}"
  return {
    name.removeprefix(folder): one.manifest()["facts"] for name, one in finished.items() if name.startswith(folder)
  }


def _strata(finished: lineage.Finished) -> Part | None:
  found = {name: facts for name, facts in _facts(finished, "").items() if "characters" in facts}
  if not found:
    return None
  options = classes.Options(**finished["analysis/classes"].manifest()["facts"]["options"])
  duels = {(name, other): facts for name, one in found.items() for other, facts in one["duels"].items()}
  shown = []
  for dimension, title in TITLES.items():
    if duels:
      shown.append(duels_table(dimension, title, options, duels))
    shown.append(
      lengths_table(dimension, f"Mean characters of an answer, {title[0].lower()}{title[1:]}", options, found)
    )
  text = (
    "The duels and the lengths of the answers by what the instruction asks for. Each duel is in one row of a table; "
    "those whose instruction got no readable class are in none."
  )
  return Part("strata", "What is asked for", text, tuple(shown), _drawn(options, duels))


def _drawn(options: classes.Options, duels: Mapping[tuple[str, str], Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
  """Wins minus losses over the SFT baseline; nothing where no model met it."""
  over = {label(name): facts for (name, other), facts in duels.items() if other == "baseline"}
  if not over:
    return ()
  panels = []
  for dimension, title in TITLES.items():
    names = _occurring(options, dimension, over)
    nets = {model: [facts[dimension].get(name, {}).get("net") for name in names] for model, facts in over.items()}
    panels.append((title, names, nets))
  return ((plots.strata(panels), "Wins minus losses over the SFT baseline, %, with 95 % intervals over instructions."),)


def _occurring(options: classes.Options, dimension: str, found: Mapping[Any, Mapping[str, Any]]) -> list[str]:
  """The strata that any of them has."""
  return [name for name in _order(options, dimension) if any(name in facts[dimension] for facts in found.values())]


def _order(options: classes.Options, dimension: str) -> tuple[str, ...]:
  return tuple(options.order(dimension))


def duels_table(
  dimension: str, title: str, options: classes.Options, duels: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Table:
  """Win : tie : loss and net of each pair of models in each stratum; `duels` by (model, other)."""
  rows = []
  for name in _occurring(options, dimension, duels):
    cells = []
    for facts in duels.values():
      one = facts[dimension].get(name)
      if one is None or one["win"] is None:
        cells.append(Cell(tables.MISSING))
        continue
      net = tables.estimate(one["net"], signed=True)
      shares = " : ".join(tables.percent(one[key]) for key in ("win", "tie", "loss"))
      cells.append(Cell(shares, f"{net.text} {net.small}".strip()))
    prompts = max(facts[dimension][name]["prompts"] for facts in duels.values() if name in facts[dimension])
    rows.append(tables.row(name, tables.number(prompts), *cells))
  columns = ("", "instructions", *(f"{label(name)} over {label(other)}" for name, other in duels))
  note = "Win : tie : loss, %; below them wins minus losses with its 95 % bootstrap interval over instructions."
  return Table(f"duels-{dimension}", f"Head to head, {title[0].lower()}{title[1:]}", columns, tuple(rows), note)


def lengths_table(
  dimension: str, title: str, options: classes.Options, found: Mapping[str, Mapping[str, Any]]
) -> Table:
  """Mean characters of each model's answers in each stratum."""
  characters = {name: facts["characters"] for name, facts in found.items()}
  rows = []
  for name in _occurring(options, dimension, characters):
    means = [facts[dimension].get(name, {}).get("mean") for facts in characters.values()]
    rows.append(tables.row(name, *(tables.number(mean, 1) for mean in means)))
  return Table(f"lengths-{dimension}", title, ("", *(label(name) for name in characters)), tuple(rows))


def _map(finished: lineage.Finished) -> Part | None:
  shown, drawn = [], []
  for name, facts in _facts(finished, "map-").items():
    points = plots.read_points(finished[f"analysis/map-{name}"].read_text("map.json"))
    caption = f"t-SNE of {facts['vectors']} ({facts['dimensions']:,} dimensions); near means alike, axes mean nothing."
    drawn.append((plots.points(points), caption))
    kinds = facts["kinds"]
    rows = tuple(
      tables.row(
        kind,
        tables.number(facts["prompts"][kind]),
        *(tables.percent(facts["neighbours"][kind][other]) for other in kinds),
      )
      for kind in kinds
    )
    note = "Measured on the vectors, before they were laid into a plane. A mixed row: these prompts lie among others."
    columns = ("", "prompts", *(f"{kind}, %" for kind in kinds))
    title = f"Of what kind a prompt's {facts['nearest']} nearest neighbours are: {facts['vectors']}"
    shown.append(Table(f"neighbours-{name}", title, columns, rows, note))
  if not drawn:
    return None
  text = "Where the prompts of IFT, EFT and AIFT lie. In the paper IFT and AIFT overlap, and EFT lies apart."
  return Part("map", "Map of the prompts", text, tuple(shown), tuple(drawn))


def _human(finished: lineage.Finished) -> Part | None:
  shown: list[Table] = []
  for name, facts in _facts(finished, "human-").items():
    pair = f"{label(facts['model'])} over {label(facts['against'])}"
    now = {one: finished[f"eval/{one}"].digest() for one in facts["answers"] if f"eval/{one}" in finished}
    stale = any(now.get(one) != digest for one, digest in facts["answers"].items())
    title = f"{pair}{', by answers that are no longer those of this run' if stale else ''}"
    shown.append(human_eval.result_table(facts, f"human-{name}", title))
    shown.append(human_eval.annotators_table(facts, f"annotators-{name}"))
  if not shown:
    return None
  text = "People chose between two models' answers on a blind page, without knowing which model wrote which."
  return Part("human", "Human evaluation", text, tuple(shown))
