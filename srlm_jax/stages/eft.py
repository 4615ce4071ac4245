"""eft: evaluation fine-tuning data; the SFT baseline judges, people's ranks decide what is kept (paper §2.2, §3.1.1)."""

import dataclasses
import functools
import logging
import random

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import artifacts, eft, modelstore, records, rollout

logger = logging.getLogger(__name__)


def run(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, where: dict[str, epath.Path]
) -> None:
  """Writes eft.jsonl. Reads inputs "seed" and, for the paper's construction, "baseline"."""
  section = settings.eft
  if section.writer == "annotators":
    examples = list(records.read(where["judgements"], records.SFTExample))
    counts = {"written by annotators": len(examples)}
  elif section.writer == "baseline":
    examples, counts = _from_baseline(out, settings, mesh)
  else:
    raise artifacts.unknown(section.writer, ["baseline", "annotators"], "eft.writer")
  if section.max_examples and len(examples) > section.max_examples:
    examples = random.Random(settings.seed).sample(examples, section.max_examples)
    counts["kept at random (eft.max_examples)"] = len(examples)
  for reason, count in counts.items():
    logger.info("eft: %s: %d", reason, count)
  if not examples:
    logger.warning("eft: no judgement was accepted, so M1 learns from IFT alone. The counts above say why.")
  out.write_records("eft.jsonl", examples)
  out.commit({"counts": counts, "examples": len(examples), "writer": section.writer})


def _from_baseline(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[list[records.SFTExample], dict[str, int]]:
  """The paper's construction: each vote of a reply is an attempt, accepted where the scores order as people did."""
  section = settings.eft
  judging = dataclasses.replace(rollout.judging(settings.judge), votes=section.attempts, min_votes=1, method="sampled")
  ranked = out.inputs["seed"].read("ranked_train.jsonl", records.RankedReplies)
  replies = [(one, place) for one in ranked for place in range(len(one.replies))]
  speaker = functools.cache(lambda: modelstore.speaker(out.inputs["baseline"], settings, mesh))

  def judge(part: list[tuple[records.RankedReplies, int]]) -> list[records.Judgement]:
    candidates = [rollout.Candidate(one.prompt_id, place, one.prompt, one.replies[place].text) for one, place in part]
    return rollout.judge(speaker(), candidates, judging)

  artifacts.map_shards(out, "judgements", replies, settings.generation.shard, judge)
  judged, unreadable = [], 0
  for (one, place), judgement in zip(replies, out.read_shards("judgements", records.Judgement), strict=True):
    reply = one.replies[place]
    for attempt, vote in enumerate(judgement.votes):
      unreadable += vote.score is None
      judged.append(
        eft.Judged(
          prompt_id=one.prompt_id,
          prompt=one.prompt,
          reply_id=reply.id,
          reply=reply.text,
          rank=reply.rank,
          judgement_text=vote.text.strip(),
          score=vote.score,
          sample=attempt,
        )
      )
  accepted, accept_counts = eft.accept(judged, by=section.by)
  kept, thin_counts = eft.thin(accepted, section.max_share, settings.seed)
  counts = {"judgements written": len(judged), "judgements unreadable": unreadable, **accept_counts}
  return eft.to_examples(kept, judging.rubric.fill), counts | {f"thinning, {name}": n for name, n in thin_counts.items()}
