"""MT-Bench: two-turn answers and ratings of single answers, with files in FastChat's format.

A question has two turns; the model's first answer stands before the second question. Each answer is rated by a judge
from 1 to 10, in a prompt of our own wording (`rubrics/mt_bench*.txt`); questions of math, reasoning and coding are
rated beside a right answer where the files have one. What is rated, and how it is drawn, is FastChat's
(`fastchat/llm_judge`, github.com/lm-sys/FastChat): temperatures by category, and means over all readable ratings.

FastChat takes the first `[[rating]]` of a judge's text, ours the last, as a judge may quote one before it decides.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import functools
import logging
import time
from typing import Any

from etils import epath
import jax
import pydantic

from srlm_jax import (
  artifacts,
  digests,
  distributed,
  endpoint,
  mesh as mesh_lib,
  metrics,
  modelstore,
  outside,
  records,
  rollout,
  sampling,
  storage,
  templates,
)

logger = logging.getLogger(__name__)

TEMPERATURES = {
  **dict.fromkeys(("writing", "roleplay"), 0.7),
  **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
  **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER_TEMPERATURE = 0.7  # Of categories that MT-Bench does not have.
REFERENCED = ("math", "reasoning", "coding")  # Rated beside a right answer.
LOW, HIGH = 1.0, 10.0


class _Line(records.Record):
  """A line of FastChat's files, which may hold more than is read here."""

  model_config = pydantic.ConfigDict(frozen=True, extra="ignore")


class Question(_Line):
  """A question of question.jsonl; `reference` has a right answer to each turn, empty where there is none."""

  question_id: int | str
  category: str
  turns: tuple[str, ...] = pydantic.Field(min_length=1, max_length=2)
  reference: tuple[str, ...] = ()


class Choice(_Line):
  """One try at a question: an answer to each turn."""

  index: int
  turns: tuple[str, ...]


class Answer(_Line):
  """A line of FastChat's model_answer/MODEL.jsonl, and of its reference_answer/JUDGE.jsonl."""

  question_id: int | str
  answer_id: str
  model_id: str
  choices: tuple[Choice, ...] = pydantic.Field(min_length=1)
  tstamp: float


class Given(records.Record):
  """A model's answers to the turns of a question: empty where the conversation was too long for it."""

  question_id: int | str
  turns: tuple[str, ...]
  finished: tuple[bool, ...]  # Ended by its end token; False, too, for an answer that is missing.
  missing: int = 0


class Rated(records.Record):
  """A judge's text about the answer to one turn, and the rating that it ends in."""

  question_id: int | str
  turn: int  # 1 or 2.
  text: str
  score: float | None
  reason: str = ""  # "" where a rating was read; else "unfinished", "no_score", "out_of_range", "too_long".


def read_questions(path: epath.Path, references: epath.Path | None = None) -> list[Question]:
  """The questions of a file, those of `references` (answers in FastChat's format) in place of their own right answers.

  Raises:
    ValueError: a line that does not fit, no question, or one name for two of them.
  """
  questions = list(records.read_given(path, Question, name="question_id"))
  right = (
    {one.question_id: one.choices[0].turns for one in records.read_given(references, Answer, "question_id")}
    if references
    else {}
  )
  return [one.model_copy(update={"reference": right.get(one.question_id, one.reference)}) for one in questions]


def answer(speaker: rollout.Judge, questions: Sequence[Question], how: sampling.Sampling) -> list[Given]:
  """The answers to all turns of some questions, in their order, with the temperature of each one's category.

  A conversation that is too long for the model gets an empty answer, which is counted: it is rated like any other.
  """
  replies: dict[int | str, list[rollout.Reply | None]] = {one.question_id: [] for one in questions}
  for turn in range(2):
    open_ones = [one for one in questions if len(one.turns) > turn]
    for temperature in sorted({_temperature(one) for one in open_ones}):
      group = [one for one in open_ones if _temperature(one) == temperature]
      asked = [
        rollout.Question(f"mt-bench {one.question_id} {turn + 1}", _conversation(one, replies[one.question_id]))
        for one in group
      ]
      found = speaker.ask(asked, dataclasses.replace(how, temperature=temperature))
      for one, got in zip(group, found, strict=True):
        replies[one.question_id].append(got[0] if got else None)
  return [
    Given(
      question_id=name,
      turns=tuple(reply.text.strip() if reply else "" for reply in got),
      finished=tuple(reply is not None and reply.finished for reply in got),
      missing=got.count(None),
    )
    for name, got in replies.items()
  ]


def _temperature(question: Question) -> float:
  return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def _conversation(question: Question, replies: Sequence[rollout.Reply | None]) -> tuple[str, ...]:
  """The turns up to the next question, with the model's own answers between them."""
  turns = []
  for asked, reply in zip(question.turns, replies, strict=False):
    turns += [asked, reply.text.strip() if reply else ""]
  return (*turns, question.turns[len(replies)])


def fastchat_answers(given: Sequence[Given], model_id: str) -> list[Answer]:
  """A model's answers as FastChat writes them; the same answers have the same ids."""
  return [
    Answer(
      question_id=one.question_id,
      answer_id=digests.sha256("\n".join([model_id, str(one.question_id), *one.turns]).encode())[:22],
      model_id=model_id,
      choices=(Choice(index=0, turns=one.turns),),
      tstamp=round(time.time(), 3),
    )
    for one in given
  ]


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The four rating prompts: of the first or the second turn, without and with a right answer."""

  plain: tuple[templates.Rating, templates.Rating]
  referenced: tuple[templates.Rating, templates.Rating]

  @property
  def digest(self) -> str:
    """Of all four."""
    return digests.sha256(" ".join(one.digest for one in (*self.plain, *self.referenced)).encode())

  def fill(self, question: Question, given: Given, turn: int) -> str:
    """The prompt that asks for a rating of the answer to turn 1 or 2."""
    values = {
      name: text
      for place in range(turn)
      for name, text in ((f"question_{place + 1}", question.turns[place]), (f"answer_{place + 1}", given.turns[place]))
    }
    right = [*question.reference, "", ""][:turn]
    if question.category not in REFERENCED or not right[-1]:
      return self.plain[turn - 1].fill(**values)
    references = {f"reference_{place + 1}": text or "(not known)" for place, text in enumerate(right)}
    return self.referenced[turn - 1].fill(**values, **references)


def load_prompts(name: str) -> Prompts:
  """The prompts NAME, NAME_reference, NAME_second and NAME_second_reference of `rubrics/`, or of a user's folder.

  A name with a "/" is the path of the first one without its ".txt".
  """
  end = ".txt" if "/" in name else ""

  def load(part: str, *placeholders: str) -> templates.Rating:
    found = templates.load_rating(f"{name}{part}{end}", placeholders)
    templates.check_form("mt_bench.templates", f"{name}{part}", found.text, ("[[",))
    return found

  first, second = ("question_1", "answer_1"), ("question_1", "answer_1", "question_2", "answer_2")
  return Prompts(
    (load("", *first), load("_second", *second)),
    (load("_reference", *first, "reference_1"), load("_second_reference", *second, "reference_1", "reference_2")),
  )


def rate(
  judge: rollout.Judge, pairs: Sequence[tuple[Question, Given]], prompts: Prompts, how: sampling.Sampling
) -> list[Rated]:
  """A rating of each answer, turn by turn, in the order of the pairs.

  What cannot be read is no rating: a text that the length limit cut, one without `[[number]]` or with one that is not
  on the scale, a prompt that is too long for the judge.
  """
  asked = [(question, given, turn) for question, given in pairs for turn in range(1, len(given.turns) + 1)]
  questions = [
    rollout.Question(
      f"mt-bench rating {prompts.digest[:12]} {question.question_id} {turn}", (prompts.fill(question, given, turn),)
    )
    for question, given, turn in asked
  ]
  ratings = []
  for (question, _, turn), replies in zip(asked, judge.ask(questions, how), strict=True):
    text, score, reason = "", None, "too_long"
    if replies:
      text = replies[0].text
      score, reason = templates.parse_rating(text, LOW, HIGH) if replies[0].finished else (None, "unfinished")
    ratings.append(Rated(question_id=question.question_id, turn=turn, text=text, score=score, reason=reason))
  return ratings


def summary(questions: Sequence[Question], given: Sequence[Given], ratings: Sequence[Rated]) -> dict[str, Any]:
  """Mean ratings over all, over the paper's two groups of categories, by turn, and by category and turn.

  Every readable rating weighs the same, as in FastChat's own means; intervals are over questions.
  """
  categories = {one.question_id: one.category for one in questions}

  def mean(turns: Sequence[int], among: Collection[str]) -> dict[str, Any]:
    groups: dict[int | str, list[float | None]] = {}
    for one in ratings:
      if one.turn in turns and categories[one.question_id] in among:
        groups.setdefault(one.question_id, []).append(one.score)
    return dataclasses.asdict(metrics.mean_with_interval(list(groups.values())))

  turns, names = {"turn 1": (1,), "turn 2": (2,)}, list(dict.fromkeys(categories.values()))
  return {
    "questions": len(questions),
    "asked": len(ratings),
    "unreadable": sum(one.score is None for one in ratings),
    "reasons": dict(Counter(one.reason or "readable" for one in ratings)),
    "missing answers": sum(one.missing for one in given),
    "answers cut by the length limit": sum(one.finished.count(False) - one.missing for one in given),
    "means": {
      "all": mean((1, 2), names),
      "hard": mean((1, 2), outside.HARD),
      "rest": mean((1, 2), set(names) - set(outside.HARD)),
      **{turn: mean(which, names) for turn, which in turns.items()},
    },
    "categories": {name: {turn: mean(which, (name,)) for turn, which in turns.items()} for name in names},
  }


def _answered(run: outside.Run, questions: Sequence[Question]) -> artifacts.Artifact:
  """The model's answers; those that are there are not sampled again."""
  settings, how = run.settings, sampling.Sampling(**run.settings.evaluate.sampling)
  config = {"evaluate.sampling": settings.evaluate.sampling.to_dict()}
  out = run.artifact(f"mt_bench/{run.model}/answers", config, ("prompts",))
  out.begin()
  if out.done:
    return out
  load = functools.partial(modelstore.speaker, run.finished(run.model), settings, run.mesh)
  work = functools.partial(answer, how=how)
  artifacts.map_shards(out, "answers", questions, settings.generation.shard, run.mesh, load, work)
  given = list(out.read_shards("answers", Given))
  text = records.dumps(fastchat_answers(given, run.model))
  path = out.folder.parent / f"{run.model}.jsonl"
  distributed.first(f"write {path}", lambda: storage.write(path, text))
  logger.info("%s answered %d questions, for FastChat: %s", run.model, len(given), path)
  out.commit({"questions": len(given)})
  return out


@dataclasses.dataclass(frozen=True)
class _Rater:
  """Who rates: a name in words, what loads the judge, and its part of the artifact's configuration and inputs."""

  name: str
  load: Callable[[], rollout.Judge]
  config: Mapping[str, Any]
  inputs: Mapping[str, artifacts.Artifact]


def _rater(run: outside.Run) -> _Rater:
  """The judge that mt_bench.judge names; ValueError where it cannot be asked."""
  name, settings = run.settings.mt_bench.judge, run.settings
  if name != "endpoint":
    judge = run.finished(name)
    return _Rater(name, functools.partial(modelstore.speaker, judge, settings, run.mesh), {}, {"judge": judge})
  terms = endpoint.terms(settings.endpoint)
  endpoint.check_local(run.cache)
  asked = {"endpoint.url": settings.endpoint.url, "endpoint.model": settings.endpoint.model}
  return _Rater(terms.name, functools.partial(endpoint.connect, terms, run.cache), asked, {})


def _rated(
  run: outside.Run, rater: _Rater, prompts: Prompts, answers: artifacts.Artifact, questions: Sequence[Question]
) -> artifacts.Artifact:
  """The judge's ratings of all answers."""
  settings, given = run.settings, list(answers.read_shards("answers", Given))
  how = dataclasses.replace(sampling.Sampling(**settings.judge.sampling), temperature=0.0, top_p=1.0)  # FastChat's.
  config = {"judge.sampling": dataclasses.asdict(how), "prompts of rating (SHA-256)": prompts.digest, **rater.config}
  place = f"mt_bench/{run.model}/rated_by_{settings.mt_bench.judge}"
  out = run.artifact(place, config, ("prompts", "references"), answers=answers, **rater.inputs)
  out.begin()
  if out.done:
    return out
  # An endpoint computes elsewhere: processes share the shards out.
  mesh = run.mesh if rater.inputs else mesh_lib.make_mesh(devices=jax.local_devices())
  work = functools.partial(rate, prompts=prompts, how=how)
  pairs = list(zip(questions, given, strict=True))
  artifacts.map_shards(out, "ratings", pairs, settings.generation.shard, mesh, rater.load, work)
  out.commit({"ratings": sum(len(one.turns) for one in given)})
  return out


def evaluate(run: outside.Run) -> None:
  """Answers, rates, and keeps the figures: `srlm evaluate mt-bench`."""
  questions = read_questions(run.files["prompts"], run.files.get("references"))
  prompts, rater = load_prompts(run.settings.mt_bench.templates), _rater(run)  # Both are checked before any work.
  answers = _answered(run, questions)
  given = list(answers.read_shards("answers", Given))
  ratings = list(_rated(run, rater, prompts, answers, questions).read_shards("ratings", Rated))
  facts = {"judge": rater.name, **summary(questions, given, ratings)}
  path = outside.save(run, "mt_bench", facts)
  means = {part: _shown(found) for part, found in facts["means"].items()}
  logger.info(
    "%s rated by %s: %s, unreadable %d of %d: %s",
    *(run.model, facts["judge"], ", ".join(f"{part} {value}" for part, value in means.items())),
    *(facts["unreadable"], facts["asked"], path),
  )


def _shown(found: Mapping[str, Any]) -> str:
  return "–" if found["value"] is None else f"{found['value']:.2f}"
