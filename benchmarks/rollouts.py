"""Rollouts against what users would pick instead: one checkpoint, the same prompts, lengths and sampling, in turn.

  launch/setup.sh --torch test,bench
  .venv/bin/python benchmarks/rollouts.py --model=15m --workload=answers --slots=32
  .venv/bin/python benchmarks/rollouts.py --model=110m --workload=judging --slots=32 --rounds=1
  .venv/bin/python benchmarks/rollouts.py --model=110m --workload=sharing

"answers": 64 prompts × 4 samples, lengths lognormal; "judging": 256 judge prompts (the real rubric and, where
SRLM_REAL_DATA names it, the real Llama 2 tokenizer) × 3 votes; "sharing": what a sample costs as a prompt of 512 tokens
has more of them, without peers. Each continuation has a length of its own, the same for all: ours ends it there, peers
are told to. Peers: transformers' generate, in batches of as many rows as ours has slots or of four times as many,
whichever is faster on one batch; and llama.cpp by its low-level calls, with continuous batching.

On an accelerator everything is bfloat16, and transformers runs there, too: XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 leaves it
room. --peers= measures ours alone, as shares of what the chip can do, and needs no torch.
Prints a table, and a line of JSON.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any
import zlib

from absl import app, flags
import jax
import machine
import numpy as np
import peers

from srlm_jax import attention, convert, generator, llama, mesh, sampling, templates, tokenizer, xla_flags

_MODEL = flags.DEFINE_enum("model", "15m", ["15m", "110m", "1b", "7b"], "Shape of the random Llama.")
_WORKLOAD = flags.DEFINE_enum("workload", "answers", ["answers", "judging", "sharing"], "What is generated.")
_PEERS = flags.DEFINE_list("peers", ["transformers", "llama.cpp"], "Those to compare with; --peers= for none.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each side, in turn.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 32, "Continuations decoded at once.", lower_bound=1)
_MEDIAN = flags.DEFINE_integer("median", 0, "Of the lengths in tokens; 0: 64 for answers, 40 for judging.")
_SAMPLES = flags.DEFINE_integer("samples", 0, "Of each prompt; 0: 4 for answers, 3 for judging.")
_PROMPTS = flags.DEFINE_integer("prompts", 0, "0: 64 for answers, 256 for judging, 16 for sharing.")

VOCAB = 32000
SHAPES = {
  "15m": dict(hidden_size=288, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768),
  "110m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048),
  "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, intermediate_size=8192),
  "7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008),
}


def workload(rng: np.random.Generator) -> peers.Work:
  """The prompts and lengths that the flags ask for."""
  judging = _WORKLOAD.value == "judging"
  count, samples = _PROMPTS.value or (256 if judging else 64), _SAMPLES.value or (3 if judging else 4)
  median = _MEDIAN.value or (40 if judging else 64)
  lengths = np.clip(rng.lognormal(np.log(median), 0.8, (count, samples)).astype(int), 4, 5 * median)
  if not judging:
    return peers.Work([tuple(rng.integers(3, VOCAB, size).tolist()) for size in rng.integers(16, 128, count)], lengths)
  rubric = templates.load_rubric("judge_additive")
  head, tail = rubric.fill("\x00", "\x01").split("\x00")
  middle, end = tail.split("\x01")
  pieces = [_encode(text) for text in (head, middle, end)]
  drawn = (
    (rng.integers(3, VOCAB, size).tolist() for size in (rng.integers(8, 40), rng.integers(20, 160)))
    for _ in range(count)
  )
  return peers.Work([(*pieces[0], *asked, *pieces[1], *answer, *pieces[2]) for asked, answer in drawn], lengths)


def _encode(text: str) -> tuple[int, ...]:
  place = pathlib.Path(os.environ.get("SRLM_REAL_DATA", "")) / "llama2_tokenizer.model"
  if place.is_file():
    return tuple(tokenizer.load(place).encode(text))
  words = (word for word in text.split() for _ in (0, 1))  # About as many tokens.
  return tuple(3 + zlib.crc32(word.encode()) % (VOCAB - 3) for word in words)


def ours(model: llama.Llama, work: peers.Work, slots: int) -> tuple[float, generator.Usage]:
  """Seconds, and how the slots were used."""
  usage = generator.Usage()
  limit = max(map(len, work.prompts))
  # No token ends a text by itself: the lengths do.
  how = sampling.Sampling(max_new=work.longest, **peers.HOW)
  engine = generator.Generator(model, -1, how, slots, limit, 0, usage=usage)
  requests = [
    generator.Request(str(number), prompt, len(lengths), tuple(lengths.tolist()))
    for number, (prompt, lengths) in enumerate(zip(work.prompts, work.lengths, strict=True))
  ]
  began = time.perf_counter()
  drawn = sum(len(one.tokens) for _, texts in engine.generate(requests) for one in texts)
  took = time.perf_counter() - began
  assert drawn == work.lengths.sum() == usage.drawn
  return took, usage


def models(folder: str, wanted: list[str]) -> tuple[llama.Llama, Any]:
  """The model of the flags as ours and, for the wanted peers, as transformers'."""
  kind = attention.best_for(jax.default_backend())
  if not wanted:
    shape = SHAPES[_MODEL.value]
    heads = shape["num_attention_heads"]
    config = llama.LlamaConfig(
      VOCAB,
      shape["hidden_size"],
      shape["num_hidden_layers"],
      heads,
      heads,
      shape["hidden_size"] // heads,
      shape["intermediate_size"],
      2048,
      attention=kind,
    )
    if jax.default_backend() != "cpu":
      config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    return jax.jit(llama.Llama, static_argnums=0)(config, jax.random.key(0)), None
  import torch
  import transformers

  torch.manual_seed(0)
  shape = transformers.LlamaConfig(vocab_size=VOCAB, max_position_embeddings=2048, **SHAPES[_MODEL.value])
  theirs = transformers.LlamaForCausalLM(shape).eval()
  if jax.default_backend() != "cpu":
    theirs = theirs.to("cuda", torch.bfloat16)
  theirs.save_pretrained(folder)
  model = convert.import_hf(folder, jax.sharding.get_mesh())
  model.config = model.layers.config = dataclasses.replace(model.config, attention=kind)
  return model, theirs


def others(wanted: list[str], theirs: Any, work: peers.Work, folder: str) -> dict[str, Callable[[], float]]:
  """What runs each wanted peer once, ready to run."""
  found: dict[str, Callable[[], float]] = {}
  if "transformers" in wanted:
    samples = work.lengths.shape[1]

    def cost(rows: int) -> float:  # Of a token, on one batch of so many rows: its better batch size counts.
      batch = work.part(max(rows // samples, 1))
      return peers.transformers(theirs, batch, rows) / int(batch.lengths.sum())

    rows = min((_SLOTS.value, 4 * _SLOTS.value), key=cost)
    found["transformers"] = lambda: peers.transformers(theirs, work, rows)
  if "llama.cpp" in wanted:
    path = pathlib.Path(folder) / "model.gguf"
    peers.write_gguf(theirs, path)
    places = max(map(len, work.prompts)) + work.longest
    found["llama.cpp"] = peers.LlamaCpp(path, _SLOTS.value, places, os.cpu_count() or 1).run(work)
  return found


def compare(wanted: list[str], model: llama.Llama, theirs: Any, folder: str) -> dict[str, Any]:
  """Runs all sides in turn, after one run of each to warm up."""
  work = workload(np.random.default_rng(0))
  total = int(work.lengths.sum())
  runs = others(wanted, theirs, work, folder)
  ours(model, work, _SLOTS.value)
  times: dict[str, list[float]] = {"ours": [], **{name: [] for name in runs}}
  for number in range(_ROUNDS.value):
    took, usage = ours(model, work, _SLOTS.value)
    times["ours"].append(took)
    for name, run in runs.items():
      times[name].append(run())
    print(f"round {number + 1}:", ", ".join(f"{name} {total / took[-1]:.0f} tokens/s" for name, took in times.items()))
  found = {
    "prompts": len(work.prompts),
    "samples": work.lengths.shape[1],
    "prompt tokens": sum(map(len, work.prompts)),
    "tokens": total,
    "slots": _SLOTS.value,
    "slot use": round(usage.drawn / usage.offered, 3),
  }
  for name, took in times.items():
    found[f"{name} tokens/s"] = round(total / statistics.median(took), 1)
  for name in runs:
    ratios = [theirs / mine for mine, theirs in zip(times["ours"], times[name], strict=True)]
    found[f"against {name}"] = round(statistics.median(ratios), 2)
    found[f"against {name}, spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
  return found | _limits(model, len(work.prompts), usage, statistics.median(times["ours"]))


def _limits(model: llama.Llama, texts: int, usage: generator.Usage, took: float) -> dict[str, Any]:
  """How long it would take to read the weights once a step, or to do the matmuls with them, at the machine's best."""
  width = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
  head = model.embedding[...].size  # The table of what goes in is only looked up.
  weights = sum(leaf.size for leaf in jax.tree.leaves(model)) - head
  bandwidth, peak = machine.bandwidth(), machine.matmul_peak("float32" if width == 4 else "bfloat16")
  reading = usage.steps * weights * width / bandwidth
  computing = 2 * (weights * usage.drawn + (weights - head) * usage.prefilled + head * texts) / peak
  return {
    "memory GB/s": round(bandwidth / 1e9, 1),
    "matmul GFLOP/s": round(peak / 1e9),
    "reading weights alone, % of our time": round(100 * reading / took, 1),
    "matmuls alone, % of our time": round(100 * computing / took, 1),
  }


def sharing(model: llama.Llama) -> dict[str, Any]:
  """Milliseconds for a sample of 64 tokens as a prompt of 512 has 1, 2, 4 and 8 of them."""
  rng, count = np.random.default_rng(0), _PROMPTS.value or 16
  prompts = [tuple(rng.integers(3, VOCAB, 512).tolist()) for _ in range(count)]
  works = {n: peers.Work(prompts, np.full((count, n), _MEDIAN.value or 64)) for n in (1, 2, 4, 8)}
  for work in works.values():
    ours(model, work, _SLOTS.value)
  took: dict[int, list[float]] = {n: [] for n in works}
  for _ in range(_ROUNDS.value):
    for n, work in works.items():
      took[n].append(ours(model, work, _SLOTS.value)[0])
  cost = {n: 1000 * statistics.median(times) / count / n for n, times in took.items()}
  # A sample costs decoding and its part of the prompt: cost(N) = decode + prompt / N, from N = 1 and 8.
  prompt = (cost[1] - cost[8]) / (1 - 1 / 8)
  print("samples of a prompt  ms a sample  expected")
  for n, value in cost.items():
    print(f"{n:>19}  {value:>11.1f}  {cost[1] - prompt * (1 - 1 / n):>8.1f}")
  return {f"ms a sample, N = {n}": round(value, 1) for n, value in cost.items()} | {"prompts": count}


def main(_: list[str]) -> None:
  """Measures, and prints."""
  xla_flags.prepare(os.environ)
  devices = mesh.make_mesh(data=-1, fsdp=1)
  wanted = [] if _WORKLOAD.value == "sharing" else _PEERS.value
  with jax.set_mesh(devices), tempfile.TemporaryDirectory() as folder:
    model, theirs = models(folder, wanted)
    found = sharing(model) if _WORKLOAD.value == "sharing" else compare(wanted, model, theirs, folder)
  versions = {"jax": jax.__version__}
  if theirs is not None:
    import torch
    import transformers

    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
  head = {"workload": _WORKLOAD.value, "model": _MODEL.value}
  found = head | found | {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "versions": versions}
  width = max(map(len, found))
  print("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
  print(json.dumps(found))


if __name__ == "__main__":
  app.run(main)
