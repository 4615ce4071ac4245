"""The two skills of a model as functions of texts: answering instructions and judging answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
import statistics
from typing import Any, Protocol

import numpy as np

from srlm_jax import chat, generator, records, sampling, templates
from srlm_jax.tokenizer import Tokenizer


class Engine(Protocol):
  """What continues prompts: a `generator.Generator` here, or a `server.Server` elsewhere."""

  @property
  def max_prompt(self) -> int:
    """The longest prompt in tokens, for the caller to hold."""

  def generate(
    self, requests: Sequence[generator.Request]
  ) -> Iterator[tuple[generator.Request, list[generator.Completion]]]:
    """Yields each request with its completions, in an order of its own."""

  def option_probs(
    self, requests: Sequence[generator.Request], options: Sequence[int]
  ) -> Iterator[tuple[generator.Request, np.ndarray]]:
    """Yields each request with float32 [options]: how its next token's probability is divided among the options."""


@dataclasses.dataclass(frozen=True)
class Question:
  """What a judge is asked.

  Attributes:
    name: seeds the draws; no two questions that are asked together have the same.
    turns: messages of user and assistant in turn, the first and the last the user's.
    samples: how many replies are wanted.
  """

  name: str
  turns: tuple[str, ...]
  samples: int = 1


@dataclasses.dataclass(frozen=True)
class Reply:
  """One answer: its text, and whether it ended by itself and not by the length limit."""

  text: str
  finished: bool


class Judge(Protocol):
  """Who answers judge prompts: a model here (`Speaker`), or one behind an endpoint (`endpoint.Endpoint`)."""

  def ask(self, questions: Sequence[Question], how: sampling.Sampling) -> list[list[Reply]]:
    """The replies to each question, in their order; an empty list where the question is too long for the judge."""


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A model with all that turns texts into its tokens and back.

  Attributes:
    engine: gives what continues prompts, for sampling parameters and a longest prompt.
    tokenizer: the model's.
    chat_kind: the chat template that training used, too.
    max_length: longest prompt and continuation together, in tokens.
  """

  engine: Callable[[sampling.Sampling, int], Engine]
  tokenizer: Tokenizer
  chat_kind: str
  max_length: int

  def generator(self, how: sampling.Sampling) -> Engine:
    """An engine with these sampling parameters, for prompts that leave room for a continuation."""
    limit = self.max_length - how.max_new
    if limit < 32:
      raise ValueError(f"max_new {how.max_new} leaves {limit} of {self.max_length} tokens for the prompt: lower it.")
    return self.engine(how, limit)

  def chat(self, text: str) -> tuple[int, ...]:
    """The prompt tokens of an instruction in the chat template."""
    return tuple(chat.chat_tokens(self.tokenizer, text, self.chat_kind))

  def ask(self, questions: Sequence[Question], how: sampling.Sampling) -> list[list[Reply]]:
    """The model's replies to each question (see `Judge`), of one turn each."""
    engine = self.generator(how)
    requests = [generator.Request(one.name, self.chat(one.turns[0]), one.samples) for one in questions]
    fitting = [request for request in requests if len(request.tokens) <= engine.max_prompt]
    found = {
      request.name: [Reply(self.tokenizer.decode(one.tokens), one.finished) for one in completions]
      for request, completions in engine.generate(fitting)
    }
    return [found.get(request.name, []) for request in requests]


def answer(
  speaker: Speaker, prompts: Sequence[records.Prompt], samples: int, how: sampling.Sampling
) -> list[records.Response]:
  """`samples` answers to each prompt, in the order of the prompts.

  A prompt too long for the model gives no response; the caller sees it missing and counts it.
  """
  engine = speaker.generator(how)
  tokens = {prompt.id: speaker.chat(prompt.text) for prompt in prompts}
  fitting = [prompt for prompt in prompts if len(tokens[prompt.id]) <= engine.max_prompt]
  requests = [generator.Request(f"answer {p.id}", tokens[p.id], samples) for p in fitting]
  by_name = {request.name: completions for request, completions in engine.generate(requests)}
  return [
    records.Response(
      prompt_id=prompt.id,
      prompt=prompt.text,
      sample=index,
      text=speaker.tokenizer.decode(completion.tokens).strip(),
      tokens=completion.tokens,
      finished=completion.finished,
    )
    for prompt in fitting
    for index, completion in enumerate(by_name[f"answer {prompt.id}"])
  ]


@dataclasses.dataclass(frozen=True)
class Judging:
  """How a response is judged (paper §2.2): the rubric, the votes, and how many of them must be readable.

  method "sampled" is the paper's; "expected" asks for no text: the score is the mean over the digits that may follow
  "Score: ", weighted by their probabilities (one vote, no sampling noise, works with any model).
  """

  rubric: templates.Rubric
  votes: int
  min_votes: int
  how: sampling.Sampling
  method: str = "sampled"


def judging(section: Mapping[str, Any]) -> Judging:
  """The Judging of the configuration's `judge` section."""
  how = sampling.Sampling(**section["sampling"])
  if not 1 <= section["min_votes"] <= section["votes"]:
    raise ValueError(f"judge.min_votes={section['min_votes']} must lie between 1 and judge.votes={section['votes']}.")
  if section["method"] == "expected" and section["min_votes"] > 1:
    raise ValueError(f"judge.min_votes={section['min_votes']}: judge.method='expected' gives one vote. Set it to 1.")
  rubric = templates.load_rubric(section["rubric"])
  return Judging(rubric, section["votes"], section["min_votes"], how, section["method"])


def expected(judging: Judging) -> Judging:
  """The same judging by expected scores."""
  return dataclasses.replace(judging, votes=1, min_votes=1, method="expected")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A response to be judged; (prompt_id, sample) names it."""

  prompt_id: str
  sample: int
  instruction: str
  response: str


def read_vote(text: str, finished: bool, rubric: templates.Rubric) -> records.Vote:
  """The vote that a judge's own continuation casts; one that was cut off by the length limit casts none."""
  if not finished:
    return records.Vote(text=text, score=None, reason="unfinished")
  score, reason = templates.parse_score(text, rubric.low, rubric.high)
  return records.Vote(text=text, score=score, reason=reason)


def tally(candidate: Candidate, votes: Sequence[records.Vote], min_votes: int) -> records.Judgement:
  """The mean of the readable votes; no score, never a made-up one, where fewer than `min_votes` are readable."""
  scores = [vote.score for vote in votes if vote.score is not None]
  mean = statistics.fmean(scores) if len(scores) >= min_votes else None
  return records.Judgement(prompt_id=candidate.prompt_id, sample=candidate.sample, votes=tuple(votes), score=mean)


def score_options(words: Tokenizer, rubric: templates.Rubric) -> tuple[tuple[int, ...], dict[int, int]]:
  """The tokens of "Score: " and, for each whole score of the rubric, the one token that follows; {token: score}."""
  scores = range(math.ceil(rubric.low), math.floor(rubric.high) + 1)
  encoded = {score: words.encode(f"Score: {score}") for score in scores}
  heads, options = {tuple(ids[:-1]) for ids in encoded.values()}, {ids[-1]: score for score, ids in encoded.items()}
  if len(heads) != 1 or len(options) != len(scores):
    raise ValueError(
      "judge.method='expected' needs a tokenizer in which the scores after 'Score: ' are single tokens; "
      "this one encodes them otherwise: use 'sampled'."
    )
  return heads.pop(), options


def judge(speaker: Speaker, candidates: Sequence[Candidate], judging: Judging) -> list[records.Judgement]:
  """Judges each candidate, in the order of the candidates.

  A judge prompt that is too long is not cut: its votes are unreadable, with the reason "too_long".
  """
  engine = speaker.generator(judging.how)
  requests = []
  for candidate in candidates:
    tokens = speaker.chat(judging.rubric.fill(candidate.instruction, candidate.response))
    name = f"judge {judging.rubric.digest} {candidate.prompt_id} {candidate.sample}"
    requests.append(generator.Request(name, tokens, judging.votes))
  fitting = [request for request in requests if len(request.tokens) <= engine.max_prompt]
  if judging.method == "expected":
    by_name = _expected(speaker, judging.how, fitting, judging.rubric)
  else:
    by_name = _sampled(speaker, engine, fitting, judging.rubric)
  too_long = [records.Vote(text="", score=None, reason="too_long")] * judging.votes
  return [
    tally(candidate, by_name.get(request.name, too_long), judging.min_votes)
    for candidate, request in zip(candidates, requests, strict=True)
  ]


def _sampled(
  speaker: Speaker, engine: Engine, requests: Sequence[generator.Request], rubric: templates.Rubric
) -> dict[str, list[records.Vote]]:
  return {
    request.name: [
      read_vote(speaker.tokenizer.decode(completion.tokens), completion.finished, rubric) for completion in completions
    ]
    for request, completions in engine.generate(requests)
  }


def _expected(
  speaker: Speaker, how: sampling.Sampling, requests: Sequence[generator.Request], rubric: templates.Rubric
) -> dict[str, list[records.Vote]]:
  head, options = score_options(speaker.tokenizer, rubric)
  # Room for the head is part of max_new, which is larger than it.
  longer = [dataclasses.replace(request, tokens=request.tokens + head, samples=1) for request in requests]
  engine = speaker.engine(how, speaker.max_length - how.max_new + len(head))
  found = {}
  for request, probs in engine.option_probs(longer, list(options)):
    weights, scores = np.asarray(probs, np.float64), np.asarray(list(options.values()), np.float64)
    # Four decimals: the seventh depends on how many prompts went through the model at once.
    score = round(float(np.clip(weights @ scores / weights.sum(), rubric.low, rubric.high)), 4)
    found[request.name] = [records.Vote(text=f"Score: {score:.4f} (expected)", score=score)]
  return found
