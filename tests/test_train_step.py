"""The train steps: what they learn, what they leave alone, and the schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srlm_jax import batching, checkpoint, hlo, llama, logprobs, mesh, train_step

CONFIG = llama.LlamaConfig(vocab_size=29, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffw=32, max_length=16)


def make_batch(examples, length=8):
  rows = batching.pack(examples, length, packed=False)
  return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def pair_batch(model):
  batch = make_batch([batching.Example((5, 6, 7, 8, 2), 2), batching.Example((5, 6, 9, 2), 2)])
  reference = logprobs.sequence_logprobs(model, batch, 0)
  return {**batch, "reference_chosen": reference[:1], "reference_rejected": reference[1:]}


def run(model, loss_fn, batch, steps, **optimizer):
  config = train_step.OptimizerConfig(**{"lr": 3e-3, "end_lr": 1e-3, "steps": steps, **optimizer})
  transform = train_step.optimizer(config)
  step = jax.jit(functools.partial(train_step.train_step, loss_fn=loss_fn, transform=transform))
  state, log = train_step.init(model, transform), []
  for _ in range(steps):
    state, metrics = step(state, batch, jnp.uint32(0))
    log.append({name: float(value) for name, value in metrics.items()})
  assert step._cache_size() == 1
  return state, log


def test_sft_learns_the_response_and_not_the_prompt():
  model = llama.Llama(CONFIG, jax.random.key(0))
  batch = make_batch([batching.Example((5, 20, 21, 7, 8, 2), 3)])
  state, log = run(model, functools.partial(train_step.sft_loss, chunk=0), batch, 60, lr=1e-2)
  assert log[0]["loss"] == pytest.approx(np.log(29), rel=0.05) and log[-1]["loss"] < 0.05
  hidden = state.model(batch["tokens"], batch["positions"], batch["segments"])
  per_token = logprobs.next_token_logprobs(state.model, hidden, batch["tokens"], 0)[0]
  assert per_token[2:5].min() > -0.2  # 7, 8 and the end token.
  assert per_token[:2].max() < -1.5  # 20 and 21 belong to the prompt.


def test_dpo_starts_at_log_2_and_widens_the_margin():
  model = llama.Llama(CONFIG, jax.random.key(1))
  _, log = run(model, functools.partial(train_step.dpo_loss, chunk=0, beta=0.1), pair_batch(model), 40)
  assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert log[-1]["loss"] < log[0]["loss"] and log[-1]["margin"] > 0.1 and log[-1]["accuracy"] == 1
  assert log[-1]["chosen_logprob"] > log[-1]["rejected_logprob"]


def test_the_gradient_equals_finite_differences():
  model = llama.Llama(CONFIG, jax.random.key(2))
  batch = pair_batch(model)
  batch["reference_chosen"] -= 3.0

  def loss(scale):
    moved = jax.tree.map(lambda leaf: leaf, model)
    moved.norm = type(model.norm)(model.norm[...] * scale)
    return train_step.dpo_loss(moved, batch, None, 0, 0.5)[0]

  numeric = (loss(1.01) - loss(0.99)) / 0.02
  assert float(jax.grad(loss)(1.0)) == pytest.approx(float(numeric), rel=2e-2)


def test_dropout_draws_from_seed_and_step_alone():
  config = llama.dataclasses.replace(CONFIG, dropout=0.3)
  model = llama.Llama(config, jax.random.key(0))
  batch = make_batch([batching.Example((5, 20, 21, 7, 8, 2), 3)])
  loss_fn = functools.partial(train_step.sft_loss, chunk=0)
  _, one = run(model, loss_fn, batch, 3)
  _, two = run(model, loss_fn, batch, 3)
  assert one == two
  assert one[0]["loss"] != pytest.approx(float(loss_fn(model, batch, None)[0]), abs=1e-6)


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_schedules_rise_and_fall_to_the_end_rate(decay, middle):
  rate = train_step.schedule(train_step.OptimizerConfig(1.0, 0.1, steps=110, decay=decay, warmup=10))
  assert float(rate(0)) == pytest.approx(0.1) and float(rate(10)) == pytest.approx(1.0)
  assert float(rate(60)) == pytest.approx(middle) and float(rate(110)) == pytest.approx(0.1)
  assert decay != "cosine" or float(rate(30)) > 0.9


def test_an_unknown_decay_is_refused():
  with pytest.raises(ValueError, match="'cosine' or 'linear'"):
    train_step.schedule(train_step.OptimizerConfig(1.0, 0.1, 10, decay="step"))


def rows_of(seed, count):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, 8, count)
  return make_batch([batching.Example((*rng.integers(3, 29, length).tolist(), 2), 2) for length in lengths])


def loss_and_batch(kind, model):
  batch = rows_of(0, 8)
  if kind == "sft":
    return functools.partial(train_step.sft_loss, chunk=0), batch
  reference = logprobs.sequence_logprobs(model, batch, 0) - jnp.arange(8.0)
  batch |= {"reference_chosen": reference[:4], "reference_rejected": reference[4:]}
  return functools.partial(train_step.dpo_loss, chunk=0, beta=0.1), batch


def check_same_gradients(found, wanted):
  for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-6)
  assert found[1].keys() == wanted[1].keys()
  for name, value in wanted[1].items():
    assert float(found[1][name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_batch_in_parts_is_the_same_update(kind):
  model = llama.Llama(CONFIG, jax.random.key(4))
  loss_fn, batch = loss_and_batch(kind, model)
  whole = train_step._gradients(model, batch, jax.random.key(0), loss_fn, 1)
  for count in (2, 4):
    check_same_gradients(train_step._gradients(model, batch, jax.random.key(0), loss_fn, count), whole)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_examples_that_share_rows_give_the_same_update(kind):
  model = llama.Llama(CONFIG, jax.random.key(4))
  loss_fn, batch = loss_and_batch(kind, model)
  host = jax.device_get(batch)
  rows = {name: host.pop(name) for name in ("tokens", "segments", "positions", "targets")}
  wide = {name: np.pad(array, ((0, 0), (0, 16))) for name, array in rows.items()}
  small = batching.with_places(batching.compact(wide, 1))
  assert small["tokens"].size <= wide["tokens"].size / 2 and small["segments"].max() > 1 and "places" in small
  whole = train_step._gradients(model, batch, jax.random.key(0), loss_fn, 1)
  check_same_gradients(train_step._gradients(model, {**host, **small}, jax.random.key(0), loss_fn, 1), whole)


def test_a_part_without_targets_weighs_nothing():
  model = llama.Llama(CONFIG, jax.random.key(4))
  batch = make_batch([batching.Example((5, 6, 7, 2), 2), batching.Example((5, 6, 9, 2), 4)])  # The second has none.
  loss_fn = functools.partial(train_step.sft_loss, chunk=0)
  whole = train_step._gradients(model, batch, jax.random.key(0), loss_fn, 1)
  check_same_gradients(train_step._gradients(model, batch, jax.random.key(0), loss_fn, 2), whole)
  assert float(whole[1]["target_tokens"]) == 2


@pytest.mark.parametrize(("kind", "accumulate"), [("sft", 1), ("dpo", 1), ("dpo", 2)])
def test_slices_give_the_same_update_and_talk_once(kind, accumulate):
  model = llama.Llama(llama.dataclasses.replace(CONFIG, kv_heads=2, vocab_size=30, remat="full"), jax.random.key(4))
  loss_fn, batch = loss_and_batch(kind, model)
  whole = train_step._gradients(model, batch, jax.random.key(0), loss_fn, 1)
  devices = mesh.make_mesh(slice=2, fsdp=2, tensor=2)
  placed = jax.device_put(model, mesh.shardings(model, devices))
  step = jax.jit(lambda *args: train_step._gradients(*args, loss_fn, accumulate))
  with jax.set_mesh(devices):
    compiled = step.lower(placed, batch, jax.random.key(0)).compile()
    check_same_gradients(compiled(placed, batch, jax.random.key(0)), whole)
  computations, entry = hlo.parse(compiled.as_text())
  between = {
    name
    for name, body in computations.items()
    for op in body.values()
    if op.opcode == "all-reduce" and max(hlo.group(op.rest)) >= 4
  }
  assert between == {entry}  # Not in the loops over layers and parts.


def test_pairs_stay_together_in_parts():
  rows = jnp.arange(8)[:, None]  # Chosen 0 to 3, rejected 4 to 7.
  batch = {"tokens": rows, "reference_chosen": rows[:4, 0], "reference_rejected": rows[4:, 0]}
  parts = train_step.parts(batch, 2)
  chosen, rejected = jnp.split(parts["tokens"][..., 0], 2, axis=1)
  np.testing.assert_array_equal(rejected, chosen + 4)
  np.testing.assert_array_equal(parts["reference_chosen"], chosen)
  np.testing.assert_array_equal(parts["reference_rejected"], rejected)


def test_the_first_moment_may_be_bfloat16():
  model = llama.Llama(CONFIG, jax.random.key(5))
  config = train_step.OptimizerConfig(lr=1e-3, end_lr=1e-4, steps=2, moments="bfloat16")
  kinds = [str(leaf.dtype) for leaf in jax.tree.leaves(train_step.init(model, train_step.optimizer(config)).opt_state)]
  weights = len(jax.tree.leaves(model))
  assert kinds.count("bfloat16") == weights and kinds.count("float32") == weights


def plain_step(state, batch, seed, *, loss_fn, transform):
  """A step that never skips."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.model, batch, key)
  updates, opt_state = transform.update(grads, state.opt_state, state.model)
  model = optax.apply_updates(state.model, updates)
  return train_step.TrainState(model, opt_state, state.step + 1), metrics


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_finite_steps_have_the_bits_of_a_step_that_never_skips(kind):
  model = llama.Llama(CONFIG, jax.random.key(3))
  loss_fn, batch = loss_and_batch(kind, model)
  transform = train_step.optimizer(train_step.OptimizerConfig(lr=3e-3, end_lr=1e-3, steps=5, weight_decay=0.1))
  states = [train_step.init(model, transform)] * 2
  steps = [
    jax.jit(functools.partial(step, loss_fn=loss_fn, transform=transform))
    for step in (train_step.train_step, plain_step)
  ]
  for _ in range(5):
    states = [step(state, batch, jnp.uint32(0))[0] for step, state in zip(steps, states, strict=True)]
  assert checkpoint.fingerprints(states[0]) == checkpoint.fingerprints(states[1])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(what):
  model = llama.Llama(CONFIG, jax.random.key(4))
  batch = make_batch([batching.Example((5, 6, 7, 8, 2), 2)])
  transform = train_step.optimizer(train_step.OptimizerConfig(lr=3e-3, end_lr=1e-3, steps=5))

  def loss_fn(model, batch, key):
    loss, metrics = train_step.sft_loss(model, batch, key, 0)
    bad = batch["bad"] > 0
    if what == "loss":
      loss = jnp.where(bad, jnp.inf, loss)
    else:  # 0 · √x at 0: a finite value whose gradient is none.
      loss += 0 * jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.sum(jnp.square(model.norm[...])))
    return loss, {**metrics, "loss": loss}

  step = jax.jit(functools.partial(train_step.train_step, loss_fn=loss_fn, transform=transform))
  good, bad = ({**batch, "bad": jnp.float32(value)} for value in (0, 1))
  one, metrics = step(train_step.init(model, transform), good, jnp.uint32(0))
  assert metrics["skipped"] == 0
  two, metrics = step(one, bad, jnp.uint32(0))
  assert metrics["skipped"] == 1 and bool(jnp.isfinite(metrics["loss"])) == (what == "gradient")
  before, after = checkpoint.fingerprints(one), checkpoint.fingerprints(two)
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {".step", ".opt_state[1][2].count"}  # Its own, and that of the learning rate.
  three, metrics = step(two, good, jnp.uint32(0))
  assert metrics["skipped"] == 0 and np.isfinite(float(metrics["grad_norm"]))
  assert int(three.step) == 3 and int(three.opt_state[1][0].count) == 2  # Adam's: of the updates.
