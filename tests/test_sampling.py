"""Sampling: the nucleus, greedy decoding against the full forward, and texts that do not depend on their batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import generator, llama, mesh, sampling

CONFIG = llama.LlamaConfig(
  vocab_size=62, embed=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffw=32, max_length=256, tied=True
)
EOS = 2


@pytest.fixture(scope="module")
def model():
  fresh = llama.Llama(CONFIG, jax.random.key(3))
  return jax.tree.map(lambda leaf: leaf * 8, fresh)  # Sharper than 0.02-normal weights: texts differ and some end.


def make(model, rows=8, **how):
  return generator.Generator(model, EOS, sampling.Sampling(**how), rows=rows, max_prompt=40, seed=0)


def run(engine, requests):
  return {request.name: completions for request, completions in engine.generate(requests)}


@pytest.mark.parametrize("digit", [1, 3, 5])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_equals_sorting(top_p, digit):
  logits = np.random.default_rng(0).normal(0, 3, (16, 200)).astype(np.float32)
  probs = np.asarray(jax.nn.softmax(logits, axis=-1))
  kept = np.asarray(sampling.nucleus(jnp.asarray(probs), top_p, digit)) > 0
  for row in range(16):
    order = np.argsort(-probs[row])
    size = int(np.searchsorted(np.cumsum(probs[row][order]), top_p)) + 1
    assert set(np.flatnonzero(kept[row])) == set(order[:size])


@pytest.mark.parametrize("digit", [1, 3, 5])
def test_nucleus_keeps_a_certain_token_and_ties(digit):
  probs = jax.nn.softmax(jnp.array([[90.0, 0.0, 0.0], [1.0, 1.0, -50.0]]), axis=-1)
  kept = np.asarray(sampling.nucleus(probs, 0.5, digit))
  np.testing.assert_array_equal(kept > 0, [[True, False, False], [True, True, False]])
  np.testing.assert_array_equal(kept[kept > 0], probs[kept > 0])


@pytest.mark.parametrize("vocab", [3, 256, 257, 1000])
def test_draws_over_several_blocks_follow_the_distribution_and_leave_the_rest_alone(vocab):
  rng = np.random.default_rng(vocab)
  probs = rng.dirichlet(np.full(vocab, 0.3))
  keys = jax.random.wrap_key_data(rng.integers(0, 2**32, (20000, 2), dtype=np.uint32))
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs) + 1e-30), (20000, vocab))
  drawn = np.asarray(jax.jit(sampling.draw, static_argnums=(3, 4))(logits, keys, jnp.zeros(20000, jnp.int32), 1.0, 0.9))
  order = np.argsort(-probs)
  kept = order[: int(np.searchsorted(np.cumsum(probs[order]), 0.9)) + 1]
  assert set(drawn) <= set(kept)
  counts, wanted = np.bincount(drawn, minlength=vocab)[kept], 20000 * probs[kept] / probs[kept].sum()
  chi2 = float(np.sum((counts - wanted) ** 2 / wanted))
  assert abs(chi2 - (len(kept) - 1)) < 5 * np.sqrt(2 * max(len(kept) - 1, 1)), (chi2, len(kept))


def test_draws_follow_the_distribution():
  probs = np.array([0.5, 0.3, 0.15, 0.05])
  keys = jax.random.wrap_key_data(np.random.default_rng(0).integers(0, 2**32, (20000, 2), dtype=np.uint32))
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs)), (20000, 4))
  plain = (
    np.bincount(np.asarray(sampling.draw(logits, keys, jnp.zeros(20000, jnp.int32), 1.0, 1.0)), minlength=4) / 20000
  )
  np.testing.assert_allclose(plain, probs, atol=0.015)
  cut = np.bincount(np.asarray(sampling.draw(logits, keys, jnp.ones(20000, jnp.int32), 1.0, 0.75)), minlength=4) / 20000
  np.testing.assert_allclose(cut, [0.625, 0.375, 0, 0], atol=0.015)
  hot = np.bincount(np.asarray(sampling.draw(logits, keys, jnp.full(20000, 2), 0.5, 1.0)), minlength=4) / 20000
  np.testing.assert_allclose(hot, probs**2 / np.sum(probs**2), atol=0.015)


def full_forward_greedy(model, prompt, steps):
  tokens = list(prompt)
  for _ in range(steps):
    row = jnp.asarray([tokens])
    hidden = model(row, jnp.arange(len(tokens))[None], jnp.ones_like(row))
    tokens.append(int(jnp.argmax(model.logits(hidden[0, -1]))))
    if tokens[-1] == EOS:
      break
  return tuple(tokens[len(prompt) :])


def test_greedy_decoding_equals_the_full_forward(model):
  rng = np.random.default_rng(1)
  requests = [generator.Request(str(n), tuple(rng.integers(3, 62, n)), 1) for n in (1, 5, 17, 32, 33)]
  found = run(make(model, temperature=0.0, max_new=12), requests)
  for request in requests:
    assert found[request.name][0].tokens == full_forward_greedy(model, request.tokens, 12)


def test_the_text_depends_neither_on_the_batch_nor_on_the_order(model):
  rng = np.random.default_rng(2)
  requests = [generator.Request(f"r{n}", tuple(rng.integers(3, 62, rng.integers(1, 40))), 2) for n in range(9)]
  one = run(make(model, rows=4, temperature=1.0, top_p=0.9, max_new=16), requests)
  other = run(make(model, rows=16, temperature=1.0, top_p=0.9, max_new=16), requests[::-1])
  assert one == other


def test_samples_differ_and_the_seed_matters(model):
  request = generator.Request("r", (5, 6, 7), 4)
  texts = run(make(model, temperature=1.0, max_new=16), [request])["r"]
  assert len({text.tokens for text in texts}) > 1
  again = generator.Generator(model, EOS, sampling.Sampling(1.0, 0.9, 16), 8, 40, seed=1)
  assert run(again, [request])["r"] != texts


def test_an_end_token_ends_the_text_and_is_in_it(model):
  requests = [generator.Request(str(n), (3 + n,), 4) for n in range(40)]
  texts = [
    text
    for texts in run(make(model, rows=32, temperature=1.5, top_p=1.0, max_new=30), requests).values()
    for text in texts
  ]
  ended = [text for text in texts if text.finished]
  assert ended and len(ended) < len(texts)
  for text in texts:
    assert text.finished == (text.tokens[-1] == EOS) and EOS not in text.tokens[:-1]
    assert text.finished or len(text.tokens) == 30


def test_a_request_may_end_sooner(model):
  one = generator.Request("r", (5, 6, 7), 3)
  whole = run(make(model, temperature=1.0, max_new=16), [one])["r"]
  cut = run(make(model, temperature=1.0, max_new=16), [dataclasses.replace(one, longest=(4, 4, 2))])["r"]
  assert [text.tokens for text in cut] == [text.tokens[:most] for text, most in zip(whole, (4, 4, 2), strict=True)]
  assert not any(text.finished for text, all_of_it in zip(cut, whole, strict=True) if len(all_of_it.tokens) > 4)


def test_few_programs_whatever_the_requests(model):
  engine = make(model, temperature=1.0, max_new=7)
  programs = {sampling.prefill: 2, sampling.admit: 2, sampling.advance: 2, sampling.keep: 1}
  before = {program: program._cache_size() for program in programs}
  for count in (50, 1, 3, 7, 2, 19, 6, 4):
    run(engine, [generator.Request(f"{count} {n}", (5,) * (n % 31 + 1), 2) for n in range(count)])
  for program, most in programs.items():
    assert program._cache_size() - before[program] <= most, program


def test_prompts_of_all_lengths_share_the_slots_and_nothing_is_compiled_twice(model):
  rng = np.random.default_rng(5)
  requests = [generator.Request(f"g{n}", tuple(rng.integers(3, 62, n * 3 % 90 + 1)), 3) for n in range(60)]
  engine = dataclasses.replace(make(model, temperature=1.0, top_p=0.9, max_new=11), max_prompt=100)
  before = sampling.advance._cache_size()
  found = run(engine, requests)  # Prompts of up to 32, 48, 64 and 96 tokens.
  programs = [sampling.prefill, sampling.admit, sampling.keep, sampling.advance]
  sizes = [program._cache_size() for program in programs]
  assert sizes[-1] - before <= 2  # For 8 slots and for 4.
  assert engine.usage.drawn / engine.usage.offered > 0.8  # One tail for all, not one for each length.
  assert run(engine, requests[::-1]) == found
  assert [program._cache_size() for program in programs] == sizes
  alone = dataclasses.replace(engine, rows=4)
  assert all(run(alone, [one])[one.name] == found[one.name] for one in requests[::7])


def test_a_stop_string_ends_the_text_at_the_token_that_completes_it(model):
  def decode(ids):
    return "".join(chr(97 + token % 26) for token in ids)

  requests = [generator.Request(str(n), (3 + n,), 4) for n in range(20)]
  whole = run(make(model, temperature=1.5, top_p=1.0, max_new=40), requests)
  stop = ("ab", "q")
  engine = generator.Generator(model, EOS, sampling.Sampling(1.5, 1.0, 40, stop), 8, 40, seed=0, decode=decode)
  cut = run(engine, requests)
  stopped = 0
  for name, texts in whole.items():
    for text, shorter in zip(texts, cut[name], strict=True):
      ends = [n for n in range(1, len(text.tokens) + 1) if any(word in decode(text.tokens[:n]) for word in stop)]
      assert shorter.tokens == text.tokens[: ends[0] if ends else None]
      assert shorter.finished == (bool(ends) or text.finished)
      stopped += bool(ends)
  assert 20 < stopped < 80
  assert engine.usage.drawn == sum(len(text.tokens) for texts in cut.values() for text in texts)


def test_stop_strings_need_a_tokenizer(model):
  with pytest.raises(ValueError, match="need a tokenizer"):
    make(model, stop=("x",))
  for wrong in ("x", ("",)):
    with pytest.raises(ValueError, match="stop is a tuple"):
      sampling.Sampling(stop=wrong)


def test_logprobs_on_request_are_those_of_the_full_forward(model):
  request = generator.Request("r", (5, 6, 7), 3)
  engine = dataclasses.replace(make(model, temperature=0.7, top_p=0.8, max_new=12), logprobs=True)
  found = run(engine, [request])["r"]
  assert [text.tokens for text in found] == [
    text.tokens for text in run(make(model, temperature=0.7, top_p=0.8, max_new=12), [request])["r"]
  ]
  for text in found:
    row = jnp.asarray([request.tokens + text.tokens])
    hidden = model(row, jnp.arange(row.shape[1])[None], jnp.ones_like(row))
    full = jax.nn.log_softmax(model.logits(hidden[0]).astype(jnp.float32), axis=-1)
    wanted = [full[2 + place, token] for place, token in enumerate(text.tokens)]
    np.testing.assert_allclose(text.logprobs, wanted, rtol=1e-4, atol=1e-4)


def test_slots_are_filled_again_as_they_empty(model):
  requests = [generator.Request(str(n), (3 + n % 50,), 4) for n in range(40)]
  engine = make(model, rows=16, temperature=1.5, top_p=1.0, max_new=40)
  texts = [len(text.tokens) for texts in run(engine, requests).values() for text in texts]
  assert engine.usage.drawn == sum(texts) and len(texts) == 160
  together = sum(16 * max(texts[start : start + 16]) for start in range(0, 160, 16))  # Each batch to its longest text.
  assert sum(texts) / together < 0.75 < 0.85 < engine.usage.drawn / engine.usage.offered


def test_what_all_prompts_begin_with_goes_through_the_model_once(model, monkeypatch):
  rng, shapes = np.random.default_rng(4), []
  rubric = tuple(rng.integers(3, 62, 150))
  requests = [generator.Request(str(n), (*rubric, *rng.integers(3, 62, n % 20 + 1)), 3) for n in range(12)]
  engine = generator.Generator(model, EOS, sampling.Sampling(1.0, 0.9, 10), rows=8, max_prompt=200, seed=0)
  real = sampling.prefill

  def seen(model, rows, *rest, **how):
    shapes.append(rows.shape)
    return real(model, rows, *rest, **how)

  monkeypatch.setattr(sampling, "prefill", seen)
  found = run(engine, requests)
  assert shapes[0] == (1, 128) and {width for _, width in shapes[1:]} <= {32, 48}
  probs = {request.name: row for request, row in engine.option_probs(requests, [4, 5, 6])}
  monkeypatch.setattr(generator, "PREFIX", 10**6)
  assert run(engine, requests) == found
  for request, row in engine.option_probs(requests, [4, 5, 6]):
    np.testing.assert_allclose(row, probs[request.name], rtol=1e-3)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8), dict(tensor=2, fsdp=4)], ids=str)
def test_on_several_devices_the_texts_are_the_same(model, sizes):
  requests = [generator.Request(str(n), (3 + n,) * (n % 7 + 1), 3) for n in range(20)]
  alone = run(make(model, rows=16, temperature=1.2, max_new=12), requests)
  devices = mesh.make_mesh(**sizes)
  with jax.set_mesh(devices):
    placed = jax.device_put(model, mesh.shardings(model, devices))
    assert run(make(placed, rows=16, temperature=1.2, max_new=12), requests) == alone


def test_a_prompt_that_is_too_long_is_an_error(model):
  with pytest.raises(ValueError, match="41 tokens"):
    list(make(model, max_new=4).generate([generator.Request("long", (5,) * 41, 1)]))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new": 0}])
def test_impossible_sampling_is_refused(wrong):
  with pytest.raises(ValueError, match="needs temperature"):
    sampling.Sampling(**wrong)
