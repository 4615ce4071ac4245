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


def pad(rows: Sequence[Sequence[int] | np.ndarray], length: int, count: int | None = None, fill: int = 0) -> np.ndarray:
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


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Lays texts of these sizes into rows of `length`, first fit in the given order: which of them each row holds."""
  rows: list[list[int]] = []
  left: list[int] = []
  open_rows: list[int] = []
  for index, size in enumerate(sizes):
    place = next((row for row in open_rows if left[row] >= size), None)
    if place is None:
      place = len(rows)
      rows.append([])
      left.append(length)
      open_rows = (open_rows + [place])[-64:]  # A window keeps first fit linear in the number of texts.
    rows[place].append(index)
    left[place] -= size
  return rows


def row_of(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
  """A row of `length` with these examples, one behind the other.

  Segments are numbered from 1 and positions start again at 0, so that a segment-aware model computes the same as on
  separate rows.
  """
  row, start = empty_row(length), 0
  for segment, example in enumerate(examples, 1):
    size = len(example.tokens)
    span = slice(start, start + size)
    row["tokens"][span] = example.tokens
    row["segments"][span] = segment
    row["positions"][span] = np.arange(size)
    row["targets"][start + example.target_from : start + size] = True
    start += size
  return row


def pack(examples: Sequence[Example], length: int, packed: bool = True) -> list[dict[str, np.ndarray]]:
  """Lays examples into rows of `length` tokens, or one example into each row, in the given order.

  ValueError for an example that is longer than a row.
  """
  sizes = [len(example.tokens) for example in examples]
  if sizes and max(sizes) > length:
    raise ValueError(f"an example of {max(sizes)} tokens does not fit a row of {length}: raise the maximum length.")
  rows = first_fit(sizes, length) if packed else [[index] for index in range(len(sizes))]
  return [row_of([examples[index] for index in row], length) for row in rows]


def examples_of(batch: Mapping[str, np.ndarray]) -> list[Example]:
  """The examples in the rows of a batch, row by row."""
  examples = []
  for tokens, segments, targets in zip(batch["tokens"], batch["segments"], batch["targets"], strict=True):
    for segment in range(1, segments.max(initial=0) + 1):
      inside = segments == segment
      learnt = targets[inside]
      examples.append(Example(tuple(tokens[inside].tolist()), int(learnt.argmax()) if learnt.any() else len(learnt)))
  return examples


def compact(batch: Mapping[str, np.ndarray], unit: int) -> dict[str, np.ndarray]:
  """The same examples in fewer and shorter rows: what a step learns from stays, what its padding costs goes.

  Rows get the length, a quarter, half or all of what it was, at which they hold least; examples share them as in
  `pack`, and `owners` says of each token which example of the batch it belongs to, -1 for padding. The number of rows
  is a multiple of `unit`, and of so many units that eight numbers at the most are compiled. A batch that would not
  shrink comes back as it is. Dropout, if any, draws other masks for other shapes.

  Args:
    batch: the fields of `pack`, [B, T] each.
    unit: what the number of rows must be a multiple of.
  """
  count, length = batch["tokens"].shape
  unit *= -(-count // (8 * unit))
  examples = examples_of(batch)
  order = sorted(range(len(examples)), key=lambda index: -len(examples[index].tokens))
  sizes = [len(examples[index].tokens) for index in order]
  best: list[list[int]] = []
  area, wide = count * length, length
  for width in (length // 4, length // 2, length):
    if not sizes or sizes[0] > width:
      continue
    rows: list[list[int]] = [[order[place] for place in row] for row in first_fit(sizes, width)]
    rows += [[] for _ in range(-len(rows) % unit)]
    if len(rows) * width < area:
      best, area, wide = rows, len(rows) * width, width
  if not best:
    return dict(batch)
  arrays = [row_of([examples[index] for index in row], wide) for row in best]
  owners = [np.repeat(row, [len(examples[index].tokens) for index in row]) for row in best]
  shared = {name: np.stack([array[name] for array in arrays]) for name in arrays[0]}
  return {**shared, "owners": pad(owners, wide, fill=-1)}


def with_places(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The batch with `places`, int32: which of its B · (T - 1) predictions, row by row, have a target.

  Filled up, with a number beyond the last, to a quarter, half or three quarters of the positions, so that three
  programs at the most are compiled for a shape; a batch with more targets comes back without.
  """
  same = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
  places = np.flatnonzero(batch["targets"][:, 1:] & same).astype(np.int32)
  room = next((size for size in (same.size * part // 4 for part in (1, 2, 3)) if len(places) <= size), None)
  return dict(batch) if room is None else {**batch, "places": pad([places], room, fill=same.size)[0]}
