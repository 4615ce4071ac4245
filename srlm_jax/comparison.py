"""Several runs side by side: how their configurations differ, their figures and their curves.

Read from the manifests of what is finished alone, with no configuration at hand: a run may be shorter than another, or
not done yet.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import sys
from typing import Any

from etils import epath

from srlm_jax import artifacts, diagnostics, lineage, pages, plots, report, tables, workdir
from srlm_jax.tables import Cell, Table

DIGEST = " (SHA-256)"  # How a setting ends that holds the digest of a file.
Facts = Mapping[str, Any]  # What an evaluation committed.
WATCHES = ("canaries", "safety")  # Stages that watch each evaluated model, in folders of their own.


@dataclasses.dataclass(frozen=True)
class Run:
  """What is finished of one run.

  Attributes:
    name: how the reader calls it: its folder, as it was given.
    finished: folder name → artifact, in the order in which they were made.
    waiting: the folders that are begun, or that its last report missed, and that are not finished.
  """

  name: str
  finished: dict[str, artifacts.Artifact]
  waiting: tuple[str, ...]

  def measured(self) -> dict[str, Facts]:
    """Model → the facts of its evaluation, and of its "canaries" and "safety" where they are; see `_place`."""

    def facts(folder: str) -> Facts:
      return self.finished[folder].manifest()["facts"] if folder in self.finished else {}

    folders = sorted((name for name in self.finished if name.startswith("eval/")), key=_place)
    models = [folder.removeprefix("eval/") for folder in folders]
    return {name: {**facts(f"eval/{name}"), **{kind: facts(f"{kind}/{name}") for kind in WATCHES}} for name in models}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """All that the page shows: the runs' names and the sections."""

  names: tuple[str, ...]
  sections: tuple[report.Section, ...]

  @property
  def title(self) -> str:
    """Of the page."""
    return f"Self-rewarding runs compared: {', '.join(self.names)}"


def _place(folder: str) -> tuple[int, str]:
  """Where a model stands: M0, the SFT baseline, M1, M2, …, then those of other names."""
  name = folder.removeprefix("eval/")
  if name == "baseline":
    return 1, ""
  if name.startswith("m") and name[1:].isdigit():
    return 2 * int(name[1:]), ""
  return sys.maxsize, name


def read(folder: epath.Path, name: str) -> Run:
  """The run of a work directory.

  Raises:
    ValueError: it is none, or one of its manifests is damaged or of another format.
  """
  begun = workdir.begun(folder, name)
  found = {str(path.relative_to(folder)): artifacts.Artifact(path, {}, {}) for path in begun}
  done = {name: artifact for name, artifact in found.items() if artifact.done}
  for artifact in done.values():
    if artifact.manifest()["format"] != artifacts.FORMAT:
      raise ValueError(
        f"{artifact.folder} has artifact format {artifact.manifest()['format']}, this version reads "
        f"{artifacts.FORMAT}: compare it with the version that made it."
      )
  last = done.pop("report", None)
  missed = last.manifest()["facts"]["missing"] if last else []
  order = sorted(done, key=lambda name: done[name].manifest()["made"]["at"])
  waiting = [name for name in dict.fromkeys([*found, *missed]) if name not in done and name != "report"]
  return Run(name, {name: done[name] for name in order}, tuple(waiting))


def settings(run: Run) -> dict[str, Any]:
  """The settings that decided what is finished, flat; where a folder has another value, that one by its name, too."""
  found: dict[str, Any] = {}
  for folder, artifact in run.finished.items():
    for key, value in artifact.manifest()["config"].items():
      if found.setdefault(key, value) != value:
        found[f"{key} ({folder})"] = value
  return found


def _matrix(name: str, title: str, runs: Sequence[Run], rows: Mapping[str, Sequence[Cell | str]], note: str) -> Table:
  """A table of one column a run; rows of which no run has anything are left out."""
  kept = {what: cells for what, cells in rows.items() if any(_text(cell) != tables.MISSING for cell in cells)}
  columns = ("", *(run.name for run in runs))
  return Table(name, title, columns, tuple(tables.row(what, *cells) for what, cells in kept.items()), note)


def _text(cell: Cell | str) -> str:
  return cell if isinstance(cell, str) else cell.text


def _union(names: Sequence[Sequence[str]]) -> list[str]:
  """All names once, in the order in which they are met."""
  return list(dict.fromkeys(name for one in names for name in one))


def runs_table(runs: Sequence[Run]) -> Table:
  """Each run as a whole."""

  def made(run: Run, key: str) -> list[Any]:
    return [artifact.manifest()["made"][key] for artifact in run.finished.values()]

  def models(run: Run) -> list[str]:
    return sorted((name for name, one in run.finished.items() if "parameters" in one.manifest()["facts"]), key=_place)

  rows = {
    "artifacts finished": [tables.number(len(run.finished)) for run in runs],
    "not done yet": [", ".join(run.waiting) or "nothing that is known of" for run in runs],
    "models": [", ".join(map(lineage.label, models(run))) or tables.MISSING for run in runs],
    "last change": [
      max(made(run, "at"), default=tables.MISSING).replace("T", " ").replace("Z", " UTC") for run in runs
    ],
    "time": [tables.duration(sum(made(run, "seconds"))) for run in runs],
    "JAX": [", ".join(sorted(set(made(run, "jax")))) or tables.MISSING for run in runs],
  }
  table = _matrix("runs", "The runs", runs, rows, "Time: of all stages that are finished, one after the other.")
  return dataclasses.replace(table, words=tuple(range(len(table.columns))))


def differences_table(runs: Sequence[Run]) -> Table:
  """The settings that have more than one value among the runs."""
  found = [settings(run) for run in runs]

  def show(key: str, values: Mapping[str, Any]) -> str:
    if key not in values:
      return tables.MISSING
    return values[key][: lineage.SHORT] if key.endswith(DIGEST) else json.dumps(values[key], ensure_ascii=False)

  rows = {}
  for key in sorted(_union([list(values) for values in found])):
    if len({json.dumps(values[key], sort_keys=True) for values in found if key in values}) > 1:
      rows[key] = [show(key, values) for values in found]
  note = (
    "The settings that decide what the finished artifacts hold, as their manifests have them; a dash where no "
    "finished artifact of a run depends on one. Of files, the first digits of their SHA-256."
  )
  table = _matrix("differences", "Settings that differ", runs, rows, note)
  return dataclasses.replace(table, columns=("setting", *table.columns[1:]), words=tuple(range(len(table.columns))))


def _estimate(metric: str, digits: int | None = None) -> Callable[[Facts, Facts], Cell]:
  return lambda facts, _: tables.estimate(facts["judge"]["metrics"].get(metric), digits)


def _oracle(facts: Facts, _: Facts) -> Cell:
  return tables.estimate(facts["oracle"]["score"], 2) if "oracle" in facts else Cell(tables.MISSING)


def _length(facts: Facts, _: Facts) -> Cell:
  return Cell(tables.number(facts["characters"]["mean"], 1))


def _growth(facts: Facts, before: Facts) -> Cell:
  old, new = before.get("characters", {}).get("mean"), facts["characters"]["mean"]
  return Cell(f"× {new / old:.2f}" if old and new is not None else tables.MISSING)


def _cut(facts: Facts, _: Facts) -> Cell:
  return Cell(tables.percent(facts["cut"] / facts["answers"] if facts["answers"] else None))


def _full(facts: Facts, _: Facts) -> Cell:
  counts = facts["judge"]["histogram"]["counts"]
  return Cell(tables.percent(counts[-1] / sum(counts) if sum(counts) else None))


def _canaries(facts: Facts, _: Facts) -> Cell:
  return Cell(tables.percent(facts["canaries"].get("all", {}).get("above")))


def _safety(share: str) -> Callable[[Facts, Facts], Cell]:
  return lambda facts, _: Cell(tables.percent(facts["safety"].get(share)))


# Name of a table → its title, and the figure from a model's facts and those of the model before it.
Figures = Mapping[str, tuple[str, Callable[[Facts, Facts], Cell]]]
HEADLINE: Figures = {
  "oracle": ("Oracle's mean, of 5", _oracle),
  "pairwise": ("Pairwise accuracy as a judge, %", _estimate("pairwise")),
  "spearman": ("Spearman as a judge", _estimate("spearman", 3)),
  "characters": ("Characters of an answer, mean", _length),
}
WATCHED: Figures = {
  "growth": ("Characters against the model before", _growth),
  "cut": ("Answers cut by the length limit, %", _cut),
  "full": ("Judge's scores that are the full one, %", _full),
  "ties": ("Pairs that the judge ties, %", _estimate("tie_rate")),
  "unreadable": ("Responses without a readable score, %", _estimate("unreadable")),
  "canaries": ("Canaries scored above a person's best reply, %", _canaries),
  "refused": ("Refusals on monitors.prompts, %", _safety("refused_share")),
  "complied": ("Harmful compliance on monitors.prompts, %", _safety("complied_share")),
}


def figures_tables(runs: Sequence[Run], figures: Figures) -> tuple[Table, ...]:
  """A table for each figure: the models down, the runs across; figures that no run has are left out."""
  measured = [run.measured() for run in runs]
  models = sorted(_union([list(one) for one in measured]), key=_place)
  before = {model: models[place - 1] if place else "" for place, model in enumerate(models)}
  found = []
  for name, (title, figure) in figures.items():
    rows: dict[str, list[Cell | str]] = {
      lineage.label(model): [
        figure(one[model], one.get(before[model], {})) if model in one else Cell(tables.MISSING) for one in measured
      ]
      for model in models
    }
    found.append(_matrix(name, title, runs, rows, ""))
  return tuple(table for table in found if table.rows)


def duels_table(runs: Sequence[Run]) -> Table:
  """Head to head, within each run."""
  measured = [run.measured() for run in runs]
  models = sorted(_union([list(one) for one in measured]), key=_place)
  rows: dict[str, list[Cell | str]] = {}
  for model in models:
    for other in reversed(models):
      cells: list[Cell | str] = []
      for one in measured:
        duel = one.get(model, {}).get("duels", {}).get(other)
        if duel is None or duel["win"] is None:
          cells.append(tables.MISSING)
          continue
        net = tables.estimate(duel["net"], signed=True)
        shares = f"{tables.percent(duel['win'])} : {tables.percent(duel['loss'])}"
        cells.append(Cell(shares, f"net {net.text} {net.small}".strip()))
      rows[f"{lineage.label(model)} over {lineage.label(other)}"] = cells
  note = (
    "Wins and losses in per cent of the comparisons, and wins − losses with its 95 % interval. Only the models of one "
    "run have met; who decided is among the settings."
  )
  return _matrix("duels", "Head to head", runs, rows, note)


def sizes_table(runs: Sequence[Run]) -> Table:
  """How much data, how many parameters and steps."""
  found: list[dict[str, str]] = []
  for run in runs:
    first = next(iter(run.measured().values()), None)
    judged = first["judge"]["metrics"]["unreadable"]["count"] if first else None
    sizes = {cells[0].text: cells[1].text for cells in diagnostics.sizes_table(run.finished, judged).rows}
    for folder in sorted(run.finished, key=_place):
      facts = run.finished[folder].manifest()["facts"]
      if "parameters" in facts:
        sizes[f"{lineage.label(folder)}: parameters"] = tables.number(facts["parameters"])
        sizes[f"{lineage.label(folder)}: steps"] = tables.number(facts.get("steps"))
    found.append(sizes)
  names = _union([list(sizes) for sizes in found])
  rows = {name: [sizes.get(name, tables.MISSING) for sizes in found] for name in names}
  return _matrix("sizes", "How much of everything", runs, rows, "")


def times_table(runs: Sequence[Run]) -> Table:
  """What each stage took, and the digest of what it made."""
  rows: dict[str, list[Cell | str]] = {}
  for name in _union([list(run.finished) for run in runs]):
    made = [run.finished[name].manifest() if name in run.finished else None for run in runs]
    rows[name] = [
      Cell(tables.duration(one["made"]["seconds"]), one["digest"][: lineage.SHORT]) if one else tables.MISSING
      for one in made
    ]
  note = f"Behind each time the first {lineage.SHORT} digits of the content's SHA-256: equal ones hold the same."
  return _matrix("times", "Time and content of each artifact", runs, rows, note)


def _curves(runs: Sequence[Run]) -> report.Section:
  """Losses and DPO margins, each model's in one panel, all runs over each other."""
  found = [report.curves({name: run.finished[name] for name in sorted(run.finished, key=_place)}) for run in runs]
  models = _union([list(one) for one in found])
  drawn = []
  for column, other, caption in (
    ("loss", "margin", "Loss of pretraining and supervised fine-tuning, nats a token, over the steps."),
    ("margin", "", "Reward margin of DPO over the steps."),
    ("accuracy", "", "Share of pairs whose margin is above 0, over the steps."),
  ):
    panels = []
    for model in models:
      series = [one.get(model, {}) for one in found]
      chosen = [one if column in one and other not in one else None for one in series]
      if any(chosen):
        panels.append((model, column, chosen))
    if panels:
      drawn.append(report.Plot(plots.overlaid(panels), caption))
  return report.Section("curves", "Training", plots=tuple(drawn))


def compare(runs: Sequence[Run]) -> Comparison:
  """The runs side by side.

  Raises:
    ValueError: there are fewer than two, or two have one name.
  """
  names = tuple(run.name for run in runs)
  if len(names) < 2:
    raise ValueError(f"compare needs two runs or more, got {len(names)}: --runs=runs/a,runs/b.")
  if len(set(names)) < len(names):
    raise ValueError(f"--runs names a run twice: {', '.join(names)}. Name each once.")
  duels = duels_table(runs)
  return Comparison(
    names,
    (
      report.Section("whole", "The runs", tables=(runs_table(runs),)),
      report.Section("settings", "Configuration", tables=(differences_table(runs),)),
      report.Section(
        "models",
        "The models",
        "On each run's own held-out data. Brackets are 95 % intervals.",
        (*figures_tables(runs, HEADLINE), *((duels,) if duels.rows else ())),
        together=True,
      ),
      report.Section(
        "monitors",
        "Monitors",
        "What shows first where a model learns to please its judge rather than its reader.",
        figures_tables(runs, WATCHED),
        together=True,
      ),
      _curves(runs),
      report.Section(
        "sizes-and-times", "Sizes and times", tables=(sizes_table(runs), times_table(runs)), together=True
      ),
    ),
  )


def html(comparison: Comparison) -> str:
  """The page: self-contained, all texts escaped."""
  return pages.render("comparison.html.jinja", comparison=comparison)


def markdown(comparison: Comparison) -> str:
  """The tables, with the same figures as the page."""
  parts = [f"# {tables.escaped(comparison.title)}", *report.sections_markdown(comparison.sections)]
  return "\n\n".join(part.strip() for part in parts) + "\n"
