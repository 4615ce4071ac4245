"""The paper's run on Open Assistant data, for the sizes of Llama 2.

  srlm all --config=configs/llama2.py:llama2_70b --workdir=gs://bucket/run \
    --config.base.path=/weights/Llama-2-70b-hf --config.prompts.path=/weights/Llama-2-70b-chat-hf \
    --config.data.trees=/data/2023-04-12_oasst_ready.trees.jsonl.gz
"""

from ml_collections import config_dict

from srlm_jax import config


def get_config(size: str = "llama2_70b") -> config_dict.ConfigDict:
  """All of the paper's values; `size` is one of llama.SIZES."""
  c = config.base()
  c.base.size = size
  return c
