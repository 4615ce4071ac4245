"""world: the files of the embedded world, in the formats of the real ones."""

from ml_collections import config_dict

from srlm_jax import artifacts, world_files


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict) -> None:
  """Writes the world's files in `files/`."""
  facts = world_files.write_world(out.folder / "files", settings.seed, settings.world)
  out.commit(facts, folders=("files",))
