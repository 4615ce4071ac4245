"""Signals to stop, in real processes: met at a check, or after the grace, or at once."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

from etils import epath
import numpy as np
import pytest

from srlm_jax import artifacts, dataset, endings, interruption

ROOT = pathlib.Path(__file__).parents[1]

# Forks a process for each case from one that has imported everything, sends it its signals, each once the child has
# said the word before it, and prints how all ended.
CASES = """
import hashlib, json, os, signal, sys, threading, time
from srlm_jax import distributed, endings, interruption

def steps():
  while True:
    interruption.check()
    time.sleep(0.01)

def compiling():  # No Python code runs in the main thread meanwhile.
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def saving():
  try:
    steps()
  finally:
    print("saved", file=sys.stderr, flush=True)

def in_a_thread():
  def work():
    while not interruption.asked():
      time.sleep(0.01)
    interruption.check()  # Raises in the main thread alone.
    print("thread ended", file=sys.stderr, flush=True)
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  steps()

def child(work, patient, late):
  try:
    with distributed.session(), interruption.session(patient, distributed.part):
      print("here", file=sys.stderr, flush=True)
      work()
  except (KeyboardInterrupt, endings.Terminated) as error:
    code, message = endings.of(error)
  print(message, file=sys.stderr, flush=True)
  time.sleep(late)
  os._exit(code)

def run(work, signals, grace="600", patient=True, late=0.0):
  signal.signal(signal.SIGINT, signal.default_int_handler)  # Pytest may run where it is ignored.
  os.environ["SRLM_GRACE_SECONDS"] = grace
  reading, writing = os.pipe()
  pid = os.fork()
  if not pid:
    os.dup2(writing, 2)
    child(work, patient, late)
  os.close(writing)
  said = os.fdopen(reading)
  lines = []
  for number in signals:
    lines.append(said.readline().strip())
    os.kill(pid, number)
  lines += [line.strip() for line in said]
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines

TERM, INT = signal.SIGTERM, signal.SIGINT
print(json.dumps({
  "term": run(steps, [TERM]),
  "int": run(steps, [INT]),
  "saving": run(saving, [TERM]),
  "thread": run(in_a_thread, [TERM]),
  "grace": run(compiling, [TERM], grace="0.1"),
  "twice": run(compiling, [INT, INT]),
  "both": run(compiling, [TERM, INT]),
  "again": run(steps, [TERM, TERM, TERM], late=0.5),
  "late": run(steps, [TERM], grace="0.1", late=600),
  "gone": run(steps, [TERM, TERM, INT], late=600),
  "reader": run(compiling, [TERM], patient=False),
}))
"""


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, list[str]]]:
  done = subprocess.run([sys.executable, "-c", CASES], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  ("case", "code", "said"),
  [
    ("term", 75, ["told to stop by SIGTERM. The same command goes on from here."]),
    ("int", 130, ["interrupted. The same command goes on from here."]),
    ("again", 75, ["told to stop by SIGTERM. The same command goes on from here."]),
    ("saving", 75, ["saved", "told to stop by SIGTERM. The same command goes on from here."]),
    ("thread", 75, ["thread ended", "told to stop by SIGTERM. The same command goes on from here."]),
  ],
)
def test_the_work_ends_at_its_next_step(
  ends: dict[str, tuple[int, list[str]]], case: str, code: int, said: list[str]
) -> None:
  assert ends[case][0] == code and ends[case][1][0] == "here" and ends[case][1][2:] == said
  name = "SIGINT" if case == "int" else "SIGTERM"
  assert (
    ends[case][1][1] == f"srlm: {name}: it stops at the next step or shard, in 600 s at the latest (Ctrl-C: at once)."
  )


@pytest.mark.parametrize(
  ("case", "code", "said"),
  [
    ("grace", 75, "the work has not ended within 0.1 s (SRLM_GRACE_SECONDS): it leaves as it is."),
    ("twice", 130, "SIGINT: it leaves at once."),
    ("both", 75, "SIGINT: it leaves at once."),
    ("late", 75, "the work has not ended within 0.1 s (SRLM_GRACE_SECONDS): it leaves as it is."),
    ("gone", 75, "SIGINT: it leaves at once."),
    ("reader", 75, "SIGTERM: it leaves at once."),
  ],
)
def test_what_comes_to_no_step_ends_all_the_same(
  ends: dict[str, tuple[int, list[str]]], case: str, code: int, said: str
) -> None:
  assert ends[case][0] == code and ends[case][1][-1] == f"srlm: this process ends: {said}"


def test_where_nothing_came_all_is_as_before() -> None:
  ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
  with interruption.session(True, lambda *_: None):
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  signal.signal(signal.SIGINT, ignored if ignored is not signal.SIG_IGN else signal.default_int_handler)
  before = [signal.getsignal(number) for number in interruption.STOPS]
  threads = threading.active_count()
  with interruption.session(True, lambda *_: None):
    assert not set(before) & {signal.getsignal(number) for number in interruption.STOPS}
    interruption.check()
  assert [signal.getsignal(number) for number in interruption.STOPS] == before
  assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1
  assert interruption.STOPS[signal.SIGTERM] == endings.AGAIN


def test_long_work_without_shards_can_be_left(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """It stops where a file is read or verified, a row is written, or the next of many items is taken."""
  artifact = artifacts.Artifact(epath.Path(tmp_path) / "a", {}, {})
  artifact.begin()
  artifact.write("x.txt", "x")
  artifact.commit({})
  rows = [{"tokens": np.zeros(4, np.int32)}] * 3
  monkeypatch.setattr(interruption, "_came", [signal.SIGTERM])
  for work in (
    lambda: artifact.read_text("x.txt"),
    lambda: artifacts.Artifact(artifact.folder, {}, {}).verify(),
    lambda: dataset.write(tmp_path / "rows", rows),
    lambda: list(interruption.each([1, 2])),
  ):
    with pytest.raises(endings.Terminated):
      work()
  assert not (tmp_path / "rows" / dataset.PAPER).exists()
  monkeypatch.setattr(interruption, "_came", [])
  dataset.write(tmp_path / "rows", rows)
  assert dataset.count(tmp_path / "rows") == 3 and artifact.read_text("x.txt") == "x"


# What the program may do when a signal comes and no session hears it; none of it may drop the signal.
MOMENTS = """
import gc, sys, time, types
import srlm_jax
from srlm_jax import __main__ as start, interruption

def here(*_):
  print("here", flush=True)
  time.sleep(SECONDS)

SECONDS = 60

def collecting():
  gc.callbacks.append(here)
  gc.collect()

def afterwards():
  with interruption.session(True, lambda *_: None):
    pass
  here()

class Last:
  def __del__(self, here=here):
    here()

def tidying():
  global SECONDS, last
  SECONDS, last = 0.5, Last()

assert not {"jax", "numpy", "absl"} & sys.modules.keys()  # It is there in a moment.
srlm_jax.main = types.SimpleNamespace(run=globals()[sys.argv[1]])
start.main()
"""


@pytest.mark.parametrize("moment", ["collecting", "afterwards"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_outside_a_session_a_signal_ends_the_program_at_once(moment: str, number: signal.Signals, code: int) -> None:
  with python("-c", MOMENTS, moment) as program:
    assert program.stdout.readline() == "here\n"
    program.send_signal(number)
    assert program.communicate() == ("", f"srlm: {number.name}: it leaves at once.\n")
  assert program.returncode == code


def test_at_the_very_end_the_exit_code_stays() -> None:
  with python("-c", MOMENTS, "tidying") as program:
    assert program.stdout.readline() == "here\n"
    program.send_signal(signal.SIGTERM)
    assert program.communicate() == ("", "")
  assert program.returncode == 0


def python(*arguments: str) -> subprocess.Popen[str]:
  """A program that hears Ctrl-C, also where pytest does not."""
  hears = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
  command = [sys.executable, "-c", hears, sys.executable, *arguments]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def caught(pid: int) -> int:
  """The signals that a process has handlers for, as Linux writes them."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return int(status.partition("SigCgt:")[2].split()[0], 16)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_the_imports_ends_the_program_at_once(number: signal.Signals, code: int) -> None:
  with python("-m", "srlm_jax", "stages", "--config=configs/tiny.py") as program:
    while not caught(program.pid) >> (signal.SIGTERM - 1) & 1:
      time.sleep(0.01)
    program.send_signal(number)
    assert program.communicate() == ("", f"srlm: {number.name}: it leaves at once.\n")
  assert program.returncode == code


FORKS = """
import os, signal
from srlm_jax import interruption
interruption.at_once()
with interruption.session(True, lambda *_: None):
  if not (child := os.fork()):
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
  ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(ended, interruption.asked())
"""


def test_a_childs_signals_are_its_own() -> None:
  done = subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.split() == [str(-signal.SIGTERM), "False"]
