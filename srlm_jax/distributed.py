"""Several processes as one program: joining, agreeing, and ending together.

Every process runs the same host code on the same data, device work is one program over all devices, and process 0 alone
writes files.  Sampling alone is shared out, where a process's own devices hold the model: each then works on shards of
its own and writes them (`apart`, `alone`).

A process that is lost, stuck or failed ends the others with a message and `LOST`, the exit code after which a launcher
starts all of them again; the run then goes on where it was.  In a process without others all of this does nothing.

The environment says who takes part: SRLM_COORDINATOR (host:port), SRLM_PROCESSES and SRLM_PROCESS, set by
whoever starts them, or SRLM_PROCESSES=auto where JAX finds them by itself (Cloud TPU, GKE, Slurm).
SRLM_SILENT_SECONDS (300) is how long a process may give no sign of life, SRLM_STUCK_SECONDS (1800) how long all of them
may live and get nowhere.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed as jax_distributed  # The coordination service has no public name.

from srlm_jax import endings, interruption

LOST = endings.AGAIN
NEVER = 10**6  # Seconds. JAX's own time-outs end a process without a word and with another code: ours come first.

T = TypeVar("T")

_calls = itertools.count()  # Numbers what all processes do together: the same number must be the same thing.
_progress: list[Any] = [0, "start"]  # How often this process has moved, and where it was.
_alone = contextvars.ContextVar("alone", default=False)  # Whether this thread works without the others for a while.


def _seconds(name: str, default: float) -> float:
  return float(os.environ.get(name, default))


def _silent() -> float:
  return _seconds("SRLM_SILENT_SECONDS", 300)


def _stuck() -> float:
  return _seconds("SRLM_STUCK_SECONDS", 1800)


def _beat() -> float:
  """Seconds between two signs of life."""
  return min(_silent() / 5, 5)


def _client() -> Any:
  """The coordination service; None in a process that is alone."""
  return None if _alone.get() else jax_distributed.global_state.client


def writes() -> bool:
  """Whether this process is the one that writes files: process 0, or one that works alone."""
  return jax_distributed.global_state.process_id == 0 or _alone.get()


def apart(mesh: jax.sharding.Mesh) -> bool:
  """Whether the mesh is of this process alone, where there are others: then each can do another part of the work."""
  return jax.process_count() > 1 and not mesh.is_multi_process


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """Within, this process works and writes as if there were no other; what it calls must not wait for one."""
  before = _alone.set(True)
  try:
    yield
  finally:
    _alone.reset(before)


def name() -> str:
  """ "process 1 of 2", or nothing in a process that is alone."""
  state = jax_distributed.global_state
  return f"process {state.process_id} of {state.num_processes}" if state.client else ""


def progress(where: str) -> None:
  """Says that this process moves, and is a place where it can stop; see `interruption.check` for what it raises.

  A process that has not moved for SRLM_STUCK_SECONDS ends the run.
  """
  moved(where)
  interruption.check()


def moved(where: str) -> None:
  """Says that this process moves."""
  _progress[:] = _progress[0] + 1, where


# Together


def first(what: str, work: Callable[[], T]) -> T:
  """Process 0 does the work; every process gets its result (of JSON) once it is done.

  Args:
    what: names the work, for messages.
    work: is called by process 0 alone.

  Raises:
    PeerLost: process 0 is gone.
  """
  client = _client()
  if client is None:
    if jax.process_count() > 1 and not _alone.get():
      raise RuntimeError(f"{jax.process_count()} processes that do not know each other: set SRLM_PROCESSES=auto.")
    return work()
  key = f"srlm/first/{next(_calls)} {what}"
  moved(what)
  if writes():
    text = json.dumps(work())
    client.key_value_set(key, text)
  else:
    try:
      text = client.blocking_key_value_get(key, NEVER * 1000)  # Where nobody moves any more, `_watch` ends it.
    except jax.errors.JaxRuntimeError as error:
      raise endings.PeerLost(f"process 0 did not finish {what!r}: {endings.first_line(error)}") from error
  moved(f"after {what}")
  return json.loads(text)


def agree(what: str, value: T) -> T:
  """The value (of JSON) that process 0 has, in every process."""
  return first(what, lambda: value)


def gather(what: str, value: T) -> list[T]:
  """The values (of JSON) of all processes, in their order, in every process."""
  client, state = _client(), jax_distributed.global_state
  if client is None:
    return [value]
  key = f"srlm/gather/{next(_calls)} {what}"
  client.key_value_set(f"{key}/{state.process_id:08d}", json.dumps(value))
  barrier(what)
  return [json.loads(text) for _, text in sorted(client.key_value_dir_get(f"{key}/"))]


def barrier(what: str, seconds: float = NEVER) -> None:
  """Waits until every process is here; PeerLost, naming those that are not, after `seconds`.

  Without `seconds` it waits as long as any process moves: some may have more to do than others.
  """
  client, state = _client(), jax_distributed.global_state
  if client is None:
    return
  key = f"srlm/barrier/{next(_calls)} {what}"
  moved(what)
  client.key_value_set(f"{key}/{state.process_id}", "here")
  try:
    client.wait_at_barrier(key, int(seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    here = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(f"{key}/")}
    absent = ", ".join(str(peer) for peer in range(state.num_processes) if peer not in here)
    raise endings.PeerLost(
      f"process {absent or '?'} did not come to {what!r} in {seconds:g} s ({endings.first_line(error)})."
    ) from error
  moved(f"after {what}")


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Host arrays, the same in every process, as global arrays of which each device holds its part."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  # Unlike device_put, it does not compare the processes' values, which would take a collective for each array.
  return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, array.__getitem__), tree)


def whole(tree: T) -> T:
  """Arrays that every process can read whole: dispatched, not waited for; each device gets all, so small ones alone."""
  if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
    return tree
  mesh = jax.tree.leaves(tree)[0].sharding.mesh
  return _copy(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(tree)


@functools.cache
def _copy(sharding: jax.sharding.Sharding) -> Callable[[T], T]:
  return jax.jit(lambda tree: tree, out_shardings=sharding)


# Beginning and ending


@contextlib.contextmanager
def session() -> Iterator[None]:
  """Joins the processes of a run, where there are several, and sees that they end together."""
  if not _join():
    yield
    return
  over, round_ = threading.Event(), [time.monotonic()]
  threads = [
    threading.Thread(target=work, args=(over, round_), name=f"srlm {work.__name__}", daemon=True)
    for work in (_watch, _guard)
  ]
  for thread in threads:
    thread.start()
  try:
    yield
    barrier("the end")
  except BaseException as error:  # noqa: BLE001  # Also sys.exit: whatever it is, the others must not wait.
    if not (isinstance(error, SystemExit) and not error.code):
      _fail(error)
    barrier("the end")
  over.set()
  for thread in threads:
    thread.join()
  jax.distributed.shutdown()


def _join() -> bool:
  """Joins the run that the environment describes; whether there is one."""
  count = os.environ.get("SRLM_PROCESSES", "1")
  if count == "1" and "SRLM_COORDINATOR" not in os.environ:
    return False
  if count != "auto" and (missing := [name for name in ("SRLM_COORDINATOR", "SRLM_PROCESS") if name not in os.environ]):
    needs = f"SRLM_PROCESSES={count} needs {' and '.join(missing)}, too; SRLM_PROCESSES=auto finds them itself."
    endings.say(f"srlm: {needs}")
    sys.exit(endings.REFUSED)
  signal_abort = ctypes.CDLL(None).signal
  signal_abort(signal.SIGABRT, _on_abort)
  limit = _silent()
  late = threading.Timer(limit + 2 * _beat(), _leave, ["not all processes of the run came to its start.", LOST])
  late.daemon = True
  late.start()
  # A process that is told to stop shall stop; the states that training saves now and then are what a run goes on from.
  jax.config.update("jax_enable_preemption_service", False)
  known: dict[str, Any] = {}
  if count != "auto":
    known = dict(
      coordinator_address=os.environ["SRLM_COORDINATOR"],
      num_processes=int(count),
      process_id=int(os.environ["SRLM_PROCESS"]),
    )
  jax.distributed.initialize(**known, initialization_timeout=int(limit), heartbeat_timeout_seconds=NEVER)
  late.cancel()
  return True


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """JAX aborts a process that the coordinator has left, before Python hears of it; other aborts stay what they are."""
  state = jax_distributed.global_state
  if state.process_id == 0 and state.client:
    os._exit(128 + number)
  try:
    host, _, port = (state.coordinator_address or "").rpartition(":")
    socket.create_connection((host, int(port)), timeout=2).close()
  except (OSError, ValueError):
    _leave("process 0, the coordinator, is gone.", LOST)
  if state.client is None:
    _leave("not all processes of the run came to its start.", LOST)
  os._exit(128 + number)


def _say(message: str) -> None:
  endings.say(f"srlm: {name() or 'this process'} ends: {message}")
  with contextlib.suppress(OSError, ValueError):  # Its reader is gone, or it is closed: no reason to stay.
    print(end="", flush=True)


def _leave(message: str, code: int) -> NoReturn:
  """Ends this process at once, whatever its other threads are doing."""
  _say(message)
  os._exit(code)


def _fail(error: BaseException) -> NoReturn:
  """Shows the error, tells the others and ends this process: an orderly exit would wait for them."""
  if isinstance(error, SystemExit):
    code = error.code if isinstance(error.code, int) else endings.BUG
    message = "" if str(error) == str(code) else str(error)
  else:
    code, message = endings.of(error)
    if code == endings.BUG:
      traceback.print_exception(error)
  part(message or f"exit code {code}", code)


def part(message: str, code: int) -> NoReturn:
  """Tells the other processes, where there are any, and ends this one at once."""
  _say(message)
  if _client():
    telling = threading.Thread(target=_tell, args=(message, code), daemon=True)  # A frozen coordinator does not answer.
    telling.start()
    telling.join(3 * _beat())
  # With the coordinator the message would go; whoever is to start again learns that from its loss, too.
  if _client() and writes() and code != LOST:
    time.sleep(3 * _beat())
  os._exit(code)


def _tell(message: str, code: int) -> None:
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _client().key_value_set(f"srlm/ended/{jax_distributed.global_state.process_id}", json.dumps([code, message]))


class _Peer:
  """What is known of another process, and since when."""

  def __init__(self) -> None:
    self.word, self.heard = "", time.monotonic()
    self.count, self.moved, self.where = -1, time.monotonic(), "start"

  def hear(self, word: str) -> None:
    """Takes its newest sign of life: a number, how often it moved, and where it is."""
    if word == self.word:
      return
    self.word, self.heard = word, time.monotonic()
    _, count, self.where = json.loads(word)
    if count != self.count:
      self.count, self.moved = count, time.monotonic()


def _watch(over: threading.Event, round_: list[float]) -> None:
  """Gives signs of life and looks for those of the others, until it is over or one of them fails.

  `round_` gets the time of each look: calls to a coordinator that is frozen do not return.
  """
  client, state = _client(), jax_distributed.global_state
  peers = [_Peer() for _ in range(state.num_processes)]
  for number in itertools.count():
    if over.wait(_beat()):
      return
    try:
      client.key_value_set(f"srlm/alive/{state.process_id}", json.dumps([number, *_progress]), True)
      words = client.key_value_dir_get("srlm/alive/")
      ended = client.key_value_dir_get("srlm/ended/")
    except jax.errors.JaxRuntimeError:  # A coordinator that is gone for good is `_guard`'s.
      continue
    round_[0] = time.monotonic()
    for path, word in words:
      peers[int(path.rpartition("/")[2])].hear(word)
    for path, said in ended:
      if (peer := path.rpartition("/")[2]) != str(state.process_id):
        code, message = json.loads(said)
        _leave(f"process {peer} ended: {message}", code)  # Its code: what it met, all would meet again, or none.
    _check(peers)


def _guard(over: threading.Event, round_: list[float]) -> None:
  """Leaves where `_watch` has not come round for too long."""
  while not over.wait(_beat()):
    if time.monotonic() - round_[0] > _silent() + 2 * _beat():
      _leave(f"process 0, the coordinator, has not answered for {time.monotonic() - round_[0]:.0f} s.", LOST)


def _check(peers: list[_Peer]) -> None:
  """Leaves where a process is silent or stuck."""
  now = time.monotonic()
  for number, peer in enumerate(peers):
    if now - peer.heard > _silent():
      _leave(f"process {number} has given no sign of life for {now - peer.heard:.0f} s (at {peer.where!r}).", LOST)
  still = now - max(peer.moved for peer in peers)  # One that waits for another is not stuck while that one moves.
  if still > _stuck():
    _leave(
      f"no process has got anywhere for {still:.0f} s; they are at "
      + ", ".join(f"{number}: {peer.where!r}" for number, peer in enumerate(peers)),
      LOST,
    )
