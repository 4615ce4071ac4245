"""The tiny world: instructions that a small model can learn to follow, and a truth that stands outside the loop.

An instruction has one or two parts: things of a kind to list, numbers to count, a word to say. An answer opens with
"Sure!", gives each part under its label, and stops. Its flaws are visible (a part left out, too few items, chatter), so
judging is easier than answering: that is the gap which the loop lives on. The oracle scores any text from 0 to 5,
additive and gated as in the paper (§2.2); nothing in the loop may read it, only reports and the people of this world
(who rank replies and write judgements) do.
"""

import dataclasses
import hashlib
import re
from typing import Any, Literal

import numpy as np

KINDS: dict[str, tuple[str, ...]] = {
  "birds": ("crow", "swan", "owl", "robin", "heron", "dove", "wren", "gull"),
  "fish": ("trout", "carp", "cod", "salmon", "perch", "eel", "tuna", "herring"),
  "fruits": ("apple", "plum", "lemon", "fig", "cherry", "peach", "grape", "mango"),
  "tools": ("hammer", "saw", "drill", "rake", "axe", "spade", "chisel", "wrench"),
  "trees": ("oak", "elm", "pine", "birch", "maple", "willow", "cedar", "beech"),
}
THINGS: tuple[str, ...] = tuple(thing for members in KINDS.values() for thing in members)
AMOUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
LARGEST = 15  # Numbers run from 0 to here.
RUNS = (3, 4, 5)  # How many numbers a counting part asks for.
OPENING = "Sure!"
CHATTER = ("Hope this helps!", "Let me know.", "Have fun!", "Anything else?")
OFF_TOPIC = ("I like tea.", "No idea.", "Nice weather today.", "Ask me later.", "What a day!", "Tea is nice today.")

_AMOUNT_WORDS = {number: word for word, number in AMOUNTS.items()}
# Every phrase has more than three words: Self-Instruct's filters drop the shorter ones.
_LIST_PHRASES = ("give me {} {}", "tell me {} {}", "name {} different {}", "list {} {} for me")
_OPENERS = ("", "please ", "now ")  # Of an instruction: so that even the short ones do not run out.
_LIST_RULES = tuple(re.compile(phrase.format("([a-z]+)", "([a-z]+)")) for phrase in _LIST_PHRASES)
_COUNT_RULE = re.compile(r"count (down )?from ([0-9]{1,2}) to ([0-9]{1,2})")
_SAY_RULE = re.compile(r"(?:say|repeat) ([a-z]+) ([a-z]+) times")
_PIECES = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
_ENDS = ".!?;"


@dataclasses.dataclass(frozen=True)
class Part:
  """One thing that an instruction asks for.

  Attributes:
    task: what to do.
    label: the word that a good answer puts before the part: the kind, "numbers" or "words".
    amount: how many items are asked for.
    wanted: the kind's members; the numbers in their order; or the one word to say.
  """

  task: Literal["list", "count", "say"]
  label: str
  amount: int
  wanted: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Profile:
  """How often a writer slips: probabilities per answer, and per part for `few`, `repeat`, `wrong` and `surplus`."""

  no_opening: float = 0.0
  no_labels: float = 0.0
  chatter: float = 0.0
  few: float = 0.0
  repeat: float = 0.0
  wrong: float = 0.0
  dropped: float = 0.0  # One of two parts left out.
  off_topic: float = 0.0
  surplus: float = 0.0  # Goes on beyond what was asked.


PROFILES: dict[str, Profile] = {
  "human": Profile(0.30, 0.25, 0.30, 0.20, 0.10, 0.12, 0.15, 0.04, 0.06),
  "worse": Profile(0.50, 0.45, 0.50, 0.45, 0.25, 0.30, 0.35, 0.12, 0.15),
  # The form is right and the content is not: what a model that has learnt the form still gets wrong.
  "careless": Profile(0.08, 0.08, 0.08, 0.15, 0.40, 0.25, 0.05, 0.0, 0.30),
  "flawless": Profile(),
  "lost": Profile(off_topic=1.0),
}


@dataclasses.dataclass(frozen=True)
class PartCheck:
  """What an answer gives for one part: its items, a mark beside each, how many count, and whether the label is there.

  A mark is "" or the running count of right items, else "again", "wrong" or "skip" (right, but some before it are left
  out); `surplus` says that more right items came than were asked for.
  """

  part: Part
  items: tuple[str, ...]
  marks: tuple[str, ...]
  right: int
  surplus: bool
  label: bool

  @property
  def done(self) -> str:
    """ "full" (complete and nothing wrong), "half" (at least), "little" or "none"."""
    if self.right >= self.part.amount and "wrong" not in self.marks:
      return "full"
    if 2 * self.right >= self.part.amount:
      return "half"
    return "little" if self.right else "none"


@dataclasses.dataclass(frozen=True)
class Check:
  """An answer looked through: its parts, the opening, and whether anything is extra, repeated or surplus."""

  parts: tuple[PartCheck, ...]
  opening: bool
  extra: bool

  @property
  def score(self) -> int:
    """Points earned in order, each only after the one before it: 0 … 5."""
    return points([part.done for part in self.parts], [part.label for part in self.parts], self.opening, self.extra)


def points(done: list[str], labels: list[bool], opening: bool, extra: bool) -> int:
  """The additive, gated score of a checked answer.

  1 some part is addressed, 2 every part at least half, 3 every part complete and right, 4 opening and labels, 5 nothing
  extra, repeated or surplus.
  """
  gates = (
    any(state != "none" for state in done),
    bool(done) and all(state in ("half", "full") for state in done),
    all(state == "full" for state in done),
    opening and all(labels),
    not extra,
  )
  return gates.index(False) if False in gates else len(gates)


def pick(rng: np.random.Generator, choices: Any) -> Any:
  """One of `choices`, uniformly: far quicker than rng.choice on short sequences."""
  return choices[int(rng.random() * len(choices))]


def _random_part(rng: np.random.Generator) -> tuple[str, str]:
  """The words of one random part, and its label."""
  draw = rng.random()
  if draw < 0.4:
    phrase, amount, kind = pick(rng, _LIST_PHRASES), pick(rng, tuple(AMOUNTS)), pick(rng, tuple(KINDS))
    return phrase.format(amount, kind), kind
  if draw < 0.7:
    length = pick(rng, RUNS)
    low = int(rng.random() * (LARGEST + 2 - length))
    high = low + length - 1
    words = f"count from {low} to {high}" if rng.random() < 0.5 else f"count down from {high} to {low}"
    return words, "numbers"
  return f"{pick(rng, ('say', 'repeat'))} {pick(rng, THINGS)} {pick(rng, tuple(AMOUNTS))} times", "words"


def _part(text: str) -> Part | None:
  """The part that some words ask for; None where they ask for nothing known."""
  for rule in _LIST_RULES:
    if (match := rule.fullmatch(text)) and match[1] in AMOUNTS and match[2] in KINDS:
      return Part("list", match[2], AMOUNTS[match[1]], KINDS[match[2]])
  if match := _COUNT_RULE.fullmatch(text):
    first, last, step = int(match[2]), int(match[3]), -1 if match[1] else 1
    if max(first, last) <= LARGEST and (last - first) * step > 0:
      run = tuple(str(number) for number in range(first, last + step, step))
      return Part("count", "numbers", len(run), run)
  if (match := _SAY_RULE.fullmatch(text)) and match[1] in THINGS and match[2] in AMOUNTS:
    return Part("say", "words", AMOUNTS[match[2]], (match[1],))
  return None


def instruction(rng: np.random.Generator, heldout: bool | None = None) -> str:
  """A random instruction: one part (35 %) or two with different labels; `heldout` asks for either side of the split."""
  while True:
    text, label = _random_part(rng)
    if rng.random() >= 0.35:
      second, other = _random_part(rng)
      while other == label:
        second, other = _random_part(rng)
      text = f"{text} then {second}"
    text = pick(rng, _OPENERS) + text + "."
    text = text[0].upper() + text[1:]
    if heldout in (None, is_heldout(text)):
      return text


def normalise(text: str) -> str:
  """Lower case with single spaces."""
  return " ".join(text.lower().split())


def parse(text: str) -> tuple[Part, ...] | None:
  """The parts that an instruction asks for; None where it is not well formed.

  Case and spacing are free; it ends with a full stop, and no two parts have the same label, so that every item of an
  answer has one place to belong to.
  """
  text = normalise(text)
  if not text.endswith("."):
    return None
  text = text[:-1].removeprefix("please ").removeprefix("now ")
  pieces = text.split(" then ")
  parts = [part for words in pieces if (part := _part(words))]
  if len(pieces) > 2 or len({part.label for part in parts}) < len(pieces):
    return None
  return tuple(parts)


def parts_of(text: str) -> tuple[Part, ...]:
  """What `parse` gives; ValueError where the instruction is not well formed."""
  parts = parse(text)
  if parts is None:
    raise ValueError(
      f"Not an instruction of the tiny world: {text!r}. Only those that `parse` reads can be answered or judged."
    )
  return parts


def bucket(text: str) -> int:
  """A number from 0 to 19 that depends on the normalised text alone: how instructions are shared out."""
  return int(hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) % 20


def is_heldout(text: str) -> bool:
  """Whether an instruction belongs to the fifth that no training text shows."""
  return bucket(text) < 4


def _stranger(part: Part, rng: np.random.Generator) -> str:
  """An item of the same sort that does not belong to the part."""
  while True:
    item = str(int(rng.random() * (LARGEST + 1))) if part.task == "count" else pick(rng, THINGS)
    if item not in part.wanted:
      return item


def _items(part: Part, rng: np.random.Generator, profile: Profile) -> list[str]:
  """A part's items as a writer of this profile gives them."""
  if part.task == "list":
    items = [part.wanted[place] for place in rng.permutation(len(part.wanted))[: part.amount]]
  else:
    items = list(part.wanted) if part.task == "count" else list(part.wanted) * part.amount
  if rng.random() < profile.few:
    items = items[: 1 + int(rng.random() * (len(items) - 1))]
  if rng.random() < profile.wrong:
    items[int(rng.random() * len(items))] = _stranger(part, rng)
  if rng.random() < profile.repeat:
    place = int(rng.random() * len(items))
    again = place + 1 + int(rng.random() * (len(items) - place))
    if part.task != "say" and again < len(items) and rng.random() < 0.5:
      items[again] = items[place]  # In place of another one.
    else:
      items.insert(again, items[place])
  if rng.random() < profile.surplus:
    items += _next(part, items, rng)
  return items


def _next(part: Part, items: list[str], rng: np.random.Generator) -> list[str]:
  """What comes if a part goes on: the next number, another member of the kind, the word once more; or nothing."""
  if part.task == "say":
    return [part.wanted[0]]
  if part.task == "list":
    left = [member for member in part.wanted if member not in items]
    return [pick(rng, left)] if left else []
  last, step = int(part.wanted[-1]), int(part.wanted[-1]) - int(part.wanted[-2])
  return [str(last + step)] if 0 <= last + step <= LARGEST else []


def answer(parts: tuple[Part, ...], rng: np.random.Generator, profile: str | Profile = "human") -> str:
  """An answer to the parts, with the flaws of a profile ("human", "worse", …, or one's own)."""
  if isinstance(profile, str):
    if profile not in PROFILES:
      raise ValueError(f"No profile {profile!r}: choose from {', '.join(PROFILES)}, or give a Profile.")
    profile = PROFILES[profile]
  if rng.random() < profile.off_topic:
    if rng.random() < 0.5:
      return pick(rng, OFF_TOPIC)
    parts = parse(instruction(rng)) or parts  # The answer to some other question.
  if len(parts) > 1 and rng.random() < profile.dropped:
    parts = (pick(rng, parts),)
  labels = rng.random() >= profile.no_labels
  sentences = [] if rng.random() < profile.no_opening else [OPENING]
  for part in parts:
    label = f"{part.label}: " if labels else ""
    sentences.append(label + " ".join(_items(part, rng, profile)) + ".")
  if rng.random() < profile.chatter:
    sentences.append(pick(rng, CHATTER))
  return " ".join(sentences)


def _sentences(response: str) -> tuple[bool, list[tuple[str, list[str]]]]:
  """Whether the response opens well, and its sentences as (label or "", items). Takes any string."""
  pieces = _PIECES.findall(response.lower().replace("\n", " . "))
  opening = pieces[:2] == ["sure", "!"]
  sentences: list[tuple[str, list[str]]] = []
  label, items = "", list[str]()
  for piece in pieces[2:] if opening else pieces:
    if piece in _ENDS:
      sentences, label, items = sentences + [(label, items)], "", []
    elif piece == ":" and items:
      sentences, label, items = sentences + [(label, items[:-1])], items[-1], []
    elif piece != ",":
      items.append(piece)
  return opening, [(label, items) for label, items in sentences + [(label, items)] if label or items]


def _check_part(part: Part, label: str, items: list[str]) -> PartCheck:
  """Marks a sentence's items against a part. Numbers count only in their order, things of a kind only once."""
  seen, marks, right, place = set(), [], 0, 0
  for item in items:
    if item not in part.wanted:
      marks.append("wrong")
    elif item in seen and part.task != "say":
      marks.append("again")
    elif part.task == "count":
      position = part.wanted.index(item)
      marks.append("wrong" if position < place else "skip" if position > place else "")
      right, place = right + (position >= place), max(place, position + 1)
    else:
      right += 1
      marks.append(str(right))
    seen.add(item)
  return PartCheck(part, tuple(items), tuple(marks), right, right > part.amount, label == part.label)


def check(parts: tuple[Part, ...], response: str) -> Check:
  """Looks a response through: each part gets the sentence that serves it best, the rest is extra."""
  opening, sentences = _sentences(response)
  tables = [[_check_part(part, label, items) for label, items in sentences] for part in parts]
  gains = [[2 * min(cell.right, cell.part.amount) + cell.label for cell in row] for row in tables]
  # The best two sentences of each part are enough to find the best choice of different ones.
  ranked = [
    sorted((place for place, gain in enumerate(row) if gain), key=lambda place: -row[place])[:2] + [None]
    for row in gains
  ]
  choices: list[tuple[int | None, ...]] = [(place,) for place in ranked[0]]
  if len(parts) == 2:
    choices = [(one, two) for one in ranked[0] for two in ranked[1] if one is None or one != two]
  best = max(choices, key=lambda places: sum(gains[i][place] for i, place in enumerate(places) if place is not None))
  cells = tuple(
    _check_part(part, "", []) if place is None else row[place]
    for part, row, place in zip(parts, tables, best, strict=True)
  )
  extra = len(sentences) > sum(place is not None for place in best)
  extra = extra or any(cell.surplus or {"again", "wrong"} & set(cell.marks) for cell in cells)
  return Check(cells, opening, extra)


def oracle_detail(text: str, response: str) -> dict[str, Any]:
  """The truth about a response: what it has, if all of its parts are complete, and `content`, the share that is."""
  parts = parse(text)
  if parts is None:
    return {
      "score": 0,
      "well_formed": False,
      "opening": False,
      "labels": False,
      "extra": False,
      "complete": False,
      "content": 0.0,
    }
  found = check(parts, response)
  full = [part.done == "full" for part in found.parts]
  return {
    "score": found.score,
    "well_formed": True,
    "opening": found.opening,
    "labels": all(part.label for part in found.parts),
    "extra": found.extra,
    "complete": all(full),
    "content": sum(full) / len(full),
  }


def oracle(text: str, response: str) -> int:
  """The true score of a response, 0 … 5; 0 where the instruction itself is not well formed. Takes any strings."""
  return oracle_detail(text, response)["score"]
