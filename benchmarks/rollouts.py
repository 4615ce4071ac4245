"""Rollouts against transformers' generate: the same checkpoint, prompts, lengths and sampling, in turn, in one run.

  launch/setup.sh --torch test
  .venv/bin/python benchmarks/rollouts.py --model=15m --workload=answers --rounds=3

"answers": 64 prompts × 4 samples, lengths lognormal; "judging": 256 judge prompts (the real rubric and, where
SRLM_REAL_DATA names it, the real Llama 2 tokenizer) × 3 votes. Each continuation has a length of its own, the same on
both sides: ours ends it there, theirs is told to draw the end token there. Theirs decodes with a KV cache, left padding
and num_return_sequences, prompts sorted by length, in batches of as many rows as ours has slots, and once more with all
of them in one batch; the faster counts. Prints a table, and a line of JSON.
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
import numpy as np

from srlm_jax import convert, generator, mesh, sampling, templates, tokenizer

_MODEL = flags.DEFINE_enum("model", "15m", ["15m", "110m"], "Shape of the random Llama.")
_WORKLOAD = flags.DEFINE_enum("workload", "answers", ["answers", "judging"], "What is generated.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each side, in turn.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 64, "Continuations decoded at once.", lower_bound=1)
_MEDIAN = flags.DEFINE_integer("median", 0, "Of the lengths in tokens; 0: 64 for answers, 40 for judging.")
_SAMPLES = flags.DEFINE_integer("samples", 0, "Of each prompt; 0: 4 for answers, 3 for judging.")
_PROMPTS = flags.DEFINE_integer("prompts", 0, "0: 64 for answers, 256 for judging.")

SHAPES = {
  "15m": dict(hidden_size=288, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768),
  "110m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048),
}
VOCAB, EOS, PAD = 32000, 2, 0
HOW = dict(temperature=0.7, top_p=0.9)


@dataclasses.dataclass(frozen=True)
class Work:
  """Prompts, and the length of every continuation of each."""

  prompts: list[tuple[int, ...]]
  lengths: np.ndarray  # int [prompts, samples]

  @property
  def longest(self) -> int:
    """Tokens of the longest continuation."""
    return int(self.lengths.max())


def workload(rng: np.random.Generator) -> Work:
  """The prompts and lengths that the flags ask for."""
  judging = _WORKLOAD.value == "judging"
  count, samples = _PROMPTS.value or (256 if judging else 64), _SAMPLES.value or (3 if judging else 4)
  median = _MEDIAN.value or (40 if judging else 64)
  lengths = np.clip(rng.lognormal(np.log(median), 0.8, (count, samples)).astype(int), 4, 5 * median)
  if not judging:
    return Work([tuple(rng.integers(3, VOCAB, size)) for size in rng.integers(16, 128, count)], lengths)
  rubric = templates.load_rubric("judge_additive")
  head, tail = rubric.fill("\x00", "\x01").split("\x00")
  middle, end = tail.split("\x01")
  pieces = [_encode(text) for text in (head, middle, end)]
  drawn = (
    (rng.integers(3, VOCAB, size) for size in (rng.integers(8, 40), rng.integers(20, 160))) for _ in range(count)
  )
  return Work([(*pieces[0], *asked, *pieces[1], *answer, *pieces[2]) for asked, answer in drawn], lengths)


def _encode(text: str) -> tuple[int, ...]:
  place = pathlib.Path(os.environ.get("SRLM_REAL_DATA", "")) / "llama2_tokenizer.model"
  if place.is_file():
    return tuple(tokenizer.load(place).encode(text))
  words = (word for word in text.split() for _ in (0, 1))  # About as many tokens.
  return tuple(3 + zlib.crc32(word.encode()) % (VOCAB - 3) for word in words)


def ours(model: Any, work: Work, slots: int) -> tuple[float, generator.Usage]:
  """Seconds, and how the slots were used."""
  usage = generator.Usage()
  limit = max(map(len, work.prompts))
  # No token ends a text by itself: the lengths do. Each sample is a request, and those of a prompt share its prefill.
  engine = generator.Generator(model, -1, sampling.Sampling(max_new=work.longest, **HOW), slots, limit, 0, usage)
  requests = [
    generator.Request(str(number), prompt, len(lengths), tuple(lengths.tolist()))
    for number, (prompt, lengths) in enumerate(zip(work.prompts, work.lengths, strict=True))
  ]
  began = time.perf_counter()
  drawn = sum(len(one.tokens) for _, texts in engine.generate(requests) for one in texts)
  took = time.perf_counter() - began
  assert drawn == work.lengths.sum() == usage.drawn
  return took, usage


def theirs(model: Any, work: Work, rows: int) -> float:
  """Seconds of transformers."""
  import torch
  import transformers

  class Ends(transformers.LogitsProcessor):
    """The end token at each row's length, and not before."""

    def __init__(self, lengths: np.ndarray, start: int) -> None:
      self.lengths, self.start = torch.as_tensor(lengths), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
      ended = input_ids.shape[1] - self.start >= self.lengths - 1
      scores[:, EOS] = torch.where(ended, 1e9, -torch.inf)
      return scores

  order = sorted(range(len(work.prompts)), key=lambda number: len(work.prompts[number]))
  samples = work.lengths.shape[1]
  size, drawn = max(rows // samples, 1), 0
  began = time.perf_counter()
  for start in range(0, len(order), size):
    batch = order[start : start + size]
    width = max(len(work.prompts[number]) for number in batch)
    ids = torch.full((len(batch), width), PAD)
    for row, number in enumerate(batch):
      ids[row, width - len(work.prompts[number]) :] = torch.as_tensor(work.prompts[number])
    lengths = work.lengths[batch].reshape(-1)
    out = model.generate(
      input_ids=ids,
      attention_mask=(ids != PAD).long(),
      do_sample=True,
      top_k=0,
      num_return_sequences=samples,
      max_new_tokens=int(lengths.max()),
      eos_token_id=EOS,
      pad_token_id=PAD,
      logits_processor=transformers.LogitsProcessorList([Ends(lengths, width)]),
      **HOW,
    )
    drawn += int((out[:, width:] != PAD).sum())
  took = time.perf_counter() - began
  assert drawn <= work.lengths.sum() and drawn > 0.99 * work.lengths.sum()  # Token 0 may be drawn as a word.
  return took


def main(_: list[str]) -> None:
  """Runs both sides in turn, after one run of each to warm up."""
  import torch
  import transformers

  torch.manual_seed(0)
  shape = transformers.LlamaConfig(vocab_size=VOCAB, max_position_embeddings=2048, **SHAPES[_MODEL.value])
  torch_model = transformers.LlamaForCausalLM(shape).eval()
  with tempfile.TemporaryDirectory() as folder:
    torch_model.save_pretrained(folder)
    devices = mesh.make_mesh(data=-1, fsdp=1)
    jax_model = convert.import_hf(folder, devices)
  work = workload(np.random.default_rng(0))
  total, most = int(work.lengths.sum()), len(work.prompts) * work.lengths.shape[1]

  def both(run: Callable[[], Any]) -> Any:
    with jax.set_mesh(devices), torch.inference_mode():
      return run()

  batches = {rows: both(lambda rows=rows: theirs(torch_model, work, rows)) for rows in (_SLOTS.value, most)}
  rows = min(batches, key=batches.__getitem__)  # Its better batch size; this was its warm-up, too.
  both(lambda: ours(jax_model, work, _SLOTS.value))
  times: list[tuple[float, float]] = []
  for number in range(_ROUNDS.value):
    mine, usage = both(lambda: ours(jax_model, work, _SLOTS.value))
    times.append((mine, both(lambda: theirs(torch_model, work, rows))))
    ratio = times[-1][1] / times[-1][0]
    print(
      f"round {number + 1}: ours {total / mine:.0f}, transformers {total / times[-1][1]:.0f} tokens/s: {ratio:.2f} ×"
    )
  ratios = [other / mine for mine, other in times]
  found = {
    "workload": _WORKLOAD.value,
    "model": _MODEL.value,
    "prompts": len(work.prompts),
    "samples": work.lengths.shape[1],
    "prompt tokens": sum(map(len, work.prompts)),
    "tokens": total,
    "slots": _SLOTS.value,
    "slot use": round(usage.drawn / usage.offered, 3),
    "ours tokens/s": round(total / statistics.median(mine for mine, _ in times), 1),
    "transformers tokens/s": round(total / statistics.median(other for _, other in times), 1),
    "transformers rows": rows,
    "ratio median": round(statistics.median(ratios), 2),
    "ratio spread": [round(min(ratios), 2), round(max(ratios), 2)],
    "device": jax.devices()[0].device_kind,
    "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    "threads": torch.get_num_threads(),
  }
  width = max(map(len, found))
  print("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
  print(json.dumps(found))


if __name__ == "__main__":
  app.run(main)
