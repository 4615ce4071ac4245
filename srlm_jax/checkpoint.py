"""Weights and train states on disk, through Orbax."""

import json
from typing import Any, TypeVar

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from srlm_jax import distributed, llama, mesh as mesh_lib

Tree = TypeVar("Tree")


def named_leaves(tree: Any) -> dict[str, Any]:
  """{path: leaf} of any pytree: what a checkpoint stores, independent of the tree's classes."""
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  def one(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    places = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)

  return {name: one(leaf) for name, leaf in leaves.items()}


def fingerprints(tree: Any) -> dict[str, int]:
  """A number for the bits of each leaf, the same on every mesh and computed where the leaf lies.

  The sum of all elements' bits, each times an odd number of its place, modulo 2^32: one flipped bit always changes it.
  """
  return {name: int(value) for name, value in jax.device_get(_fingerprints(named_leaves(tree))).items()}


def with_shardings(abstract: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """ShapeDtypeStructs with the shardings that the rules give them."""
  shardings = mesh_lib.shardings(abstract, mesh)
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def _unname(abstract: Tree, leaves: dict[str, Any]) -> Tree:
  return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])


def _check(stored: dict[str, Any], wanted: dict[str, Any], folder: epath.Path) -> None:
  for name in sorted({*stored, *wanted}):
    have, want = stored.get(name), wanted.get(name)
    shapes = [None if leaf is None else (tuple(leaf.shape), str(leaf.dtype)) for leaf in (have, want)]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f"{folder}: {name} is {shapes[0]} in the checkpoint, {shapes[1]} in this run: another model or dtype."
      )


def abstract_model(config: llama.LlamaConfig, mesh: jax.sharding.Mesh) -> llama.Llama:
  """The model's shapes, dtypes and shardings, without its arrays."""
  return with_shardings(jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0))), mesh)


def init_model(config: llama.LlamaConfig, mesh: jax.sharding.Mesh, seed: int) -> llama.Llama:
  """A random model, made sharded: no device ever holds more than its part."""
  abstract = abstract_model(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(lambda key: llama.Llama(config, key), out_shardings=shardings)(jax.random.key(seed))


def save_model(folder: epath.Path, model: llama.Llama) -> None:
  """Writes `weights/` (Orbax) in `folder`, replacing what an interrupted run left."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "weights", named_leaves(model), force=True)
    checkpointer.wait_until_finished()


def read_model_config(folder: epath.Path) -> llama.LlamaConfig:
  """The LlamaConfig beside saved weights."""
  fields = json.loads((folder / "llama.json").read_text())
  scaling = fields.pop("rope_scaling")
  return llama.LlamaConfig(**fields, rope_scaling=llama.RopeScaling(**scaling) if scaling else None)


def load_model(folder: epath.Path, mesh: jax.sharding.Mesh, config: llama.LlamaConfig) -> llama.Llama:
  """The model of a folder, each device reading its part; ValueError where the stored shapes are not the config's."""
  abstract = abstract_model(config, mesh)
  wanted = named_leaves(abstract)
  with ocp.StandardCheckpointer() as checkpointer:
    _check(dict(checkpointer.metadata(folder / "weights").item_metadata), wanted, folder)
    return _unname(abstract, checkpointer.restore(folder / "weights", wanted))


class StateStore:
  """The train states of one run: the newest two are kept; saving is asynchronous, `close` waits for it."""

  def __init__(self, folder: epath.Path) -> None:
    self._folder = folder
    self._manager = ocp.CheckpointManager(
      folder,
      item_handlers=ocp.StandardCheckpointHandler(),  # Without it a fresh manager has no metadata to check.
      options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
    )

  def restore(self, abstract: Tree) -> tuple[int, Tree] | None:
    """(step, state) of the newest state, or None where there is none yet."""
    step = distributed.agree(f"look at {self._folder}", self._manager.latest_step())
    if step is None:
      return None
    wanted = named_leaves(abstract)
    _check(dict(self._manager.item_metadata(step)), wanted, self._folder)
    return step, _unname(abstract, self._manager.restore(step, args=ocp.args.StandardRestore(wanted)))

  def save(self, step: int, state: Any) -> None:
    """Begins to save the state after `step` steps."""
    self._manager.save(step, args=ocp.args.StandardSave(named_leaves(state)))

  def close(self) -> None:
    """Waits until what was begun is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()
