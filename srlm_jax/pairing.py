"""From scored responses to preference pairs and to perfect answers (paper §2.4)."""

from collections import Counter
from collections.abc import Iterable, Sequence

from srlm_jax.records import Judgement, Response

Scored = tuple[Response, float]


def by_prompt(responses: Iterable[Response], judgements: Iterable[Judgement]) -> dict[str, list[Scored]]:
  """The scored responses of each prompt; a response without a score is not among them.

  ValueError where responses and judgements are not the same ones in the same order.
  """
  responses, judgements = list(responses), list(judgements)
  if len(responses) != len(judgements):
    raise ValueError(
      f"{len(judgements)} judgements of {len(responses)} responses: they are of other responses, or incomplete. "
      "Run the judge stage again."
    )
  groups: dict[str, list[Scored]] = {}
  for response, judgement in zip(responses, judgements, strict=True):
    if (response.prompt_id, response.sample) != (judgement.prompt_id, judgement.sample):
      raise ValueError(
        f"judgement {judgement.prompt_id}/{judgement.sample} stands where response "
        f"{response.prompt_id}/{response.sample} does: the judgements are of other responses. "
        "Run the judge stage again."
      )
    group = groups.setdefault(response.prompt_id, [])
    if judgement.score is not None:
      group.append((response, judgement.score))
  return groups


def best_and_worst(scored: Sequence[Scored], margin: float) -> tuple[Scored, Scored] | str:
  """The highest- and the lowest-scored response of a prompt, the first sampled among equals; or why there is no pair.

  A response that was cut by the length limit has no end token and is never chosen: learning from it would teach the
  model not to stop.
  """
  if len(scored) < 2:
    return "fewer than two responses with a score"
  if len({score for _, score in scored}) == 1:
    return "all scores equal"
  whole = [one for one in scored if one[0].finished]
  if not whole:
    return "no response ended by itself"
  best = max(whole, key=lambda one: (one[1], -one[0].sample))
  worst = min(scored, key=lambda one: (one[1], one[0].sample))
  if best[1] <= worst[1]:
    return "the best response was cut by the length limit"
  if best[1] - worst[1] <= margin:
    return f"scores differ by no more than the margin, {margin:g}"
  return best, worst


def pair_up(groups: dict[str, list[Scored]], margin: float) -> tuple[list[tuple[Scored, Scored]], Counter[str]]:
  """One pair for each prompt that has one, and the reason for each that has none."""
  pairs, counts = [], Counter[str]()
  for scored in groups.values():
    found = best_and_worst(scored, margin)
    counts["prompts"] += 1
    if isinstance(found, str):
      counts[f"no pair: {found}"] += 1
    else:
      counts["pairs"] += 1
      pairs.append(found)
  return pairs, counts


def perfect(groups: dict[str, list[Scored]], top: float) -> list[Response]:
  """The responses with the full score, for the variant that learns from positive examples only (paper §3.2)."""
  return [response for scored in groups.values() for response, score in scored if score == top and response.finished]
