"""Which of two answers is better: by the world's oracle, or by a judge model that sees both orders (paper §3.2)."""

from collections import Counter
from collections.abc import Callable, Sequence

from srlm_jax import generator, metrics, records, rollout, sampling, templates, world

Outcomes = list[list[int]]  # Per prompt: +1 the first is better, 0 a tie, -1 the second.
Pair = tuple[records.Response, records.Response]


def align(ours: Sequence[records.Response], theirs: Sequence[records.Response]) -> list[Pair]:
  """Sample i of a prompt beside sample i of the other model; prompts that one of them lacks are left out."""
  other = {(one.prompt_id, one.sample): one for one in theirs}
  return [(one, other[one.prompt_id, one.sample]) for one in ours if (one.prompt_id, one.sample) in other]


def _grouped(pairs: Sequence[Pair], outcomes: Sequence[int | None]) -> tuple[Outcomes, int]:
  groups: dict[str, list[int]] = {}
  for (ours, _), outcome in zip(pairs, outcomes, strict=True):
    group = groups.setdefault(ours.prompt_id, [])
    if outcome is not None:
      group.append(outcome)
  return list(groups.values()), sum(outcome is None for outcome in outcomes)


def by_oracle(pairs: Sequence[Pair]) -> tuple[Outcomes, int]:
  """The outcomes by the world's ground truth; none is unreadable."""
  scores = [tuple(world.oracle(one.prompt, one.text) for one in pair) for pair in pairs]
  return _grouped(pairs, [(ours > theirs) - (ours < theirs) for ours, theirs in scores])


def by_judge(
  pairs: Sequence[Pair], speaker: rollout.Speaker, template: templates.Pairwise, how: sampling.Sampling
) -> tuple[Outcomes, int]:
  """The outcomes by a judge model: each pair in both orders, a disagreement is a tie; and how many were unreadable."""
  engine = speaker.generator(how)
  requests = []
  for index, (ours, theirs) in enumerate(pairs):
    for order, (a, b) in enumerate(((ours, theirs), (theirs, ours))):
      tokens = speaker.chat(template.fill(ours.prompt, a.text, b.text))
      requests.append(generator.Request(f"duel {index} {order} {ours.prompt_id} {ours.sample}", tokens, 1))
  fitting = [request for request in requests if len(request.tokens) <= engine.max_prompt]
  verdicts = {
    request.name: templates.parse_verdict(speaker.tokenizer.decode(completion.tokens))
    for request, (completion,) in engine.generate(fitting)
    if completion.finished  # One that the length limit cut has not come to its verdict.
  }
  both = [verdicts.get(request.name) for request in requests]
  outcomes = [metrics.both_orders(both[2 * index], both[2 * index + 1]) for index in range(len(pairs))]
  return _grouped(pairs, outcomes)


Grader = Callable[[Sequence[Pair]], tuple[Outcomes, int]]


def reasons(judgements: Sequence[records.Judgement]) -> dict[str, int]:
  """How many votes were readable, and why the others were not."""
  return dict(Counter(vote.reason or "readable" for judgement in judgements for vote in judgement.votes))
