"""prompts: new instructions by 8-shot prompting, behind Self-Instruct's filters (paper §2.3)."""

from collections import Counter
from collections.abc import Iterable, Sequence
import functools
import json
import logging
import random

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, filters, generator, interruption, modelstore, records, rollout, sampling, templates

logger = logging.getLogger(__name__)


def _demonstrations(settings: config_dict.ConfigDict, seeds: list[str], generated: list[str], name: str) -> list[str]:
  """Six seed prompts and two generated ones, shuffled; seeds fill in while there are too few. Always eight."""
  section, rng = settings.prompts, random.Random(f"{settings.seed} {name}")
  old = rng.sample(generated, min(section.generated_demonstrations, len(generated)))
  wanted = section.seed_demonstrations + section.generated_demonstrations - len(old)
  if wanted > len(seeds):
    raise ValueError(
      f"{wanted} demonstrations are wanted of {len(seeds)} seed prompts: lower prompts.seed_demonstrations."
    )
  chosen = old + rng.sample(seeds, wanted)
  rng.shuffle(chosen)
  return chosen


def _propose(
  speaker: rollout.Speaker, shots: Sequence[tuple[str, list[str]]], settings: config_dict.ConfigDict
) -> list[records.Proposal]:
  """One completion of each (name, demonstrations), in their order."""
  engine = speaker.generator(sampling.Sampling(**settings.prompts.sampling))
  requests = []
  for name, demonstrations in shots:
    text = templates.few_shot(demonstrations)
    tokens = (
      speaker.chat(text) if settings.prompts.chat else (speaker.tokenizer.bos_id, *speaker.tokenizer.encode(text))
    )
    if len(tokens) <= engine.max_prompt:
      requests.append(generator.Request(name, tokens, 1))
  found = {
    request.name: records.Proposal(
      name=request.name, text=speaker.tokenizer.decode(completion.tokens), finished=completion.finished
    )
    for request, (completion,) in engine.generate(requests)
  }
  return [found.get(name, records.Proposal(name=name, text=None)) for name, _ in shots]


def _tasks(proposals: Iterable[records.Proposal]) -> tuple[list[str], Counter[str]]:
  """The raw tasks that the proposals hold, in their order."""
  tasks: list[str] = []
  counts: Counter[str] = Counter()
  for proposal in proposals:
    if proposal.text is None:
      counts["few-shot prompt too long"] += 1
      continue
    found, cut = templates.split_tasks(proposal.text, proposal.finished)
    counts["completions"] += 1
    counts["completions cut by the length limit"] += not proposal.finished
    counts["tasks cut to the instruction itself"] += cut
    tasks += found
  counts["tasks"] = len(tasks)
  return tasks, counts


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes rounds of proposals and of the new prompts in them, until `count` are there.

  Inputs: "writer", "seed", "earlier …". A round's demonstrations depend on what the rounds before it kept.
  """
  section = settings.prompts
  aift = out.folder.parent.name  # Names the draws too, so that iterations do not repeat each other's.
  seed = out.inputs["seed"]
  seeds = [example.prompt for example in seed.read("ift.jsonl", records.SFTExample)]
  heldout = [prompt.text for prompt in seed.read("eval_prompts.jsonl", records.Prompt)]
  heldout += [ranked.prompt for ranked in seed.read("ranked_heldout.jsonl", records.RankedReplies)]
  if seed.has("validation.jsonl"):
    heldout += [prompt.text for prompt in seed.read("validation.jsonl", records.Prompt)]
  earlier = [
    prompt.text
    for role, artifact in sorted(out.inputs.items())
    if role.startswith("earlier")
    for prompt in artifact.read_shards("prompts", records.Prompt)
  ]
  novelty = filters.NoveltyFilter(section.max_rouge)
  novelty.seed([*seeds, *heldout, *earlier])  # What is held out must not come back as a training prompt.
  speaker = functools.cache(lambda: modelstore.speaker(out.inputs["writer"], settings, mesh))
  propose = functools.partial(_propose, settings=settings)
  kept: list[str] = []
  totals: Counter[str] = Counter()
  rounds = -(-section.max_proposals // section.per_round)
  for index in range(rounds):
    if len(kept) >= section.count:
      break
    name = f"prompts-{index:05d}-of-{rounds:05d}.jsonl"
    if out.has(name) and out.has(f"counts-{index:05d}.json"):
      fresh = [prompt.text for prompt in out.read(name, records.Prompt)]
      counts = Counter(json.loads(out.read_text(f"counts-{index:05d}.json")))
      for text in fresh:
        novelty.add(text)
    else:
      pool = [*earlier, *kept]
      shots = [
        (f"{aift} prompt {number}", _demonstrations(settings, seeds, pool, f"{aift} {number}"))
        for number in range(index * section.per_round, min((index + 1) * section.per_round, section.max_proposals))
      ]
      stem = f"proposals-{index:05d}"
      artifacts.map_shards(out, stem, shots, settings.generation.shard, mesh, speaker, propose)
      tasks, counts = _tasks(out.read_shards(stem, records.Proposal))
      fresh, dropped = filters.keep_new(interruption.each(tasks), novelty)
      surplus = max(len(kept) + len(fresh) - section.count, 0)
      fresh = fresh[: len(fresh) - surplus]
      counts.update({f"dropped: {reason}": number for reason, number in dropped.items()})
      counts["dropped: more than prompts.count"] += surplus
      items = [
        records.Prompt(id=f"{aift}-{len(kept) + place:06d}", text=text, source=section.writer)
        for place, text in enumerate(fresh)
      ]
      out.write(f"counts-{index:05d}.json", json.dumps(counts))
      out.write_records(name, items)
    kept += fresh
    totals.update(counts)
    logger.info(
      "%s: %d of %d prompts after %d completions", out.folder, len(kept), section.count, totals["completions"]
    )
  for reason, number in sorted(totals.items()):
    logger.info("%s: %s: %d", out.folder, reason, number)
  if not kept:
    raise ValueError(
      f"{out.folder}: no new prompt passed the filters, see the counts above; change prompts.* or the writer."
    )
  if len(kept) < section.count:
    logger.warning("%s: only %d of %d prompts: prompts.max_proposals is used up", out.folder, len(kept), section.count)
  out.commit({"counts": dict(totals), "prompts": len(kept)})
