"""evaluate: both skills of a model on held-out data: following instructions and judging (paper §2.5, §3)."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import logging
from typing import Any

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, grading, metrics, modelstore, records, rollout, sampling, templates, world

logger = logging.getLogger(__name__)


def _duels(
  out: artifacts.Artifact,
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  answers: list[records.Response],
  others: Mapping[str, artifacts.Artifact],
) -> dict[str, dict[str, Any]]:
  """Head to head against other models' evaluations; a judge's verdicts are kept in duels shards."""
  section, found = settings.evaluate, {}
  if section.grader == "judge":
    judge = functools.cache(lambda: modelstore.speaker(out.inputs["judge"], settings, mesh))
    how = sampling.Sampling(**settings.judge.sampling)
    template = templates.load_pairwise(section.pairwise)
  for name, other in others.items():
    pairs = grading.align(answers, list(other.read_shards("answers", records.Response)))
    if section.grader == "oracle":
      duels = grading.by_oracle(pairs)
    else:
      work = functools.partial(grading.by_judge, against=name, template=template, how=how)
      stem = f"duels-{name}"
      artifacts.map_shards(out, stem, pairs, settings.generation.shard, mesh, judge, work)
      duels = list(out.read_shards(stem, records.Duel))
    outcomes, unreadable = grading.grouped(duels)
    found[name] = {**dataclasses.asdict(metrics.duel(outcomes)), "unreadable": unreadable}
  return found


def _oracle_facts(answers: list[records.Response]) -> dict[str, Any]:
  """The ground truth's opinion of the answers, grouped by prompt."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for one in answers:
    groups.setdefault(one.prompt_id, []).append(world.oracle_detail(one.prompt, one.text))
  details = list(groups.values())

  def mean(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(metrics.mean_with_interval([[float(value(one)) for one in group] for group in details]))

  return {
    "score": mean(lambda one: one["score"]),
    "perfect": mean(lambda one: one["score"] == 5),
    "content": mean(lambda one: one["content"]),
    "histogram": dataclasses.asdict(metrics.histogram([one["score"] for group in details for one in group], 0, 5)),
  }


def _judge_facts(
  ranked: Sequence[records.RankedReplies], judgements: Sequence[records.Judgement], judging: rollout.Judging
) -> dict[str, Any]:
  """The five reward-model metrics against people's ranks, unreadable votes and the histogram of scores."""
  by_prompt: dict[str, list[float | None]] = {}
  for judgement in judgements:
    by_prompt.setdefault(judgement.prompt_id, []).append(judgement.score)
  ranks = [[float(reply.rank or 0) for reply in one.replies] for one in ranked]
  scores = [by_prompt[one.prompt_id] for one in ranked]
  rubric = judging.rubric
  estimates = metrics.reward_model_metrics(ranks, scores, top=rubric.high)
  flat = [judgement.score for judgement in judgements]
  return {
    "metrics": {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()},
    "votes": grading.reasons(judgements),
    "histogram": dataclasses.asdict(metrics.histogram(flat, rubric.low, rubric.high, 1 / judging.votes)),
  }


def _expects(model: artifacts.Artifact, settings: config_dict.ConfigDict, judging: rollout.Judging) -> bool:
  """Whether replies can be scored by the probabilities of the digits, too."""
  if settings.server.url:
    return False
  words = modelstore.load_tokenizer(model)
  try:
    rollout.score_options(words, judging.rubric)
  except ValueError as error:
    logger.info("%s: no expected scores: %s", model.folder, error)
    return False
  return True


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes answers, judgements and expected scores of held-out replies, and metrics.json.

  Inputs: "model", "seed", "judge", "against …".
  """
  section, seed = settings.evaluate, out.inputs["seed"]
  prompts = seed.read("eval_prompts.jsonl", records.Prompt)
  ranked = seed.read("ranked_heldout.jsonl", records.RankedReplies)
  speaker = functools.cache(lambda: modelstore.speaker(out.inputs["model"], settings, mesh))
  judging = rollout.judging(settings.judge)
  how = sampling.Sampling(**section.sampling)

  def answer(speaker: rollout.Speaker, part: Sequence[records.Prompt]) -> list[records.Response]:
    return rollout.answer(speaker, part, section.samples, how)

  def judge(speaker: rollout.Speaker, part: Sequence[rollout.Candidate]) -> list[records.Judgement]:
    return rollout.judge(speaker, part, judging)

  candidates = [
    rollout.Candidate(one.prompt_id, place, one.prompt, reply.text)
    for one in ranked
    for place, reply in enumerate(one.replies)
  ]
  artifacts.map_shards(out, "answers", prompts, settings.generation.shard, mesh, speaker, answer)
  artifacts.map_shards(out, "judgements", candidates, settings.generation.shard, mesh, speaker, judge)
  sure = judging.method == "sampled" and _expects(out.inputs["model"], settings, judging)
  if sure:
    work = functools.partial(rollout.judge, judging=rollout.expected(judging))
    artifacts.map_shards(out, "expected", candidates, settings.generation.shard, mesh, speaker, work)
  speaker.cache_clear()  # Duels may need another model in its place.
  answers = list(out.read_shards("answers", records.Response))
  judgements = list(out.read_shards("judgements", records.Judgement))
  facts: dict[str, Any] = {
    "answers": len(answers),
    "cut": sum(not one.finished for one in answers),
    "characters": dataclasses.asdict(metrics.length_summary([len(one.text) for one in answers])),
    "tokens": dataclasses.asdict(metrics.length_summary([len(one.tokens) for one in answers])),
    "judge": _judge_facts(ranked, judgements, judging),
  }
  if sure:
    scored = list(out.read_shards("expected", records.Judgement))
    facts["expected"] = _judge_facts(ranked, scored, rollout.expected(judging))
  if section.grader == "oracle":
    facts["oracle"] = _oracle_facts(answers)
  others = {
    role.removeprefix("against "): other for role, other in sorted(out.inputs.items()) if role.startswith("against ")
  }
  if others and section.grader != "none":
    facts["duels"] = _duels(out, settings, mesh, answers, others)
  out.write("metrics.json", json.dumps(facts, indent=1))
  logger.info("%s: %s", out.folder, _headline(facts))
  out.commit(facts)


def _headline(facts: dict[str, Any]) -> str:
  parts = [
    f"judge pairwise {facts['judge']['metrics']['pairwise']['value']}",
    f"characters {facts['characters']['mean']}",
  ]
  if "oracle" in facts:
    parts.insert(0, f"oracle {facts['oracle']['score']['value']:.3f}")
  for name, duel in facts.get("duels", {}).items():
    net = duel["net"]
    parts.append(f"against {name}: win {duel['win']}, tie {duel['tie']}, loss {duel['loss']}, net {net}")
  return "; ".join(parts)
