"""Checkpoints: bit for bit the same on any mesh, and a clear error where model and checkpoint differ."""

import dataclasses
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import checkpoint, llama, mesh as mesh_lib, train_loop, train_step

OPTIMIZER = train_step.OptimizerConfig(lr=1e-3, end_lr=1e-4, steps=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
  """A saved model: divided over eight devices by their parameters."""
  path = epath.Path(tmp_path_factory.mktemp("checkpoint"))
  model = checkpoint.init_model(tiny_model.CONFIG, mesh_lib.make_mesh(fsdp=8), seed=5)
  checkpoint.save_model(path, model)
  return path


def arrays(tree: object) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf) for name, leaf in checkpoint.named_leaves(tree).items()}


def assert_same(one: object, other: object) -> None:
  first, second = arrays(one), arrays(other)
  assert first.keys() == second.keys()
  for name, value in first.items():
    assert value.dtype == second[name].dtype, name
    np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_a_model_is_made_in_parts_and_the_same_on_every_mesh() -> None:
  model = checkpoint.init_model(tiny_model.CONFIG, mesh_lib.make_mesh(fsdp=8), seed=5)
  gate = model.layers.gate[...]
  assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 2, 32)}  # A part of 8 of [2, 16, 32].
  assert_same(model, jax.jit(lambda: llama.Llama(tiny_model.CONFIG, jax.random.key(5)))())


def test_a_model_comes_back_on_another_mesh(folder: epath.Path) -> None:
  saved = checkpoint.init_model(tiny_model.CONFIG, mesh_lib.make_mesh(fsdp=8), seed=5)
  devices = tiny_model.eight_devices()
  model = checkpoint.load_model(folder, devices, tiny_model.CONFIG)
  assert_same(model, saved)
  assert model.config == tiny_model.CONFIG
  wanted = jax.tree.leaves(mesh_lib.shardings(checkpoint.abstract_model(tiny_model.CONFIG, devices), devices))
  assert [leaf.sharding for leaf in jax.tree.leaves(model)] == wanted
  assert {shard.data.shape for shard in model.layers.gate[...].addressable_shards} == {(2, 8, 16)}


def test_how_a_model_computes_may_change(folder: epath.Path) -> None:
  config = dataclasses.replace(tiny_model.CONFIG, dropout=0.1, remat="full", dtype="bfloat16")
  model = checkpoint.load_model(folder, tiny_model.one_device(), config)
  assert (model.config.dropout, model.config.remat, model.config.dtype) == (0.1, "full", "bfloat16")
  assert model.norm[...].dtype == jnp.float32


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"embed": 32}, r"embedding.* is \(\(320, 16\), 'float32'\) in the checkpoint, \(\(320, 32\), 'float32'\) in this"),
    ({"param_dtype": "bfloat16"}, r"'float32'\) in the checkpoint, .*'bfloat16'\) in this run: another model or dtype"),
    ({"tied": False}, r"head.* is None in the checkpoint"),
  ],
)
def test_another_shape_or_dtype_is_refused(folder: epath.Path, changes: dict[str, object], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    checkpoint.load_model(folder, tiny_model.one_device(), dataclasses.replace(tiny_model.CONFIG, **changes))


def test_missing_weights_are_said_in_one_sentence(tmp_path: epath.Path) -> None:
  with pytest.raises(checkpoint.Damaged, match=f"{tmp_path}/weights is missing: delete {tmp_path} and make it again"):
    checkpoint.load_model(epath.Path(tmp_path), mesh_lib.make_mesh(fsdp=8), tiny_model.CONFIG)


def test_a_llama_3_config_comes_back() -> None:
  scaled = dataclasses.replace(tiny_model.CONFIG, rope_scaling=llama.RopeScaling(8.0, 1.0, 4.0, 64))
  for config in (scaled, tiny_model.CONFIG):
    assert checkpoint.read_model_config(json.dumps(dataclasses.asdict(config))) == config


def state_of(mesh: jax.sharding.Mesh, seed: int) -> train_step.TrainState:
  """A train state whose every leaf holds something else."""
  abstract = train_loop.abstract_state(tiny_model.CONFIG, OPTIMIZER, mesh)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jax.device_put(rng.normal(0, 9, leaf.shape).astype(leaf.dtype), leaf.sharding), abstract
  )


def test_a_train_state_comes_back_on_another_mesh(tmp_path: epath.Path) -> None:
  state = state_of(mesh_lib.make_mesh(fsdp=8), 0)
  store = checkpoint.StateStore(epath.Path(tmp_path) / "states")
  assert store.restore(state) is None
  store.save(4, state)
  store.close()
  devices = tiny_model.eight_devices()
  abstract = train_loop.abstract_state(tiny_model.CONFIG, OPTIMIZER, devices)
  step, found = checkpoint.StateStore(epath.Path(tmp_path) / "states").restore(abstract)
  assert step == 4
  assert_same(found, state)
  assert len(arrays(found)) == 3 * 11 + 3  # Parameters and two moments each; counters of Adam, the schedule and ours.
  assert [leaf.sharding for leaf in jax.tree.leaves(found)] == [leaf.sharding for leaf in jax.tree.leaves(abstract)]


def test_the_newest_two_states_are_kept(tmp_path: epath.Path) -> None:
  folder, mesh = epath.Path(tmp_path) / "states", tiny_model.one_device()
  store = checkpoint.StateStore(folder)
  for step in (2, 4, 6):
    store.save(step, state_of(mesh, step))
  store.close()
  assert sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) == [4, 6]
  step, found = checkpoint.StateStore(folder).restore(train_loop.abstract_state(tiny_model.CONFIG, OPTIMIZER, mesh))
  assert step == 6
  assert_same(found, state_of(mesh, 6))


def test_a_state_of_another_model_is_refused(tmp_path: epath.Path) -> None:
  folder, mesh = epath.Path(tmp_path) / "states", tiny_model.one_device()
  store = checkpoint.StateStore(folder)
  store.save(2, state_of(mesh, 0))
  store.close()
  for changes, name in (({"ffw": 64}, "down"), ({"param_dtype": "bfloat16"}, "bfloat16")):
    other = train_loop.abstract_state(dataclasses.replace(tiny_model.CONFIG, **changes), OPTIMIZER, mesh)
    with pytest.raises(ValueError, match=f"{name}.* in this run: another model or dtype"):
      checkpoint.StateStore(folder).restore(other)
