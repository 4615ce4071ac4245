"""world: the files of the embedded world, in the formats of the real ones."""

import dataclasses

from ml_collections import config_dict

from srlm_jax import artifacts, chat, config as config_lib, distributed, templates, tokenizer, world_files


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict) -> None:
  """Writes the world's files in `files/`; `settings.world` may set any of world_files.Sizes.

  ValueError where it has another key, or where the judge prompt leaves no room for a response.
  """
  known = [field.name for field in dataclasses.fields(world_files.Sizes)]
  for name in settings.world:
    if name != "enabled" and name not in known:
      raise artifacts.unknown(name, known, "size of the world (config.world)")
  sizes = config_lib.frozen(world_files.Sizes, settings.world)
  files = out.folder / "files"
  facts = distributed.first(
    "write the world", lambda: world_files.write_world(files, settings.seed, sizes, settings.judge.rubric)
  )
  words = tokenizer.load(files / "tokenizer.model")
  empty = chat.chat_tokens(words, templates.load_rubric(settings.judge.rubric).fill("", ""), settings.chat)
  room = settings.model.max_length - settings.judge.sampling.max_new
  if len(empty) >= room:
    raise ValueError(
      f"judge.rubric={settings.judge.rubric} is {len(empty)} tokens long, and model.max_length less "
      f"judge.sampling.max_new leaves {room} for it and a response: take judge_tiny or judge_tiny_five_bucket, or "
      "raise model.max_length."
    )
  out.commit(facts, folders=("files",))
