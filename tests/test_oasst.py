"""Tests of srlm_jax.oasst: reading damaged and whole files, and the filters."""

from collections import Counter
import gzip
import json
import os
import pathlib
from typing import Any

import pytest

from srlm_jax import oasst, oasst_split


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
  "negative rank": tree("t", node("a", rank=-1), node("b", rank=0)),
  "over 1,000,000 characters": tree("t", node("a", rank=0), text="x" * 1_000_001),
  "message occurs twice": tree("t", node("a", rank=0), node("a", rank=1)),
  "message of another tree": tree("t", node("first-0", rank=0), node("b", rank=1)),
  "cycle": tree("t", node("a", rank=0, replies=[node("b", role="prompter", replies=[node("a")])])),
  "parent of the prompt": tree("t", node("a", rank=0), parent_id="a"),
  "reply to another message": tree("t", node("a", rank=0, parent_id="t"), node("b", rank=1, parent_id="a")),
  "prompt not by a prompter": tree("t", node("a", rank=0)) | {"prompt": node("t", replies=[node("a", rank=0)])},
  "reply not by an assistant": tree("t", node("a", rank=0, role="prompter")),
}


@pytest.mark.parametrize("reason", TREE_REASONS)
def test_every_tree_left_out_has_its_reason(tmp_path: pathlib.Path, reason: str) -> None:
  trees, counts = oasst.read_trees(write(tmp_path, ranked("first"), TREE_REASONS[reason], ranked("good")))
  assert [one.id for one in trees] == ["first", "good"]
  assert {key: number for key, number in counts.items() if key.startswith("trees")} == {
    "trees": 3,
    "trees/kept": 2,
    f"trees/{reason}": 1,
  }
  check_sums(counts)


def test_absent_state_and_language_are_left_out(tmp_path: pathlib.Path) -> None:
  lines = ranked("a", state=None), ranked("b", lang=None), ranked("c", lang=None)
  with pytest.raises(ValueError, match=r"none of its 3 trees can be used: lang \(2\), tree_state \(1\)\. Needed"):
    oasst.read_trees(write(tmp_path, *lines))
  _, counts = oasst.read_trees(write(tmp_path, *lines, ranked("d")))
  assert (counts["trees/tree_state"], counts["trees/lang"]) == (1, 2)


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
  "cut": (json.dumps(ranked("t"))[:-9], "not JSON: "),
  "rank is no number": (tree("t", node("a", rank="best")), "prompt.replies.0.rank"),
  "key twice": ('{"prompt": {}, "prompt": {}}', "the key 'prompt' is there twice"),
  "not an object": ("[1]", "the line"),
  "no tree id": (without(ranked("t"), "message_tree_id"), "message_tree_id"),
  "no prompt": (without(ranked("t"), "prompt"), "prompt"),
  "no message id": (tree("t", without(node("a"), "message_id")), "prompt.replies.0.message_id"),
  "no text": (tree("t", node("a"), without(node("b"), "text")), "prompt.replies.1.text"),
  "null text": (tree("t", text=None), "prompt.text"),
  "no role": (tree("t", without(node("a"), "role")), "prompt.replies.0.role"),
  "tree twice": (ranked("first"), "tree first was already on line 1"),
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
  with pytest.raises(ValueError, match=r"latin.jsonl, line 1, byte \d+: 0xe9 is no UTF-8"):
    oasst.read_trees(latin)


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
  parts = oasst_split.split(trees, overlap=True)
  check_sums(parts.counts)
  assert 94 <= len(parts.ift) <= 99
  assert not {one.prompt_id for one in parts.ranked_train} & {one.prompt_id for one in parts.ranked_heldout}
  assert len(parts.ranked_train) + len(parts.ranked_heldout) == parts.counts["eft/train"] + parts.counts["eft/held-out"]
  raw = {line["message_tree_id"]: line["prompt"] for line in map(json.loads, sample.read_text().splitlines())}
  for example in parts.ift:
    best = [reply["text"] for reply in raw[example.id]["replies"] if reply.get("rank") == 0]
    assert (example.prompt, [example.response]) == (raw[example.id]["text"], best)
