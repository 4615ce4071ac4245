"""The records that travel between the stages, and their files.

Every file of records is JSON Lines in UTF-8: one object a line, the fields of one of the classes below and no others.
Reading validates each line, and an error names the file, the line, the field and the rule.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

from etils import epath
import pydantic

from srlm_jax import lines


class Record(pydantic.BaseModel):
  """Base of all records: frozen, and unknown fields are refused."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Prompt(Record):
  """An instruction without an answer."""

  id: str
  text: str
  source: str  # "oasst", "world", "m1" … : who wrote it.


class Proposal(Record):
  """What the writer of new prompts added to one few-shot prompt; no text where that was too long for the writer."""

  name: str
  text: str | None
  finished: bool = False  # Ended by its end token, not by the length limit.


class SFTExample(Record):
  """One supervised example; the loss falls on `response` and its end token only.

  kind "ift" is an instruction and its answer; kind "eft" a filled judge prompt and its judgement; kind "aift" an answer
  that the model itself gave a perfect score (the paper's variant "positive examples only").
  """

  id: str
  kind: Literal["ift", "eft", "aift"]
  prompt: str
  response: str


class Reply(Record):
  """A human reply with its rank among its siblings, 0 is best; None where people did not rank it."""

  id: str
  text: str
  rank: int | None


class RankedReplies(Record):
  """A prompt with at least two ranked human replies: the raw material of EFT and of the reward-model metrics."""

  prompt_id: str
  prompt: str
  replies: tuple[Reply, ...]


class Response(Record):
  """One sampled answer. `tokens` are the sampled ids, the end token included where the model gave one."""

  prompt_id: str
  prompt: str
  sample: int
  text: str
  tokens: tuple[int, ...]
  finished: bool  # Ended by its end token, not by the length limit.


class Vote(Record):
  """One sampled verdict: the model's own continuation, its score, or why it has none."""

  text: str
  score: float | None
  reason: str = ""  # "" where a score was read; else "unfinished", "no_score", "out_of_range", "too_long".


class Judgement(Record):
  """All votes on one response. `score` is their mean, None where fewer than the required votes were readable."""

  prompt_id: str
  sample: int
  votes: tuple[Vote, ...]
  score: float | None


class Duel(Record):
  """One comparison of two models' answers to a prompt: +1 the first is better, 0 a tie, -1 the second, None unreadable.

  `verdicts` are a judge model's own texts, in the order first-second and in the order second-first.
  """

  prompt_id: str
  sample: int
  outcome: int | None
  verdicts: tuple[str, ...] = ()


class Probe(Record):
  """A response that is put before a judge in order to watch the judge; its judgement's prompt_id is this id."""

  id: str
  name: str
  kind: str
  prompt_id: str
  prompt: str
  text: str


class PromptClass(Record):
  """What an evaluation prompt asks for (paper §3.2, fine-grained): all three fields, or none where unreadable.

  `text` is what the judge wrote, and `reason` why nothing was read from it; both are "" where no judge was asked.
  """

  prompt_id: str
  category: str | None
  complexity: int | None  # 1 … 10.
  length: str | None  # How long a good answer is expected to be.
  text: str = ""
  reason: str = ""  # "", "unfinished", "too_long", "no_category", "no_complexity" or "no_length".


class PreferencePair(Record):
  """Best against worst response of a prompt (paper §2.4), as sampled token ids."""

  prompt_id: str
  prompt: str
  prompt_tokens: tuple[int, ...]
  chosen: str
  chosen_tokens: tuple[int, ...]
  chosen_score: float
  rejected: str
  rejected_tokens: tuple[int, ...]
  rejected_score: float


R = TypeVar("R", bound=Record)


class Document(Record):
  """A pretraining text: `text` alone, or an instruction and its response, to be read in the chat template."""

  text: str | None = None
  prompt: str | None = None
  response: str | None = None

  @pydantic.model_validator(mode="after")
  def _one_form(self) -> "Document":
    filled = (self.text is not None, self.prompt is not None, self.response is not None)
    if filled not in ((True, False, False), (False, True, True)):
      raise ValueError('give either "text" or both "prompt" and "response"')
    return self


def read(path: epath.PathLike, kind: type[R], data: bytes | None = None) -> Iterator[R]:
  """Yields the records of a JSON Lines file of ours; ValueError with file, line and rule where one does not fit.

  Nothing is read where its content is given.
  """
  for number, line in lines.numbered(path, data):
    yield _validated(f"{path}, line {number}", line, kind)


def read_given(path: epath.PathLike, kind: type[R], name: str = "id") -> Iterator[R]:
  """Yields the records of a user's file, one after the other, read as strictly as `lines` reads.

  Args:
    path: JSON Lines, plain or .gz.
    kind: of record.
    name: the field in which no two records are equal; "" where there is none.

  Raises:
    ValueError: a file without records, two of one name, an empty name, or what `lines.parse` refuses.
  """
  seen: dict[str, int] = {}
  number = 0
  for number, line in lines.numbered(path):
    where = f"{path}, line {number}"
    lines.parse(where, line)
    record = _validated(where, line, kind)
    if name:
      value = str(getattr(record, name))
      if not value.strip():
        raise ValueError(f"{where}: its {name} is empty: give every line its own.")
      if value in seen:
        raise ValueError(f"{where}: the {name} {value[:80]!r} is on line {seen[value]}, too: give every line its own.")
      seen[value] = number
    yield record
  if not number:
    raise ValueError(f"{path} holds nothing: write one {kind.__name__} a line, with {_fields(kind)}.")


def read_prompts(path: epath.PathLike) -> Iterator[Prompt]:
  """Yields a user's prompts; ValueError, beside those of `read_given`, for one without text."""
  for prompt in read_given(path, Prompt):
    if not prompt.text.strip():
      raise ValueError(f"{path}: the prompt {prompt.id[:80]!r} has no text: write one, or remove its line.")
    yield prompt


def _fields(kind: type[Record]) -> str:
  return ", ".join(f'"{name}"' for name in kind.model_fields)


def _validated(where: str, line: bytes, kind: type[R]) -> R:
  try:
    return kind.model_validate_json(line)
  except pydantic.ValidationError as error:
    raise ValueError(
      f"{where}: not a {kind.__name__}: {lines.fault(error, 'the line')}. Repair or remove the line."
    ) from error


def dumps(records: Iterable[Record]) -> str:
  """The JSON Lines text of some records."""
  return "".join(record.model_dump_json() + "\n" for record in records)
