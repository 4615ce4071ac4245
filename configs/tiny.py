"""The embedded default: a small world in which the loop can be seen to work, from scratch on two CPU cores.

  srlm all --config=configs/tiny.py --workdir=runs/tiny
  srlm all --config=configs/tiny.py:smoke --workdir=runs/smoke     (a minute; too short to learn much)
"""

from ml_collections import config_dict

from srlm_jax import config


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """The tiny world's run; "smoke" is the same one cut to about a minute."""
  c = config.base()
  c.world = dict(enabled=True)
  c.base.update(kind="pretrain", size="tiny")
  c.tokenizer = "world/files/tokenizer.model"
  files = ("trees", "heldout_trees", "judgements", "pretrain")
  c.data.update({name: f"world/files/{name}.jsonl" for name in files}, eval_prompts="world/files/heldout_prompts.jsonl")
  c.data.update(ift_examples=1200, eft_fraction=0.0, eval_prompts_count=512)
  c.model.update(dropout=0.0, dtype="float32", remat="none", max_length=160, logits_chunk=0)
  c.pretrain.update(lr=6e-3, end_lr=6e-4, steps=1500, warmup=50, pack=True)
  c.sft.update(lr=3e-3, end_lr=1e-4, steps=2000, warmup=50, pack=True, save_every=500)
  c.eft.update(writer="annotators")
  c.prompts.update(writer="m0", count=1024, max_proposals=6144, per_round=1024, max_rouge=0.99)
  c.prompts.sampling.update(temperature=1.0, top_p=1.0, max_new=32)
  c.responses.sampling.update(max_new=40)
  c.judge.update(rubric="judge_tiny")
  c.judge.sampling.update(temperature=1.0, top_p=1.0, max_new=88)
  c.dpo.update(lr=1e-4, end_lr=1e-5, batch=32, steps=100, warmup=10)
  c.generation.update(rows=384, shard=1024)
  c.evaluate.update(grader="oracle", samples=2)
  c.evaluate.sampling.update(max_new=40)
  return c
