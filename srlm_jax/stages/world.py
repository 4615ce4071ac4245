"""world: the files of the embedded world, in the formats of the real ones."""

import dataclasses

from ml_collections import config_dict

from srlm_jax import artifacts, config as config_lib, world_files


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict) -> None:
  """Writes the world's files in `files/`; `settings.world` may set any of world_files.Sizes."""
  known = [field.name for field in dataclasses.fields(world_files.Sizes)]
  for name in settings.world:
    if name != "enabled" and name not in known:
      raise artifacts.unknown(name, known, "size of the world (config.world)")
  sizes = config_lib.frozen(world_files.Sizes, settings.world)
  facts = world_files.write_world(out.folder / "files", settings.seed, sizes, settings.judge.rubric)
  out.commit(facts, folders=("files",))
