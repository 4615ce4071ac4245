"""Memory of host and device over many generation batches and train steps, through the loops that the stages use.

  launch/setup.sh test
  .venv/bin/python benchmarks/memory.py --write=memory         # memory.json and memory.png, too
  .venv/bin/python benchmarks/memory.py --loops=training --steps=5000 --save_every=20

"answers" and "judging": one shard of requests after the other, sampled and written (`artifacts.map_shards`);
"training": SFT steps with saved states (`train_loop.train`). After each batch the resident set of the process is read,
and the bytes of all arrays on devices (what the allocator has given out, where the backend says so). A curve is flat
where the median of its last quarter lies above that of the third by no more than --within MiB in 1,000 batches: in the
first half programs for rarer lengths are still compiled, and the allocator finds its size. Where one is not, it
exits with 1. The model is small and random: what a leak adds to each batch is all there is to see.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import io
import itertools
import json
import os
import sys
import tempfile
import time
from typing import Any

from absl import app, flags, logging as absl_logging
from etils import epath
import jax
from matplotlib.figure import Figure
import numpy as np
import psutil
import sentencepiece

from srlm_jax import (
  artifacts,
  batching,
  checkpoint,
  dataset,
  generator,
  llama,
  mesh as mesh_lib,
  records,
  rollout,
  sampling,
  templates,
  tokenizer,
  train_loop,
  train_step,
)

_LOOPS = flags.DEFINE_list("loops", ["answers", "judging", "training"], "What is run.")
_BATCHES = flags.DEFINE_integer("batches", 1000, "Shards of answers, and of judging.", lower_bound=20)
# A saved state moves the resident set by some MiB; among 20 of them in 1,000 steps that looks like a slope.
_STEPS = flags.DEFINE_integer("steps", 3000, "Train steps.", lower_bound=20)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 50, "Steps between two saved states.", lower_bound=1)
_EMBED = flags.DEFINE_integer("embed", 128, "Width of the model.", lower_bound=16)
_WITHIN = flags.DEFINE_float("within", 32.0, "MiB by which a flat curve may rise in 1,000 batches.")
_WRITE = flags.DEFINE_string("write", "", "Writes NAME.json, with every sample, and NAME.png, the curves.")

MIB, VOCAB = 2**20, 384
PROMPTS, SAMPLES = 8, 4  # Of a shard.
CURVES = {"host": "host: resident set", "device": "device: arrays, or what the allocator has given out"}


class Samples:
  """What the process holds after each batch of one loop."""

  def __init__(self) -> None:
    self._process, self._began = psutil.Process(), time.monotonic()
    self.host: list[float] = []
    self.device: list[float] = []
    self.arrays: list[int] = []
    self.seconds: list[float] = []

  def take(self) -> None:
    """Adds a sample."""
    live = jax.live_arrays()
    stats = [device.memory_stats() for device in jax.local_devices()]
    given = [one["bytes_in_use"] for one in stats if one]
    self.host.append(self._process.memory_info().rss / MIB)
    self.device.append((sum(given) if given else sum(array.nbytes for array in live)) / MIB)
    self.arrays.append(len(live))
    self.seconds.append(time.monotonic() - self._began)


def words() -> tokenizer.Tokenizer:
  """A SentencePiece tokenizer like Llama 2's, of the judge prompt's words."""
  text = templates.load_rubric("judge_tiny").fill("Name a bird.", "A crow. 0 1 2 3 4 5 6 7 8 9")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text.splitlines() * 20),
    model_writer=model,
    vocab_size=VOCAB,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  with tempfile.TemporaryDirectory() as folder:
    path = epath.Path(folder) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return tokenizer.load(path)


def shape() -> llama.LlamaConfig:
  """Of a small model."""
  return llama.LlamaConfig(VOCAB, _EMBED.value, 2, 4, 4, _EMBED.value // 4, 3 * _EMBED.value, 512, tied=True)


def shards(
  folder: epath.Path,
  mesh: jax.sharding.Mesh,
  speaker: rollout.Speaker,
  samples: Samples,
  items: Sequence[Any],
  work: Callable[[rollout.Speaker, Sequence[Any]], Sequence[records.Record]],
) -> None:
  """Works through the items as a stage that generates does."""
  out = artifacts.Artifact(folder, {}, {})
  out.begin()

  def measured(speaker: rollout.Speaker, part: Sequence[Any]) -> Sequence[records.Record]:
    made = work(speaker, part)
    samples.take()
    return made

  artifacts.map_shards(out, "shard", items, len(items) // _BATCHES.value, mesh, lambda: speaker, measured)


def text(rng: np.random.Generator) -> str:
  """Some words, between two and two dozen."""
  return " ".join(rng.choice(["crow", "bird", "Name", "the", "score", "response"], rng.integers(2, 24)))


def answers(folder: epath.Path, mesh: jax.sharding.Mesh, speaker: rollout.Speaker, samples: Samples) -> None:
  """Samples answers to new prompts."""
  rng, how = np.random.default_rng(0), sampling.Sampling(0.7, 0.9, 16)
  prompts = [
    records.Prompt(id=str(number), text=text(rng), source="made up") for number in range(PROMPTS * _BATCHES.value)
  ]
  shards(folder, mesh, speaker, samples, prompts, lambda who, part: rollout.answer(who, part, SAMPLES, how))


def judging(folder: epath.Path, mesh: jax.sharding.Mesh, speaker: rollout.Speaker, samples: Samples) -> None:
  """Judges responses."""
  rng, how = np.random.default_rng(1), sampling.Sampling(0.7, 0.9, 16)
  judged = [
    rollout.Candidate(str(number), sample, text(rng), text(rng))
    for number in range(PROMPTS // 2 * _BATCHES.value)
    for sample in range(2)
  ]
  asked = rollout.Judging(templates.load_rubric("judge_tiny"), 3, 1, how)
  shards(folder, mesh, speaker, samples, judged, lambda who, part: rollout.judge(who, part, asked))


def training(folder: epath.Path, mesh: jax.sharding.Mesh, speaker: rollout.Speaker, samples: Samples) -> None:
  """Trains on short examples that are read from a prepared dataset."""
  rng, config = np.random.default_rng(2), shape()
  examples = [
    batching.Example(tuple(rng.integers(3, config.vocab_size, rng.integers(8, 64)).tolist()), 4) for _ in range(512)
  ]
  dataset.write(folder / "dataset", batching.pack(examples, 64, packed=False))
  source = dataset.Compact(dataset.batches(folder / "dataset", 8, 0), mesh.size, places=mesh.size == 1)

  class Measured:
    """The batches, with a sample taken before each."""

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
      samples.take()
      return source[step]

  train_loop.train(
    config=config,
    start=functools.partial(checkpoint.init_model, config, mesh, 0),
    loss_fn=functools.partial(train_step.sft_loss, chunk=0),
    optimizer=train_step.OptimizerConfig(lr=1e-3, end_lr=1e-4, steps=_STEPS.value, warmup=10),
    batches=Measured(),
    mesh=mesh,
    folder=folder,
    seed=0,
    save_every=_SAVE_EVERY.value,
  )


LOOPS = {"answers": answers, "judging": judging, "training": training}


def rise(values: Sequence[float]) -> dict[str, float]:
  """Medians of the second, third and last quarter, and what 1,000 batches add from the third to the last."""
  second, third, last = (float(np.median(part)) for part in np.array_split(values, 4)[1:])
  added = (last - third) / len(values) * 4 * 1000
  return {"2nd quarter": round(second, 1), "3rd": round(third, 1), "4th": round(last, 1), "in 1,000": round(added, 2)}


def plot(taken: Mapping[str, Samples], path: str) -> None:
  """The curves of all loops, host and device."""
  figure = Figure(figsize=(8, 5), layout="constrained")
  for axes, (name, title) in zip(figure.subplots(2, 1, sharex=True), CURVES.items(), strict=True):
    for loop, samples in taken.items():
      axes.plot(getattr(samples, name), label=loop, linewidth=1)
    axes.set(title=title, ylabel="MiB", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
  axes.set(xlabel="batches")
  figure.savefig(path, dpi=120)


def main(_: list[str]) -> None:
  """Measures, prints a table and a line of JSON."""
  if unknown := set(_LOOPS.value) - set(LOOPS):
    raise app.UsageError(f"--loops: {', '.join(sorted(unknown))} is none of {', '.join(LOOPS)}.")
  absl_logging.set_verbosity(absl_logging.WARNING)
  mesh, tokens = mesh_lib.make_mesh(data=-1, fsdp=1), words()
  taken: dict[str, Samples] = {}
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as place:
    model = checkpoint.init_model(shape(), mesh, 0)

    def engine(how: sampling.Sampling, limit: int) -> generator.Generator:
      return generator.Generator(model, tokens.eos_id, how, PROMPTS * SAMPLES, limit, 0, tokens.decode)

    speaker = rollout.Speaker(engine, tokens, "llama2", 512)
    for name in _LOOPS.value:
      taken[name] = Samples()
      LOOPS[name](epath.Path(place) / name, mesh, speaker, taken[name])
  rows, flat = [], True
  for (name, samples), curve in itertools.product(taken.items(), CURVES):
    found = rise(getattr(samples, curve))
    good = found["in 1,000"] <= _WITHIN.value
    flat &= good
    rows.append({"loop": name, "of": curve, "batches": len(samples.host), "MiB": found, "flat": good})
  for row in rows:
    print("  ".join(f"{key} {value}" for key, value in row.items()))
  versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
  result = {"rows": rows, "flat": flat, "within MiB": _WITHIN.value, **versions}
  if _WRITE.value:
    curves = {name: vars(samples) for name, samples in taken.items()}
    curves = {name: {key: row for key, row in one.items() if isinstance(row, list)} for name, one in curves.items()}
    epath.Path(f"{_WRITE.value}.json").write_text(json.dumps({**result, "samples": curves}))
    plot(taken, f"{_WRITE.value}.png")
  print(json.dumps(result))
  sys.exit(0 if flat else 1)


if __name__ == "__main__":
  app.run(main)
