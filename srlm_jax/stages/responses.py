"""responses: N sampled answers to each new prompt (paper §2.3)."""

from collections.abc import Sequence
import functools
import logging

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, modelstore, records, rollout, sampling

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes responses shards. Inputs: "model" (M_t) and "prompts"."""
  prompts = list(out.inputs["prompts"].read_shards("prompts", records.Prompt))
  speaker = functools.partial(modelstore.speaker, out.inputs["model"], settings, mesh)
  how = sampling.Sampling(**settings.responses.sampling)

  def work(speaker: rollout.Speaker, part: Sequence[records.Prompt]) -> list[records.Response]:
    return rollout.answer(speaker, part, settings.responses.n, how)

  artifacts.map_shards(out, "responses", prompts, settings.generation.shard, mesh, speaker, work)
  responses = list(out.read_shards("responses", records.Response))
  counts = {
    "prompts": len(prompts),
    "prompts too long": len(prompts) - len({response.prompt_id for response in responses}),
    "responses": len(responses),
    "cut by the length limit": sum(not response.finished for response in responses),
    "tokens": sum(len(response.tokens) for response in responses),
  }
  logger.info("%s: %s", out.folder, counts)
  out.commit({"counts": counts, "tokenizer": modelstore.load_tokenizer(out.inputs["model"]).digest})
