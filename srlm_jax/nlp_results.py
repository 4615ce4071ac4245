"""Results of the NLP benchmarks: their file, and the table that shows them beside the paper's figures.

The file is WORKDIR/outside/nlp/MODEL.json, JSON with the fields of `Results`.
"""

from collections.abc import Iterator, Mapping, Sequence

from etils import epath
import pydantic

from srlm_jax import artifacts, digests, distributed, lineage, paper, storage, tables
from srlm_jax.tables import Cell, Table

TITLES = {
  "arc_easy": "ARC-Easy",
  "arc_challenge": "ARC-Challenge",
  "hellaswag": "HellaSwag",
  "social_iqa": "SIQA",
  "piqa": "PIQA",
  "gsm8k": "GSM8K",
  "mmlu": "MMLU",
  "openbookqa": "OpenBookQA",
  "nq_open": "Natural Questions",
}
METRICS = ("acc_norm", "exact_match", "acc", "f1")  # Shares; of several that a task has, the first one is shown.
NOTE = (
  "By lm-eval. Of several metrics the file has all; here stands acc_norm, where the likelihood of an answer is divided "
  "by its length, before acc, and a task's first filter. ±: standard error. How the paper scored its answers, and with "
  "how many shots, it does not say; Llama 2's shots are the defaults here."
)


class How(pydantic.BaseModel):
  """How a task was asked: what makes its result another one.

  Attributes:
    shots: examples in a prompt; None: as many as the task itself says.
    chat: the chat template, "" for none.
    add_bos: whether texts begin with the begin token.
    limit: documents of each task, 0 for all.
    max_length: longest text in tokens.
    lm_eval: the version.
    seed: of tasks that draw.
    files: digest of the tasks of one's own and their data; "" without any.
  """

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

  shots: int | None
  chat: str
  add_bos: bool
  limit: int
  max_length: int
  lm_eval: str
  seed: int
  files: str = ""


class Result(pydantic.BaseModel):
  """What a task gave.

  Attributes:
    how: it was asked.
    shots: examples that were in a prompt.
    documents: how many there were.
    version: of the task, by lm-eval.
    metrics: "metric,filter" and "metric_stderr,filter" → value; None where lm-eval has none.
    parts: the metrics of the tasks of a group, MMLU's subjects say.
  """

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

  how: How
  shots: int
  documents: int
  version: str
  metrics: dict[str, float | None]
  parts: dict[str, dict[str, float | None]] = {}


class Results(pydantic.BaseModel):
  """The tasks of one model; the digest says which weights it has."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

  model: str
  digest: str
  tasks: dict[str, Result]


def path(model: artifacts.Artifact) -> epath.Path:
  """Where the results of a model of a work directory lie."""
  return model.folder.parent / "outside" / "nlp" / f"{model.name}.json"


def _read(model: artifacts.Artifact) -> Results | None:
  place = path(model)
  if not place.exists():
    return None
  try:
    return Results.model_validate(digests.unseal(place.read_bytes()))
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "all of it"
    raise ValueError(f"{place} cannot be used ({where}: {first['msg']}): delete it and run its tasks again.") from None
  except ValueError as error:
    raise ValueError(f"{place} is damaged ({error}): delete it and run its tasks again.") from error


def read(model: artifacts.Artifact) -> Results:
  """The results of this very model, none where there is no file, or one of other weights."""
  text = distributed.first(
    f"read {path(model)}", lambda: found.model_dump_json() if (found := _read(model)) is not None else None
  )
  found = Results.model_validate_json(text) if text else None
  return (
    found if found and found.digest == model.digest() else Results(model=model.name, digest=model.digest(), tasks={})
  )


def write(model: artifacts.Artifact, results: Results) -> None:
  """Writes the file whole."""

  def work() -> None:
    path(model).parent.mkdir(parents=True, exist_ok=True)
    storage.write(path(model), digests.sealed(results.model_dump(mode="json"), indent=1, by_name=False) + "\n")

  distributed.first(f"write {path(model)}", work)


def headline(metrics: Mapping[str, float | None]) -> str | None:
  """The "metric,filter" of a task that the table shows; None where it has no metric at all."""
  names = [name for name in metrics if "_stderr," not in name]
  wanted = [name for metric in METRICS for name in names if name.split(",")[0] == metric]
  return next(iter([*wanted, *names]), None)


def _cell(result: Result, metric: str) -> Cell:
  """A share in per cent, any other metric as it is, with its standard error."""
  share = metric.split(",")[0] in METRICS
  name, _, kind = metric.partition(",")
  error = result.metrics.get(f"{name}_stderr,{kind}")
  shown = [tables.percent(one) if share else tables.number(one, 3) for one in (result.metrics.get(metric), error)]
  return Cell(shown[0], f"± {shown[1]}" if error is not None else "")


def _asked(result: Result) -> str:
  """How a task was asked, in words."""
  how = result.how
  words = [f"{result.shots}-shot", *([f"chat template {how.chat}"] if how.chat else [])]
  words += [f"the first {how.limit} documents"] if how.limit else []
  return ", ".join(words + ([] if how.add_bos else ["no begin token"]))


def table(measured: Mapping[str, Results], older: Sequence[str] = ()) -> Table:
  """Each task's main metric for each model, beside the paper's figures.

  Args:
    measured: the results of each model, in the order of the models.
    older: models whose results were left out, as they are of other weights.
  """
  lines: dict[tuple[str, str, str], dict[str, Cell]] = {}
  for model, results in measured.items():
    for task, result in results.tasks.items():
      metric = headline(result.metrics)
      if metric is not None:
        lines.setdefault((task, _asked(result), metric), {})[model] = _cell(result, metric)
  known = list(paper.NLP)
  order = sorted(lines, key=lambda line: (known.index(line[0]) if line[0] in known else len(known), *line))
  quoted = ("m0", "baseline", "m1", "m2", "m3")
  rows = [
    tables.row(
      Cell(TITLES.get(task, task), asked),
      metric.removesuffix(",none").replace(",", ", "),
      *(lines[task, asked, metric].get(model, Cell(tables.MISSING)) for model in measured),
      *(tables.percent(paper.NLP.get(task, {}).get(model)) for model in quoted),
    )
    for task, asked, metric in order
  ]
  heads = ("Llama 2 70B", "SFT", "M1", "M2", "M3")
  columns = ("", "metric", *(lineage.label(model) for model in measured), *heads)
  places = tuple(range(2 + len(measured), len(columns)))
  left_out = f" Left out, as they are an older model's: {', '.join(map(lineage.label, older))}." if older else ""
  return Table("nlp", "NLP benchmarks", columns, tuple(rows), NOTE + left_out, words=(0, 1), paper=places)


def report_tables(finished: Mapping[str, artifacts.Artifact]) -> Iterator[Table]:
  """The table of the models that were measured, for the report; none where none was."""
  models = {name: artifact for name, artifact in finished.items() if "/" not in name}
  found = {name: results for name, artifact in models.items() if (results := _read(artifact)) is not None}
  measured = {name: results for name, results in found.items() if results.digest == models[name].digest()}
  if found:
    yield table(measured, [name for name in found if name not in measured])
