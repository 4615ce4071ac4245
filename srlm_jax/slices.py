"""What fits where: how each size of Llama 2 lies on TPU slices. Every line has passed `srlm plan`, all programs of it.

What plan does not compile is the move of the weights from training's mesh to sampling's (`mesh.moved`), layer by layer.

  srlm plan --config=configs/m2.py:llama2_70b,v5p:4x4x4

The lines are for the paper's batch (16 examples, 16 pairs) and 2,048 tokens. A slice that is not here may do, too:
`srlm plan --topology=…` says so.
"""

import dataclasses

from ml_collections import config_dict

from srlm_jax import artifacts, config, llama


@dataclasses.dataclass(frozen=True)
class Fit:
  """How a model lies on a slice.

  Attributes:
    tensor: mesh.tensor of training; the other chips are mesh.fsdp, at most as many as the batch has rows.
    sampling: generation.mesh.tensor; where it divides the chips of a host (4), hosts sample apart.
    rows: texts that are decoded at once, on each group of chips that holds a model.
    remat: what the backward pass computes again.
    accumulate: parts of a DPO batch.
    moments: type of Adam's first moment.
    sampling_fsdp: generation.mesh.fsdp: more than 1 gathers weights at every token.
  """

  tensor: int
  sampling: int
  rows: int
  remat: str = "full"
  accumulate: int = 1
  moments: str = "float32"
  sampling_fsdp: int = 1


FITS: dict[str, dict[str, Fit]] = {
  "llama2_7b": {
    "v4:2x2x2": Fit(tensor=1, sampling=4, rows=32),
    "v5e:4x4": Fit(tensor=1, sampling=4, rows=16),
    "v5p:2x2x1": Fit(tensor=1, sampling=1, rows=64),
    "v6e:2x4": Fit(tensor=1, sampling=4, rows=32),
  },
  "llama2_13b": {
    "v4:2x2x4": Fit(tensor=1, sampling=4, rows=32),
    "v5e:4x8": Fit(tensor=2, sampling=4, rows=8),
    "v5p:2x2x1": Fit(tensor=1, sampling=1, rows=32),
    "v6e:4x4": Fit(tensor=1, sampling=4, rows=32),
  },
  "llama2_70b": {
    "v4:4x4x4": Fit(tensor=4, sampling=8, rows=32),
    "v5e:8x16": Fit(tensor=8, sampling=8, rows=32, sampling_fsdp=2),
    "v5p:4x4x4": Fit(tensor=4, sampling=4, rows=64),
    "v6e:8x8": Fit(tensor=4, sampling=8, rows=32),
  },
}


def llama2(variant: str) -> config_dict.ConfigDict:
  """The paper's run for "llama2_70b", or for "llama2_70b,v5p:4x4x4": that size on that slice.

  Raises:
    ValueError: a size that is not in llama.SIZES, or a slice that is not in FITS.
  """
  size, _, topology = variant.partition(",")
  if size not in llama.SIZES:
    raise artifacts.unknown(size, list(llama.SIZES), "model size")
  c = config.base()
  c.base.size = size
  if not topology:
    return c
  known = FITS.get(size, {})
  if topology not in known:
    raise artifacts.unknown(topology, list(known), f"slice that is known to hold {size}")
  fit = known[topology]
  c.topology = topology
  c.mesh.tensor = fit.tensor
  c.model.remat = fit.remat
  c.dpo.update(accumulate=fit.accumulate, moments=fit.moments)
  c.sft.moments = fit.moments
  c.generation.rows = fit.rows
  c.generation.mesh.update(tensor=fit.sampling, fsdp=fit.sampling_fsdp)
  return c
