"""classify: what each evaluation prompt asks for, said by a judge; the tiny world knows it (paper §3.2)."""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import functools
import logging

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, classes, modelstore, records, rollout, sampling

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes classes shards, in the order of the prompts. Inputs: "seed", and "judge" outside the tiny world."""
  prompts = out.inputs["seed"].read("eval_prompts.jsonl", records.Prompt)
  if settings.world.enabled:
    options = classes.WORLD
    out.write_records("classes-00000-of-00001.jsonl", [classes.of_world(prompt) for prompt in prompts])
  else:
    template = classes.load_template(settings.analysis.classes)
    options = template.options
    how = sampling.Sampling(**settings.analysis.sampling)
    judge = functools.partial(modelstore.speaker, out.inputs["judge"], settings, mesh)
    work = functools.partial(ask, template=template, how=how)
    artifacts.map_shards(out, "classes", prompts, settings.generation.shard, mesh, judge, work)
  found = list(out.read_shards("classes", records.PromptClass))
  counts = Counter(one.reason or "readable" for one in found)
  logger.info("%s: %s", out.folder, dict(counts))
  out.commit({"counts": dict(counts), "options": dataclasses.asdict(options)})


def ask(
  judge: rollout.Judge, prompts: Sequence[records.Prompt], template: classes.Template, how: sampling.Sampling
) -> list[records.PromptClass]:
  """What the judge says of each prompt, in their order; an answer that the length limit cut is not read."""
  questions = [
    rollout.Question(f"class {template.digest} {prompt.id}", (template.fill(prompt.text),)) for prompt in prompts
  ]
  found = []
  for prompt, replies in zip(prompts, judge.ask(questions, how), strict=True):
    if not replies:
      found.append(classes.unreadable(prompt.id, "", "too_long"))
    elif not replies[0].finished:
      found.append(classes.unreadable(prompt.id, replies[0].text, "unfinished"))
    else:
      found.append(classes.parse(prompt.id, replies[0].text, template.options))
  return found
