#!/usr/bin/env python3
"""Runs srlm on Cloud TPU VMs: makes or reuses the slice, installs, starts on all workers, follows, resumes.

  launch/tpu.py run --name=m70b --project=PROJECT --zone=us-east5-a --type=v5p-128 --version=v2-alpha-tpuv5 --spot \
    -- all --config=configs/llama2.py:llama2_70b --workdir=gs://BUCKET/run
  launch/tpu.py stop --name=m70b --project=PROJECT --zone=us-east5-a     ends the program, keeps the slice
  launch/tpu.py down --name=m70b --project=PROJECT --zone=us-east5-a     deletes the nodes and the queued resource

The program outlives this launcher: the same command joins it again. The slice outlives both; what deletes it is `down`,
`run --delete` after a success, and its being made anew. Logs: runs/logs/NAME/worker-N.log. Exit codes: 0 done; 75 try
again later (retries or patience used up); 2 refused; 130 Ctrl-C, the program goes on; else the program's own.
"""

import argparse
import base64
import binascii
from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import BinaryIO

from tpu_slice import AGAIN, Again, Slice, Stop, Worker, call, check, say

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Worth another try: asked for it, or killed by a signal (137, 143), or by JAX because a peer had died (134).
RESUME = (AGAIN, 134, 137, 143)
PYTHON = ("uv==0.13.8", "3.12")  # What brings Python to images whose own is too old, and which.
NAMES = {
  "name": r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?",
  "project": r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]",
  "zone": r"[a-z]+-[a-z]+[0-9]+-[a-z]",
  "type": r"v[0-9]+[a-z]*-[0-9]+",
  "version": r"[a-z0-9][a-z0-9.-]*",
}
SECONDS = {
  "wait": (6 * 3600, "for the slice"),
  "poll": (30, "between looks at the slice"),
  "log-poll": (2, "between looks at a log"),
  "backoff": (30, "before the first restart; doubles"),
  "settle": (150, "for the other workers to end after the first"),
  "healthy": (3600, "after which a restart is the first again"),
}
Events = queue.Queue[tuple[Worker, int | None | OSError]]  # Exit codes; None for a lost worker; what went wrong here.


class Launcher:
  """One program on one slice."""

  def __init__(self, options: argparse.Namespace, arguments: Sequence[str]):
    self.options, self.arguments, self.slice = options, list(arguments), Slice(options)
    self.logs = pathlib.Path(options.logs).resolve() / options.name
    self.env = dict(pair.split("=", 1) if "=" in pair else (pair, os.environ[pair]) for pair in options.env)
    self.commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()
    self.code = self.logs / "srlm_code.tar.gz"
    self.archive = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={self.code}", self.commit]
    identity = json.dumps([self.commit, self.arguments, sorted(self.env)])
    self.digest = hashlib.sha256(identity.encode()).hexdigest()[:12]  # What a program must share to be joined.
    self.script = ROOT / "launch" / "tpu_worker.sh"

  def everywhere(self, what: str, workers: Sequence[Worker], command: Callable[[Worker], list[str]]) -> list[str]:
    """Runs a command for all workers at the same time; returns what they print. Raises Again where one fails."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
      results = list(pool.map(lambda worker: call(command(worker)), workers))
    for worker, done in zip(workers, results, strict=True):
      check(f"worker {worker.number}, {what}", done, anew=done.returncode == 255)  # 255: no connection.
    return [done.stdout for done in results]

  def prepare(self, workers: list[Worker]) -> str:
    """Installs and starts the program, or finds it running; returns the run's id."""
    slice_ = self.slice
    self.everywhere("copying", workers, lambda worker: slice_.scp(worker, "", self.script, self.code))
    answers = self.everywhere("looking", workers, lambda worker: slice_.ssh(worker, "probe"))
    facts = [dict(line.partition(" ")[::2] for line in answer.splitlines()) for answer in answers]
    runs = [fact.get("run", " ").split(" ") for fact in facts]
    if any(state == "alive" and not run.endswith(self.digest) for run, state in runs):
      raise Stop("another program runs on this slice (other arguments, or another commit): `stop` it first")
    run_id = runs[0][0]
    if run_id.endswith(self.digest) and all(run == run_id and state != "seen" for run, state in runs):
      say(f"joining run {run_id}")
      return run_id
    stale = [worker for worker, fact in zip(workers, facts, strict=True) if fact.get("installed") != self.commit]
    if stale:
      say(f"installing commit {self.commit[:12]} on {len(stale)} of {len(workers)} workers")
      self.everywhere("installing", stale, lambda worker: slice_.ssh(worker, "install", self.commit, *PYTHON))
    if self.env:  # In a file that its owner alone can read, never on a command line; the program's start deletes it.
      with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.writelines(f"export {key}={shlex.quote(value)}\n" for key, value in self.env.items())
        file.flush()
        self.everywhere("copying --env", workers, lambda worker: slice_.scp(worker, "srlm_env", file.name))
    run_id = f"{datetime.datetime.now():%Y%m%dT%H%M%S.%f}-{self.digest}"
    say(f"starting run {run_id} on {len(workers)} workers")
    self.everywhere("starting", workers, lambda worker: slice_.ssh(worker, "start", run_id, *self.arguments))
    return run_id

  def attempt(self, workers: list[Worker]) -> int:
    """One start of the program, or joining it, to its end: the exit code. Raises Again where it can be resumed."""
    run_id = self.prepare(workers)
    events, codes = Events(), dict[Worker, int | None]()
    followers = [Follower(self, worker, run_id, events) for worker in workers]
    try:
      problem = self.watch(workers, events, codes)
    finally:
      for follower in followers:
        follower.stop()
    if not problem:
      with contextlib.suppress(Again):  # Where one does not answer, the next try will see.
        self.everywhere("stopping", workers, lambda worker: self.slice.ssh(worker, "stop"))
    for worker, code in codes.items():
      if code and code not in RESUME:
        log = followers[worker.number].path.read_bytes().decode(errors="replace")
        say(f"worker {worker.number} ended with {code}; the end of its log:\n" + "\n".join(log.splitlines()[-30:]))
        return code
    if problem:
      raise problem
    if any(codes.values()):
      raise Again(f"the program ended with {sorted(filter(None, codes.values()))}")
    return 0

  def watch(self, workers: Sequence[Worker], events: Events, codes: dict[Worker, int | None]) -> Again | None:
    """Collects exit codes until all are there or the rest need not be waited for; returns what befell the slice."""
    deadline = float("inf")
    while len(codes) < len(workers) and time.monotonic() < deadline:
      try:
        worker, code = events.get(timeout=self.options.poll)
      except queue.Empty:
        try:
          state = self.slice.state()
          if state != "ACTIVE" or not self.slice.workers():
            return Again(f"the slice is {state or 'gone'}", anew=True)
        except Again as again:
          if again.anew:
            return again
          say(str(again))  # No answer is no reason to take the slice for lost.
        continue
      if isinstance(code, OSError):
        raise Stop(f"the log of worker {worker.number} cannot be kept, the program goes on: {code}")
      codes[worker] = code
      say(f"worker {worker.number}: " + ("lost" if code is None else f"exit code {code}"))
      if code and code not in RESUME:
        return None
      if code != 0:  # Its peers will end, too; one of them may know the reason.
        deadline = min(deadline, time.monotonic() + self.options.settle)
    lost = [worker.number for worker, code in codes.items() if code is None]
    return Again(f"no connection to worker {lost}", anew=True) if lost else None

  def run(self) -> int:
    """The whole of it, with retries."""
    changes = call(["git", "-C", str(ROOT), "status", "--porcelain"]).stdout.rstrip()
    if changes and not self.options.allow_dirty:
      raise Stop(f"the workers get HEAD, without these changes; commit them, or --allow-dirty:\n{changes}")
    if not any("gs://" in argument for argument in self.arguments):
      say("no gs:// in the arguments: a work directory on the workers is lost with them")
    self.logs.mkdir(parents=True, exist_ok=True)
    lock = (self.logs / "lock").open("w")  # Held as long as this process lives.
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise Stop(f"another launcher watches {self.options.name}") from None
    subprocess.run(self.archive, check=True)
    tries, anew = 0, False
    while True:
      began = time.monotonic()
      try:
        if anew:
          self.slice.remove()
        code = self.attempt(self.slice.ensure())
        if code == 0 and self.options.delete:
          self.slice.remove()
        return code
      except Again as again:
        say(str(again))
        anew = again.anew
        tries = 1 if time.monotonic() - began > self.options.healthy else tries + 1
        if tries > self.options.max_restarts:
          raise Stop("no restarts left; what there is of the slice stays and is billed, until `down`", AGAIN) from None
        pause = min(self.options.backoff * 2 ** (tries - 1), 600)
        say(f"restart {tries} of {self.options.max_restarts} in {pause:g} s" + ", on a new slice" * anew)
        time.sleep(pause)

  def stop(self) -> int:
    """Ends the program on every worker."""
    workers = self.slice.workers() if self.slice.state() == "ACTIVE" else []
    self.everywhere("copying", workers, lambda worker: self.slice.scp(worker, "", self.script))
    self.everywhere("stopping", workers, lambda worker: self.slice.ssh(worker, "stop"))
    return 0

  def down(self) -> int:
    """Deletes the slice."""
    self.slice.remove()
    say(f"there is no {self.options.name}")
    return 0

  def dry_run(self) -> int:
    """Prints every command in its order; runs none of them."""
    slice_, worker, run_id = self.slice, Worker(0, self.slice.nodes[0], 0), f"TIME-{self.digest}"
    stop = ("end the program, on every worker", slice_.ssh(worker, "stop"))
    down = ("delete the slice, until it is gone", slice_.delete, slice_.describe)
    run = [
      ("the code of HEAD", self.archive),
      ("the slice: what there is, create where there is none, wait for ACTIVE", slice_.describe, slice_.create),
      ("its workers, all READY", *map(slice_.describe_node, slice_.nodes)),
      ("from here on, each for every worker, at the same time: copy", slice_.scp(worker, "", self.script, self.code)),
      ("look what is installed and what runs", slice_.ssh(worker, "probe")),
      ("install, where it is another commit", slice_.ssh(worker, "install", self.commit, *PYTHON)),
      *([("copy --env", slice_.scp(worker, "srlm_env", "TEMPORARY_FILE"))] if self.env else []),
      ("start", slice_.ssh(worker, "start", run_id, *self.arguments)),
      ("follow the log from where the local one ends", slice_.ssh(worker, *self.follow(run_id, 0))),
      stop,
      *([down] if self.options.delete else []),
    ]
    copy = ("copy the worker's part, to every worker", slice_.scp(worker, "", self.script))
    steps: dict[str, list[tuple]] = {"run": run, "stop": [copy, stop], "down": [down]}
    for title, *commands in steps[self.options.action]:
      print(f"# {title}", *map(shlex.join, commands), sep="\n")
    return 0

  def follow(self, run_id: str, at: int) -> list[str]:
    """The command of tpu_worker.sh that brings the log from byte `at` on."""
    return ["follow", run_id, str(at), f"{self.options.log_poll:g}"]


class Follower:
  """Brings one worker's log home, and its exit code, over as many connections as that takes."""

  def __init__(self, launcher: Launcher, worker: Worker, run_id: str, events: Events):
    self.launcher, self.worker, self.run_id, self.events = launcher, worker, run_id, events
    self.path = launcher.logs / f"worker-{worker.number}.log"
    self.title = f"===== run {run_id} on {worker.node}, worker {worker.index}".encode()
    self.begin = 0  # Of the worker's log in ours.
    self.stopped = threading.Event()
    self.process: subprocess.Popen[bytes] | None = None
    self.thread = threading.Thread(target=self.run, daemon=True)
    self.thread.start()

  def stop(self) -> None:
    """Ends the connection, not the program."""
    self.stopped.set()
    if self.process and self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGTERM)
    self.thread.join(10)

  def run(self) -> None:
    """The thread: the exit code goes to the events, or what stands in its place."""
    try:
      self.events.put((self.worker, self.follow()))
    except OSError as error:
      self.events.put((self.worker, error))

  def follow(self) -> int | None:
    """Connects until the exit code has come, or too many connections in a row brought no sign of life."""
    text = self.path.read_bytes() if self.path.exists() else b""
    with self.path.open("ab") as log:
      known = [*re.finditer(re.escape(self.title) + rb"(?: from byte (\d+))? =====\n", text)]
      if known:
        self.begin = known[-1].end() - int(known[-1][1] or 0)
      else:
        self.mark(log, b"" if text.endswith(b"\n") or not text else b"\n")
      code, failures = None, 0
      while code is None and failures <= self.launcher.options.ssh_retries and not self.stopped.is_set():
        heard, code = self.connection(log)
        failures = 0 if heard else failures + 1
        self.stopped.wait(0 if code is not None else self.launcher.options.log_poll)
      return code

  def mark(self, log: BinaryIO, before: bytes, place: int = 0) -> None:
    """Writes the line that says whose bytes follow, from which place of the worker's log on."""
    log.write(before + self.title + (f" from byte {place}".encode() if place else b"") + b" =====\n")
    self.begin = log.tell() - place

  def connection(self, log: BinaryIO) -> tuple[bool, int | None]:
    """One connection: was there a sign of life, and the exit code. Pieces tell their place: none is written twice."""
    heard, code = False, None
    command = self.launcher.slice.ssh(self.worker, *self.launcher.follow(self.run_id, log.tell() - self.begin))
    with self.path.with_suffix(".ssh").open("wb") as chatter:
      pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": chatter}
      self.process = subprocess.Popen(command, start_new_session=True, **pipe)
      for line in self.process.stdout or ():
        heard = True
        match line.split():
          case [b"log", place, data]:
            with contextlib.suppress(binascii.Error):  # A piece that a lost connection cut: the next one brings it.
              known = log.tell() - self.begin - int(place)
              piece = base64.b64decode(data, validate=True)[known:] if known >= 0 else b""
              log.write(piece)
              log.flush()
              if self.worker.number == 0:
                sys.stdout.buffer.write(piece)
                sys.stdout.flush()
          case [b"gone", place, b"."] if int(place) > log.tell() - self.begin:
            self.mark(log, b"\n", int(place))
          case [b"exit", value, b"."]:
            code = 137 if value == b"gone" else int(value)
      self.process.wait()
    return heard, code


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Sequence[str]]:
  """The options, and what stands behind --: the arguments of srlm."""
  cut = argv.index("--") if "--" in argv else len(argv)
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("action", choices=["run", "stop", "down"])
  for key in NAMES:
    add(f"--{key}", required=key in ("name", "project", "zone"))
  add("--slices", type=int, default=1, help="more than one: a multislice, over the data centre's network")
  add("--spot", action="store_true", help="cheaper, may be preempted")
  add("--delete", action="store_true", help="delete the slice after success")
  add("--env", action="append", default=[], help="KEY, with its value here, or KEY=VALUE: for the program; not shown")
  add("--allow-dirty", action="store_true", help="run HEAD in spite of uncommitted changes")
  add("--dry-run", action="store_true", help="print the commands, run none")
  add("--create-flag", action="append", default=[], help="more for queued-resources create: --create-flag=--network=N")
  add("--ssh-flag", action="append", default=[], help="more for tpu-vm ssh and scp: --ssh-flag=--internal-ip")
  add("--ssh-retries", type=int, default=2, help="silent connections in a row before a worker is lost (%(default)s)")
  add("--max-restarts", type=int, default=5, help="in a row (%(default)s)")
  add("--logs", default=ROOT / "runs" / "logs", help="folder of the logs (%(default)s)")
  for key, (default, what) in SECONDS.items():
    add(f"--{key}", type=float, default=default, help=f"seconds {what} (%(default)s)")
  options = parser.parse_args(argv[:cut])
  for key, pattern in NAMES.items():
    value = getattr(options, key)
    if (value or options.action == "run") and not re.fullmatch(pattern, value or ""):
      parser.error(f"--{key}={value or ''} must match {pattern}")
  for pair in options.env:
    if not re.fullmatch(r"[A-Za-z_]\w*(=.*)?", pair, re.DOTALL) or not ("=" in pair or pair in os.environ):
      parser.error("--env wants KEY=VALUE, or a KEY that is set here")
  if options.slices < 1 or (options.action == "run") != bool(argv[cut + 1 :]):
    parser.error("--slices is at least 1; srlm's arguments stand behind --, for `run` alone")
  return options, argv[cut + 1 :]


def main(argv: Sequence[str]) -> int:
  """Entry point: the exit code."""
  launcher = Launcher(*parse(argv))
  try:
    return launcher.dry_run() if launcher.options.dry_run else getattr(launcher, launcher.options.action)()
  except (Stop, Again, FileNotFoundError) as error:
    say(str(error))
    return AGAIN if isinstance(error, Again) else getattr(error, "code", 2)
  except KeyboardInterrupt:
    say("watching no longer; the program goes on: the same command joins it, `stop` ends it")
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
