"""Attention behind one adapter: plain XLA (the reference, on any device), splash attention on TPU, cuDNN on GPU.

Shapes: B batch, T queries, S keys, K kv heads, G query heads per kv head, H head dim.
"""

import math
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp

from srlm_jax import mesh

MASKED = -1e30  # Finite, so that a row of padding, which sees nothing, gives no NaN.
KINDS = ("xla", "splash", "cudnn")
SPLASH_BLOCK = 128  # Its smallest block: lengths and head dims that it does not divide go to XLA.

QUERIES: mesh.Axes = ("batch", "length", "kv_heads", "group", "head_dim")
KEYS: mesh.Axes = ("batch", "kv_heads", "head_dim", "length")
VALUES: mesh.Axes = ("batch", "kv_heads", "length", "head_dim")


def best_for(platform: str) -> str:
  """The kind for a platform as `jax.Device.platform` names it."""
  return "splash" if platform == "tpu" else "xla"  # "cudnn" has run on no GPU of ours yet: by name alone.


def causal(kind: str, q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """Attention of texts to themselves, [B, T, K, G, H]: a token sees itself and what precedes it in its segment.

  Args:
    kind: one of KINDS; a shape that a kernel does not take goes to "xla".
    q_BTKGH, k_BKHS, v_BKSH: rotated queries and keys, and values; S = T.
    segments_BT: int32, equal for tokens of one text; 0 is padding, whose output means nothing.
  """
  length, head_dim = q_BTKGH.shape[1], q_BTKGH.shape[-1]
  if kind == "splash" and not (length % SPLASH_BLOCK or head_dim % 64):
    return splash(q_BTKGH, k_BKHS, v_BKSH, segments_BT)
  index_T = jnp.arange(length)
  mask_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, None, :] > 0)
  mask_BTS &= index_T[:, None] >= index_T[None, :]
  if kind == "cudnn" and q_BTKGH.dtype in (jnp.bfloat16, jnp.float16) and not head_dim % 8:
    return _cudnn(q_BTKGH, k_BKHS, v_BKSH, mask_BTS)
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


def _cudnn(q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  batch, length, kv_heads, groups, head_dim = q_BTKGH.shape
  q = q_BTKGH.reshape(batch, length, kv_heads * groups, head_dim)
  k, v = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3)
  mixed = jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None], implementation="cudnn")
  return mixed.reshape(q_BTKGH.shape)


def splash(
  q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
  """Splash attention, a Pallas kernel of JAX: [T, S] weights never exist. `interpret` runs it on a CPU, for tests."""
  length, head_dim = q_BTKGH.shape[1], q_BTKGH.shape[-1]

  def one_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    _, _, kv_heads, groups, _ = q.shape
    kernel = _kernel(kv_heads * groups, length, interpret)
    heads = (q / math.sqrt(head_dim)).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    heads = heads.reshape(-1, kv_heads * groups, length, head_dim)
    ids = splash_attention.SegmentIds(segments, segments)
    mixed: Any = jax.vmap(kernel)(heads, k.transpose(0, 1, 3, 2), v, ids)  # Residuals too, were they asked for.
    return mixed.reshape(-1, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)

  arrays, names = (q_BTKGH, k_BKHS, v_BKSH, segments_BT), (QUERIES, KEYS, VALUES, ("batch", "length"))
  return mesh.each_device(one_device, arrays, names, QUERIES)


def _kernel(heads: int, length: int, interpret: bool) -> splash_attention.splash_attention_kernel.SplashAttentionKernel:
  """The kernel of one device's heads; blocks as large as the length allows, at most 1,024."""
  block = next(size for size in (1024, 512, 256, SPLASH_BLOCK) if length % size == 0)
  sizes = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=min(block, 512),
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=min(block, 512),
    use_fused_bwd_kernel=True,
  )
  masks = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length)) for _ in range(heads)])
  return splash_attention.make_splash_mha(
    masks, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret, residual_checkpoint_name="attention"
  )
