"""The decoding kernel gives what plain XLA gives, on one device and on several, and through the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import attention, decode_attention, llama

L, B, K, G, H, S = 3, 4, 2, 2, 128, 384


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = ((B, 1, K, G, H), (L, B, K, H, S), (L, B, K, S, H))
  mask = jax.random.bernoulli(keys[3], 0.5, (B, S)).at[1, :130].set(False)  # A first block that holds nothing.
  return *(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)), mask


@pytest.mark.parametrize("layer", range(L))
def test_it_equals_xla(inputs: tuple[jax.Array, ...], layer: int) -> None:
  q, k, v, mask = inputs
  found = decode_attention.attend(q, k, v, mask, jnp.int32(layer), interpret=True)
  np.testing.assert_allclose(found, attention.xla(q, k[layer], v[layer], mask[:, None]), atol=2e-6)


def test_divided_over_devices_it_is_the_same(inputs: tuple[jax.Array, ...]) -> None:
  whole = decode_attention.attend(*inputs, jnp.int32(1), interpret=True)
  with jax.set_mesh(tiny_model.eight_devices()):
    parts = jax.jit(lambda *given: decode_attention.attend(*given, jnp.int32(1), interpret=True))(*inputs)
  np.testing.assert_allclose(parts, whole, atol=2e-6)


def test_the_model_decodes_through_it_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
  shape = dataclasses.replace(tiny_model.CONFIG, head_dim=128, attention="xla")
  model = llama.Llama(shape, jax.random.key(0))
  tokens, lengths = jnp.arange(1, 2 * 20 + 1).reshape(2, 20), jnp.array([20, 13])
  _, cache = model.prefill(tokens, lengths, "float32")
  room = [(0, 0)] * 4 + [(0, 108)]
  cache = llama.Cache(
    jnp.pad(cache.keys_LBKHS, room),
    jnp.pad(cache.values_LBKSH, [*room[:3], room[4], room[3]]),
    jnp.pad(cache.valid_BS, [(0, 0), (0, 108)]),
    cache.cursor,
  )
  called, attend = [], decode_attention.attend

  def counted(*given: jax.Array) -> jax.Array:
    called.append(1)
    return attend(*given, interpret=True)

  monkeypatch.setattr(decode_attention, "attend", counted)
  outs = []
  for kind in ("xla", "splash"):
    model.config = model.layers.config = dataclasses.replace(shape, attention=kind)
    outs.append(model.cached(jnp.array([[5], [6]]), lengths[:, None], jnp.ones((2, 1), bool), cache)[0])
  assert called
  np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)
