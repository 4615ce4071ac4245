"""sft: the SFT baseline (M0 on IFT) and M1 (M0 on IFT and EFT)."""

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, early_stopping, finetune, records


def run(
  out: artifacts.Artifact,
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  where: early_stopping.Where | None = None,
) -> None:
  """Trains the input "parent" on IFT, and on EFT where there is an input "eft" (paper §2.2).

  With `where` it chooses among the checkpoints (paper §3.1.2).
  """
  examples = out.inputs["seed"].read("ift.jsonl", records.SFTExample)
  if "eft" in out.inputs:
    examples += out.inputs["eft"].read("eft.jsonl", records.SFTExample)
  finetune.finetune(out, out.inputs["parent"], examples, settings, mesh, where)
