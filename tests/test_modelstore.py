"""Models as artifacts: what is saved comes back, and a tokenizer that is not the model's is refused."""

import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import artifacts, checkpoint, config, modelstore, sampling, tokenizer


@pytest.fixture
def saved(tmp_path: epath.Path) -> artifacts.Artifact:
  out = artifacts.Artifact(epath.Path(tmp_path) / "m1", {"seed": 0}, {})
  out.begin()
  (out.folder / "states" / "4").mkdir(parents=True)
  (out.folder / "states" / "4" / "big").write_text("x")
  modelstore.save(out, tiny_model.model(), tiny_model.words(), {"steps": 7})
  return out


def test_a_saved_model_comes_back(saved: artifacts.Artifact) -> None:
  c = config.base()
  c.generation.rows, c.model.max_length, c.model.dtype = 12, 100, "float32"
  speaker = modelstore.speaker(saved, c, tiny_model.one_device())
  engine = speaker.generator(sampling.Sampling(max_new=40))
  for found, wanted in zip(jax.tree.leaves(engine.model), jax.tree.leaves(tiny_model.model()), strict=True):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
  assert speaker.tokenizer.digest == tiny_model.words().digest
  assert (speaker.chat_kind, speaker.max_length) == ("llama2", 100)
  assert (engine.rows, engine.seed, engine.max_prompt, engine.eos_id) == (12, 0, 60, tiny_model.words().eos_id)
  assert speaker.tokenizer.golden() == tiny_model.words().golden()


def test_a_speaker_has_its_kernels_in_the_compute_type_and_its_norms_whole(saved: artifacts.Artifact) -> None:
  c = config.base()
  model = modelstore.speaker(saved, c, tiny_model.one_device()).generator(sampling.Sampling()).model
  assert {str(leaf.dtype) for leaf in (model.embedding[...], model.layers.gate[...])} == {"bfloat16"}
  assert {str(leaf.dtype) for leaf in (model.norm[...], model.layers.ffw_norm[...])} == {"float32"}


def test_dropout_and_remat_are_for_training_alone(saved: artifacts.Artifact) -> None:
  c, mesh = config.base(), tiny_model.one_device()
  use, train = modelstore.load(saved, c, mesh).config, modelstore.load(saved, c, mesh, train=True).config
  assert (use.dropout, use.remat, use.dtype) == (0.0, "none", "bfloat16")
  assert (train.dropout, train.remat, train.dtype) == (0.1, "full", "bfloat16")


def test_the_manifest_covers_weights_and_tokenizer(saved: artifacts.Artifact) -> None:
  manifest = saved.manifest()
  assert manifest["facts"] == {
    "steps": 7,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(tiny_model.model())),
    "tokenizer": tiny_model.words().digest,
  }
  names = set(manifest["files"])
  assert {"tokenizer/tokenizer.model", "golden.json", "llama.json", "fingerprints.json"} <= names


def test_the_states_go_when_the_model_is_committed_and_not_before(
  tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  out = artifacts.Artifact(epath.Path(tmp_path) / "m1", {}, {})
  out.begin()
  (out.folder / "states").mkdir()

  def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(artifacts.Artifact, "commit", stop)
    modelstore.save(out, tiny_model.model(), tiny_model.words(), {})
  assert (out.folder / "states").exists()
  modelstore.save(out, tiny_model.model(), tiny_model.words(), {})  # Over what the stopped one left.
  assert out.done and not (out.folder / "states").exists()


def test_an_unfinished_model_is_not_loaded(tmp_path: epath.Path) -> None:
  out = artifacts.Artifact(epath.Path(tmp_path) / "m1", {}, {})
  out.begin()
  checkpoint.save_model(out.folder, tiny_model.model())
  with pytest.raises(ValueError, match="is not finished"):
    modelstore.load(out, config.base(), tiny_model.one_device())


def test_a_changed_tokenizer_is_refused(saved: artifacts.Artifact) -> None:
  tiny_model.words(328).save(saved.folder / "tokenizer")
  with pytest.raises(ValueError, match="the tokenizer's vocab_size is 328, it was 320: bring its own files back"):
    modelstore.load_tokenizer(saved)
  (saved.folder / "tokenizer" / "tokenizer.model").write_bytes(b"nothing")
  with pytest.raises(ValueError, match="/tokenizer is no SentencePiece model, or a broken one"):
    modelstore.load_tokenizer(saved)


def test_a_change_that_no_encoding_shows_is_refused_too(saved: artifacts.Artifact) -> None:
  path = saved.folder / "tokenizer" / "tokenizer.model"
  path.write_bytes(path.read_bytes() + b"\xfa\x07\x01x")  # A protobuf field that SentencePiece does not know.
  assert tokenizer.load(path).golden() == tiny_model.words().golden()
  with pytest.raises(ValueError, match="changed since the model was made: bring its files back"):
    modelstore.load_tokenizer(saved)


def test_damaged_golden_encodings_are_refused(saved: artifacts.Artifact) -> None:
  path = saved.folder / "golden.json"
  golden = json.loads(path.read_text())
  path.write_text(json.dumps({**golden, "eos_id": 5}))
  with pytest.raises(ValueError, match="golden.json is damaged"):
    modelstore.load_tokenizer(saved)


def test_token_ids_of_another_tokenizer_are_refused(saved: artifacts.Artifact) -> None:
  modelstore.same_tokenizer(saved, tiny_model.words())
  with pytest.raises(ValueError, match=r"/m1 holds token ids of the tokenizer .*they must be the same"):
    modelstore.same_tokenizer(saved, tiny_model.words(328))


def test_of_damaged_weights_a_few_are_named(saved: artifacts.Artifact) -> None:
  checkpoint.save_model(saved.folder, tiny_model.model(1))
  with pytest.raises(
    ValueError, match=r"the bits of \S+, \S+, \S+ and \d+ more are not those that were written. Delete"
  ):
    modelstore.load(saved, config.base(), tiny_model.one_device())


def test_every_flipped_bit_changes_the_fingerprint():
  rng = np.random.default_rng(0)
  for dtype, width in (("float32", np.uint32), ("bfloat16", np.uint16)):
    leaf = jnp.asarray(rng.normal(size=(3, 5, 7)), dtype)
    before = checkpoint.fingerprints({"w": leaf})
    bits = np.asarray(leaf).view(width)
    for place in range(bits.size):
      changed = bits.copy().reshape(-1)
      changed[place] ^= width(1 << int(rng.integers(8 * bits.itemsize)))
      other = jnp.asarray(changed.reshape(bits.shape).view(leaf.dtype))
      assert checkpoint.fingerprints({"w": other}) != before


def test_equal_weights_give_equal_artifacts_and_other_bits_are_refused(saved, tmp_path):
  again = artifacts.Artifact(epath.Path(tmp_path / "m1"), saved.config, {})
  again.begin()
  modelstore.save(again, tiny_model.model(), tiny_model.words(), {"steps": 7})
  assert again.digest() == saved.digest()
  assert again.manifest()["weights"] != saved.manifest()["weights"]  # Orbax draws their names at random.
  wrong = tiny_model.model()
  wrong.norm = type(wrong.norm)(wrong.norm[...].at[3].add(1e-3), axes=("features",))
  checkpoint.save_model(again.folder, wrong)
  with pytest.raises(ValueError, match=r"damaged: the bits of .*norm"):
    modelstore.load(again, config.base(), tiny_model.one_device())
