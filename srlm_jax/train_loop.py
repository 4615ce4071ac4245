"""The loop around a train step: batches in, metrics and checkpoints out, resumed where it stopped."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import io
import itertools
import logging
import time
from typing import Any, Protocol

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import (
  checkpoint,
  distributed,
  health,
  interruption,
  journal,
  llama,
  mesh as mesh_lib,
  storage,
  train_step,
)

logger = logging.getLogger(__name__)


class Batches(Protocol):
  """The batches of a run by step, without end; arrays whose first axis is divided over the devices."""

  def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
    """The batch of a step, counted from 0."""


def abstract_state(
  config: llama.LlamaConfig, optimizer: train_step.OptimizerConfig, mesh: jax.sharding.Mesh
) -> train_step.TrainState:
  """Shapes and shardings of the train state."""
  transform = train_step.optimizer(optimizer)
  model = checkpoint.abstract_model(config, mesh)
  return checkpoint.with_shardings(jax.eval_shape(functools.partial(train_step.init, transform=transform), model), mesh)


def jit_step(
  loss_fn: train_step.LossFn,
  optimizer: train_step.OptimizerConfig,
  shardings: train_step.TrainState,
  accumulate: int = 1,
) -> Callable[[train_step.TrainState, train_step.Batch, jax.Array], tuple[train_step.TrainState, train_step.Metrics]]:
  """The jitted train step; the state that it is given is donated."""
  transform = train_step.optimizer(optimizer)
  step = functools.partial(train_step.train_step, loss_fn=loss_fn, transform=transform, accumulate=accumulate)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train(
  *,
  config: llama.LlamaConfig,
  start: Callable[[], llama.Llama],
  loss_fn: train_step.LossFn,
  optimizer: train_step.OptimizerConfig,
  batches: Batches,
  mesh: jax.sharding.Mesh,
  folder: epath.Path,
  seed: int,
  save_every: int,
  accumulate: int = 1,
  skip_limit: int = 3,
  limits: health.Limits = health.Limits(),  # noqa: B008  # It is frozen.
  until: int | None = None,
) -> llama.Llama:
  """Trains for `optimizer.steps` steps, or `until` one of them for now, and returns the model.

  Args:
    config: of the model.
    start: gives the model where training starts; its buffers are donated. A resumed run does not call it, and so needs
      no more memory than a fresh one.
    loss_fn: (model, batch, dropout key) → (loss, metrics).
    optimizer: learning rates and steps.
    batches: item k is the batch of step k, arrays whose first axis is divided over the devices.
    mesh: the devices.
    folder: gets `states/` and `metrics.jsonl` (one line a step: loss, gradient norm, …).
    seed: of dropout.
    save_every: steps between two saved states.
    accumulate: parts in which a batch goes through the model, one after the other, to need less memory.
    skip_limit: steps in a row without a finite loss and gradient that end the run; fewer are skipped and counted.
    limits: of the losses and, in DPO, of margin and drift, beyond which it warns.
    until: a step to stop after, with the state saved: the next call goes on from there; None: the end.

  Raises:
    FloatingPointError: `skip_limit` steps in a row were not finite; their batches lie in `folder`.
    ValueError: the saved state is of a later step than `until`, or of another model.
  """
  last = optimizer.steps if until is None else until
  transform = train_step.optimizer(optimizer)
  abstract = abstract_state(config, optimizer, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  folder.mkdir(parents=True, exist_ok=True)
  store = checkpoint.StateStore(folder / "states")
  found = store.restore(abstract)
  if found:
    first, state = found
    logger.info("%s: goes on from step %d of %d", folder, first, optimizer.steps)
  else:
    init = jax.jit(functools.partial(train_step.init, transform=transform), out_shardings=shardings, donate_argnums=0)
    first, state = 0, init(start())
  if first > last:
    raise ValueError(
      f"{folder / 'states'} is at step {first}, and the weights after step {last} are gone: delete {folder} to train "
      "again."
    )
  step_fn = jit_step(loss_fn, optimizer, shardings, accumulate)
  rows = jax.sharding.NamedSharding(mesh, mesh_lib.spec(("batch",)))
  log = journal.Journal(folder / journal.NAME if distributed.writes() else None, first)
  watch = Watch(folder, log, optimizer, first, skip_limit, limits, batches)
  with contextlib.closing(store), contextlib.closing(watch):
    pending: tuple[int, train_step.Metrics] | None = None
    for index in range(first, last):
      batch: train_step.Batch = distributed.place(dict(batches[index]), rows)
      state, metrics = step_fn(state, batch, jnp.uint32(seed))
      if pending:  # One step late, so that the device never waits for the host.
        watch.see(*pending)
      pending = index + 1, metrics
      stops = interruption.asked()
      due = ((index + 1) % save_every == 0 or index + 1 == last) and index + 1 < optimizer.steps
      if due or (stops and jax.process_count() == 1):  # Several would have to stop at the same step.
        watch.see(*pending)  # First, so that a run that ends here saves no more, and no kill loses these metrics.
        pending = None
        log.flush()
        store.save(index + 1, state)
      distributed.moved(f"{folder}: step {index + 1}")
      if stops:  # Who is told only now stops, and saves, at the next step.
        interruption.check()
    if pending:
      watch.see(*pending)
  return state.model


def past(folder: epath.Path, step: int) -> bool:
  """Whether a training in this folder has saved a state of a later step, and so gives the weights of `step` no more."""
  with contextlib.closing(checkpoint.StateStore(folder / "states")) as store:
    return any(saved > step for saved in store.steps())


class Watch:
  """Takes the metrics of each step, in order: writes them, now and then logs them, ends a run that is broken."""

  def __init__(
    self,
    folder: epath.Path,
    log: journal.Journal,
    optimizer: train_step.OptimizerConfig,
    first: int,
    skip_limit: int,
    limits: health.Limits,
    batches: Batches,
  ) -> None:
    self.folder, self._log, self._steps, self._first = folder, log, optimizer.steps, first
    self._rates, self._skip_limit, self._batches = train_step.schedule(optimizer), skip_limit, batches
    self._said = self._started = time.monotonic()
    self._observer, _ = health.observe(log.rows, limits)
    last = list(itertools.takewhile(lambda row: row["skipped"], reversed(log.rows)))
    self._skipped = distributed.agree(f"go on in {folder}", len(last))  # In a row, up to now.

  def see(self, step: int, metrics: train_step.Metrics) -> None:
    """Takes the metrics after `step` steps; FloatingPointError where too many steps in a row are not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    row = {"step": step, "lr": float(self._rates(step - 1)), **values}
    self._log.add(row)
    for text in self._observer.see(row):
      logger.warning("%s: %s", self.folder, text)
    self._skipped = self._skipped + 1 if values["skipped"] else 0
    if self._skipped:
      logger.warning(
        "%s: step %d is skipped: its loss is %g, the norm of its gradients %g.",
        self.folder,
        step,
        values["loss"],
        values["grad_norm"],
      )
    if self._skipped >= self._skip_limit:
      raise FloatingPointError(self._broken(step))
    now = time.monotonic()
    if step in (1, self._steps) or now - self._said > 10:
      self._said, rate = now, (step - self._first) / (now - self._started)
      logger.info(
        "%s: step %d of %d, loss %.4f, %.1f steps/s, %.0f s left",
        self.folder,
        step,
        self._steps,
        values["loss"],
        rate,
        (self._steps - step) / rate,
      )

  def _broken(self, step: int) -> str:
    """Saves the batches of the skipped steps in a row, of which `step` is the last, and says where they are."""
    steps = range(step - self._skipped + 1, step + 1)
    paths = [self.folder / f"bad_batch_step_{one}.npz" for one in steps]

    def keep() -> None:
      for one, path in zip(steps, paths, strict=True):
        file, arrays = io.BytesIO(), dict[str, Any](self._batches[one - 1])
        np.savez(file, **arrays)
        storage.write(path, file.getvalue())

    distributed.first(f"keep the bad batches in {self.folder}", keep)  # Else the others' end would come before its.
    return (
      f"{self.folder}: loss or gradients of {len(steps)} steps in a row, up to step {step}, are not finite. Nothing "
      f"of them is in the weights or in what is saved. Their batches are in {', '.join(path.name for path in paths)}: "
      "check the data, or lower the learning rate."
    )

  def close(self) -> None:
    """Writes what was seen."""
    self._log.flush()


def facts(folder: epath.Path, limits: health.Limits) -> dict[str, Any]:
  """The health of a training, for its manifest: {"health": what its journal shows}."""
  path = folder / journal.NAME
  found = distributed.first(f"look at {path}", lambda: health.observe(journal.read(path), limits)[0].facts())
  return {"health": found} if found["steps"] else {}
