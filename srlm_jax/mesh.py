"""The device mesh, and the one table that says over which of its axes each named dimension of an array is split.

Parameters carry the names of their dimensions, activations are named where they are computed; `RULES` alone maps names
to mesh axes.  "data" and "fsdp" split the batch, "fsdp" also the parameters, "tensor" heads, feed-forward and
vocabulary.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, TypeVar

from flax import nnx
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from srlm_jax import distributed

Axes = tuple[str | None, ...]
T = TypeVar("T")
Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")

RULES: dict[str, str | tuple[str, ...] | None] = {
  # Activations.  Their features stay whole, so that "embed" below splits parameters alone.
  "batch": ("data", "fsdp"),
  "length": None,
  "residual": "tensor",  # The length of what a layer hands to the next: stored for the backward pass in parts.
  "features": None,
  # Parameters.
  "layers": None,
  "embed": "fsdp",
  # Both.
  "kv_heads": "tensor",
  "group": None,
  "head_dim": None,
  "ffw": "tensor",
  "vocab": "tensor",
}


def make_mesh(fsdp: int = -1, tensor: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh ("data", "fsdp", "tensor") over all devices, or the given ones; one size may be -1: whatever is left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  count = jax.device_count() if devices is None else len(devices)
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
    raise ValueError(f"mesh sizes {sizes}: each must be positive, and at most one of them -1 (whatever is left).")
  if free and count % known == 0:
    sizes[free[0]] = count // known
  if math.prod(sizes.values()) != count:
    raise ValueError(
      f"mesh sizes {sizes} do not multiply to the {count} devices: change data, fsdp or tensor, or set one to -1."
    )
  # Neighbours on the network where they can be; an axis may take part of a dimension of the chips' torus.
  placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def spec(axes: Axes) -> PartitionSpec:
  """The partition of an array whose dimensions have these names; None is a dimension that is never split.

  Raises:
    ValueError: a name that RULES does not hold, or two dimensions that would be split over the same mesh axis.
  """
  owner: dict[str, str] = {}
  parts: list[str | tuple[str, ...] | None] = []
  for name in axes:
    if name is not None and name not in RULES:
      raise ValueError(f"axis name {name!r} of {axes} is unknown: use one of {sorted(RULES)} or add it to mesh.RULES.")
    part = None if name is None else RULES[name]
    for mesh_axis in (part,) if isinstance(part, str) else part or ():
      if mesh_axis in owner:
        raise ValueError(
          f"dimensions {owner[mesh_axis]!r} and {name!r} of {axes} are both split over mesh axis {mesh_axis!r}: "
          "change mesh.RULES or name one of them None."
        )
      owner[mesh_axis] = str(name)
    parts.append(part)
  return PartitionSpec(*parts)


def _ways(part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
  """Into how many pieces a dimension with this entry of a PartitionSpec is split."""
  names = (part,) if isinstance(part, str) else part or ()
  return math.prod(mesh.shape[name] for name in names)


def _check(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh) -> None:
  """ValueError where a parameter's dimensions do not fit their names or do not divide over the mesh."""
  if len(shape) != len(axes):
    raise ValueError(f"parameter {name} has shape {shape} but the axis names {axes}: give one name per dimension.")
  for size, axis, part in zip(shape, axes, spec(axes), strict=True):
    ways = _ways(part, mesh)
    if size % ways:
      raise ValueError(
        f"parameter {name} has shape {shape}: its dimension {axis!r} of size {size} does not divide into {ways} pieces "
        f"(mesh axis {part!r}): change the sizes of the mesh or of the model."
      )


def shardings(tree: T, mesh: Mesh) -> T:
  """The same tree with a NamedSharding for every array, e.g. for `jax.jit(..., out_shardings=...)` or a restore.

  Args:
    tree: a module or anything that holds some (a train state), with arrays or their shapes (`jax.eval_shape`). The
      arrays of an `nnx.Param` are split as its metadata `axes` says, scalars outside of one are replicated.
    mesh: over which devices.

  Raises:
    ValueError: a Param without `axes`, an array of one or more dimensions outside a Param, or a dimension that does
      not divide; the message names the place in the tree.
  """

  def one(path: tuple[Any, ...], leaf: Any) -> Any:
    name = jax.tree_util.keystr(path)
    if not isinstance(leaf, nnx.Variable):
      if leaf.ndim:
        raise ValueError(f"array {name} of shape {leaf.shape} is in no nnx.Param, so its axes have no names.")
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(leaf):  # optax leaves such holes where it masks a parameter.
      return leaf
    axes = leaf.get_metadata().get("axes")
    if axes is None:
      raise ValueError(f"parameter {name} has no axis names: create it with nnx.Param(value, axes=(...)).")
    _check(name, leaf.shape, axes, mesh)
    return leaf.replace(NamedSharding(mesh, spec(axes)))

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def fitting(shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The partition of an array of this shape, of which dimensions that do not divide stay whole."""
  return PartitionSpec(
    *(part if size % _ways(part, mesh) == 0 else None for size, part in zip(shape, spec(axes), strict=True))
  )


def constrain(array: jax.Array, axes: Axes) -> jax.Array:
  """Splits an activation over the mesh in use (`jax.set_mesh`) by the names of its dimensions; without one, nothing.

  A dimension that does not divide, such as an odd last batch, is left to the compiler: slower, and the same numbers.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return array
  parts = [
    part if size % _ways(part, mesh) == 0 else PartitionSpec.UNCONSTRAINED
    for size, part in zip(array.shape, spec(axes), strict=True)
  ]
  return jax.lax.with_sharding_constraint(array, PartitionSpec(*parts))


def scan(step: Callable[[Carry, X], tuple[Carry, Y]], carry: Carry, xs: X) -> tuple[Carry, Y]:
  """`jax.lax.scan`, written out step by step where processes on CPUs talk through gloo.

  XLA's CPU runtime starts a collective as soon as those before it have begun, and a loop has begun long before the
  collectives in it are through: each process would then take those of the loop and those behind it in another order.
  """
  return jax.lax.scan(step, carry, xs, unroll=distributed.by_gloo())


def ways(axis: str) -> int:
  """Into how many pieces the mesh in use (`jax.set_mesh`) splits a dimension of this name; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _ways(RULES[axis], mesh)


def devices() -> int:
  """How many devices the mesh in use (`jax.set_mesh`) has; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().size or 1
