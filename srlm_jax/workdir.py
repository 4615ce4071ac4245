"""The work directory as a whole: what has begun in it, one run at a time, a disk that it can write, and its logs.

What commands write beside it (--out) lies apart from the artifacts: `check_out`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import errno
import json
import logging
from logging import handlers
import os
import pathlib
import secrets
import shutil
import socket
import threading
import time

from etils import epath
import filelock
import jax

from srlm_jax import distributed, endings, storage

logger = logging.getLogger(__name__)

LOG_BYTES, LOG_FILES = 10_000_000, 5  # Of one log file, and how many older ones are kept beside it.
PAPERS = ("stage", "manifest")  # One of these .json files makes a folder an artifact.
BEAT, BEATS = 15, 4  # Seconds between two signs of life of a lease, and how many may be missing.


def begun(folder: epath.Path, name: str = "") -> list[epath.Path]:
  """The folders of a run's artifacts, finished or not; ValueError where there are none (`name` is for the message)."""
  found = _artifacts(folder)
  if not found:
    raise ValueError(
      f"{name or folder} is no work directory of a run (no folder in it has a stage.json): give its --workdir."
    )
  return found


def _artifacts(folder: epath.Path) -> list[epath.Path]:
  patterns = [f"{depth}/{paper}.json" for depth in ("*", "*/*") for paper in PAPERS]
  return sorted({path.parent for pattern in patterns for path in folder.glob(pattern)}) if folder.exists() else []


# One run at a time


@contextlib.contextmanager
def locked(folder: epath.Path, what: str) -> Iterator[None]:
  """Makes the folder, and keeps other runs out of it; of several processes, process 0 does so for all.

  On a disk it is flock: the kernel gives it back however the process ends.  An object store has no locks: see `Lease`.

  Args:
    folder: the work directory, or a part of it that one program writes at a time.
    what: the program, to be named to others.

  Raises:
    ValueError: another run has it.
  """
  with contextlib.ExitStack() as held:
    me = {
      "pid": os.getpid(),
      "host": socket.gethostname(),
      "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "what": what,
      "token": secrets.token_hex(8),
    }
    take = _take_lease if storage.is_remote(folder) else _take_flock
    other = distributed.first(f"lock {folder}", lambda: take(folder, me, held))
    if other is not None:
      raise ValueError(
        f"{folder} is in use by another run: {_told(other)}. Wait for its end, stop it, or give another --workdir."
      )
    yield


def _told(holder: str) -> str:
  """Who has a lock, from the text of its file."""
  try:
    one = json.loads(holder)
    return f"pid {one['pid']} on {one['host']} since {one['since']} ({one['what']})"
  except (ValueError, KeyError, TypeError):  # It may be about to write it.
    return "it does not say which"


def _read(path: epath.Path) -> str | None:
  try:
    return path.read_text()
  except FileNotFoundError:
    return None


def _take_flock(folder: epath.Path, me: Mapping[str, object], held: contextlib.ExitStack) -> str | None:
  make(folder)
  lock = filelock.FileLock(folder / "lock")
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    return _read(folder / "lock.json") or ""
  except OSError as error:
    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
      raise
    logger.warning("%s lies where no file can be locked (%s): a second run in it would not be noticed.", folder, error)
    return None
  held.callback(lock.release)
  storage.write(folder / "lock.json", json.dumps(me))
  return None


def _take_lease(folder: epath.Path, me: Mapping[str, object], held: contextlib.ExitStack) -> str | None:
  def lost(other: str) -> None:
    distributed.part(f"{folder} was taken by another run: {_told(other)}.", endings.REFUSED)

  lease = Lease(folder / "lock.json", me, lost)
  other = lease.take()
  if other is None:
    held.callback(lease.release)
  return other


class Lease:
  """A lock in a store that has none: an object that its holder writes anew every BEAT seconds.

  Who finds one watches it: where it changes, its holder lives; where it has not for BEATS × BEAT seconds, its holder
  was killed, and it is taken over.  No clocks are compared.  Two runs that begin in the same second may both think that
  it is theirs: the one whose object was overwritten finds that at its next beat, and ends.  Until then both write the
  same content to the same names, each file whole.
  """

  def __init__(
    self,
    path: epath.Path,
    holder: Mapping[str, object],
    lost: Callable[[str], object],
    wait: Callable[[float], object] = time.sleep,
  ) -> None:
    """Takes nothing yet.

    Args:
      path: of the object.
      holder: who takes it, for other runs to read; its "token" is like no other's.
      lost: is called, from a thread, with the text of a holder that took it from us.
      wait: seconds.
    """
    self._path, self._holder, self._lost, self._wait = path, dict(holder), lost, wait
    self._over, self._beats = threading.Event(), 0
    self._thread = threading.Thread(target=self._run, name="srlm lease", daemon=True)

  def take(self) -> str | None:
    """Takes it; where another one has it, the text of that one's object."""
    found = _read(self._path)
    if found is not None:
      logger.info("%s is there: %d s to see whether the run that wrote it lives", self._path, BEATS * BEAT)
    for _ in range(BEATS if found is not None else 0):
      self._wait(BEAT)
      now = _read(self._path)
      if now is None:
        break
      if now != found:
        return now
    self._write()
    self._wait(2)  # Who else found none has written by now.
    now = _read(self._path)
    if now is None or not self._ours(now):
      return now or ""
    self._thread.start()
    return None

  def beat(self) -> bool:
    """Shows that the holder lives; False, once `lost` is told, where another one has it."""
    found = _read(self._path)
    if found is not None and not self._ours(found):
      self._lost(found)
      return False
    self._write()
    return True

  def release(self) -> None:
    """Gives it back."""
    self._over.set()
    self._thread.join()
    try:
      found = _read(self._path)
      if found is not None and self._ours(found):
        self._path.unlink()
    except Exception as error:  # noqa: BLE001  # How the work ended says more, and the lease runs out by itself.
      logger.warning("%s could not be deleted: %s", self._path, endings.first_line(error))

  def _ours(self, text: str) -> bool:
    return f'"{self._holder["token"]}"' in text

  def _write(self) -> None:
    self._beats += 1
    storage.write(self._path, json.dumps({**self._holder, "beat": self._beats}))

  def _run(self) -> None:
    while not self._over.wait(BEAT):
      try:
        if not self.beat():
          return
      except Exception as error:  # noqa: BLE001  # Whatever it is: a lease that nobody shows is soon another run's.
        logger.warning("%s could not be written: %s", self._path, endings.first_line(error))  # At the next beat, then.


# The disk


def _there(folder: epath.Path) -> pathlib.Path:
  """The folder, or the nearest one above it that is there."""
  place = pathlib.Path(folder)
  return next(path for path in (place, *place.parents) if path.exists())


def check_folder(folder: epath.Path, flag: str = "--workdir") -> None:
  """ValueError where a local path is no folder, and none can be made there; `flag` is the one that names it."""
  if not storage.is_remote(folder) and not (place := _there(folder)).is_dir():
    raise ValueError(f"{folder}: {place} is a file. Give another {flag}.")


def check_writable(folder: epath.Path, flag: str = "--workdir") -> None:
  """ValueError where a local folder cannot be written, or made; a store says so when the lock is written."""
  check_folder(folder, flag)
  if not storage.is_remote(folder) and not os.access(place := _there(folder), os.W_OK | os.X_OK):
    raise ValueError(f"{folder} cannot be written: {place} is read-only, or another user's. Give another {flag}.")


def make(folder: epath.Path, flag: str = "--workdir") -> None:
  """Makes a folder, and those above it; ValueError where the system allows none there, as below /proc."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
    raise ValueError(f"{folder} cannot be made ({error.strerror}). Give another {flag}.") from error


def check_out(out: epath.Path, planned: Collection[epath.Path] = (), folder: bool = False) -> None:
  """ValueError where --out cannot be written, or must not: what lies in an artifact's folder counts as made by the run.

  Args:
    out: what a command will write, a whole path.
    planned: folders that the run has yet to make.
    folder: whether it is one, and not a file.
  """
  above = out.parents[:-2] if storage.is_remote(out) else out.parents  # The last two are "gs://" and "/".
  for place in (out, *above):
    if place in planned or any((place / f"{paper}.json").exists() for paper in PAPERS):
      raise ValueError(f"--out={out}: {place} is a run's own, and nothing else may write there. Give another --out.")
  if folder and (held := _artifacts(out)):
    raise ValueError(f"--out={out} holds what runs have made ({held[0]}, …): name a new folder, there or elsewhere.")
  if not folder and out.is_dir():
    raise ValueError(f"--out={out} is a folder: name a file in it.")
  check_writable(out if folder else out.parent, "--out")


def check_room(folder: epath.Path, needs: Mapping[str, int]) -> None:
  """ValueError where a local disk has fewer bytes free than a run will write.

  Args:
    folder: the work directory, which need not be there yet.
    needs: bytes, by what they are for.
  """
  if storage.is_remote(folder):
    return
  needed, free = sum(needs.values()), shutil.disk_usage(_there(folder)).free
  if free < needed:
    unit, name_of = (2**30, "GiB") if needed >= 2**30 else (2**20, "MiB")
    parts = ", ".join(f"{size / unit:,.2f} for {name}" for name, size in needs.items() if size)
    raise ValueError(
      f"{folder}: the run will write about {needed / unit:,.2f} {name_of} more ({parts}), and its disk has "
      f"{free / unit:,.2f} {name_of} free. Make room, give another --workdir, or start it all the same by "
      "--nocheck_room."
    )


# Logs


@contextlib.contextmanager
def logs(folder: epath.Path) -> Iterator[None]:
  """Writes this process's messages, and the error that ends it, to `logs/srlm-PROCESS.log` in the folder, too.

  The file is followed by a new one at LOG_BYTES, and LOG_FILES old ones are kept, so that weeks of a run fill no disk.
  Objects of a store cannot be added to: there the launchers' logs are all.
  """
  if storage.is_remote(folder):
    yield
    return
  place = pathlib.Path(folder) / "logs"
  place.mkdir(parents=True, exist_ok=True)
  path = place / f"srlm-{jax.process_index()}.log"
  handler = handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  ours = logging.getLogger("srlm_jax")
  ours.addHandler(handler)
  try:
    yield
  except BaseException as error:
    code, message = endings.of(error)
    trace = (type(error), error, error.__traceback__) if code == endings.BUG else None
    handler.handle(ours.makeRecord(ours.name, logging.ERROR, "", 0, "%s", (message,), trace))
    raise
  finally:
    ours.removeHandler(handler)
    handler.close()
