"""Llama (versions 2 and 3) as a plain pytree of stacked layers.

Shapes: B batch, T query, S cache or keys, D embed, K kv heads, G query heads per kv head, H head dim, F ffw, V vocab,
L layers.  `jax.jit`, `jax.grad` and `jax.eval_shape` take the module as it is.  The layers are stacked on a leading
dimension and scanned, so that compile time does not grow with them.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
import numpy as np

from srlm_jax import attention, decode_attention, mesh

REMAT = ("none", "full", "minimal")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretching of the rotary frequencies to a longer context."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_length: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The sizes of a model and how it computes.

  `dtype` is that of activations and matmuls, `param_dtype` that of the parameters; softmax, norms and logits are
  float32 always.  `dropout` falls on the embedding and on what each half of a layer adds.  `remat` says what the
  backward pass computes again: "none", "full" (all but a layer's input) or "minimal" (all but what matmuls with
  weights gave).  `attention` is one of attention.KINDS.
  """

  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffw: int
  max_length: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tied: bool = False
  dropout: float = 0.0
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "xla"

  def __post_init__(self) -> None:
    if self.heads % self.kv_heads:
      raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs.")
    if not 0.0 <= self.dropout < 1.0:
      raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r} must be one of {REMAT}.")
    if self.attention not in attention.KINDS:
      raise ValueError(f"attention={self.attention!r} must be one of {attention.KINDS}.")


_large = functools.partial(LlamaConfig, vocab_size=32000, head_dim=128, max_length=4096, dtype="bfloat16", remat="full")

SIZES: dict[str, LlamaConfig] = {
  "smoke": LlamaConfig(
    vocab_size=512, embed=48, layers=2, heads=4, kv_heads=2, head_dim=12, ffw=128, max_length=192, tied=True
  ),
  "tiny": LlamaConfig(
    vocab_size=512, embed=80, layers=4, heads=4, kv_heads=2, head_dim=20, ffw=224, max_length=192, tied=True
  ),
  "llama2_7b": _large(embed=4096, layers=32, heads=32, kv_heads=32, ffw=11008),
  "llama2_13b": _large(embed=5120, layers=40, heads=40, kv_heads=40, ffw=13824),
  "llama2_70b": _large(embed=8192, layers=80, heads=64, kv_heads=8, ffw=28672),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
  """Keys and values of the tokens so far, in slots that all rows fill together.

  Rows of different lengths differ in which slots are valid; a slot's place in the text is in its key (rotary), so slots
  and positions need not agree.  The orders of dimensions are those in which attention multiplies, so that a step reads
  the cache as it lies.
  """

  keys_LBKHS: jax.Array
  values_LBKSH: jax.Array
  valid_BS: jax.Array  # bool: the slot holds a real token.
  cursor: jax.Array  # int32 scalar: the next slot to write.


CACHE_KEYS: mesh.Axes = ("layers", *attention.KEYS)
CACHE_VALUES: mesh.Axes = ("layers", *attention.VALUES)


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike | None = None) -> Cache:
  """An empty cache of `length` slots, by default in the model's compute dtype."""
  dtype = dtype or config.dtype
  keys = jnp.zeros((config.layers, batch, config.kv_heads, config.head_dim, length), dtype)
  values = jnp.zeros((config.layers, batch, config.kv_heads, length, config.head_dim), dtype)
  return Cache(
    keys_LBKHS=mesh.constrain(keys, CACHE_KEYS),
    values_LBKSH=mesh.constrain(values, CACHE_VALUES),
    valid_BS=mesh.constrain(jnp.zeros((batch, length), jnp.bool_), ("batch", "length")),
    cursor=jnp.zeros((), jnp.int32),
  )


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
  """float32 [H/2]: radians per position of each pair of a head's features, Llama 3's scaling applied."""
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  # Turns within the original context: many stay as they are, few are slowed by `factor`, blended in between.
  turns = scaling.original_max_length * frequencies / (2 * np.pi)
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = np.clip(keep, 0.0, 1.0)
  return (keep * frequencies + (1 - keep) * frequencies / scaling.factor).astype(np.float32)


def _rope_tables(config: LlamaConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin, float32 [B, T, H/2]."""
  angles = positions_BT[:, :, None].astype(jnp.float32) * rope_frequencies(config)
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary embedding of heads [B, T, ..., H]; feature i turns with feature i + H/2 (Hugging Face's order)."""
  heads = tuple(range(2, x.ndim - 1))
  cos, sin = (jnp.expand_dims(table, heads) for table in tables)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rms_norm(x_BTD: jax.Array, scale_D: nnx.Param, eps: float) -> jax.Array:
  x = x_BTD.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return (x * scale_D[...].astype(jnp.float32)).astype(x_BTD.dtype)


def _residual(x_BTD: jax.Array) -> jax.Array:
  """What goes from layer to layer, its features divided over "tensor"; one token's are too few to divide."""
  return mesh.constrain(x_BTD, ("batch", "length", "residual" if x_BTD.shape[1] > 1 else "features"))


@jax.custom_vjp
def _gather(x_BTD: jax.Array) -> jax.Array:
  """A residual with all its features everywhere; the gradient is divided like a residual again."""
  return mesh.constrain(x_BTD, ("batch", "length", "features"))


# Without it the gradient would have to be whole, too: an all-reduce where a reduce-scatter, half of it, will do.
_gather.defvjp(lambda x_BTD: (_gather(x_BTD), None), lambda _, grad_BTD: (_residual(grad_BTD),))


def _merges(x_BTD: jax.Array) -> bool:
  """Whether matmuls of this input fetch their kernels whole and together: for many tokens on several devices.

  Left alone, the compiler computes with a kernel's shards one by one as they arrive and adds up, in bfloat16, what each
  contributes: that hides the network, at the price of cycles and precision.  For one token the copies would cost more
  than the matmuls; one device has no need.
  """
  return x_BTD.shape[1] > 1 and mesh.devices() > 1


def _kernel(kernel: jax.Array, axes: mesh.Axes, x_BTD: jax.Array) -> jax.Array:
  """A kernel of these dimensions as a matmul of this input takes it: in its type, and whole over "embed" if merged.

  Give several as one before this cast: between joint and cast the compiler finds the reduce-scatter of their gradient.
  """
  kernel = kernel.astype(x_BTD.dtype)
  if not _merges(x_BTD):
    return kernel
  return mesh.constrain(kernel, tuple("features" if axis == "embed" else axis for axis in axes))


@jax.custom_vjp
def _pair(x_BTD: jax.Array, kernels_2DF: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two matmuls [B, T, F] of one input, whose gradients are one matmul each: no sum over the pair in memory."""
  return jnp.einsum("btd,df->btf", x_BTD, kernels_2DF[0]), jnp.einsum("btd,df->btf", x_BTD, kernels_2DF[1])


def _pair_gradient(
  saved: tuple[jax.Array, jax.Array], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  x_BTD, kernels_2DF = saved
  grads_BT2F = jnp.stack(grads, axis=2)
  return jnp.einsum("btnf,ndf->btd", grads_BT2F, kernels_2DF), jnp.einsum("btd,btnf->ndf", x_BTD, grads_BT2F)


_pair.defvjp(lambda x_BTD, kernels_2DF: (_pair(x_BTD, kernels_2DF), (x_BTD, kernels_2DF)), _pair_gradient)


def _product(x: jax.Array) -> jax.Array:
  """Marks what came out of a matmul with weights: remat="minimal" keeps it for the backward pass."""
  return ad_checkpoint.checkpoint_name(x, "product")


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  if key is None or not rate:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def _normal(key: jax.Array, config: LlamaConfig, axes: tuple[str, ...]) -> nnx.Param:
  """A kernel, normal with standard deviation 0.02, whose dimensions have these names."""
  sizes = {
    "vocab": config.vocab_size,
    "embed": config.embed,
    "layers": config.layers,
    "kv_heads": config.kv_heads,
    "group": config.heads // config.kv_heads,
    "head_dim": config.head_dim,
    "ffw": config.ffw,
  }
  shape = tuple(sizes[axis] for axis in axes)
  return nnx.Param((0.02 * jax.random.normal(key, shape)).astype(config.param_dtype), axes=axes)


class Layers(nnx.Module):
  """All L layers' parameters, stacked; inside the scan over them the same class holds one layer's."""

  def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
    """Kernels are normal with standard deviation 0.02, norm scales 1."""
    keys = jax.random.split(key, 7)
    ones = jnp.ones((config.layers, config.embed), config.param_dtype)
    self.config = config
    # Norm scales are small: whole on every device.
    self.attention_norm = nnx.Param(ones, axes=("layers", "features"))
    self.q = _normal(keys[0], config, ("layers", "embed", "kv_heads", "group", "head_dim"))
    self.k = _normal(keys[1], config, ("layers", "embed", "kv_heads", "head_dim"))
    self.v = _normal(keys[2], config, ("layers", "embed", "kv_heads", "head_dim"))
    self.o = _normal(keys[3], config, ("layers", "kv_heads", "group", "head_dim", "embed"))
    self.ffw_norm = nnx.Param(ones, axes=("layers", "features"))
    self.gate = _normal(keys[4], config, ("layers", "embed", "ffw"))
    self.up = _normal(keys[5], config, ("layers", "embed", "ffw"))
    self.down = _normal(keys[6], config, ("layers", "ffw", "embed"))

  def project(self, x_BTD: jax.Array, tables: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer's queries [B, T, K, G, H], keys [B, K, H, T] and values [B, K, T, H]; queries and keys rotated."""
    x = _rms_norm(x_BTD, self.attention_norm, self.config.norm_eps)
    x = _gather(x)
    if _merges(x):  # One matmul, as keys and values are narrow; M: a kv head's queries, its key and its value.
      kernel_DKMH = jnp.concatenate([self.q[...], self.k[...][:, :, None], self.v[...][:, :, None]], axis=2)
      kernel_DKMH = _kernel(kernel_DKMH, ("embed", "kv_heads", "group", "head_dim"), x)
      all_BTKMH = jnp.einsum("btd,dkmh->btkmh", x, kernel_DKMH)
      q_BTKGH, k_BTKH, v_BTKH = all_BTKMH[:, :, :, :-2], all_BTKMH[:, :, :, -2], all_BTKMH[:, :, :, -1]
    else:
      q_BTKGH = jnp.einsum("btd,dkgh->btkgh", x, self.q[...].astype(x.dtype))
      k_BTKH = jnp.einsum("btd,dkh->btkh", x, self.k[...].astype(x.dtype))
      v_BTKH = jnp.einsum("btd,dkh->btkh", x, self.v[...].astype(x.dtype))
    q_BTKGH, k_BTKH, v_BTKH = map(_product, (_rotate(q_BTKGH, tables), _rotate(k_BTKH, tables), v_BTKH))
    return (
      mesh.constrain(q_BTKGH, attention.QUERIES),
      mesh.constrain(k_BTKH.transpose(0, 2, 3, 1), attention.KEYS),
      mesh.constrain(v_BTKH.transpose(0, 2, 1, 3), attention.VALUES),
    )

  def finish(self, x_BTD: jax.Array, mixed_BTKGH: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """One layer's output [B, T, D]: its input, plus the attention's projection, plus the feed-forward block."""
    rate, dtype = self.config.dropout, x_BTD.dtype
    keys = (None, None) if key is None else jax.random.split(key)
    o_KGHD = _kernel(self.o[...], ("kv_heads", "group", "head_dim", "embed"), x_BTD)
    added = jnp.einsum("btkgh,kghd->btd", mixed_BTKGH, o_KGHD)
    x_BTD = _product(_residual(x_BTD + _dropout(added, rate, keys[0])))
    x = _gather(_rms_norm(x_BTD, self.ffw_norm, self.config.norm_eps))
    # On one device all tokens in one dimension: XLA on CPU takes three times as long for the gradient of [B, T, D]
    # matmuls. On several the batch must stay a dimension of its own, or the compiler gathers all tokens everywhere.
    axes: mesh.Axes = ("batch", "length", "ffw")
    shape = x.shape
    if mesh.devices() == 1:
      x, axes = x.reshape(-1, shape[-1]), ("batch", "ffw")
    if _merges(x_BTD):
      gate, up = _pair(x, _kernel(jnp.stack([self.gate[...], self.up[...]]), (None, "embed", "ffw"), x_BTD))
    else:
      gate, up = (jnp.einsum("...d,df->...f", x, kernel[...].astype(dtype)) for kernel in (self.gate, self.up))
    inner = mesh.constrain(jax.nn.silu(_product(gate)) * _product(up), axes)
    down_FD = _kernel(self.down[...], ("ffw", "embed"), x_BTD)
    added = jnp.einsum("...f,fd->...d", inner, down_FD).reshape(shape)
    return _residual(x_BTD + _dropout(added, rate, keys[1]))


class Llama(nnx.Module):
  """A decoder-only language model; `config` is static, everything else are arrays."""

  def __init__(self, config: LlamaConfig, key: jax.Array) -> None:
    """Random weights.  For large models wrap it: `jax.jit(Llama, static_argnums=0, out_shardings=...)`."""
    keys = jax.random.split(key, 3)
    self.config = config
    self.embedding = _normal(keys[0], config, ("vocab", "embed"))
    self.layers = Layers(config, keys[1])
    self.norm = nnx.Param(jnp.ones((config.embed,), config.param_dtype), axes=("features",))
    self.head = None if config.tied else _normal(keys[2], config, ("embed", "vocab"))

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Hidden states [B, T, D] after the final norm; a token sees itself and what precedes it in its segment.

    Args:
      tokens_BT: int32 ids.
      positions_BT: int32 place of each token in its own text.
      segments_BT: int32, equal for tokens of one text; 0 is padding, whose output means nothing.
      dropout_key: turns dropout on, if the config's rate is above 0.
    """
    config = self.config
    tables = _rope_tables(config, positions_BT)
    first_key = layer_keys = None
    if dropout_key is not None and config.dropout > 0:
      keys = jax.random.split(dropout_key, config.layers + 1)
      first_key, layer_keys = keys[0], keys[1:]
    x_BTD = _dropout(self._embed(tokens_BT), config.dropout, first_key)

    def step(x_BTD: jax.Array, layer: tuple[Layers, jax.Array | None]) -> tuple[jax.Array, None]:
      weights, key = layer
      mixed_BTKGH = attention.causal(config.attention, *weights.project(x_BTD, tables), segments_BT)
      return weights.finish(x_BTD, mixed_BTKGH, key), None

    if config.remat == "full":
      step = jax.checkpoint(step, prevent_cse=False)
    elif config.remat == "minimal":
      step = jax.checkpoint(step, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names("product"))
    x_BTD, _ = mesh.scan(step, x_BTD, (self.layers, layer_keys))
    return _rms_norm(x_BTD, self.norm, config.norm_eps)

  def prefill(
    self, tokens_BT: jax.Array, lengths_B: jax.Array, dtype: jax.typing.DTypeLike, prefix: Cache | None = None
  ) -> tuple[jax.Array, Cache]:
    """Hidden states [B, T, D] of prompts, and a cache of P + T slots that holds them.

    Args:
      tokens_BT: int32 ids, padded on the right.
      lengths_B: number of real tokens in each row.
      dtype: of the cache.
      prefix: of one row and P slots, all valid: what every prompt begins with, before these tokens.
    """
    batch, length = tokens_BT.shape
    offset = prefix.valid_BS.shape[1] if prefix else 0
    index_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
    valid_BT = index_BT < lengths_B[:, None]
    tables = _rope_tables(self.config, index_BT + offset)
    before_BP = jnp.ones((batch, offset), jnp.int32) if prefix else None

    def whole(new: jax.Array, before: jax.Array | None, axis: int) -> jax.Array:
      if before is None:
        return new
      return jnp.concatenate([jnp.broadcast_to(before.astype(new.dtype), (batch, *before.shape[1:])), new], axis=axis)

    def step(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
      weights, before = layer
      q, k, v = weights.project(x_BTD, tables)
      k, v = whole(k, before and before[0], 3), whole(v, before and before[1], 2)
      mixed_BTKGH = attention.causal(self.config.attention, q, k, v, valid_BT.astype(jnp.int32), before_BP)
      return weights.finish(x_BTD, mixed_BTKGH), (k.astype(dtype), v.astype(dtype))

    earlier = (prefix.keys_LBKHS, prefix.values_LBKSH) if prefix else None
    x_BTD, (keys, values) = mesh.scan(step, self._embed(tokens_BT), (self.layers, earlier))
    valid_BS = jnp.pad(valid_BT, ((0, 0), (offset, 0)), constant_values=True)
    return _rms_norm(x_BTD, self.norm, self.config.norm_eps), Cache(
      keys_LBKHS=mesh.constrain(keys, CACHE_KEYS),
      values_LBKSH=mesh.constrain(values, CACHE_VALUES),
      valid_BS=mesh.constrain(valid_BS, ("batch", "length")),
      cursor=jnp.int32(offset + length),
    )

  def cached(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Hidden states [B, T, D] of the next T tokens, and the cache with them: prefill of prompts, or decoding (T = 1).

    Args:
      tokens_BT: int32 ids; they are written into T slots from the cursor on, which advances by T for all rows. One
        token at a time the slots are a ring: behind the last comes the first.
      positions_BT: int32 place of each token in its own text, whatever its slot.
      valid_BT: bool; a token that is not valid (padding, or a row that has ended) is seen by no other.
      cache: must have T slots left, where T > 1. Donate it to `jax.jit` to update it in place.
    """
    count, slots = tokens_BT.shape[1], cache.valid_BS.shape[1]
    start = cache.cursor % slots
    valid_BS = jax.lax.dynamic_update_slice(cache.valid_BS, valid_BT, (0, start))
    mask_BTS = jnp.broadcast_to(valid_BS[:, None, :], (len(valid_BS), count, slots))
    if count > 1:
      mask_BTS &= jnp.arange(slots)[None, :] <= start + jnp.arange(count)[:, None]
    tables = _rope_tables(self.config, positions_BT)

    def step(
      carry: tuple[jax.Array, jax.Array, jax.Array], layer: tuple[Layers, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
      x_BTD, keys, values = carry
      weights, index = layer
      q, k, v = weights.project(x_BTD, tables)
      # The whole cache is carried and one layer's new slots are written, so that nothing else of it is copied.
      keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), (index, 0, 0, 0, start))
      values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), (index, 0, 0, start, 0))
      if self.config.attention == "splash" and decode_attention.takes(q, keys):
        mixed_BTKGH = decode_attention.attend(q, keys, values, mask_BTS[:, 0], index)
      elif count == 1:
        mixed_BTKGH = attention.cached(self.config.attention, q, keys, values, mask_BTS, index)
      else:
        mixed_BTKGH = attention.xla(q, keys[index].astype(q.dtype), values[index].astype(q.dtype), mask_BTS)
      return (weights.finish(x_BTD, mixed_BTKGH), keys, values), None

    carry = (self._embed(tokens_BT), cache.keys_LBKHS, cache.values_LBKSH)
    (x_BTD, keys, values), _ = mesh.scan(step, carry, (self.layers, jnp.arange(self.config.layers)))
    return _rms_norm(x_BTD, self.norm, self.config.norm_eps), Cache(keys, values, valid_BS, cache.cursor + count)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] of hidden states [..., D] that the final norm has passed."""
    if self.head is None:
      kernel, pattern = self.embedding[...], "...d,vd->...v"
    else:
      kernel, pattern = self.head[...], "...d,dv->...v"
    return jnp.einsum(pattern, hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

  def _embed(self, tokens_BT: jax.Array) -> jax.Array:
    # Features gathered first, so that the look-up itself needs no more than a sum over the vocabulary's shards.
    table_VD = mesh.constrain(self.embedding[...], ("vocab", "features"))
    x_BTD = table_VD.at[tokens_BT].get(mode="clip").astype(self.config.dtype)
    return _residual(mesh.constrain(x_BTD, ("batch", "length", "features")))
