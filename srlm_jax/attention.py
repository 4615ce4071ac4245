"""Attention behind one adapter: plain XLA (the reference, anywhere), in blocks on CPU, splash on TPU, cuDNN on NVIDIA.

Shapes: B batch, T queries, S keys, P keys before them, K kv heads, G query heads per kv head, H head dim.
"""

import math
import re
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp

from srlm_jax import mesh

MASKED = -1e30  # Finite, so that a row of padding, which sees nothing, gives no NaN.
KINDS = ("xla", "blocked", "splash", "cudnn")
BLOCK_BYTES = 2**21  # Of keys that "blocked" takes at once: what a core's own cache holds.
QUERY_BLOCK = 128  # Queries that "blocked" takes at once, or more of them where a text would have more than 16 blocks.
SPLASH_BLOCK = 128  # Its smallest block: lengths and head dims that it does not divide go to XLA.

QUERIES: mesh.Axes = ("batch", "length", "kv_heads", "group", "head_dim")
KEYS: mesh.Axes = ("batch", "kv_heads", "head_dim", "length")
VALUES: mesh.Axes = ("batch", "kv_heads", "length", "head_dim")


def best_for(platform: str, capability: str = "") -> str:
  """The kind for a platform and, of a GPU, its compute capability, as `jax.Device` names them.

  cuDNN has flash attention from 8.0 (Ampere) on; AMD's capabilities are no such numbers ("gfx90a").
  """
  if platform == "gpu":
    return "cudnn" if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8 else "xla"
  return {"tpu": "splash", "cpu": "blocked"}.get(platform, "xla")


def causal(
  kind: str,
  q_BTKGH: jax.Array,
  k_BKHS: jax.Array,
  v_BKSH: jax.Array,
  segments_BT: jax.Array,
  before_BP: jax.Array | None = None,
) -> jax.Array:
  """Attention of texts to themselves, [B, T, K, G, H]: a token sees itself and what precedes it in its segment.

  Args:
    kind: one of KINDS; a shape that a kernel does not take goes to "xla".
    q_BTKGH: rotated queries.
    k_BKHS, v_BKSH: rotated keys and values of P tokens that have no queries here, and then of the T; S = P + T.
    segments_BT: int32, equal for tokens of one text; 0 is padding, whose output means nothing.
    before_BP: int32, the segments of the P tokens; by default there are none.
  """
  length, places, head_dim = q_BTKGH.shape[1], k_BKHS.shape[-1], q_BTKGH.shape[-1]
  segments_BS = segments_BT if before_BP is None else jnp.concatenate([before_BP, segments_BT], axis=1)
  if kind == "splash" and not (length % SPLASH_BLOCK or places % SPLASH_BLOCK or head_dim % 64):
    return splash(q_BTKGH, k_BKHS, v_BKSH, segments_BT, segments_BS)
  mask_BTS = (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)
  mask_BTS &= places - length + jnp.arange(length)[:, None] >= jnp.arange(places)[None, :]
  if kind == "cudnn" and cudnn_takes(q_BTKGH, places):
    return cudnn(q_BTKGH, k_BKHS, v_BKSH, mask_BTS)
  if kind == "blocked" and length >= 2 * QUERY_BLOCK and mesh.devices() == 1:
    return blocked(q_BTKGH, k_BKHS, v_BKSH, mask_BTS)
  return xla(q_BTKGH, k_BKHS, v_BKSH, mask_BTS)


def xla(q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Softmax attention [B, T, K, G, H] under any mask; the G query heads share a kv head without a copy of it.

  Products are written in the order that a matmul gives (batch dimensions first) and the group joins the queries (M):
  XLA on CPU is half as fast for any other.
  """
  batch, length, kv_heads, groups, head_dim = q_BTKGH.shape
  q = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, head_dim)
  logits = jnp.einsum("bkmh,bkhs->bkms", q, k_BKHS, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
  mask_BMS = jnp.tile(mask_BTS, (1, groups, 1))
  weights = jax.nn.softmax(jnp.where(mask_BMS[:, None], logits, MASKED), axis=-1).astype(v_BKSH.dtype)
  mixed = jnp.einsum("bkms,bksh->bkmh", weights, v_BKSH)
  return mixed.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)


def blocked(q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Causal `xla` on one CPU: a row at a time, so many queries at a time, without the keys behind a block's last query.

  A block's weights stay in a core's cache, and are computed again for the gradient.
  """
  length, kv_heads, groups, head_dim = q_BTKGH.shape[1:]
  before = k_BKHS.shape[-1] - length
  size = max(QUERY_BLOCK, -(-length // 16))

  def row(arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
    q_TKGH, k_KHS, v_KSH, mask_TS = arrays
    done = []
    for start in range(0, length, size):
      q_KMH = q_TKGH[start : start + size].transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
      seen = min(before + start + size, before + length)
      mask_MS = jnp.tile(mask_TS[start : start + size, :seen], (groups, 1))
      mixed_KMH = _block(q_KMH, k_KHS[..., :seen], v_KSH[:, :seen], mask_MS)
      done.append(mixed_KMH.reshape(kv_heads, groups, -1, head_dim).transpose(2, 0, 1, 3))
    return jnp.concatenate(done)

  return jax.lax.map(row, (q_BTKGH, k_BKHS, v_BKSH, mask_BTS))


@jax.custom_vjp
def _block(q_KMH: jax.Array, k_KHS: jax.Array, v_KSH: jax.Array, mask_MS: jax.Array) -> jax.Array:
  return _block_forward(q_KMH, k_KHS, v_KSH, mask_MS)[0]


def _block_logits(q_KMH: jax.Array, k_KHS: jax.Array, mask_MS: jax.Array) -> jax.Array:
  logits_KMS = jnp.einsum("kmh,khs->kms", q_KMH, k_KHS, preferred_element_type=jnp.float32)
  return jnp.where(mask_MS, logits_KMS / math.sqrt(q_KMH.shape[-1]), MASKED)


def _block_forward(q_KMH: jax.Array, k_KHS: jax.Array, v_KSH: jax.Array, mask_MS: jax.Array) -> tuple[jax.Array, Any]:
  logits_KMS = _block_logits(q_KMH, k_KHS, mask_MS)
  top_KM1 = jnp.max(logits_KMS, axis=-1, keepdims=True)
  weights_KMS = jnp.exp(logits_KMS - top_KM1)
  total_KM1 = jnp.sum(weights_KMS, axis=-1, keepdims=True)
  mixed_KMH = jnp.einsum("kms,ksh->kmh", weights_KMS.astype(v_KSH.dtype), v_KSH) / total_KM1
  mixed_KMH = mixed_KMH.astype(v_KSH.dtype)
  return mixed_KMH, (q_KMH, k_KHS, v_KSH, mask_MS, mixed_KMH, top_KM1 + jnp.log(total_KM1))


def _block_gradient(saved: Any, grad_KMH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  q_KMH, k_KHS, v_KSH, mask_MS, mixed_KMH, norm_KM1 = saved
  weights_KMS = jnp.exp(_block_logits(q_KMH, k_KHS, mask_MS) - norm_KM1)
  to_v = jnp.einsum("kms,kmh->ksh", weights_KMS.astype(grad_KMH.dtype), grad_KMH)
  inner_KMS = jnp.einsum("kmh,ksh->kms", grad_KMH, v_KSH, preferred_element_type=jnp.float32)
  inner_KMS -= jnp.sum(grad_KMH.astype(jnp.float32) * mixed_KMH, axis=-1, keepdims=True)
  inner_KMS = (weights_KMS * inner_KMS / math.sqrt(q_KMH.shape[-1])).astype(q_KMH.dtype)
  return jnp.einsum("kms,khs->kmh", inner_KMS, k_KHS), jnp.einsum("kmh,kms->khs", q_KMH, inner_KMS), to_v, None


_block.defvjp(_block_forward, _block_gradient)


def cached(
  kind: str, q_B1KGH: jax.Array, keys_LBKHS: jax.Array, values_LBKSH: jax.Array, mask_B1S: jax.Array, layer: jax.Array
) -> jax.Array:
  """Attention [B, 1, K, G, H] of one new token of each row to one layer of a cache.

  "blocked" takes a few rows at a time, so that keys and values come from memory once and are used where they lie in
  a core's cache; XLA on CPU copies the layer otherwise, three times as slow.
  """
  _, batch, kv_heads, head_dim, places = keys_LBKHS.shape
  rows = max(BLOCK_BYTES // (kv_heads * head_dim * places * keys_LBKHS.dtype.itemsize), 1)
  rows = next(size for size in range(min(rows, batch), 0, -1) if batch % size == 0)
  if kind != "blocked" or mesh.devices() > 1:
    return xla(q_B1KGH, keys_LBKHS[layer].astype(q_B1KGH.dtype), values_LBKSH[layer].astype(q_B1KGH.dtype), mask_B1S)

  def block(first: jax.Array) -> jax.Array:
    def part(array: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(array, first, rows)

    def of_layer(cache: jax.Array) -> jax.Array:
      start, sizes = (layer, first, 0, 0, 0), (1, rows, *cache.shape[2:])
      return jax.lax.dynamic_slice(cache, start, sizes)[0].astype(q_B1KGH.dtype)

    return xla(part(q_B1KGH), of_layer(keys_LBKHS), of_layer(values_LBKSH), part(mask_B1S))

  return jax.lax.map(block, jnp.arange(0, batch, rows)).reshape(q_B1KGH.shape)


def cudnn_takes(q_BTKGH: jax.Array, places: int) -> bool:
  """Whether cuDNN's flash attention takes these shapes, gradients too: half precision, even lengths."""
  _, length, _, _, head_dim = q_BTKGH.shape
  half = q_BTKGH.dtype in (jnp.bfloat16, jnp.float16)
  return half and not head_dim % 8 and head_dim <= 128 and not length % 2 and not places % 2


def cudnn(q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """cuDNN's flash attention [B, T, K, G, H]: [T, S] weights never exist, but for the mask.

  What lies behind the diagonal is not computed, unless there are P tokens before: cuDNN's own causal mask begins where
  keys and queries do.
  """

  def one_device(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    batch, length, kv_heads, groups, head_dim = q.shape
    heads = q.reshape(batch, length, kv_heads * groups, head_dim)
    k_BSKH, v_BSKH, causal = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3), length == k.shape[-1]
    mixed = jax.nn.dot_product_attention(
      heads, k_BSKH, v_BSKH, mask=mask[:, None], is_causal=causal, implementation="cudnn"
    )
    return mixed.reshape(q.shape)

  arrays = (q_BTKGH, k_BKHS, v_BKSH, mask_BTS)
  return mesh.each_device(one_device, arrays, (QUERIES, KEYS, VALUES, ("batch", "length", "length")), QUERIES)


def splash(
  q_BTKGH: jax.Array,
  k_BKHS: jax.Array,
  v_BKSH: jax.Array,
  segments_BT: jax.Array,
  segments_BS: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention, a Pallas kernel of JAX: [T, S] weights never exist. `interpret` runs it on a CPU, for tests."""
  length, places, head_dim = q_BTKGH.shape[1], k_BKHS.shape[-1], q_BTKGH.shape[-1]

  def one_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, all_segments: jax.Array) -> jax.Array:
    _, _, kv_heads, groups, _ = q.shape
    kernel = _kernel(kv_heads * groups, length, places, interpret)
    heads = (q / math.sqrt(head_dim)).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    heads = heads.reshape(-1, kv_heads * groups, length, head_dim)
    ids = splash_attention.SegmentIds(segments, all_segments)
    mixed: Any = jax.vmap(kernel)(heads, k.transpose(0, 1, 3, 2), v, ids)  # Residuals too, were they asked for.
    return mixed.reshape(-1, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)

  arrays = (q_BTKGH, k_BKHS, v_BKSH, segments_BT, segments_BS)
  names = (QUERIES, KEYS, VALUES, ("batch", "length"), ("batch", "length"))
  return mesh.each_device(one_device, arrays, names, QUERIES)


def _kernel(
  heads: int, length: int, places: int, interpret: bool
) -> splash_attention.splash_attention_kernel.SplashAttentionKernel:
  """The kernel of one device's heads; blocks as large as the lengths allow, at most 1,024."""
  queries, keys = (next(b for b in (1024, 512, 256, SPLASH_BLOCK) if size % b == 0) for size in (length, places))
  sizes = splash_attention.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_kv_compute=min(keys, 512),
    block_q_dkv=queries,
    block_kv_dkv=keys,
    block_kv_dkv_compute=min(keys, 512),
    use_fused_bwd_kernel=True,
  )
  mask = splash_attention.CausalMask((length, places), offset=places - length)
  masks = splash_attention.MultiHeadMask([mask for _ in range(heads)])
  return splash_attention.make_splash_mha(
    masks, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret, residual_checkpoint_name="attention"
  )
