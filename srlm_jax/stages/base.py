"""base: M0, from Hugging Face weights, from scratch on a world's text, or random (for trials)."""

import dataclasses
import logging

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  batching,
  chat,
  checkpoint,
  config as config_lib,
  convert,
  finetune,
  health,
  llama,
  modelstore,
  records,
  tokenizer,
  train_loop,
)

logger = logging.getLogger(__name__)


def _fresh_config(settings: config_dict.ConfigDict, words: tokenizer.Tokenizer) -> llama.LlamaConfig:
  if settings.base.size not in llama.SIZES:
    raise artifacts.unknown(settings.base.size, list(llama.SIZES), "model size")
  return dataclasses.replace(
    llama.SIZES[settings.base.size],
    vocab_size=words.vocab_size,
    max_length=settings.model.max_length,
    dtype=settings.model.dtype,
    param_dtype=settings.model.param_dtype,
    remat="none",
    dropout=0.0,
  )


def _documents(
  path: epath.Path, words: tokenizer.Tokenizer, kind: str, longest: int
) -> tuple[list[batching.Example], int]:
  """Pretraining documents as tokens, every one a target, and how many were too long and left out."""
  examples, too_long = [], 0
  for one in records.read_given(path, records.Document, name=""):
    if one.text is not None:
      tokens = [words.bos_id, *words.encode(one.text), words.eos_id]
    else:
      tokens = [*chat.chat_tokens(words, one.prompt or "", kind), *words.encode(one.response or ""), words.eos_id]
    if len(tokens) > longest:
      too_long += 1
    else:
      examples.append(batching.Example(tuple(tokens), 1))
  return examples, too_long


def run(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, where: dict[str, epath.Path]
) -> None:
  """Makes M0. `where` has the resolved paths "tokenizer", "base" and "pretrain"."""
  kind = settings.base.kind
  if kind == "hf":
    words = tokenizer.load(where["tokenizer"] or where["base"])
    model = convert.import_hf(where["base"], mesh, dtype=settings.model.param_dtype)
    tokenizer.check_rows(words, model.config.vocab_size)
  else:
    words = tokenizer.load(where["tokenizer"])
    model = checkpoint.init_model(_fresh_config(settings, words), mesh, settings.seed)
  facts: dict[str, object] = {"kind": kind}
  if kind == "pretrain":
    longest = settings.model.max_length
    examples, too_long = _documents(where["pretrain"], words, settings.chat, longest)
    logger.info("%s: %d documents, %d longer than %d tokens left out", out.folder, len(examples), too_long, longest)
    train, sizes = finetune.prepare(out, model.config, lambda: model, examples, settings.pretrain, settings, mesh)
    model = train()
    facts |= {"documents": len(examples), "documents left out, too long": too_long, **sizes}
    facts |= train_loop.facts(out.folder, config_lib.frozen(health.Limits, settings.health))
  modelstore.save(out, model, words, facts)
