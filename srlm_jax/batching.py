"""Token lists to rectangular numpy arrays: padding into length buckets, and packing of several examples into a row."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
  """One training example: its token ids, and from which index on they are targets of the loss."""

  tokens: tuple[int, ...]
  target_from: int


def bucket(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length` tokens; ValueError where none does."""
  for size in sorted(buckets):
    if length <= size:
      return size
  raise ValueError(f"{length} tokens do not fit the largest length bucket, {max(buckets)}: raise the maximum length.")


def doubling_buckets(smallest: int, largest: int) -> tuple[int, ...]:
  """Bucket sizes smallest, 1.5 × smallest, 2 × smallest, 3 × … up to and including `largest`."""
  sizes: list[int] = []
  size = smallest
  while size < largest:
    sizes += [size, size * 3 // 2]
    size *= 2
  return (*[s for s in sizes if s < largest], largest)


def pad(rows: Sequence[Sequence[int]], length: int, count: int | None = None, fill: int = 0) -> np.ndarray:
  """int32 [count or len(rows), length], each row padded on the right with `fill`; absent rows are all `fill`."""
  out = np.full((len(rows) if count is None else count, length), fill, np.int32)
  for index, row in enumerate(rows):
    out[index, : len(row)] = row
  return out


def empty_row(length: int) -> dict[str, np.ndarray]:
  """A row of padding: tokens, segments (0 = padding), positions, targets (True where the token is in the loss)."""
  return {
    "tokens": np.zeros(length, np.int32),
    "segments": np.zeros(length, np.int32),
    "positions": np.zeros(length, np.int32),
    "targets": np.zeros(length, np.bool_),
  }


def pack(examples: Sequence[Example], length: int, packed: bool = True) -> list[dict[str, np.ndarray]]:
  """Lays examples into rows of `length` tokens, first fit in the given order, or one example a row.

  Segments are numbered from 1 in each row and positions start again at 0, so that a segment-aware model computes the
  same as on separate rows.  ValueError for an example that is longer than a row.
  """
  rows: list[dict[str, np.ndarray]] = []
  used: list[tuple[int, int]] = []  # (tokens, segments) of each row
  open_rows: list[int] = []
  for example in examples:
    size = len(example.tokens)
    if size > length:
      raise ValueError(f"an example of {size} tokens does not fit a row of {length}: raise the maximum length.")
    place = next((row for row in open_rows if used[row][0] + size <= length), None) if packed else None
    if place is None:
      place = len(rows)
      rows.append(empty_row(length))
      used.append((0, 0))
      open_rows = (open_rows + [place])[-64:]  # A window keeps first fit linear in the number of examples.
    start, segments = used[place]
    row, span = rows[place], slice(start, start + size)
    row["tokens"][span] = example.tokens
    row["segments"][span] = segments + 1
    row["positions"][span] = np.arange(size)
    row["targets"][start + example.target_from : start + size] = True
    used[place] = (start + size, segments + 1)
  return rows


def compact(batch: Mapping[str, np.ndarray], unit: int) -> dict[str, np.ndarray]:
  """The same examples in fewer and shorter rows: what a step learns from stays, what its padding costs goes.

  Rows get the length, a quarter, half or all of what it was, at which they hold least; examples share them as in
  `pack`. Their number is a multiple of `unit`, and of so many units that four numbers at the most are compiled. A batch
  that would not shrink comes back as it is. Dropout, if any, draws other masks for other shapes.

  Args:
    batch: the fields of `pack`, [B, T] each.
    unit: what the number of rows must be a multiple of.
  """
  count, length = batch["tokens"].shape
  unit *= -(-count // (4 * unit))
  examples = []
  for tokens, segments, targets in zip(batch["tokens"], batch["segments"], batch["targets"], strict=True):
    for segment in range(1, segments.max(initial=0) + 1):
      inside = segments == segment
      learnt = targets[inside]
      examples.append(Example(tuple(tokens[inside].tolist()), int(learnt.argmax()) if learnt.any() else len(learnt)))
  examples.sort(key=lambda example: -len(example.tokens))
  best: list[dict[str, np.ndarray]] = []
  size = count * length
  for width in (length // 4, length // 2, length):
    if examples and len(examples[0].tokens) <= width:
      rows = pack(examples, width)
      rows += [empty_row(width)] * (-len(rows) % unit)
      if len(rows) * width < size:
        best, size = rows, len(rows) * width
  return {name: np.stack([row[name] for row in best]) for name in best[0]} if best else dict(batch)
