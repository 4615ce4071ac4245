"""Prompt texts and what is read back from a model's answer to them: judging, comparing, and writing new tasks.

The wording lies in `rubrics/*.txt`, and a user may name a file of their own instead. A template file is plain text with
placeholders in braces: all that its purpose has and no others, a model's text in one place. `# range: LOW HIGH` as its
first line (left out of the prompt) gives the scores that a judge may award, 0 to 5 without it. All else, such as braces
with anything but a name of three letters or more between them, stays as written.

Text that goes into a placeholder is not ours: a person or a model wrote it, perhaps in order to end the response early
and put in a verdict. So `neutralise` turns the brackets of any delimiter in it into round ones, `</response>` into
`(/response)`: visible, of the same length, and no delimiter any more. The delimiters are `<response>`, Llama 2's marks
of its chat, and the tags that a template has beside its placeholders (`<answer>{response}</answer>`); labels and
quotation marks are also ordinary text and cannot be kept out, so put what need not be trusted between tags. And only
what the judge writes *after* the prompt is ever parsed: a `Score: 5` inside a response counts for nothing.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata

from etils import epath

from srlm_jax import lines

RUBRICS = epath.resource_path("srlm_jax") / "rubrics"

# Blanks inside a delimiter and its case do not matter: a model reads `< / Response >` as one, too. "▁" is what
# SentencePiece writes for a space.
_BLANKS = "[\\s▁]*"
_RESPONSE = rf"<{_BLANKS}(?:/{_BLANKS})?response{_BLANKS}>"
_CHAT = rf"\[{_BLANKS}(?:/{_BLANKS})?inst{_BLANKS}\]|<{_BLANKS}<{_BLANKS}(?:/{_BLANKS})?sys{_BLANKS}>{_BLANKS}>"
# How common chat formats spell special tokens, for models whose tokenizer is not ours to hold.
_SPECIAL = (
  rf"<{_BLANKS}\|[^<>|]{{1,64}}\|{_BLANKS}>"
  rf"|<{_BLANKS}(?:/{_BLANKS})?(?:s|bos|eos|pad|unk|mask|(?:start|end)_of_turn|begin_of_text|end_of_text){_BLANKS}>"
  rf"|\[{_BLANKS}(?:/{_BLANKS})?(?:system_prompt|available_tools|tool_calls|tool_results){_BLANKS}\]"
)
_ROUND = str.maketrans("<>[]", "()()")
_TAG = r"<\s*/?\s*[^\W\d_][\w .:-]{0,63}>|\[\s*/?\s*[^\W\d_][\w .:-]{0,63}\]"  # As a template has it beside a text.
# Characters behind which a delimiter could hide: all but plain ASCII text. And those that nobody sees: control, format
# and other ignorable characters, variation selectors, Hangul's fillers.
_ODD = re.compile(r"[^\t\n\r -~]")
_HIDDEN = re.compile(
  "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
  "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
  "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

LONGEST = 1 << 18  # Bytes of a template: more than any judge's context holds beside a response.
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]{2,})\}")
_ONCE = ("response", "answer", "tasks")  # What begins so is a model's text, which must not count twice.
_HEADER = re.compile(r"#\s*range\s*:(.*)", re.IGNORECASE)
# A score's line, behind markdown's marks; then what stands after the colon, without the marks around it.
_SCORE_LINE = re.compile(r"[\s*_#>`-]*score[\s*_`]*:[\s*_`]*(.*)", re.IGNORECASE)
_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,6})?"
_SCORE = re.compile(
  rf"(-?{_NUMBER})\**\s*(?:points?\s*)?(?:(?:/|out\s+of)\s*({_NUMBER})\s*)?(?:points?\s*)?\.?", re.IGNORECASE
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_RATING = re.compile(rf"\[\[(-?{_NUMBER})\]\]")
# Where a task of several lines ends: at a blank line, or where somebody speaks or answers, in markdown or without.
_TASK_END = re.compile(
  r"\n[ \t*#]*(?:[\r\n]|(?:user|human|assistant|ai|response|answer|output|input|solution)[ \t*]*:)", re.IGNORECASE
)
_NUMBERED = re.compile(r"^[ \t]*[0-9]{1,3}[.)](?:[ \t]+|$)", re.MULTILINE)


@functools.cache
def _plain(character: str) -> str:
  """A full-width or other compatibility character made plain; nothing for an invisible one."""
  return _HIDDEN.sub("", unicodedata.normalize("NFKC", character))


def _without_disguise(text: str) -> str:
  """The text in plain characters; one by one, as whole texts can be made to take quadratic time."""
  return "".join(map(_plain, text)) if _ODD.search(text) else text


def _round(match: re.Match[str]) -> str:
  return match[0].translate(_ROUND)


@functools.cache
def _pattern(*delimiters: str) -> re.Pattern[str]:
  return re.compile("|".join(delimiters), re.IGNORECASE)


def _neutralise(text: str, delimiter: re.Pattern[str]) -> str:
  """Makes the brackets of every match round; a text with a disguised match is made plain first, others stay as is."""
  text = delimiter.sub(_round, text)
  plain = _without_disguise(text)
  return delimiter.sub(_round, plain) if plain != text and delimiter.search(plain) else text


def neutralise_chat(text: str) -> str:
  """Untrusted text in which `[INST]`, `[/INST]`, `<<SYS>>` and `<</SYS>>` have round brackets."""
  return _neutralise(text, _pattern(_CHAT))


def neutralise_specials(text: str) -> str:
  """Untrusted text for a model elsewhere: `[INST]`, `</s>`, `<|im_end|>` and their like have round brackets."""
  return _neutralise(text, _pattern(_CHAT, _SPECIAL))


def neutralise(text: str) -> str:
  """Untrusted text in which the chat's and the judge's delimiters (`<response>`, `</response>`) have round brackets."""
  return _neutralise(text, _pattern(_CHAT, _RESPONSE))


def neutralise_marks(text: str, marks: tuple[str, ...]) -> str:
  """Untrusted text in which each of these marks, their own brackets around them, has round brackets."""
  return _neutralise(text, _pattern(*map(_bracketed, marks))) if marks else text


def _bracketed(mark: str) -> str:
  """The pattern of `<name>` or `[name]`, its closing form included."""
  left, right, name = re.escape(mark[0]), re.escape(mark[-1]), mark[1:-1].strip().removeprefix("/").split()
  return rf"{left}{_BLANKS}(?:/{_BLANKS})?{_BLANKS.join(map(re.escape, name))}{_BLANKS}{right}"


@functools.cache
def _guarded(text: str, names: tuple[str, ...]) -> tuple[re.Pattern[str], int]:
  """What no value of a template may hold, and how often the template itself does: its own tags are among it."""
  place = rf"\{{(?:{'|'.join(map(re.escape, names))})\}}"
  tags = [*re.findall(rf"({_TAG})(?=\s*{place})", text), *re.findall(rf"{place}\s*({_TAG})", text)]
  delimiter = _pattern(_CHAT, _RESPONSE, *map(_bracketed, dict.fromkeys(tags)))
  return delimiter, len(delimiter.findall(_without_disguise(text)))


def _fill(text: str, values: dict[str, str]) -> str:
  """Puts the neutralised values into their placeholders in one pass: a placeholder inside a value stays as it is."""
  delimiter, own = _guarded(text, tuple(values))
  places = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
  filled = places.sub(lambda match: _neutralise(values[match[0][1:-1]], delimiter), text)
  if len(delimiter.findall(_without_disguise(filled))) == own:
    return filled
  # Two values, or one and the template, make a delimiter together: then no value keeps a bracket.
  return places.sub(lambda match: _without_disguise(values[match[0][1:-1]]).translate(_ROUND), text)


def _range(header: str, path: epath.Path) -> tuple[float, float]:
  """The two numbers of a `# range:` line."""
  try:
    low, high = map(float, header.split())
  except ValueError:
    low, high = 0.0, 0.0
  if not low < high:
    raise ValueError(f"{path}: the range is {header.strip()!r}, it must be two rising numbers. Write '# range: 0 5'.")
  return low, high


def _check_placeholders(path: epath.Path, text: str, names: tuple[str, ...]) -> None:
  missing = [f"{{{name}}}" for name in names if f"{{{name}}}" not in text]
  if missing:
    raise ValueError(f"{path} lacks {' and '.join(missing)}: write it where the text belongs.")
  for name in _PLACEHOLDER.findall(text):
    if name not in names:
      known = " and ".join(f"{{{one}}}" for one in names)
      raise ValueError(
        f"{path} has {{{name}}}, which nothing fills in: its placeholders are {known}. Correct the name, or write "
        f"{{ {name} }} where the braces are meant."
      )
    if name.startswith(_ONCE) and text.count(f"{{{name}}}") > 1:
      raise ValueError(f"{path} has {{{name}}} more than once: a model's text must stand in one place. Leave one.")


def check_form(key: str, name_or_path: str, text: str, forms: tuple[str, ...]) -> None:
  """ValueError where a template never shows a form, in any case, that its answers are read by: "Score:", "[[A]]"."""
  missing = [form for form in forms if form.lower() not in text.lower()]
  if missing:
    raise ValueError(
      f"{key}={name_or_path}: the template never says {missing[0]!r}, by which an answer is read: nothing could be. "
      "Ask for a last line with it."
    )


@functools.cache
def _load(name_or_path: str, names: tuple[str, ...]) -> tuple[str, float, float, str]:
  """Text without its header, low, high and digest of a template; ValueError where its placeholders are others."""
  path = epath.Path(name_or_path)
  if "/" not in name_or_path and not name_or_path.endswith(".txt"):
    path = RUBRICS / f"{name_or_path}.txt"
  if not path.exists():
    known = ", ".join(sorted(file.stem for file in RUBRICS.glob("*.txt")))
    raise ValueError(f"no template {name_or_path!r}: name one of {known}, or the path of your own .txt file.")
  source = lines.text(path, LONGEST)
  first, _, rest = source.partition("\n")
  header = _HEADER.fullmatch(first.strip())
  low, high = _range(header[1], path) if header else (0.0, 5.0)
  text = (rest if header else source).strip()
  _check_placeholders(path, text, names)
  return text, low, high, hashlib.sha256(source.encode()).hexdigest()


def load(name_or_path: str, names: tuple[str, ...]) -> tuple[str, str]:
  """Text and digest of a template with placeholders of these names, found and refused as by `load_rubric`."""
  text, _, _, digest = _load(str(name_or_path), names)
  return text, digest


def fill(text: str, values: dict[str, str]) -> str:
  """A template's text with the values, which need not be trusted, in the places of their names."""
  return _fill(text, values)


@dataclasses.dataclass(frozen=True)
class Rubric:
  """A judge prompt (paper §2.2, figure 2).

  Attributes:
    text: with the placeholders `{instruction}` and `{response}`.
    low, high: the scores that may be awarded, both included.
    digest: sha256 of the file, hexadecimal.
  """

  text: str
  low: float
  high: float
  digest: str

  def fill(self, instruction: str, response: str) -> str:
    """The prompt that asks for a judgement of this response."""
    return _fill(self.text, {"instruction": instruction, "response": response})


def load_rubric(name_or_path: str) -> Rubric:
  """The rubric of that name in `rubrics/`, or in a user's file (a path has a "/" or ends in .txt).

  Raises:
    ValueError: there is no such file, it lacks a placeholder, or its range cannot be read.
  """
  return Rubric(*_load(str(name_or_path), ("instruction", "response")))


def parse_score(continuation: str, low: float, high: float) -> tuple[float | None, str]:
  """The score that a judge's continuation ends in: the last line of the form `Score: <number>`.

  The line may be in any case, in markdown, and go on with "/5", "out of 5" or "points". Lines like
  `Score: <total points>` hold no digit and are passed over; a last score line with anything else beside its number
  ("4 or 5") is not read, nor is an earlier one in its place. Time is linear in the length.

  Args:
    continuation: what the model wrote after the prompt, never the prompt.
    low, high: the rubric's range, both included.

  Returns:
    The score and "", or None and the reason, "no_score" or "out_of_range" (or out of another number than `high`).
  """
  for line in reversed(continuation.split("\n")):
    found = _SCORE_LINE.match(line)
    if not found or not any(character.isdigit() for character in found[1]):
      continue
    score = _SCORE.fullmatch(found[1].rstrip(" \t\r*_`"))
    if not score:
      return None, "no_score"
    value = float(score[1])
    inside = low <= value <= high and (score[2] is None or float(score[2]) == high)
    return (value, "") if inside else (None, "out_of_range")
  return None, "no_score"


@dataclasses.dataclass(frozen=True)
class Pairwise:
  """A prompt that asks which of two responses is better (paper §3.2): placeholders as in `fill`, digest as above."""

  text: str
  digest: str

  def fill(self, instruction: str, response_a: str, response_b: str) -> str:
    """The prompt that compares the two; callers show both orders."""
    return _fill(self.text, {"instruction": instruction, "response_a": response_a, "response_b": response_b})


def load_pairwise(name_or_path: str) -> Pairwise:
  """A comparing template, found and refused as by `load_rubric`."""
  text, _, _, digest = _load(str(name_or_path), ("instruction", "response_a", "response_b"))
  return Pairwise(text, digest)


def parse_verdict(continuation: str) -> str | None:
  """The last `[[A]]`, `[[B]]` or `[[C]]` of a comparison as "A", "B" or "tie"; None where there is none."""
  found = _VERDICT.findall(continuation)
  return {"A": "A", "B": "B", "C": "tie"}[found[-1]] if found else None


@dataclasses.dataclass(frozen=True)
class Rating:
  """A prompt that asks for a rating of an answer (MT-Bench): placeholders as `load_rating` is told, digest as above."""

  text: str
  digest: str

  def fill(self, **values: str) -> str:
    """The prompt that asks for the rating, with a text for each placeholder."""
    return _fill(self.text, values)


def load_rating(name_or_path: str, placeholders: tuple[str, ...]) -> Rating:
  """A rating template, found and refused as by `load_rubric`."""
  text, _, _, digest = _load(str(name_or_path), placeholders)
  return Rating(text, digest)


def parse_rating(continuation: str, low: float, high: float) -> tuple[float | None, str]:
  """The last `[[number]]` of a rating and "", or None and the reason, "no_score" or "out_of_range"."""
  found = _RATING.findall(continuation)
  if not found:
    return None, "no_score"
  value = float(found[-1])
  return (value, "") if low <= value <= high else (None, "out_of_range")


def few_shot_digest() -> str:
  """sha256 of the template of `few_shot`, hexadecimal."""
  return _load("self_instruct", ("tasks",))[-1]


def few_shot(demonstrations: list[str]) -> str:
  """The prompt for new tasks (paper §2.3, Self-Instruct): a headline and the numbered tasks, left open at the next one.

  A task of several lines goes on one. No space ends the prompt, as tokenizers put it before the word that follows.
  """
  text, *_ = _load("self_instruct", ("tasks",))
  numbered = [f"{number}. {' '.join(task.split())}" for number, task in enumerate(demonstrations, 1)]
  return _fill(text, {"tasks": "\n".join([*numbered, f"{len(demonstrations) + 1}."])})


def split_tasks(completion: str, finished: bool) -> tuple[list[str], int]:
  """The raw tasks of a completion of `few_shot`: the open one, then those of its further numbered lines.

  A task is one line, as in the demonstrations: a model that goes on below it writes answers or a dialogue. Where the
  line ends in a colon, what it announces (a text, some code) belongs to it, up to a blank line or a line such as
  "User: …", "Answer: …" or "Output: …". Without `finished` the length limit cut the completion, and its last task is
  left out. Empty ones are left out, too; what makes a task a good one is asked in `filters`.

  Returns:
    The tasks, and how many of them lost what stood below them.
  """
  pieces = _NUMBERED.split(completion)
  whole = [piece.strip() for piece in (pieces if finished else pieces[:-1]) if piece.strip()]
  tasks = [_one_task(text) for text in whole]
  return tasks, sum(task != text for task, text in zip(tasks, whole, strict=True))


def _one_task(text: str) -> str:
  """The task that a stripped text begins with."""
  first = text.split("\n", 1)[0].rstrip()
  return _TASK_END.split(text, maxsplit=1)[0].rstrip() if first.endswith(":") else first
