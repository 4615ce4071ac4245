"""Damage to saved states and weights: each file is harmed in many places; no harm is silent, or a library's error."""

from collections.abc import Iterator
import random

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import artifacts, checkpoint, config, endings, modelstore

FLIPS = 8  # Of each file.


def state_of(step: int) -> dict[str, jax.Array]:
  """A small train state: each dtype that one may hold, a scalar, values that depend on the step."""
  rng = np.random.default_rng(step)
  kernel = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
  return {"kernel": kernel, "moment": kernel.astype(jnp.bfloat16), "step": jnp.int32(step)}


def save_states(folder: epath.Path, *steps: int) -> None:
  store = checkpoint.StateStore(folder)
  for step in steps:
    store.save(step, state_of(step))
  store.close()


def restore(folder: epath.Path, abstract: object = None) -> tuple[int, dict[str, jax.Array]] | None:
  store = checkpoint.StateStore(folder)
  found = store.restore(state_of(0) if abstract is None else abstract)
  store.close()
  return found


def same(one: object, other: object) -> bool:
  first, second = checkpoint.named_leaves(one), checkpoint.named_leaves(other)
  return first.keys() == second.keys() and all(
    first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]) for name in first
  )


def files(folder: epath.Path) -> list[epath.Path]:
  found = []
  for path in sorted(folder.iterdir()):
    found += files(path) if path.is_dir() else [path]
  return found


def harmed(path: epath.Path, seed: int) -> Iterator[str]:
  """Harms a file in one way after the other, says how each time, and in the end brings it back."""
  whole, rng = path.read_bytes(), random.Random(f"{seed} {path.name}")
  for _ in range(FLIPS):
    bit, data = rng.randrange(8 * len(whole)), bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))
    yield f"{path}: bit {bit}"
  path.write_bytes(whole[: len(whole) // 2])
  yield f"{path}: cut"
  path.write_bytes(b"")
  yield f"{path}: empty"
  path.unlink()
  yield f"{path}: missing"
  path.write_bytes(whole)


def test_a_harmed_state_is_said_and_the_older_one_used(tmp_path: epath.Path, caplog: pytest.LogCaptureFixture) -> None:
  folder = epath.Path(tmp_path) / "states"
  save_states(folder, 2, 4)
  used = {2: 0, 4: 0}
  for path in files(folder / "4"):
    for how in harmed(path, 0):
      caplog.clear()
      step, found = restore(folder)
      assert same(found, state_of(step)), how  # Never a wrong value.
      said = [record.message for record in caplog.records if record.name == checkpoint.__name__]
      gone = how.endswith("commit_success.txt: missing")  # What object stores have in place of a rename: never saved.
      assert len(said) == (step == 2 and not gone), how
      assert all(f"{folder / '4'} is damaged: " in line and "\n" not in line for line in said), how
      used[step] += 1
  assert used[2] > 30 and used[4] > 10  # Of some files only a few bits matter.
  assert same(restore(folder)[1], state_of(4))  # Reading deleted nothing: all was brought back.


def test_a_damaged_state_goes_when_its_step_is_saved_again(tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path) / "states"
  save_states(folder, 2, 4)
  (folder / "4" / "notes" / "metadata").unlink()
  store = checkpoint.StateStore(folder)
  assert store.restore(state_of(0))[0] == 2
  store.save(4, state_of(4))
  store.close()
  step, found = restore(folder)
  assert step == 4 and same(found, state_of(4))


def test_where_all_states_are_damaged_training_starts_anew(tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path) / "states"
  save_states(folder, 2, 4)
  for step in ("2", "4"):
    (folder / step / "state" / "manifest.ocdbt").write_bytes(b"torn")
  store = checkpoint.StateStore(folder)
  assert store.restore(state_of(0)) is None
  store.save(2, state_of(2))
  store.close()
  assert restore(folder)[0] == 2


def test_harm_that_no_checksum_of_the_library_shows_is_found(
  tmp_path: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
  """Notes of one state beside the arrays of another: all files are whole, and yet it is not what was written."""
  folder = epath.Path(tmp_path) / "states"
  save_states(folder, 2, 4)
  notes = [folder / step / "notes" / "metadata" for step in ("2", "4")]
  notes[1].write_bytes(notes[0].read_bytes())
  assert restore(folder)[0] == 2
  assert "the bits of ['kernel'], ['moment'], ['step'] are not those that were written" in caplog.text


def test_a_state_of_another_dtype_is_refused_and_kept(tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path) / "states"
  save_states(folder, 2)
  other = state_of(0) | {"moment": jnp.zeros((6, 8), jnp.float32)}  # Orbax would cast without a word.
  with pytest.raises(ValueError, match=r"\['moment'\] is \(\(6, 8\), 'bfloat16'\) in the checkpoint, .*'float32'\)"):
    restore(folder, other)
  assert restore(folder)[0] == 2


def test_notes_say_fingerprint_norm_shape_and_dtype_of_each_leaf() -> None:
  state = state_of(3)
  noted = checkpoint.notes(state)
  assert noted["['step']"] == {"fingerprint": 3, "norm": 3.0, "shape": [], "dtype": "int32"}
  assert noted["['moment']"]["shape"] == [6, 8] and noted["['moment']"]["dtype"] == "bfloat16"
  np.testing.assert_allclose(noted["['kernel']"]["norm"], np.linalg.norm(state["kernel"]), rtol=1e-6)
  assert {name: one["fingerprint"] for name, one in noted.items()} == checkpoint.fingerprints(state)
  assert checkpoint.unlike(state, noted) == []
  for key, value in (("fingerprint", 1), ("norm", 2.9), ("shape", [1]), ("dtype", "int8")):
    wrong = {**noted, "['step']": {**noted["['step']"], key: value}}
    assert checkpoint.unlike(state, wrong) == ["['step']"], key
  assert checkpoint.unlike(state, {**noted, "['more']": noted["['step']"]}) == ["['more']"]


def test_harmed_weights_are_refused_with_what_to_do(tmp_path: epath.Path) -> None:
  out = artifacts.Artifact(epath.Path(tmp_path) / "m1", {"seed": 0}, {})
  out.begin()
  modelstore.save(out, tiny_model.model(), tiny_model.words(), {})
  c, mesh, wanted = config.base(), tiny_model.one_device(), tiny_model.model()
  refused = 0
  for path in files(out.folder / "weights"):
    for how in harmed(path, 1):
      try:
        assert same(modelstore.load(out, c, mesh), wanted), how
      except ValueError as error:
        refused += 1
        assert str(out.folder) in str(error) and "elete" in str(error), f"{how}: {error}"
  assert refused > 40
  assert same(modelstore.load(out, c, mesh), wanted)


def test_sizes_and_fingerprints_of_a_model_are_read_with_their_digests(tmp_path: epath.Path) -> None:
  out = artifacts.Artifact(epath.Path(tmp_path) / "m1", {"seed": 0}, {})
  out.begin()
  modelstore.save(out, tiny_model.model(), tiny_model.words(), {})
  for name, digits in (("llama.json", (b"10000.0", b"10000.1")), ("fingerprints.json", (b"1", b"3"))):
    whole = (out.folder / name).read_bytes()
    (out.folder / name).write_bytes(whole.replace(*digits, 1))
    assert (out.folder / name).read_bytes() != whole
    with pytest.raises(ValueError, match=f"{name} is damaged"):
      modelstore.load(out, config.base(), tiny_model.one_device())
    (out.folder / name).write_bytes(whole)


@pytest.mark.parametrize("cause", [MemoryError("no room"), RuntimeError("can't start new thread")])
def test_memory_that_runs_out_while_reading_is_no_damage(
  tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
  model, mesh = tiny_model.model(), tiny_model.one_device()
  folder = epath.Path(tmp_path)
  checkpoint.save_model(folder, model)

  def starved(*_: object, **__: object) -> None:
    raise ValueError("what a library says of it") from cause

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", starved)
  with pytest.raises(ValueError, match="what a library says of it") as caught:
    checkpoint.load_model(folder, mesh, model.config)
  assert not isinstance(caught.value, checkpoint.Damaged) and endings.of(caught.value)[0] == endings.MEMORY
