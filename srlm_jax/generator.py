"""The host side of sampling: requests in, completions out, in batches of static shape."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib

import jax
import numpy as np

from srlm_jax import batching, distributed, llama, mesh, sampling


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue `samples` times. `name` (with the seed) decides the text, whatever the batch or the order."""

  name: str
  tokens: tuple[int, ...]
  samples: int


@dataclasses.dataclass(frozen=True)
class Completion:
  """One continuation: its token ids (the end token included) and whether it ended by itself."""

  tokens: tuple[int, ...]
  finished: bool


def row_key(seed: int, name: str, sample: int) -> np.ndarray:
  """uint32 [2]: the RNG key of one continuation."""
  digest = hashlib.sha256(f"{seed}\x00{name}\x00{sample}".encode()).digest()
  return np.frombuffer(digest[:8], np.uint32)


@dataclasses.dataclass(frozen=True)
class Generator:
  """Runs one model over many requests.

  Attributes:
    model: the model.
    eos_id: its end token.
    sampling: temperature, top-p and the longest continuation.
    rows: continuations decoded at once, about: a batch holds rows // samples prompts, rounded to fill the devices.
    max_prompt: longest prompt in tokens; the caller checks it, a longer one is a ValueError here.
    seed: of all random draws.
  """

  model: llama.Llama
  eos_id: int
  sampling: sampling.Sampling
  rows: int
  max_prompt: int
  seed: int

  def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[Completion]]]:
    """Yields each request with its completions, in an order of its own: shortest bucket first.

    The next batch is dispatched before the last one is read, so that host work overlaps the device.
    """
    waiting: tuple[list[Request], tuple[jax.Array, jax.Array]] | None = None
    for length, batch in self._batches(requests):
      running = batch, self._dispatch(batch, length)
      if waiting:
        yield from self._collect(*waiting)
      waiting = running
    if waiting:
      yield from self._collect(*waiting)

  def option_probs(self, requests: Sequence[Request], options: Sequence[int]) -> Iterator[tuple[Request, np.ndarray]]:
    """Yields each request with float32 [options]: how its next token's probability is divided among the options."""
    ids = np.asarray(options, np.int32)
    for length, batch in self._batches(requests):
      prompts, lengths = self._pad(batch, length)
      probs = sampling.option_probs(self.model, prompts, lengths, ids, dtype=self.model.config.dtype)
      yield from zip(batch, np.asarray(distributed.whole(probs))[: len(batch)], strict=True)

  def _slots(self, samples: int) -> int:
    """Prompts of a batch: about rows // samples, a multiple of what the mesh in use divides a batch into."""
    ways = mesh.ways("batch")
    return max(self.rows // samples // ways, 1) * ways

  def _pad(self, batch: list[Request], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [R, P] and their lengths [R], empty slots at the end."""
    count = self._slots(batch[0].samples)
    lengths = np.zeros(count, np.int32)
    lengths[: len(batch)] = [len(request.tokens) for request in batch]
    return batching.pad([request.tokens for request in batch], length, count), lengths

  def _batches(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Request]]]:
    sizes = batching.doubling_buckets(32, self.max_prompt)
    groups: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
      groups.setdefault((batching.bucket(len(request.tokens), sizes), request.samples), []).append(request)
    for (length, samples), group in sorted(groups.items(), key=lambda item: item[0]):
      group.sort(key=lambda request: len(request.tokens))
      size = self._slots(samples)
      for start in range(0, len(group), size):
        yield length, group[start : start + size]

  def _dispatch(self, batch: list[Request], length: int) -> tuple[jax.Array, jax.Array]:
    samples = batch[0].samples
    prompts, lengths = self._pad(batch, length)
    keys = np.zeros((len(prompts) * samples, 2), np.uint32)
    for row, request in enumerate(batch):
      for sample in range(samples):
        keys[row * samples + sample] = row_key(self.seed, request.name, sample)
    out = sampling.generate(
      self.model,
      prompts,
      lengths,
      keys,
      samples=samples,
      sampling=self.sampling,
      eos_id=self.eos_id,
      dtype=self.model.config.dtype,
    )
    return distributed.whole(out)

  def _collect(
    self, batch: list[Request], out: tuple[jax.Array, jax.Array]
  ) -> Iterator[tuple[Request, list[Completion]]]:
    tokens, counts = jax.device_get(out)
    distributed.progress(f"generation: {batch[0].name}")
    for row, request in enumerate(batch):
      completions = []
      for index in range(row * request.samples, (row + 1) * request.samples):
        ids = tuple(tokens[index, : counts[index]].tolist())
        completions.append(Completion(ids, bool(ids) and ids[-1] == self.eos_id))
      yield request, completions
