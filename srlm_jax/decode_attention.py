"""Attention of one new token a row to a layer of the whole cache: a Pallas kernel for TPU that reads it where it lies.

Plain XLA first copies the layer out of the stacked cache and turns it into another layout; this reads every live byte
once. Shapes as in attention.py, and L layers.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from srlm_jax import attention, mesh

BLOCKS = (2048, 1024, 512, 256, 128)  # Slots read at once: the largest that divides the cache.


def _kernel(
  layer_ref: jax.Array,
  q_ref: jax.Array,
  k_ref: jax.Array,
  v_ref: jax.Array,
  mask_ref: jax.Array,
  out_ref: jax.Array,
  top_ref: jax.Array,
  sum_ref: jax.Array,
  mixed_ref: jax.Array,
) -> None:
  """One row, one kv head, one block of slots: a softmax that goes on from block to block."""
  del layer_ref  # It chose the blocks.
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _() -> None:
    top_ref[...] = jnp.full_like(top_ref, attention.MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    mixed_ref[...] = jnp.zeros_like(mixed_ref)

  q_GH, k_HS, v_SH = q_ref[0, 0], k_ref[0, 0, 0], v_ref[0, 0, 0]
  logits_GS = jnp.dot(q_GH, k_HS, preferred_element_type=jnp.float32) / math.sqrt(q_GH.shape[-1])
  logits_GS = jnp.where(mask_ref[0] != 0, logits_GS, attention.MASKED)
  before_G1, after_G1 = top_ref[:, :1], jnp.maximum(top_ref[:, :1], jnp.max(logits_GS, axis=-1, keepdims=True))
  weights_GS, shrink_G1 = jnp.exp(logits_GS - after_G1), jnp.exp(before_G1 - after_G1)
  mixed_GH = jnp.dot(weights_GS.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
  top_ref[...] = jnp.broadcast_to(after_G1, top_ref.shape)
  sum_ref[...] = sum_ref[...] * shrink_G1 + jnp.sum(weights_GS, axis=-1, keepdims=True)
  mixed_ref[...] = mixed_ref[...] * shrink_G1 + mixed_GH

  @pl.when(block == pl.num_programs(2) - 1)
  def _() -> None:
    out_ref[0, 0] = (mixed_ref[...] / sum_ref[:, :1]).astype(out_ref.dtype)


def _one_device(
  q_BKGH: jax.Array,
  keys_LBKHS: jax.Array,
  values_LBKSH: jax.Array,
  mask_BS: jax.Array,
  layer: jax.Array,
  interpret: bool,
) -> jax.Array:
  batch, kv_heads, groups, width = q_BKGH.shape
  slots = keys_LBKHS.shape[-1]
  block = next(size for size in BLOCKS if slots % size == 0)
  read = batch * kv_heads * 2 * width * slots * keys_LBKHS.dtype.itemsize
  return pl.pallas_call(
    _kernel,
    out_shape=jax.ShapeDtypeStruct(q_BKGH.shape, q_BKGH.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch, kv_heads, slots // block),
      in_specs=[
        pl.BlockSpec((1, 1, groups, width), lambda b, k, s, layer: (b, k, 0, 0)),
        pl.BlockSpec((1, 1, 1, width, block), lambda b, k, s, layer: (layer[0], b, k, 0, s)),
        pl.BlockSpec((1, 1, 1, block, width), lambda b, k, s, layer: (layer[0], b, k, s, 0)),
        pl.BlockSpec((1, 1, block), lambda b, k, s, layer: (b, 0, s)),
      ],
      out_specs=pl.BlockSpec((1, 1, groups, width), lambda b, k, s, layer: (b, k, 0, 0)),
      scratch_shapes=[
        pltpu.VMEM((groups, 128), jnp.float32),
        pltpu.VMEM((groups, 128), jnp.float32),
        pltpu.VMEM((groups, width), jnp.float32),
      ],
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * batch * kv_heads * groups * width * slots,
      transcendentals=batch * kv_heads * groups * slots,
      bytes_accessed=read + mask_BS.size * 4 + 2 * q_BKGH.size * q_BKGH.dtype.itemsize,
    ),
    interpret=interpret,
    name="decode_attention",
  )(layer.reshape(1), q_BKGH, keys_LBKHS, values_LBKSH, mask_BS.astype(jnp.int32)[:, None])


def takes(q_BTKGH: jax.Array, keys_LBKHS: jax.Array) -> bool:
  """Whether the kernel takes these shapes: one query a row, whole tiles of slots and features."""
  return q_BTKGH.shape[1] == 1 and not keys_LBKHS.shape[-1] % BLOCKS[-1] and not q_BTKGH.shape[-1] % 128


def attend(
  q_BTKGH: jax.Array,
  keys_LBKHS: jax.Array,
  values_LBKSH: jax.Array,
  mask_BS: jax.Array,
  layer: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Attention [B, 1, K, G, H] of each row's one query to the slots of a layer that its mask allows.

  Args:
    q_BTKGH: rotated queries, T = 1.
    keys_LBKHS, values_LBKSH: the cache.
    mask_BS: bool, the slots that hold a token of the row.
    layer: int32 scalar.
    interpret: runs the kernel on a CPU, for tests.
  """
  run = functools.partial(_one_device, interpret=interpret)
  names: tuple[mesh.Axes, ...] = (
    ("batch", "kv_heads", "group", "head_dim"),
    ("layers", *attention.KEYS),
    ("layers", *attention.VALUES),
    ("batch", "length"),
    (),
  )
  arrays = (q_BTKGH[:, 0], keys_LBKHS, values_LBKSH, mask_BS, layer)
  return mesh.each_device(run, arrays, names, names[0])[:, None]
