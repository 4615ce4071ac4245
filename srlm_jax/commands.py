"""What the command line does beside running stages: benchmarks from outside, and pages about runs."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import logging
import secrets

from etils import epath
from ml_collections import config_dict

from srlm_jax import (
  alpaca_eval,
  artifacts,
  comparison,
  distributed,
  grading,
  human_eval,
  mesh as mesh_lib,
  mt_bench,
  nlp,
  outside,
  records,
  steps,
  storage,
  tables,
  workdir as workdir_lib,
)

logger = logging.getLogger(__name__)


def absolute(folder: str) -> epath.Path:
  """The folder's whole path: Orbax takes no other."""
  path = epath.Path(folder)
  return path if "://" in folder else path.expanduser().resolve()


@dataclasses.dataclass(frozen=True)
class Command:
  """What two words ask for: what it does, the flags that it needs, and the function that does it."""

  what: str
  needs: tuple[str, ...]
  run: Callable[[outside.Run], None]


def _lm_eval(run: outside.Run) -> None:
  nlp.run(run.finished(run.model), run.settings, run.mesh, run.tasks)


COMMANDS = {
  "export alpaca-eval": Command(
    "answer prompts, for the package alpaca_eval: --model=m2 --prompts=FILE --out=FILE",
    ("model", "prompts", "out"),
    alpaca_eval.export,
  ),
  "evaluate alpaca-eval": Command(
    "AlpacaEval 2, by that package's own command: --model=m2 --prompts=FILE [--references=FILE]",
    ("model", "prompts"),
    alpaca_eval.evaluate,
  ),
  "evaluate mt-bench": Command(
    "MT-Bench, rated by config.mt_bench.judge: --model=m2 --prompts=question.jsonl [--references=FILE]",
    ("model", "prompts"),
    mt_bench.evaluate,
  ),
  "evaluate lm-eval": Command(
    "the paper's NLP benchmarks by lm-eval: --model=m2 [--tasks=NAME,…]", ("model",), _lm_eval
  ),
}


def finished_models(planned: Sequence[steps.Step], workdir: epath.Path) -> dict[str, artifacts.Artifact]:
  """The models of the work directory by name, in the order in which they were made."""
  made = steps.artifacts_of(planned, workdir)
  return {name: artifact for name, artifact in made.items() if (artifact.folder / "llama.json").exists()}


def compare(folders: Sequence[str], out: str) -> None:
  """Writes a page about the runs in these work directories, and its Markdown beside it."""
  if not out.endswith(".html"):
    raise ValueError(f"--out={out}: the page's name must end with .html; its Markdown is written beside it.")
  page = absolute(out)
  names = [folder.rstrip("/") for folder in folders]
  workdir_lib.check_out(page, [absolute(name) / "report" for name in names])
  found = comparison.compare([comparison.read(absolute(name), name) for name in names])
  if not distributed.writes():
    return
  workdir_lib.make(page.parent, "--out")
  storage.write(page, comparison.html(found))
  storage.write(page.with_suffix(".md"), comparison.markdown(found))
  logger.info("compared %s: %s", ", ".join(names), page)


def human_page(
  settings: config_dict.ConfigDict, workdir: epath.Path, names: tuple[str, str], count: int, out: epath.Path
) -> None:
  """Writes a blind page with two models' first answers to held-out instructions, and its key beside it."""
  planned = steps.plan(settings, workdir, mesh_lib.make_mesh(**settings.mesh))
  workdir_lib.check_out(out, steps.folders(planned, workdir))
  made = steps.artifacts_of(planned, workdir)
  done = {folder.removeprefix("eval/"): one for folder, one in made.items() if folder.startswith("eval/") and one.done}
  for name in names:
    if name not in done:
      raise artifacts.unknown(name, list(done), "model that this work directory has evaluated")
  if len(set(names)) < len(names):
    raise ValueError(f"--model and --against are both {names[0]}: name two models.")
  place = out.with_suffix(".key.json")
  there = distributed.first("look for the page", lambda: [str(path) for path in (out, place) if path.exists()])
  if there:  # Votes on an older page would lose their key.
    raise ValueError(f"{there[0]} is there already: choose another --out, or delete the page and its key.")
  ours, theirs = (
    [one for one in done[name].read_shards("answers", records.Response) if one.sample == 0] for name in names
  )
  if not distributed.writes():
    return
  digests = {name: done[name].digest() for name in names}
  page, key = human_eval.make(grading.align(ours, theirs), names, digests, count, secrets.randbits(48))
  workdir_lib.make(out.parent, "--out")
  storage.write(place, key.model_dump_json(indent=1))
  storage.write(out, page)
  logger.info("wrote %s, %d instructions: give it to the annotators", out, len(key.items))
  logger.info("wrote %s: it says which side is whose; keep it from them, and give it to human-eval-read", place)


def human_result(key_path: epath.Path, votes: Sequence[epath.Path], workdir: epath.Path | None) -> None:
  """Prints what the annotators chose, and writes it into the work directory, if given, where the report finds it."""
  key = human_eval.read_key(key_path)
  found = human_eval.aggregate(key, human_eval.read_ballots(votes, key))
  print(tables.markdown(human_eval.result_table(found, "human", f"{key.model} over {key.against}")))
  print(tables.markdown(human_eval.annotators_table(found, "annotators")))
  if workdir:
    out = artifacts.Artifact(workdir / "analysis" / f"human-{key.model}-{key.against}", {}, {})
    out.folder.mkdir(parents=True, exist_ok=True)
    out.write("human.json", json.dumps(found, indent=1, ensure_ascii=False))
    out.commit(found)
    logger.info("wrote %s; `srlm report` shows it", out.folder)
