"""Sampling as one jitted program: prefill once per prompt, then decode all its samples until each has ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from srlm_jax import decode_attention, llama


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw tokens. `temperature` 0 is greedy; `top_p` 1 keeps the whole distribution."""

  temperature: float = 0.7
  top_p: float = 0.9
  max_new: int = 512

  def __post_init__(self) -> None:
    if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new < 1:
      raise ValueError(f"{self}: needs temperature >= 0, 0 < top_p <= 1 and max_new >= 1.")


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """Logits with everything outside the smallest set of likeliest tokens that holds `top_p` of the mass set to -inf.

  The threshold is found by bisection over the bit patterns of the probabilities (non-negative floats order as
  their bits do): 31 comparisons and sums, exact, and no sort of the vocabulary. Tokens tied at the threshold all stay.
  """
  probs_BV = jax.nn.softmax(logits_BV, axis=-1)
  bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)

  def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low_B, high_B = bounds  # mass(>= low) reaches top_p, mass(>= high) does not.
    middle_B = low_B + (high_B - low_B) // 2
    enough_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], probs_BV, 0.0), axis=-1) >= top_p
    return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

  batch = logits_BV.shape[0]
  one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
  low_B, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(batch, jnp.int32), jnp.full(batch, one + 1, jnp.int32)))
  return jnp.where(bits_BV >= low_B[:, None], logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, keys_B: jax.Array, step: jax.Array, temperature: float, top_p: float) -> jax.Array:
  """int32 [B]: one token a row. Each row has its own key, folded with the step: no row depends on another."""
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV.astype(jnp.float32) / temperature
  if top_p < 1:
    logits_BV = nucleus(logits_BV, top_p)
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits_BV.shape[1:]))(keys_B)
  return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)


def fan_out(cache: llama.Cache, samples: int, slots: int) -> llama.Cache:
  """The cache of R prompts for R · samples rows, with `slots` free slots behind: one prefill serves all samples."""

  def widen(array: jax.Array, batch_axis: int, slot_axis: int) -> jax.Array:
    array = jnp.repeat(array, samples, axis=batch_axis)
    return jnp.pad(array, [(0, slots if axis == slot_axis else 0) for axis in range(array.ndim)])

  keys, values = widen(cache.keys_LBKHS, 1, 4), widen(cache.values_LBKSH, 1, 3)
  return llama.Cache(keys, values, widen(cache.valid_BS, 0, 1), cache.cursor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """What decoding carries from token to token.

  Attributes:
    step: int32 scalar, tokens drawn so far.
    logits_BV: float32, of the token to draw next.
    cache: keys and values of prompts and continuations.
    lengths_B: int32, tokens of each row's prompt.
    done_B: bool, the row has ended.
    tokens_BG: int32, the continuations, filled with the end token.
    counts_B: int32, their lengths.
  """

  step: jax.Array
  logits_BV: jax.Array
  cache: llama.Cache
  lengths_B: jax.Array
  done_B: jax.Array
  tokens_BG: jax.Array
  counts_B: jax.Array


def free_slots(config: llama.LlamaConfig, prompt: int, longest: int) -> int:
  """Free slots behind a prompt: the decoding kernel takes whole blocks alone."""
  whole = decode_attention.BLOCKS[-1] if config.attention == "splash" else 1
  return -(-(prompt + longest) // whole) * whole - prompt


def prefill(
  model: llama.Llama,
  prompts_RP: jax.Array,
  lengths_R: jax.Array,
  *,
  samples: int,
  longest: int,
  eos_id: int,
  dtype: jax.typing.DTypeLike,
) -> State:
  """The state before the first token of `samples` continuations of each prompt; arguments as in `generate`."""
  prompts, batch = len(prompts_RP), len(prompts_RP) * samples
  hidden_RPD, cache = model.prefill(prompts_RP, lengths_R, dtype)
  last_RD = jnp.take_along_axis(hidden_RPD, jnp.maximum(lengths_R - 1, 0)[:, None, None], axis=1)[:, 0]
  lengths_B = jnp.repeat(lengths_R, samples, total_repeat_length=prompts * samples)
  return State(
    step=jnp.int32(0),
    logits_BV=jnp.repeat(model.logits(last_RD), samples, axis=0),
    cache=fan_out(cache, samples, free_slots(model.config, prompts_RP.shape[1], longest)),
    lengths_B=lengths_B,
    done_B=lengths_B == 0,
    tokens_BG=jnp.full((batch, longest), eos_id, jnp.int32),
    counts_B=jnp.zeros(batch, jnp.int32),
  )


def decode(model: llama.Llama, state: State, keys_B: jax.Array, sampling: Sampling, eos_id: int) -> State:
  """Draws one token for each row that has not ended, and computes what the next one is drawn from."""
  drawn_B = draw(state.logits_BV, keys_B, state.step, sampling.temperature, sampling.top_p)
  token_B = jnp.where(state.done_B, eos_id, drawn_B)
  done_B = state.done_B | (token_B == eos_id)
  hidden_B1D, cache = model.cached(
    token_B[:, None], (state.lengths_B + state.step)[:, None], ~done_B[:, None], state.cache
  )
  return State(
    step=state.step + 1,
    logits_BV=model.logits(hidden_B1D[:, 0]),
    cache=cache,
    lengths_B=state.lengths_B,
    done_B=done_B,
    tokens_BG=jax.lax.dynamic_update_slice(state.tokens_BG, token_B[:, None], (0, state.step)),
    counts_B=state.counts_B + ~state.done_B,
  )


@functools.partial(jax.jit, static_argnames=("samples", "sampling", "eos_id", "dtype"))
def generate(
  model: llama.Llama,
  prompts_RP: jax.Array,
  lengths_R: jax.Array,
  key_data_B2: jax.Array,
  *,
  samples: int,
  sampling: Sampling,
  eos_id: int,
  dtype: str,
) -> tuple[jax.Array, jax.Array]:
  """Samples `samples` continuations of each prompt.

  Args:
    model: the model.
    prompts_RP: int32, padded on the right; R prompts make B = R · samples rows, the samples of a prompt adjacent.
    lengths_R: number of real tokens in each prompt; 0 marks an empty slot, which is never sampled.
    key_data_B2: uint32, the RNG key of each row.
    samples: continuations of each prompt.
    sampling: temperature, top-p and the longest continuation G.
    eos_id: the token that ends a continuation.
    dtype: of the KV cache.

  Returns:
    tokens int32 [B, G], filled with `eos_id` after the end; lengths int32 [B], the end token included.
  """
  keys_B = jax.random.wrap_key_data(key_data_B2)
  start = prefill(model, prompts_RP, lengths_R, samples=samples, longest=sampling.max_new, eos_id=eos_id, dtype=dtype)

  def unfinished(state: State) -> jax.Array:
    return (state.step < sampling.max_new) & ~jnp.all(state.done_B)

  end = jax.lax.while_loop(unfinished, lambda state: decode(model, state, keys_B, sampling, eos_id), start)
  return end.tokens_BG, end.counts_B


@functools.partial(jax.jit, static_argnames=("dtype",))
def option_probs(
  model: llama.Llama, prompts_RP: jax.Array, lengths_R: jax.Array, options_K: jax.Array, *, dtype: str
) -> jax.Array:
  """float32 [R, K]: how the model divides its next token's probability among K options (they sum to 1).

  Args:
    model: the model.
    prompts_RP: int32, padded on the right.
    lengths_R: number of real tokens in each prompt; rows of length 0 mean nothing.
    options_K: int32, the token ids compared.
    dtype: of the KV cache.
  """
  hidden_RPD, _ = model.prefill(prompts_RP, lengths_R, dtype)
  last_RD = jnp.take_along_axis(hidden_RPD, jnp.maximum(lengths_R - 1, 0)[:, None, None], axis=1)[:, 0]
  return jax.nn.softmax(model.logits(last_RD)[:, options_K], axis=-1)
