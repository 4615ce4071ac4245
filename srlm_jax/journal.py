"""The journal of a training, metrics.jsonl: a line a step, each with a checksum, so that a flipped digit is found.

It is written whole each time, as a file in an object store must be: it is never half there. What a kill takes is done
again with its steps.
"""

from collections.abc import Mapping
import json
import logging
import math
from typing import Any
import zlib

from etils import epath

from srlm_jax import digests, storage

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"


def _checksum(row: Mapping[str, Any]) -> str:
  return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def line(row: Mapping[str, Any]) -> str:
  """A step's metrics as a line of JSON with its checksum as "crc"; a number that is not finite becomes null."""
  plain = {
    name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
  }
  return json.dumps({**plain, "crc": _checksum(plain)}) + "\n"


def parse(text: str) -> list[dict[str, Any] | None]:
  """The metrics of each line, without the checksum; None for a line that is cut or not as it was written."""
  rows: list[dict[str, Any] | None] = []
  for one in text.splitlines():
    try:
      row = digests.parsed(one)
    except ValueError:
      row = None
    whole = isinstance(row, dict) and "step" in row and row.pop("crc", None) == _checksum(row)
    rows.append(row if whole else None)
  return rows


def read(path: epath.Path) -> list[dict[str, Any]]:
  """The metrics of the whole lines of a file, in order; none where there is no file."""
  text = path.read_bytes().decode(errors="replace") if path.exists() else ""
  return [row for row in parse(text) if row is not None]


class Journal:
  """What is written of a training while it runs."""

  def __init__(self, path: epath.Path | None, steps: int) -> None:
    """Goes on after `steps` steps: later lines are of steps that are done again. Without a path nothing is kept."""
    self._path = path
    if path:  # A commit that was stopped left it: the file changes from here on.
      (path.parent / f"{path.name}.done").unlink(missing_ok=True)
    self.rows = [row for row in read(path) if row["step"] <= steps] if path else []
    self._text = [line(row) for row in self.rows]
    if path and len(self.rows) < steps:
      logger.warning(
        "%s: the metrics of %d of the first %d steps are damaged or missing; training goes on, and the report is "
        "without them.",
        path,
        steps - len(self.rows),
        steps,
      )

  def add(self, row: Mapping[str, Any]) -> None:
    """Takes the metrics of a step; `flush` writes them."""
    if self._path:
      self._text.append(line(row))

  def flush(self) -> None:
    """Puts all lines on the disk."""
    if self._path:
      storage.write(self._path, "".join(self._text))
