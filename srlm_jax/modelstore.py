"""Models as artifacts: weights, tokenizer and golden encodings in one folder, checked when they are loaded."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
from typing import Any

from flax import nnx
import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  attention,
  checkpoint,
  config as config_lib,
  distributed,
  generator,
  journal,
  llama,
  mesh as mesh_lib,
  rollout,
  sampling,
  server,
  service,
  tokenizer,
)

CANDIDATES = "candidates"  # Folder of the checkpoints among which a training chooses, below its own.


def save(out: artifacts.Artifact, model: llama.Llama, words: tokenizer.Tokenizer, facts: Mapping[str, Any]) -> None:
  """Writes weights and tokenizer into an artifact and commits it; states and candidates of its training are deleted.

  The journal of its training, where there is one, becomes a file of the artifact like the others.
  """
  checkpoint.save_model(out.folder, model)
  distributed.first("save the tokenizer", lambda: words.save(out.folder / "tokenizer"))
  out.write("golden.json", json.dumps(words.golden(), indent=1))
  sizes = dataclasses.replace(model.config, dropout=0.0, dtype="float32", remat="none", attention="xla")  # Not how.
  out.write("llama.json", json.dumps(dataclasses.asdict(sizes), indent=1))
  # In place of the weights' files: equal weights give equal artifacts, which Orbax's files, with times in them and
  # random names, do not.
  out.write("fingerprints.json", json.dumps(checkpoint.fingerprints(model), indent=1))
  log = out.folder / journal.NAME
  if distributed.first(f"look at {log}", log.exists):
    out.write(journal.NAME, log.read_text() if distributed.writes() else "")
  parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
  out.commit({**facts, "parameters": parameters, "tokenizer": words.digest}, folders=("tokenizer",))
  for folder in (out.folder / "states", out.folder / CANDIDATES):
    if distributed.writes() and folder.exists():  # Last: until the commit a stopped run goes on from them.
      folder.rmtree()


def load_tokenizer(artifact: artifacts.Artifact) -> tokenizer.Tokenizer:
  """The tokenizer of a model artifact; ValueError where it does not encode as it did when the model was made."""
  words = tokenizer.load(artifact.folder / "tokenizer")
  tokenizer.verify(words, json.loads(artifact.read_text("golden.json")))
  if words.digest != artifact.manifest()["facts"]["tokenizer"]:  # A chat template, say, that encodings do not show.
    raise ValueError(f"{artifact.folder / 'tokenizer'} changed since the model was made: bring its files back.")
  return words


def model_config(artifact: artifacts.Artifact, settings: config_dict.ConfigDict, train: bool) -> llama.LlamaConfig:
  """The sizes of an artifact's model, for training (dropout and remat of the configuration) or for use (neither)."""
  how = settings.model
  return dataclasses.replace(
    checkpoint.read_model_config(artifact.read_text("llama.json")),
    dropout=how.dropout if train else 0.0,
    remat=how.remat if train else "none",
    dtype=how.dtype,
    attention=attention_kind(settings, jax.default_backend()),
  )


def attention_kind(settings: config_dict.ConfigDict, platform: str) -> str:
  """The kind of attention that the configuration asks for, on a platform as `jax.Device.platform` names it."""
  if settings.model.attention != "auto":
    return settings.model.attention
  capability = jax.local_devices()[0].compute_capability if platform == "gpu" else ""
  return attention.best_for(platform, capability)


def load(
  artifact: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, train: bool = False
) -> llama.Llama:
  """The model of an artifact, each device reading its part, for training or for use."""
  artifact.manifest()
  model = checkpoint.load_model(artifact.folder, mesh, model_config(artifact, settings, train))
  wanted, found = json.loads(artifact.read_text("fingerprints.json")), checkpoint.fingerprints(model)
  damaged = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
  if damaged:
    raise ValueError(
      f"{artifact.folder / 'weights'} is damaged: the bits of {checkpoint.few(damaged)} are not those that were "
      f"written. Delete {artifact.folder} and make it again."
    )
  return model


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _cast(model: llama.Llama, dtype: str) -> llama.Llama:
  """The kernels in the type that they are used in anyway, so that decoding reads no more; the norms as they are."""

  def one(param: nnx.Param) -> nnx.Variable:
    norm = "features" in param.get_metadata("axes")
    return param if norm else param.replace(param[...].astype(dtype))

  return jax.tree.map(one, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def served_name(artifact: artifacts.Artifact) -> str:
  """The name by which a server serves the model: that its weights are the artifact's, and no older ones, is in it."""
  return f"{artifact.name}-{artifact.digest()[:12]}"


def speaker(artifact: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> rollout.Speaker:
  """A model that answers and judges: on the mesh of sampling, or, with `settings.server.url`, in a server."""
  words = load_tokenizer(artifact)
  engine: Callable[[sampling.Sampling, int], rollout.Engine]
  if settings.server.url:
    how = config_lib.frozen(service.Service, settings.server)
    rows = checkpoint.read_model_config(artifact.read_text("llama.json")).vocab_size
    engine = server.connect(how, served_name(artifact), words, rows, settings.seed)
  else:
    engine = _generators(artifact, settings, mesh, words)
  return rollout.Speaker(engine, words, settings.chat, settings.model.max_length)


def in_use(artifact: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> llama.Llama:
  """The model of an artifact with its kernels in the type that they are used in, on a mesh that may be sampling's own.

  It is read and cast where it takes least room, in parts on the mesh of training: all processes together read it once,
  and no device ever holds more than its part of the stored weights and of the used ones.
  """
  training = mesh_lib.make_mesh(**settings.mesh)
  with jax.set_mesh(training):
    model = load(artifact, settings, training)
    if settings.model.dtype != model.config.param_dtype:
      model = _cast(model, settings.model.dtype)
    if mesh != training:
      model = mesh_lib.moved(model, mesh)
  return model


def _generators(
  artifact: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, words: tokenizer.Tokenizer
) -> Callable[[sampling.Sampling, int], generator.Generator]:
  """Gives generators of one model."""
  model = in_use(artifact, settings, mesh)
  rows, seed = settings.generation.rows, settings.seed
  return lambda how, limit: generator.Generator(model, words.eos_id, how, rows, limit, seed, words.decode)


def same_tokenizer(artifact: artifacts.Artifact, words: tokenizer.Tokenizer) -> None:
  """ValueError where an artifact's token ids are another tokenizer's."""
  theirs = artifact.manifest()["facts"]["tokenizer"]
  if theirs != words.digest:
    raise ValueError(
      f"{artifact.folder} holds token ids of the tokenizer {theirs[:12]}…, the model has {words.digest[:12]}…: "
      "they must be the same. Make the artifact again with this model."
    )
