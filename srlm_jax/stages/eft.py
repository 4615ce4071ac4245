"""eft: evaluation fine-tuning data; the SFT baseline judges, people's ranks decide what is kept (paper §2.2, 3.1.1)."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import logging
import random

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import artifacts, eft, modelstore, records, rollout, templates

logger = logging.getLogger(__name__)


def run(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, where: dict[str, epath.Path]
) -> None:
  """Writes eft.jsonl. Reads inputs "seed" and, for the paper's construction, "baseline"."""
  section = settings.eft
  if section.writer == "annotators":
    examples, found = _from_annotators(out, settings, where["judgements"])
    counts = {"written by annotators": len(examples), **found}
  else:
    examples, counts = _from_baseline(out, settings, mesh)
  if section.max_examples and len(examples) > section.max_examples:
    examples = random.Random(settings.seed).sample(examples, section.max_examples)
    counts["kept at random (eft.max_examples)"] = len(examples)
  for reason, count in counts.items():
    logger.info("eft: %s: %d", reason, count)
  if not examples:
    logger.warning("eft: no judgement was accepted, so M1 learns from IFT alone. The counts above say why.")
  out.write_records("eft.jsonl", examples)
  out.commit({"counts": counts, "examples": len(examples), "writer": section.writer})


def _from_annotators(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, path: epath.Path
) -> tuple[list[records.SFTExample], dict[str, int]]:
  """What annotators wrote, without what measures models, and how many were left out, with the reasons."""
  heldout = [one.prompt for one in out.inputs["seed"].read("ranked_heldout.jsonl", records.RankedReplies)]
  heldout += [one.text for one in out.inputs["seed"].read("eval_prompts.jsonl", records.Prompt)]
  examples, counts = eft.annotated(path, templates.load_rubric(settings.judge.rubric), heldout)
  return examples, {
    f"left out: {name.partition('/')[2]}": number
    for name, number in counts.items()
    if "/" in name and name != "judgements/kept"
  }


def _rank(one: records.RankedReplies, place: int) -> int:
  """A reply's rank; ValueError where it has none, which must show before anything is judged."""
  reply = one.replies[place]
  if reply.rank is None:
    raise ValueError(
      f"ranked_train.jsonl: reply {reply.id} of prompt {one.prompt_id} has no rank, but people's ranks decide what EFT "
      "keeps. Run the seed stage again."
    )
  return reply.rank


def _attempts(one: records.RankedReplies, place: int, rank: int, judgement: records.Judgement) -> Iterator[eft.Judged]:
  """The votes on a reply, each of which is one attempt at judging it."""
  reply = one.replies[place]
  for attempt, vote in enumerate(judgement.votes):
    yield eft.Judged(
      prompt_id=one.prompt_id,
      prompt=one.prompt,
      reply_id=reply.id,
      reply=reply.text,
      rank=rank,
      judgement_text=vote.text.strip(),
      score=vote.score,
      sample=attempt,
    )


def _from_baseline(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[list[records.SFTExample], dict[str, int]]:
  """The paper's construction: each vote of a reply is an attempt, accepted where the scores order as people did."""
  section = settings.eft
  judging = dataclasses.replace(rollout.judging(settings.judge), votes=section.attempts, min_votes=1, method="sampled")
  ranked = out.inputs["seed"].read("ranked_train.jsonl", records.RankedReplies)
  replies = [(one, place, _rank(one, place)) for one in ranked for place in range(len(one.replies))]
  speaker = functools.partial(modelstore.speaker, out.inputs["baseline"], settings, mesh)

  def judge(
    speaker: rollout.Speaker, part: Sequence[tuple[records.RankedReplies, int, int]]
  ) -> Sequence[records.Judgement]:
    candidates = [
      rollout.Candidate(one.prompt_id, place, one.prompt, one.replies[place].text) for one, place, _ in part
    ]
    return rollout.judge(speaker, candidates, judging)

  artifacts.map_shards(out, "judgements", replies, settings.generation.shard, mesh, speaker, judge)
  judgements = out.read_shards("judgements", records.Judgement)
  judged = [one for item, judgement in zip(replies, judgements, strict=True) for one in _attempts(*item, judgement)]
  unreadable = sum(one.score is None for one in judged)
  accepted, accept_counts = eft.accept(judged, by=section.by, ties=section.ties)
  kept, thin_counts = eft.thin(accepted, section.max_share, settings.seed)
  counts = {"judgements written": len(judged), "judgements unreadable": unreadable, **accept_counts}
  return eft.to_examples(kept, judging.rubric.fill), counts | {
    f"thinning, {name}": n for name, n in thin_counts.items()
  }
