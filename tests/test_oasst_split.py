"""Tests of srlm_jax.oasst_split: the division of trees."""

from collections import Counter
from typing import Any

import pytest

from srlm_jax import oasst, oasst_split


def check_sums(counts: Counter[str]) -> None:
  """Every name's count is the sum over its reasons."""
  names = {key.split("/")[0] for key in counts if "/" in key}
  assert names
  for name in names:
    assert counts[name] == sum(number for key, number in counts.items() if key.startswith(f"{name}/")), name


def made(count: int, replies: int = 2) -> list[oasst.Tree]:
  """Trees t0, t1 … with that many ranked replies each."""
  trees = []
  for index in range(count):
    texts = tuple(oasst.Reply(id=f"t{index}-{rank}", text=f"answer {rank}", rank=rank) for rank in range(replies))
    trees.append(oasst.Tree(f"t{index}", f"question {index}?", texts))
  return trees


def ids(part: tuple[Any, ...]) -> set[str]:
  return {getattr(one, "prompt_id", None) or one.id for one in part}


def test_split_partitions_the_trees() -> None:
  trees = made(200) + [oasst.Tree("single", "single?", made(1, replies=1)[0].replies)]
  parts = oasst_split.split(trees, eft_fraction=0.5, heldout_fraction=0.25, eval_prompts=256)
  purposes = [ids(parts.eval_prompts), ids(parts.ranked_heldout), ids(parts.ranked_train), ids(parts.ift)]
  assert set().union(*purposes) == {one.id for one in trees}
  assert sum(map(len, purposes)) == len(trees)  # Disjoint.
  # 201 // 10 evaluation prompts; of the 180 or 181 left with two replies half are for EFT, of these a quarter held out.
  assert len(parts.eval_prompts) == 20
  assert len(parts.ranked_heldout) + len(parts.ranked_train) == 90
  assert len(parts.ranked_heldout) == 22
  assert "single" not in ids(parts.ranked_heldout) | ids(parts.ranked_train)
  assert {one.response for one in parts.ift} == {"answer 0"}
  check_sums(parts.counts)
  assert (parts.counts["ift"], parts.counts["ift/kept"]) == (201, 91)
  assert parts.counts["ift/used for EFT"] == parts.counts["eft/train"] + parts.counts["eft/held-out"] == 90
  assert all(number == 0 for key, number in parts.counts.items() if key.startswith("shared"))


def test_papers_numbers_are_the_default() -> None:
  parts = oasst_split.split(made(3962), eval_prompts=0)
  assert len(parts.ift) == 3200
  assert len(parts.ranked_train) + len(parts.ranked_heldout) == 762
  assert len(parts.ranked_heldout) / 762 == pytest.approx(541 / (1630 + 541), abs=0.002)


def test_caps_and_missing_best_replies_are_counted() -> None:
  trees = made(100)
  trees[7] = oasst.Tree("best gone", "best gone?", trees[7].replies[1:])
  parts = oasst_split.split(trees, ift_examples=10, eft_fraction=0.3, eval_prompts=5)
  assert (len(parts.ift), len(parts.eval_prompts)) == (10, 5)
  # 95 remain after 5 evaluation prompts, 28 of them go to EFT (0.3 * 94 or 95), and 67 are left.
  left = parts.counts["ift/over ift_examples"] + parts.counts["ift/no reply of rank 0"]
  assert left == 100 - 5 - 28 - 10
  check_sums(parts.counts)


def test_split_follows_text_and_seed_not_order() -> None:
  trees = made(60)
  first = oasst_split.split(trees, seed=1)
  assert oasst_split.split(trees[::-1], seed=1) == first
  assert oasst_split.split(trees, seed=2).ift != first.ift


def test_equal_prompts_are_used_once() -> None:
  trees = made(40)
  trees.append(oasst.Tree("a copy", "  QUESTION 3? ", trees[0].replies))
  parts = oasst_split.split(trees, eft_fraction=0.5)
  assert "t3" not in ids(parts.eval_prompts + parts.ranked_train + parts.ranked_heldout + parts.ift)
  for purpose in ("ift", "eft", "eval"):
    assert parts.counts[f"{purpose}/prompt occurs twice"] == 1
  check_sums(parts.counts)
  with pytest.raises(ValueError, match="tree t0 occurs twice"):
    oasst_split.split(trees + trees[:1])


def test_overlap_shares_with_ift_only_and_says_so() -> None:
  parts = oasst_split.split(made(100), overlap=True)
  assert len(parts.ift) == 100
  assert (len(parts.ranked_train), len(parts.ranked_heldout), len(parts.eval_prompts)) == (75, 25, 10)
  assert not ids(parts.ranked_train) & (ids(parts.ranked_heldout) | ids(parts.eval_prompts))
  assert parts.counts["shared: IFT and EFT train"] == 75
  assert parts.counts["shared: IFT and EFT held-out"] == 25
  assert parts.counts["shared: IFT and evaluation"] == 10
  check_sums(parts.counts)
  # With few trees held out there are fewer evaluation prompts, rather than ones that EFT trains on.
  few = oasst_split.split(made(100), overlap=True, heldout_fraction=0.04)
  assert len(few.eval_prompts) == 4
  assert not ids(few.ranked_train) & ids(few.eval_prompts)


@pytest.mark.parametrize("overlap", [False, True])
def test_held_out_trees_of_their_own(overlap: bool) -> None:
  trees = made(50)
  given = [oasst.Tree(f"h{index}", f"held out {index}?", trees[0].replies) for index in range(8)]
  given.append(oasst.Tree("h8", "held out 8?", trees[0].replies[:1]))
  given.append(oasst.Tree("h9", "Question 5?", trees[0].replies))
  parts = oasst_split.split(trees, heldout_trees=given, eval_prompts=6, eft_fraction=0.5, overlap=overlap)
  assert ids(parts.ranked_heldout) == {one.id for one in given} - {"h8"}
  assert len(parts.eval_prompts) == 6 and ids(parts.eval_prompts) <= {one.id for one in given}
  trained = ids(parts.ranked_train) | ids(parts.ift)
  assert trained == {one.id for one in trees} - {"t5"}  # All but the held-out prompt are trained on.
  assert parts.counts["ift/prompt of a held-out tree"] == 1
  assert len(parts.ranked_train) == (49 if overlap else 24)
  check_sums(parts.counts)
  assert parts.counts["given eft/fewer than two ranked replies"] == 1
  assert parts.counts["given eval"] == 10
  assert parts.counts["shared: IFT and EFT held-out"] == 0


def test_validation_prompts_are_of_trees_that_nothing_else_uses() -> None:
  trees = made(200)
  without = oasst_split.split(trees, ift_examples=50, eft_fraction=0.5)
  parts = oasst_split.split(trees, ift_examples=50, eft_fraction=0.5, validation_prompts=25)
  assert len(parts.validation) == 25 and (parts.ift, parts.ranked_train) == (without.ift, without.ranked_train)
  others = ids(parts.eval_prompts) | ids(parts.ranked_heldout) | ids(parts.ranked_train) | ids(parts.ift)
  assert not ids(parts.validation) & others
  assert (parts.counts["validation/kept"], parts.counts["validation"]) == (25, 200)
  assert parts.counts["ift/validation prompt"] == 25 and parts.counts["shared: IFT and validation"] == 0
  check_sums(parts.counts)
  assert not without.validation and not [key for key in without.counts if "validation" in key]


def test_ift_gives_up_a_tenth_for_validation_at_the_most() -> None:
  without = oasst_split.split(made(200), eft_fraction=0.5)
  some = oasst_split.split(made(200), eft_fraction=0.5, validation_prompts=4)
  assert some.ift == without.ift[:-4] and ids(some.validation) == ids(without.ift[-4:])
  many = oasst_split.split(made(200), eft_fraction=0.5, validation_prompts=253)
  assert len(many.validation) == len(without.ift) // 10 and many.ift == without.ift[: len(many.ift)]
  check_sums(many.counts)


def test_with_overlap_validation_shares_no_prompt_with_eft_train_or_evaluation() -> None:
  parts = oasst_split.split(made(100), overlap=True, validation_prompts=253)
  assert len(parts.validation) == 15 and len(parts.ift) == 100
  assert not ids(parts.validation) & (ids(parts.ranked_train) | ids(parts.eval_prompts))
  assert parts.counts["shared: IFT and validation"] == 15
  check_sums(parts.counts)


def test_split_refuses_what_it_cannot_do() -> None:
  with pytest.raises(ValueError, match="nothing is left for EFT.*overlap=True"):
    oasst_split.split(made(3))
  with pytest.raises(ValueError, match="nothing is left for EFT held-out"):
    oasst_split.split(made(50), heldout_trees=[])
  assert not oasst_split.split(made(3), eft_fraction=0.0).ranked_train
  for bad in (
    {"ift_examples": -1},
    {"eft_fraction": 1.5},
    {"heldout_fraction": 1.0},
    {"eval_prompts": -2},
    {"validation_prompts": -1},
  ):
    with pytest.raises(ValueError, match=next(iter(bad))):
      oasst_split.split(made(50), **bad)
