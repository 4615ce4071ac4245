"""DPO's training set: pairs as arrays, with the reference model's log-probs in them."""

from collections.abc import Sequence

from etils import epath
import jax
import numpy as np

from srlm_jax import batching, dataset, distributed, llama, logprobs, mesh as mesh_lib, records


def row_length(pairs: Sequence[records.PreferencePair], longest: int) -> int:
  """The length bucket that holds every pair: one static shape for the reference pass and for training."""
  most = max(len(pair.prompt_tokens) + max(len(pair.chosen_tokens), len(pair.rejected_tokens)) for pair in pairs)
  return batching.bucket(most, batching.doubling_buckets(32, longest))


def pair_row(pair: records.PreferencePair, length: int) -> dict[str, np.ndarray]:
  """The arrays of a pair, [2, T] each: chosen first, rejected second."""
  prompt = pair.prompt_tokens
  examples = [
    batching.Example((*prompt, *tokens), len(prompt)) for tokens in (pair.chosen_tokens, pair.rejected_tokens)
  ]
  sides = batching.pack(examples, length, packed=False)
  return {name: np.stack([side[name] for side in sides]) for name in sides[0]}


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """B pair rows to arrays [2B, T]: the B chosen rows first, then the rejected ones in the same order."""
  return {name: np.concatenate([np.stack([row[name][side] for row in rows]) for side in (0, 1)]) for name in rows[0]}


def lean(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
  """Stacked pairs without most of their padding (`batching.compact`), and where their targets are, on one device."""
  batch = batching.compact(batch, mesh.size // mesh.shape["tensor"])
  return batching.with_places(batch) if mesh.size == 1 else batch


_score = jax.jit(logprobs.sequence_logprobs, static_argnames=("chunk", "count"))  # One for all iterations of a run.


def reference_logprobs(
  model: llama.Llama, rows: Sequence[dict[str, np.ndarray]], size: int, chunk: int, mesh: jax.sharding.Mesh
) -> np.ndarray:
  """float32 [pairs, 2]: log-prob of chosen and rejected under the reference, by the trainer's own pass.

  Args:
    model: the reference, without dropout.
    rows: of `pair_row`.
    size: pairs in a batch, as in a train step.
    chunk: see logprobs.next_token_logprobs.
    mesh: the devices.
  """
  sharding = jax.sharding.NamedSharding(mesh, mesh_lib.spec(("batch",)))
  out: list[np.ndarray] = []
  pending: jax.Array | None = None

  def read(scored: jax.Array) -> None:
    both = np.asarray(distributed.whole(scored))
    out.append(np.stack([both[:size], both[size:]], axis=1))
    distributed.progress(f"reference log-probs of pair {size * len(out)}")

  for start in range(0, len(rows), size):
    part = list(rows[start : start + size])
    batch = lean(stack(part + [part[-1]] * (size - len(part))), mesh)
    scored = _score(model, distributed.place(batch, sharding), chunk=chunk, count=2 * size)
    if pending is not None:  # One batch late, so that the device never waits for the host.
      read(pending)
    pending = scored
  if pending is not None:
    read(pending)
  return np.concatenate(out)[: len(rows)]


def write(folder: epath.Path, rows: Sequence[dict[str, np.ndarray]], reference: np.ndarray) -> None:
  """Prepares the dataset: every row with its two reference log-probs."""
  dataset.write(
    folder, [{**row, "reference": logp.astype(np.float32)} for row, logp in zip(rows, reference, strict=True)]
  )


class Batches:
  """Batches of a written pair set as dpo_loss takes them; item k is the batch of step k."""

  def __init__(self, folder: epath.Path, size: int, seed: int, mesh: jax.sharding.Mesh | None = None) -> None:
    """Reads a written pair set.

    Args:
      folder: of it.
      size: pairs in a batch.
      seed: of the order.
      mesh: sequences share rows where they fit (`lean`), divided over these devices; None for a row each, as a batch
        needs that goes through the model in parts.
    """
    self._source, self._mesh = dataset.batches(folder, size, seed), mesh

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    batch = dict(self._source[step])
    reference = batch.pop("reference")
    sides = {name: value.swapaxes(0, 1).reshape(-1, value.shape[-1]) for name, value in batch.items()}
    if self._mesh is not None:
      sides = lean(sides, self._mesh)
    return {**sides, "reference_chosen": reference[:, 0], "reference_rejected": reference[:, 1]}
