"""DPO's training set: how its rows lie, and log-probs that are the trainer's own."""

import functools
import math

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import dataset, logprobs, mesh as mesh_lib, pairset, records, train_step


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> records.PreferencePair:
  return records.PreferencePair(
    prompt_id="p", prompt="", prompt_tokens=prompt,
    chosen="", chosen_tokens=chosen, chosen_score=5.0,
    rejected="", rejected_tokens=rejected, rejected_score=1.0,
  )  # fmt: skip


def some_pairs(count: int) -> list[records.PreferencePair]:
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 9, (count, 3))
  return [pair(*(tuple(rng.integers(3, 320, size).tolist()) for size in three)) for three in sizes]


def test_a_row_is_chosen_above_rejected() -> None:
  row = pairset.pair_row(pair((1, 7, 8), (20, 21, 2), (30, 2)), 8)
  np.testing.assert_array_equal(row["tokens"], [[1, 7, 8, 20, 21, 2, 0, 0], [1, 7, 8, 30, 2, 0, 0, 0]])
  np.testing.assert_array_equal(row["segments"], [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(row["positions"], [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0]])
  targets = [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]  # The end token (2) is a target, the prompt is not.
  np.testing.assert_array_equal(row["targets"], np.array(targets, bool))


def test_a_stack_is_all_chosen_then_all_rejected() -> None:
  rows = [pairset.pair_row(pair((1,), (10 + n, 2), (20 + n, 2)), 4) for n in range(3)]
  stacked = pairset.stack(rows)
  np.testing.assert_array_equal(stacked["tokens"][:, 1], [10, 11, 12, 20, 21, 22])
  assert {value.shape for value in stacked.values()} == {(6, 4)}


def test_one_length_holds_every_pair() -> None:
  assert pairset.row_length([pair((1,), (2,), (2,))], 128) == 32
  assert pairset.row_length([pair((1,) * 20, (2,), (5,) * 13), pair((1,), (2,), (2,))], 128) == 48
  assert pairset.row_length([pair((1,) * 50, (2,) * 50, (2,))], 101) == 101
  with pytest.raises(ValueError, match="do not fit the largest length bucket"):
    pairset.row_length([pair((1,) * 90, (2,) * 39, (2,))], 128)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[epath.Path, list[dict[str, np.ndarray]], np.ndarray]:
  """Eleven pairs with their reference, made on eight devices in batches of eight: the last one is filled up."""
  folder = epath.Path(tmp_path_factory.mktemp("pairset")) / "dataset"
  rows = [pairset.pair_row(one, 32) for one in some_pairs(11)]
  reference = pairset.reference_logprobs(tiny_model.model(), rows, 8, 0, mesh_lib.make_mesh(fsdp=8))
  pairset.write(folder, rows, reference)
  return folder, rows, reference


def test_the_reference_is_each_rows_own_log_prob(written: tuple) -> None:
  _, rows, reference = written
  assert reference.shape == (11, 2) and reference.dtype == np.float32
  model = tiny_model.model()
  for index in (0, 7, 10):
    for side in (0, 1):
      one = {name: jnp.asarray(value[side : side + 1]) for name, value in rows[index].items()}
      np.testing.assert_allclose(reference[index, side], logprobs.sequence_logprobs(model, one, 0)[0], rtol=2e-5)


def test_the_reference_of_the_next_iteration_compiles_nothing_anew(written: tuple) -> None:
  _, rows, reference = written
  before = pairset._score._cache_size()
  again = pairset.reference_logprobs(tiny_model.model(), rows, 8, 0, mesh_lib.make_mesh(fsdp=8))
  np.testing.assert_array_equal(again, reference)
  assert before and pairset._score._cache_size() == before


def test_batches_keep_each_pair_and_its_reference_together(written: tuple) -> None:
  folder, rows, reference = written
  batches = pairset.Batches(folder, 4, seed=3)
  by_tokens = {row["tokens"].tobytes(): index for index, row in enumerate(rows)}
  seen = []
  for step in range(11):  # Four epochs.
    batch = batches[step]
    assert batch["tokens"].shape == (8, 32) and batch["reference_chosen"].shape == (4,)
    for place in range(4):
      both = {name: np.stack([batch[name][place], batch[name][4 + place]]) for name in rows[0]}
      index = by_tokens[both["tokens"].tobytes()]
      for name, value in rows[index].items():
        np.testing.assert_array_equal(both[name], value)
      assert (batch["reference_chosen"][place], batch["reference_rejected"][place]) == tuple(reference[index])
      seen.append(index)
  assert sorted(seen) == sorted(list(range(11)) * 4)


def test_batches_for_a_mesh_share_rows_and_keep_the_order(written: tuple) -> None:
  folder, _, _ = written
  apart, shared = pairset.Batches(folder, 8, 3)[0], pairset.Batches(folder, 8, 3, tiny_model.one_device())[0]
  assert shared["tokens"].size < apart["tokens"].size and len(shared["places"]) < shared["tokens"].size
  for row in range(16):
    np.testing.assert_array_equal(
      shared["tokens"][shared["owners"] == row], apart["tokens"][row][apart["segments"][row] > 0]
    )
  np.testing.assert_array_equal(shared["reference_rejected"], apart["reference_rejected"])
  assert "places" not in pairset.Batches(folder, 8, 3, tiny_model.eight_devices())[0]


def test_the_first_step_of_dpo_has_loss_log_2(written: tuple) -> None:
  folder, _, _ = written
  mesh = mesh_lib.make_mesh(fsdp=8)
  sharding = jax.sharding.NamedSharding(mesh, mesh_lib.spec(("batch",)))
  transform = train_step.optimizer(train_step.OptimizerConfig(lr=1e-2, end_lr=1e-3, steps=2))
  loss_fn = functools.partial(train_step.dpo_loss, chunk=0, beta=0.1)
  step = jax.jit(functools.partial(train_step.train_step, loss_fn=loss_fn, transform=transform))
  batches = pairset.Batches(folder, 8, seed=0)
  state = train_step.init(tiny_model.model(), transform)
  state, metrics = step(state, jax.device_put(batches[0], sharding), jnp.uint32(0))
  assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
  assert float(metrics["margin"]) == pytest.approx(0, abs=1e-5)
  state, metrics = step(state, jax.device_put(batches[1], sharding), jnp.uint32(0))
  assert abs(float(metrics["loss"]) - math.log(2)) > 1e-3  # From then on the policy is another model.


def test_rows_and_reference_must_be_as_many(tmp_path: epath.Path) -> None:
  rows = [pairset.pair_row(one, 32) for one in some_pairs(3)]
  with pytest.raises(ValueError):
    pairset.write(epath.Path(tmp_path), rows, np.zeros((2, 2), np.float32))
  assert not list(epath.Path(tmp_path).iterdir())


def test_a_written_set_counts_its_pairs(written: tuple) -> None:
  assert dataset.count(written[0]) == 11
