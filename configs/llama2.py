"""The paper's run on Open Assistant data, for a size of Llama 2, and for a TPU slice that holds it (slices.FITS).

  srlm all --config=configs/llama2.py:llama2_70b,v5p:4x4x4 --workdir=gs://bucket/run \
    --config.base.path=/weights/Llama-2-70b-hf --config.prompts.path=/weights/Llama-2-70b-chat-hf \
    --config.data.trees=/data/2023-04-12_oasst_ready.trees.jsonl.gz
"""

from ml_collections import config_dict

from srlm_jax import slices


def get_config(variant: str = "llama2_70b") -> config_dict.ConfigDict:
  """All of the paper's values; `variant` is a size, or a size and a slice."""
  return slices.llama2(variant)
