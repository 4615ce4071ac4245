"""Artifacts: what is written whole, what is refused, and what is not done twice."""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import shutil

from etils import epath
import pytest
import tiny_model

from srlm_jax import artifacts, digests, records, storage, version
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


def test_records_are_of_the_bytes_whose_digest_was_compared(root: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  out = make(root / "a")
  out.begin()
  out.write_records("prompts.jsonl", PROMPTS)
  read = artifacts.Artifact._read_bytes

  def once(self: artifacts.Artifact, name: str) -> bytes:
    found = read(self, name)
    (self.folder / name).unlink()
    return found

  monkeypatch.setattr(artifacts.Artifact, "_read_bytes", once)
  assert out.read("prompts.jsonl", Prompt) == PROMPTS


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
  with pytest.raises(ValueError, match="other.txt is missing or was never finished: delete .*/a and run"):
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
  written, write = [], storage.write
  monkeypatch.setattr(storage, "write", lambda path, text: (write(path, text), written.append(path.name)))
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
  assert manifest["files"]["x.txt"]["sha256"] == digests.sha256(b"x")
  assert manifest["files"]["more/weights"] == {"bytes": 3, "sha256": digests.sha256(b"abc")}
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
  path.write_text(json.dumps({"format": 3, "config": {}, "inputs": {}}))  # As it was before there were seals.
  with pytest.raises(ValueError, match="artifact format 3, this version writes 4: use a new --workdir"):
    make(root / "a").begin()


def test_another_version_of_the_code_is_refused(root: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  digest = committed(root / "a").digest()
  monkeypatch.setattr(version, "VERSION", "0.9.0")
  for check in (make(root / "a").check_config, make(root / "a").begin):
    with pytest.raises(
      ValueError, match=r"/a was made by srlm_jax 0\.1\.0, this is 0\.9\.0: use that version, or a new"
    ):
      check()
  assert committed(root / "b").digest() != digest


def flips(path: epath.Path, every: int) -> Iterator[int]:
  """Flips bits of a file, one at a time; the file is whole again afterwards."""
  data = path.read_bytes()
  for bit in range(0, 8 * len(data), every):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(damaged))
    yield bit
  path.write_bytes(data)


def harmless(path: epath.Path, data: bytes) -> bool:
  """Whether a damaged paper still says the same: 1e-05 and 1E-05 do."""
  try:
    return json.loads(path.read_bytes()) == json.loads(data)
  except ValueError:
    return False


@pytest.mark.parametrize(
  ("name", "every"),  # No multiple of 8: each place of a byte is met.
  [("stage.json", 29), ("manifest.json", 101), ("x.txt", 3), ("x.txt.done", 29), ("more/weights", 1)],
)
def test_a_flipped_bit_of_a_finished_artifact_is_found(root: epath.Path, name: str, every: int) -> None:
  out = make(root / "a", {"seed": 0, "lr": 1e-5})
  out.begin()
  out.write("x.txt", "some text")
  (root / "a" / "more").mkdir()
  (root / "a" / "more" / "weights").write_bytes(b"abc")
  out.commit({"loss": 1e-7, 3: (1, 2)}, folders=("more",))
  path, silent = root / "a" / name, 0
  data = path.read_bytes()
  for bit in flips(path, every):
    reader = make(root / "b", {}, model=make(root / "a", {"seed": 0, "lr": 1e-5}))
    if harmless(path, data):
      silent += 1
      reader.begin()
      continue
    one = make(root / "a", {"seed": 0, "lr": 1e-5})
    with pytest.raises(ValueError, match=rf"{name} is damaged .*: delete .*/a and run its stage again"):
      one.begin()
      pytest.fail(f"bit {bit} of {name}")
    if name != "stage.json":
      with pytest.raises(ValueError, match=rf"{name} is damaged"):
        reader.begin()
  assert silent <= 4  # Of the e in a number.
  make(root / "a", {"seed": 0, "lr": 1e-5}).begin()


@pytest.mark.parametrize("name", ["shard-00001-of-00003.jsonl", "shard-00001-of-00003.jsonl.done"])
def test_a_damaged_shard_of_an_unfinished_stage_is_made_again(
  root: epath.Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
  def work(done: list[str], part: Sequence[Prompt]) -> Sequence[Prompt]:
    done.append(part[0].id)
    return part

  def run(folder: epath.Path) -> tuple[artifacts.Artifact, list[str]]:
    out, done = make(folder), []
    out.begin()
    artifacts.map_shards(out, "shard", PROMPTS, 3, MESH, lambda: done, work)
    return out, done

  whole, _ = run(root / "whole")
  whole.commit({})
  run(root / "a")
  for _ in flips(root / "a" / name, every=211):
    caplog.clear()
    out, done = run(root / "a")
    assert done == ["p3"], "it alone is made again"
    assert f"{name} is damaged" in caplog.text and "it counts as missing" in caplog.text
  out, done = run(root / "a")
  assert not done
  out.commit({})
  assert out.digest() == whole.digest()
  assert (root / "a" / name).read_bytes() == (root / "whole" / name).read_bytes()


def test_what_is_damaged_in_an_unfinished_stage_and_not_made_again_is_not_committed(root: epath.Path) -> None:
  out = make(root / "a")
  out.begin()
  out.write("x.txt", "some text")
  out.write("y.txt", "other text")
  flip(root / "a" / "x.txt")
  with pytest.raises(ValueError, match=r"x.txt is damaged .*: delete .*/a and run its stage again"):
    out.commit({})
  assert not out.done
  again = make(root / "a")
  again.begin()
  again.commit({})
  assert list(again.manifest()["files"]) == ["y.txt"]
  assert not (root / "a" / "x.txt").exists()


@pytest.mark.parametrize("name", ["x.txt", "x.txt.done"])
def test_a_file_that_is_gone_is_missed(root: epath.Path, name: str) -> None:
  committed(root / "a")
  (root / "a" / name).unlink()
  for one in (make(root / "a"), make(root / "b", model=make(root / "a"))):
    with pytest.raises(ValueError, match=rf"/a/{name} is missing: delete .*/a and run its stage again"):
      one.begin()


def test_a_shard_that_a_store_lost_is_missed_at_once(root: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  write = storage.write
  monkeypatch.setattr(storage, "write", lambda path, data: None if "00001-of" in path.name else write(path, data))
  out = make(root / "a")
  out.begin()
  with pytest.raises(OSError, match="/a/prompts-00001-of-00003.jsonl was written, and is not there"):
    artifacts.map_shards(out, "prompts", PROMPTS, 3, MESH, lambda: None, lambda _, part: part)


def with_weights(folder: epath.Path, **files: str) -> artifacts.Artifact:
  """What looks like a model, with these files in a folder of its weights."""
  out = make(folder)
  out.begin()
  out.write("fingerprints.json", "{}")
  (out.folder / "weights" / "d").mkdir(parents=True)
  for name, text in files.items():
    (out.folder / "weights" / "d" / name).write_text(text)
  out.commit({})
  return out


def test_weights_that_are_gone_are_missed(root: epath.Path) -> None:
  out = with_weights(root / "m1")
  make(root / "m1").verify()
  (out.folder / "weights").rmtree()
  with pytest.raises(ValueError, match=r"m1/weights is missing: delete \S+m1 and run its stage again"):
    make(root / "m1").verify()


@pytest.mark.parametrize(
  ("name", "text", "wrong"),
  [
    ("one", None, "d/one is missing"),
    ("one", "12", r"d/one is damaged \(it has 2 bytes, not the recorded 3\)"),
    ("one", "", r"d/one is damaged \(it has 0 bytes, not the recorded 3\)"),
    ("three", "x", r"d/three was not written with these weights \(if it is yours, moving it away is enough\)"),
  ],
)
def test_names_and_sizes_of_weights_are_compared(root: epath.Path, name: str, text: str | None, wrong: str) -> None:
  out = with_weights(root / "m1", one="123", two="")
  assert out.manifest()["weights"] == {"d/one": 3, "d/two": 0}
  make(root / "m1").verify()
  path = out.folder / "weights" / "d" / name
  path.unlink() if text is None else path.write_text(text)
  for one in (make(root / "m1"), make(root / "b", model=make(root / "m1"))):
    with pytest.raises(ValueError, match=rf"m1/weights/{wrong}: delete \S+m1 and run its stage again"):
      one.begin()


def test_no_digest_depends_on_the_files_of_weights(root: epath.Path) -> None:
  digest = with_weights(root / "a" / "m1", one="123").digest()
  assert with_weights(root / "b" / "m1", other="12345", more="").digest() == digest


def test_weights_whose_sizes_were_not_recorded_are_verified_by_their_folder(root: epath.Path) -> None:
  path = with_weights(root / "m1", one="123").folder / "manifest.json"
  content = digests.unseal(path.read_bytes())
  del content["weights"]
  path.write_text(digests.sealed(content))  # As it was before there were sizes.
  (root / "m1" / "weights" / "d" / "one").write_text("12")
  make(root / "m1").verify()
  (root / "m1" / "weights").rmtree()
  with pytest.raises(ValueError, match="m1/weights is missing"):
    make(root / "m1").verify()


def test_a_shard_whose_paper_is_gone_is_missed(root: epath.Path) -> None:
  out = make(root / "a")
  out.begin()
  artifacts.map_shards(out, "prompts", PROMPTS, 3, MESH, lambda: None, lambda _, part: part)
  assert out.complete("prompts") and not out.complete("others")
  (root / "a" / "prompts-00001-of-00003.jsonl.done").rename(root / "done")
  assert not out.complete("prompts")
  (root / "done").rename(root / "a" / "prompts-00001-of-00003.jsonl.done")
  out.commit({})
  (root / "a" / "prompts-00001-of-00003.jsonl.done").unlink()
  with pytest.raises(ValueError, match="prompts-00001-of-00003.jsonl is missing"):
    list(make(root / "a").read_shards("prompts", Prompt))


def test_a_manifest_without_its_stage_json_still_says_what_it_is_made_from(root: epath.Path) -> None:
  committed(root / "b", model=committed(root / "a"))
  (root / "b" / "stage.json").unlink()
  with pytest.raises(ValueError, match="another configuration"):
    make(root / "b", {"seed": 1}, model=make(root / "a")).begin()
  with pytest.raises(ValueError, match="made from other inputs: model"):
    make(root / "b", model=committed(root / "c", "y")).begin()


def test_what_killed_writes_left_is_removed(root: epath.Path) -> None:
  (root / "a" / "files").mkdir(parents=True)
  for name in (".x.txt.part", "files/.y.part"):
    (root / "a" / name).write_text("half")
  (root / "a" / "files" / "whole.part").write_text("not ours")
  out = make(root / "a")
  out.begin()
  out.commit({}, folders=("files",))
  assert list(out.manifest()["files"]) == ["files/whole.part"]
  assert not (root / "a" / ".x.txt.part").exists()


def test_flatten_makes_what_json_gives_back() -> None:
  assert artifacts.flatten({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": "f"}) == {"a.b": 1, "a.c.d": [1, 2], "e": "f"}


def test_the_nearest_name_is_suggested() -> None:
  assert "Did you mean 'judge'?" in str(artifacts.unknown("jugde", ["judge", "pairs"], "stage"))
  assert str(artifacts.unknown("xyz", ["judge", "pairs"], "stage")) == "'xyz' is not a stage. Valid: judge, pairs."


def test_an_artifact_is_frozen(root: epath.Path) -> None:
  with pytest.raises(dataclasses.FrozenInstanceError):
    make(root / "a").folder = root
