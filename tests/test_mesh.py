import types
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax
import pytest

from srlm_jax import mesh


class Two(nnx.Module):
  """A module of two parameters, the second of which a test may spoil."""

  def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...] | None) -> None:
    self.good = nnx.Param(jnp.zeros((8, 4)), axes=("embed", "ffw"))
    self.other = nnx.Param(jnp.zeros(shape)) if axes is None else nnx.Param(jnp.zeros(shape), axes=axes)


def test_make_mesh_gives_what_is_left_to_the_free_axis() -> None:
  assert dict(mesh.make_mesh().shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1}
  assert dict(mesh.make_mesh(tensor=2).shape) == {"slice": 1, "data": 1, "fsdp": 4, "tensor": 2}
  assert dict(mesh.make_mesh(fsdp=2, tensor=2, data=-1).shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
  assert set(mesh.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  "sizes", [dict(fsdp=4), dict(tensor=3), dict(fsdp=16), dict(data=-1), dict(fsdp=0), dict(fsdp=-2, tensor=-4)]
)
def test_make_mesh_refuses_sizes(sizes: dict[str, int]) -> None:
  with pytest.raises(ValueError, match="mesh sizes"):
    mesh.make_mesh(**sizes)


def test_make_mesh_counts_the_slices_of_the_devices() -> None:
  tpus: Any = [types.SimpleNamespace(platform="tpu", slice_index=number // 4) for number in range(8)]
  with pytest.raises(ValueError, match=r"'fsdp': 8, .* the devices are of 2 slices: set mesh\.slice=2\."):
    mesh.make_mesh(devices=tpus)


def test_a_mesh_in_an_order_of_its_own_has_no_copies() -> None:
  assert mesh._copies(mesh.make_mesh()).shape["copy"] == 1
  with pytest.raises(ValueError, match="orders this process's devices in its own way: make it by make_mesh"):
    mesh._copies(mesh.make_mesh(devices=jax.devices()[::-1]))


def test_spec_follows_the_rules() -> None:
  assert mesh.spec(("layers", "embed", "kv_heads", "group", "head_dim")) == P(None, "fsdp", "tensor", None, None)
  assert mesh.spec(("batch", "length", "features")) == P(("slice", "data", "fsdp"), None, None)
  assert mesh.spec((None, "vocab")) == P(None, "tensor")


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (("ffw", "vocab"), "'ffw' and 'vocab' .* mesh axis 'tensor'"),
    (("batch", "embed"), "'batch' and 'embed' .* mesh axis 'fsdp'"),
    (("embed", "ffww"), "'ffww' .* unknown: use one of .*'ffw'"),
  ],
)
def test_spec_refuses(axes: tuple[str, ...], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    mesh.spec(axes)


def test_shardings_of_a_module_its_shapes_and_its_optimizer_state() -> None:
  devices = mesh.make_mesh(fsdp=4, tensor=2)
  module = Two((4, 6), ("features", "ffw"))
  for tree in (module, jax.eval_shape(lambda: module)):
    found = mesh.shardings(tree, devices)
    assert [leaf.spec for leaf in jax.tree.leaves(found)] == [P("fsdp", "tensor"), P(None, "tensor")]
    assert jax.tree.structure(found) == jax.tree.structure(module)
  mask = jax.tree.map(lambda leaf: leaf.shape[0] == 8, module)
  for transform in (optax.adamw(1e-3), optax.masked(optax.adam(1e-3), mask)):
    state = jax.eval_shape(transform.init, module)
    placed = jax.jit(transform.init, out_shardings=mesh.shardings(state, devices))(module)
    by_shape = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(placed)}
    assert by_shape[()] == P() and by_shape[(8, 4)] == P("fsdp", "tensor")


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Two((4, 6), None), r"\.other has no axis names"),
    (Two((4, 6), ("ffw",)), r"\.other has shape \(4, 6\) but the axis names"),
    (Two((4, 7), ("features", "ffw")), r"\.other .*'ffw' of size 7 does not divide into 2 pieces"),
    ({"loose": jnp.zeros(3)}, r"\['loose'\] of shape \(3,\) is in no nnx.Param"),
  ],
)
def test_shardings_refuses(module: object, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    mesh.shardings(module, mesh.make_mesh(fsdp=4, tensor=2))


def test_constrain() -> None:
  array = jnp.arange(32.0).reshape(8, 4)
  assert mesh.constrain(array, ("batch", "ffw")) is array  # No mesh in use.
  split = jax.jit(lambda x: mesh.constrain(x * 1, ("batch", "ffw")))
  with jax.set_mesh(mesh.make_mesh(fsdp=2, tensor=2, data=2)):
    assert split(array).sharding.spec == P(("data", "fsdp"), "tensor")  # Of an axis of one piece JAX says nothing.
    odd = split(array[:7])  # Seven rows do not divide by four: the same numbers all the same.
    assert odd.sharding.spec[1] == "tensor" and jnp.array_equal(odd, array[:7])
    with pytest.raises(ValueError, match="rows"):
      mesh.constrain(array, ("rows", "ffw"))
