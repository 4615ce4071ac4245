"""evaluate: both skills of a model on held-out data: following instructions and judging (paper §2.5, §3)."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import logging
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  endpoint,
  grading,
  mesh as mesh_lib,
  metrics,
  modelstore,
  records,
  reward,
  rollout,
  sampling,
  templates,
  world,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Grader:
  """Who decides duels.

  Attributes:
    name: in words.
    decide: gives the duels with the answers of another model, by that one's name.
    usage: of an endpoint, for all duels.
  """

  name: str
  decide: Callable[[str, list[grading.Pair]], list[records.Duel]]
  usage: Callable[[Mapping[str, list[grading.Pair]]], endpoint.Usage] | None = None


def _grader(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, cache: epath.Path
) -> _Grader:
  """The grader that the configuration names; a judge's verdicts are kept in duels shards."""
  section = settings.evaluate
  if section.grader == "oracle":
    return _Grader("the world's oracle", lambda name, pairs: grading.by_oracle(pairs))
  how, template = sampling.Sampling(**settings.judge.sampling), templates.load_pairwise(section.pairwise)

  def by_judge(
    load: Callable[[], rollout.Judge], mesh: jax.sharding.Mesh, name: str, pairs: list[grading.Pair]
  ) -> list[records.Duel]:
    stem = f"duels-{name}"
    work = functools.partial(grading.by_judge, against=name, template=template, how=how)
    artifacts.map_shards(out, stem, pairs, settings.generation.shard, mesh, load, work)
    return list(out.read_shards(stem, records.Duel))

  if section.grader == "judge":
    model = functools.cache(lambda: modelstore.speaker(out.inputs["judge"], settings, mesh))
    return _Grader(str(section.judge), functools.partial(by_judge, model, mesh))
  asked = endpoint.connect(endpoint.terms(settings.endpoint), cache)
  own = mesh_lib.make_mesh(devices=jax.local_devices())  # It computes elsewhere: processes share the shards out.

  def usage(duels: Mapping[str, list[grading.Pair]]) -> endpoint.Usage:
    questions = [one for name, pairs in duels.items() for one in grading.questions(pairs, name, template)]
    return asked.usage(questions, how)

  return _Grader(asked.terms.name, functools.partial(by_judge, lambda: asked, own), usage)


def _duels(
  grader: _Grader, answers: list[records.Response], others: Mapping[str, artifacts.Artifact]
) -> dict[str, dict[str, Any]]:
  """Head to head against other models' evaluations: facts of the duels, and of what an endpoint took for them."""
  pairs = {
    name: grading.align(answers, list(other.read_shards("answers", records.Response))) for name, other in others.items()
  }
  found = {}
  for name in others:
    outcomes, unreadable = grading.grouped(grader.decide(name, pairs[name]))
    found[name] = {**dataclasses.asdict(metrics.duel(outcomes)), "unreadable": unreadable, "judge": grader.name}
  if not grader.usage:
    return {"duels": found}
  # Of several processes each has a cache of its own, unless they share the folder: the others' replies are not counted.
  asked = 2 * sum(map(len, pairs.values()))
  return {"duels": found, "endpoint": {**dataclasses.asdict(grader.usage(pairs)), "asked": asked}}


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


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, cache: epath.Path) -> None:
  """Writes answers, judgements and expected scores of held-out replies, and metrics.json.

  Inputs: "model", "seed", "against …", and "judge" where a model decides duels. `cache` is the folder in which an
  endpoint's replies are kept.
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

  candidates = reward.candidates(ranked)
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
    "judge": reward.facts(ranked, judgements, judging),
  }
  if sure:
    scored = list(out.read_shards("expected", records.Judgement))
    facts["expected"] = reward.facts(ranked, scored, rollout.expected(judging))
  if section.grader == "oracle":
    facts["oracle"] = _oracle_facts(answers)
  others = {
    role.removeprefix("against "): other for role, other in sorted(out.inputs.items()) if role.startswith("against ")
  }
  if others and section.grader != "none":
    facts |= _duels(_grader(out, settings, mesh, cache), answers, others)
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
