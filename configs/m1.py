"""M1 of the paper's run: what is still to do for it in a work directory that may hold the models before it.

srlm all --config=configs/m1.py:llama2_70b,v5p:4x4x4 --workdir=gs://bucket/run   (and the paths that llama2.py names)
"""

from ml_collections import config_dict

from srlm_jax import slices


def get_config(variant: str = "llama2_70b") -> config_dict.ConfigDict:
  """The paper's run, up to M1."""
  c = slices.llama2(variant)
  c.models = 1
  return c
