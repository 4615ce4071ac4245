"""The device mesh, and the one table that says over which of its axes each named dimension of an array is split.

Parameters carry the names of their dimensions, activations are named where they are computed; `RULES` alone maps names
to mesh axes.  "slice", "data" and "fsdp" split the batch, "fsdp" also the parameters, "tensor" heads, feed-forward and
vocabulary.  Over "slice", the slower network between TPU slices, a train step sends its gradients, once, and no more.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, TypeVar

from flax import nnx
import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
import numpy as np

Axes = tuple[str | None, ...]
T = TypeVar("T")
Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")

RULES: dict[str, str | tuple[str, ...] | None] = {
  # Activations.  Their features are not "embed": that splits parameters alone.
  "batch": ("slice", "data", "fsdp"),
  "length": None,
  "residual": "tensor",  # The features of what a layer hands to the next: stored for the backward pass in parts.
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


NOWHERE = Mesh(np.empty((), object), ())  # In use, it is as if no mesh were.


def make_mesh(
  fsdp: int = -1, tensor: int = 1, data: int = 1, slice: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh ("slice", "data", "fsdp", "tensor") over all devices, or the given ones.

  Args:
    fsdp, tensor, data: sizes; one of them may be -1: whatever is left.
    slice: TPU slices that the slower network connects; devices that know of none are divided in their order.
    devices: by default all.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `slice` is not their number of slices.
  """
  sizes = {"slice": slice, "data": data, "fsdp": fsdp, "tensor": tensor}
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1 or slice < 1:
    raise ValueError(
      f"mesh sizes {sizes}: each must be positive, and at most one of data, fsdp and tensor -1 (whatever is left)."
    )
  if free and count % known == 0:
    sizes[free[0]] = count // known
  if math.prod(sizes.values()) != count:
    raise ValueError(
      f"mesh sizes {sizes} do not multiply to the {count} devices: change slice, data, fsdp or tensor, or set one of "
      "the last three to -1."
    )
  groups: dict[int, list[jax.Device]] = {}
  for device in devices:
    number = getattr(device, "slice_index", None) if device.platform == "tpu" else None  # A GPU's says something else.
    groups.setdefault(number or 0, []).append(device)
  if len(groups) > 1 and len(groups) != slice:
    raise ValueError(f"mesh sizes {sizes}: the devices are of {len(groups)} slices: set mesh.slice={len(groups)}.")
  if len(groups) == 1:
    groups = {index: list(devices[index * count // slice : (index + 1) * count // slice]) for index in range(slice)}
  # Neighbours on the network where they can be; an axis may take part of a dimension of the chips' torus.
  inner = tuple(sizes.values())[1:]
  placed = [mesh_utils.create_device_mesh(inner, group, allow_split_physical_axes=True) for group in groups.values()]
  return Mesh(np.stack(placed), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


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


def _here(axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """`spec` without the mesh axes of which the code at hand sees one piece alone, as inside `each_slice`."""
  gone = set(mesh.manual_axes) if isinstance(mesh, AbstractMesh) else set()
  return PartitionSpec(
    *(tuple(name for name in part if name not in gone) if isinstance(part, tuple) else part for part in spec(axes))
  )


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


@jax.jit
def layer_of(stack: jax.Array, index: int) -> jax.Array:
  """One layer of a stacked parameter; compiled once for all of them, which an index that is a constant is not."""
  return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _with_layer(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
  """As bits: a CPU takes bfloat16 through float32, all of the stack for each layer, and that changes some NaNs."""
  bits = f"uint{8 * stack.dtype.itemsize}"
  return jax.lax.dynamic_update_index_in_dim(stack.view(bits), layer.view(bits), index, 0).view(stack.dtype)


def stack_layers(
  layer: Callable[[int, Sharding], jax.Array], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
  """A stacked parameter that grows in place on its devices, so that beside it there is never more than one layer.

  Args:
    layer: (index, sharding) → that layer, with that sharding.
    shape: of the stack, its first dimension the layers.
    dtype: of the stack.
    sharding: of the stack, whose layers are not divided.
  """
  of_layer = sharding
  if isinstance(sharding, NamedSharding):
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  put = jax.jit(_with_layer, donate_argnums=0, out_shardings=sharding)
  stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)
  for index in range(shape[0]):
    stack = put(stack, layer(index, of_layer), index).block_until_ready()  # Layers that wait would pile up.
  return stack


def moved(tree: T, mesh: Mesh) -> T:
  """The same parameters on another mesh. A mesh of each process's own devices gets a whole copy, over the network.

  They go layer by layer: on their way the compiler may make a parameter whole on every device.

  Args:
    tree: as for `shardings`, on a mesh of all devices.
    mesh: of all devices, or of this process's alone; then of the same sizes in every process, which all must call this.

  Raises:
    ValueError: this process's mesh orders its devices otherwise than `make_mesh` does.
  """
  apart = jax.process_count() > 1 and not mesh.is_multi_process
  target = _copies(mesh) if apart else mesh

  def one(param: nnx.Param, sharding: nnx.Param) -> nnx.Variable:
    array, where = param[...], sharding.get_value()
    if param.get_metadata()["axes"][0] == "layers":
      array = stack_layers(
        lambda index, of_layer: jax.device_put(layer_of(array, index), of_layer), array.shape, array.dtype, where
      )
    else:
      array = jax.device_put(array, where)
    if apart:
      own = NamedSharding(mesh, where.spec)
      parts = [part.data for part in array.addressable_shards]
      array = jax.make_array_from_single_device_arrays(array.shape, own, parts)
    return param.replace(array)

  with jax.set_mesh(NOWHERE):  # The two may name the devices in another order, which a mesh in use does not bear.
    return jax.tree.map(one, tree, shardings(tree, target), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _copies(mesh: Mesh) -> Mesh:
  """The meshes of all processes, of the same sizes as this one's, as one mesh with an axis "copy" over them."""
  hosts: dict[int, list[jax.Device]] = {}
  for device in jax.devices():
    hosts.setdefault(device.process_index, []).append(device)
  each = [make_mesh(**mesh.shape, devices=devices).devices for _, devices in sorted(hosts.items())]
  if not np.array_equal(each[jax.process_index()], mesh.devices):
    raise ValueError(f"the mesh {mesh} orders this process's devices in its own way: make it by make_mesh.")
  return Mesh(np.stack(each), ("copy", *mesh.axis_names), axis_types=(AxisType.Auto,) * (1 + len(mesh.axis_names)))


def fitting(shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The partition of an array of this shape, of which dimensions that do not divide stay whole."""
  return PartitionSpec(
    *(part if size % _ways(part, mesh) == 0 else None for size, part in zip(shape, _here(axes, mesh), strict=True))
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
    for size, part in zip(array.shape, _here(axes, mesh), strict=True)
  ]
  return jax.lax.with_sharding_constraint(array, PartitionSpec(*parts))


def scan(step: Callable[[Carry, X], tuple[Carry, Y]], carry: Carry, xs: X) -> tuple[Carry, Y]:
  """`jax.lax.scan`, written out step by step on several CPU devices.

  XLA's CPU runtime starts a collective as soon as those before it have begun, and a loop has begun long before the
  collectives in it are through. Devices that take those in the loop and those behind it in another order wait for each
  other for ever, or, in several processes, add up what does not belong together.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return jax.lax.scan(step, carry, xs, unroll=mesh.size > 1 and mesh.abstract_device.device_kind == "cpu")


def each_device(
  fn: Callable[..., jax.Array], arrays: Sequence[jax.Array], names: Sequence[Axes], out: Axes
) -> jax.Array:
  """Calls `fn` on each device's part of some arrays, as kernels are, which the compiler cannot divide by itself.

  Args:
    fn: from parts to a part.
    arrays: whole.
    names: of each array's dimensions; those that do not divide stay whole.
    out: of the result's dimensions, divided as in the first array.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return fn(*arrays)
  specs = tuple(fitting(array.shape, axes, mesh) for array, axes in zip(arrays, names, strict=True))
  whole = {name: part for name, part in zip(names[0], specs[0], strict=True)}
  free = set(mesh.axis_names) - set(mesh.manual_axes)
  divided = jax.shard_map(
    fn, in_specs=specs, out_specs=PartitionSpec(*(whole[name] for name in out)), axis_names=free, check_vma=False
  )
  return divided(*arrays)


def each_slice(fn: Callable[..., T], batch: X, *whole: Any) -> T:
  """Calls `fn` once in each TPU slice, on its share of a batch, and adds what comes out over the slower network.

  Args:
    fn: (share, *whole) → arrays.
    batch: arrays [slices, …].
    whole: what every slice sees the whole of.
  """

  def one(batch: X, *whole: Any) -> T:
    return jax.lax.psum(fn(jax.tree.map(lambda array: array[0], batch), *whole), "slice")

  nowhere = PartitionSpec()
  divided = jax.shard_map(
    one,
    in_specs=(PartitionSpec("slice"), *[nowhere] * len(whole)),
    out_specs=nowhere,
    axis_names={"slice"},
    check_vma=False,
  )
  return divided(batch, *whole)


def slices() -> int:
  """How many TPU slices the mesh in use (`jax.set_mesh`) has; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape["slice"]


def ways(axis: str) -> int:
  """Into how many pieces the mesh in use (`jax.set_mesh`) splits a dimension of this name; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _ways(RULES[axis], mesh)


def whole_batch(rows: int) -> int:
  """The next number of rows that the mesh in use divides evenly, at least one row each."""
  pieces = ways("batch")
  return -(-max(rows, 1) // pieces) * pieces


def devices() -> int:
  """How many devices the mesh in use (`jax.set_mesh`) has; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().size or 1
