"""seed: IFT, ranked replies for EFT, and evaluation prompts from Open Assistant trees (paper §3.1.1)."""

from collections.abc import Mapping
import dataclasses
import logging

from etils import epath
from ml_collections import config_dict

from srlm_jax import artifacts, eft, oasst, oasst_split, records

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Given:
  """What a user's files give a run, divided; `counts` has what became of every tree and reply."""

  split: oasst_split.Split
  prompts: tuple[records.Prompt, ...]  # Of evaluation.
  validation: tuple[records.Prompt, ...]
  counts: dict[str, int]


def _wanted(settings: config_dict.ConfigDict) -> int:
  """Validation prompts: they are wanted where checkpoints are compared by them."""
  return 0 if settings.select.judge == "none" else settings.select.prompts


def read(settings: config_dict.ConfigDict, where: Mapping[str, epath.Path]) -> Given:
  """Reads and divides the files of a run; nothing is written.

  Args:
    settings: of the run.
    where: the paths "trees" and, where a user has them, "heldout_trees", "eval_prompts" and "validation".

  Raises:
    ValueError: a file that cannot be read, a part of the data that nothing is left for, or a prompt that would be both
      trained on and measured by.
  """
  data, own = settings.data, where.get("validation")
  wanted = _wanted(settings)
  trees, read_counts = oasst.read_trees(where["trees"])
  heldout, heldout_counts = oasst.read_trees(where["heldout_trees"]) if where.get("heldout_trees") else (None, {})
  split = oasst_split.split(
    trees,
    ift_examples=data.ift_examples,
    eft_fraction=data.eft_fraction,  # Without EFT too, so that the compared models learn from the same IFT.
    heldout_fraction=data.heldout_fraction,
    eval_prompts=0 if where.get("eval_prompts") else data.eval_prompts_count,
    validation_prompts=0 if own else wanted,
    overlap=data.overlap,
    seed=settings.seed,
    heldout_trees=heldout,
  )
  prompts = split.eval_prompts
  if where.get("eval_prompts"):
    prompts = tuple(records.read_prompts(where["eval_prompts"]))[: data.eval_prompts_count]
  validation = tuple(records.read_prompts(own))[:wanted] if own and wanted else split.validation
  measured = [ranked.prompt for ranked in split.ranked_heldout] + [prompt.text for prompt in prompts]
  validation, shared = _validation(validation, measured, wanted, own)
  taught = [ranked.prompt for ranked in split.ranked_train], [example.prompt for example in split.ift]
  if own:
    for texts in taught:
      eft.no_overlap(texts, [prompt.text for prompt in validation])
  for texts in taught[:1] if data.overlap else taught:
    eft.no_overlap(texts, measured)
  counts = {**read_counts, **{f"held out: {name}": n for name, n in heldout_counts.items()}, **split.counts}
  if shared:
    counts["validation prompts left out: held out for evaluation"] = shared
  return Given(split, prompts, validation, counts)


def _validation(
  prompts: tuple[records.Prompt, ...], measured: list[str], wanted: int, own: epath.Path | None
) -> tuple[tuple[records.Prompt, ...], int]:
  """The prompts that checkpoints are chosen by, and how many were left out, as models are measured by them."""
  keys = {eft.prompt_key(text) for text in measured}
  shared = [prompt for prompt in prompts if eft.prompt_key(prompt.text) in keys]
  if own and shared:
    raise ValueError(
      f"{own}: {len(shared)} prompt(s) are also held out for evaluation, the first {shared[0].text[:200]!r}: "
      "checkpoints chosen by them would be measured by them, too. Remove them from one side."
    )
  left = tuple(prompt for prompt in prompts if prompt not in shared)
  if wanted and not left:
    raise ValueError(
      f"no tree is left for select.prompts={wanted}, by which checkpoints are compared: give more data.trees, prompts "
      "of your own in select.path, or select.judge='none'."
    )
  return left, len(shared)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, where: Mapping[str, epath.Path]) -> None:
  """Writes what `read` gives."""
  given = read(settings, where)
  split = given.split
  for reason, count in sorted(given.counts.items()):
    logger.info("seed: %s: %d", reason, count)
  out.write_records("ift.jsonl", split.ift)
  out.write_records("ranked_train.jsonl", split.ranked_train)
  out.write_records("ranked_heldout.jsonl", split.ranked_heldout)
  out.write_records("eval_prompts.jsonl", given.prompts)
  facts = {
    "counts": given.counts,
    "ift": len(split.ift),
    "ranked_train": len(split.ranked_train),
    "ranked_heldout": len(split.ranked_heldout),
    "eval_prompts": len(given.prompts),
  }
  if _wanted(settings):
    out.write_records("validation.jsonl", given.validation)
    facts["validation"] = len(given.validation)
  out.commit(facts)
