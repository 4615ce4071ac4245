"""The harness of the fault campaign: whole runs of `srlm` in processes of their own, stopped or hurt at chosen moments.

A process is forked from a server that has imported jax and has not begun to use it, so that an attempt costs what a run
costs, and no imports. In it, Python's audit hooks tell which files are about to be changed, and the program's own
messages which step has begun: nothing of srlm_jax is replaced. `tests/test_faults.py` is the campaign.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import importlib
import json
import logging
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
STEP = re.compile(r"\[\d+/\d+\] (\S+): (stage|finished in) ")  # What the program says of its steps.
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LIMIT = 300  # Seconds: a whole run takes 60 to 100, or twice that beside another one on a busy machine.
GRACE = 30  # Seconds that it has after SIGTERM: `srlm` takes 20 at the most.

# The smoke variant with every stage in it, candidates and refusals, too, and so little of each that a run is seconds.
SMALL = (
  f"--config={ROOT / 'configs' / 'tiny.py'}:smoke",
  "--config.models=2",
  "--config.select.judge=oracle",
  "--config.select.every=50",
  "--config.select.prompts=12",
  "--config.data.ift_examples=80",
  "--config.pretrain.save_every=50",
  "--config.sft.save_every=25",
  "--config.sft.min_steps=100",
  "--config.dpo.save_every=4",
  "--config.dpo.steps=12",
  "--config.generation.shard=16",
)


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a process gets a signal: while a step is at work, some seconds after it began or at one of its calls.

  Attributes:
    step: the step's folder below the work directory; "" for whichever is at work.
    seconds: after the step began; None where it is a call.
    call: before this change of a file below the work directory, counted from 1 at the beginning of the step.
    within: counts only changes of paths that hold this text.
    ended: as soon as the step has ended, instead.
    signal: SIGKILL, SIGTERM or SIGINT.
  """

  step: str
  seconds: float | None = None
  call: int = 0
  within: str = ""
  ended: bool = False
  signal: int = signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Attempt:
  """One process that has ended.

  Attributes:
    code: how: an exit code, or minus the signal.
    said: its stderr.
    fired: where it was when it got the signal: {"step", "path", "call", "training"}; None where it got none.
    steps: what each step that ended took: {folder: {"seconds", "calls"}}.
    hung: whether it did not end by itself: it was told to stop, and killed where that did not help.
  """

  code: int
  said: str
  fired: Mapping[str, Any] | None
  steps: Mapping[str, Mapping[str, float]]
  hung: bool = False


def training() -> dict[str, int] | None:
  """{"done": training steps before the one that is at work, "every": between two saved states}; None outside."""
  frame = sys._current_frames().get(threading.main_thread().ident or 0)
  while frame and (frame.f_code.co_name, frame.f_globals["__name__"]) != ("train", "srlm_jax.train_loop"):
    frame = frame.f_back
  if not frame:
    return None
  values = frame.f_locals
  return {"done": values.get("index", values.get("first", 0)), "every": values["save_every"]}


class _Watch:
  """Sits in the process: knows the step at work, counts changes of files, and sends the signal."""

  def __init__(self, workdir: str, notes: pathlib.Path, moment: Moment | None, snapshots: str | None) -> None:
    self.workdir, self.notes, self.moment, self.snapshots = workdir, notes, moment, snapshots
    self.step, self.began, self.calls, self.path = "", 0.0, 0, ""
    self.matching = 0
    self.lock = threading.Lock()
    self.fired = False

  def note(self, kind: str, **values: object) -> None:
    with self.notes.open("a") as file:
      file.write(json.dumps({"kind": kind, **values}) + "\n")

  def filter(self, record: logging.LogRecord) -> bool:
    """Reads the program's messages about its steps."""
    if found := STEP.match(record.getMessage()):
      (self.enter if found[2] == "stage" else self.leave)(found[1])
    return True

  def enter(self, step: str) -> None:
    if self.snapshots:
      place = pathlib.Path(self.snapshots, step.replace("/", "_"))
      shutil.copytree(self.workdir, place)
    self.step, self.began, self.calls, self.matching = step, time.monotonic(), 0, 0
    if self.moment and self.moment.seconds is not None and self.moment.step == step:
      timer = threading.Timer(self.moment.seconds, self.fire)
      timer.daemon = True
      timer.start()

  def leave(self, step: str) -> None:
    self.note("step", step=step, seconds=time.monotonic() - self.began, calls=self.calls)
    if self.moment and self.moment.ended and self.moment.step == step:
      self.fire()

  def audit(self, event: str, args: tuple) -> None:
    """Python's audit hook."""
    if event not in CHANGES or not self.step or not isinstance(args[0], str | bytes | os.PathLike):
      return
    if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
      return
    path = os.fsdecode(args[0])
    if not path.startswith(self.workdir):
      return
    with self.lock:
      self.calls += 1
      self.path = path.removeprefix(self.workdir).lstrip("/")
      moment = self.moment
      if not moment or not moment.call or moment.step not in ("", self.step) or moment.within not in self.path:
        return
      self.matching += 1
      due = self.matching == moment.call
    if due:
      self.fire()

  def fire(self) -> None:
    with self.lock:
      if self.fired:
        return
      self.fired = True
    self.note("fired", step=self.step, path=self.path, call=self.calls, training=training())
    os.kill(os.getpid(), self.moment.signal)
    if self.moment.signal == signal.SIGKILL:
      signal.pause()


def child(
  arguments: Sequence[str],
  workdir: str,
  place: str,
  moment: Moment | None,
  snapshots: str | None,
  limits: Mapping[int, int],
  program: str,
) -> None:
  """Is `srlm` with these arguments, in a process that was forked for it; `program` is the module whose `run` it is."""
  # One CPU device, and code that is compiled quickly; all of it is kept.
  least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
  os.environ.update({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", least: "0"})
  if "jax" in sys.modules:  # It has read its environment; it has not begun to use it.
    sys.modules["jax"].config.update("jax_platforms", "cpu")
    sys.modules["jax"].config.update(least.lower(), 0.0)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell that starts tests in the background ignores it.
  sys.argv = ["srlm", *arguments]
  out = os.open(f"{place}/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(out, 1)
  os.dup2(out, 2)
  for kind, value in limits.items():
    resource.setrlimit(kind, (value, value))
  watch = _Watch(workdir, pathlib.Path(place, "notes"), moment, snapshots)
  logging.getLogger("srlm_jax.main").addFilter(watch)
  sys.addaudithook(watch.audit)
  importlib.import_module(program).run()  # Not above: who only reads the results needs no jax.


@dataclasses.dataclass(frozen=True)
class Launcher:
  """Starts attempts.

  Attributes:
    programs: folder of compiled programs, shared by all attempts.
    program: the module of the program.
    arguments: of each attempt.
    limit: seconds after which an attempt hangs, and is told to stop.
    grace: seconds after which it is killed, then.
  """

  programs: pathlib.Path
  program: str = "srlm_jax.main"
  arguments: Sequence[str] = SMALL
  limit: float = LIMIT
  grace: float = GRACE

  def begin(
    self,
    workdir: pathlib.Path,
    place: str,
    stage: str = "all",
    *,
    arguments: Sequence[str] = (),
    moment: Moment | None = None,
    snapshots: pathlib.Path | None = None,
    limits: Mapping[int, int] | None = None,
  ) -> multiprocessing.process.BaseProcess:
    """Starts a process; `place` gets what it says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([self.program])
    programs = f"--compilation_cache={self.programs}"
    call = [*stage.split(), *self.arguments, f"--workdir={workdir}", programs, *arguments]
    folder = str(snapshots) if snapshots else None
    process = context.Process(
      target=child, args=(call, str(workdir), place, moment, folder, limits or {}, self.program)
    )
    process.start()
    return process

  def run(self, workdir: pathlib.Path, stage: str = "all", **how: Any) -> Attempt:
    """Starts a process and waits for its end; one that hangs is stopped as an operator would do. See `begin`."""
    with tempfile.TemporaryDirectory() as place:
      process = self.begin(workdir, place, stage, **how)
      process.join(self.limit)
      if hung := process.is_alive():
        process.terminate()
        process.join(self.grace)
        process.kill()
        process.join()
      return attempt(process, place, hung)


def attempt(process: multiprocessing.process.BaseProcess, place: str, hung: bool) -> Attempt:
  """What became of a process that has ended."""
  notes = pathlib.Path(place, "notes")
  lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
  fired = next((line for line in lines if line["kind"] == "fired"), None)
  steps = {line["step"]: line for line in lines if line["kind"] == "step"}
  said = pathlib.Path(place, "said").read_text(errors="replace")
  return Attempt(process.exitcode or 0, said, fired, steps, hung)


# What a run must end with, and what was wrong with a file


def outcome(workdir: pathlib.Path) -> dict[str, str]:
  """{step: digest} of all that is committed; the report, which holds the time of its making, is none of them."""
  found = {}
  for path in sorted(workdir.rglob("manifest.json")):
    name = str(path.parent.relative_to(workdir))
    if name != "report":
      found[name] = json.loads(path.read_text(errors="replace"))["digest"]
  return found


def result(workdir: pathlib.Path) -> dict[str, str]:
  """The files that a run is made for, as they are: pairs, their log-probs, the bits of the weights, the losses."""
  names = ("pairs.jsonl", "reference.jsonl", "fingerprints.json", "metrics.jsonl")
  return {str(path.relative_to(workdir)): path.read_text() for name in names for path in sorted(workdir.rglob(name))}


def saved(workdir: pathlib.Path, step: str) -> int:
  """Training steps that the newest whole state is after; 0 where there is none."""
  return max((int(path.name) for path in workdir.glob(f"{step}/states/*") if path.name.isdigit()), default=0)


def began(said: str) -> dict[str, int]:
  """{training: the step after which a run began it or went on with it first}."""
  found: dict[str, int] = {}
  for step, after in re.findall(r"/(\w+): (?:goes on from step (\d+)|step 1) of ", said):
    found.setdefault(step, int(after or 0))
  return found


def taken(workdir: pathlib.Path, fired: Mapping[str, Any]) -> tuple[int, int]:
  """Training steps that a kill took, and how many it may take at the most; none where no training was at work.

  Those since the last state was due; and, where that was still being saved, the interval before it.
  """
  if not fired["training"]:
    return 0, 0
  done, every = fired["training"]["done"], fired["training"]["every"]
  due = done // every * every
  unfinished = any((workdir / fired["step"] / "states").glob(f"{due}.*tmp*"))
  return done - saved(workdir, fired["step"]), done - due + every * unfinished


def kind_of(path: str) -> str:
  """The kind of a file: its path with the names of models, numbers and hashes left open."""
  path = re.sub(r"\b(baseline|m\d+)(?=/)", "MODEL", path)
  return re.sub(r"[0-9a-f]{32}|\d+", "#", path)


def kinds(workdir: pathlib.Path, rng: random.Random, below: str = "") -> dict[str, str]:
  """{kind: one file of it, drawn}, of all files with something in them."""
  by_kind = collections.defaultdict(list)
  for path in sorted((workdir / below).rglob("*")):
    name = str(path.relative_to(workdir))
    if path.is_file() and path.stat().st_size and not name.startswith("logs/"):
      by_kind[kind_of(name)].append(name)
  return {kind: rng.choice(names) for kind, names in by_kind.items()}


def flip(data: bytes, rng: random.Random) -> bytes:
  """One bit is another."""
  place = rng.randrange(8 * len(data))
  changed = bytearray(data)
  changed[place // 8] ^= 1 << place % 8
  return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
  """The beginning alone, or nothing, is there."""
  return data[: rng.randrange(len(data))]


def empty(data: bytes, rng: random.Random) -> bytes:
  """The name alone is there: the write never reached the disk."""
  del data, rng
  return b""


DAMAGES = {"one bit flipped": flip, "cut at a byte": cut, "emptied": empty}

# Files of Orbax whose content shows in the weights alone, which are compared by the bits of each leaf; and training
# sets that a finished training does not read again.
SHOWN_BY_WEIGHTS = ("weights/", "states/")
READ_BY_NONE = ("/dataset/", "/.")


def said_of(said: str, path: str) -> bool:
  """Whether a message names a damaged file, or the folder of weights, states or data that it is part of."""
  parts = pathlib.PurePath(path).parts
  whole = next((place for place, part in enumerate(parts) if part in ("weights", "states", "dataset", "tokenizer")), 0)
  names = ["/".join(parts[:end]) for end in range(whole + 1 or len(parts), len(parts) + 1) if whole]
  return any(name in said for name in names or [path.removesuffix(".done")])


def judged(attempt: "Attempt", path: str, same: bool, whole: bool, sized: bool = False) -> str:
  """What became of a damaged file: found, harmless, silent or lost.

  Args:
    attempt: the run that met it.
    path: the file's, below the work directory.
    same: whether what was made afterwards is what an undisturbed run makes; that nothing was made is as good.
    whole: whether the file is gone or as it was.
    sized: whether its size, which is not the recorded one, must be found whatever the weights are.
  """
  if attempt.hung:
    return "lost"
  refused, went_on = attempt.code == 2, attempt.code == 0 or attempt.fired is not None
  named = said_of(attempt.said, path)
  if (refused and named) or (went_on and same and named):
    return "found"
  unseen = READ_BY_NONE if sized else (*SHOWN_BY_WEIGHTS, *READ_BY_NONE)
  if went_on and same and (whole or any(part in path for part in unseen)):
    return "harmless"
  return "silent" if went_on and not named else "lost"


class Table:
  """What was tried, and what became of it."""

  COLUMNS = ("tried", "found", "harmless", "survived", "lost", "silent")

  def __init__(self) -> None:
    self.rows: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    self.bad: list[str] = []
    self._lock = threading.Lock()

  def add(self, kind: str, place: str, verdict: str, said: str = "") -> None:
    """Counts one fault; what a lost or silent one said is kept."""
    with self._lock:
      self.rows[kind, place].update(("tried", verdict))
      if verdict in ("lost", "silent"):
        self.bad.append(f"{verdict}: {kind}, {place}\n{said[-1500:]}")

  def markdown(self) -> str:
    """The table, a row for each kind of fault and place, with the sums of each kind."""
    head = f"| fault | place | {' | '.join(self.COLUMNS)} |"
    lines = [head, "|" + "---|" * (2 + len(self.COLUMNS))]
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for (kind, place), counts in self.rows.items():
      lines.append(f"| {kind} | {place} | {' | '.join(str(counts[name]) for name in self.COLUMNS)} |")
      sums[kind].update(counts)
    for kind, counts in sums.items():
      lines.append(f"| {kind} | all | {' | '.join(str(counts[name]) for name in self.COLUMNS)} |")
    return "\n".join(lines) + "\n"
