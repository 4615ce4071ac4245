"""The train steps: pure functions from a state and a batch to the next state and metrics."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from srlm_jax import llama, logprobs, losses, mesh

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a learning rate that rises linearly over `warmup` steps and then decays to `end_lr` over the rest.

  The paper states rates and end rates, cosine for SFT and a decay of unstated shape for DPO; optimizer, warm-up, weight
  decay and clipping are unstated: these are our choices.
  """

  lr: float
  end_lr: float
  steps: int
  decay: str = "cosine"  # or "linear"
  warmup: int = 0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip: float = 1.0  # Global gradient norm; 0 for none.
  moments: str = "float32"  # Of Adam's first moment; "bfloat16" halves it. The second stays in the parameters' type.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """What a step carries: the model (a pytree), the optimizer's state, and the number of steps done (int32 scalar)."""

  model: llama.Llama
  opt_state: Any
  step: jax.Array


def count_steps(section: Mapping[str, Any], rows: int) -> int:
  """Steps of a training section of the configuration: `steps`, or `epochs` over the rows but at least `min_steps`."""
  return section["steps"] or max(-(-rows * section["epochs"] // section["batch"]), section["min_steps"])


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate as a function of the step."""
  decay_steps = max(config.steps - config.warmup, 1)
  if config.decay == "cosine":
    decay = optax.cosine_decay_schedule(config.lr, decay_steps, alpha=config.end_lr / config.lr)
  elif config.decay == "linear":
    decay = optax.linear_schedule(config.lr, config.end_lr, decay_steps)
  else:
    raise ValueError(f"decay={config.decay!r}: must be 'cosine' or 'linear'.")
  if not config.warmup:
    return decay
  rise = optax.linear_schedule(config.lr / config.warmup, config.lr, config.warmup)
  return optax.join_schedules([rise, decay], [config.warmup])


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW with decay on matrices alone (not on norms)."""

  def matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 2, tree)  # Stacked norms are [L, D]; embeddings stay undecayed too.

  adamw = optax.adamw(
    schedule(config),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    mu_dtype=config.moments,
    weight_decay=config.weight_decay,
    mask=matrices,
  )
  return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def init(model: llama.Llama, transform: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  return TrainState(model, transform.init(model), jnp.zeros((), jnp.int32))


def sft_loss(model: llama.Llama, batch: Batch, key: jax.Array | None, chunk: int) -> tuple[jax.Array, Metrics]:
  """Next-token loss on the targets of `batch` (tokens, segments, positions, targets: [B, T])."""
  return losses.sft(*logprobs.target_logprobs(model, batch, chunk, key))


def dpo_loss(
  model: llama.Llama, batch: Batch, key: jax.Array | None, chunk: int, beta: float
) -> tuple[jax.Array, Metrics]:
  """DPO over stored reference log-probs.

  `batch` holds tokens, segments, positions, targets of shape [2B, T], the B chosen rows first and then the B rejected
  ones in the same order, and reference_chosen, reference_rejected of shape [B]; or fewer rows with `owners`, which says
  in that numbering whose a token is. One pass of one model does it all.
  """
  both = logprobs.sequence_logprobs(model, batch, chunk, key, 2 * len(batch["reference_chosen"]))
  chosen_B, rejected_B = jnp.split(both, 2)
  return losses.dpo(chosen_B, rejected_B, batch["reference_chosen"], batch["reference_rejected"], beta)


LossFn = Callable[[llama.Llama, Batch, jax.Array | None], tuple[jax.Array, Metrics]]


def parts(batch: Batch, count: int) -> Batch:
  """The batch as [count, …]: parts of equal size. The rows of a pair, chosen and rejected, stay together."""
  rows = len(batch["tokens"])
  pairs = len(batch["reference_chosen"]) if "reference_chosen" in batch else rows

  def one(array: jax.Array) -> jax.Array:
    sides = len(array) // pairs
    divided = array.reshape(sides, pairs // count, count, *array.shape[1:])  # Each device keeps rows of its own.
    return jnp.moveaxis(divided, 2, 0).reshape(count, sides * pairs // count, *array.shape[1:])

  return jax.tree.map(one, batch)


Sums = tuple[llama.Llama, Metrics, jax.Array]  # Gradients and metrics, times their weights, and the weights.


def _sums(batch: Batch, model: llama.Llama, key: jax.Array, loss_fn: LossFn) -> Sums:
  """A batch's gradients and metrics, weighed by its target tokens where the loss is a mean over them."""
  (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(model, batch, key)
  weight = metrics.get("target_tokens", jnp.float32(1))
  return *jax.tree.map(lambda leaf: weight.astype(leaf.dtype) * leaf, (grads, metrics)), weight


def _in_turn(batch: Batch, model: llama.Llama, key: jax.Array, loss_fn: LossFn, accumulate: int) -> Sums:
  """`_sums` of a batch that goes through the model in parts, one after the other."""
  if accumulate == 1:
    return _sums(batch, model, key, loss_fn)

  def add(total: Sums, part: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
    one = _sums(part[0], model, jax.random.fold_in(key, part[1]), loss_fn)
    return jax.tree.map(jnp.add, total, one), None

  divided = parts(batch, accumulate)
  first = jax.tree.map(lambda array: array[0], divided)
  shapes = jax.eval_shape(functools.partial(_sums, loss_fn=loss_fn), first, model, key)
  zeros = (
    jax.tree.map(jnp.zeros_like, model),
    *jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1:]),
  )
  return mesh.scan(add, zeros, (divided, jnp.arange(accumulate)))[0]


def _gradients(
  model: llama.Llama, batch: Batch, key: jax.Array, loss_fn: LossFn, accumulate: int
) -> tuple[llama.Llama, Metrics]:
  """Gradients and metrics of a batch, divided among slices and within each computed in `accumulate` parts.

  A part weighs by its target tokens where the loss is a mean over them, so that the sum is the whole batch's.
  """
  slices = mesh.slices()
  if slices == accumulate == 1:
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(model, batch, key)
    return grads, metrics
  if slices == 1:
    grads, metrics, total = _in_turn(batch, model, key, loss_fn, accumulate)
  else:
    share = (parts(batch, slices), jnp.arange(slices))

    def one(share: tuple[Batch, jax.Array], model: llama.Llama, key: jax.Array) -> Sums:
      return _in_turn(share[0], model, jax.random.fold_in(key, share[1]), loss_fn, accumulate)

    grads, metrics, total = mesh.each_slice(one, share, model, key)
  some = jnp.maximum(total, 1)  # A batch without targets moves nothing.
  grads = jax.tree.map(lambda leaf: leaf / some.astype(leaf.dtype), grads)
  means = {name: value / some for name, value in metrics.items()}
  return grads, means | ({"target_tokens": total} if "target_tokens" in means else {})


def _advanced(finite: jax.Array, new: Any, old: Any) -> Any:
  """The new optimizer state where all is finite, else the old one; the schedule's count goes on with the steps."""

  def of_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  def one(after: Any, before: Any) -> Any:
    return after if of_schedule(after) else jnp.where(finite, after, before)

  return jax.tree.map(one, new, old, is_leaf=of_schedule)


def train_step(
  state: TrainState,
  batch: Batch,
  seed: jax.Array,
  *,
  loss_fn: LossFn,
  transform: optax.GradientTransformation,
  accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
  """One update. Dropout draws from (seed, step) alone, so that a resumed run repeats an uninterrupted one.

  (It draws by the batch's shape: see `batching.compact` for what changes with the number of devices.)

  Where the loss or the norm of the gradients is not finite, the step is skipped: parameters and moments stay what they
  are, the metric "skipped" is 1, and the next step comes with its own batch and learning rate.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  grads, metrics = _gradients(state.model, batch, key, loss_fn, accumulate)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
  updates, opt_state = transform.update(grads, state.opt_state, state.model)
  # A choice by element: the TPU's compiler makes it in the pass over the state that the update is anyway, and needs no
  # more memory (SFT of 70B on 64 v5p: 20.24 GiB a chip as before).
  model = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), optax.apply_updates(state.model, updates), state.model
  )
  metrics = {**metrics, "grad_norm": norm, "skipped": 1 - finite.astype(jnp.float32)}
  return TrainState(model, _advanced(finite, opt_state, state.opt_state), state.step + 1), metrics
