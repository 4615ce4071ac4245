"""Being told to stop: SIGTERM (a launcher's, or a machine's that is taken away) and Ctrl-C.

A signal is noted by a thread of its own, whatever the main thread does: while a program compiles or a device computes,
Python runs no handler.  The main thread meets it at the next `check`, between two steps, texts or files, and the work
unwinds as after an error: training saves its state, what is being saved is waited for.  Where that takes longer than
SRLM_GRACE_SECONDS (20), or at a second Ctrl-C, the process leaves as it is, with the same exit code.  Nothing that is
committed is lost then, either: that is what whole files and manifests are for.

Before the work begins there is nothing to unwind, and a process leaves at the first signal (`at_once`).  This module
imports nothing heavy, so that it can be had before everything else.
"""

import atexit
from collections.abc import Callable, Iterable, Iterator
import contextlib
import os
import signal
import threading
from typing import Any, NoReturn, TypeVar

from srlm_jax import endings

T = TypeVar("T")

STOPS = {signal.SIGTERM: endings.AGAIN, signal.SIGINT: endings.INTERRUPTED}

_came: list[signal.Signals] = []  # The first of them decides the exit code.
_first: dict[signal.Signals, Any] = {}  # The handlers that `at_once` stands in for,
_before: dict[signal.Signals, Any] = {}  # and those that `session` does.


def grace() -> float:
  """Seconds that the work may take to end by itself."""
  return float(os.environ.get("SRLM_GRACE_SECONDS", 20))


def asked() -> bool:
  """Whether this process has been told to stop."""
  return bool(_came)


def check() -> None:
  """A place where the work can be left: in the main thread of a process that was told to stop it raises.

  Raises:
    KeyboardInterrupt: after Ctrl-C.
    endings.Terminated: after SIGTERM.
  """
  if _came and threading.current_thread() is threading.main_thread():
    raise KeyboardInterrupt if _came[0] == signal.SIGINT else endings.Terminated("told to stop by SIGTERM")


def each(items: Iterable[T]) -> Iterator[T]:
  """The items, with a `check` before each."""
  for item in items:
    check()
    yield item


def at_once() -> None:
  """From now on a signal to stop ends the process as it is, with a line; a `session` stands in for that meanwhile.

  An exception would not do: what is raised while Python collects garbage, or tidies up, is dropped.
  """
  for number in _heard():
    _first[number] = signal.signal(number, _leave)
    # Registered first, so called last: the exit code is decided, and what is left of Python's end keeps it.
    atexit.register(signal.signal, number, signal.SIG_IGN)


def _leave(number: int, _: object) -> NoReturn:
  with contextlib.suppress(OSError):  # Its reader is gone, or it is closed.
    os.write(2, f"srlm: {signal.Signals(number).name}: it leaves at once.\n".encode())
  os._exit(STOPS[signal.Signals(number)])


def _heard() -> list[signal.Signals]:
  """What a shell made this process ignore (Ctrl-C, of what runs in a script's background) stays ignored."""
  return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def session(patient: bool, leave: Callable[[str, int], object]) -> Iterator[None]:
  """Within, signals to stop are met at `check`.

  Args:
    patient: whether the work is waited for at all; what only reads leaves at the first signal.
    leave: (message, exit code) ends the process at once.
  """
  _came.clear()
  reading, writing = os.pipe()  # Plain numbers: they stay open until somebody closes them.
  os.set_blocking(writing, False)
  # Python writes each signal's number here as it comes, if only there is some handler.
  fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  _before.update({number: signal.signal(number, lambda *_: None) for number in _heard()})
  thread = threading.Thread(target=_listen, args=(reading, patient, leave), name="srlm signals", daemon=True)
  thread.start()
  try:
    yield
  finally:
    if not _came:  # Else the grace goes on, and the handlers with it, to the end of the process.
      _restore(fd)
      os.close(writing)
      thread.join()
      os.close(reading)


def _restore(fd: int) -> None:
  for number, handler in _before.items():
    signal.signal(number, handler)
  _before.clear()
  signal.set_wakeup_fd(fd)


def _in_child() -> None:
  """A library's child would tell this process of its own signals, and hear none itself."""
  if _before:
    _restore(-1)
  for number, handler in _first.items():
    signal.signal(number, handler)


os.register_at_fork(after_in_child=_in_child)


def _listen(reading: int, patient: bool, leave: Callable[[str, int], object]) -> None:
  """Notes the signals whose numbers arrive, until nobody writes any more."""
  while numbers := os.read(reading, 16):
    for number in numbers:
      if number in STOPS:
        _hear(signal.Signals(number), patient, leave)


def _hear(number: signal.Signals, patient: bool, leave: Callable[[str, int], object]) -> None:
  """Notes a signal, and sees that the process ends in time."""
  code = STOPS[_came[0] if _came else number]
  if not patient or (_came and number == signal.SIGINT):
    leave(f"{number.name}: it leaves at once.", code)
  elif not _came:
    seconds = grace()
    when = f"at the next step or shard, in {seconds:g} s at the latest (Ctrl-C: at once)"
    endings.say(f"srlm: {number.name}: it stops {when}.")
    timer = threading.Timer(
      seconds, leave, [f"the work has not ended within {seconds:g} s (SRLM_GRACE_SECONDS): it leaves as it is.", code]
    )
    timer.daemon = True
    timer.start()
    _came.append(number)
