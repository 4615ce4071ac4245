"""Texts to read in a report: what people and models wrote, taken at even distances, not chosen by their quality.

All of it is untrusted: whoever shows it must escape it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import TypeVar

from srlm_jax import artifacts, diagnostics, records

LONGEST = 4000  # Characters of one text that are shown.
Oracle = Callable[[str, str], int]
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Answer:
  """One answer as it is shown.

  Attributes:
    who: the model's folder, or "sample 2".
    text: the answer.
    truth: the oracle's score, None without one.
    cut: whether the length limit ended it.
    score: the judge's mean score, None without one.
    mark: "chosen", "rejected" or "".
    votes: the judge's verdicts.
  """

  who: str
  text: str
  truth: int | None
  cut: bool
  score: float | None = None
  mark: str = ""
  votes: tuple[records.Vote, ...] = ()


@dataclasses.dataclass(frozen=True)
class Exchange:
  """An instruction with its answers."""

  prompt: str
  answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A judge prompt, or what stands for it, with a judgement; `reason` says why it has no score."""

  prompt: str
  text: str
  reason: str = ""


def spread(items: Sequence[Item], count: int) -> list[Item]:
  """`count` of the items at even distances, or all where there are fewer."""
  if len(items) <= count:
    return list(items)
  return [items[place * len(items) // count] for place in range(count)]


def shorten(text: str) -> str:
  """The text, cut where it is very long."""
  return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def _answer(response: records.Response, who: str, oracle: Oracle | None) -> Answer:
  truth = oracle(response.prompt, response.text) if oracle else None
  return Answer(who, shorten(response.text), truth, not response.finished)


def heldout(evaluations: Mapping[str, artifacts.Artifact], count: int, oracle: Oracle | None) -> list[Exchange]:
  """Held-out instructions with the first answer of each model, side by side; `evaluations` by model name."""
  by_model = {
    name: {
      one.prompt_id: one for one in diagnostics.first_shard(artifact, "answers", records.Response) if one.sample == 0
    }
    for name, artifact in evaluations.items()
  }
  common = [key for key in next(iter(by_model.values()), {}) if all(key in found for found in by_model.values())]
  exchanges = []
  for key in spread(common, count):
    answers = tuple(_answer(found[key], name, oracle) for name, found in by_model.items())
    exchanges.append(Exchange(next(iter(by_model.values()))[key].prompt, answers))
  return exchanges


def _judged(
  response: records.Response,
  judgement: records.Judgement | None,
  pair: records.PreferencePair | None,
  oracle: Oracle | None,
) -> Answer:
  """A sampled response with its votes, and whether it looks like the pair's chosen or rejected one."""
  mark, score = "", judgement.score if judgement else None
  if pair and (response.tokens, score) == (pair.chosen_tokens, pair.chosen_score):
    mark = "chosen"
  elif pair and (response.tokens, score) == (pair.rejected_tokens, pair.rejected_score):
    mark = "rejected"
  votes = tuple(vote.model_copy(update={"text": shorten(vote.text)}) for vote in judgement.votes) if judgement else ()
  plain = _answer(response, f"sample {response.sample + 1}", oracle)
  return dataclasses.replace(plain, score=score, mark=mark, votes=votes)


def _mark_once(answers: Sequence[Answer]) -> tuple[Answer, ...]:
  """Of equal samples with equal scores the first one is the pair's."""
  seen: set[str] = set()
  marked = []
  for one in answers:
    marked.append(dataclasses.replace(one, mark="") if one.mark in seen else one)
    seen.add(one.mark)
  return tuple(marked)


def sampled(one: diagnostics.Round, count: int, oracle: Oracle | None) -> list[Exchange]:
  """Some new instructions of a round with all of their responses and votes."""
  judgements = {(found.prompt_id, found.sample): found for found in one.judgements}
  pairs = {pair.prompt_id: pair for pair in one.pairs}
  groups: dict[str, list[records.Response]] = {}
  for response in one.responses:
    groups.setdefault(response.prompt_id, []).append(response)
  return [
    Exchange(
      group[0].prompt,
      _mark_once([_judged(r, judgements.get((r.prompt_id, r.sample)), pairs.get(r.prompt_id), oracle) for r in group]),
    )
    for group in spread(list(groups.values()), count)
  ]


def eft(artifact: artifacts.Artifact, count: int) -> list[Verdict]:
  """Some EFT examples."""
  found = artifact.read("eft.jsonl", records.SFTExample)
  return [Verdict(shorten(one.prompt), shorten(one.response)) for one in spread(found, count)]


def unreadable(where: str, judgements: Sequence[records.Judgement], count: int) -> list[Verdict]:
  """Some votes without a score, with the reason; `where` names the judge."""
  found = spread(list(diagnostics.unreadable(judgements)), count)
  return [
    Verdict(f"{where}: {judgement.prompt_id}, response {judgement.sample + 1}", shorten(vote.text), vote.reason)
    for judgement, vote in found
  ]
