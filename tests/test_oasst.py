"""Tests of srlm_jax.oasst: reading damaged and whole files, the filters, and the division."""

from collections import Counter
import gzip
import json
import os
import pathlib
from typing import Any

import pytest

from srlm_jax import oasst


def node(name: str, role: str = "assistant", **fields: Any) -> dict[str, Any]:
  return {"message_id": name, "text": f"text of {name}", "role": role, "lang": "en", **fields}


def tree(name: str, *replies: dict[str, Any], state: str | None = "ready_for_export", **fields: Any) -> dict[str, Any]:
  prompt = node(name, role="prompter", replies=list(replies), **fields)
  return {"message_tree_id": name, "tree_state": state, "prompt": prompt}


def ranked(name: str, count: int = 2, **fields: Any) -> dict[str, Any]:
  return tree(name, *(node(f"{name}-{rank}", rank=rank) for rank in range(count)), **fields)


def write(folder: pathlib.Path, *lines: Any, name: str = "trees.jsonl") -> pathlib.Path:
  """Writes lines, of which strings are taken as they are."""
  path = folder / name
  text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
  path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
  return path


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


@pytest.mark.parametrize("name", ["trees.jsonl", "trees.jsonl.gz"])
def test_reads_both_releases_plain_and_gzip(tmp_path: pathlib.Path, name: str) -> None:
  bare = {"message_id": "a", "text": "yes", "role": "assistant", "lang": "en", "rank": 0}
  old = {
    "message_tree_id": "old",
    "tree_state": "ready_for_export",
    "prompt": {"message_id": "old", "text": "old?", "role": "prompter", "lang": "en", "replies": [bare]},
  }
  nulls = dict(
    parent_id=None,
    review_count=None,
    review_result=None,
    deleted=None,
    synthetic=None,
    emojis=None,
    labels=None,
    detoxify=None,
    events=None,
    model_name=None,
  )
  # Deeper turns are not read, so that they may be anything.
  deep = node("c", rank=1, replies=[{"role": "nobody"}], **nulls)
  new = tree("new", deep, node("b", rank=0, **nulls), **nulls) | {"origin": "x"}
  trees, counts = oasst.read_trees(write(tmp_path, old, "", new, name=name))
  assert [(one.id, one.prompt) for one in trees] == [("old", "old?"), ("new", "text of new")]
  assert [reply.id for reply in trees[1].replies] == ["b", "c"]  # By rank, not in the file's order.
  assert oasst.ift_example(trees[1]).response == "text of b"
  assert (counts["trees"], counts["trees/kept"], counts["replies"], counts["replies/kept"]) == (2, 2, 3, 3)


TREE_REASONS = {
  "tree_state": tree("t", node("a", rank=0), state="growing"),
  "lang": tree("t", node("a", rank=0), lang="de"),
  "review_result": tree("t", node("a", rank=0), review_result=False),
  "deleted": tree("t", node("a", rank=0), deleted=True),
  "synthetic": tree("t", node("a", rank=0), synthetic=True),
  "empty text": tree("t", node("a", rank=0), text=" \n"),
  "no reply": tree("t"),
  "no reply left": tree("t", node("a", rank=None), node("b", rank=0, deleted=True)),
  "rank given twice": tree("t", node("a", rank=0), node("b", rank=0)),
}


@pytest.mark.parametrize("reason", TREE_REASONS)
def test_every_tree_left_out_has_its_reason(tmp_path: pathlib.Path, reason: str) -> None:
  trees, counts = oasst.read_trees(write(tmp_path, TREE_REASONS[reason], ranked("good")))
  assert [one.id for one in trees] == ["good"]
  assert {key: number for key, number in counts.items() if key.startswith("trees")} == {
    "trees": 2,
    "trees/kept": 1,
    f"trees/{reason}": 1,
  }
  check_sums(counts)


def test_absent_state_and_language_are_left_out(tmp_path: pathlib.Path) -> None:
  trees, counts = oasst.read_trees(write(tmp_path, ranked("a", state=None), ranked("b", lang=None)))
  assert not trees
  assert (counts["trees/tree_state"], counts["trees/lang"]) == (1, 1)


def test_replies_are_filtered_and_keep_their_ranks(tmp_path: pathlib.Path) -> None:
  line = tree(
    "t",
    node("german", rank=0, lang="de"),
    node("good", rank=1),
    node("spam", rank=2, review_result=False),
    node("gone", rank=3, deleted=True),
    node("machine", rank=4, synthetic=True),
    node("empty", rank=5, text=""),
    node("unranked", rank=None),
    node("last", rank=7),
  )
  trees, counts = oasst.read_trees(write(tmp_path, line))
  assert [(reply.id, reply.rank) for reply in trees[0].replies] == [("good", 1), ("last", 7)]
  assert oasst.ift_example(trees[0]) is None  # The reply of rank 0 is German; the next one does not stand in.
  assert [reply.rank for reply in oasst.ranked_replies(trees[0]).replies] == [1, 7]
  assert counts["replies/kept"] == 2
  for reason in ("lang", "review_result", "deleted", "synthetic", "empty text", "unranked"):
    assert counts[f"replies/{reason}"] == 1
  check_sums(counts)
  german, _ = oasst.read_trees(write(tmp_path, tree("t", node("a", rank=0, lang="de"), lang="de")), lang="de")
  assert len(german) == 1


def without(line: dict[str, Any], field: str) -> dict[str, Any]:
  return {key: value for key, value in line.items() if key != field}


DAMAGED = {
  "cut": (json.dumps(ranked("t"))[:-9], "the line: Invalid JSON"),
  "not an object": ("[1]", "the line"),
  "no tree id": (without(ranked("t"), "message_tree_id"), "message_tree_id"),
  "no prompt": (without(ranked("t"), "prompt"), "prompt"),
  "no message id": (tree("t", without(node("a"), "message_id")), "prompt.replies.0.message_id"),
  "no text": (tree("t", node("a"), without(node("b"), "text")), "prompt.replies.1.text"),
  "null text": (tree("t", text=None), "prompt.text"),
  "no role": (tree("t", without(node("a"), "role")), "prompt.replies.0.role"),
  "prompter as reply": (tree("t", node("a", role="prompter")), "prompt.replies.0.role"),
  "assistant as root": (tree("t") | {"prompt": node("t")}, "prompt.role"),
  "negative rank": (tree("t", node("a", rank=-1)), "prompt.replies.0.rank"),
  "tree twice": (ranked("first"), "tree first was already on line 1"),
  "reply twice": (tree("t", node("a", rank=0), node("a", rank=1)), "reply a occurs twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_line_is_named(tmp_path: pathlib.Path, case: str) -> None:
  line, message = DAMAGED[case]
  path = write(tmp_path, ranked("first"), "", line, ranked("after"))
  with pytest.raises(ValueError) as error:
    oasst.read_trees(path)
  assert f"{path}, line 3" in str(error.value)
  assert message in str(error.value)


def test_damaged_files(tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, *(ranked(f"t{index}") for index in range(50)), name="trees.jsonl.gz")
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) - 9])
  with pytest.raises(ValueError, match=r"trees.jsonl.gz: damaged or cut-off gzip file after line \d+"):
    oasst.read_trees(path)
  path.write_bytes(b"no gzip at all")
  with pytest.raises(ValueError, match="damaged or cut-off gzip file after line 0"):
    oasst.read_trees(path)
  with pytest.raises(ValueError, match="holds no trees"):
    oasst.read_trees(write(tmp_path, ""))
  latin = tmp_path / "latin.jsonl"
  latin.write_bytes(json.dumps(ranked("t", text="caf\u00e9"), ensure_ascii=False).encode("latin-1"))
  with pytest.raises(ValueError, match="line 1"):
    oasst.read_trees(latin)


def test_split_partitions_the_trees() -> None:
  trees = made(200) + [oasst.Tree("single", "single?", made(1, replies=1)[0].replies)]
  parts = oasst.split(trees, eft_fraction=0.5, heldout_fraction=0.25, eval_prompts=256)
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
  parts = oasst.split(made(3962), eval_prompts=0)
  assert len(parts.ift) == 3200
  assert len(parts.ranked_train) + len(parts.ranked_heldout) == 762
  assert len(parts.ranked_heldout) / 762 == pytest.approx(541 / (1630 + 541), abs=0.002)


def test_caps_and_missing_best_replies_are_counted() -> None:
  trees = made(100)
  trees[7] = oasst.Tree("best gone", "best gone?", trees[7].replies[1:])
  parts = oasst.split(trees, ift_examples=10, eft_fraction=0.3, eval_prompts=5)
  assert (len(parts.ift), len(parts.eval_prompts)) == (10, 5)
  # 95 remain after 5 evaluation prompts, 28 of them go to EFT (0.3 * 94 or 95), and 67 are left.
  left = parts.counts["ift/over ift_examples"] + parts.counts["ift/no reply of rank 0"]
  assert left == 100 - 5 - 28 - 10
  check_sums(parts.counts)


def test_split_follows_text_and_seed_not_order() -> None:
  trees = made(60)
  first = oasst.split(trees, seed=1)
  assert oasst.split(trees[::-1], seed=1) == first
  assert oasst.split(trees, seed=2).ift != first.ift


def test_equal_prompts_are_used_once() -> None:
  trees = made(40)
  trees.append(oasst.Tree("a copy", "  QUESTION 3? ", trees[0].replies))
  parts = oasst.split(trees, eft_fraction=0.5)
  assert "t3" not in ids(parts.eval_prompts + parts.ranked_train + parts.ranked_heldout + parts.ift)
  for purpose in ("ift", "eft", "eval"):
    assert parts.counts[f"{purpose}/prompt occurs twice"] == 1
  check_sums(parts.counts)
  with pytest.raises(ValueError, match="tree t0 occurs twice"):
    oasst.split(trees + trees[:1])


def test_overlap_shares_with_ift_only_and_says_so() -> None:
  parts = oasst.split(made(100), overlap=True)
  assert len(parts.ift) == 100
  assert (len(parts.ranked_train), len(parts.ranked_heldout), len(parts.eval_prompts)) == (75, 25, 10)
  assert not ids(parts.ranked_train) & (ids(parts.ranked_heldout) | ids(parts.eval_prompts))
  assert parts.counts["shared: IFT and EFT train"] == 75
  assert parts.counts["shared: IFT and EFT held-out"] == 25
  assert parts.counts["shared: IFT and evaluation"] == 10
  check_sums(parts.counts)
  # With few trees held out there are fewer evaluation prompts, rather than ones that EFT trains on.
  few = oasst.split(made(100), overlap=True, heldout_fraction=0.04)
  assert len(few.eval_prompts) == 4
  assert not ids(few.ranked_train) & ids(few.eval_prompts)


@pytest.mark.parametrize("overlap", [False, True])
def test_held_out_trees_of_their_own(overlap: bool) -> None:
  trees = made(50)
  given = [oasst.Tree(f"h{index}", f"held out {index}?", trees[0].replies) for index in range(8)]
  given.append(oasst.Tree("h8", "held out 8?", trees[0].replies[:1]))
  given.append(oasst.Tree("h9", "Question 5?", trees[0].replies))
  parts = oasst.split(trees, heldout_trees=given, eval_prompts=6, eft_fraction=0.5, overlap=overlap)
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
  without = oasst.split(trees, ift_examples=50, eft_fraction=0.5)
  parts = oasst.split(trees, ift_examples=50, eft_fraction=0.5, validation_prompts=25)
  assert len(parts.validation) == 25 and (parts.ift, parts.ranked_train) == (without.ift, without.ranked_train)
  others = ids(parts.eval_prompts) | ids(parts.ranked_heldout) | ids(parts.ranked_train) | ids(parts.ift)
  assert not ids(parts.validation) & others
  assert (parts.counts["validation/kept"], parts.counts["validation"]) == (25, 200)
  assert parts.counts["ift/validation prompt"] == 25 and parts.counts["shared: IFT and validation"] == 0
  check_sums(parts.counts)
  assert not without.validation and not [key for key in without.counts if "validation" in key]


def test_ift_gives_up_a_tenth_for_validation_at_the_most() -> None:
  without = oasst.split(made(200), eft_fraction=0.5)
  some = oasst.split(made(200), eft_fraction=0.5, validation_prompts=4)
  assert some.ift == without.ift[:-4] and ids(some.validation) == ids(without.ift[-4:])
  many = oasst.split(made(200), eft_fraction=0.5, validation_prompts=253)
  assert len(many.validation) == len(without.ift) // 10 and many.ift == without.ift[: len(many.ift)]
  check_sums(many.counts)


def test_with_overlap_validation_shares_no_prompt_with_eft_train_or_evaluation() -> None:
  parts = oasst.split(made(100), overlap=True, validation_prompts=253)
  assert len(parts.validation) == 15 and len(parts.ift) == 100
  assert not ids(parts.validation) & (ids(parts.ranked_train) | ids(parts.eval_prompts))
  assert parts.counts["shared: IFT and validation"] == 15
  check_sums(parts.counts)


def test_split_refuses_what_it_cannot_do() -> None:
  with pytest.raises(ValueError, match="nothing is left for EFT.*overlap=True"):
    oasst.split(made(3))
  with pytest.raises(ValueError, match="nothing is left for EFT held-out"):
    oasst.split(made(50), heldout_trees=[])
  assert not oasst.split(made(3), eft_fraction=0.0).ranked_train
  for bad in (
    {"ift_examples": -1},
    {"eft_fraction": 1.5},
    {"heldout_fraction": 1.0},
    {"eval_prompts": -2},
    {"validation_prompts": -1},
  ):
    with pytest.raises(ValueError, match=next(iter(bad))):
      oasst.split(made(50), **bad)


@pytest.fixture(name="sample")
def _sample() -> pathlib.Path:
  """The real release sample, where the environment has it."""
  folder = os.environ.get("SRLM_REAL_DATA")
  if not folder:
    pytest.skip("SRLM_REAL_DATA is not set to the folder of real data")
  return pathlib.Path(folder) / "en_100_tree.jsonl"


def test_real_sample(sample: pathlib.Path) -> None:
  trees, counts = oasst.read_trees(sample)
  check_sums(counts)
  assert (counts["trees"], counts["replies"], counts["trees/synthetic"]) == (100, 333, 5)
  assert counts["trees/kept"] == len(trees)
  parts = oasst.split(trees, overlap=True)
  check_sums(parts.counts)
  assert 94 <= len(parts.ift) <= 99
  assert not ids(parts.ranked_train) & ids(parts.ranked_heldout)
  assert len(parts.ranked_train) + len(parts.ranked_heldout) == parts.counts["eft/train"] + parts.counts["eft/held-out"]
  raw = {line["message_tree_id"]: line["prompt"] for line in map(json.loads, sample.read_text().splitlines())}
  for example in parts.ift:
    best = [reply["text"] for reply in raw[example.id]["replies"] if reply.get("rank") == 0]
    assert (example.prompt, [example.response]) == (raw[example.id]["text"], best)
