"""dpo: M_{t+1} from M_t, over stored reference log-probs: one model in memory (paper §2.4)."""

import functools
import logging

import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  config as config_lib,
  early_stopping,
  finetune,
  health,
  modelstore,
  pairing,
  pairset,
  records,
  rollout,
  train_loop,
  train_step,
)

logger = logging.getLogger(__name__)


def run(
  out: artifacts.Artifact,
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  where: early_stopping.Where | None = None,
) -> None:
  """Trains the input "parent" on the input "pairs".

  With `where` it chooses among the checkpoints (paper §3.1.2).
  """
  pairs, section = out.inputs["pairs"], settings.dpo
  parent = out.inputs["parent"]
  words = modelstore.load_tokenizer(parent)
  count = pairs.manifest()["facts"]["pairs"]
  steps = train_step.count_steps(section, count)
  logger.info("%s: %d pairs, %d steps", out.folder, count, steps)
  in_parts = section.accumulate > 1 or mesh.shape["slice"] > 1
  train = functools.partial(
    train_loop.train,
    config=modelstore.model_config(parent, settings, train=True),
    start=functools.partial(modelstore.load, parent, settings, mesh, train=True),
    loss_fn=functools.partial(train_step.dpo_loss, chunk=settings.model.logits_chunk, beta=section.beta),
    optimizer=config_lib.frozen(train_step.OptimizerConfig, {**section, "steps": steps}),
    batches=pairset.Batches(pairs.folder / "dataset", section.batch, settings.seed, None if in_parts else mesh),
    mesh=mesh,
    folder=out.folder,
    seed=settings.seed,
    save_every=section.save_every,
    accumulate=section.accumulate,
    skip_limit=section.skip_limit,
    limits=config_lib.frozen(health.Limits, settings.health),
  )
  facts = {"pairs": count, "reference": pairs.manifest()["facts"]["reference"]}
  early_stopping.commit(out, words, train, steps, facts, settings, mesh, where)


def run_positive_only(
  out: artifacts.Artifact,
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  where: early_stopping.Where | None = None,
) -> None:
  """The compared variant (paper §3.2): SFT of M0 on the seed data and the perfectly scored answers."""
  groups = pairing.by_prompt(
    out.inputs["responses"].read_shards("responses", records.Response),
    out.inputs["judgements"].read_shards("judgements", records.Judgement),
  )
  examples = out.inputs["seed"].read("ift.jsonl", records.SFTExample)
  if "eft" in out.inputs:
    examples += out.inputs["eft"].read("eft.jsonl", records.SFTExample)
  best = pairing.perfect(groups, rollout.judging(settings.judge).rubric.high)
  logger.info("%s: %d answers with the full score are added to %d examples", out.folder, len(best), len(examples))
  examples += [
    records.SFTExample(id=f"{one.prompt_id}/{one.sample}", kind="aift", prompt=one.prompt, response=one.text)
    for one in best
  ]
  finetune.finetune(out, out.inputs["parent"], examples, settings, mesh, where)
