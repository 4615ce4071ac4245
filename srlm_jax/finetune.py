"""Next-token training on a list of examples: what M0, the SFT baseline, M1 and the positive-only variant share."""

from collections import Counter
from collections.abc import Callable, Sequence
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
  early_stopping,
  health,
  llama,
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


def prepare(
  out: artifacts.Artifact,
  config: llama.LlamaConfig,
  start: Callable[[], llama.Llama],
  examples: Sequence[batching.Example],
  section: config_dict.ConfigDict,
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
) -> tuple[Callable[..., llama.Llama], dict[str, int]]:
  """Lays token rows out for training by next-token prediction of their targets.

  Args:
    out: gets `dataset/`, `states/` and `metrics.jsonl`.
    config: of the model.
    start: gives the model where training starts.
    examples: in any order; they are shuffled by the seed.
    section: `settings.sft` or `settings.pretrain`.
    settings: the whole configuration.
    mesh: the devices.

  Returns:
    what trains (`train_loop.train`, of which `until` is left open) and gives the model, and how many rows, tokens and
    steps it takes.
  """
  order = np.random.default_rng(settings.seed).permutation(len(examples))
  rows = batching.pack([examples[place] for place in order], settings.model.max_length, section.pack)
  folder = out.folder / "dataset"
  dataset.write(folder, rows)
  steps = train_step.count_steps(section, len(rows))
  tokens = sum(len(example.tokens) for example in examples)
  logger.info("%s: %d examples, %d tokens in %d rows; %d steps", out.folder, len(examples), tokens, len(rows), steps)
  batches = dataset.batches(folder, section.batch, settings.seed)
  unit = mesh.size // mesh.shape["tensor"] * section.accumulate
  train = functools.partial(
    train_loop.train,
    config=config,
    start=start,
    loss_fn=functools.partial(train_step.sft_loss, chunk=settings.model.logits_chunk),
    optimizer=config_lib.frozen(train_step.OptimizerConfig, {**section, "steps": steps}),
    batches=batches if section.pack else dataset.Compact(batches, unit, places=mesh.size == section.accumulate == 1),
    mesh=mesh,
    folder=out.folder,
    seed=settings.seed,
    save_every=section.save_every,
    accumulate=section.accumulate,
    skip_limit=section.skip_limit,
    limits=config_lib.frozen(health.Limits, settings.health),
  )
  return train, {"rows": len(rows), "tokens": tokens, "steps": steps}


def finetune(
  out: artifacts.Artifact,
  parent: artifacts.Artifact,
  examples: Sequence[records.SFTExample],
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  where: early_stopping.Where | None = None,
) -> None:
  """Trains the parent on the examples (paper §3.1.2: target tokens only, cosine) and commits the model.

  With `where` it chooses among the checkpoints; `early_stopping.commit` says which inputs this needs.
  """
  words = modelstore.load_tokenizer(parent)
  tokenized, counts = tokenize(examples, words, settings.chat, settings.model.max_length)
  logger.info("%s: %s", out.folder, dict(counts))
  start = functools.partial(modelstore.load, parent, settings, mesh, train=True)
  config = modelstore.model_config(parent, settings, train=True)
  train, sizes = prepare(out, config, start, tokenized, settings.sft, settings, mesh)
  facts = {"counts": dict(counts), **sizes}
  early_stopping.commit(out, words, train, sizes["steps"], facts, settings, mesh, where)
