"""AlpacaEval 2: answers in the format that the package `alpaca_eval` reads, its own command on them, and its figures.

A file of prompts, of reference answers or of a model's answers is the same thing there: a JSON list of objects with
`instruction`, `output`, `generator` and `dataset`. AlpacaEval 2's own file holds GPT-4 Turbo's answers, and so serves
as prompts and as references. Its command shows each pair to a judge, in an order that the instruction decides, and
reads from the probabilities of the two labels how far the model is preferred.

The package puts answers into its prompt as they are. So an answer's `{output_2}` and `<|im_start|>`, which would be
filled in or end the judge's message there, get round brackets on the way out: visible, and of the same length.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent import futures
import contextlib
import csv
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
from typing import Any

from etils import epath
import pydantic

from srlm_jax import (
  artifacts,
  config as config_lib,
  digests,
  distributed,
  interruption,
  lines,
  modelstore,
  outside,
  records,
  rollout,
  sampling,
  service,
  storage,
  templates,
  workdir,
)

logger = logging.getLogger(__name__)

WHOLE = 805  # Instructions of AlpacaEval; length control knows how hard each is by its place.
_PLACE = re.compile(r"\{(instruction|input|output|output_1|output_2)\}")


class Row(pydantic.BaseModel):
  """One line of the package's files, as far as it is read here."""

  instruction: str
  output: str | None = None
  generator: str | None = None
  dataset: str | None = None


def read_rows(path: epath.Path) -> list[Row]:
  """The rows of a file in the package's format; ValueError with the file, the row and the rule where one is wrong."""
  if path.suffix != ".json":
    raise ValueError(f"{path}: alpaca_eval tells a file's format by its name: give a JSON list that ends in .json.")
  rows = lines.document(path, list[Row], "a file of alpaca_eval, a JSON list of objects with 'instruction'")
  if not rows:
    raise ValueError(f"{path} holds no instructions: give a JSON list of objects with 'instruction'.")
  return rows


def reference_name(path: epath.Path, rows: Sequence[Row]) -> str:
  """Whose answers a file of references holds; ValueError where an answer is missing or there are several authors."""
  missing = [place for place, row in enumerate(rows) if row.output is None]
  authors = sorted({row.generator or "" for row in rows})
  if missing or len(authors) != 1 or not authors[0]:
    what = f"row {missing[0]} has no 'output'" if missing else f"its 'generator' is {', '.join(map(repr, authors))}"
    raise ValueError(f"{path}: {what}. To compare with, give --references=FILE with one author's answers in all rows.")
  return authors[0]


def prompts(rows: Sequence[Row]) -> list[records.Prompt]:
  """Each instruction once, named by its own digest: equal ones have the same answer, however many rows they have."""
  ids = {row.instruction: digests.sha256(row.instruction.encode())[:16] for row in rows}
  return [records.Prompt(id=name, text=text, source="alpaca_eval") for text, name in ids.items()]


def harmless(text: str) -> str:
  """A text in which what the package or a judge's model would take for their own marks has round brackets."""
  return _PLACE.sub(r"(\1)", templates.neutralise_specials(text))


def outputs(rows: Sequence[Row], answers: Sequence[records.Response], generator: str) -> list[dict[str, str]]:
  """The rows of a model's answers, in the order of `rows`; one without an answer gets an empty one.

  It is not left out: its place says how hard an instruction is, and who gives no answer has not won.
  """
  texts = {answer.prompt: harmless(answer.text) for answer in answers}
  return [
    {
      "instruction": row.instruction,
      "output": texts.get(row.instruction, ""),
      "generator": generator,
      "dataset": row.dataset or "alpaca_eval",
    }
    for row in rows
  ]


def win_rate(preferences: Sequence[float | None]) -> float | None:
  """Per cent of the comparisons that the second answer wins, a tie being half a win; None where there are none.

  A preference is 1 for the first answer, 2 for the second, between them by probability; 1.5 and 0 are ties. What is
  none of these (None, -1) is no verdict and left out.
  """
  values = [1.5 if one == 0 else one for one in preferences if one is not None]
  kept = [one - 1 for one in values if 1 <= one <= 2]
  return 100 * statistics.fmean(kept) if kept else None


@dataclasses.dataclass(frozen=True)
class Annotating:
  """How the command judges: the section `alpaca_eval` of the configuration.

  Attributes:
    annotators: a judge of the package by its name, or the path of a configs.yaml, or its folder.
    length_controlled: whether the win rate is also told for answers of equal length.
    url: an OpenAI-compatible server that judges; empty for OpenAI's own, or what the environment says.
  """

  annotators: str
  length_controlled: bool
  url: str

  @property
  def config(self) -> str:
    """The judge as the command is told it: a name, or a whole path."""
    return str(pathlib.Path(self.annotators).expanduser().resolve()) if "/" in self.annotators else self.annotators

  def digest(self) -> str:
    """Of who judges: verdicts of another one are another cache."""
    folder = pathlib.Path(self.config)
    folder = folder if folder.is_dir() else folder.parent
    files = sorted(one for one in folder.rglob("*") if one.is_file()) if "/" in self.config else []
    parts = [self.config, self.url, *(f"{one} {digests.file_sha256(epath.Path(one))}" for one in files)]
    return digests.sha256("\n".join(parts).encode())[:12]

  def arguments(self, folder: pathlib.Path, references: pathlib.Path, generator: str) -> dict[str, Any]:
    """The command's arguments: all that it writes lies in `folder`, and nothing is fetched that need not be."""
    kind = "length_controlled_winrate" if self.length_controlled else "win_rate"
    metric = "get_length_controlled_winrate" if self.length_controlled else "get_winrate"
    more = {"metric_kwargs": {"save_weights_dir": str(folder / "weights")}} if self.length_controlled else {}
    return {
      "model_outputs": folder / "outputs.json",
      "reference_outputs": references,
      "annotators_config": self.config,
      "name": generator,
      "output_path": folder,
      "caching_path": folder / f"verdicts-{self.digest()}.json",
      "precomputed_leaderboard": None,
      "fn_metric": metric,
      "sort_by": kind,
      **more,
    }


def _environment(how: Annotating, folder: pathlib.Path) -> dict[str, str]:
  """That of the command: with `how.url` it asks that server, with the key of our own environment, written nowhere."""
  environment = dict(os.environ)
  if how.url:
    clients = folder / "clients.yaml"
    clients.write_text(json.dumps({"default": [{"base_url": how.url}]}))  # JSON is YAML, too.
    environment |= {"OPENAI_CLIENT_CONFIG_PATH": str(clients), service.KEY: os.environ.get(service.KEY) or "none"}
  return environment


def _call(arguments: Mapping[str, Any], how: Annotating, folder: pathlib.Path) -> None:
  """Runs the command, which ends with us; ValueError, with the end of what it printed, where it fails."""
  command = shutil.which("alpaca_eval", path=str(pathlib.Path(sys.executable).parent))
  if command is None:
    raise ValueError("the package alpaca_eval is not installed beside this Python: pip install -e '.[eval]'.")
  words = [command, *(f"--{name}={value}" for name, value in arguments.items())]
  last = deque[str](maxlen=15)
  log = folder / "log.txt"
  with (
    log.open("w", encoding="utf-8") as file,
    futures.ThreadPoolExecutor(1) as pool,
    subprocess.Popen(
      words,
      cwd=folder,
      env=_environment(how, folder),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      start_new_session=True,  # A group of its own, with the workers that it starts.
    ) as process,
  ):

    def read() -> None:
      for line in process.stdout or ():
        shown = service.hidden(line)  # An error may repeat the key.
        file.write(shown)
        last.append(shown)
        distributed.progress("alpaca_eval")

    reading = pool.submit(read)  # In a thread: who waits for a line hears nobody.
    try:
      while not reading.done():
        futures.wait([reading], 0.2)
        interruption.check()
      reading.result()
    except BaseException:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      raise
  if process.returncode:
    raise ValueError(f"alpaca_eval ended with {process.returncode}; all that it said is in {log}:\n{''.join(last)}")


def _figures(folder: pathlib.Path, generator: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """The model's line of leaderboard.csv, and annotations.json."""
  with (folder / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
    table = {line[""]: line for line in csv.DictReader(file)}
  line = {name: value for name, value in table[generator].items() if name not in ("", "mode") and value}
  return {name: float(value) for name, value in line.items()}, json.loads((folder / "annotations.json").read_text())


def compare(
  rows: Sequence[Mapping[str, str]], references: pathlib.Path, how: Annotating, folder: pathlib.Path
) -> dict[str, Any]:
  """Runs the package's command on a model's rows, and reads what it found.

  Args:
    rows: of `outputs`.
    references: the file of the answers to compare with.
    how: who judges.
    folder: where the command works; verdicts that it paid for before are taken from there.

  Returns:
    Its figures as it names them (win rates in per cent), and "judged" and "unreadable" comparisons.

  Raises:
    ValueError: the package is missing, it failed, or its figures are not those of its own verdicts.
  """
  folder.mkdir(parents=True, exist_ok=True)
  generator = rows[0]["generator"]
  (folder / "outputs.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
  _call(how.arguments(folder, references, generator), how, folder)
  results = folder if "/" in how.config else folder / how.config
  found, verdicts = _figures(results, generator)
  preferences = [one["preference"] for one in verdicts]
  ours = {"win_rate": win_rate(preferences), "avg_length": int(statistics.fmean(len(row["output"]) for row in rows))}
  for name, value in ours.items():
    if value is None or not math.isclose(value, found.get(name, math.nan), abs_tol=1e-6):
      raise ValueError(
        f"{results}: alpaca_eval says {name} {found.get(name)}, its verdicts and our answers say {value}. "
        f"Delete {folder} and run it again; if that does not help, this version of alpaca_eval counts in another way."
      )
  judged = int(found["n_total"])
  return {"length_controlled_winrate": None, **found, "judged": judged, "unreadable": len(verdicts) - judged}


def _answered(run: outside.Run, rows: Sequence[Row]) -> artifacts.Artifact:
  """The model's answers, sampled as in its evaluation; those that are there are not sampled again."""
  settings, how = run.settings, sampling.Sampling(**run.settings.evaluate.sampling)
  config = {"evaluate.sampling": settings.evaluate.sampling.to_dict()}
  out = run.artifact(f"alpaca_eval/{run.model}/answers", config, ("prompts",))
  out.begin()
  if out.done:
    return out
  asked = prompts(rows)

  def work(speaker: rollout.Speaker, part: Sequence[records.Prompt]) -> list[records.Response]:
    return rollout.answer(speaker, part, 1, how)

  load = functools.partial(modelstore.speaker, run.finished(run.model), settings, run.mesh)
  artifacts.map_shards(out, "answers", asked, settings.generation.shard, run.mesh, load, work)
  answers = list(out.read_shards("answers", records.Response))
  counts = {
    "prompts": len(asked),
    "prompts too long": len(asked) - len(answers),
    "cut by the length limit": sum(not answer.finished for answer in answers),
  }
  logger.info("%s: %s", out.folder, counts)
  out.commit({"counts": counts})
  return out


def export(run: outside.Run) -> None:
  """Answers the prompts of a file, and writes the answers for the package: `srlm export alpaca-eval`."""
  rows, path = read_rows(run.files["prompts"]), run.files["out"]
  if path.suffix != ".json":
    raise ValueError(f"--out={path}: alpaca_eval tells a file's format by its name: end it in .json.")
  answers = list(_answered(run, rows).read_shards("answers", records.Response))
  text = json.dumps(outputs(rows, answers, run.model), indent=1, ensure_ascii=False)

  def write() -> None:
    workdir.make(path.parent, "--out")
    storage.write(path, text)

  distributed.first(f"write {path}", write)
  logger.info("wrote %d answers of %s for alpaca_eval: %s", len(rows), run.model, path)


def evaluate(run: outside.Run) -> None:
  """Answers, runs the package's command, and keeps its figures: `srlm evaluate alpaca-eval`."""
  rows, how = read_rows(run.files["prompts"]), config_lib.frozen(Annotating, run.settings.alpaca_eval)
  references = run.files.get("references", run.files["prompts"])
  reference = reference_name(references, read_rows(references))
  folder = run.workdir / "outside" / "alpaca_eval" / run.model / "compared"
  if "://" in f"{folder} {references}":
    raise ValueError(
      f"alpaca_eval works on this machine's own files, not in {folder} on {references}: "
      "use `srlm export alpaca-eval`, and run alpaca_eval on the file that it writes."
    )
  if how.length_controlled and len(rows) != WHOLE:
    logger.warning("length control is made for AlpacaEval's %d instructions; these are %d", WHOLE, len(rows))
  out = _answered(run, rows)
  answers = list(out.read_shards("answers", records.Response))
  work = functools.partial(
    compare, outputs(rows, answers, run.model), pathlib.Path(references).resolve(), how, pathlib.Path(folder)
  )
  facts = {
    "annotators": how.annotators,
    "reference": reference,
    "instructions": len(rows),
    "counts": out.manifest()["facts"]["counts"],
    **distributed.first("alpaca_eval", work),
  }
  path = outside.save(run, "alpaca_eval", facts)
  controlled = facts["length_controlled_winrate"]
  logger.info(
    "%s against %s: win rate %.2f %%, length-controlled %s, mean length %d characters, unreadable %d: %s",
    *(run.model, reference, facts["win_rate"], "–" if controlled is None else f"{controlled:.2f} %"),
    *(facts["avg_length"], facts["unreadable"], path),
  )
