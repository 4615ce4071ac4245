"""The NLP benchmarks of the paper by lm-eval (`srlm evaluate lm-eval`), for a model of a work directory.

lm-eval brings the tasks and fetches their data from the Hugging Face hub, or takes tasks and data of your own.
"""

from collections.abc import Iterator, Mapping, Sequence
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import artifacts, digests, distributed, mesh as mesh_lib, modelstore, nlp_results
from srlm_jax.nlp_results import How, Result, Results

logger = logging.getLogger(__name__)

FILES = (".yaml", ".yml", ".py", ".jsonl", ".csv")  # Of tasks of one's own; caches of data lie beside them, too.
BOOTSTRAP = 1000  # Resamples for the standard error of metrics that are no means.


def check(settings: config_dict.ConfigDict, tasks: Sequence[str]) -> None:
  """ValueError where lm-eval is not installed, or `nlp` has a setting that cannot be used."""
  if not importlib.util.find_spec("lm_eval"):
    raise ValueError("NLP benchmarks need the package lm-eval, which is not installed: pip install -e '.[eval]'.")
  section = settings.nlp
  if not (tasks or section.tasks):
    raise ValueError("no tasks: name some with --tasks, or in nlp.tasks.")
  shots = {task: section.tasks[task] for task in tasks or section.tasks if task in section.tasks}
  if section.rows < 1 or section.limit < 0 or any(count < 0 for count in shots.values()):
    raise ValueError(f"nlp.rows={section.rows}, limit={section.limit}, shots {shots}: at least 1, 0 and 0.")


def how_to_ask(settings: config_dict.ConfigDict, task: str) -> How:
  """How a task is asked; one that `nlp.tasks` does not have gets the shots that it has itself."""
  section = settings.nlp
  return How(
    shots=section.tasks.get(task),
    chat=settings.chat if section.chat else "",
    add_bos=section.add_bos,
    limit=section.limit,
    max_length=settings.model.max_length,
    lm_eval=importlib.metadata.version("lm_eval"),
    seed=settings.seed,
    files=_files(section.include_path),
  )


def _files(folder: str) -> str:
  """Digest of a folder's tasks and their data, "" without one: changed, they are other tasks."""
  if not folder:
    return ""
  found = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix in FILES)
  return digests.sha256("\n".join(f"{path} {digests.file_sha256(epath.Path(path))}" for path in found).encode())


def task_manager(include_path: str, tasks: Sequence[str]) -> Any:
  """An lm-eval TaskManager that has these tasks; ValueError for a name that is no task and no group of tasks."""
  from lm_eval.tasks import TaskManager

  if include_path and not os.path.isdir(include_path):
    raise ValueError(f"nlp.include_path={include_path}: there is no such folder.")
  if include_path:
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(tasks) <= {*manager.all_subtasks, *manager.all_groups}:  # lm-eval's own thousands need not be read.
      return manager
  manager = TaskManager(include_path=include_path or None)
  valid = [*manager.all_subtasks, *manager.all_groups]
  for task in tasks:
    if task in manager.all_tags:
      raise ValueError(f"{task!r} is a tag of lm-eval, not a task: name the tasks that it stands for.")
    if task not in valid:
      hint = str(artifacts.unknown(task, valid, "task of lm-eval")).partition(" Valid:")[0]  # They are thousands.
      raise ValueError(f"{hint} `lm-eval ls tasks` shows all; nlp.include_path is for tasks of your own.")
  return manager


def _below(group: str, children: Mapping[str, Sequence[str]]) -> Iterator[str]:
  """All tasks and groups below a group."""
  for name in children.get(group, ()):
    yield name
    yield from _below(name, children)


def _metrics(found: Mapping[str, Any]) -> dict[str, float | None]:
  """The figures among what lm-eval says of a task ("metric,filter"); it writes "N/A" where it has none."""
  return {name: value if isinstance(value, int | float) else None for name, value in found.items() if "," in name}


def results_of(found: Mapping[str, Any], tasks: Sequence[str], hows: Mapping[str, How]) -> dict[str, Result]:
  """What lm-eval found, by the tasks that were asked for; a group's tasks are its parts.

  Args:
    found: what `lm_eval.simple_evaluate` returns.
    tasks: that were asked for.
    hows: how each was asked.
  """
  children = found.get("group_subtasks", {})
  made = {}
  for task in tasks:
    parts = list(_below(task, children))
    leaves = [name for name in parts if name not in children] or [task]
    shots = {int(found["n-shot"].get(name, 0)) for name in leaves}
    if len(shots) > 1:
      logger.warning("%s: its tasks have different numbers of shots: %s", task, sorted(shots))
    made[task] = Result(
      how=hows[task],
      shots=max(shots),
      documents=sum(found["n-samples"][name]["effective"] for name in leaves),
      version=str(found["versions"].get(task)),
      metrics=_metrics(found["results"][task]),
      parts={name: _metrics(found["results"][name]) for name in parts},
    )
    wanted = hows[task].shots
    if wanted is not None and shots != {wanted}:  # lm-eval keeps the shots of a task that itself says 0.
      logger.warning("%s: %s shots, nlp.tasks.%s=%d: the task decides this itself", task, sorted(shots), task, wanted)
  return made


def run(
  model: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, tasks: Sequence[str] = ()
) -> Results:
  """Runs tasks on a model and writes their results, those of each number of shots as soon as they are there.

  What the results' file already has, asked in the same way of the same weights, is not done again.

  Args:
    model: the artifact of a finished model.
    settings: of the run; its section `nlp` names the tasks and how they are asked.
    mesh: the devices; in place of one that is each process's own it is all of them, as `mesh` in the settings has it.
    tasks: names of lm-eval's tasks or groups; none: those of `nlp.tasks`.

  Raises:
    ValueError: lm-eval is missing, a task is unknown, or its data cannot be fetched.
  """
  check(settings, tasks)
  tasks = tuple(dict.fromkeys(tasks or settings.nlp.tasks))
  hows = {task: how_to_ask(settings, task) for task in tasks}
  manager = task_manager(settings.nlp.include_path, tasks)
  results = nlp_results.read(model)
  groups: dict[int | None, list[str]] = {}
  for task in tasks:
    if task in results.tasks and results.tasks[task].how == hows[task]:
      logger.info("%s: %s is there already", nlp_results.path(model), task)
    else:
      groups.setdefault(hows[task].shots, []).append(task)
  if not groups:
    return results
  lm = _model(model, settings, mesh_lib.make_mesh(**settings.mesh) if distributed.apart(mesh) else mesh)
  for shots, names in groups.items():
    logger.info("%s: %s, %s shots", model.folder, ", ".join(names), "the tasks' own" if shots is None else shots)
    found = _evaluate(lm, manager, names, shots, settings)
    results = results.model_copy(update={"tasks": {**results.tasks, **results_of(found, names, hows)}})
    nlp_results.write(model, results)
    for name in names:
      logger.info("%s: %s: %s", model.folder, name, results.tasks[name].metrics)
  return results


def _model(model: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> Any:
  """The model as lm-eval takes it."""
  from srlm_jax import lm_eval_model  # It needs lm-eval, which is an extra.

  return lm_eval_model.LlamaLM(
    modelstore.in_use(model, settings, mesh),
    modelstore.load_tokenizer(model),
    mesh,
    chat_kind=settings.chat,
    rows=settings.nlp.rows,
    max_length=settings.model.max_length,
    chunk=settings.model.logits_chunk,
    add_bos=settings.nlp.add_bos,
    seed=settings.seed,
  )


def _evaluate(
  lm: Any, manager: Any, tasks: list[str], shots: int | None, settings: config_dict.ConfigDict
) -> Mapping[str, Any]:
  """One call of lm-eval."""
  import lm_eval

  os.environ.setdefault("DISABLE_MULTIPROC", "1")  # Its bootstrap would fork a process in which JAX has threads.
  try:
    return lm_eval.simple_evaluate(
      model=lm,
      tasks=tasks,
      num_fewshot=shots,
      task_manager=manager,
      limit=settings.nlp.limit or None,
      bootstrap_iters=BOOTSTRAP,
      log_samples=False,
      apply_chat_template=bool(settings.nlp.chat),
      fewshot_as_multiturn=False,
    )
  except ConnectionError as error:
    first = (str(error).splitlines() or [""])[0]
    raise ValueError(
      f"the data of {', '.join(tasks)} could not be fetched ({first}): run it where the Hugging Face hub can be "
      "reached, once, which fills the cache (HF_HOME), or name tasks with data of your own by nlp.include_path."
    ) from error
