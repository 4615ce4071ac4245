"""Log-probabilities of given tokens under a model: shifted, masked, in float32, never with the full logits at once."""

import jax
import jax.numpy as jnp

from srlm_jax import llama, mesh


def target_mask(targets_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """bool [B, T-1]: whether position t's prediction of token t+1 counts: a target, and of the same segment."""
  same = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
  return targets_BT[:, 1:] & same


def _chunk_logprobs(model: llama.Llama, hidden_ND: jax.Array, next_N: jax.Array) -> jax.Array:
  logits_NV = model.logits(hidden_ND).astype(jnp.float32)
  # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
  hit_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == next_N[:, None]
  return jnp.sum(jnp.where(hit_NV, logits_NV, 0.0), axis=-1) - jax.nn.logsumexp(logits_NV, axis=-1)


def next_token_logprobs(model: llama.Llama, hidden_BTD: jax.Array, tokens_BT: jax.Array, chunk: int) -> jax.Array:
  """float32 [B, T-1]: log p(token t+1 | tokens up to t).

  Args:
    model: gives the logits of a hidden state.
    hidden_BTD: the model's output for `tokens_BT`.
    tokens_BT: int32 token ids.
    chunk: sequence positions whose logits [B, chunk, V] may exist at once; they are computed again in the backward
      pass. 0 means all.
  """
  batch, length = tokens_BT.shape
  steps = length - 1
  hidden, following = hidden_BTD[:, :-1], tokens_BT[:, 1:]
  width = hidden.shape[-1]
  if not chunk or steps <= chunk:
    return _chunk_logprobs(model, hidden.reshape(-1, width), following.reshape(-1)).reshape(batch, steps)
  count = -(-steps // chunk)
  extra = count * chunk - steps
  hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0))).reshape(batch, count, chunk, width).swapaxes(0, 1)
  following = jnp.pad(following, ((0, 0), (0, extra))).reshape(batch, count, chunk).swapaxes(0, 1)

  @jax.checkpoint
  def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
    states, ids = part
    return None, _chunk_logprobs(model, states.reshape(-1, width), ids.reshape(-1)).reshape(batch, chunk)

  _, out = mesh.scan(one, None, (hidden, following))
  return out.swapaxes(0, 1).reshape(batch, count * chunk)[:, :steps]


def sequence_logprobs(
  model: llama.Llama, batch: dict[str, jax.Array], chunk: int, dropout_key: jax.Array | None = None
) -> jax.Array:
  """float32 [B]: the sum of log-probs over each row's targets, its end token included (what DPO compares)."""
  hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"], dropout_key=dropout_key)
  logprobs_BT = next_token_logprobs(model, hidden_BTD, batch["tokens"], chunk)
  return jnp.sum(logprobs_BT * target_mask(batch["targets"], batch["segments"]), axis=-1)
