"""The tiny world's judges: an annotator, who writes what is true of an answer, and the forum's, who are careless.

A judgement goes through the parts of the instruction field by field, then counts the points and ends in the line that
is parsed. Each of its fields is a copy from the prompt or follows from the fields just before it, so that a small model
can learn to write it.

A rubric whose lowest score, `low`, is above 0 has categories: the judgement counts no points but names the category,
the lowest one for every response that would have earned less.
"""

import numpy as np

from srlm_jax import world


def _yes(value: bool) -> str:
  """A field's value in words."""
  return "yes" if value else "no"


def _asked(part: world.Part) -> str:
  """What a part asks for, in the words of a judgement."""
  if part.task == "list":
    return str(part.amount)
  return f"{part.wanted[0]} to {part.wanted[-1]}" if part.task == "count" else f"{part.wanted[0]} {part.amount}"


def _written(
  cells: tuple[world.PartCheck, ...],
  done: list[str],
  labels: list[bool],
  opening: bool,
  extra: bool,
  score: int,
  low: int,
) -> str:
  """The text of a judgement: each field is a copy from the prompt, or follows from the fields just before it."""
  lines = []
  for cell, state, label in zip(cells, done, labels, strict=True):
    got = " ".join(word for pair in zip(cell.items, cell.marks, strict=True) for word in pair if word) or "none"
    lines.append(f"{cell.part.label} asked {_asked(cell.part)} got {got} done {state} label {_yes(label)}.")
  earned = " ".join(str(point) for point in range(1, score + 1)) or "none"
  points = "" if low else f" points {earned}."
  return " ".join(lines) + f" opening {_yes(opening)}. extra {_yes(extra)}.{points}\nScore: {max(score, low)}"


def judgement(text: str, response: str, low: int = 0) -> str:
  """An annotator's written check of a response and its score. ValueError where the instruction is not well formed."""
  found = world.check(world.parts_of(text), response)
  return _written(
    found.parts,
    [part.done for part in found.parts],
    [part.label for part in found.parts],
    found.opening,
    found.extra,
    found.score,
    low,
  )


def noisy_judgement(text: str, response: str, rng: np.random.Generator, noise: float = 0.5, low: int = 0) -> str:
  """A careless forum judge: with probability `noise` each, it misses a flaw, misreads a part, or just says 4.

  At `noise` 0 it equals `judgement`. ValueError where the instruction is not well formed.
  """
  found = world.check(world.parts_of(text), response)
  done, labels = [part.done for part in found.parts], [part.label for part in found.parts]
  opening, extra = found.opening, found.extra
  if rng.random() < noise:
    extra = False
  if rng.random() < noise:
    opening, labels = True, [True] * len(labels)
  for place in range(len(done)):
    if rng.random() < noise / 2:
      done[place] = world.pick(rng, ("full", "full", "half", "little"))
  score = world.points(done, labels, opening, extra)
  if rng.random() < noise / 2:
    score = 4
  elif rng.random() < noise / 2:
    score = min(5, max(0, score + world.pick(rng, (-1, 1))))
  return _written(found.parts, done, labels, opening, extra, score, low)
