"""What a run keeps, in an object store: artifacts, training sets and train states, with faults of every kind."""

from collections.abc import Callable, Sequence
import gc
import os
import socket
import tempfile

from etils import epath
import fake_gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_dataset
import tiny_model

from srlm_jax import artifacts, checkpoint, dataset, lines
from srlm_jax.records import Prompt

RUN = epath.Path("gs://bucket/run")
MESH = tiny_model.one_device()
PROMPTS = [Prompt(id=f"p{number}", text=f"Say {number}.", source="world") for number in range(7)]
FAULTS: tuple[Callable[[], fake_gcs.Fault], ...] = (
  lambda: fake_gcs.Fault("insert", r"jsonl$", times=2, status=503),
  lambda: fake_gcs.Fault("insert", r"\.done$", times=1, torn=True),
  lambda: fake_gcs.Fault("insert", r"manifest\.json$", times=3, status=500),
  lambda: fake_gcs.Fault("insert", r"", times=2, seconds=0.2),
  lambda: fake_gcs.Fault("get", r"", times=2, torn=True),
  lambda: fake_gcs.Fault("get", r"", times=3, status=503),
  lambda: fake_gcs.Fault("stat", r"", times=3, status=429),
  lambda: fake_gcs.Fault("list", r"", times=2, status=503),
)


def make(folder: epath.Path, **inputs: artifacts.Artifact) -> artifacts.Artifact:
  return artifacts.Artifact(folder, {"seed": 0}, inputs)


def stage(folder: epath.Path, done: list[str], **inputs: artifacts.Artifact) -> artifacts.Artifact:
  """Three shards; `done` gets those that were made."""

  def work(_: None, part: Sequence[Prompt]) -> Sequence[Prompt]:
    done.append(part[0].id)
    return part

  out = make(folder, **inputs)
  out.begin()
  artifacts.map_shards(out, "prompts", PROMPTS, 3, MESH, lambda: None, work)
  out.write("facts.json", "{}")
  (folder / "files").mkdir(parents=True, exist_ok=True)
  artifacts.storage.write(folder / "files" / "words.txt", "words")
  out.commit({"count": 7}, folders=("files",))
  return out


def test_an_artifact_is_the_same_as_on_a_disk(store: fake_gcs.Store, tmp_path: epath.Path) -> None:
  there, here = stage(RUN / "a", []), stage(epath.Path(tmp_path) / "a", [])
  assert there.digest() == here.digest()
  assert list(make(RUN / "a").read_shards("prompts", Prompt)) == PROMPTS
  stage(RUN / "b", [], model=make(RUN / "a"))
  assert store.names("bucket", "run/a") == sorted(
    f"run/a/{path.relative_to(here.folder)}"
    for folder in (here.folder, here.folder / "files")
    for path in folder.iterdir()
    if not path.is_dir()
  )
  assert not store.counts["copy"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_survived(store: fake_gcs.Store, fault: Callable[[], fake_gcs.Fault]) -> None:
  whole = stage(RUN / "whole", []).digest()
  trouble, done = fault(), []
  store.faults.append(trouble)
  out = stage(RUN / "a", done)
  assert list(out.read_shards("prompts", Prompt)) == PROMPTS
  assert out.digest() == whole and done == ["p0", "p3", "p6"] and trouble.times == 0


def test_a_store_that_fails_now_and_then_is_good_enough(store: fake_gcs.Store) -> None:
  whole = stage(RUN / "whole", []).digest()
  for weather in (5, 6, 7):
    store.weather = weather
    out = stage(RUN / f"a{weather}", [])
    assert out.digest() == whole and list(out.read_shards("prompts", Prompt)) == PROMPTS


@pytest.mark.parametrize("name", [r"00001-of-00003\.jsonl$", r"00001-of-00003\.jsonl\.done$", "manifest", "stage"])
@pytest.mark.parametrize("how", [{"status": 503}, {"torn": True}])
def test_a_store_that_fails_for_good_costs_a_shard(store: fake_gcs.Store, name: str, how: dict[str, object]) -> None:
  whole, done = stage(RUN / "whole", []).digest(), []
  store.faults.append(fake_gcs.Fault("insert", f"run/a/.*{name}", times=float("inf"), **how))
  with pytest.raises(Exception) as error:  # The client's own.
    stage(RUN / "a", done)
  assert isinstance(error.value, OSError) or type(error.value).__module__.split(".")[0] in ("gcsfs", "aiohttp")
  assert not make(RUN / "a").done
  store.faults.clear()
  before = list(done)
  assert stage(RUN / "a", done).digest() == whole
  assert len(done) - len(set(done)) <= 1 and set(done) == {"p0", "p3", "p6"}, (before, done)


def test_a_flipped_bit_is_found_there(store: fake_gcs.Store) -> None:
  stage(RUN / "a", [])
  for name in store.names("bucket", "run/a/"):
    blob = store.blobs["bucket", name]
    store.put("bucket", name, blob.data[:-2] + bytes([blob.data[-2] ^ 1]) + blob.data[-1:])
    with pytest.raises(ValueError, match=rf"gs://bucket/{name} is damaged"):
      make(RUN / "a").begin()
    store.put("bucket", name, blob.data)
  make(RUN / "a").begin()


def test_names_and_sizes_of_weights_are_compared_there_by_one_listing(store: fake_gcs.Store) -> None:
  names = ("manifest", "d/one", "d/two")
  out = make(RUN / "m1")
  out.begin()
  out.write("fingerprints.json", "{}")
  for name in names:
    store.put("bucket", f"run/m1/weights/{name}", b"123")
  store.put("bucket", "run/m1/weights/d/", b"")  # What some programs make of a folder.
  store.put("bucket", "run/m1/weights.old/d/one", b"1")
  out.commit({})
  assert make(RUN / "m1").manifest()["weights"] == dict.fromkeys(names, 3)
  make(RUN / "m1").verify()
  store.counts.clear()
  assert artifacts.storage.sizes(RUN / "m1" / "weights") == dict.fromkeys(names, 3)
  assert store.counts == {"list": 1}
  store.put("bucket", "run/m1/weights/d/two", b"12")
  with pytest.raises(ValueError, match=r"m1/weights/d/two is damaged \(it has 2 bytes, not the recorded 3\): delete"):
    make(RUN / "m1").verify()
  (RUN / "m1" / "weights" / "d" / "one").unlink()
  with pytest.raises(ValueError, match=r"m1/weights/d/one is missing: delete"):
    make(RUN / "m1").verify()


def test_a_training_set_is_read_from_a_store(store: fake_gcs.Store, tmp_path: epath.Path) -> None:
  store.faults += [fake_gcs.Fault("insert", "array_record", times=2, torn=True), fake_gcs.Fault("get", "", torn=True)]
  local = epath.Path(tmp_path) / "dataset"
  for folder in (RUN / "m1" / "dataset", local):
    dataset.write(folder, test_dataset.ROWS[:3])
    dataset.write(folder, test_dataset.ROWS)
  assert test_dataset.order(RUN / "m1" / "dataset", 7) == test_dataset.order(local, 7)
  assert not any(fault.times for fault in store.faults)
  assert dataset.count(RUN / "m1" / "dataset") == 7
  name = next(name for name in store.names("bucket") if "array_record" in name)
  data = store.blobs["bucket", name].data
  store.put("bucket", name, data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
  with pytest.raises(ValueError, match=rf"gs://bucket/{name} is damaged .*: delete gs://bucket/run/m1 and run"):
    dataset.batches(RUN / "m1" / "dataset", 3, seed=0)
  del store.blobs["bucket", name]
  with pytest.raises(ValueError, match=rf"gs://bucket/{name} is missing"):
    dataset.batches(RUN / "m1" / "dataset", 3, seed=0)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")
def test_the_copy_of_a_training_set_goes_with_it(
  store: fake_gcs.Store, tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  dataset.write(RUN / "m1" / "dataset", test_dataset.ROWS)
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  batches = dataset.batches(RUN / "m1" / "dataset", 3, seed=0)
  assert len(list(tmp_path.iterdir())) == 1
  del batches
  gc.collect()
  assert not list(tmp_path.iterdir())


def test_nothing_follows_an_answer_without_a_body(store: fake_gcs.Store) -> None:
  """A client that keeps its connection would take it for the next answer."""
  blob = store.put("bucket", "a", b"abc")
  host, port = os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://").split(":")
  with socket.create_connection((host, int(port))) as line, line.makefile("rb") as answers:
    for query, end in ((f"?ifGenerationNotMatch={blob.generation}", ""), ("?alt=media", "Connection: close\r\n")):
      line.sendall(f"GET /storage/v1/b/bucket/o/a{query} HTTP/1.1\r\nHost: {host}\r\n{end}\r\n".encode())
    first, _, rest = answers.read().partition(b"\r\n\r\n")
  assert first.startswith(b"HTTP/1.1 304") and rest.startswith(b"HTTP/1.1 200") and rest.endswith(b"abc")


def test_lines_are_read_from_a_store(store: fake_gcs.Store) -> None:
  store.put("bucket", "trees.jsonl", b'{"a": 1}\n\n{"b": 2}')
  assert list(lines.numbered(epath.Path("gs://bucket/trees.jsonl"))) == [(1, b'{"a": 1}\n'), (3, b'{"b": 2}')]
  with pytest.raises(ValueError, match="there is no such file"):
    list(lines.numbered(epath.Path("gs://bucket/nothing.jsonl")))


def state(step: int) -> dict[str, jax.Array]:
  return {"a": jnp.arange(1000.0) + step, "b": jnp.full((4, 4), step, jnp.bfloat16)}


def restored(folder: epath.Path) -> tuple[int, dict[str, jax.Array]] | None:
  there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), state(0))
  kept = checkpoint.StateStore(folder)
  try:
    return kept.restore(shapes)
  finally:
    kept.close()


def test_train_states_are_kept_in_a_store(store: fake_gcs.Store) -> None:
  store.faults += [
    fake_gcs.Fault("insert", "", times=2, status=503),
    fake_gcs.Fault("insert", "ocdbt", times=1, torn=True),
    fake_gcs.Fault("list", "", times=1, status=503),
  ]
  assert restored(RUN / "m1" / "states") is None
  kept = checkpoint.StateStore(RUN / "m1" / "states")
  for step in (2, 4, 6):
    kept.save(step, state(step))
  kept.close()
  assert not any(fault.times for fault in store.faults)
  step, found = restored(RUN / "m1" / "states")
  assert step == 6
  jax.tree.map(np.testing.assert_array_equal, found, state(6))
  # A state that was being written when its process died has no commit_success.txt: the one before it counts.
  del store.blobs["bucket", "run/m1/states/6/commit_success.txt"]
  step, found = restored(RUN / "m1" / "states")
  assert step == 4
  jax.tree.map(np.testing.assert_array_equal, found, state(4))
