"""Training steps against TRL's SFTTrainer and DPOTrainer: one checkpoint, the same batches and updates, in turn.

  launch/setup.sh --torch test,bench
  .venv/bin/python benchmarks/training.py --model=110m --method=sft

Ours is `train_loop.train` over a prepared dataset, theirs `trainer.train()`: float32, no dropout, AdamW, clipping at 1,
loss on responses alone; all lines update from the same examples in the same order. Each line runs in a thread of its
own, some steps at a time, loading of data included. Tokens are the examples' own: no padding, a pair's prompt twice.
TRL is as it comes, but for float32, its data in the order in which ours is read, and no gradient checkpointing, which
only saves memory. Prints a table, and a line of JSON.

On an accelerator, --model=1b or 7b (random weights, computed in bfloat16; 7b's parameters and moments are, too)
measures ours alone, as a share of the chip's matmul peak:

  .venv/bin/python benchmarks/training.py --model=1b --length=2048 --batch=16
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax
import machine
import numpy as np

from srlm_jax import (
  attention,
  batching,
  convert,
  dataset,
  llama,
  mesh,
  pairset,
  records,
  train_loop,
  train_step,
  xla_flags,
)

_METHOD = flags.DEFINE_enum("method", "sft", ["sft", "dpo"], "What is trained.")
_MODEL = flags.DEFINE_enum("model", "110m", ["tiny", "15m", "110m", "1b", "7b"], "Shape of the random Llama.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Of the model; 0: as its shape has.", lower_bound=0)
_LENGTH = flags.DEFINE_integer("length", 512, "Longest sequence, in tokens.", lower_bound=32)
_FULL = flags.DEFINE_bool("full", False, "Every sequence has that length, half of it response: no padding.")
_BATCH = flags.DEFINE_integer("batch", 0, "Examples or pairs of a step; 0: 8 examples, 4 pairs.")
_WARM = flags.DEFINE_integer("warm", 5, "Steps before the timed ones.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 5, "Steps of each line in a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of all lines, in turn.", lower_bound=1)
_DECAY = flags.DEFINE_enum("decay", "cosine", ["cosine", "linear"], "Of the learning rate, to 0.")
_LR = flags.DEFINE_float("lr", 0.0, "The first learning rate; 0: 3e-4 for SFT, 5e-5 for DPO.")
_SKIP = flags.DEFINE_list("skip", [], "Lines of the table to leave out.")
_ATTENTION = flags.DEFINE_enum("attention", None, attention.KINDS, "Of 1b and 7b; by default the platform's best.")
_REMAT = flags.DEFINE_enum("remat", "full", llama.REMAT, "Of 1b and 7b.")

SHAPES: dict[str, dict[str, Any]] = {
  "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
  "15m": dict(hidden_size=288, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768),
  "110m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048),
  "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, intermediate_size=8192),
  "7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008),
}
ALONE = ("1b", "7b")  # Without peers.
VOCAB, EOS, PAD = 32000, 2, 0
CHUNK, BETA = 512, 0.1
COMPARED = 20  # The first losses, which must agree.

Text = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]


class Line:
  """One of the compared: a training loop in a thread of its own, which goes on only while it is told to."""

  def __init__(self, loop: Callable[["Line"], None]) -> None:
    """`loop` calls `stepped` between two steps, and fills in the rest."""
    self.tokens: list[int] = []  # Of each step.
    self.losses: list[float] = []
    self.reference = 0.0  # Seconds of the reference model's pass over all pairs, before training.
    self.times: list[float] = []  # Of each round.
    self._loop, self._left, self._failed = loop, 0, True  # Until it has come to its end.
    self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
    threading.Thread(target=self._run, daemon=True).start()

  def _run(self) -> None:
    try:
      self._go.acquire()
      self._loop(self)
      self._failed = False
    finally:
      self._stopped.release()

  def take(self, steps: int) -> float:
    """Seconds of so many more steps, or of all that are left."""
    self._left = steps
    began = time.perf_counter()
    self._go.release()
    self._stopped.acquire()
    took = time.perf_counter() - began
    if self._left and self._failed:
      sys.exit("a training loop failed, see above.")
    return took

  def stepped(self) -> None:
    """One more step was handed to the device."""
    self._left -= 1
    if not self._left:
      jax.block_until_ready(jax.live_arrays())
      self._stopped.release()
      self._go.acquire()


class Watched:
  """Batches that tell a line about its steps."""

  def __init__(self, source: train_loop.Batches, line: Line) -> None:
    self._source, self._line = source, line

  def __getitem__(self, step: int) -> Arrays:
    if step:
      self._line.stepped()
    batch = self._source[step]
    self._line.tokens.append(int((batch["segments"] > 0).sum()))
    return batch


def draw(rng: np.random.Generator, responses: int) -> tuple[Text, list[Text]]:
  """A prompt and responses of random tokens, the end token last; lengths lognormal, as those of chats."""

  def length(median: int, most: int) -> int:
    return most if _FULL.value else int(np.clip(_LENGTH.value / 512 * rng.lognormal(np.log(median), 0.7), 4, most))

  prompt = length(100, _LENGTH.value // 2)
  texts = [rng.integers(3, VOCAB, length(200, _LENGTH.value - prompt) - 1) for _ in range(responses)]
  return tuple(rng.integers(3, VOCAB, prompt).tolist()), [(*text.tolist(), EOS) for text in texts]


def first_rate() -> float:
  """The learning rate of the first step."""
  return _LR.value or (3e-4 if _METHOD.value == "sft" else 5e-5)


def shape_of() -> dict[str, Any]:
  """The shape that the flags ask for, in transformers' words."""
  shape = SHAPES[_MODEL.value]
  return {**shape, "num_hidden_layers": _LAYERS.value or shape["num_hidden_layers"]}


def random_config() -> llama.LlamaConfig:
  """The shape of a model that is compared with none."""
  shape = shape_of()
  width, heads = shape["hidden_size"], shape["num_attention_heads"]
  return llama.LlamaConfig(
    *(VOCAB, width, shape["num_hidden_layers"], heads, heads, width // heads, shape["intermediate_size"]),
    max_length=_LENGTH.value,
    dtype="bfloat16",
    param_dtype="bfloat16" if _MODEL.value == "7b" else "float32",
    remat=_REMAT.value,
    attention=_ATTENTION.value or attention.best_for(jax.default_backend()),
  )


def start(checkpoint: str, devices: jax.sharding.Mesh) -> llama.Llama:
  """The model that training starts from."""
  if _MODEL.value in ALONE:
    return jax.jit(llama.Llama, static_argnums=0)(random_config(), jax.random.key(0))
  return convert.import_hf(checkpoint, devices)


def ours(line: Line, checkpoint: str, folder: epath.Path, source: train_loop.Batches, steps: int) -> None:
  """A run of the product's own loop; its losses are known when it ends."""
  devices = mesh.make_mesh(devices=jax.devices()[:1])
  loss = train_step.sft_loss if _METHOD.value == "sft" else functools.partial(train_step.dpo_loss, beta=BETA)
  moments = "bfloat16" if _MODEL.value == "7b" else "float32"
  with jax.set_mesh(devices):
    train_loop.train(
      config=random_config() if _MODEL.value in ALONE else convert.import_hf(checkpoint, devices).config,
      start=lambda: start(checkpoint, devices),
      loss_fn=functools.partial(loss, chunk=CHUNK),
      optimizer=train_step.OptimizerConfig(
        lr=first_rate(), end_lr=0.0, steps=steps, decay=_DECAY.value, moments=moments
      ),
      batches=Watched(source, line),
      mesh=devices,
      folder=folder,
      seed=0,
      save_every=steps,
    )
  line.losses += [json.loads(text)["loss"] for text in (folder / "metrics.jsonl").read_text().splitlines()]


def theirs(
  line: Line, checkpoint: str, folder: epath.Path, data: dict[str, list[str]], steps: int, batch: int, **more: Any
) -> None:
  """A run of TRL with the optimizer and the rates of `ours`."""
  import datasets
  import transformers
  import trl

  datasets.disable_progress_bars()
  transformers.utils.logging.disable_progress_bar()
  base: Any = trl.SFTTrainer if _METHOD.value == "sft" else trl.DPOTrainer
  kind: Any = trl.SFTConfig if _METHOD.value == "sft" else trl.DPOConfig

  class Recorded(base):
    """Writes down what the table needs."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
      line.tokens.append(int(inputs["attention_mask"].sum()))
      loss = super().compute_loss(model, inputs, *args, **kwargs)
      line.losses.append(loss.item())
      return loss

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
      began = time.perf_counter()
      done = super()._precompute_ref_logps(*args, **kwargs)
      line.reference = time.perf_counter() - began
      return done

  class Stepped(transformers.TrainerCallback):
    """Tells the line about its steps."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
      line.stepped()

  settings = kind(
    output_dir=str(folder),
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    max_length=_LENGTH.value,
    per_device_train_batch_size=batch,
    train_sampling_strategy="sequential",
    max_steps=steps,
    learning_rate=first_rate(),
    lr_scheduler_type=_DECAY.value,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_epsilon=1e-8,
    weight_decay=0.0,
    max_grad_norm=1.0,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    **more,
  )
  trainer = Recorded(checkpoint, args=settings, train_dataset=datasets.Dataset.from_dict(data), callbacks=[Stepped()])
  trainer.remove_callback(transformers.PrinterCallback)
  trainer.train()


def save_checkpoint(folder: str) -> None:
  """Writes a random Llama and a tokenizer with a word for each token."""
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(vocab_size=VOCAB, max_position_embeddings=_LENGTH.value, **shape_of())
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({_word(token): token for token in range(VOCAB)}, _word(1)))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token=_word(1), eos_token=_word(EOS), pad_token=_word(PAD)
  ).save_pretrained(folder)


def _word(token: int) -> str:
  return f"w{token:05}"  # Of one length: a special token is found within longer ones.


def _written(tokens: Sequence[int]) -> str:
  return " ".join(map(_word, tokens))


def sft_lines(checkpoint: str, folder: epath.Path, steps: int, size: int) -> tuple[dict[str, Line], list[Any]]:
  """The lines, and the examples of all steps in their order."""
  rng = np.random.default_rng(0)
  drawn = [draw(rng, 1) for _ in range(steps * size)]
  examples = [batching.Example((*prompt, *texts[0]), len(prompt)) for prompt, texts in drawn]
  dataset.write(folder / "rows", batching.pack(examples, _LENGTH.value, packed=False))
  source = dataset.batches(folder / "rows", size, 0)
  compact = dataset.Compact(source, 1, places=True)  # As finetune.prepare reads it.
  ordered = [example for step in range(steps) for example in batching.examples_of(source[step])]
  data = {
    "prompt": [_written(one.tokens[: one.target_from]) + " " for one in ordered],
    "completion": [_written(one.tokens[one.target_from :]) for one in ordered],
  }
  lines = {
    "ours": Line(lambda line: ours(line, checkpoint, folder / "ours", compact, steps)),
    "ours unpacked": Line(lambda line: ours(line, checkpoint, folder / "apart", source, steps)),
    "TRL": Line(lambda line: theirs(line, checkpoint, folder / "theirs", data, steps, size)),
  }
  return lines, ordered


def dpo_lines(checkpoint: str, folder: epath.Path, steps: int, size: int) -> tuple[dict[str, Line], list[Any]]:
  """The lines, and the examples of all steps in their order: each step's chosen ones, then its rejected ones."""
  rng = np.random.default_rng(0)
  pairs = [
    records.PreferencePair(
      prompt_id=str(number),
      prompt="",
      prompt_tokens=prompt,
      chosen="",
      chosen_tokens=texts[0],
      chosen_score=1.0,
      rejected="",
      rejected_tokens=texts[1],
      rejected_score=0.0,
    )
    for number, (prompt, texts) in enumerate(draw(rng, 2) for _ in range(steps * size))
  ]
  length = pairset.row_length(pairs, _LENGTH.value)
  rows = [pairset.pair_row(pair, length) for pair in pairs]
  devices = mesh.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(devices):
    model, times = start(checkpoint, devices), []
    for part in (rows[:size], rows[:size], rows):  # The last two differ without compilation; the first loads libraries.
      began = time.perf_counter()
      reference = pairset.reference_logprobs(model, part, size, CHUNK, devices)
      times.append(time.perf_counter() - began)
  pairset.write(folder / "pairs", rows, reference)
  source, shared = (pairset.Batches(folder / "pairs", size, 0, where) for where in (None, devices))
  ordered = [batching.examples_of(source[step]) for step in range(steps)]
  chosen = [one for step in ordered for one in step[:size]]
  rejected = [one for step in ordered for one in step[size:]]
  data = {
    "prompt": [_written(one.tokens[: one.target_from]) + " " for one in chosen],
    "chosen": [_written(one.tokens[one.target_from :]) for one in chosen],
    "rejected": [_written(one.tokens[one.target_from :]) for one in rejected],
  }
  both = functools.partial(theirs, checkpoint=checkpoint, data=data, steps=steps, batch=size, beta=BETA)
  lines = {
    "ours": Line(lambda line: ours(line, checkpoint, folder / "ours", shared, steps)),
    "ours unpacked": Line(lambda line: ours(line, checkpoint, folder / "apart", source, steps)),
    "TRL": Line(lambda line: both(line, folder=folder / "theirs")),
    "TRL precomputed": Line(lambda line: both(line, folder=folder / "computed", precompute_ref_log_probs=True)),
  }
  lines["ours"].reference = (times[2] - times[1]) * steps / (steps - 1)
  return lines, [one for step in ordered for one in step]


def forward_flops(examples: Sequence[batching.Example]) -> float:
  """What the losses of these examples need: causal attention, and logits of targets alone."""
  shape = shape_of()
  width, layers = shape["hidden_size"], shape["num_hidden_layers"]
  lengths = np.array([len(one.tokens) for one in examples], np.float64)
  targets = sum(len(one.tokens) - one.target_from for one in examples)
  layer = (4 * width + 3 * shape["intermediate_size"]) * 2 * width * lengths + 2 * width * lengths * (lengths + 1)
  return layers * float(layer.sum()) + 2.0 * width * VOCAB * targets


def peaks() -> dict[str, float]:
  """The best GFLOP/s of a matmul, by each library: 2048³ in float32; 8192³ in bfloat16 where ours is alone."""
  if _MODEL.value in ALONE:
    return {"jax": machine.matmul_peak("bfloat16") / 1e9}
  import torch

  matrix = torch.ones(2048, 2048)
  found = {"jax": machine.matmul_peak(), "torch": 2 * 2048**3 / machine.seconds(lambda: matrix @ matrix)}
  return {name: peak / 1e9 for name, peak in found.items()}


def table(lines: Mapping[str, Line], per_token: float, peak: Mapping[str, float], steps: int) -> dict[str, Any]:
  """Of each line: tokens a second, against TRL's, and as a share of what the matmul peak allows."""
  found, warm, each = {}, _WARM.value, _STEPS.value

  def rates(line: Line, extra: float = 0.0) -> list[float]:
    return [
      sum(line.tokens[warm + number * each :][:each]) / (took + extra * each) for number, took in enumerate(line.times)
    ]

  for name, line in lines.items():
    for extra in (0.0, line.reference / steps) if line.reference else (0.0,):
      own = rates(line, extra)
      # Training is three forward passes; the reference is another.
      passes = 4 if extra or (name == "TRL" and _METHOD.value == "dpo") else 3
      limit = peak["torch" if name.startswith("TRL") else "jax"] * 1e9 / (passes * per_token)
      speed = statistics.median(own)
      facts = {"tokens/s": round(speed, 1), "of its peak": round(speed / limit, 3)}
      if "TRL" in lines:
        ratios = [mine / other for mine, other in zip(own, rates(lines["TRL"]), strict=True)]
        spread = [round(min(ratios), 2), round(max(ratios), 2)]
        facts |= {"to TRL": round(statistics.median(ratios), 2), "spread": spread}
      found[f"{name}, with the reference's pass" if extra else name] = facts
  return found


def compared(lines: Mapping[str, Line], count: int) -> dict[str, Any]:
  """How far the first losses are from TRL's, and the versions of what ours is compared with."""
  import torch
  import transformers
  import trl

  losses = {name: np.array(line.losses[:count]) for name, line in lines.items()}
  differences = {name: float(np.abs(loss - losses["TRL"]).max()) for name, loss in losses.items() if name != "TRL"}
  versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
  return {
    "losses compared": count,
    "largest loss difference": differences,
    "versions": versions | {"trl": trl.__version__},
    "threads": torch.get_num_threads(),
  }


def main(_: list[str]) -> None:
  """Runs all lines in turn, after some steps of each to warm up."""
  xla_flags.prepare(os.environ)
  os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
  alone = _MODEL.value in ALONE
  size = _BATCH.value or (8 if _METHOD.value == "sft" else 4)
  steps = _WARM.value + _ROUNDS.value * _STEPS.value + 1  # The last ends the loops, and is not timed.
  compilations: list[float] = []

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("backend_compile_duration"):
      compilations.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  logging.set_verbosity(logging.ERROR)
  peak = peaks()
  with tempfile.TemporaryDirectory() as place:
    checkpoint = os.path.join(place, "checkpoint")
    if not alone:
      save_checkpoint(checkpoint)
    lines, examples = (sft_lines if _METHOD.value == "sft" else dpo_lines)(checkpoint, epath.Path(place), steps, size)
    may = [name for name in lines if name not in ("ours", "TRL")]
    if unknown := set(_SKIP.value) - set(may):
      sys.exit(f"--skip={','.join(sorted(unknown))}: the lines that may be left out are {may}.")
    lines = {name: line for name, line in lines.items() if name not in _SKIP.value and (name == "ours" or not alone)}
    for line in lines.values():
      line.take(_WARM.value)
    compilations.clear()
    for number in range(_ROUNDS.value):
      for line in lines.values():
        line.times.append(line.take(_STEPS.value))
      seconds = ", ".join(f"{name} {line.times[-1] / _STEPS.value:.2f}" for name, line in lines.items())
      print(f"round {number + 1}: seconds a step: {seconds}", flush=True)
    compiled = len(compilations)
    for line in lines.values():
      line.take(steps)
  for line in lines.values():
    assert line.tokens == lines["ours"].tokens and len(line.losses) == steps
  tokens = sum(len(one.tokens) for one in examples)
  per_token = forward_flops(examples) / tokens
  rows = table(lines, per_token, peak, steps)
  found = {
    "method": _METHOD.value,
    "model": _MODEL.value,
    "length": _LENGTH.value,
    "full": _FULL.value,
    "batch": size,
    "rounds": _ROUNDS.value,
    "steps a round": _STEPS.value,
    "tokens a step": round(tokens / steps, 1),
    "targets a step": round(sum(len(one.tokens) - one.target_from for one in examples) / steps, 1),
    "forward MFLOP a token": round(per_token / 1e6, 1),
    "peak GFLOP/s": {name: round(value, 1) for name, value in peak.items()},
    "compilations while timed": compiled,
    "loss, first and last": [round(lines["ours"].losses[step], 4) for step in (0, -1)],
    "device": jax.devices()[0].device_kind,
    "versions": {"jax": jax.__version__},
  }
  if not alone:
    found |= compared(lines, min(COMPARED, steps))
  width = max(map(len, [*found, *rows]))
  print("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
  print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
  print(json.dumps(found | {"lines": rows}))


if __name__ == "__main__":
  app.run(main)
