"""Sampling as jitted programs: a prompt goes through the model once, and slots decode its continuations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from srlm_jax import decode_attention, llama, mesh


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw tokens. `temperature` 0 is greedy; `top_p` 1 keeps the whole distribution.

  A text ends with the end token, after `max_new` tokens, or with the token that completes one of the `stop` strings.
  """

  temperature: float = 0.7
  top_p: float = 0.9
  max_new: int = 512
  stop: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new < 1:
      raise ValueError(f"{self}: needs temperature >= 0, 0 < top_p <= 1 and max_new >= 1.")
    if isinstance(self.stop, str) or not all(self.stop):
      raise ValueError(f"{self}: stop is a tuple of strings that are not empty, as in ('\\n\\n',).")
    object.__setattr__(self, "stop", tuple(self.stop))  # A configuration read from JSON gives a list.


BITS = 30  # Of a float32 from 0 to 1, from the highest that is ever set.
BLOCKS = 256  # Of a vocabulary, to draw from: a number that the vocabulary's shards divide.


def nucleus(probs_BV: jax.Array, top_p: float, digit: int = 1) -> jax.Array:
  """Probabilities with everything outside the smallest set of likeliest tokens that holds `top_p` of the mass set to 0.

  The threshold is found digit by digit in the bit patterns of the probabilities (non-negative floats order as their
  bits do): comparisons and sums, exact, and no sort of the vocabulary. Tokens tied at the threshold all stay.

  Args:
    probs_BV: float32, at most 1.
    top_p: below 1.
    digit: bits that a pass over the probabilities settles, a divisor of 30: 1 compares least, more make fewer passes,
      each of which costs a GPU several starts of kernels.
  """

  def above(bits_B: jax.Array) -> jax.Array:
    least_B = jax.lax.bitcast_convert_type(bits_B, jnp.float32)
    return jnp.where(probs_BV >= least_B[:, None], probs_BV, 0.0)

  def settle(number: jax.Array, low_B: jax.Array) -> jax.Array:  # mass(>= low) reaches top_p.
    shift = digit * (passes - 1 - number)
    masses_DB = jax.vmap(lambda value: jnp.sum(above(low_B | value << shift), axis=-1))(jnp.arange(1, 2**digit))
    return low_B | jnp.sum(masses_DB >= top_p, axis=0) << shift

  passes = BITS // digit
  low_B = jax.lax.fori_loop(0, passes, settle, jnp.zeros(len(probs_BV), jnp.int32), unroll=digit > 1)
  return above(low_B)


def _choose(weights_BN: jax.Array, uniforms_B: jax.Array) -> jax.Array:
  """int32 [B]: a place of each row by its weights (not negative, some positive), from a uniform number in [0, 1).

  A place without weight is never chosen, however the sums are rounded.
  """
  sums_BN = jnp.where(weights_BN > 0, jnp.cumsum(weights_BN, axis=-1), -1.0)
  return jnp.argmax(sums_BN > uniforms_B[:, None] * jnp.max(sums_BN, axis=-1, keepdims=True), axis=-1).astype(jnp.int32)


def draw(logits_BV: jax.Array, keys_B: jax.Array, steps_B: jax.Array, temperature: float, top_p: float) -> jax.Array:
  """int32 [B]: one token a row. Each row has its own key, folded with its own step: no row depends on another.

  First a block of the vocabulary is drawn, then a token of it: two random numbers a row, not one for each token.
  """
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  probs_BV = jax.nn.softmax(logits_BV.astype(jnp.float32) / temperature, axis=-1)
  if top_p < 1:
    probs_BV = nucleus(probs_BV, top_p, digit=3 if jax.default_backend() == "gpu" else 1)
  uniforms_B2 = jax.vmap(lambda key, step: jax.random.uniform(jax.random.fold_in(key, step), (2,)))(keys_B, steps_B)
  width = -(-probs_BV.shape[1] // BLOCKS)
  blocks_BNW = jnp.pad(probs_BV, ((0, 0), (0, BLOCKS * width - probs_BV.shape[1]))).reshape(-1, BLOCKS, width)
  block_B = _choose(jnp.sum(blocks_BNW, axis=-1), uniforms_B2[:, 0])
  tokens_BW = jnp.take_along_axis(blocks_BNW, block_B[:, None, None], axis=1)[:, 0]
  return block_B * width + _choose(tokens_BW, uniforms_B2[:, 1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prompts:
  """R prompts that have gone through the model, to be continued any number of times.

  Attributes:
    cache: their keys and values in P slots.
    logits_RV: float32, of the first token to draw.
    lengths_R: int32, their tokens.
  """

  cache: llama.Cache
  logits_RV: jax.Array
  lengths_R: jax.Array


@functools.partial(jax.jit, static_argnames=("dtype",))
def prefill(
  model: llama.Llama, prompts_RT: jax.Array, lengths_R: jax.Array, prefix: llama.Cache | None = None, *, dtype: str
) -> Prompts:
  """Sends prompts through the model.

  Args:
    model: the model.
    prompts_RT: int32, padded on the right; without the prefix.
    lengths_R: number of real tokens in each; a row of length 0 means nothing.
    prefix: the cache of a prompt that all of these begin with.
    dtype: of the KV cache.
  """
  hidden_RTD, cache = model.prefill(prompts_RT, lengths_R, dtype, prefix)
  last_RD = jnp.take_along_axis(hidden_RTD, jnp.maximum(lengths_R - 1, 0)[:, None, None], axis=1)[:, 0]
  return Prompts(cache, model.logits(last_RD), lengths_R + (prefix.valid_BS.shape[1] if prefix else 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Slots:
  """B slots, each of which decodes a continuation of its own at its own pace.

  The cache is a ring of S places. All slots write their next token at its one cursor, wherever in their texts they are,
  and a prompt is placed right before it; so nothing of a text is overwritten as long as prompt and continuation fit S.

  Attributes:
    cache: keys and values.
    logits_BV: float32, of the token to draw next.
    keys_B2: uint32, the RNG key of each continuation.
    lengths_B: int32, tokens of each prompt.
    counts_B: int32, tokens drawn.
    limits_B: int32, the most that may be drawn, G or less.
    done_B: bool, there is nothing to draw: the continuation has ended, or the slot is empty.
    tokens_BG: int32, the continuations.
    logprobs_BG: float32, of these tokens under the model, before temperature and top-p; [B, 0] where nobody asked.
  """

  cache: llama.Cache
  logits_BV: jax.Array
  keys_B2: jax.Array
  lengths_B: jax.Array
  counts_B: jax.Array
  limits_B: jax.Array
  done_B: jax.Array
  tokens_BG: jax.Array
  logprobs_BG: jax.Array


def ring(config: llama.LlamaConfig, prompt: int, longest: int) -> int:
  """Places that a prompt and its continuation need: the decoding kernel takes whole blocks alone."""
  whole = decode_attention.BLOCKS[-1] if config.attention == "splash" else 1
  return -(-(prompt + longest) // whole) * whole


@functools.partial(jax.jit, static_argnames=("config", "count", "prompt", "longest", "dtype", "logprobs"))
def empty(
  config: llama.LlamaConfig, *, count: int, prompt: int, longest: int, dtype: str, logprobs: bool = False
) -> Slots:
  """`count` empty slots for prompts of up to `prompt` tokens and continuations of up to `longest`."""
  numbers = jnp.zeros(count, jnp.int32)
  return Slots(
    cache=llama.init_cache(config, count, ring(config, prompt, longest), dtype),
    logits_BV=mesh.constrain(jnp.zeros((count, config.vocab_size), jnp.float32), ("batch", "vocab")),
    keys_B2=jnp.zeros((count, 2), jnp.uint32),
    lengths_B=numbers,
    counts_B=numbers,
    limits_B=numbers,
    done_B=jnp.ones(count, jnp.bool_),
    tokens_BG=jnp.zeros((count, longest), jnp.int32),
    logprobs_BG=jnp.zeros((count, longest if logprobs else 0), jnp.float32),
  )


def _insert(
  axis: int,
  cache: jax.Array,
  index_B: jax.Array,
  prompts: jax.Array,
  rows_A: jax.Array,
  sources_A: jax.Array,
  count: jax.Array,
  cursor: jax.Array,
) -> jax.Array:
  """One device's part of keys or values, with prompts placed into its rows, one row after the other and in place."""
  places, length = cache.shape[axis], prompts.shape[axis]

  def one(number: jax.Array, cache: jax.Array) -> jax.Array:
    row = rows_A[number] - index_B[0]
    here = (row >= 0) & (row < cache.shape[1])
    row = jnp.clip(row, 0, cache.shape[1] - 1)
    prompt = jax.lax.dynamic_slice_in_dim(prompts, sources_A[number], 1, axis=1)
    padded = jnp.pad(prompt, [(0, places - length if dim == axis else 0) for dim in range(prompt.ndim)])
    placed = jnp.roll(padded, cursor - length, axis=axis)
    kept = jax.lax.dynamic_slice_in_dim(cache, row, 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(cache, jnp.where(here, placed, kept), row, axis=1)

  return jax.lax.fori_loop(0, count, one, cache)


@functools.partial(jax.jit, donate_argnums=0)
def admit(
  slots: Slots,
  prompts: Prompts,
  rows_A: jax.Array,
  sources_A: jax.Array,
  count: jax.Array,
  limits_A: jax.Array,
  keys_A2: jax.Array,
) -> Slots:
  """Begins continuations of prompts in some slots.

  Args:
    slots: donated.
    prompts: what to continue.
    rows_A: int32, the slots; the first `count` count.
    sources_A: int32, the prompt of each.
    count: int32 scalar.
    limits_A: int32, the most tokens of each.
    keys_A2: uint32, the RNG key of each.
  """
  cache, cursor = slots.cache, slots.cache.cursor
  size, length = len(slots.done_B), prompts.cache.valid_BS.shape[1]
  rows_A = jnp.where(jnp.arange(len(rows_A)) < count, rows_A, size)  # Beyond the last: dropped.

  def take(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[rows_A].set(new, mode="drop")

  padded = jnp.pad(prompts.cache.valid_BS, ((0, 0), (0, cache.valid_BS.shape[1] - length)))
  valid_RS = jnp.roll(padded, cursor - length, axis=1)
  more = (rows_A, sources_A, count, cursor)

  def insert(old: jax.Array, new: jax.Array, axes: mesh.Axes, axis: int) -> jax.Array:
    whole = tuple(None if name == "batch" else name for name in axes)
    arrays = (old, jnp.arange(size), new, *more)
    every: tuple[mesh.Axes, ...] = (axes, ("batch",), whole, (None,), (None,), (), ())
    return mesh.each_device(functools.partial(_insert, axis), arrays, every, axes)

  return Slots(
    cache=llama.Cache(
      keys_LBKHS=insert(cache.keys_LBKHS, prompts.cache.keys_LBKHS, llama.CACHE_KEYS, 4),
      values_LBKSH=insert(cache.values_LBKSH, prompts.cache.values_LBKSH, llama.CACHE_VALUES, 3),
      valid_BS=take(cache.valid_BS, valid_RS[sources_A]),
      cursor=cursor,
    ),
    logits_BV=take(slots.logits_BV, prompts.logits_RV[sources_A]),
    keys_B2=take(slots.keys_B2, keys_A2),
    lengths_B=take(slots.lengths_B, prompts.lengths_R[sources_A]),
    counts_B=take(slots.counts_B, jnp.zeros_like(rows_A)),
    limits_B=take(slots.limits_B, limits_A),
    done_B=take(slots.done_B, jnp.zeros(len(rows_A), jnp.bool_)),
    tokens_BG=slots.tokens_BG,
    logprobs_BG=slots.logprobs_BG,
  )


def decode(model: llama.Llama, slots: Slots, sampling: Sampling, eos_id: int) -> Slots:
  """Draws one token for each slot that has one to draw, and computes what the next one is drawn from."""
  keys_B, longest = jax.random.wrap_key_data(slots.keys_B2), slots.tokens_BG.shape[1]
  drawn_B = draw(slots.logits_BV, keys_B, slots.counts_B, sampling.temperature, sampling.top_p)
  token_B = jnp.where(slots.done_B, eos_id, drawn_B)
  here_BG = (jnp.arange(longest) == slots.counts_B[:, None]) & ~slots.done_B[:, None]
  counts_B = slots.counts_B + ~slots.done_B
  done_B = slots.done_B | (token_B == eos_id) | (counts_B == slots.limits_B)
  position_B1 = (slots.lengths_B + slots.counts_B)[:, None]
  hidden_B1D, cache = model.cached(token_B[:, None], position_B1, ~done_B[:, None], slots.cache)
  logprobs_BG = slots.logprobs_BG
  if logprobs_BG.shape[1]:
    hit_BV = jnp.arange(slots.logits_BV.shape[1]) == token_B[:, None]  # A masked sum: the vocabulary may be divided.
    new_B = jnp.sum(jnp.where(hit_BV, slots.logits_BV, 0.0), axis=-1) - jax.nn.logsumexp(slots.logits_BV, axis=-1)
    logprobs_BG = jnp.where(here_BG, new_B[:, None], logprobs_BG)
  return Slots(
    cache=cache,
    logits_BV=model.logits(hidden_B1D[:, 0]),
    keys_B2=slots.keys_B2,
    lengths_B=slots.lengths_B,
    counts_B=counts_B,
    limits_B=slots.limits_B,
    done_B=done_B,
    tokens_BG=jnp.where(here_BG, token_B[:, None], slots.tokens_BG),
    logprobs_BG=logprobs_BG,
  )


@functools.partial(jax.jit, static_argnames=("steps", "sampling", "eos_id"), donate_argnums=1)
def advance(
  model: llama.Llama, slots: Slots, stopped_B: jax.Array, *, steps: int, sampling: Sampling, eos_id: int
) -> tuple[Slots, jax.Array]:
  """Up to `steps` tokens for each slot, fewer where all are done before; and how many steps that were (int32).

  Args:
    model: the model.
    slots: donated.
    stopped_B: bool, slots whose continuation the host has ended.
    steps: at the most.
    sampling: temperature and top-p.
    eos_id: the token that ends a continuation.
  """

  def unfinished(carry: tuple[Slots, jax.Array]) -> jax.Array:
    return (carry[1] < steps) & ~jnp.all(carry[0].done_B)

  def step(carry: tuple[Slots, jax.Array]) -> tuple[Slots, jax.Array]:
    return decode(model, carry[0], sampling, eos_id), carry[1] + 1

  slots = dataclasses.replace(slots, done_B=slots.done_B | stopped_B)
  return jax.lax.while_loop(unfinished, step, (slots, jnp.int32(0)))


@jax.jit
def keep(slots: Slots, rows_C: jax.Array) -> Slots:
  """The slots of these numbers alone: fewer, where there is no more to begin."""
  cache = slots.cache
  return Slots(
    cache=llama.Cache(
      keys_LBKHS=mesh.constrain(cache.keys_LBKHS[:, rows_C], llama.CACHE_KEYS),
      values_LBKSH=mesh.constrain(cache.values_LBKSH[:, rows_C], llama.CACHE_VALUES),
      valid_BS=cache.valid_BS[rows_C],
      cursor=cache.cursor,
    ),
    logits_BV=slots.logits_BV[rows_C],
    keys_B2=slots.keys_B2[rows_C],
    lengths_B=slots.lengths_B[rows_C],
    counts_B=slots.counts_B[rows_C],
    limits_B=slots.limits_B[rows_C],
    done_B=slots.done_B[rows_C],
    tokens_BG=slots.tokens_BG[rows_C],
    logprobs_BG=slots.logprobs_BG[rows_C],
  )


@jax.jit
def option_probs(prompts: Prompts, options_K: jax.Array) -> jax.Array:
  """float32 [R, K]: how the next token's probability is divided among K tokens (they sum to 1)."""
  return jax.nn.softmax(prompts.logits_RV[:, options_K], axis=-1)
