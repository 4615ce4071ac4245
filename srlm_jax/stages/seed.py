"""seed: IFT, ranked replies for EFT, and evaluation prompts from Open Assistant trees (paper §3.1.1)."""

import logging

from etils import epath
from ml_collections import config_dict

from srlm_jax import artifacts, eft, oasst, oasst_split, records

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, where: dict[str, epath.Path]) -> None:
  """Reads `where["trees"]` (and "heldout_trees", "eval_prompts", "validation" where given); writes the divided data."""
  data, select = settings.data, settings.select
  own = where.get("validation")  # Validation prompts are wanted where checkpoints are compared by them.
  wanted = 0 if select.judge == "none" else select.prompts
  trees, read_counts = oasst.read_trees(where["trees"])
  heldout, heldout_counts = oasst.read_trees(where["heldout_trees"]) if where["heldout_trees"] else (None, {})
  split = oasst_split.split(
    trees,
    ift_examples=data.ift_examples,
    eft_fraction=data.eft_fraction,  # Without EFT too, so that the compared models learn from the same IFT.
    heldout_fraction=data.heldout_fraction,
    eval_prompts=0 if where["eval_prompts"] else data.eval_prompts_count,
    validation_prompts=0 if own else wanted,
    overlap=data.overlap,
    seed=settings.seed,
    heldout_trees=heldout,
  )
  prompts = split.eval_prompts
  if where["eval_prompts"]:
    prompts = tuple(records.read_prompts(where["eval_prompts"]))[: data.eval_prompts_count]
  validation = tuple(records.read_prompts(own))[:wanted] if own and wanted else split.validation
  heldout_texts = [ranked.prompt for ranked in split.ranked_heldout] + [prompt.text for prompt in prompts]
  measured = {eft.prompt_key(text) for text in heldout_texts}
  shared = [prompt for prompt in validation if eft.prompt_key(prompt.text) in measured]
  if own and shared:
    raise ValueError(
      f"{own}: {len(shared)} prompt(s) are also held out for evaluation, the first {shared[0].text[:200]!r}: "
      "checkpoints chosen by them would be measured by them, too. Remove them from one side."
    )
  validation = tuple(prompt for prompt in validation if prompt not in shared)
  if wanted and not validation:
    raise ValueError(
      f"no tree is left for select.prompts={wanted}, by which checkpoints are compared: give more data.trees, prompts "
      "of your own in select.path, or select.judge='none'."
    )
  if own:
    eft.no_overlap([ranked.prompt for ranked in split.ranked_train], [prompt.text for prompt in validation])
    eft.no_overlap([example.prompt for example in split.ift], [prompt.text for prompt in validation])
  eft.no_overlap([ranked.prompt for ranked in split.ranked_train], heldout_texts)
  if not data.overlap:
    eft.no_overlap([example.prompt for example in split.ift], heldout_texts)
  counts = {**read_counts, **{f"held out: {name}": n for name, n in heldout_counts.items()}, **split.counts}
  if shared:
    counts["validation prompts left out: held out for evaluation"] = len(shared)
  for reason, count in sorted(counts.items()):
    logger.info("seed: %s: %d", reason, count)
  out.write_records("ift.jsonl", split.ift)
  out.write_records("ranked_train.jsonl", split.ranked_train)
  out.write_records("ranked_heldout.jsonl", split.ranked_heldout)
  out.write_records("eval_prompts.jsonl", prompts)
  facts = {
    "counts": counts,
    "ift": len(split.ift),
    "ranked_train": len(split.ranked_train),
    "ranked_heldout": len(split.ranked_heldout),
    "eval_prompts": len(prompts),
  }
  if wanted:
    out.write_records("validation.jsonl", validation)
    facts["validation"] = len(validation)
  out.commit(facts)
