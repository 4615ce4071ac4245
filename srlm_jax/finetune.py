"""Supervised fine-tuning on a list of examples: what M1, the SFT baseline and the positive-only variant share."""

from collections import Counter
from collections.abc import Sequence
import functools
import logging

import jax
from ml_collections import config_dict
import numpy as np

from srlm_jax import (
  artifacts,
  batching,
  chat,
  config as config_lib,
  dataset,
  modelstore,
  records,
  tokenizer,
  train_loop,
  train_step,
)

logger = logging.getLogger(__name__)


def tokenize(
  examples: Sequence[records.SFTExample], words: tokenizer.Tokenizer, chat_kind: str, longest: int
) -> tuple[list[batching.Example], Counter[str]]:
  """Token rows with the loss on response and end token only; an example too long is left out and counted, never cut."""
  rows, counts = [], Counter[str]()
  for example in examples:
    prompt = chat.chat_tokens(words, example.prompt, chat_kind)
    tokens = (*prompt, *words.encode(example.response), words.eos_id)
    counts[f"{example.kind} given"] += 1
    if len(tokens) > longest:
      counts[f"{example.kind} left out: longer than {longest} tokens"] += 1
      continue
    rows.append(batching.Example(tokens, len(prompt)))
  return rows, counts


def finetune(
  out: artifacts.Artifact,
  parent: artifacts.Artifact,
  examples: Sequence[records.SFTExample],
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> None:
  """Trains the parent on the examples (paper §3.1.2: target tokens only, cosine) and commits the model."""
  words = modelstore.load_tokenizer(parent)
  section, length = settings.sft, settings.model.max_length
  tokenized, counts = tokenize(examples, words, settings.chat, length)
  np.random.default_rng(settings.seed).shuffle(tokenized)  # type: ignore[arg-type]
  rows = batching.pack(tokenized, length, section.pack)
  folder = out.folder / "dataset"
  if folder.exists():  # Cheap to prepare again, and never half of one.
    folder.rmtree()
  dataset.write(folder, rows)
  steps = train_step.count_steps(section, len(rows))
  logger.info("%s: %s; %d rows, %d steps", out.folder, dict(counts), len(rows), steps)
  model = train_loop.train(
    model=modelstore.load(parent, settings, mesh, train=True),
    loss_fn=functools.partial(train_step.sft_loss, chunk=settings.model.logits_chunk),
    optimizer=config_lib.frozen(train_step.OptimizerConfig, {**section, "steps": steps}),
    batches=dataset.batches(folder, section.batch, settings.seed),
    mesh=mesh,
    folder=out.folder,
    seed=settings.seed,
    save_every=section.save_every,
  )
  modelstore.save(out, model, words, {"counts": dict(counts), "rows": len(rows), "steps": steps})
