"""The host side of sampling: requests in, completions out, through slots of static shape that are filled anew."""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import logging
import time

import jax
import numpy as np

from srlm_jax import batching, distributed, interruption, llama, mesh, sampling as sampling_lib

logger = logging.getLogger(__name__)

PREFIX = 64  # Prompts share what they all begin with in multiples of so many tokens.
FEWEST = 4  # Slots: with fewer a step takes as long.


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue `samples` times. `name` (with the seed) decides the text, whatever the batch or the order.

  `longest` may end each of its continuations sooner than the sampling's max_new.
  """

  name: str
  tokens: tuple[int, ...]
  samples: int
  longest: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
  """One continuation: its token ids (the end token included) and whether it ended by itself, or at a stop string.

  `logprobs`, where they were asked for, are those of the tokens under the model, before temperature and top-p.
  """

  tokens: tuple[int, ...]
  finished: bool
  logprobs: tuple[float, ...] | None = None


def row_key(seed: int, name: str, sample: int) -> np.ndarray:
  """uint32 [2]: the RNG key of one continuation."""
  digest = hashlib.sha256(f"{seed}\x00{name}\x00{sample}".encode()).digest()
  return np.frombuffer(digest[:8], np.uint32)


@dataclasses.dataclass
class Usage:
  """How well the slots were used.

  Attributes:
    drawn: tokens of texts.
    offered: tokens that all slots together could have drawn.
    steps: of the model, each a token for all slots.
    prefilled: tokens of prompts that went through the model.
  """

  drawn: int = 0
  offered: int = 0
  steps: int = 0
  prefilled: int = 0


@dataclasses.dataclass(frozen=True)
class Generator:
  """Runs one model over many requests.

  Attributes:
    model: the model.
    eos_id: its end token.
    sampling: temperature, top-p and the longest continuation.
    rows: continuations decoded at once, rounded to fill the devices.
    max_prompt: longest prompt in tokens; the caller checks it, a longer one is a ValueError here.
    seed: of all random draws.
    decode: token ids to text, for the sampling's stop strings.
    logprobs: whether completions carry them.
    usage: is added to.
  """

  model: llama.Llama
  eos_id: int
  sampling: sampling_lib.Sampling
  rows: int
  max_prompt: int
  seed: int
  decode: Callable[[Sequence[int]], str] | None = None
  logprobs: bool = False
  usage: Usage = dataclasses.field(default_factory=Usage)

  def __post_init__(self) -> None:
    if self.sampling.stop and self.decode is None:
      raise ValueError(f"stop strings {self.sampling.stop} need a tokenizer: give `decode`.")

  def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[Completion]]]:
    """Yields each request with its completions, as they end: those of short prompts begin first."""
    if requests:
      began, before = time.monotonic(), dataclasses.replace(self.usage)
      yield from _Run(self, self._buckets(requests)).results()
      drawn, offered = self.usage.drawn - before.drawn, self.usage.offered - before.offered
      rate = drawn / (time.monotonic() - began)
      logger.info(
        "%d texts: %d tokens, %.0f a second; %.0f %% of the slots' steps drew one",
        sum(request.samples for request in requests),
        drawn,
        rate,
        100 * drawn / offered,
      )

  def option_probs(self, requests: Sequence[Request], options: Sequence[int]) -> Iterator[tuple[Request, np.ndarray]]:
    """Yields each request with float32 [options]: how its next token's probability is divided among the options."""
    ids = np.asarray(options, np.int32)
    for bucket in self._buckets(requests) if requests else ():
      count = min(size for size in _ladder(self.rows) if size >= min(len(bucket.requests), self.rows))
      for start in range(0, len(bucket.requests), count):
        batch = bucket.requests[start : start + count]
        probs = sampling_lib.option_probs(self._prefill(bucket, batch, count), ids)
        yield from zip(batch, np.asarray(distributed.whole(probs))[: len(batch)], strict=True)

  def _buckets(self, requests: Sequence[Request]) -> list["_Bucket"]:
    """The requests by the length that holds what is their own of their prompts, shortest first."""
    shared = self._shared(requests)
    prefix = None
    if shared:
      tokens = np.asarray([requests[0].tokens[:shared]], np.int32)
      lengths = np.asarray([shared], np.int32)
      self.usage.prefilled += shared
      prefix = sampling_lib.prefill(self.model, tokens, lengths, dtype=self.model.config.dtype).cache
    sizes = batching.doubling_buckets(32, self.max_prompt)
    groups: dict[int, list[Request]] = {}
    for request in requests:
      if len(request.tokens) > self.max_prompt:
        batching.bucket(len(request.tokens), sizes)  # Raises.
      groups.setdefault(batching.bucket(len(request.tokens) - shared, sizes), []).append(request)
    return [
      _Bucket(length, sorted(group, key=lambda request: len(request.tokens)), shared, prefix)
      for length, group in sorted(groups.items())
    ]

  def _shared(self, requests: Sequence[Request]) -> int:
    """How many tokens at the beginning of all prompts, as of a judge's rubric, go through the model once for all."""
    if len(requests) < 2:
      return 0
    first, last = (choose(request.tokens for request in requests) for choose in (min, max))  # They differ soonest.
    longest = min(len(request.tokens) for request in requests) - 1  # What is sampled next needs a token of its own.
    same = next((place for place in range(longest) if first[place] != last[place]), longest)
    return same // PREFIX * PREFIX  # A multiple, so that the programs are few.

  def _prefill(self, bucket: "_Bucket", batch: Sequence[Request], count: int) -> sampling_lib.Prompts:
    """Sends a batch of prompts through the model, in `count` rows."""
    own = [request.tokens[bucket.shared :] for request in batch]
    self.usage.prefilled += sum(map(len, own))
    lengths = np.zeros(count, np.int32)
    lengths[: len(batch)] = [len(tokens) for tokens in own]
    rows = batching.pad(own, bucket.length, count)
    return sampling_lib.prefill(self.model, rows, lengths, bucket.prefix, dtype=self.model.config.dtype)


@dataclasses.dataclass(frozen=True)
class _Bucket:
  """Requests whose prompts go through the model by the same program.

  Attributes:
    length: holds what is each prompt's own.
    requests: shortest prompt first.
    shared: tokens that all prompts begin with, beside `length`.
    prefix: the cache of these.
  """

  length: int
  requests: list[Request]
  shared: int
  prefix: llama.Cache | None


def _ladder(rows: int) -> list[int]:
  """The numbers of slots that programs are compiled for: `rows`, half of it, and so on, in whole batches."""
  sizes = [mesh.whole_batch(rows)]
  while sizes[-1] > mesh.whole_batch(FEWEST):
    sizes.append(mesh.whole_batch(max(sizes[-1] // 2, FEWEST)))
  return sizes


class _Run:
  """Requests on their way through the slots.

  Prompts go through the model in batches, ahead of need; a slot whose continuation has ended begins another one after
  at most `steps` tokens; and where nothing is left to begin, the slots that still have work move together.
  """

  def __init__(self, engine: Generator, buckets: Sequence[_Bucket]) -> None:
    self.engine = engine
    self.queue = collections.deque((bucket, request) for bucket in buckets for request in bucket.requests)
    total = sum(request.samples for _, request in self.queue)
    self.count = min(size for size in _ladder(engine.rows) if size >= min(total, engine.rows))
    # Prompts that go through the model at once: for half of the slots.
    self.batch = mesh.whole_batch(self.count // self.queue[0][1].samples // 2)
    config, longest = engine.model.config, engine.sampling.max_new
    self.steps = min(max(longest // 10, 1), 8)
    self.slots = sampling_lib.empty(
      config,
      count=self.count,
      prompt=buckets[-1].shared + buckets[-1].length,
      longest=longest,
      dtype=config.dtype,
      logprobs=engine.logprobs,
    )
    self.holds: list[tuple[Request, int] | None] = [None] * self.count  # The request and sample in each slot.
    self.stopped = np.zeros(self.count, np.bool_)  # Slots whose text holds a stop string, until the device knows.
    self.read = np.zeros(self.count, np.int32)  # Tokens of each slot that hold none.
    self.prompts: sampling_lib.Prompts | None = None
    self.waiting: collections.deque[tuple[int, Request, int]] = collections.deque()  # (source, request, sample)
    self.found: dict[str, dict[int, Completion]] = {}

  def results(self) -> Iterator[tuple[Request, list[Completion]]]:
    """Yields each request once all its samples have ended; the caller's work overlaps the device's."""
    ready: list[tuple[Request, list[Completion]]] = []
    while self.queue or self.waiting or any(self.holds):
      self._fill()
      self.slots, steps = sampling_lib.advance(
        self.engine.model,
        self.slots,
        self.stopped,
        steps=self.steps,
        sampling=self.engine.sampling,
        eos_id=self.engine.eos_id,
      )
      slots, self.stopped = self.slots, np.zeros(self.count, np.bool_)
      interruption.check()
      seen = distributed.whole((steps, slots.done_B, slots.counts_B, slots.tokens_BG, slots.logprobs_BG))
      yield from ready
      ready = self._collect(*jax.device_get(seen))
      self._shrink()
    yield from ready

  def _fill(self) -> None:
    """Begins waiting continuations in the free slots."""
    free = [row for row, held in enumerate(self.holds) if held is None]
    while free and (self.waiting or self.queue):
      if not self.waiting:
        self._prefill()
      begun = [(free.pop(0), *self.waiting.popleft()) for _ in range(min(len(free), len(self.waiting)))]
      rows, sources, limits = np.zeros((3, self.count), np.int32)
      keys = np.zeros((self.count, 2), np.uint32)
      for place, (row, source, request, sample) in enumerate(begun):
        rows[place], sources[place] = row, source
        limits[place] = self.engine.sampling.max_new
        if request.longest:
          limits[place] = min(limits[place], request.longest[sample])
        keys[place] = row_key(self.engine.seed, request.name, sample)
        self.holds[row], self.stopped[row], self.read[row] = (request, sample), False, 0
      self.slots = sampling_lib.admit(self.slots, self.prompts, rows, sources, np.int32(len(begun)), limits, keys)

  def _prefill(self) -> None:
    """Sends the next prompts, all of one bucket, through the model."""
    bucket = self.queue[0][0]
    batch: list[Request] = []
    while self.queue and self.queue[0][0] is bucket and len(batch) < self.batch:
      batch.append(self.queue.popleft()[1])
    self.prompts = self.engine._prefill(bucket, batch, self.batch)
    self.waiting.extend((source, one, sample) for source, one in enumerate(batch) for sample in range(one.samples))

  def _collect(
    self, steps: np.ndarray, done_B: np.ndarray, counts_B: np.ndarray, tokens_BG: np.ndarray, logprobs_BG: np.ndarray
  ) -> list[tuple[Request, list[Completion]]]:
    """Frees the slots that have ended; the requests that are complete with them."""
    self.engine.usage.offered += int(steps) * self.count
    self.engine.usage.steps += int(steps)
    complete = []
    for row, held in enumerate(self.holds):
      if held is None or not (done_B[row] or self.engine.sampling.stop):
        continue
      ids = tuple(tokens_BG[row, : counts_B[row]].tolist())
      stop = self._stop(row, ids)
      if not (stop or done_B[row]):
        continue
      ids, (request, sample), self.holds[row] = ids[: stop or None], held, None
      self.stopped[row] = stop > 0
      self.engine.usage.drawn += len(ids)
      samples = self.found.setdefault(request.name, {})
      logprobs = tuple(logprobs_BG[row, : len(ids)].tolist()) if self.engine.logprobs else None
      samples[sample] = Completion(ids, stop > 0 or ids[-1] == self.engine.eos_id, logprobs)
      if len(samples) == request.samples:
        del self.found[request.name]
        complete.append((request, [samples[index] for index in range(request.samples)]))
        distributed.progress(f"generation: {request.name}")
    return complete

  def _stop(self, row: int, ids: tuple[int, ...]) -> int:
    """The number of tokens with which the text in a slot first holds a stop string; 0 where it holds none."""
    strings, decode = self.engine.sampling.stop, self.engine.decode
    if not strings or decode is None:
      return 0

    def holds_one(count: int) -> bool:
      text = decode(ids[:count])
      return any(string in text for string in strings)

    before, self.read[row] = int(self.read[row]), len(ids)
    if not holds_one(len(ids)):
      return 0
    return next(count for count in range(before + 1, len(ids) + 1) if holds_one(count))

  def _shrink(self) -> None:
    """Where nothing is left to begin and half of the slots (or of that …) would do, goes on with as many."""
    held = [row for row, one in enumerate(self.holds) if one is not None]
    fewer = min(size for size in _ladder(self.count) if size >= len(held))
    if self.queue or self.waiting or not held or fewer == self.count:
      return
    rest = [row for row, one in enumerate(self.holds) if one is None]
    rows = (held + rest)[:fewer]
    self.slots = sampling_lib.keep(self.slots, np.asarray(rows, np.int32))
    self.holds, self.count = [self.holds[row] for row in rows], fewer
    self.stopped, self.read = self.stopped[rows], self.read[rows]
