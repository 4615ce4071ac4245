"""Artifacts: what is written whole, what is refused, and what is not done twice."""

from collections.abc import Sequence
import dataclasses
import json
import shutil

from etils import epath
import pytest
import tiny_model

from srlm_jax import artifacts, records
from srlm_jax.records import Prompt

MESH = tiny_model.one_device()
PROMPTS = [Prompt(id=f"p{number}", text=f"Say {number}.", source="world") for number in range(7)]


@pytest.fixture
def root(tmp_path: epath.Path) -> epath.Path:
  return epath.Path(tmp_path)


def make(folder: epath.Path, config: dict | None = None, **inputs: artifacts.Artifact) -> artifacts.Artifact:
  return artifacts.Artifact(folder, {"judge.votes": 3, "seed": 0} if config is None else config, inputs)


def committed(folder: epath.Path, text: str = "x", **inputs: artifacts.Artifact) -> artifacts.Artifact:
  out = make(folder, **inputs)
  out.begin()
  out.write("x.txt", text)
  out.commit({"what": "a test"})
  return out


def flip(path: epath.Path) -> None:
  """Changes one bit in the middle of a file."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def test_what_is_written_is_read_again(root: epath.Path) -> None:
  out = make(root / "a")
  out.begin()
  assert not out.has("prompts.jsonl")
  out.write_records("prompts.jsonl", PROMPTS)
  out.write("note.txt", "naïve\n")
  assert out.has("prompts.jsonl")
  assert out.read("prompts.jsonl", Prompt) == PROMPTS
  assert out.read_text("note.txt") == "naïve\n"
  done = json.loads((root / "a" / "prompts.jsonl.done").read_text())
  assert (done["records"], done["bytes"]) == (7, len(records.dumps(PROMPTS)))


def test_half_a_file_is_none(root: epath.Path) -> None:
  out = make(root / "a")
  out.begin()
  out.write_records("prompts.jsonl", PROMPTS)
  path = root / "a" / "prompts.jsonl"
  path.write_text(path.read_text()[:-9])
  assert not out.has("prompts.jsonl")
  path.unlink()
  assert not out.has("prompts.jsonl")
  out.write("other.txt", "whole")
  (root / "a" / "other.txt.done").unlink()  # The write was interrupted between the two.
  assert not out.has("other.txt")
  with pytest.raises(ValueError, match="other.txt is missing or was never finished: run its stage again"):
    out.read_text("other.txt")


def test_a_flipped_bit_is_found(root: epath.Path) -> None:
  out = committed(root / "a", "abcdefgh")
  out.write_records("prompts.jsonl", PROMPTS)
  flip(root / "a" / "x.txt")
  flip(root / "a" / "prompts.jsonl")
  for name in ("x.txt", "prompts.jsonl"):
    with pytest.raises(ValueError, match=rf"{name} is damaged .*SHA-256.* delete .* run its stage again"):
      out.read(name, Prompt)


def test_shards_are_read_in_their_order(root: epath.Path) -> None:
  out = make(root / "a")
  out.begin()
  artifacts.map_shards(out, "prompts", PROMPTS, 3, MESH, lambda: None, lambda _, part: part)
  out.write_records("others-00000-of-00001.jsonl", PROMPTS[:1])
  assert [path.name for path in sorted((root / "a").glob("prompts-*.jsonl"))] == [
    f"prompts-0000{number}-of-00003.jsonl" for number in range(3)
  ]
  assert list(out.read_shards("prompts", Prompt)) == PROMPTS


def test_an_interrupted_run_does_each_shard_once(root: epath.Path) -> None:
  out, done = make(root / "a"), []

  def work(tool: str, part: Sequence[Prompt]) -> Sequence[Prompt]:
    assert tool == "tool"
    if len(done) == 2:
      raise KeyboardInterrupt
    done.append([one.id for one in part])
    return part

  out.begin()
  with pytest.raises(KeyboardInterrupt):
    artifacts.map_shards(out, "prompts", PROMPTS, 2, MESH, lambda: "tool", work)
  assert done == [["p0", "p1"], ["p2", "p3"]] and not out.done
  again = make(root / "a")
  again.begin()

  def rest(_: None, part: Sequence[Prompt]) -> Sequence[Prompt]:
    done.append([one.id for one in part])
    return part

  artifacts.map_shards(again, "prompts", PROMPTS, 2, MESH, lambda: None, rest)
  assert done == [["p0", "p1"], ["p2", "p3"], ["p4", "p5"], ["p6"]]
  assert list(again.read_shards("prompts", Prompt)) == PROMPTS


def test_the_manifest_comes_last_and_its_presence_is_the_commit(
  root: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  written, write = [], artifacts.write_whole
  monkeypatch.setattr(artifacts, "write_whole", lambda path, text: (write(path, text), written.append(path.name)))
  out = make(root / "a")
  out.begin()
  assert json.loads((root / "a" / "stage.json").read_text())["config"] == {"judge.votes": 3, "seed": 0}
  out.write("x.txt", "x")
  assert not out.done
  with pytest.raises(ValueError, match=r"is not finished \(it has no manifest.json\): run its stage first"):
    make(root / "a").digest()
  (root / "a" / "more").mkdir()
  (root / "a" / "more" / "weights").write_bytes(b"abc")
  out.commit({"count": 1}, folders=("more",))
  assert out.done
  manifest = make(root / "a").manifest()
  assert manifest["facts"] == {"count": 1}
  assert manifest["files"]["x.txt"]["sha256"] == artifacts.sha256(b"x")
  assert manifest["files"]["more/weights"] == {"bytes": 3, "sha256": artifacts.sha256(b"abc")}
  assert written == ["stage.json", "x.txt", "x.txt.done", "manifest.json"]
  assert not list((root / "a").glob(".*.part"))


def test_the_digest_is_of_the_content_and_not_of_the_time(root: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  first = committed(root / "a").digest()
  monkeypatch.setattr(artifacts.time, "strftime", lambda *_: "another day")
  assert committed(root / "b").digest() == first
  assert committed(root / "c", "y").digest() != first
  other = make(root / "d", {"judge.votes": 3, "seed": 1})
  other.begin()
  other.write("x.txt", "x")
  other.commit({"what": "a test"})
  assert other.digest() != first


def test_another_configuration_is_refused_with_the_keys_that_differ(root: epath.Path) -> None:
  committed(root / "a")
  other = make(root / "a", {"judge.votes": 5, "seed": 0, "judge.min_votes": 2})
  for check in (other.check_config, other.begin):
    with pytest.raises(ValueError, match="another configuration") as error:
      check()
    assert "judge.votes: 3 there, 5 here" in str(error.value)
    assert "judge.min_votes: None there, 2 here" in str(error.value)
    assert "seed" not in str(error.value) and "--workdir" in str(error.value)
  make(root / "a").begin()  # The same one goes on.
  make(root / "nothing", {"judge.votes": 5}).check_config()


def test_a_changed_input_is_refused_by_name(root: epath.Path) -> None:
  committed(root / "b", model=committed(root / "a"), other=committed(root / "c"))
  make(root / "b", model=make(root / "a"), other=make(root / "c")).begin()
  shutil.rmtree(root / "a")
  changed = committed(root / "a", "something else")
  with pytest.raises(ValueError, match=r"other inputs: model \(.*/a\) changed since. Delete .*/b"):
    make(root / "b", model=changed, other=make(root / "c")).begin()
  with pytest.raises(ValueError, match=r"other inputs: model \(.*\), other changed"):
    make(root / "b", model=changed).begin()


def test_an_unfinished_input_is_refused(root: epath.Path) -> None:
  half = make(root / "a")
  half.begin()
  with pytest.raises(ValueError, match=r"/a is not finished"):
    make(root / "b", model=half).begin()
  assert not (root / "b").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"config": {"seed"', b'{"config": "\xff\xfe"}'])
def test_damaged_papers_are_named(root: epath.Path, damage: bytes) -> None:
  committed(root / "a")
  for name in ("manifest.json", "stage.json"):
    kept = (root / "a" / name).read_bytes()
    (root / "a" / name).write_bytes(damage)
    one = make(root / "a")
    with pytest.raises(ValueError, match=rf"{name} is damaged .*delete .*/a and run its stage again"):
      one.manifest() if name == "manifest.json" else one.begin()
    (root / "a" / name).write_bytes(kept)
  make(root / "a").begin()


def test_another_format_is_refused(root: epath.Path) -> None:
  committed(root / "a")
  path = root / "a" / "stage.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
  with pytest.raises(ValueError, match="artifact format 0, this version writes 3: use a new --workdir"):
    make(root / "a").begin()


def test_flatten_makes_what_json_gives_back() -> None:
  assert artifacts.flatten({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": "f"}) == {"a.b": 1, "a.c.d": [1, 2], "e": "f"}


def test_the_nearest_name_is_suggested() -> None:
  assert "Did you mean 'judge'?" in str(artifacts.unknown("jugde", ["judge", "pairs"], "stage"))
  assert str(artifacts.unknown("xyz", ["judge", "pairs"], "stage")) == "'xyz' is not a stage. Valid: judge, pairs."


def test_an_artifact_is_frozen(root: epath.Path) -> None:
  with pytest.raises(dataclasses.FrozenInstanceError):
    make(root / "a").folder = root
