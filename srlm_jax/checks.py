"""Models and tokenizers from outside, opened before the first stage: hours later is too late to find one wrong."""

from collections.abc import Callable, Mapping
import functools

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import chat, convert, mesh as mesh_lib, tokenizer

# The settings that name a model from outside, by the folder of the artifact into which it is imported.
OUTSIDE = {"m0": "base.path", "writer": "prompts.path", "judge": "evaluate.judge"}


def models(settings: config_dict.ConfigDict, files: Mapping[str, epath.Path], mesh: jax.sharding.Mesh) -> None:
  """Opens the models and the tokenizer that these settings name, all but the weights themselves.

  Args:
    settings: the configuration.
    files: the path of each setting that is needed now ("base.path", "tokenizer" …).
    mesh: of training, over which the models will lie.

  Raises:
    ValueError: what a model's import would refuse, weights that do not divide over the mesh, a model made for shorter
      texts than model.max_length, a tokenizer that is damaged, not the model's, or without what `chat` needs.
  """
  own = files.get("tokenizer")
  if own and own.exists() and "base.path" not in files:  # The tiny world's is not there yet.
    _said("tokenizer", own, functools.partial(_words, own, settings.chat))
  for key in OUTSIDE.values():
    if path := files.get(key):
      words = own if key == "base.path" and own else path
      _said(key, path, functools.partial(_model, settings, path, words, mesh))


def _said(key: str, path: epath.Path, work: Callable[[], object]) -> None:
  """Does the work; what it refuses is said with the setting that names the path."""
  try:
    work()
  except ValueError as error:
    raise ValueError(f"config.{key}={path}: {str(error).removeprefix(f'{path}: ')}") from error


def _words(path: epath.Path, kind: str) -> tokenizer.Tokenizer:
  """A tokenizer that encodes what every stage will have to encode; ValueError where it does not."""
  words = tokenizer.load(path)
  words.golden()
  chat.chat_tokens(words, "Hello, world!", kind)
  return words


def _model(settings: config_dict.ConfigDict, path: epath.Path, words_path: epath.Path, mesh: jax.sharding.Mesh) -> None:
  """ValueError for a model's folder that cannot be used in this run; no tensor is read."""
  abstract, _ = convert.described(path, settings.model.param_dtype)
  mesh_lib.shardings(abstract, mesh)
  longest = abstract.config.max_length
  if longest < settings.model.max_length:
    raise ValueError(
      f"its max_position_embeddings is {longest}, model.max_length={settings.model.max_length}: it was made for "
      "shorter texts. Lower model.max_length."
    )
  tokenizer.check_rows(_words(words_path, settings.chat), abstract.config.vocab_size)
