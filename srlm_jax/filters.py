"""Self-Instruct's filters: which newly written tasks are good and new enough to become prompts (paper §2.2).

Two questions are kept apart. `reject_reason` looks at the wording of one task alone; `NoveltyFilter` compares it with
the seeds and with everything kept so far. Both answer with a reason, one of `REASONS`, so that a stage can count what
it dropped and why; `keep_new` asks both and counts.
"""

import collections
from collections.abc import Iterable
import dataclasses
import functools
import re
import string
import sys

from rapidfuzz import process
from rapidfuzz.distance import Indel

# Things that a text-only model can neither see nor make.
SELF_INSTRUCT_BLACKLIST = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to",
)  # fmt: skip

REASONS = (
  "too_short",
  "too_long",
  "blacklisted",
  "starts_write_a_program",
  "punctuation_start",
  "non_ascii_start",
  "duplicate",
  "rouge",
)

_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_UNKNOWN = chr(0)  # Stands for every word that no known task has: it never matches.


@dataclasses.dataclass(frozen=True)
class TaskRules:
  """What the wording of a task must satisfy; the defaults are Self-Instruct's.

  Attributes:
    min_words: fewest words, separated by white space; Self-Instruct drops three words or fewer.
    max_words: most words.
    blacklist: words or phrases that a task must not contain, matched whole and in any case. Empty: none.
  """

  min_words: int = 4
  max_words: int = 150
  blacklist: tuple[str, ...] = SELF_INSTRUCT_BLACKLIST

  def __post_init__(self) -> None:
    if not 1 <= self.min_words <= self.max_words:
      raise ValueError(
        f"min_words={self.min_words} and max_words={self.max_words}: need 1 <= min_words <= max_words. Change either."
      )
    if isinstance(self.blacklist, str) or not all(entry.strip() for entry in self.blacklist):
      raise ValueError(f"blacklist={self.blacklist!r} must be a sequence of words. Remove empty ones.")


def clean(task: str) -> str:
  """The task on one line: white space collapsed, the first letter in upper case."""
  text = " ".join(task.split())
  return text[:1].upper() + text[1:]


@functools.cache
def _pattern(blacklist: tuple[str, ...]) -> re.Pattern[str] | None:
  """Finds any blacklisted entry as a whole word; any white space may stand where an entry has a space."""
  if not blacklist:
    return None
  entries = (r"\s+".join(map(re.escape, entry.split())) for entry in blacklist)
  # Not \b, which would never match beside an entry's own punctuation ("C++").
  return re.compile(rf"(?<!\w)(?:{'|'.join(entries)})(?!\w)", re.IGNORECASE)


def reject_reason(task: str, rules: TaskRules = TaskRules()) -> str | None:
  """Why the wording of a task rules it out, the first rule that does; None where it passes. Cleans the task itself."""
  text = clean(task)
  words = len(text.split())
  if words < rules.min_words:
    return "too_short"
  if words > rules.max_words:
    return "too_long"
  pattern = _pattern(tuple(rules.blacklist))
  if pattern is not None and pattern.search(text):
    return "blacklisted"
  if text.startswith("Write a program"):  # Case counts after the first letter, as in Self-Instruct.
    return "starts_write_a_program"
  if text[0] in string.punctuation:
    return "punctuation_start"
  if not text[0].isascii():
    return "non_ascii_start"
  return None


def rouge_words(text: str) -> list[str]:
  """The words that ROUGE compares: lower-cased runs of [a-z0-9], not stemmed. Empty for a text in another script."""
  return _ROUGE_WORD.findall(text.lower())


def _normalised(text: str) -> str:
  """What two duplicates have in common: neither case, white space nor the closing mark makes a task a new one."""
  return " ".join(text.casefold().split()).rstrip(" .!?")


class NoveltyFilter:
  """Rejects a task that repeats, or is too close to, a known one: a seed or a task that was kept before.

  Closeness is ROUGE-L F = 2·LCS / (a + b) for texts of a and b words with a longest common subsequence of LCS words.
  Rapidfuzz calls that number the normalised Indel similarity, computes it through LCSseq and, given the cut-off,
  passes over texts whose lengths alone (F <= 2·min(a, b) / (a + b)) forbid reaching it. Its fast path is text, so a
  task is held as a string with one character per word: 10,000 checks against 10,000 known tasks take about 10 s.
  """

  def __init__(self, max_rouge: float = 0.7) -> None:
    """A task passes with a nearest ROUGE-L F of at most `max_rouge`; 1 leaves only exact duplicates to reject."""
    if not 0 <= max_rouge <= 1:
      raise ValueError(f"max_rouge={max_rouge} is not a ROUGE-L F: set it between 0 and 1 (Self-Instruct: 0.7).")
    self._max_rouge = max_rouge
    self._characters: dict[str, str] = {}
    self._known: set[str] = set()
    self._texts: list[str] = []
    self._encoded: list[str] = []

  def __len__(self) -> int:
    """How many texts a candidate is compared with."""
    return len(self._texts)

  def seed(self, texts: Iterable[str]) -> None:
    """Makes the seeds known. All demonstrations must be among them, or the model may hand them back as new."""
    for text in texts:
      self.add(text)

  def add(self, text: str) -> None:
    """Makes one text known; a repeated one costs nothing."""
    normalised = _normalised(text)
    if normalised in self._known:
      return
    self._known.add(normalised)
    for word in rouge_words(text):
      # Past a million distinct words characters are shared, which could only raise a similarity a little.
      self._characters.setdefault(word, chr(1 + len(self._characters) % sys.maxunicode))
    self._texts.append(text)
    self._encoded.append(self._encode(text))

  def check(self, text: str) -> str | None:
    """ "duplicate", "rouge", or None for a text that is new. Does not make it known: call `add` where it is kept."""
    if _normalised(text) in self._known:
      return "duplicate"
    if self._max_rouge < 1 and self.nearest(text, self._max_rouge)[0] > self._max_rouge:
      return "rouge"
    return None

  def nearest(self, text: str, at_least: float = 0.0) -> tuple[float, str | None]:
    """The highest ROUGE-L F with a known text, and that text; (0, None) where none reaches `at_least`."""
    encoded = self._encode(text)
    if not encoded:  # Two texts without words are alike to Indel, to ROUGE they are not.
      return 0.0, None
    # The margin keeps rounding from hiding a match; the exact value is worked out below.
    found = process.extractOne(
      encoded, self._encoded, scorer=Indel.normalized_similarity, score_cutoff=max(at_least - 1e-9, 0.0)
    )
    if found is None:
      return 0.0, None
    known, _, index = found
    total = len(encoded) + len(known)
    rouge = (total - Indel.distance(encoded, known)) / total  # Indel distance: a + b - 2·LCS.
    return (rouge, self._texts[index]) if rouge > 0 and rouge >= at_least else (0.0, None)

  def _encode(self, text: str) -> str:
    return "".join(self._characters.get(word, _UNKNOWN) for word in rouge_words(text))


def keep_new(
  tasks: Iterable[str], novelty: NoveltyFilter, rules: TaskRules = TaskRules()
) -> tuple[list[str], collections.Counter[str]]:
  """The tasks that pass, cleaned and in order, and how many were dropped for each reason.

  What is kept becomes known to `novelty` at once, so that later tasks are compared with it too.
  """
  kept, dropped = [], collections.Counter({reason: 0 for reason in REASONS})
  for task in tasks:
    text = clean(task)
    reason = reject_reason(text, rules) or novelty.check(text)
    if reason is not None:
      dropped[reason] += 1
      continue
    novelty.add(text)
    kept.append(text)
  return kept, dropped
