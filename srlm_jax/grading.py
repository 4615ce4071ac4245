"""Which of two answers is better: by the world's oracle, or by a judge that sees both orders (paper §3.2)."""

from collections import Counter
from collections.abc import Iterable, Sequence

from srlm_jax import metrics, records, rollout, sampling, templates, world

Outcomes = list[list[int]]  # Per prompt: +1 the first is better, 0 a tie, -1 the second.
Pair = tuple[records.Response, records.Response]


def align(ours: Sequence[records.Response], theirs: Sequence[records.Response]) -> list[Pair]:
  """Sample i of a prompt beside sample i of the other model; prompts that one of them lacks are left out."""
  other = {(one.prompt_id, one.sample): one for one in theirs}
  return [(one, other[one.prompt_id, one.sample]) for one in ours if (one.prompt_id, one.sample) in other]


def grouped(duels: Iterable[records.Duel]) -> tuple[Outcomes, int]:
  """The readable outcomes by prompt, and how many were unreadable."""
  groups: dict[str, list[int]] = {}
  unreadable = 0
  for duel in duels:
    group = groups.setdefault(duel.prompt_id, [])
    if duel.outcome is None:
      unreadable += 1
    else:
      group.append(duel.outcome)
  return list(groups.values()), unreadable


def by_oracle(pairs: Sequence[Pair]) -> list[records.Duel]:
  """Duels decided by the world's ground truth; none is unreadable."""
  scores = [tuple(world.oracle(one.prompt, one.text) for one in pair) for pair in pairs]
  return [
    records.Duel(prompt_id=pair[0].prompt_id, sample=pair[0].sample, outcome=(ours > theirs) - (ours < theirs))
    for pair, (ours, theirs) in zip(pairs, scores, strict=True)
  ]


def questions(pairs: Sequence[Pair], against: str, template: templates.Pairwise) -> list[rollout.Question]:
  """What a judge is asked about each pair: first ours as A, then ours as B. `against` names the second model."""
  return [
    rollout.Question(f"duel {against} {order} {ours.prompt_id} {ours.sample}", (template.fill(ours.prompt, *texts),))
    for ours, theirs in pairs
    for order, texts in enumerate(((ours.text, theirs.text), (theirs.text, ours.text)))
  ]


def by_judge(
  judge: rollout.Judge, pairs: Sequence[Pair], against: str, template: templates.Pairwise, how: sampling.Sampling
) -> list[records.Duel]:
  """Duels decided by a judge, each pair in both orders, a disagreement being a tie.

  Args:
    judge: decides.
    pairs: answers side by side.
    against: name of the second model: it names the draws, so that those of other duels are others.
    template: the judge's prompt.
    how: sampling of verdicts.
  """
  replies = judge.ask(questions(pairs, against, template), how)
  duels = []
  for (ours, _), *both in zip(pairs, replies[::2], replies[1::2], strict=True):
    first, second = (found[0] if found else rollout.Reply("", False) for found in both)
    # One that the length limit cut has not come to its verdict.
    verdicts = [templates.parse_verdict(one.text) if one.finished else None for one in (first, second)]
    outcome = metrics.both_orders(*verdicts)
    duels.append(
      records.Duel(prompt_id=ours.prompt_id, sample=ours.sample, outcome=outcome, verdicts=(first.text, second.text))
    )
  return duels


def reasons(judgements: Sequence[records.Judgement]) -> dict[str, int]:
  """How many votes were readable, and why the others were not."""
  return dict(Counter(vote.reason or "readable" for judgement in judgements for vote in judgement.votes))
