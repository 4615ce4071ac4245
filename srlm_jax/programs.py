"""The jitted programs of a run with shapes in place of arrays, for compiling them without a device of their kind."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import config_dict

from srlm_jax import (
  batching,
  checkpoint,
  config as config_lib,
  llama,
  logprobs,
  mesh as mesh_lib,
  sampling,
  train_loop,
  train_step,
)


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function with abstract arguments.

  Attributes:
    name: "sft", "dpo", "reference", "prefill" or "decode".
    mesh: over which devices it is compiled.
    fn: the jitted function; call `lower` with the arguments under `jax.set_mesh(mesh)`.
    args: ShapeDtypeStructs with shardings.
    tokens: how many it processes at once, on all chips together.
    length: of the longest sequence that it attends to.
    passes: forward passes that its useful work is worth, 3 for a train step, 1 else.
  """

  name: str
  mesh: Mesh
  fn: Any
  args: tuple[Any, ...]
  tokens: int
  length: int
  passes: int


def _array(shape: tuple[int, ...], dtype: Any, mesh: Mesh, axes: mesh_lib.Axes) -> Any:
  # A ShapeDtypeStruct; Any, as it stands where an array will.
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, mesh_lib.fitting(shape, axes, mesh)))


def _rows(count: int, length: int, mesh: Mesh) -> dict[str, Any]:
  kinds = {"tokens": jnp.int32, "segments": jnp.int32, "positions": jnp.int32, "targets": jnp.bool_}
  return {name: _array((count, length), kind, mesh, ("batch", None)) for name, kind in kinds.items()}


def _train(name: str, settings: config_dict.ConfigDict, config: llama.LlamaConfig, mesh: Mesh) -> Program:
  section, chunk, length = settings[name], settings.model.logits_chunk, settings.model.max_length
  rows = section.batch * (2 if name == "dpo" else 1)
  batch, loss_fn = _rows(rows, length, mesh), functools.partial(train_step.sft_loss, chunk=chunk)
  if name == "dpo":
    sides = ("reference_chosen", "reference_rejected")
    batch |= {side: _array((section.batch,), jnp.float32, mesh, ("batch",)) for side in sides}
    loss_fn = functools.partial(train_step.dpo_loss, chunk=chunk, beta=section.beta)
  optimizer = config_lib.frozen(train_step.OptimizerConfig, {**section, "steps": 1000})
  state = train_loop.abstract_state(config, optimizer, mesh)
  step = train_loop.jit_step(loss_fn, optimizer, jax.tree.map(lambda leaf: leaf.sharding, state), section.accumulate)
  return Program(name, mesh, step, (state, batch, _array((), jnp.uint32, mesh, ())), rows * length, length, 3)


def _reference(settings: config_dict.ConfigDict, config: llama.LlamaConfig, mesh: Mesh) -> Program:
  rows, length = 2 * settings.dpo.batch, settings.model.max_length
  model = checkpoint.abstract_model(config, mesh)
  score = jax.jit(functools.partial(logprobs.sequence_logprobs, chunk=settings.model.logits_chunk))
  return Program("reference", mesh, score, (model, _rows(rows, length, mesh)), rows * length, length, 1)


def _generation(settings: config_dict.ConfigDict, config: llama.LlamaConfig, mesh: Mesh) -> list[Program]:
  """Prefill and one decoding step of the responses, at their longest."""
  samples, new = settings.responses.n, settings.responses.sampling.max_new
  length = batching.doubling_buckets(32, settings.model.max_length - new)[-1]
  ways = mesh.size // mesh.shape["tensor"]
  rows = -(-settings.generation.rows // ways) * ways
  prompts = -(-max(rows // samples // 2, 1) // ways) * ways
  model = checkpoint.abstract_model(dataclasses.replace(config, param_dtype=config.dtype), mesh)
  tokens = _array((prompts, length), jnp.int32, mesh, ("batch", None))
  how, eos_id = sampling.Sampling(**settings.responses.sampling), 2  # Any.
  first = jax.jit(functools.partial(sampling.prefill, dtype=config.dtype))
  arguments = (model, tokens, _array((prompts,), jnp.int32, mesh, ("batch",)))
  places = sampling.ring(config, length, new)
  layers, kv, width = config.layers, config.kv_heads, config.head_dim
  slots = sampling.Slots(
    cache=llama.Cache(
      keys_LBKHS=_array((layers, rows, kv, width, places), config.dtype, mesh, llama.CACHE_KEYS),
      values_LBKSH=_array((layers, rows, kv, places, width), config.dtype, mesh, llama.CACHE_VALUES),
      valid_BS=_array((rows, places), jnp.bool_, mesh, ("batch", None)),
      cursor=_array((), jnp.int32, mesh, ()),
    ),
    logits_BV=_array((rows, config.vocab_size), jnp.float32, mesh, ("batch", "vocab")),
    keys_B2=_array((rows, 2), jnp.uint32, mesh, ("batch", None)),
    lengths_B=_array((rows,), jnp.int32, mesh, ("batch",)),
    counts_B=_array((rows,), jnp.int32, mesh, ("batch",)),
    limits_B=_array((rows,), jnp.int32, mesh, ("batch",)),
    done_B=_array((rows,), jnp.bool_, mesh, ("batch",)),
    tokens_BG=_array((rows, new), jnp.int32, mesh, ("batch", None)),
    logprobs_BG=_array((rows, 0), jnp.float32, mesh, ("batch", None)),
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, slots)
  step = jax.jit(
    functools.partial(sampling.decode, sampling=how, eos_id=eos_id), donate_argnums=1, out_shardings=shardings
  )
  return [
    Program("prefill", mesh, first, arguments, prompts * length, length, 1),
    Program("decode", mesh, step, (model, slots), rows, places, 1),
  ]


def programs(
  settings: config_dict.ConfigDict, config: llama.LlamaConfig, mesh: Mesh, generation_mesh: Mesh
) -> list[Program]:
  """Every program that a run of this configuration compiles, at its largest shape.

  Args:
    settings: the configuration.
    config: the model, without dropout and remat of training.
    mesh: of training and of the reference's log-probs.
    generation_mesh: of sampling.
  """
  trained = dataclasses.replace(config, dropout=settings.model.dropout, remat=settings.model.remat)
  found = [_train("sft", settings, trained, mesh)]
  if settings.models > 1:
    if settings.dpo.method == "dpo":
      found += [_reference(settings, config, mesh), _train("dpo", settings, trained, mesh)]
    found += _generation(settings, config, generation_mesh)
  return found
