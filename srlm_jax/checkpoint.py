"""Weights and train states on disk, through Orbax, and how damage to them is found.

A train state carries notes: of each leaf a fingerprint of its bits, its norm, shape and dtype, computed where the leaf
lies. A state whose leaves do not fit its notes, or that cannot be read, is damaged: it is said, and the older one used.
"""

from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import json
import logging
from typing import Any, TypeVar

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from srlm_jax import distributed, endings, llama, mesh as mesh_lib

logger = logging.getLogger(__name__)

Tree = TypeVar("Tree")

# What Orbax and TensorStore raise where their files are damaged: tests/test_damage.py flips bits everywhere. An OSError
# that is no missing file is of the disk, not of what lies on it.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, FileNotFoundError)


class Damaged(ValueError):
  """What is stored cannot be read, or is not what was written."""


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
  """Within, whatever libraries raise where a file is damaged becomes Damaged: `what`, and their first line."""
  try:
    yield
  except Exception as error:
    if endings.out_of_memory(error):
      raise
    if not isinstance(error, _UNREADABLE) and type(error) is not Exception:  # Orbax's for a piece of an array.
      raise
    source = error.__cause__ or error
    line = str(source).strip().partition("\n")[0][:200]  # Theirs may be pages.
    raise Damaged(f"{what} ({type(source).__name__}: {line})") from error


def named_leaves(tree: Any) -> dict[str, Any]:
  """{path: leaf} of any pytree: what a checkpoint stores, independent of the tree's classes."""
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _fingerprint(leaf: jax.Array) -> jax.Array:
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  places = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: _fingerprint(leaf) for name, leaf in leaves.items()}


def fingerprints(tree: Any) -> dict[str, int]:
  """A number for the bits of each leaf, the same on every mesh and computed where the leaf lies.

  The sum of all elements' bits, each times an odd number of its place, modulo 2^32: one flipped bit always changes it.
  """
  return {name: int(value) for name, value in jax.device_get(_fingerprints(named_leaves(tree))).items()}


@jax.jit
def _marks(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  def norm(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32))))

  return {name: (_fingerprint(leaf), norm(leaf)) for name, leaf in leaves.items()}


def notes(tree: Any) -> dict[str, dict[str, Any]]:
  """{name: fingerprint, L2 norm (float32), shape and dtype} of each leaf, as JSON holds it."""
  leaves = named_leaves(tree)
  return {
    name: {
      "fingerprint": int(mark),
      "norm": float(norm),
      "shape": list(leaves[name].shape),
      "dtype": str(leaves[name].dtype),
    }
    for name, (mark, norm) in jax.device_get(_marks(leaves)).items()
  }


def unlike(tree: Any, noted: dict[str, dict[str, Any]]) -> list[str]:
  """The leaves that are not as noted: other bits, or another norm, whose last digits alone may differ with the mesh."""
  found = notes(tree)

  def same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    if one is None or other is None:
      return False
    rest = all(one[key] == other[key] for key in ("fingerprint", "shape", "dtype"))
    return rest and bool(np.isclose(one["norm"], other["norm"], rtol=1e-2, equal_nan=True))

  return sorted(name for name in {*found, *noted} if not same(found.get(name), noted.get(name)))


def few(names: Sequence[str]) -> str:
  """The first three names, and how many more there are: a model may have hundreds."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def with_shardings(abstract: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """ShapeDtypeStructs with the shardings that the rules give them."""
  shardings = mesh_lib.shardings(abstract, mesh)
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def _unname(abstract: Tree, leaves: dict[str, Any]) -> Tree:
  return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])


def _kind(leaf: Any) -> tuple[tuple[int, ...], str] | None:
  """Shape and dtype of an array, of what stands for one, or of its notes."""
  if leaf is None:
    return None
  if isinstance(leaf, dict):
    return tuple(leaf["shape"]), leaf["dtype"]
  return tuple(leaf.shape), str(leaf.dtype)


def _check(stored: dict[str, Any], wanted: dict[str, Any], folder: epath.Path) -> None:
  for name in sorted({*stored, *wanted}):
    have, want = _kind(stored.get(name)), _kind(wanted.get(name))
    if have != want:
      raise ValueError(f"{folder}: {name} is {have} in the checkpoint, {want} in this run: another model or dtype.")


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


def read_model_config(text: str) -> llama.LlamaConfig:
  """The LlamaConfig beside saved weights, from the text of its file."""
  fields = json.loads(text)
  scaling = fields.pop("rope_scaling")
  return llama.LlamaConfig(**fields, rope_scaling=llama.RopeScaling(**scaling) if scaling else None)


def load_model(folder: epath.Path, mesh: jax.sharding.Mesh, config: llama.LlamaConfig) -> llama.Llama:
  """The model of a folder, each device reading its part.

  Raises:
    Damaged: its files cannot be read. Whether what is read is what was written, `fingerprints` say.
    ValueError: the stored shapes or dtypes are not the config's.
  """
  abstract = abstract_model(config, mesh)
  wanted, path = named_leaves(abstract), folder / "weights"
  if not path.is_dir():  # Orbax warns of this in sentences of its own.
    raise Damaged(f"{path} is missing: delete {folder} and make it again.")
  damaged = f"{path} is damaged: delete {folder} and make it again"
  with ocp.StandardCheckpointer() as checkpointer:
    with _reading(damaged):
      stored = dict(checkpointer.metadata(path).item_metadata)
    _check(stored, wanted, folder)
    with _reading(damaged):
      return _unname(abstract, checkpointer.restore(path, wanted))


class StateStore:
  """The train states of one run: the newest two are kept; saving is asynchronous, `close` waits for it."""

  def __init__(self, folder: epath.Path) -> None:
    self._folder = folder
    self._damaged: list[int] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    self._manager = ocp.CheckpointManager(folder, item_names=("state", "notes"), options=options)

  def steps(self) -> list[int]:
    """The steps after which a state was saved, the newest first."""
    return distributed.agree(f"look at {self._folder}", sorted(self._manager.all_steps(), reverse=True))

  def restore(self, abstract: Tree) -> tuple[int, Tree] | None:
    """(step, state) of the newest state that is as it was written, or None where there is none.

    Damaged ones are said, and deleted when the next one is saved; the steps after the older state are done again.

    Raises:
      ValueError: the state is of another model or dtype.
    """
    for step in self.steps():
      try:
        return step, self._read(step, abstract)
      except Damaged as error:
        logger.warning("%s: an older state, or the start, is used in its place, and steps are done again.", error)
        self._damaged.append(step)
    return None

  def _read(self, step: int, abstract: Tree) -> Tree:
    """The state of a step; Damaged where it is not as it was written, in every process if in one."""
    folder, wanted = self._folder / str(step), named_leaves(abstract)
    noted = distributed.first(f"read {folder / 'notes'}", lambda: _read_notes(folder / "notes"))
    if isinstance(noted, str):
      raise Damaged(f"{folder} is damaged: {noted}")
    _check(noted, wanted, self._folder)
    # By handlers, not by the manager: that waits for the other processes, which may have found damage and gone on.
    leaves, complaint = {}, ""
    try:
      with _reading("its arrays cannot be read"):
        leaves = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(wanted))
    except Damaged as error:
      complaint = str(error)
    complaint = next(filter(None, distributed.gather(f"read {folder}", complaint)), "")
    if complaint:
      raise Damaged(f"{folder} is damaged: {complaint}")
    state = _unname(abstract, leaves)
    changed = unlike(state, noted)
    if changed:
      raise Damaged(f"{folder} is damaged: the bits of {few(changed)} are not those that were written")
    return state

  def save(self, step: int, state: Any) -> None:
    """Begins to save the state after `step` steps, with its notes: both are there, or neither."""
    while self._damaged:  # Not sooner: what could not be read may have been the disk's or the store's bad hour.
      self._manager.delete(self._damaged.pop())
    leaves, noted = named_leaves(state), notes(state)
    both = {"state": ocp.args.StandardSave(leaves), "notes": ocp.args.JsonSave({"leaves": noted, "of": _seal(noted)})}
    self._manager.save(step, args=ocp.args.Composite(**both))

  def close(self) -> None:
    """Waits until what was begun is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def _seal(noted: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()


def _read_notes(folder: epath.Path) -> dict[str, Any] | str:
  """The notes of a state's leaves, or what is wrong with them."""
  try:
    with _reading("its notes cannot be read"):
      found = ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore())
      whole = found["of"] == _seal(found["leaves"])
  except Damaged as error:
    return str(error)
  return found["leaves"] if whole else "its notes are not those that were written"
