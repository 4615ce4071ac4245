"""judge: the model scores its own responses, several votes each (LLM-as-a-Judge, paper §2.2–2.3)."""

from collections import Counter
from collections.abc import Sequence
import functools
import logging

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, modelstore, records, rollout

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes judgements shards, in the order of the responses. Inputs: "model" (M_t) and "responses"."""
  responses = list(out.inputs["responses"].read_shards("responses", records.Response))
  speaker = functools.partial(modelstore.speaker, out.inputs["model"], settings, mesh)
  judging = rollout.judging(settings.judge)

  def work(speaker: rollout.Speaker, part: Sequence[records.Response]) -> list[records.Judgement]:
    candidates = [rollout.Candidate(one.prompt_id, one.sample, one.prompt, one.text) for one in part]
    return rollout.judge(speaker, candidates, judging)

  artifacts.map_shards(out, "judgements", responses, settings.generation.shard, mesh, speaker, work)
  judgements = list(out.read_shards("judgements", records.Judgement))
  votes = Counter(vote.reason or "readable" for judgement in judgements for vote in judgement.votes)
  counts = {
    "responses": len(judgements),
    "without a score": sum(judgement.score is None for judgement in judgements),
    **{f"votes, {reason}": number for reason, number in sorted(votes.items())},
  }
  logger.info("%s: %s", out.folder, counts)
  out.commit({"counts": counts, "rubric": judging.rubric.digest})
