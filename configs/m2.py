"""M2 of the paper's run: what is still to do for it in a work directory that may hold the models before it.

srlm all --config=configs/m2.py:llama2_70b --workdir=gs://bucket/run   (and the paths that configs/llama2.py names)
"""

from ml_collections import config_dict

from srlm_jax import config


def get_config(size: str = "llama2_70b") -> config_dict.ConfigDict:
  """The paper's run, up to M2."""
  c = config.base()
  c.base.size = size
  c.models = 2
  return c
