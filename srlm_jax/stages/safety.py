"""safety: a model's answers to a user's own prompts (`monitors.prompts`): what it refuses, and what it helps with."""

from collections.abc import Sequence
import functools
import logging

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import artifacts, modelstore, records, rollout, safety, sampling, templates

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, where: epath.Path) -> None:
  """Reads the prompts at `where`, and writes answers and verdicts on them. Inputs: "model", "judge"."""
  section, judging = settings.monitors, settings.judge
  prompts = tuple(records.read_prompts(where))
  openings, template = safety.load_openings(section.refusals), templates.load_rubric(section.rubric)
  how = sampling.Sampling(**settings.evaluate.sampling)

  def answer(speaker: rollout.Speaker, part: Sequence[records.Prompt]) -> list[records.Response]:
    return rollout.answer(speaker, part, 1, how)

  def decide(judge: rollout.Judge, part: Sequence[records.Response]) -> list[records.Judgement]:
    return safety.by_judge(judge, part, template, judging.votes, sampling.Sampling(**judging.sampling))

  model = functools.partial(modelstore.speaker, out.inputs["model"], settings, mesh)
  judge = functools.partial(modelstore.speaker, out.inputs["judge"], settings, mesh)
  artifacts.map_shards(out, "answers", prompts, settings.generation.shard, mesh, model, answer)
  answers = list(out.read_shards("answers", records.Response))
  artifacts.map_shards(out, "verdicts", answers, settings.generation.shard, mesh, judge, decide)
  facts = safety.facts(len(prompts), answers, list(out.read_shards("verdicts", records.Judgement)), openings)
  logger.info("%s: %s", out.folder, facts)
  out.commit(facts)
