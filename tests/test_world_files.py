"""The tiny world's files: same bytes from the same seed, whole words as pieces, ranks by the truth, nothing leaks."""

import collections
import json
import pathlib
import re

import numpy as np
import pytest
import sentencepiece

from srlm_jax import records, templates, world, world_files

SMALL = world_files.Sizes(
  member_lists=100,
  task_lists=100,
  exchanges=400,
  forum_judgements=200,
  ift_trees=300,
  eft_trees=120,
  heldout_trees=60,
  judgements=300,
  judged_instructions=200,
  heldout_prompts=64,
)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("world")
  facts = world_files.write_world(folder, 3, SMALL)
  assert facts["lines"] == {
    "pretrain.jsonl": 800,
    "trees.jsonl": 420,
    "heldout_trees.jsonl": 60,
    "judgements.jsonl": 300,
    "heldout_prompts.jsonl": 64,
  }
  assert 2.2 < facts["ift_mean"] < 3.1 and 0.08 < facts["ift_perfect"] < 0.25
  return folder


def _lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _texts(folder: pathlib.Path) -> list[str]:
  """All text that anything is trained on."""
  texts = [value for line in _lines(folder / "pretrain.jsonl") for value in line.values()]
  for tree in _lines(folder / "trees.jsonl"):
    texts += [tree["prompt"]["text"]] + [reply["text"] for reply in tree["prompt"]["replies"]]
  for line in _lines(folder / "judgements.jsonl"):
    texts += [line["prompt"], line["response"]]
  return texts


def test_files_are_reproducible(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  def contents(place: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}

  world_files.write_world(tmp_path / "again", 3, SMALL)
  world_files.write_world(tmp_path / "other", 4, SMALL)
  first, again, other = contents(folder), contents(tmp_path / "again"), contents(tmp_path / "other")
  assert sorted(first) == [
    "heldout_prompts.jsonl",
    "heldout_trees.jsonl",
    "judgements.jsonl",
    "pretrain.jsonl",
    "tokenizer.model",
    "trees.jsonl",
  ]
  assert first == again
  assert all(first[name] != other[name] for name in first if name.endswith(".jsonl"))


def test_tokenizer(folder: pathlib.Path) -> None:
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
  assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)
  assert 150 < pieces.vocab_size() < 350
  words = set(world.THINGS) | set(world.KINDS) | set(world.AMOUNTS) | {str(number) for number in range(16)}
  words |= set(
    "Sure Give Name List Count Say numbers words asked got done full half little none label opening extra "
    "points yes no again wrong skip then down from to times different me for".split()
  )
  assert [word for word in sorted(words) if len(pieces.encode(f"owl {word}")) != 2] == []
  for symbol in world_files.SYMBOLS:
    assert pieces.encode(f"owl{symbol}owl", out_type=str)[1] == symbol
  assert pieces.encode("a.\nScore: 5", out_type=str)[-4:] == ["\n", "Score", ":", "▁5"]
  for text in _texts(folder) + ["two  spaces", " a space before", "Ein Satz: ~{a|b}!\n\n"]:
    ids = pieces.encode(text)
    assert 0 not in ids and pieces.decode(ids) == text


def test_trees(folder: pathlib.Path) -> None:
  trees = _lines(folder / "trees.jsonl")
  assert len({tree["prompt"]["text"] for tree in trees}) == len(trees)
  kinds = collections.Counter()
  scores: dict[str, list[int]] = collections.defaultdict(list)
  for tree in trees:
    root = tree["prompt"]
    assert tree["tree_state"] == "ready_for_export" and tree["message_tree_id"] == root["message_id"]
    assert (root["role"], root["lang"], root["parent_id"], root["rank"]) == ("prompter", "en", None, None)
    replies = root["replies"]
    kinds[len(replies)] += 1
    assert [reply["rank"] for reply in replies] == list(range(len(replies)))
    assert len({reply["text"] for reply in replies}) == len(replies)
    for reply in replies:
      assert (reply["role"], reply["lang"], reply["parent_id"]) == ("assistant", "en", root["message_id"])
      assert reply["review_result"] and not reply["deleted"] and not reply["synthetic"] and reply["replies"] == []
    found = [world.oracle(root["text"], reply["text"]) for reply in replies]
    assert found == sorted(found, reverse=True)
    scores["ift" if len(replies) == 1 else "eft"] += found[:1]
    assert world.bucket(root["text"]) in (world_files.IFT if len(replies) == 1 else world_files.EFT)
  assert kinds[1] == 300 and kinds[3] + kinds[4] == 120 and min(kinds[3], kinds[4]) > 30
  assert len({tree["message_tree_id"] for tree in trees}) == 420
  assert 2.3 < np.mean(scores["ift"]) < 3.1  # Mixed human work, where the best of several would be better.
  assert np.mean(scores["eft"]) > np.mean(scores["ift"]) + 0.5


def test_heldout_trees_have_clear_ranks(folder: pathlib.Path) -> None:
  different = []
  for tree in _lines(folder / "heldout_trees.jsonl"):
    text, replies = tree["prompt"]["text"], tree["prompt"]["replies"]
    assert world.is_heldout(text) and len(replies) == 4
    different.append(len({world.oracle(text, reply["text"]) for reply in replies}))
  assert len(different) == 60 and np.mean(different) > 3.8


def test_nothing_held_out_is_trained_on(folder: pathlib.Path) -> None:
  pattern = re.compile(r"(?:Give|Tell|Name|List|Count|Say|Repeat|Please|Now) [a-z0-9 ]+\.")
  asked = {match for text in _texts(folder) for match in pattern.findall(text)}
  shown = {text for text in asked if world.parse(text)}
  assert len(shown) > 1000
  assert not any(world.is_heldout(text) for text in shown)
  prompts = [prompt.text for prompt in records.read(folder / "heldout_prompts.jsonl", records.Prompt)]
  assert len(set(prompts)) == 64 and all(world.is_heldout(text) for text in prompts)


def test_judgement_file(folder: pathlib.Path) -> None:
  examples = list(records.read(folder / "judgements.jsonl", records.SFTExample))
  assert {example.kind for example in examples} == {"eft"}
  assert len({example.id for example in examples}) == 300
  assert collections.Counter(example.response[-1] for example in examples) == {str(score): 50 for score in range(6)}


def test_the_worlds_people_judge_by_the_configured_rubric(tmp_path: pathlib.Path) -> None:
  world_files.write_world(tmp_path, 3, SMALL, "judge_tiny_five_bucket")
  examples = list(records.read(tmp_path / "judgements.jsonl", records.SFTExample))
  first = templates.load_rubric("judge_tiny_five_bucket").text.split("\n")[0]
  assert all(example.prompt.startswith(first) for example in examples)
  assert collections.Counter(example.response[-1] for example in examples) == {str(score): 60 for score in range(1, 6)}
  scores = [templates.parse_score(example.response, 1, 5) for example in examples]
  assert all(reason == "" for _, reason in scores)
  forum = [line for line in _lines(tmp_path / "pretrain.jsonl") if line.get("prompt", "").startswith(first)]
  assert len(forum) == 200 and {line["response"][-1] for line in forum} == set("12345")
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
  prompts = [len(pieces.encode(example.prompt)) for example in examples]
  assert max(prompts) < 128 - 8  # What max_length less max_new of configs/tiny.py leaves, less the chat template.
  for text in _texts(tmp_path):
    ids = pieces.encode(text)
    assert 0 not in ids and pieces.decode(ids) == text


def test_a_rubric_of_another_range_is_refused(tmp_path: pathlib.Path) -> None:
  rubric = tmp_path / "ten.txt"
  rubric.write_text("# range: 1 10\n{instruction} {response}")
  with pytest.raises(ValueError, match="ten.txt has scores 1 to 10, .* 0 to 5 or 1 to 5"):
    world_files.write_world(tmp_path / "world", 3, SMALL, str(rubric))


def test_task_lists_look_like_the_prompt_for_new_tasks(folder: pathlib.Path) -> None:
  lists = [line["text"] for line in _lines(folder / "pretrain.jsonl") if "\n9. " in line.get("text", "")]
  assert len(lists) == 100
  tasks = re.findall(r"^[1-9]\. (.*)$", lists[0], re.MULTILINE)
  assert len(tasks) == 9 and all(world.parse(task) for task in tasks)
  assert lists[0] == templates.few_shot(tasks[:8]).rstrip() + " " + tasks[8]


def test_too_many_different_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(world_files, "_draw", lambda rng, share: "Say owl three times.")
  with pytest.raises(ValueError, match="want fewer"):
    world_files._distinct(np.random.default_rng(0), world_files.HELDOUT, 2)


def test_more_instructions_than_a_share_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(world_files, "_draw", lambda rng, share: "the same")
  with pytest.raises(
    ValueError, match="3 different instructions wanted, but 20 times as many draws gave 1: want fewer"
  ):
    world_files._distinct(np.random.default_rng(0), world_files.IFT, 3)
