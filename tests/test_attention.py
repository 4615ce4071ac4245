"""Attention: every kernel gives what plain XLA gives, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import attention

B, T, K, G, H = 2, 256, 2, 2, 128


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 3)
  segments = jnp.asarray(np.repeat([[1] * 100 + [2] * 100 + [0] * 56], B, 0), jnp.int32)
  shapes = ((B, T, K, G, H), (B, K, H, T), (B, K, T, H))
  return *(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)), segments


def real(mixed: jax.Array, segments: jax.Array) -> jax.Array:
  return mixed * (segments > 0)[:, :, None, None, None]


def test_splash_equals_xla_with_gradients(inputs: tuple[jax.Array, ...]) -> None:
  *arrays, segments = inputs

  def loss(kernel):
    return lambda *qkv: jnp.sum(real(kernel(*qkv), segments) ** 2)

  def xla(*qkv):
    return attention.causal("xla", *qkv, segments)

  def splash(*qkv):
    return attention.splash(*qkv, segments, segments, interpret=True)

  np.testing.assert_allclose(real(splash(*arrays), segments), real(xla(*arrays), segments), atol=1e-5)
  for found, wanted in zip(
    jax.grad(loss(splash), (0, 1, 2))(*arrays), jax.grad(loss(xla), (0, 1, 2))(*arrays), strict=True
  ):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_splash_divided_over_devices_equals_the_whole(inputs: tuple[jax.Array, ...]) -> None:
  inputs = (*inputs, inputs[-1])
  whole = attention.splash(*inputs, interpret=True)
  four = [jnp.concatenate([array] * 4) for array in inputs]  # Rows for every device.
  with jax.set_mesh(tiny_model.eight_devices()):
    parts = jax.jit(lambda *given: attention.splash(*given, interpret=True))(*four)
  np.testing.assert_allclose(parts[:B], whole, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("before", [0, 40])
def test_blocks_of_queries_equal_xla_with_gradients(dtype: str, before: int) -> None:
  length = 300  # Two blocks and a part of one.
  keys = jax.random.split(jax.random.key(2), 3)
  shapes = ((B, length, K, G, 16), (B, K, 16, before + length), (B, K, before + length, 16))
  arrays = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]
  segments = jnp.asarray([[1] * 130 + [2] * 150 + [0] * 20, [1] * 300], jnp.int32)
  earlier = jnp.ones((B, before), jnp.int32) if before else None

  def loss(kind):
    def summed(*qkv):
      mixed = attention.causal(kind, *qkv, segments, earlier)
      assert mixed.dtype == dtype
      return jnp.sum(real(mixed.astype(jnp.float32), segments) ** 2), real(mixed, segments)

    return jax.jit(jax.value_and_grad(summed, (0, 1, 2), has_aux=True))

  with jax.set_mesh(tiny_model.one_device()):
    assert "custom_vjp" in str(
      jax.make_jaxpr(lambda *qkv: attention.causal("blocked", *qkv, segments, earlier))(*arrays)
    )
    ((_, found), grads), ((_, wanted), expected) = (loss(kind)(*arrays) for kind in ("blocked", "xla"))
  loose = 1 if dtype == "float32" else 2e4
  np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), atol=2e-6 * loose)
  for one, other in zip(grads, expected, strict=True):
    np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-6, atol=1e-5 * loose)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 100])
def test_a_cache_in_blocks_of_rows_equals_the_whole(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
  keys = jax.random.split(jax.random.key(1), 4)
  q, k, v = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, [(6, 1, K, G, 8), (3, 6, K, 8, 20), (3, 6, K, 20, 8)], strict=False)
  )
  mask = jax.random.bernoulli(keys[3], 0.5, (6, 1, 20)).at[:, :, 0].set(True)
  monkeypatch.setattr(attention, "BLOCK_BYTES", rows_at_once * K * 8 * 20 * 4)
  blocked = jax.jit(lambda layer: attention.cached("blocked", q, k, v, mask, layer))(jnp.int32(2))
  np.testing.assert_allclose(blocked, attention.xla(q, k[2], v[2], mask), atol=1e-6)


def test_what_stands_before_is_seen_by_all(inputs: tuple[jax.Array, ...]) -> None:
  """The last 128 queries alone, against all keys, give what they give among all queries."""
  q, k, v, _ = inputs
  ones = jnp.ones((B, T), jnp.int32)
  whole = attention.causal("xla", q, k, v, ones)
  parted = (q[:, 128:], k, v, ones[:, 128:])
  np.testing.assert_allclose(attention.causal("xla", *parted, ones[:, :128]), whole[:, 128:], atol=1e-6)
  np.testing.assert_allclose(attention.splash(*parted, ones, interpret=True), whole[:, 128:], atol=1e-5)


def test_a_token_sees_its_own_text_up_to_itself(inputs: tuple[jax.Array, ...]) -> None:
  q, k, v, segments = inputs
  changed = v.at[:, :, 150].set(9.0)  # Of the second text.
  before, after = (attention.causal("xla", q, k, values, segments) for values in (v, changed))
  same = np.asarray(jnp.all(before == after, axis=(0, 2, 3, 4)))
  assert same[:150].all() and not same[150:200].any()


def test_a_shape_that_the_kernel_does_not_take_goes_to_xla(inputs: tuple[jax.Array, ...]) -> None:
  q, k, v, segments = inputs
  short = q[:, :100], k[..., :100], v[:, :, :100], segments[:, :100]
  one, two = (attention.causal(kind, *short) for kind in ("splash", "xla"))
  np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("before", [0, 64])
def test_cudnn_is_asked_for_the_same_attention(
  before: int, inputs: tuple[jax.Array, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
  """JAX's own implementation answers in its place: cuDNN needs a GPU."""
  asked, answer = [], jax.nn.dot_product_attention

  def stand_in(*args, implementation: str, **how):
    asked.append((implementation, how["is_causal"]))
    return answer(*args, **how)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  q, k, v, segments = inputs
  low = [array.astype(jnp.bfloat16) for array in (q[:, before:], k, v)]
  earlier = segments[:, :before] if before else None

  def loss(kind):
    def summed(*qkv):
      mixed = real(attention.causal(kind, *qkv, segments[:, before:], earlier), segments[:, before:])
      return jnp.sum(mixed.astype(jnp.float32) ** 2), mixed

    return jax.jit(jax.value_and_grad(summed, (0, 1, 2), has_aux=True))

  with jax.set_mesh(tiny_model.one_device()):
    ((_, found), grads), ((_, wanted), expected) = (loss(kind)(*low) for kind in ("cudnn", "xla"))
  assert asked == [("cudnn", not before)]
  for one, other in ((found, wanted), *zip(grads, expected, strict=True)):
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    assert jnp.linalg.norm(one - other) < 0.01 * jnp.linalg.norm(other)
  for cut in (low[0].astype(jnp.float32), low[0][:, 1:]):  # float32; an odd length.
    assert not attention.cudnn_takes(cut, k.shape[-1])


def test_the_best_kind_of_a_platform() -> None:
  assert [attention.best_for(name) for name in ("tpu", "cpu")] == ["splash", "blocked"]
  kinds = {"7.5": "xla", "8.0": "cudnn", "9.0": "cudnn", "12.0": "cudnn", "gfx942": "xla", "": "xla"}
  assert {name: attention.best_for("gpu", name) for name in kinds} == kinds
