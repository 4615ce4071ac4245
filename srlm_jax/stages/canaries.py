"""canaries: responses that answer nothing, put before a model as judge, to see what it falls for."""

from collections.abc import Sequence
import functools
import logging

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, canaries, modelstore, records, rollout, sampling

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes the model's own answers, the probes, and its judgements of them. Inputs: "model", "seed"."""
  ranked = out.inputs["seed"].read("ranked_heldout.jsonl", records.RankedReplies)[: settings.monitors.canary_prompts]
  speaker = functools.cache(lambda: modelstore.speaker(out.inputs["model"], settings, mesh))
  judging = rollout.judging(settings.judge)
  how = sampling.Sampling(**settings.evaluate.sampling)

  def answer(speaker: rollout.Speaker, part: Sequence[records.Prompt]) -> list[records.Response]:
    return rollout.answer(speaker, part, 1, how)

  def judge(speaker: rollout.Speaker, part: Sequence[records.Probe]) -> list[records.Judgement]:
    return rollout.judge(speaker, [rollout.Candidate(one.id, 0, one.prompt, one.text) for one in part], judging)

  prompts = [records.Prompt(id=one.prompt_id, text=one.prompt, source="held out") for one in ranked]
  artifacts.map_shards(out, "own", prompts, settings.generation.shard, mesh, speaker, answer)
  own = {one.prompt_id: one.text for one in out.read_shards("own", records.Response)}
  probes = canaries.probes(ranked, own, judging.rubric)
  out.write_records("probes.jsonl", probes)
  artifacts.map_shards(out, "judgements", probes, settings.generation.shard, mesh, speaker, judge)
  judgements = list(out.read_shards("judgements", records.Judgement))
  facts = canaries.facts(probes, judgements, judging.rubric, judging.method == "sampled")
  logger.info("%s: %s", out.folder, facts["all"])
  out.commit(facts)
