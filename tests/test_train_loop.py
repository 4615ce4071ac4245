"""The training loop: a stopped run goes on as if it had not stopped, and a broken one stops."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import signal

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from srlm_jax import (
  batching,
  checkpoint,
  endings,
  interruption,
  journal,
  llama,
  mesh as mesh_lib,
  train_loop,
  train_step,
)

CONFIG = dataclasses.replace(tiny_model.CONFIG, dropout=0.1)
OPTIMIZER = train_step.OptimizerConfig(lr=1e-2, end_lr=1e-3, steps=7, warmup=2)


def batch(step: int) -> dict[str, np.ndarray]:
  """Eight short examples that depend on the step."""
  rng = np.random.default_rng(step)
  examples = [batching.Example(tuple(rng.integers(3, 320, 9).tolist()), 3) for _ in range(8)]
  rows = batching.pack(examples, 12, packed=False)
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Stopping:
  """Batches that end the run when one step is asked for, as a preemption would."""

  def __init__(self, at: int | None = None) -> None:
    self.at, self.asked = at, []

  def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
    if step == self.at:
      raise KeyboardInterrupt
    self.asked.append(step)
    return batch(step)


def train(folder: epath.Path, batches: Stopping, **changes: object) -> llama.Llama:
  mesh = changes.pop("mesh", None) or tiny_model.one_device()
  settings = {
    "config": CONFIG,
    "start": lambda: checkpoint.init_model(CONFIG, mesh, seed=1),
    "loss_fn": functools.partial(train_step.sft_loss, chunk=0),
    "optimizer": OPTIMIZER,
    "save_every": 2,
    "seed": 3,
  }
  return train_loop.train(**{**settings, **changes}, batches=batches, mesh=mesh, folder=folder)


def saved(folder: epath.Path) -> list[int]:
  return sorted(int(path.name) for path in (folder / "states").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[llama.Llama, str]:
  """The weights and metrics of a run that nothing stopped."""
  folder = epath.Path(tmp_path_factory.mktemp("whole"))
  model = train(folder, Stopping())
  return model, (folder / "metrics.jsonl").read_text()


def test_metrics_are_one_line_a_step(whole: tuple[llama.Llama, str]) -> None:
  lines = [json.loads(line) for line in whole[1].splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 8))
  rates = train_step.schedule(OPTIMIZER)
  for line in lines:
    assert line["lr"] == float(rates(line["step"] - 1)) and line["target_tokens"] == 8 * 6
    assert np.isfinite([line["loss"], line["grad_norm"]]).all()


def test_a_stopped_run_ends_as_one_that_nothing_stopped(whole: tuple[llama.Llama, str], tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    train(folder, Stopping(at=1))  # Nothing is saved yet: from the start again.
  with pytest.raises(KeyboardInterrupt):
    train(folder, Stopping(at=4))  # Just after step 4 was saved.
  again = Stopping(at=5)
  with pytest.raises(KeyboardInterrupt):
    train(folder, again)
  assert again.asked == [4]  # What is saved is not done again.
  last = Stopping()
  model = train(folder, last)
  assert last.asked == [4, 5, 6] and saved(folder) == [4, 6]
  assert (folder / "metrics.jsonl").read_text() == whole[1]
  for (name, found), wanted in zip(checkpoint.named_leaves(model).items(), jax.tree.leaves(whole[0]), strict=True):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted), err_msg=name)


def test_a_run_whose_newest_state_is_damaged_ends_as_one_that_nothing_stopped(
  whole: tuple[llama.Llama, str], tmp_path: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
  folder = epath.Path(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    train(folder, Stopping(at=5))
  (folder / "states" / "4" / "state" / "manifest.ocdbt").write_bytes(b"torn")
  last = Stopping()
  model = train(folder, last)
  assert last.asked == [2, 3, 4, 5, 6] and saved(folder) == [4, 6]
  assert [record.message for record in caplog.records if "is damaged" in record.message]
  assert (folder / "metrics.jsonl").read_text() == whole[1]
  assert checkpoint.fingerprints(model) == checkpoint.fingerprints(whole[0])


@pytest.mark.parametrize(("at", "late"), [(4, False), (6, False), (4, True)])
def test_a_run_that_is_told_to_stop_saves_the_step_in_hand(
  whole: tuple[llama.Llama, str], tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch, at: int, late: bool
) -> None:
  folder, came = epath.Path(tmp_path), []
  monkeypatch.setattr(interruption, "_came", came)

  def asked() -> bool:
    """Answers, and hears of it only then: the next step is the one in hand."""
    before = bool(came)
    came.extend([signal.SIGTERM] if late and len(told.asked) == at else [])
    return before

  monkeypatch.setattr(interruption, "asked", asked)

  class Told(Stopping):
    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
      came.extend([signal.SIGTERM] if step == at and not late else [])
      return super().__getitem__(step)

  told = Told()
  with pytest.raises(endings.Terminated):
    train(folder, told)
  came.clear()
  last = Stopping()
  model = train(folder, last)
  assert last.asked == list(range(at + 1, 7))  # Not one step is done again.
  assert (folder / "metrics.jsonl").read_text() == whole[1]
  assert checkpoint.fingerprints(model) == checkpoint.fingerprints(whole[0])


def test_a_run_in_pieces_is_as_a_whole_one(whole: tuple[llama.Llama, str], tmp_path: epath.Path) -> None:
  folder, asked = epath.Path(tmp_path), []
  for until in (3, 3, 4, 7):
    batches = Stopping()
    model = train(folder, batches, until=until)
    asked.append(batches.asked)
    assert until in [*saved(folder), 7]  # Saved where it stops, whatever save_every.
  assert asked == [[0, 1, 2], [], [3], [4, 5, 6]]
  assert (folder / "metrics.jsonl").read_text() == whole[1]
  for (name, found), wanted in zip(checkpoint.named_leaves(model).items(), jax.tree.leaves(whole[0]), strict=True):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted), err_msg=name)
  with pytest.raises(ValueError, match="states is at step 6, and the weights after step 3 are gone: delete"):
    train(folder, Stopping(), until=3)


def test_lines_of_steps_that_are_done_again_go_and_damaged_ones_are_said(
  whole: tuple[llama.Llama, str], tmp_path: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
  folder = epath.Path(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    train(folder, Stopping(at=5))
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  assert len(lines) == 4  # Of the saved steps, and of what was seen until it stopped.
  digit = lines[1].index("loss") + 9
  lines[1] = lines[1][:digit] + str(9 - int(lines[1][digit])) + lines[1][digit + 1 :]
  path.write_text("".join(lines) + whole[1].splitlines(keepends=True)[4] + '{"step": 6, "lr": 0.0')
  train(folder, Stopping())
  kept = whole[1].splitlines(keepends=True)
  assert path.read_text() == "".join(kept[:1] + kept[2:])
  assert "the metrics of 1 of the first 4 steps are damaged or missing" in caplog.text


def test_the_metrics_of_saved_steps_are_on_the_disk(tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path)

  class Reader(Stopping):
    """Reads the file as it would lie on the disk after a kill."""

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
      if step in (2, 4, 6):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
      return super().__getitem__(step)

  train(folder, Reader())


def poisoned(model: llama.Llama, values: dict, key: jax.Array | None) -> tuple[jax.Array, dict]:
  """The usual loss, and not a number in a batch whose first token is 0."""
  loss, metrics = train_step.sft_loss(model, values, key, 0)
  loss = jnp.where(values["tokens"][0, 0] == 0, jnp.nan, loss)
  return loss, {**metrics, "loss": loss}


class Poisoned(Stopping):
  """Batches of which some are bad."""

  def __init__(self, *bad: int, at: int | None = None) -> None:
    super().__init__(at)
    self.bad = bad

  def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
    values = super().__getitem__(step)
    if step in self.bad:
      values["tokens"][0, 0] = 0
    return values


def test_steps_that_are_not_finite_are_skipped_and_counted(
  tmp_path: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
  folder = epath.Path(tmp_path)
  model = train(folder, Poisoned(1, 2, 4, 6), loss_fn=poisoned)
  lines = journal.read(folder / "metrics.jsonl")
  assert [line["skipped"] for line in lines] == [0, 1, 1, 0, 1, 0, 1]
  assert [line["loss"] is None for line in lines] == [False, True, True, False, True, False, True]
  rates = train_step.schedule(OPTIMIZER)
  assert [line["lr"] for line in lines] == [float(rates(step)) for step in range(7)]
  assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(model))
  assert caplog.text.count("is skipped: its loss is nan") == 4 and not list(folder.glob("bad_batch*"))


def test_too_many_in_a_row_end_the_run_with_their_batches_and_a_good_state(tmp_path: epath.Path) -> None:
  folder = epath.Path(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    train(folder, Poisoned(3, 4, 5, at=4), loss_fn=poisoned)  # After step 4, the first bad one, was saved.
  batches = Poisoned(3, 4, 5)
  with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 6, are not finite.*bad_batch_step_4.npz"):
    train(folder, batches, loss_fn=poisoned)
  assert batches.asked[:2] == [4, 5] and max(saved(folder)) <= 6
  for step in (4, 5, 6):
    with (folder / f"bad_batch_step_{step}.npz").open("rb") as file:
      found = np.load(file)
      assert {name: found[name].tolist() for name in found} == {
        name: values.tolist() for name, values in Poisoned(3, 4, 5)[step - 1].items()
      }
  state = train_loop.abstract_state(CONFIG, OPTIMIZER, tiny_model.one_device())
  _, state = checkpoint.StateStore(folder / "states").restore(state)
  assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))
  assert [line["step"] for line in journal.read(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_one_may_be_too_many(tmp_path: epath.Path) -> None:
  with pytest.raises(FloatingPointError, match="1 steps in a row, up to step 7, are not finite"):
    train(epath.Path(tmp_path), Poisoned(6), loss_fn=poisoned, skip_limit=1)


def test_each_step_drops_something_else_out(tmp_path: epath.Path) -> None:
  class Same(Stopping):
    """One batch for ever."""

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
      return batch(0)

  still = dataclasses.replace(OPTIMIZER, lr=1e-12, end_lr=1e-12)
  train(epath.Path(tmp_path), Same(), optimizer=still)
  lines = (epath.Path(tmp_path) / "metrics.jsonl").read_text().splitlines()
  assert len({json.loads(line)["loss"] for line in lines}) == 7


def test_the_model_is_not_copied(tmp_path: epath.Path) -> None:
  mesh = tiny_model.one_device()
  start = checkpoint.init_model(CONFIG, mesh, seed=1)
  train(epath.Path(tmp_path), Stopping(), start=lambda: start)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))


def test_a_divided_run_is_as_one_on_a_single_device(whole: tuple[llama.Llama, str], tmp_path: epath.Path) -> None:
  mesh = mesh_lib.make_mesh(fsdp=8)
  with jax.set_mesh(mesh):
    model = train(epath.Path(tmp_path), Stopping(), mesh=mesh)
  assert {shard.data.shape for shard in model.layers.gate[...].addressable_shards} == {(2, 2, 32)}
  for name, found, wanted in zip(
    checkpoint.named_leaves(model), jax.tree.leaves(model), jax.tree.leaves(whole[0]), strict=True
  ):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=2e-4, err_msg=name)
