"""A rehearsal on real formats: real Open Assistant trees and the real Llama 2 tokenizer, with a small random Llama.

Every stage runs as it would with real weights; the texts are nonsense. It shows, in minutes and on a CPU, that data and
tokenizer are read well, and how many examples each stage leaves.

  srlm all --config=configs/oasst_sample.py --workdir=runs/sample \
    --config.data.trees=/data/en_100_tree.jsonl --config.tokenizer=/data/llama2_tokenizer.model
"""

from ml_collections import config_dict

from srlm_jax import config


def get_config() -> config_dict.ConfigDict:
  """The paper's stages on 100 trees."""
  c = config.base()
  c.models = 2
  c.base.update(kind="random", size="smoke")
  c.model.update(dropout=0.0, dtype="float32", remat="none", max_length=1024, logits_chunk=128)
  c.data.overlap = True  # 100 trees are too few to keep IFT and EFT apart.
  c.sft.update(lr=1e-2, end_lr=1e-3, batch=2, steps=60, pack=True)  # Random weights learn nothing at the paper's rates.
  c.select.judge = "none"  # No model of this size compares answers.
  c.prompts.update(writer="parent", count=24, max_proposals=240, per_round=48)
  # Such a model ends its texts by chance alone: the whole distribution, or the end token is never drawn.
  c.prompts.sampling.update(temperature=1.0, top_p=1.0, max_new=192)
  c.responses.sampling.update(temperature=1.0, top_p=1.0, max_new=256)
  c.judge.method = "expected"  # No model of this size writes a verdict; the probabilities of the digits always exist.
  c.judge.sampling.max_new = 64
  c.dpo.update(batch=4)
  c.generation.update(rows=16, shard=64)
  c.evaluate.update(grader="judge", judge="baseline")
  c.evaluate.sampling.max_new = 256
  c.analysis.sampling.max_new = 64
  c.analysis.points = 100
  return c
