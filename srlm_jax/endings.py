"""How a program ends: its exit codes, and what an error says to those who can act on it.

| code | what happened | what helps |
|---|---|---|
| 0 | done | |
| 1 | a bug, here or in a library: the traceback is shown | a report |
| 2 | refused: bad input, a wrong command line, a locked folder or another run's | what the message says |
| 3 | out of memory, of a device or of the host | smaller batches, or more devices |
| 4 | training diverged | a lower learning rate, other data |
| 74 | the disk or the store failed: full, read-only, broken | room; then the same command |
| 75 | told to stop (SIGTERM, a preemption), or another process was lost | the same command; launchers give it |
| 130 | Ctrl-C | the same command |
| 141 | whoever read what it prints has left, as in `srlm stages | head -2`: it ends without a word | |
"""

from collections.abc import Iterator
import contextlib
import dis
import errno
import io
import os
import pathlib
import re
import select
import sys

DONE, BUG, REFUSED, MEMORY, DIVERGED = 0, 1, 2, 3, 4
STORAGE, AGAIN = 74, 75  # EX_IOERR and EX_TEMPFAIL of sysexits.h.
INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells have them.

# What the libraries below JAX say where they have lost another process.
LIBRARIES_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "coordination service")

_PACKAGE = pathlib.Path(__file__).resolve().parent
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.ENETDOWN, errno.ECONNRESET}
# The same from libraries that give no errno: tensorstore, array_record, TFDS. These are strerror's words.
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_BROKEN_WORDS = ("Read-only file system", "Input/output error", "Stale file handle")
_STORES = (
  "gcsfs",
  "fsspec",
  "aiohttp",
  "google.auth",
  "google.cloud",
  "google.api_core",
)  # Their errors are a store's.
_NAMES_A_FILE = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_AGAIN = "The same command goes on from here."


class Terminated(BaseException):
  """Somebody outside asked this process to stop: a launcher, or a machine that is taken away.

  Like KeyboardInterrupt it is no Exception, so that nobody takes it for an error to recover from.
  """


class PeerLost(RuntimeError):
  """Another process is dead, stuck or gone, so this one cannot go on; the run can, once all are started again."""


class Ended(SystemExit):
  """Ends the program with an exit code; the message, for people, is its text."""

  def __init__(self, code: int, message: str):
    super().__init__(message)
    self.code = code


def of(error: BaseException) -> tuple[int, str]:
  """The exit code for an error that ended the work, and what it says to a user.

  A ValueError is a refusal where a `raise` of this package (or of a configuration) made it; any other is a bug.
  """
  match error:
    case KeyboardInterrupt():
      return INTERRUPTED, f"interrupted. {_AGAIN}"
    case Terminated():
      return AGAIN, f"{error or 'told to stop'}. {_AGAIN}"
    case PeerLost():
      return AGAIN, str(error)
    case FloatingPointError():
      return DIVERGED, str(error)
    case ValueError() if _ours(error):
      return REFUSED, str(error)
    case BrokenPipeError() if _unread():
      return UNREAD, ""
  for code, say in ((STORAGE, _storage), (MEMORY, _memory)):  # In this order: tensorstore has one name for both.
    for cause in _chain(error):
      if message := say(cause):
        return code, message
  if isinstance(error, _NAMES_A_FILE):
    return REFUSED, str(error)
  if _of_jax(error) and any(sign in str(error) for sign in LIBRARIES_LOST):
    return AGAIN, f"{type(error).__name__}: {first_line(error)}"
  return BUG, f"{type(error).__name__}: {first_line(error)}"


def say(message: str) -> None:
  """Tells people something on stderr; where that is closed or nobody reads it any more, the work goes on without."""
  with contextlib.suppress(OSError, ValueError):
    print(f"{message}\n", end="", file=sys.stderr, flush=True)  # Whole: other threads may speak, too.


@contextlib.contextmanager
def printing() -> Iterator[None]:
  """Within, stdout fails where something is printed, and not after the end; what fails there ends the program."""
  streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]  # Open ones.
  for stream in streams:
    stream.reconfigure(line_buffering=True)
  try:
    yield
  except OSError as error:
    code, message = of(error)
    if code == BUG:
      raise
    if message:
      say(f"srlm: {message}")
    sys.exit(code)
  finally:
    for stream in streams:
      try:
        stream.flush()
      except OSError:  # Python would try once more at its end, say so, and end with another code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unread() -> bool:
  """Whether stdout is a pipe that nobody reads any more."""
  stdout = select.poll()
  stdout.register(1, 0)
  return any(event & select.POLLERR for _, event in stdout.poll(0))


def first_line(error: BaseException) -> str:
  """The first line of an error's message."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
  """The error, those that led to it, and those of its group.

  What is raised while another error is handled counts as led to by that one: libraries raise anew without `from`, and
  where a full disk stops a write, tidying up fails as well.
  """
  seen: list[BaseException] = []
  ahead: list[BaseException | None] = [error]
  while ahead:
    one = ahead.pop(0)
    if one is None or any(one is other for other in seen):
      continue
    seen.append(one)
    yield one
    ahead += [one.__cause__, None if one.__suppress_context__ else one.__context__]
    ahead += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def _storage(error: BaseException) -> str:
  """What to say where the disk or the store failed, or nothing."""
  text = " ".join(str(error).split())
  number = error.errno if isinstance(error, OSError) else None
  words = "" if isinstance(error, OSError) or _ours(error) else text  # Our own messages may quote anybody's text.
  lost = isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, BrokenPipeError)
  store = f"{type(error).__module__}.".startswith(tuple(f"{package}." for package in _STORES))
  if number in _FULL or any(sign in words for sign in _FULL_WORDS):
    return f"the disk is full: {_cut(text)} Make room. {_AGAIN}"
  if number in _BROKEN or any(sign in words for sign in _BROKEN_WORDS) or lost or store:
    return f"the disk or the store failed: {type(error).__name__}: {_cut(text)} {_AGAIN}"
  return ""


def out_of_memory(error: BaseException) -> bool:
  """Whether memory was short, by the error or what led to it: the files that were being read may be whole."""
  return any(_memory(cause) for cause in _chain(error))


def _memory(error: BaseException) -> str:
  """What to say where memory was short, or nothing."""
  on_device = _of_jax(error) and "RESOURCE_EXHAUSTED" in str(error)
  on_host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
  no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)  # No room for its stack.
  if not (on_device or on_host or no_thread):
    return ""
  return (
    f"out of memory ({_cut(first_line(error))}) In sampling and judging lower config.generation.rows; in training "
    "raise config.sft.accumulate or config.dpo.accumulate, set config.model.remat='full', or lower "
    f"config.model.logits_chunk; or use more devices (`srlm plan` says what fits). {_AGAIN}"
  )


def _of_jax(error: BaseException) -> bool:
  import jax  # Not above: whoever starts the program needs the codes before the seconds that this takes.

  return isinstance(error, jax.errors.JaxRuntimeError)


def _cut(text: str, longest: int = 300) -> str:
  """A library's message, as a sentence of bounded length."""
  short = text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"
  return short if re.search(r"[.!?]$", short) else f"{short}."


def _ours(error: BaseException) -> bool:
  """Whether a `raise` of this package or of a configuration made it."""
  trace = error.__traceback__
  if trace is None:
    return True  # Never raised: it was made here, to be told.
  while trace.tb_next:
    trace = trace.tb_next
  code = trace.tb_frame.f_code
  path = pathlib.Path(code.co_filename).resolve()
  # What a C function raises, or what JAX hides the frames of, seems to come from a call of ours.
  raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
  return raised and (_PACKAGE in path.parents or path.parent.name == "configs")
