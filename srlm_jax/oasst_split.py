"""Which trees serve which purpose: evaluation prompts, EFT held-out, EFT train, IFT and validation (paper §3.1.1).

`split` divides what `oasst.read_trees` returned. Its counts are flat as those: for a name such as "ift", counts["ift"]
equals the sum over "ift/kept" and "ift/<reason>".
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import hashlib

from srlm_jax.oasst import Tree, count, ift_example, prompt_key, ranked_replies
from srlm_jax.records import Prompt, RankedReplies, SFTExample


@dataclasses.dataclass(frozen=True)
class Split:
  """The seed data of a run. `counts` has, per purpose, what became of every tree."""

  ift: tuple[SFTExample, ...]
  ranked_train: tuple[RankedReplies, ...]
  ranked_heldout: tuple[RankedReplies, ...]
  eval_prompts: tuple[Prompt, ...]
  validation: tuple[Prompt, ...]
  counts: Counter[str]


@dataclasses.dataclass(frozen=True)
class _Parts:
  """Which trees serve which purpose."""

  evaluation: Sequence[Tree]
  heldout: Sequence[Tree]
  train: Sequence[Tree]
  ift: Sequence[Tree]
  validation: Sequence[Tree] = ()


def split(
  trees: Sequence[Tree],
  *,
  ift_examples: int = 3200,
  eft_fraction: float = 762 / 3962,
  heldout_fraction: float = 0.25,
  eval_prompts: int = 256,
  validation_prompts: int = 0,
  overlap: bool = False,
  seed: int = 0,
  heldout_trees: Sequence[Tree] | None = None,
) -> Split:
  """Divides trees into evaluation prompts, EFT held-out, EFT train, IFT and validation (paper §3.1.1: no overlap).

  Trees are drawn in the order of sha256(seed, prompt), so their order in the file does not matter; of several with the
  same prompt (`prompt_key`) the one with the smallest id stays. First the evaluation prompts are drawn, then from the
  trees with two or more ranked replies those for EFT, then IFT from all that remain. Validation prompts come last: from
  trees that nothing else uses and then, where these are too few, from the last of IFT, a tenth of it at most.

  Args:
    trees: what `read_trees` returned.
    ift_examples: at most so many IFT examples.
    eft_fraction: share of the trees with two or more replies that EFT gets, held-out ones included; 0 for no EFT. The
      paper: 1,630 + 541 judgements at about 2.85 replies a prompt are 762 prompts, beside 3,200 that are used for IFT.
    heldout_fraction: share of the EFT trees that is held out.
    eval_prompts: at most so many evaluation prompts, and never more than a tenth of the trees.
    validation_prompts: at most so many prompts by which checkpoints are compared.
    overlap: for samples too small to divide. IFT is taken from all trees and EFT from all with two or more replies
      (eft_fraction matters only as 0 or not); EFT train shares no prompt with EFT held-out and the evaluation prompts,
      but IFT shares prompts with all three: counts "shared: …" say how many. Validation prompts are then of trees that
      neither EFT train nor evaluation uses.
    seed: another division for another seed.
    heldout_trees: a file's worth of trees that only evaluate: all with two or more replies are EFT held-out, and the
      evaluation prompts come from them too. `trees` are then not divided for these two purposes
      (`heldout_fraction` and the tenth do not apply), but lose any prompt that is also a held-out one.

  Returns:
    The split. Its counts "ift", "eft" and "eval" each sum up to all the trees ("given eft" and "given eval" to
    `heldout_trees`).

  Raises:
    ValueError: a parameter out of range, a tree id that occurs twice, or a part that was asked for but got nothing.
  """
  _check_parameters(ift_examples, eft_fraction, heldout_fraction, eval_prompts, validation_prompts)
  given, given_out = _draw_order(heldout_trees or (), seed, frozenset())
  pool, out = _draw_order(trees, seed, frozenset(prompt_key(tree.prompt) for tree in given))
  divide = _divide_sharing if overlap else _divide
  if heldout_trees is None:
    parts = divide(pool, ift_examples, eft_fraction, heldout_fraction, eval_prompts)
  else:
    parts = divide(pool, ift_examples, eft_fraction, 0.0, 0)
    parts = dataclasses.replace(parts, evaluation=given[:eval_prompts], heldout=_several(given))
  if validation_prompts:
    parts = _with_validation(parts, pool, validation_prompts, overlap)
  _check_parts(parts, ift_examples, eft_fraction, heldout_fraction if heldout_trees is None else 1.0)
  counts = _count_parts(trees, out, parts, overlap)
  if validation_prompts:
    counts.update(_count_validation(trees, out, parts))
  if heldout_trees is not None:
    counts.update(_count_given(heldout_trees, given_out, parts))
  return Split(
    ift=tuple(example for tree in parts.ift if (example := ift_example(tree))),
    ranked_train=tuple(ranked for tree in parts.train if (ranked := ranked_replies(tree))),
    ranked_heldout=tuple(ranked for tree in parts.heldout if (ranked := ranked_replies(tree))),
    eval_prompts=tuple(Prompt(id=tree.id, text=tree.prompt, source="oasst") for tree in parts.evaluation),
    validation=tuple(Prompt(id=tree.id, text=tree.prompt, source="oasst") for tree in parts.validation),
    counts=counts,
  )


def _draw_order(trees: Sequence[Tree], seed: int, barred: frozenset[str]) -> tuple[list[Tree], dict[str, str]]:
  """The trees in the order in which they are drawn, and the ids left out with the reason."""
  if twice := [name for name, times in Counter(tree.id for tree in trees).items() if times > 1]:
    raise ValueError(f"tree {twice[0]} occurs twice. Give each tree once (release 2 may repeat trees of release 1).")
  hashes = {tree.id: hashlib.sha256(f"{seed}\n{prompt_key(tree.prompt)}".encode()).digest() for tree in trees}
  seen, pool, out = set(), [], {}
  for tree in sorted(trees, key=lambda tree: (hashes[tree.id], tree.id)):
    key = prompt_key(tree.prompt)
    if key in barred:
      out[tree.id] = "prompt of a held-out tree"
    elif key in seen:
      out[tree.id] = "prompt occurs twice"
    else:
      pool.append(tree)
    seen.add(key)
  return pool, out


def _several(trees: Iterable[Tree]) -> list[Tree]:
  """The trees with two or more ranked replies."""
  return [tree for tree in trees if len(tree.replies) >= 2]


def _divide(
  pool: Sequence[Tree], ift_examples: int, eft_fraction: float, heldout_fraction: float, eval_prompts: int
) -> _Parts:
  """Four parts of which no two share a tree."""
  drawn = min(eval_prompts, len(pool) // 10)
  several = _several(pool[drawn:])
  eft = several[: round(eft_fraction * len(several))]
  used = {tree.id for tree in eft}
  cut = round(heldout_fraction * len(eft))
  ift = [tree for tree in pool[drawn:] if tree.id not in used and ift_example(tree)]
  return _Parts(pool[:drawn], eft[:cut], eft[cut:], ift[:ift_examples])


def _divide_sharing(
  pool: Sequence[Tree], ift_examples: int, eft_fraction: float, heldout_fraction: float, eval_prompts: int
) -> _Parts:
  """Parts that share trees with IFT; EFT train shares none with what evaluates."""
  eft = _several(pool) if eft_fraction else []
  cut = round(heldout_fraction * len(eft))
  train = {tree.id for tree in eft[cut:]}
  evaluation = [tree for tree in pool if tree.id not in train]
  ift = [tree for tree in pool if ift_example(tree)]
  return _Parts(evaluation[: min(eval_prompts, len(pool) // 10)], eft[:cut], eft[cut:], ift[:ift_examples])


def _with_validation(parts: _Parts, pool: Sequence[Tree], wanted: int, overlap: bool) -> _Parts:
  """The parts with validation prompts, for which IFT gives up its last trees where no others are left."""
  busy = [parts.evaluation, parts.heldout, parts.train, parts.ift]
  if overlap:
    busy = [parts.evaluation, parts.train]
  used = {tree.id for part in busy for tree in part}
  free = [tree for tree in pool if tree.id not in used][:wanted]
  given_up = 0 if overlap else min(wanted - len(free), len(parts.ift) // 10)
  kept = len(parts.ift) - given_up
  return dataclasses.replace(parts, ift=parts.ift[:kept], validation=[*free, *parts.ift[kept:]])


def _check_parameters(
  ift_examples: int, eft_fraction: float, heldout_fraction: float, eval_prompts: int, validation_prompts: int
) -> None:
  sizes = {"ift_examples": ift_examples, "eval_prompts": eval_prompts, "validation_prompts": validation_prompts}
  for name, number in sizes.items():
    if number < 0:
      raise ValueError(f"{name}={number} must not be negative. Give 0 for none.")
  if not 0 <= eft_fraction <= 1:
    raise ValueError(f"eft_fraction={eft_fraction} must lie in [0, 1]. Give 0 for no EFT.")
  if not 0 <= heldout_fraction < 1:
    raise ValueError(f"heldout_fraction={heldout_fraction} must lie in [0, 1): some EFT must be left to train on.")


def _check_parts(parts: _Parts, ift_examples: int, eft_fraction: float, heldout_fraction: float) -> None:
  """ValueError where a part that was asked for is empty."""
  wanted = {
    "IFT": (ift_examples, parts.ift),
    "EFT train": (eft_fraction, parts.train),
    "EFT held-out": (eft_fraction * heldout_fraction, parts.heldout),
  }
  for name, (size, part) in wanted.items():
    if size and not part:
      raise ValueError(
        f"nothing is left for {name}: too few trees, or too few with two ranked replies. Give more trees, set"
        " overlap=True (IFT and EFT share prompts), or set this part's size to 0."
      )


def _count_parts(trees: Iterable[Tree], out: dict[str, str], parts: _Parts, overlap: bool) -> Counter[str]:
  """What became of every tree, per purpose, and what the purposes share."""
  evaluation, heldout, train, ift = (
    {tree.id for tree in part} for part in (parts.evaluation, parts.heldout, parts.train, parts.ift)
  )
  validation = {tree.id for tree in parts.validation}
  counts: Counter[str] = Counter()
  for tree in trees:
    name, elsewhere = tree.id, None
    if not overlap:
      elsewhere = "evaluation prompt" if name in evaluation else "used for EFT" if name in heldout | train else None
      elsewhere = elsewhere or ("validation prompt" if name in validation else None)
    few = "fewer than two ranked replies" if len(tree.replies) < 2 else None
    no_best = None if ift_example(tree) else "no reply of rank 0"
    eft = "train" if name in train else "held-out" if name in heldout else None
    count(counts, "ift", "kept" if name in ift else out.get(name) or elsewhere or no_best or "over ift_examples")
    count(counts, "eft", eft or out.get(name) or elsewhere or few or "over eft_fraction")
    count(counts, "eval", "kept" if name in evaluation else out.get(name) or "not drawn")
  for label, part in {"EFT train": train, "EFT held-out": heldout, "evaluation": evaluation}.items():
    counts[f"shared: IFT and {label}"] = len(ift & part)
  return counts


def _count_validation(trees: Iterable[Tree], out: dict[str, str], parts: _Parts) -> Counter[str]:
  """What became of every tree as a validation prompt."""
  validation, ift = ({tree.id for tree in part} for part in (parts.validation, parts.ift))
  counts: Counter[str] = Counter()
  for tree in trees:
    count(counts, "validation", "kept" if tree.id in validation else out.get(tree.id) or "not drawn")
  counts["shared: IFT and validation"] = len(ift & validation)
  return counts


def _count_given(trees: Iterable[Tree], out: dict[str, str], parts: _Parts) -> Counter[str]:
  """What became of the held-out trees that were given."""
  evaluation = {tree.id for tree in parts.evaluation}
  counts: Counter[str] = Counter()
  for tree in trees:
    few = "fewer than two ranked replies" if len(tree.replies) < 2 else None
    count(counts, "given eft", out.get(tree.id) or few or "held-out")
    count(counts, "given eval", "kept" if tree.id in evaluation else out.get(tree.id) or "not drawn")
  return counts
