"""Log-probs: shifted, masked, summed with the end token inside, and the same in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import batching, llama, logprobs

CONFIG = llama.LlamaConfig(vocab_size=37, embed=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffw=32, max_length=64)


@pytest.fixture(scope="module")
def model():
  return jax.tree.map(lambda leaf: leaf * 6, llama.Llama(CONFIG, jax.random.key(0)))


def make_batch(examples, length, packed=False):
  rows = batching.pack(examples, length, packed)
  return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def numpy_sequence_logprob(model, tokens, target_from):
  """Token by token, each from a forward pass over its prefix alone."""
  total = 0.0
  for place in range(max(target_from, 1), len(tokens)):
    row = jnp.asarray([tokens[:place]])
    logits = np.asarray(model.logits(model(row, jnp.arange(place)[None], jnp.ones_like(row))[0, -1]), np.float64)
    total += logits[tokens[place]] - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()
  return total


EXAMPLES = [
  batching.Example((5, 9, 11, 3, 2), 2),
  batching.Example((7, 8, 30, 31, 32, 33, 2), 4),
  batching.Example((4, 2), 1),
]


@pytest.mark.parametrize("chunk", [0, 1, 3, 64])
def test_sequence_logprobs_equal_a_plain_reference(model, chunk):
  found = logprobs.sequence_logprobs(model, make_batch(EXAMPLES, 9), chunk)
  expected = [numpy_sequence_logprob(model, example.tokens, example.target_from) for example in EXAMPLES]
  np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("chunk", [0, 2])
def test_logits_at_the_targets_alone_give_the_same(model, chunk):
  rows = batching.pack(EXAMPLES, 16, packed=False)
  plain = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  lean = batching.with_places(plain)
  assert lean["places"].shape == (len(EXAMPLES) * 15 // 4,)

  def total(batch):
    def summed(model):
      found, mask = logprobs.target_logprobs(model, batch, chunk)
      return found.sum(), (found, mask)

    return jax.value_and_grad(summed, has_aux=True)(model)

  ((_, (found, mask)), grads), ((_, (wanted, where)), expected) = total(lean), total(plain)
  np.testing.assert_array_equal(mask, where)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5), grads, expected)


def test_sequences_that_share_rows_are_summed_apart(model):
  batch = batching.compact({name: np.asarray(array) for name, array in make_batch(EXAMPLES, 16).items()}, 1)
  assert batch["tokens"].shape == (2, 8)  # The longest alone, the others behind each other.
  found = logprobs.sequence_logprobs(model, batch, 0, count=3)
  np.testing.assert_allclose(found, logprobs.sequence_logprobs(model, make_batch(EXAMPLES, 9), 0), rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 3, 64])
def test_continuations_are_scored_from_where_they_begin(model, chunk):
  rows, starts = [example.tokens for example in EXAMPLES], [example.target_from for example in EXAMPLES]
  likeliest = int(jnp.argmax(model.logits(model(jnp.array([[4]]), jnp.zeros((1, 1), int), jnp.ones((1, 1), int)))))
  lasts = np.array([[row[-1], likeliest] for row in rows] + [[0, 0]], np.int32)  # The last row is padding.
  lengths = np.array([*(len(row) - 1 for row in rows), 0], np.int32)
  padded = batching.pad([row[:-1] for row in rows], 8, 4)
  found, greedy = logprobs.continuation_scores(model, padded, np.array([*starts, 1], np.int32), lengths, lasts, chunk)
  for row, start, pair, scores in zip(rows, starts, lasts[:3], found, strict=False):
    expected = [numpy_sequence_logprob(model, (*row[:-1], last), start) for last in pair]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
  np.testing.assert_array_equal(
    greedy[2], [likeliest == 2, True]
  )  # After its one token; the others are no greedy ones.
  assert not greedy[:2].any() and found.dtype == jnp.float32


def test_the_end_token_counts(model):
  whole = logprobs.sequence_logprobs(model, make_batch([batching.Example((5, 9, 11, 2), 2)], 6), 0)
  cut = logprobs.sequence_logprobs(model, make_batch([batching.Example((5, 9, 11), 2)], 6), 0)
  assert whole[0] < cut[0] - 1e-3


def test_chunks_give_the_same_gradient(model):
  batch = make_batch(EXAMPLES, 9)
  gradients = [
    jax.grad(lambda model, chunk=chunk: logprobs.sequence_logprobs(model, batch, chunk).sum())(model)
    for chunk in (0, 3)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *gradients)


def test_packed_rows_give_what_separate_rows_give(model):
  def total(batch):
    hidden = model(batch["tokens"], batch["positions"], batch["segments"])
    values = logprobs.next_token_logprobs(model, hidden, batch["tokens"], 0)
    return float(jnp.sum(values * logprobs.target_mask(batch["targets"], batch["segments"])))

  assert total(make_batch(EXAMPLES, 16, packed=True)) == pytest.approx(total(make_batch(EXAMPLES, 9)), rel=1e-5)


def test_a_first_token_of_a_segment_is_never_predicted_from_the_segment_before():
  mask = logprobs.target_mask(jnp.array([[True] * 5]), jnp.array([[1, 1, 2, 2, 0]]))
  np.testing.assert_array_equal(mask, [[True, False, True, False]])
