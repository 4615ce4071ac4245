"""How much disk a run still takes: weights and train states; beside them all texts are small."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import artifacts, checkpoint, hf_files, llama, steps

SAVED = 3  # Train states on disk at once: the two that are kept, and the one that is being saved.
CANDIDATES = 2  # Checkpoints' weights at once, where a training chooses among them.


def weights(config: llama.LlamaConfig) -> int:
  """Bytes of a model's weights."""
  model = jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0)))
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def needed(
  settings: config_dict.ConfigDict,
  workdir: epath.Path,
  todo: Sequence[steps.Step],
  made: Mapping[str, artifacts.Artifact],
) -> dict[str, int]:
  """Bytes that the steps still to do will write, by what they are for, without what they have written already.

  Args:
    settings: the configuration.
    workdir: the work directory.
    todo: the steps that are not finished.
    made: every artifact of the run by its folder.
  """
  bases = {step.folder: _config(settings, workdir, step.folder, made) for step in todo if step.stage == "base"}
  trained = [step for step in todo if step.stage in ("sft", "dpo")]
  found = {f"the weights of {folder}": weights(config) for folder, config in bases.items() if config}
  trains = [*trained, *(step for step in todo if step.folder == "m0" and settings.base.kind == "pretrain")]
  config = _config(settings, workdir, "m0", made)
  if trains and config:
    size = weights(config)
    small = settings.sft.moments == settings.dpo.moments == "bfloat16"
    state = size + (size // 2 if small and config.param_dtype == "float32" else size) + size
    found |= {f"the weights of {step.folder}": size for step in trained}
    states, candidates = zip(*(_kept(settings, step.stage) for step in trains), strict=True)  # One training at a time.
    found["train states"] = max(states) * state
    found["candidates"] = max(candidates) * size
  already = sum(_size(made[step.folder].folder) for step in todo if step.stage in ("base", "sft", "dpo"))
  return found | {"what is there already": -min(already, sum(found.values()))}


def _kept(settings: config_dict.ConfigDict, stage: str) -> tuple[int, int]:
  """Train states and candidates of a training that are on disk at once: a short one saves fewer, or none.

  The state that a run saves when it is told to stop is not among them.
  """
  positive = settings.dpo.method == "positive_only"
  section = settings[{"base": "pretrain", "dpo": "sft" if positive else "dpo"}.get(stage, stage)]
  every = settings.select.every if settings.select.judge != "none" and stage != "base" else 0
  if not section.steps:  # The data will decide.
    return SAVED, CANDIDATES if every else 0
  saves = {step for gap in (section.save_every, every) if gap for step in range(gap, section.steps, gap)[:SAVED]}
  return min(SAVED, len(saves)), CANDIDATES if 0 < every <= section.steps else 0


def _config(
  settings: config_dict.ConfigDict, workdir: epath.Path, folder: str, made: Mapping[str, artifacts.Artifact]
) -> llama.LlamaConfig | None:
  """The shape of a model from outside or of M0, whose shape all trained ones have; None where nothing says it."""
  if folder in made and made[folder].done:
    return checkpoint.read_model_config(made[folder].read_text("llama.json"))
  kind = settings.base.kind if folder == "m0" else "hf"
  if kind != "hf":
    config = llama.SIZES.get(settings.base.size)
  else:
    sources = {"m0": settings.base.path, "writer": settings.prompts.path, "judge": settings.evaluate.judge}
    path = steps.resolve(sources[folder], workdir)
    config = hf_files.read_config(path) if path is not None and (path / "config.json").exists() else None
  how = settings.model
  return config and dataclasses.replace(config, dtype=how.dtype, param_dtype=how.param_dtype)


def _size(path: epath.Path) -> int:
  """Bytes of a file, or of all below a folder; 0 for what is not there, or no more: others may be at work there."""
  try:
    return sum(map(_size, path.iterdir())) if path.is_dir() else path.stat().length
  except FileNotFoundError:
    return 0
