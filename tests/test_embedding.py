"""Texts as vectors: mean-pooled states whatever the padding and the mesh, and files of other encoders."""

import functools
import pathlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import embedding

PROMPTS = [[1, 7, 8, 9], list(range(3, 43)), [1, 20], [1, 7, 8, 9], [1, 7, 8, 10]]
MODEL = tiny_model.model()


@functools.cache
def by_hand(place: int) -> np.ndarray:
  """Without padding, in a batch of its own."""
  tokens = jnp.array([PROMPTS[place]])
  positions = jnp.arange(tokens.shape[1])[None]
  return np.asarray(jax.jit(lambda model, *row: model(*row))(MODEL, tokens, positions, jnp.ones_like(tokens))[0])


@pytest.mark.parametrize("devices", [1, 8])
def test_states_are_pooled_over_the_prompt_alone(devices: int) -> None:
  mesh = tiny_model.one_device() if devices == 1 else tiny_model.eight_devices()
  with jax.set_mesh(mesh):
    found = embedding.of_model(MODEL, PROMPTS, 2, 64, mesh)
  assert found.dtype == np.float32 and found.shape == (5, 16)
  for place in (0, 1):
    np.testing.assert_allclose(found[place], by_hand(place).mean(axis=0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[3], found[0], rtol=1e-5)
  assert np.abs(found[4] - found[0]).max() > 1e-3 and np.abs(found[2] - found[0]).max() > 1e-3


def test_vectors_of_another_encoder_are_found_by_their_ids(tmp_path: pathlib.Path) -> None:
  path = epath.Path(tmp_path / "mine.npz")
  vectors = np.arange(6.0).reshape(3, 2)
  np.savez(path, ids=["a", "b", "c"], vectors=vectors)
  np.testing.assert_array_equal(embedding.from_file(path, ["c", "a"]), vectors[[2, 0]])
  with pytest.raises(ValueError, match=r"mine\.npz lacks 2 of 3 ids, 'x' first: write it with numpy\.savez"):
    embedding.from_file(path, ["x", "a", "y"])


def test_vectors_that_cannot_be_drawn_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = epath.Path(tmp_path / "mine.npz")
  np.savez(path, ids=["a", "b", "a"], vectors=[[1.0], [2.0], [3.0]])
  with pytest.raises(ValueError, match=r"mine\.npz: 1 of its ids are there twice"):
    embedding.load(path)
  np.savez(path, ids=["a", "b", "c"], vectors=[[1.0], [np.nan], [1e300]])
  with pytest.raises(ValueError, match=r"the vector of 'b' has a value .*; 2 have one"):
    embedding.load(path)
  monkeypatch.setattr(embedding, "LARGEST", 1 << 20)
  np.savez_compressed(path, ids=["a"], vectors=np.zeros((1, 1 << 20)))
  assert path.stat().length < 1 << 20
  with pytest.raises(ValueError, match=r"it unpacks to 8,388,\d+ bytes, of at most 1,048,576"):
    embedding.load(path)


def test_files_of_another_form_are_refused(tmp_path: pathlib.Path) -> None:
  path = epath.Path(tmp_path / "mine.npz")
  with pytest.raises(ValueError, match=r"mine\.npz: there is no such file: write it with numpy\.savez\('mine\.npz'"):
    embedding.from_file(path, ["a"])
  contents = ({"ids": ["a"]}, {"ids": ["a"], "vectors": [[1.0], [2.0]]}, {"ids": ["a"], "vectors": [1.0]})
  for arrays in contents:
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"analysis\.vectors=.*mine\.npz: "):
      embedding.from_file(path, ["a"])
  np.savez(path, ids=np.array(["a", None], object), vectors=[[1.0], [2.0]])  # A pickle, which may run code.
  for content in (path.read_bytes(), b"no archive", b""):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.npz: not an \.npz file with `ids` and `vectors`"):
      embedding.from_file(path, ["a"])
