"""The loop around a train step: batches in, metrics and checkpoints out, resumed where it stopped."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import json
import logging
import os
import time
from typing import IO, Protocol

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from srlm_jax import checkpoint, distributed, llama, mesh as mesh_lib, train_step

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


def _kept_lines(path: epath.Path, steps: int) -> str:
  """The metrics of the steps that the restored state has done; later ones will be written again."""
  kept = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      step = json.loads(line)["step"]
    except json.JSONDecodeError:  # A kill cut the last line, of a step after the saved ones.
      break
    if step <= steps:
      kept.append(f"{line}\n")
  return "".join(kept)


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
    until: a step to stop after, with the state saved: the next call goes on from there; None: the end.

  Raises:
    FloatingPointError: the loss of a step is not finite.
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
  rates = train_step.schedule(optimizer)
  path = folder / "metrics.jsonl" if distributed.writes() else epath.Path(os.devnull)
  kept = _kept_lines(path, first)
  with contextlib.closing(store), path.open("w") as log:
    log.write(kept)
    log.flush()
    pending: tuple[int, train_step.Metrics] | None = None
    said = started = time.monotonic()
    for index in range(first, last):
      batch: train_step.Batch = distributed.place(dict(batches[index]), rows)
      state, metrics = step_fn(state, batch, jnp.uint32(seed))
      if pending:  # One step late, so that the device never waits for the host.
        said = _report(log, folder, pending, optimizer.steps, first, rates, started, said)
      pending = index + 1, metrics
      distributed.progress(f"{folder}: step {index + 1}")
      if ((index + 1) % save_every == 0 or index + 1 == last) and index + 1 < optimizer.steps:
        # First, so that no state is saved whose loss is no number, or whose metrics a kill would lose.
        said = _report(log, folder, pending, optimizer.steps, first, rates, started, said)
        pending = None
        log.flush()
        store.save(index + 1, state)
    if pending:
      _report(log, folder, pending, optimizer.steps, first, rates, started, 0.0)
  return state.model


def _report(
  log: IO[str],
  folder: epath.Path,
  pending: tuple[int, train_step.Metrics],
  steps: int,
  first: int,
  rates: optax.Schedule,
  started: float,
  said: float,
) -> float:
  """Writes one step's metrics and now and then logs them; returns when it last did.

  Args:
    log: metrics.jsonl.
    folder: names the run.
    pending: the number of the step, counted from 1, and its metrics.
    steps: of the whole run.
    first: steps done before this session.
    rates: the learning rate by step.
    started: when this session started.
    said: when metrics were last logged.

  Raises:
    FloatingPointError: the loss is not finite.
  """
  step, metrics = pending
  values = {name: float(value) for name, value in jax.device_get(metrics).items()}
  if not np.isfinite(values["loss"]):
    raise FloatingPointError(
      f"{folder}: the loss of step {step} is {values['loss']}: lower the learning rate, check the data."
    )
  log.write(json.dumps({"step": step, "lr": float(rates(step - 1)), **values}) + "\n")
  now = time.monotonic()
  if step in (1, steps) or now - said > 10:
    rate = (step - first) / (now - started)
    logger.info(
      "%s: step %d of %d, loss %.4f, %.1f steps/s, %.0f s left",
      folder,
      step,
      steps,
      values["loss"],
      rate,
      (steps - step) / rate,
    )
    return now
  return said
