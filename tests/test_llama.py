import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from srlm_jax import convert, llama, mesh

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llama.npz"
CONFIG = llama.LlamaConfig(
  vocab_size=64, embed=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffw=32, max_length=64, param_dtype="float32"
)


@functools.cache
def make(config: llama.LlamaConfig = CONFIG) -> llama.Llama:
  """A model whose weights are large enough that attention and dropout matter."""
  random = np.random.RandomState(0)
  shapes = jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.2, leaf.shape), leaf.dtype), shapes)


@jax.jit
def forward(model: llama.Llama, batch: tuple[jax.Array, ...], key: jax.Array | None = None) -> jax.Array:
  return model.logits(model(*batch, dropout_key=key))


step = jax.jit(llama.Llama.cached)


def rows(count: int, length: int, seed: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Random tokens, positions from 0, one segment a row."""
  tokens = jax.random.randint(jax.random.key(seed), (count, length), 0, CONFIG.vocab_size)
  return tokens, jnp.tile(jnp.arange(length), (count, 1)), jnp.ones((count, length), jnp.int32)


def greedy(model: llama.Llama, prompt: np.ndarray, count: int) -> list[int]:
  """The likeliest continuation of one prompt, through the cache."""
  length = len(prompt)
  cache = llama.init_cache(model.config, 1, length + count)
  tokens, positions = jnp.asarray(prompt)[None], jnp.arange(length)[None]
  out: list[int] = []
  for _ in range(count):
    hidden, cache = step(model, tokens, positions, jnp.ones_like(tokens, bool), cache)
    out.append(int(jnp.argmax(model.logits(hidden[0, -1]))))
    tokens, positions = jnp.full((1, 1), out[-1]), jnp.full((1, 1), length + len(out) - 1)
  return out


# Against transformers


@pytest.mark.parametrize("case", ["llama2", "llama3"])
def test_logits_and_greedy_tokens_of_transformers(case: str, tmp_path: pathlib.Path) -> None:
  with np.load(GOLDEN) as file:
    golden = {name.removeprefix(f"{case}/"): file[name] for name in file.files if name.startswith(f"{case}/")}
  weights = {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}
  safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(str(golden["config"]))
  model = convert.import_hf(tmp_path)
  assert (model.config.rope_scaling is not None) == model.config.tied == (case == "llama3")
  tokens = jnp.asarray(golden["tokens"])
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  logits = forward(model, (tokens, positions, jnp.ones_like(tokens)))
  np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
  assert greedy(model, golden["tokens"][0], len(golden["greedy"])) == golden["greedy"].tolist()


LLAMA3_ROPE = dict(
  rope_type="llama3",
  rope_theta=1e4,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)


@pytest.mark.parametrize(
  "changes",
  [
    dict(num_key_value_heads=4, head_dim=4),
    dict(num_key_value_heads=1, head_dim=8, tie_word_embeddings=True),
    dict(num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
  ],
  ids=["all heads", "one kv head, tied", "llama3"],
)
def test_transformers_itself(changes: dict[str, object], tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch", reason="needs torch; the golden file stands in for it")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**sizes, max_position_embeddings=128, initializer_range=0.4, **changes)
  ).eval()
  theirs.save_pretrained(tmp_path)
  model = convert.import_hf(tmp_path)
  tokens, positions, segments = rows(2, 40)
  with torch.no_grad():
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    expected = theirs(ids).logits.numpy()
    continued = theirs.generate(
      ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
  np.testing.assert_allclose(forward(model, (tokens, positions, segments)), expected, atol=1e-4)
  assert greedy(model, np.asarray(tokens[0]), 8) == continued[0, 40:].tolist()


# Rotary frequencies, by hand


def test_rope_frequencies() -> None:
  config = dataclasses.replace(CONFIG, head_dim=8, rope_theta=10000.0)
  np.testing.assert_allclose(llama.rope_frequencies(config), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
  # Within 200 tokens they turn 31.8, 3.18, 0.318 and 0.0318 times: kept above 4, slowed below 1, blended between:
  # (3.183 - 1) / (4 - 1) = 0.7277 of the second is kept.
  scaling = llama.RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=200)
  scaled = llama.rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
  blended = 0.1 * (0.7277 + (1 - 0.7277) / 8)
  np.testing.assert_allclose(scaled, [1.0, blended, 0.00125, 0.000125], rtol=1e-4)


# Who sees whom


def test_a_token_sees_only_what_precedes_it() -> None:
  tokens, positions, segments = rows(1, 10)
  before = forward(make(), (tokens, positions, segments))
  after = forward(make(), (tokens.at[0, 6].add(1) % 64, positions, segments))
  np.testing.assert_array_equal(before[0, :6], after[0, :6])
  assert (jnp.abs(before[0, 6:] - after[0, 6:]).max(axis=-1) > 1e-3).all()


def test_packed_texts_are_as_separate_rows() -> None:
  tokens, positions, segments = rows(3, 6)
  alone = forward(make(), (tokens, positions, segments))
  lengths = (6, 3, 5)
  packed = [
    jnp.concatenate([array[row, :length] for row, length in enumerate(lengths)])
    for array in (tokens, positions, segments * jnp.array([[1], [2], [3]]))
  ]
  padded = tuple(jnp.pad(array, (0, 2))[None] for array in packed)
  together = forward(make(), padded)[0]
  expected = jnp.concatenate([alone[row, :length] for row, length in enumerate(lengths)])
  np.testing.assert_allclose(together[: sum(lengths)], expected, atol=1e-5)
  assert jnp.isfinite(together).all()  # Padding, too.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_is_as_full(dtype: str) -> None:
  model = make(dataclasses.replace(CONFIG, dtype=dtype))
  lengths, prefilled, total = np.array([5, 2, 8]), 8, 12
  tokens, positions, segments = rows(3, total)
  full = forward(model, (tokens, positions, segments))
  cache = llama.init_cache(CONFIG, 3, 16, dtype)
  valid = jnp.arange(prefilled) < lengths[:, None]
  hidden, cache = step(model, tokens[:, :prefilled], positions[:, :prefilled], valid, cache)
  tolerance = dict(atol=1e-4 if dtype == "float32" else 0.3)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(model.logits(hidden)[row, :length], full[row, :length], **tolerance)
  for number in range(3):  # Rows go on from places of their own, in one common slot.
    places = jnp.asarray(lengths + number)[:, None]
    following = jnp.take_along_axis(tokens, places, axis=1)
    hidden, cache = step(model, following, places, jnp.ones((3, 1), bool), cache)
    expected = jnp.take_along_axis(full, places[:, :, None], axis=1)
    np.testing.assert_allclose(model.logits(hidden), expected, **tolerance)
  assert int(cache.cursor) == 11
  assert cache.valid_BS.sum(axis=1).tolist() == [8, 5, 11]


def test_an_invalid_token_is_seen_by_no_other() -> None:
  tokens, positions, _ = rows(2, 4)
  caches = []
  for last in (0, 1):  # The second row has ended; what it feeds must not matter to it later.
    cache = llama.init_cache(CONFIG, 2, 8)
    _, cache = step(make(), tokens, positions, jnp.ones((2, 4), bool), cache)
    fed = jnp.array([[7], [last]])
    _, cache = step(make(), fed, jnp.full((2, 1), 4), jnp.array([[True], [False]]), cache)
    caches.append(cache)
  results = [step(make(), tokens[:, :1], jnp.full((2, 1), 5), jnp.ones((2, 1), bool), cache)[0] for cache in caches]
  np.testing.assert_array_equal(*results)


def test_the_cache_is_updated_in_place() -> None:
  config = dataclasses.replace(CONFIG, layers=4)
  cache = jax.eval_shape(lambda: llama.init_cache(config, 16, 512))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  model = jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0)))
  one = jax.ShapeDtypeStruct((16, 1), jnp.int32)
  lowered = jax.jit(llama.Llama.cached, donate_argnums=4).lower(
    model, one, one, jax.ShapeDtypeStruct((16, 1), jnp.bool_), cache
  )
  memory = lowered.compile().memory_analysis()
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size / 2  # One layer's keys and values at a time, of four.


# Training


@jax.jit
def _loss(model: llama.Llama, batch: tuple[jax.Array, ...], key: jax.Array | None = None) -> jax.Array:
  logits = model.logits(model(*batch, dropout_key=key))[:, :-1]
  return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[0][:, 1:, None], axis=-1))


def test_remat_changes_no_gradient() -> None:
  batch, key = rows(2, 12), jax.random.key(3)
  gradients = {}
  for remat in llama.REMAT:
    model = make(dataclasses.replace(CONFIG, remat=remat, dropout=0.1))
    gradients[remat] = jax.tree.leaves(jax.jit(jax.grad(_loss))(model, batch, key))
  for remat in ("full", "minimal"):
    for one, other in zip(gradients["none"], gradients[remat], strict=True):
      assert jnp.abs(one).max() > 0
      np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_dropout() -> None:
  batch = rows(2, 12)
  plain = forward(make(), batch)
  model = make(dataclasses.replace(CONFIG, dropout=0.5))
  np.testing.assert_array_equal(forward(model, batch), plain)  # Without a key there is none,
  np.testing.assert_array_equal(forward(make(), batch, jax.random.key(0)), plain)  # nor at rate 0.
  first, again, other = (forward(model, batch, jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert jnp.abs(first - other).max() > 0.1 and jnp.abs(first - plain).max() > 0.1


def test_dropout_keeps_the_mean() -> None:
  x = jnp.ones((100, 100))
  dropped = llama._dropout(x, 0.2, jax.random.key(0))
  np.testing.assert_allclose(jnp.mean(dropped == 0), 0.2, atol=0.02)
  np.testing.assert_allclose(jnp.unique(dropped), [0, 1.25])


def test_the_module_is_a_plain_pytree() -> None:
  model, batch = make(), rows(2, 12)
  function = jax.jit(jax.grad(_loss))
  updated = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, model, function(model, batch))
  assert isinstance(updated, llama.Llama) and _loss(updated, batch) < _loss(model, batch)
  function(updated, batch)
  function(jax.jit(lambda key: llama.Llama(CONFIG, key))(jax.random.key(1)), batch)
  assert function._cache_size() == 1  # However the model came about, one program.


def test_bfloat16_computes_close_by() -> None:
  batch = rows(2, 12)
  model = make(dataclasses.replace(CONFIG, dtype="bfloat16"))
  assert jax.eval_shape(model, *batch).dtype == jnp.bfloat16
  logits = forward(model, batch)
  assert logits.dtype == jnp.float32
  difference = jnp.abs(logits - forward(make(), batch))
  assert 0 < difference.max() < 0.3


def test_initial_values() -> None:
  config = dataclasses.replace(CONFIG, embed=64, param_dtype="bfloat16")
  model = jax.jit(lambda key: llama.Llama(config, key))(jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
  assert (model.norm[...] == 1).all() and (model.layers.ffw_norm[...] == 1).all()
  kernels = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(model) if not (leaf == 1).all()]
  np.testing.assert_allclose([kernel.std() for kernel in kernels], 0.02, rtol=0.1)
  assert abs(np.corrcoef(model.layers.gate[...].ravel(), model.layers.up[...].ravel())[0, 1]) < 0.1


# Sizes


@pytest.mark.parametrize(
  ("size", "count"), [("llama2_7b", 6_738_415_616), ("llama2_13b", 13_015_864_320), ("llama2_70b", 68_976_648_192)]
)
def test_parameter_counts(size: str, count: int) -> None:
  model = jax.eval_shape(lambda: llama.Llama(llama.SIZES[size], jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


def test_every_size_divides_over_a_pod() -> None:
  for name in ("llama2_7b", "llama2_13b", "llama2_70b"):
    model = jax.eval_shape(lambda name=name: llama.Llama(llama.SIZES[name], jax.random.key(0)))
    for sizes in (dict(fsdp=1, tensor=8), dict(fsdp=8)):
      parts = mesh.shardings(model, mesh.make_mesh(**sizes))
      gate = parts.layers.gate.get_value()
      assert math.prod(gate.shard_shape(model.layers.gate.shape)) * 8 == math.prod(model.layers.gate.shape)


@pytest.mark.parametrize(
  "changes",
  [
    *(dict(kv_heads=3), dict(head_dim=7), dict(dropout=1.0), dict(dropout=-0.1)),
    *(dict(remat="some"), dict(attention="sparse")),
  ],
)
def test_config_refuses(changes: dict[str, object]) -> None:
  with pytest.raises(ValueError, match=next(iter(changes))):
    dataclasses.replace(CONFIG, **changes)


# Devices


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)], ids=str)
def test_sharded_is_as_on_one_device(sizes: dict[str, int]) -> None:
  batch, key = rows(8, 10), jax.random.key(5)
  config = dataclasses.replace(CONFIG, dropout=0.1, remat="full")
  model = make(config)

  def everything(model: llama.Llama, batch: tuple[jax.Array, ...]) -> tuple[object, ...]:
    cache = llama.init_cache(config, 8, 16)
    tokens, positions, segments = batch
    hidden, cache = model.cached(tokens, positions, segments > 0, cache)
    hidden, cache = model.cached(tokens[:, :1], positions[:, :1] + 10, segments[:, :1] > 0, cache)
    return jax.value_and_grad(_loss)(model, batch, key), model.logits(hidden), cache

  expected = jax.jit(everything)(model, batch)
  devices = mesh.make_mesh(**sizes)
  placed = jax.device_put(model, mesh.shardings(model, devices))
  with jax.set_mesh(devices):
    found = jax.jit(everything)(placed, jax.device_put(batch, jax.NamedSharding(devices, mesh.spec(("batch",)))))
  ways = devices.shape["tensor"]
  assert placed.layers.q[...].addressable_shards[0].data.shape == (2, 16 // devices.shape["fsdp"], 2 // ways, 2, 8)
  for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_an_odd_batch_computes_on_a_mesh() -> None:
  batch = rows(3, 10)
  devices = mesh.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(devices):
    logits = forward(jax.device_put(make(), mesh.shardings(make(), devices)), batch)
  np.testing.assert_allclose(logits, forward(make(), batch), atol=1e-5)


def test_golden_file_is_small() -> None:
  assert GOLDEN.stat().st_size < 200_000
  with np.load(GOLDEN) as file:
    assert json.loads(str(file["llama3/config"]))["tie_word_embeddings"]
