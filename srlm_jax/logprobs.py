"""Log-probabilities of given tokens under a model: shifted, masked, in float32, never with the full logits at once."""

from collections.abc import Callable, Mapping
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

from srlm_jax import llama, mesh

T = TypeVar("T")


def target_mask(targets_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """bool [B, T-1]: whether position t's prediction of token t+1 counts: a target, and of the same segment."""
  same = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
  return targets_BT[:, 1:] & same


def _chunk_logprobs(model: llama.Llama, hidden_ND: jax.Array, next_N: jax.Array) -> jax.Array:
  return _taken(model.logits(hidden_ND).astype(jnp.float32), next_N)


def _taken(logits_NV: jax.Array, next_N: jax.Array) -> jax.Array:
  # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
  hit_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == next_N[:, None]
  return jnp.sum(jnp.where(hit_NV, logits_NV, 0.0), axis=-1) - jax.nn.logsumexp(logits_NV, axis=-1)


def _chunk_matches(model: llama.Llama, hidden_ND: jax.Array, next_N: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The log-probs, and whether each token is the likeliest."""
  logits_NV = model.logits(hidden_ND).astype(jnp.float32)
  return _taken(logits_NV, next_N), jnp.argmax(logits_NV, axis=-1) == next_N


def next_token_logprobs(model: llama.Llama, hidden_BTD: jax.Array, tokens_BT: jax.Array, chunk: int) -> jax.Array:
  """float32 [B, T-1]: log p(token t+1 | tokens up to t).

  Args:
    model: gives the logits of a hidden state.
    hidden_BTD: the model's output for `tokens_BT`.
    tokens_BT: int32 token ids.
    chunk: sequence positions whose logits [B, chunk, V] may exist at once; they are computed again in the backward
      pass. 0 means all.
  """
  return _chunked(functools.partial(_chunk_logprobs, model), hidden_BTD[:, :-1], tokens_BT[:, 1:], chunk)


def _chunked(score: Callable[[jax.Array, jax.Array], T], hidden: jax.Array, following: jax.Array, chunk: int) -> T:
  """The arrays [batch, steps] that `score` makes, [N] each, of N hidden states and the tokens that follow them."""
  batch, steps, width = hidden.shape

  def rows(states: jax.Array, ids: jax.Array, length: int) -> T:
    found = score(states.reshape(-1, width), ids.reshape(-1))
    return jax.tree.map(lambda array: array.reshape(batch, length), found)

  if not chunk or steps <= chunk:
    return rows(hidden, following, steps)
  count = -(-steps // chunk)
  extra = count * chunk - steps
  hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0))).reshape(batch, count, chunk, width).swapaxes(0, 1)
  following = jnp.pad(following, ((0, 0), (0, extra))).reshape(batch, count, chunk).swapaxes(0, 1)

  @jax.checkpoint
  def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, T]:
    return None, rows(*part, chunk)

  _, out = mesh.scan(one, None, (hidden, following))
  return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(batch, count * chunk)[:, :steps], out)


def target_logprobs(
  model: llama.Llama, batch: Mapping[str, jax.Array], chunk: int, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """float32 [B, T-1]: log-probs of the targets, 0 elsewhere; and bool [B, T-1]: where they are.

  Args:
    model: what computes them.
    batch: tokens, segments, positions, targets, [B, T] each. With `places` (see `batching.with_places`) logits exist
      for the targets alone.
    chunk: see next_token_logprobs.
    dropout_key: turns dropout on.
  """
  tokens_BT = batch["tokens"]
  hidden_BTD = model(tokens_BT, batch["positions"], batch["segments"], dropout_key=dropout_key)
  mask_BT = target_mask(batch["targets"], batch["segments"])
  if "places" not in batch:
    return next_token_logprobs(model, hidden_BTD, tokens_BT, chunk) * mask_BT, mask_BT
  places_M, width = batch["places"], hidden_BTD.shape[-1]
  # One row of M "positions": each one's hidden state, and the token that follows it.
  hidden_MD = jnp.take(hidden_BTD[:, :-1].reshape(-1, width), places_M, axis=0, mode="clip")
  next_M = jnp.take(tokens_BT[:, 1:], places_M, mode="clip")
  score = functools.partial(_chunk_logprobs, model)
  found_M = _chunked(score, hidden_MD[None], next_M[None], chunk * len(tokens_BT))[0]
  flat_N = jnp.zeros(mask_BT.size).at[places_M].set(found_M, mode="drop")
  return flat_N.reshape(mask_BT.shape), mask_BT


def sequence_logprobs(
  model: llama.Llama,
  batch: Mapping[str, jax.Array],
  chunk: int,
  dropout_key: jax.Array | None = None,
  count: int | None = None,
) -> jax.Array:
  """float32 [count]: the sum of log-probs over each sequence's targets, its end token included (what DPO compares).

  A row is a sequence, unless `owners` in the batch says which of `count` each token belongs to.
  """
  logprobs_BT, _ = target_logprobs(model, batch, chunk, dropout_key)
  if "owners" not in batch:
    return jnp.sum(logprobs_BT, axis=-1)
  assert count is not None
  # A masked sum instead of a scatter, which adds in any order on a GPU.
  own_BTC = batch["owners"][:, 1:, None] == jnp.arange(count)
  return jnp.sum(jnp.where(own_BTC, logprobs_BT[..., None], 0.0), axis=(0, 1))


@functools.partial(jax.jit, static_argnames="chunk")
def continuation_scores(
  model: llama.Llama, rows_BT: jax.Array, starts_B: jax.Array, lengths_B: jax.Array, lasts_BK: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """How likely continuations of texts are: float32 [B, K], their log-probs; bool [B, K], whether they are greedy ones.

  The K continuations of a row differ in their last token alone: choices such as A, B, C and D cost one of them.

  Args:
    model: what computes them.
    rows_BT: int32, a text and its continuation but the last token, which has nothing to predict; padded on the right.
    starts_B: int32, where the continuation begins, at 1 or later: its first token, too, needs one before it.
    lengths_B: int32, tokens of each row, at least its start; 0 is padding, whose results mean nothing.
    lasts_BK: int32, the last tokens.
    chunk: see next_token_logprobs.
  """
  places_BT = jnp.broadcast_to(jnp.arange(rows_BT.shape[1]), rows_BT.shape)
  real_BT = places_BT < lengths_B[:, None]
  hidden_BTD = model(rows_BT, places_BT, real_BT.astype(jnp.int32))
  score = functools.partial(_chunk_matches, model)
  logprobs_BT, matches_BT = _chunked(score, hidden_BTD[:, :-1], rows_BT[:, 1:], chunk)
  asked_BT = (real_BT & (places_BT >= starts_B[:, None]))[:, 1:]
  sum_B = jnp.sum(jnp.where(asked_BT, logprobs_BT, 0.0), axis=-1)
  greedy_B = jnp.all(matches_BT | ~asked_BT, axis=-1)
  end_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
  logits_BV = model.logits(end_BD).astype(jnp.float32)
  taken_BK = jnp.take_along_axis(logits_BV, lasts_BK, axis=-1) - jax.nn.logsumexp(logits_BV, axis=-1)[:, None]
  likeliest_B1 = jnp.argmax(logits_BV, axis=-1)[:, None]
  return sum_B[:, None] + taken_BK, greedy_B[:, None] & (likeliest_B1 == lasts_BK)
