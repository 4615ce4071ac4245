"""Tables as plain data: written once, shown both in HTML and in Markdown, so that the two cannot differ."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, Literal

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
  """One entry.

  Attributes:
    text: the entry.
    small: what stands behind it in smaller type, such as an interval.
    tone: how it is coloured: a claim that holds, one that fails, or one that is open.
  """

  text: str
  small: str = ""
  tone: Literal["", "good", "bad", "open"] = ""


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with a title.

  Attributes:
    name: its anchor.
    title: what stands above it.
    columns: the heads.
    rows: as many cells each as there are columns.
    note: what stands below it.
    words: the columns that hold words rather than figures.
    paper: the columns that quote the paper.
  """

  name: str
  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[Cell, ...], ...]
  note: str = ""
  words: tuple[int, ...] = (0,)
  paper: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    for row in self.rows:
      if len(row) != len(self.columns):
        raise ValueError(f"table {self.name}: a row of {len(row)} cells under {len(self.columns)} columns: {row}.")


def row(*cells: Cell | str) -> tuple[Cell, ...]:
  """Cells, some of them given as their text alone."""
  return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)


def number(value: float | None, digits: int = 0, signed: bool = False) -> str:
  """1234.5 → "1,234"; None → a dash."""
  if value is None:
    return MISSING
  return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def percent(value: float | None, signed: bool = False) -> str:
  """0.787 → "78.7"; None → a dash."""
  return number(None if value is None else 100 * value, 1, signed)


def estimate(found: Mapping[str, Any] | None, digits: int | None = None, signed: bool = False) -> Cell:
  """The figure of a `metrics.Estimate`, as a dict, and its interval: in per cent, or with `digits` decimals."""
  if found is None or found["value"] is None:
    return Cell(MISSING)

  def show(value: float) -> str:
    return percent(value, signed) if digits is None else number(value, digits, signed)

  interval = "" if found["low"] is None else f"[{show(found['low'])}, {show(found['high'])}]"
  return Cell(show(found["value"]), interval)


def duration(seconds: float) -> str:
  """75 → "1 min 15 s"."""
  whole = round(seconds)
  hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


_LEAD = re.compile(r"([0-9]*)([#>]|[-+=.)](?=[\s=-]|$))")  # What begins a heading, a quotation or a list.


def escaped(text: str) -> str:
  """Text that Markdown, and GitHub's with its formulas, shows as it is, in one line."""
  for mark in "\\`*_[]|~$":
    text = text.replace(mark, f"\\{mark}")
  plain = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
  return _LEAD.sub(r"\1\\\2", plain, count=1) if _LEAD.match(plain) else plain


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def markdown(table: Table) -> str:
  """The table in GitHub's Markdown, its title above and its note below."""
  heads = [
    escaped(column) + (" (paper)" if place in table.paper and len(table.paper) > 1 else "")
    for place, column in enumerate(table.columns)
  ]
  rules = ["---" if place in table.words else "---:" for place in range(len(table.columns))]
  rows = [_line([escaped(f"{cell.text} {cell.small}") for cell in cells]) for cells in table.rows]
  parts = [f"### {escaped(table.title)}", "\n".join([_line(heads), _line(rules), *rows])]
  return "\n\n".join([*parts, escaped(table.note)] if table.note else parts) + "\n"
