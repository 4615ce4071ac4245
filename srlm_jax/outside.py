"""Benchmarks from outside: how a command finds its model, where its figures lie, and how the report shows them.

A benchmark's folder is WORKDIR/outside/NAME: MODEL.json holds the figures of a model, with the digest of the model that
they are of, and MODEL/ what they were made from.
"""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import artifacts, digests, distributed, lineage, paper, storage, tables
from srlm_jax.tables import Cell, Table

Facts = Mapping[str, Any]
HARD = ("math", "coding", "reasoning")  # The categories of MT-Bench that the paper shows apart from the rest.


@dataclasses.dataclass(frozen=True)
class Run:
  """A run with finished models, and what a command wants to know of one of them.

  Attributes:
    settings: of the run.
    workdir: its folder.
    mesh: of sampling.
    models: its finished models by name.
    model: the name of the one that is measured.
    files: those that the command line names: "prompts", "references", "out".
    cache: the folder in which an endpoint's replies are kept.
    tasks: of lm-eval, that the command line names.
  """

  settings: config_dict.ConfigDict
  workdir: epath.Path
  mesh: jax.sharding.Mesh
  models: Mapping[str, artifacts.Artifact]
  model: str
  files: Mapping[str, epath.Path]
  cache: epath.Path
  tasks: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for flag, path in self.read.items():
      if not path.exists():
        raise ValueError(f"--{flag}={path}: there is no such file.")
    self.finished(self.model)

  @property
  def read(self) -> dict[str, epath.Path]:
    """The files that are read."""
    return {flag: path for flag, path in self.files.items() if flag != "out"}

  def finished(self, name: str) -> artifacts.Artifact:
    """The model of that name; ValueError where it is not there."""
    if name not in self.models:
      raise artifacts.unknown(name, list(self.models), "finished model of this work directory")
    return self.models[name]

  def artifact(
    self, folder: str, config: Mapping[str, Any], files: Collection[str], **inputs: artifacts.Artifact
  ) -> artifacts.Artifact:
    """The artifact `folder` below WORKDIR/outside, made from the model that is measured, with `config` and `inputs`.

    Its configuration also holds what decides any sampled text, and the content of those of `files` that were named.
    """
    own: dict[str, Any] = {
      "seed": self.settings.seed,
      "chat": self.settings.chat,
      "generation.shard": self.settings.generation.shard,
      **{f"{flag} (SHA-256)": digests.file_sha256(self.files[flag]) for flag in files if flag in self.files},
      **({"server": "yes"} if self.settings.server.url else {}),
      **config,
    }
    place = self.workdir / "outside" / folder
    return artifacts.Artifact(place, artifacts.flatten(own), {"model": self.finished(self.model), **inputs})


def save(run: Run, benchmark: str, facts: Facts) -> epath.Path:
  """Writes the figures of the run's model; returns the file."""
  path = run.workdir / "outside" / benchmark / f"{run.model}.json"
  whole = {"model": run.model, "digest": run.finished(run.model).digest(), **facts}

  def write() -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, digests.sealed(whole, indent=1, by_name=False))

  distributed.first(f"write {path}", write)
  return path


def load(finished: Mapping[str, artifacts.Artifact], benchmark: str) -> tuple[dict[str, Facts], list[str]]:
  """The figures of each finished model, in their order, and the models whose figures are an older model's."""
  found: dict[str, Facts] = {}
  older = []
  for name, artifact in finished.items():
    path = artifact.folder.parent / "outside" / benchmark / f"{name}.json"  # Models lie in the work directory itself.
    if "/" in name or not path.exists():
      continue
    try:
      facts = digests.unseal(path.read_bytes())
    except ValueError as error:
      raise ValueError(f"{path} is damaged ({error}): delete it, and run the benchmark again.") from error
    if facts["digest"] == artifact.digest():
      found[name] = facts
    else:
      older.append(name)
  return found, older


def _note(text: str, older: list[str]) -> str:
  left_out = f" Left out, as an older model's: {', '.join(map(lineage.label, older))}." if older else ""
  return text + left_out


def alpaca_eval_table(measured: Mapping[str, Facts], older: list[str]) -> Table:
  """Win rates against AlpacaEval's reference answers, beside the paper's."""
  rows = []
  for name, facts in measured.items():
    rows.append(
      tables.row(
        lineage.label(name),
        tables.number(facts["win_rate"], 2),
        tables.number(facts["length_controlled_winrate"], 2),
        tables.number(facts["avg_length"]),
        Cell(tables.number(facts["judged"]), f"of {facts['instructions']:,}"),
        f"{facts['annotators']}, against {facts['reference']}",
        tables.percent(paper.ALPACA_EVAL.get(name)),
        tables.number(paper.CHARACTERS.get(name)),
      )
    )
  columns = (
    "model",
    "win rate, %",
    "length-controlled, %",
    "characters",
    "judged",
    "by whom",
    "win rate, %",
    "characters",
  )
  note = "Figures of the alpaca_eval package. An instruction that is too long for the model has an empty answer."
  return Table("alpaca-eval", "AlpacaEval 2", columns, tuple(rows), _note(note, older), words=(0, 5), paper=(6, 7))


def mt_bench_table(measured: Mapping[str, Facts], older: list[str]) -> Table:
  """Mean ratings of MT-Bench, of 10, beside the paper's."""
  parts = ("all", "hard", "rest")
  rows = []
  for name, facts in measured.items():
    quoted = [paper.MT_BENCH[part].get(name) for part in parts]
    rows.append(
      tables.row(
        lineage.label(name),
        *(tables.estimate(facts["means"][part], 2) for part in parts),
        *(tables.estimate(facts["means"][f"turn {turn}"], 2) for turn in (1, 2)),
        Cell(tables.number(facts["unreadable"]), f"of {facts['asked']:,}"),
        facts["judge"],
        *(tables.number(value, 2) for value in quoted),
      )
    )
  hard = "math, code, reasoning"
  columns = ("model", "all", hard, "the rest", "turn 1", "turn 2", "unreadable", "judge", "all", hard, "the rest")
  note = "Of 10. Unreadable ratings are counted and left out of the means; an answer that is missing is an empty one."
  return Table("mt-bench", "MT-Bench", columns, tuple(rows), _note(note, older), words=(0, 7), paper=(8, 9, 10))


def mt_bench_categories(measured: Mapping[str, Facts]) -> Table:
  """Mean ratings of each category and turn."""
  categories = list(dict.fromkeys(category for facts in measured.values() for category in facts["categories"]))
  rows = []
  for category in categories:
    both = [facts["categories"].get(category, {}) for facts in measured.values()]
    cells = [tables.estimate(one.get(f"turn {turn}"), 2) for one in both for turn in (1, 2)]
    rows.append(tables.row(category, *cells))
  heads = (f"{lineage.label(name)}, turn {turn}" for name in measured for turn in (1, 2))
  return Table("mt-bench-categories", "MT-Bench by category and turn", ("category", *heads), tuple(rows))


def report_tables(finished: Mapping[str, artifacts.Artifact]) -> Iterator[Table]:
  """The tables of all benchmarks that were run, for the report."""
  measured, older = load(finished, "alpaca_eval")
  if measured or older:
    yield alpaca_eval_table(measured, older)
  measured, older = load(finished, "mt_bench")
  if measured or older:
    yield mt_bench_table(measured, older)
  if measured:
    yield mt_bench_categories(measured)
