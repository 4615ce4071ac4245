"""What an instruction asks for: its category, how complex it is, how long a good answer is (paper §3.2, fine-grained).

A judge says it in the words of a template, or the tiny world knows it. The lists of categories and lengths are lines at
the head of the template (`# categories: …; …`), so that a user's own template brings its own.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import re

from srlm_jax import records, templates, world

SIMPLEST, HARDEST = 1, 10  # The scale of complexity, both included.
DIMENSIONS = ("category", "complexity", "length")

_HEADER = re.compile(r"#\s*(categories|lengths)\s*:(.*)", re.IGNORECASE)
_COMPLEXITY = re.compile(rf"([0-9]{{1,2}})(?:\s*(?:/|out of)\s*{HARDEST})?")
_MARKS = " \t\r*_`\"'."  # Around a word, in markdown or without.


@dataclasses.dataclass(frozen=True)
class Options:
  """What may be said of an instruction, in the order in which it is shown; complexity is 1 … 10 always."""

  categories: tuple[str, ...]
  lengths: tuple[str, ...]

  def order(self, dimension: str) -> tuple[str, ...]:
    """The strata of one of `DIMENSIONS`, as text."""
    scale = tuple(str(number) for number in range(SIMPLEST, HARDEST + 1))
    return {"category": self.categories, "complexity": scale, "length": self.lengths}[dimension]


@dataclasses.dataclass(frozen=True)
class Template:
  """A prompt that asks for the class of an instruction.

  Attributes:
    text: with the placeholders `{instruction}`, `{categories}` and `{lengths}`.
    options: what may be answered.
    digest: sha256 of the file, hexadecimal.
  """

  text: str
  options: Options
  digest: str

  def fill(self, instruction: str) -> str:
    """The prompt that asks about this instruction, which need not be trusted."""
    lists = {"categories": ", ".join(self.options.categories), "lengths": ", ".join(self.options.lengths)}
    return templates.fill(self.text, {"instruction": instruction, **lists})


def load_template(name_or_path: str) -> Template:
  """The template of that name in `rubrics/`, or in a user's file (a path has a "/" or ends in .txt).

  Raises:
    ValueError: there is no such file, it lacks a placeholder or a list, or a list has one entry alone or one twice.
  """
  text, digest = templates.load(name_or_path, ("instruction", "categories", "lengths"))
  found: dict[str, tuple[str, ...]] = {}
  lines = text.split("\n")
  while lines and (header := _HEADER.fullmatch(lines[0].strip())):
    found[header[1].lower()] = tuple(entry for part in header[2].split(";") if (entry := " ".join(part.split())))
    lines.pop(0)
  for name in ("categories", "lengths"):
    entries = [entry.lower() for entry in found.get(name, ())]
    if len(entries) < 2 or len(set(entries)) < len(entries):
      raise ValueError(
        f"template {name_or_path!r}: '# {name}: …' must list at least two different {name}, with semicolons between "
        f"them; it has {list(found.get(name, ()))}. Write such a line at the head of the file."
      )
  return Template("\n".join(lines).strip(), Options(found["categories"], found["lengths"]), digest)


def _value(text: str, label: str) -> str | None:
  """What stands behind the last line `Label: …`, without markdown; None where there is none."""
  rule = re.compile(rf"[\s*_#>`-]*{label}[\s*_`]*:(.*)", re.IGNORECASE)
  found = [match[1] for line in text.split("\n") if (match := rule.fullmatch(line))]
  return found[-1].strip(_MARKS) if found else None


def _one_of(value: str | None, options: tuple[str, ...]) -> str | None:
  """The option that the value is, in any case and spacing."""
  plain = " ".join((value or "").lower().split())
  return next((option for option in options if option.lower() == plain), None)


def parse(prompt_id: str, continuation: str, options: Options) -> records.PromptClass:
  """The class that a judge's continuation ends in: the last line of each of `Category:`, `Complexity:` and `Length:`.

  Read strictly: a value that is none of the options makes the whole answer unreadable, so that nothing is guessed.

  Args:
    prompt_id: of the instruction.
    continuation: what the judge wrote after the prompt, never the prompt.
    options: what may be answered.
  """
  category = _one_of(_value(continuation, "category"), options.categories)
  number = _COMPLEXITY.fullmatch(_value(continuation, "complexity") or "")
  complexity = int(number[1]) if number and SIMPLEST <= int(number[1]) <= HARDEST else None
  length = _one_of(_value(continuation, "length"), options.lengths)
  fields = {"category": category, "complexity": complexity, "length": length}
  missing = [name for name, value in fields.items() if value is None]
  if missing:
    return unreadable(prompt_id, continuation, f"no_{missing[0]}")
  return records.PromptClass(
    prompt_id=prompt_id, category=category, complexity=complexity, length=length, text=continuation
  )


def unreadable(prompt_id: str, text: str, reason: str) -> records.PromptClass:
  """The class of an instruction about which the judge said nothing that can be read."""
  return records.PromptClass(prompt_id=prompt_id, category=None, complexity=None, length=None, text=text, reason=reason)


# The tiny world's own: which tasks an instruction has. Two parts have different labels, so only lists can be two alike.
_TASKS = ("list", "count", "say")
WORLD = Options(
  (*_TASKS, *(f"{one} and {two}" for one, two in (("list", "list"), *itertools.combinations(_TASKS, 2)))),
  ("one part", "two parts"),
)


def of_world(prompt: records.Prompt) -> records.PromptClass:
  """What the tiny world knows of an instruction: its tasks, how many items it asks for, and how many parts it has.

  ValueError where it is none of the world's.
  """
  parts = world.parts_of(prompt.text)
  tasks = sorted((part.task for part in parts), key=_TASKS.index)
  items = sum(part.amount for part in parts)
  return records.PromptClass(
    prompt_id=prompt.id,
    category=" and ".join(tasks),
    complexity=min(max(items, SIMPLEST), HARDEST),
    length=WORLD.lengths[len(parts) - 1],
  )


def stratum(one: records.PromptClass, dimension: str) -> str:
  """The stratum of a readable class in one of `DIMENSIONS`, as text."""
  fields: Mapping[str, str | int | None] = {
    "category": one.category, "complexity": one.complexity, "length": one.length,
  }  # fmt: skip
  return str(fields[dimension])
