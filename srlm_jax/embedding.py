"""Texts as vectors: a model's mean-pooled final hidden states, or what any sentence encoder wrote into a file."""

from collections.abc import Sequence
import zipfile
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import batching, distributed, llama, mesh as mesh_lib

_OF_ARCHIVES = (OSError, EOFError, NotImplementedError, RuntimeError, zlib.error, zipfile.BadZipFile)
LARGEST = 8 << 30  # Bytes of a file of vectors, unpacked: 250,000 of 8,192 numbers.


@jax.jit
def mean_pooled(model: llama.Llama, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """float32 [B, D]: the mean of the final hidden states (after the norm) of each row's first `lengths_B` tokens."""
  index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  valid_BT = index_BT < lengths_B[:, None]
  hidden_BTD = model(tokens_BT, index_BT, valid_BT.astype(jnp.int32)).astype(jnp.float32)
  # A masked sum and no product with the mask: what stands for padding means nothing and may be NaN.
  sums_BD = jnp.sum(jnp.where(valid_BT[..., None], hidden_BTD, 0.0), axis=1)
  return sums_BD / jnp.maximum(lengths_B, 1)[:, None]


def of_model(
  model: llama.Llama, prompts: Sequence[Sequence[int]], rows: int, longest: int, mesh: jax.sharding.Mesh
) -> np.ndarray:
  """float32 [N, D]: the mean-pooled states of each prompt, in their order. Called with the mesh in use.

  Args:
    model: without dropout.
    prompts: token ids, none of them longer than `longest`.
    rows: prompts that go through the model at once, at least as many as the mesh divides a batch into.
    longest: the largest length bucket.
    mesh: the devices.
  """
  rows = mesh_lib.whole_batch(rows)
  sharding = jax.sharding.NamedSharding(mesh, mesh_lib.spec(("batch",)))
  buckets = batching.doubling_buckets(32, longest)
  parts: dict[int, list[int]] = {}
  for place, prompt in enumerate(prompts):
    parts.setdefault(batching.bucket(len(prompt), buckets), []).append(place)
  out = np.zeros((len(prompts), model.config.embed), np.float32)
  pending: tuple[list[int], jax.Array] | None = None

  def read(places: list[int], pooled: jax.Array) -> None:
    out[places] = np.asarray(distributed.whole(pooled))[: len(places)]
    distributed.progress(f"states of prompt {places[-1]}")

  for length, places in sorted(parts.items()):
    for start in range(0, len(places), rows):
      part = places[start : start + rows]
      batch = {
        "tokens": batching.pad([prompts[place] for place in part], length, rows),
        "lengths": np.array([len(prompts[place]) for place in part] + [0] * (rows - len(part)), np.int32),
      }
      placed = distributed.place(batch, sharding)
      pooled = mean_pooled(model, placed["tokens"], placed["lengths"])
      if pending is not None:  # One batch late, so that the device never waits for the host.
        read(*pending)
      pending = part, pooled
  if pending is not None:
    read(*pending)
  return out


def from_file(path: epath.Path, ids: Sequence[str]) -> np.ndarray:
  """float32 [N, D]: the vectors of these ids in an .npz file, as `load` reads it; ValueError where it lacks an id."""
  rows, vectors = load(path)
  missing = [name for name in ids if name not in rows]
  if missing:
    raise ValueError(
      f"analysis.vectors={path} lacks {len(missing)} of {len(ids)} ids, {missing[0]!r} first: {_form(path)}."
    )
  return vectors[[rows[name] for name in ids]]


def _form(path: epath.Path) -> str:
  return f"write it with numpy.savez({path.name!r}, ids=[…], vectors=[[…], …]), a row for each id of prompts.jsonl"


def load(path: epath.Path) -> tuple[dict[str, int], np.ndarray]:
  """The row of each id, and the rows, of an .npz file with the arrays `ids` (text) [M] and `vectors` [M, D].

  ValueError where the file is another one, larger than LARGEST, or has an id twice or a value that is not finite.
  """
  form = _form(path)
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
      size = sum(part.file_size for part in arrays.zip.infolist())
      if size > LARGEST:  # A small archive may unpack to anything.
        raise ValueError(f"it unpacks to {size:,} bytes, of at most {LARGEST:,}")
      with np.errstate(over="ignore"):  # What is too large for float32 is refused below.
        names, vectors = arrays["ids"], np.asarray(arrays["vectors"], np.float32)
  except FileNotFoundError as error:
    raise ValueError(f"analysis.vectors={path}: there is no such file: {form}.") from error
  except (*_OF_ARCHIVES, KeyError, ValueError, TypeError, AttributeError) as error:  # The last four: other arrays.
    raise ValueError(
      f"analysis.vectors={path}: not an .npz file with `ids` and `vectors` ({error}): {form}."
    ) from error
  if vectors.ndim != 2 or names.shape != vectors.shape[:1]:
    raise ValueError(f"analysis.vectors={path}: ids {names.shape} and vectors {vectors.shape} do not fit: {form}.")
  rows = {str(name): row for row, name in enumerate(names)}
  if len(rows) < len(names):
    raise ValueError(f"analysis.vectors={path}: {len(names) - len(rows)} of its ids are there twice: {form}.")
  odd = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
  if odd.size:
    raise ValueError(
      f"analysis.vectors={path}: the vector of {str(names[odd[0]])[:80]!r} has a value that is not finite in float32; "
      f"{odd.size} have one: give finite ones."
    )
  return rows, vectors
