"""srlm: the command line.

One absl app: the stage is positional, the configuration a file with overrides. What measures a finished model by a
benchmark from outside has two words.

  srlm all --config=configs/tiny.py --workdir=runs/tiny
  srlm judge --config=configs/m2.py:llama2_70b --workdir=gs://bucket/run --config.judge.votes=5
  srlm evaluate mt-bench --config=configs/tiny.py --workdir=runs/tiny --model=m2 --prompts=question.jsonl
"""

import ast
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import sys
import time
import traceback

from absl import app, flags, logging as absl_logging
from etils import epath
import jax
from ml_collections import config_dict, config_flags

from srlm_jax import (
  artifacts,
  commands,
  compiled,
  convert,
  distributed,
  endings,
  interruption,
  llama,
  mesh as mesh_lib,
  modelstore,
  outside,
  plan,
  reward,
  room,
  server,
  slices,
  steps,
  storage,
  tables,
  workdir as workdir_lib,
  xla_flags,
)

logger = logging.getLogger("srlm_jax.main")  # Not __name__: that is __main__ under python -m.

# What reads a run, and so refuses a work directory without one.
_READERS = ("report", "export", "reward", "human-eval", "human-eval-read", *commands.COMMANDS)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration, with its variant: configs/tiny.py:smoke.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of all artifacts, local or gs://; a run goes on where it stopped."
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "For export, reward, human-eval and benchmarks: which model of the work directory (m0, baseline, m1 …); for reward "
  "also endpoint and oracle.",
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "What to write. For export: the Hugging Face folder, or the file; for reward: a JSON file; for compare and "
  "human-eval: the page, NAME.html.",
)
_RUBRIC = flags.DEFINE_string("rubric", "", "For reward: another judge prompt, such as judge_five_bucket, or a path.")
_TREES = flags.DEFINE_string("trees", "", "For reward: Open Assistant trees in place of the run's held-out replies.")
_PROMPTS = flags.DEFINE_string("prompts", None, "For benchmarks: the file of prompts, in the benchmark's own format.")
_REFERENCES = flags.DEFINE_string("references", None, "For benchmarks: a file of answers to compare with.")
_RUNS = flags.DEFINE_list("runs", [], "For compare: the work directories of two runs or more, with commas between.")
_TASKS = flags.DEFINE_list("tasks", [], "For evaluate lm-eval: tasks in place of config.nlp.tasks.")
_AGAINST = flags.DEFINE_string(
  "against", None, "For human-eval: the model whose answers stand beside those of --model."
)
_ITEMS = flags.DEFINE_integer("items", 50, "For human-eval: instructions on the page; the paper has 50.")
_KEY = flags.DEFINE_string("key", None, "For human-eval-read: the .key.json that was made with the page.")
_VOTES = flags.DEFINE_list("votes", [], "For human-eval-read: the files that annotators saved, one of each.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"], "For export: of the tensors; the run's own."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "For plan: a slice (v5p:4x4x4, or two: 2*v5p:4x4x4), or auto (auto:v5p): the smallest that holds the run.",
)
_PROGRAMS = flags.DEFINE_list("programs", [], "For plan: only these of sft, dpo, reference, prefill, decode.")
_JSON = flags.DEFINE_bool("json", False, "For plan: JSON instead of a table.")
_CACHE = flags.DEFINE_string(
  "compilation_cache", "~/.cache/srlm_jax/xla", "Folder of compiled programs, shared by all runs; empty for none."
)
_ROOM = flags.DEFINE_bool(
  "check_room",
  True,
  "Refuse a run that will write more than the disk has free; --nocheck_room for a disk that grows, or compresses.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show where in the code an error arose.")


def usage() -> str:
  """The stages, for --help and for errors."""
  rows = {
    "all": "every stage below, in order; what is done is skipped",
    "stages": "print the steps of this configuration and how far they are; do nothing",
    "plan": "compile every program for a TPU slice, without one: --topology=v5p:4x4x4, auto or auto:v5p",
    "export": "write one model as a Hugging Face folder: --model=m3 --out=FOLDER",
    "reward": "a judge's agreement with people's ranks: --model=m3 [--rubric=NAME] [--trees=FILE] [--out=FILE]",
    "compare": "write a page about several runs side by side: --runs=runs/a,runs/b --out=compare.html",
    "human-eval": "write a blind page for annotators: --model=m2 --against=m1 --items=50 --out=page.html",
    "human-eval-read": "what they chose: --key=page.key.json --votes=a.json,b.json [--workdir=FOLDER, for the report]",
    **steps.STAGES,
    **{words: command.what for words, command in commands.COMMANDS.items()},
  }
  width = max(map(len, rows))
  return "\n".join(
    [
      "Self-Rewarding Language Models in JAX.",
      "",
      "usage: srlm STAGE --config=FILE[:VARIANT] --workdir=FOLDER [--config.KEY=VALUE …]",
      "",
      *(f"  {name:<{width}}  {what}" for name, what in rows.items()),
      "",
    ]
  )


def state(artifact: artifacts.Artifact) -> str:
  """How far a step is: "done", "begun" or "to do"."""
  if artifact.done:
    return "done"
  return "begun" if (artifact.folder / "stage.json").exists() else "to do"


def run_steps(settings: config_dict.ConfigDict, workdir: epath.Path, stage: str, check_room: bool = True) -> None:
  """Runs the steps of a stage ("all": every one). Configurations, inputs and room are checked first."""
  mesh = mesh_lib.make_mesh(**settings.mesh)
  planned = steps.plan(settings, workdir, mesh)
  made = steps.artifacts_of(planned, workdir)
  chosen = [step for step in planned if stage in ("all", step.stage)]
  if not chosen:
    raise ValueError("this configuration has no such step: see `srlm stages`.")
  # Files first: of a damaged one a begun folder would say no more than that it is another.
  steps.check_start(settings, workdir, mesh, [step for step in chosen if not made[step.folder].done])
  for artifact in made.values():
    artifact.check_config()
  workdir_lib.check_writable(workdir)
  with contextlib.ExitStack() as held:
    if stage != "report":  # It may be asked for while a run is at work.
      held.enter_context(workdir_lib.locked(workdir, f"srlm {stage}"))
      held.enter_context(workdir_lib.logs(workdir))
    for step in chosen:  # What is finished is read or kept: damage is found now, and not after hours of work.
      own = [made[step.folder]] if step.stage != "report" else []
      for artifact in (*own, *made[step.folder].inputs.values()):
        if artifact.done:
          artifact.verify()
    todo = [step for step in chosen if step.stage == "report" or not made[step.folder].done]
    if check_room and not storage.is_remote(workdir):  # A store has room.
      workdir_lib.check_room(workdir, room.needed(settings, workdir, todo, made))
    for number, step in enumerate(chosen, 1):
      _run_step(step, made[step.folder], step.mesh or mesh, f"[{number}/{len(chosen)}] {step.folder}")


def _run_step(step: steps.Step, out: artifacts.Artifact, mesh: jax.sharding.Mesh, name: str) -> None:
  """Runs one step, unless it is done already; `name` is for the log."""
  interruption.check()
  if step.stage != "report":
    out.begin()
    if out.done:
      logger.info("%s: done already", name)
      return
  logger.info("%s: stage %s", name, step.stage)
  started = time.monotonic()
  with jax.set_mesh(mesh):
    step.run(out)
  logger.info("%s: finished in %.1f s", name, time.monotonic() - started)


def show_steps(settings: config_dict.ConfigDict, workdir: epath.Path | None) -> None:
  """Prints the steps of a configuration, with their inputs and states."""
  if workdir:
    workdir_lib.check_folder(workdir)
  place = workdir or epath.Path("WORKDIR")
  planned = steps.plan(settings, place, mesh_lib.make_mesh(**settings.mesh))
  made = steps.artifacts_of(planned, place)
  for step in planned:
    how_far = state(made[step.folder]) if workdir else ""
    sources = ", ".join(dict.fromkeys(step.inputs.values())) if step.stage != "report" else "all of them"
    print(f"{step.folder:<20} {step.stage:<10} {how_far:<6} from {sources or 'nothing'}")


def show_plan(settings: config_dict.ConfigDict) -> bool:
  """Compiles the run's programs for --topology and prints what they cost; whether they fit."""
  if settings.base.size not in llama.SIZES:
    raise artifacts.unknown(settings.base.size, list(llama.SIZES), "model size")
  how = settings.model
  config = dataclasses.replace(
    llama.SIZES[settings.base.size],
    dtype=how.dtype,
    param_dtype=how.param_dtype,
    attention=modelstore.attention_kind(settings, "tpu"),
    dropout=0.0,
    remat="none",
  )
  topology = _TOPOLOGY.value or settings.topology
  try:
    return plan.run(settings, config, topology, _PROGRAMS.value, _JSON.value)
  except ValueError as error:
    if settings.topology or topology not in slices.FITS.get(settings.base.size, {}):
      raise
    known = f"{settings.base.size},{topology}"
    raise ValueError(f"{error} The configuration that is known to do is --config=FILE:{known}.") from error


def measure(settings: config_dict.ConfigDict, workdir: epath.Path, words: str) -> None:
  """Runs one of commands.COMMANDS on the model that --model names."""
  mesh = mesh_lib.make_mesh(**settings.mesh)
  planned = steps.plan(settings, workdir, mesh)
  sampling = next(step.mesh for step in planned if step.stage == "evaluate") or mesh
  models = commands.finished_models(planned, workdir)
  for artifact in models.values():
    artifact.check_config()
  paths = {flag.name: commands.absolute(flag.value) for flag in (_PROMPTS, _REFERENCES, _OUT) if flag.value}
  if "out" in paths:
    workdir_lib.check_out(paths["out"], steps.folders(planned, workdir))
  cache = steps.endpoint_cache(settings, workdir)
  outputs = workdir / "outside"
  workdir_lib.check_writable(outputs)
  with workdir_lib.locked(outputs, f"srlm {words}"), workdir_lib.logs(outputs), jax.set_mesh(sampling):
    commands.COMMANDS[words].run(
      outside.Run(settings, workdir, sampling, models, _MODEL.value or "", paths, cache, tuple(_TASKS.value))
    )


def export(settings: config_dict.ConfigDict, workdir: epath.Path, name: str, folder: str) -> None:
  """Writes a model of the work directory, and its tokenizer, as a Hugging Face folder."""
  mesh, out = mesh_lib.make_mesh(**settings.mesh), commands.absolute(folder)
  planned = steps.plan(settings, workdir, mesh)
  made = commands.finished_models(planned, workdir)
  if name not in made:
    raise artifacts.unknown(name, list(made), "finished model of this work directory")
  workdir_lib.check_out(out, steps.folders(planned, workdir), folder=True)
  made[name].verify()
  model = modelstore.load(made[name], settings, mesh)
  if distributed.writes():
    workdir_lib.make(out, "--out")
  convert.export_hf(model, out, made[name].folder / "tokenizer", dtype=_DTYPE.value)
  logger.info("wrote %s as a Hugging Face folder: %s", name, out)
  command = server.serve_command(str(out), modelstore.served_name(made[name]))
  logger.info("for --config.server.url it is served by: %s", command)


def show_reward(settings: config_dict.ConfigDict, workdir: epath.Path, name: str) -> None:
  """Prints how far a judge agrees with people's ranks, beside the paper's figures; --out gets all of it as JSON."""
  mesh = mesh_lib.make_mesh(**settings.mesh)
  planned = steps.plan(settings, workdir, mesh)
  made = steps.artifacts_of(planned, workdir)
  out = commands.absolute(_OUT.value) if _OUT.value else None
  if out:
    workdir_lib.check_out(out, steps.folders(planned, workdir))
  cache = steps.endpoint_cache(settings, workdir)
  sampling = steps.sampling_mesh(settings, mesh)
  found = reward.run(settings, made, sampling, cache, name, _RUBRIC.value, _TREES.value)
  if not distributed.writes():
    return
  print(tables.markdown(reward.table(found)))
  if out:
    workdir_lib.make(out.parent, "--out")
    storage.write(out, json.dumps(found, indent=1))
    logger.info("wrote %s", out)


def _log_to_stderr() -> None:
  """Our own messages; of the libraries (Orbax, TFDS) there are warnings alone."""
  ours = logging.getLogger("srlm_jax")
  handler = logging.StreamHandler()
  who = "" if distributed.writes() else f"{distributed.name()}: "
  handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
  ours.handlers, ours.propagate = [handler], False
  ours.setLevel(logging.INFO if distributed.writes() else logging.WARNING)


def _refused(message: str) -> app.UsageError:
  """The error for a wrong command line."""
  return app.UsageError(message, endings.REFUSED)


def main(argv: Sequence[str]) -> None:
  """Entry point after absl has read the flags."""
  stage = " ".join(argv[1:])
  second = {words.split()[0] for words in commands.COMMANDS}
  if len(argv) != 2 and not (len(argv) == 3 and argv[1] in second):
    raise _refused(f"exactly one stage is wanted, got {stage or 'none'}.")
  valid = [
    "all",
    "stages",
    "plan",
    "export",
    "reward",
    "compare",
    "human-eval",
    "human-eval-read",
    *steps.STAGES,
    *commands.COMMANDS,
  ]
  if stage not in valid:
    raise _refused(str(artifacts.unknown(stage, valid, "stage")))
  if stage == "compare" and not (_RUNS.value and _OUT.value):
    raise _refused("compare needs --runs, work directories with commas between, and --out, the page to write.")
  if _CONFIG.value is None and stage not in ("compare", "human-eval-read"):
    raise _refused("--config is missing: a file such as configs/tiny.py.")
  if not _WORKDIR.value and stage not in ("stages", "plan", "compare", "human-eval-read"):
    raise _refused("--workdir is missing: the folder where this run keeps its artifacts.")
  if stage == "plan" and not (_TOPOLOGY.value or _CONFIG.value.topology):
    raise _refused("plan needs --topology: v5p:4x4x4, say, or auto.")
  if stage == "export" and not (_MODEL.value and _OUT.value):
    raise _refused("export needs --model, a finished model, and --out, the folder to write.")
  if stage == "reward" and not _MODEL.value:
    raise _refused("reward needs --model: a finished model, endpoint, or (in the tiny world) oracle.")
  missing = (
    [f"--{name}" for name in commands.COMMANDS[stage].needs if not flags.FLAGS[name].value]
    if stage in commands.COMMANDS
    else []
  )
  if missing:
    raise _refused(f"{stage} needs {' and '.join(missing)}: {commands.COMMANDS[stage].what}.")
  if stage == "human-eval" and not (_MODEL.value and _AGAINST.value and _OUT.value):
    raise _refused("human-eval needs --model and --against, two evaluated models, and --out, the page to write.")
  if stage == "human-eval-read" and not (_KEY.value and _VOTES.value):
    raise _refused("human-eval-read needs --key, the page's .key.json, and --votes, files that the page saved.")
  absl_logging.set_verbosity(absl_logging.WARNING)  # Before anything of JAX's speaks.
  if _CACHE.value:
    if (cache := pathlib.Path(_CACHE.value).expanduser()).is_file():
      raise _refused(f"--compilation_cache={_CACHE.value} is a file: name a folder, or nothing for none.")
    compiled.keep_in(cache)
  writes = stage == "all" or stage in steps.STAGES or stage in commands.COMMANDS
  with interruption.session(patient=writes, leave=distributed.part), distributed.session():
    _log_to_stderr()
    _run_stage(stage, commands.absolute(_WORKDIR.value) if _WORKDIR.value else None)


def _run_stage(stage: str, workdir: epath.Path | None) -> None:
  """What the command line asks for; an error that a user can act on ends the program with one message."""
  started = time.monotonic()
  try:
    if workdir and stage in _READERS:
      workdir_lib.begun(workdir)
    if stage == "plan":
      sys.exit(0 if show_plan(_CONFIG.value) else 1)
    if stage == "compare" and _OUT.value:
      commands.compare(_RUNS.value, _OUT.value)
    elif stage == "human-eval-read":
      commands.human_result(
        commands.absolute(_KEY.value or ""), [commands.absolute(path) for path in _VOTES.value], workdir
      )
    elif workdir is None or stage == "stages":
      show_steps(_CONFIG.value, workdir)
    elif stage in commands.COMMANDS:
      measure(_CONFIG.value, workdir, stage)
    elif stage == "export" and _MODEL.value and _OUT.value:
      export(_CONFIG.value, workdir, _MODEL.value, _OUT.value)
    elif stage == "reward" and _MODEL.value:
      show_reward(_CONFIG.value, workdir, _MODEL.value)
    elif stage == "human-eval" and _MODEL.value and _AGAINST.value and _OUT.value:
      commands.human_page(
        _CONFIG.value, workdir, (_MODEL.value, _AGAINST.value), _ITEMS.value, commands.absolute(_OUT.value)
      )
    else:
      run_steps(_CONFIG.value, workdir, stage, _ROOM.value)
  except (Exception, KeyboardInterrupt, endings.Terminated) as error:
    code, message = endings.of(error)
    if code == endings.BUG:
      raise
    if _DEBUG.value:
      traceback.print_exception(error)
    ended = endings.Ended(code, f"srlm {stage}: {message}")
    if message and not distributed.name():  # Of several processes each says it where they end together.
      endings.say(str(ended))
    raise ended from error
  logger.info("srlm %s: %.0f s", stage, time.monotonic() - started)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Reads the flags, the configuration's file among them; what is wrong with them ends the program in a sentence."""
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.to_dict()  # A file that could not be read is no error before it is used.
  except SystemExit:  # absl has shown its help, and would end with 1.
    print(end="", flush=True)
    sys.exit(endings.DONE)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
    printed = isinstance(error, OSError) and not error.__cause__  # It is not the file's, but stdout's: of --help.
    if printed or any(re.match("--?debug", argument) for argument in argv):
      raise
    reason = error.__cause__ if isinstance(error, OSError) else error.args[0] if error.args else error
    text = str(reason)
    if text.startswith(("'\\'", "\"'")):  # Of a key inside a section: the message of another KeyError, quoted.
      text = str(ast.literal_eval(text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = " ".join(lines)
    if "Traceback (most recent call last):" in lines:  # A configuration that raises: its error is in the last line.
      told = lines[-1].partition(": ")[2]
    elif isinstance(error, SyntaxError):
      told = f"--config: {error.filename}, line {error.lineno}: {error.msg}. It must be a Python file."
    elif key := re.fullmatch(r"('[^']*')(.*)", told):  # Of a key that no section has.
      told = f"the configuration has no key {key[1]}.{key[2]}"
    elif isinstance(error, OSError):
      told = f"--config: {lines[-1]}"  # The rest is about the ways in which it was looked for.
    endings.say(f"srlm: {told}\n`srlm --help` lists the stages.")
    sys.exit(endings.REFUSED)
  return rest


def run() -> None:
  """Console entry point."""
  xla_flags.prepare(os.environ)
  sys.modules["__main__"].__doc__ = usage()  # What absl shows for --help and beside a usage error.
  with endings.printing():
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  run()
