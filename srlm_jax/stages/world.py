"""world: the files of the embedded world, in the formats of the real ones."""

from ml_collections import config_dict

from srlm_jax import artifacts, config as config_lib, world_files


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict) -> None:
  """Writes the world's files in `files/`; `settings.world` may set any of world_files.Sizes."""
  sizes = config_lib.frozen(world_files.Sizes, settings.world)
  facts = world_files.write_world(out.folder / "files", settings.seed, sizes)
  out.commit(facts, folders=("files",))
