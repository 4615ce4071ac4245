"""The files of a Hugging Face Llama folder: config.json, the index and the headers of safetensors files, all untrusted.

Nothing here runs code of a folder: pickled weights are refused, and what config.json says of classes is not read.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from etils import epath
import ml_dtypes  # noqa: F401  # Gives numpy, and so safetensors, bfloat16.
import numpy as np
import safetensors

from srlm_jax import llama

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LARGEST_JSON = 64 * 2**20  # Bytes: the index of a model of 400B is some 100 kB.
# Fields of config.json by their largest value: ten times what any Llama has. The first five must be there.
SIZES = {
  "vocab_size": 2**22,
  "hidden_size": 2**18,
  "num_hidden_layers": 2**11,
  "num_attention_heads": 2**12,
  "intermediate_size": 2**20,
  "num_key_value_heads": 2**12,
  "head_dim": 2**12,
  "max_position_embeddings": 2**28,
}
REQUIRED = tuple(SIZES)[:5]


def read_json(path: epath.Path) -> dict[str, Any]:
  """The object in a JSON file of a folder; ValueError where it is none."""
  if (size := path.stat().length) > LARGEST_JSON:
    raise ValueError(f"{path} has {size} bytes: no file of a model's that describes it is so large. Fetch it again.")
  try:
    found = json.loads(path.read_bytes().decode())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON ({error}): fetch it again.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds no JSON object but a {type(found).__name__}: fetch it again.")
  return found


# config.json


def _number(fields: Mapping[str, Any], name: str, path: epath.Path, usual: float) -> float:
  """A positive, finite number of config.json, or the usual one where it is absent or null."""
  value = fields.get(name)
  if value is None:
    return usual
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
    raise ValueError(f"{path}: {name} is {value!r}, it must be a number above 0. Is it the config.json of a Llama?")
  return float(value)


def _size(fields: Mapping[str, Any], name: str, path: epath.Path) -> int | None:
  """A size that config.json states; None where it is absent or null."""
  value = fields.get(name)
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= SIZES[name]:
    raise ValueError(
      f"{path}: {name} is {value!r}, it must be a whole number from 1 to {SIZES[name]}. Is it the config.json of a "
      "Llama?"
    )
  return value


def _rope_scaling(fields: Mapping[str, Any], path: epath.Path) -> llama.RopeScaling | None:
  kind = fields.get("rope_type", fields.get("type", "default"))
  if kind == "default":
    return None
  if kind != "llama3":
    raise ValueError(f"{path}: rope type {kind!r}: only 'default' and 'llama3' are implemented. Use another model.")
  names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  if missing := [name for name in names if fields.get(name) is None]:
    raise ValueError(f"{path}: its rope scaling does not state {', '.join(missing)}. Add them.")
  factor, low, high, length = (_number(fields, name, path, 1.0) for name in names)
  if high <= low:
    raise ValueError(f"{path}: high_freq_factor={high} of its rope scaling must be above low_freq_factor={low}.")
  return llama.RopeScaling(factor, low, high, int(length))


def read_config(folder: epath.PathLike) -> llama.LlamaConfig:
  """The sizes that a folder's config.json states, in the style of transformers 5 or of older ones.

  The dtype of the file becomes both that of the parameters and that of computation.

  Raises:
    ValueError: there is no config.json, it is damaged, or it asks for what our Llama does not have.
  """
  path = epath.Path(folder) / CONFIG
  if not path.exists():
    raise ValueError(f"{path} is missing: name a folder with a Llama model in Hugging Face's format.")
  fields = read_json(path)
  for name, value in FIXED.items():
    if fields.get(name, value) != value:
      raise ValueError(f"{path}: {name} is {fields[name]!r}, only {value!r} is implemented. Use another model.")
  sizes = {name: _size(fields, name, path) for name in SIZES}
  if missing := [name for name in REQUIRED if sizes[name] is None]:
    raise ValueError(f"{path} does not state {', '.join(missing)}: is it the config.json of a Llama?")
  # One of the two holds it all in transformers 5, older ones keep theta beside the scaling.
  rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
  if not isinstance(rope, dict):
    raise ValueError(f"{path}: its rope scaling is {rope!r}, no JSON object. Is it the config.json of a Llama?")
  dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
  if dtype not in DTYPES.values():
    raise ValueError(f"{path}: its dtype is {dtype!r}, only {', '.join(DTYPES.values())} are read. Is it quantised?")
  tied = fields.get("tie_word_embeddings", False)
  if not isinstance(tied, bool):
    raise ValueError(f"{path}: tie_word_embeddings is {tied!r}, it must be true or false.")
  heads, embed = sizes["num_attention_heads"] or 1, sizes["hidden_size"] or 1
  try:
    return llama.LlamaConfig(
      vocab_size=sizes["vocab_size"] or 1,
      embed=embed,
      layers=sizes["num_hidden_layers"] or 1,
      heads=heads,
      kv_heads=sizes["num_key_value_heads"] or heads,
      head_dim=sizes["head_dim"] or embed // heads,
      ffw=sizes["intermediate_size"] or 1,
      max_length=sizes["max_position_embeddings"] or 2048,
      rope_theta=_number(rope, "rope_theta", path, _number(fields, "rope_theta", path, 10000.0)),
      rope_scaling=_rope_scaling(rope, path),
      norm_eps=_number(fields, "rms_norm_eps", path, 1e-6),
      tied=tied,
      dtype=dtype,
      param_dtype=dtype,
    )
  except ValueError as error:
    raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


# Weights


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file that is open only while it is read: what was read of an open one counts as our memory."""

  path: str
  name: str
  shape: tuple[int, ...]
  dtype: str

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    try:
      with safetensors.safe_open(self.path, framework="numpy") as file:
        return file.get_slice(self.name)[index]
    except safetensors.SafetensorError as error:
      raise _damaged(self.path, error) from error


def _damaged(path: str, error: Exception) -> ValueError:
  return ValueError(f"{path} is no safetensors file, or cut short or damaged ({error}): download it again.")


def _some(names: Iterable[str]) -> str:
  listed = sorted(names)
  return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _index(folder: epath.Path) -> dict[str, str]:
  """The file of each tensor, as the folder's index says; ValueError where it points anywhere else."""
  found = read_json(folder / INDEX).get("weight_map")
  if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
    raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files: fetch it again.")
  for name in sorted(set(found.values())):
    if name != pathlib.PurePath(name).name or "\\" in name or not name.endswith(".safetensors"):
      raise ValueError(f"{folder / INDEX} names {name!r}, which is no safetensors file beside it. Use another model.")
  if missing := sorted(name for name in set(found.values()) if not (folder / name).exists()):
    raise ValueError(f"{folder}: {INDEX} names files that are missing: {_some(missing)}. Download them again.")
  return found


def weight_files(folder: epath.Path) -> list[epath.Path]:
  """The safetensors files of a folder; ValueError where there are none or only pickles."""
  if "://" in os.fspath(folder):
    raise ValueError(f"{folder}: tensors are read from a local disk alone. Copy the folder there first.")
  if (folder / INDEX).exists():
    return [folder / name for name in sorted(set(_index(folder).values()))]
  if (folder / WEIGHTS).exists():
    return [folder / WEIGHTS]
  if pickles := sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern)):
    raise ValueError(
      f"{folder} has pickled weights only ({', '.join(pickles[:3])}): unpickling can run anybody's code, so they are "
      "refused. Use the model's safetensors files."
    )
  raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}: name a folder with a model's safetensors files.")


def tensors(folder: epath.Path) -> dict[str, Tensor]:
  """All tensors in a folder by name, from the headers of its files: no tensor is read.

  Raises:
    ValueError: no such files, a damaged one, a tensor in two of them, or others than the index says.
  """
  found: dict[str, Tensor] = {}
  for path in map(os.fspath, weight_files(folder)):
    try:
      with safetensors.safe_open(path, framework="numpy") as file:
        entries = {name: file.get_slice(name) for name in file.keys()}
        here = {name: Tensor(path, name, tuple(one.get_shape()), one.get_dtype()) for name, one in entries.items()}
    except safetensors.SafetensorError as error:
      raise _damaged(path, error) from error
    if twice := here.keys() & found.keys():
      raise ValueError(f"{folder}: {_some(twice)} lie in {path}, and in another file, too. Download the model again.")
    found |= here
  if (folder / INDEX).exists():
    listed = _index(folder)
    if wrong := [
      name for name, file in listed.items() if name in found and pathlib.PurePath(found[name].path).name != file
    ]:
      raise ValueError(
        f"{folder}: {INDEX} names another file than the one that holds {_some(wrong)}. Download it again."
      )
  return found


def check(folder: epath.Path, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], tied: bool) -> None:
  """Holds the tensors of a folder against the names and shapes that its config.json makes.

  Raises:
    ValueError: missing or unknown tensors, other shapes, or types that are none of DTYPES.
  """
  # Old exports hold rotary tables, and some a copy of a tied head: neither is a parameter.
  ignored = {name for name in found if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
  if missing := expected.keys() - found.keys():
    raise ValueError(f"{folder}: {len(missing)} tensors are missing: {_some(missing)}. Is the download complete?")
  if extra := found.keys() - expected.keys() - ignored:
    raise ValueError(f"{folder}: {len(extra)} tensors that a Llama has not: {_some(extra)}. Use another model.")
  if unknown := {found[name].dtype for name in expected} - DTYPES.keys():
    raise ValueError(f"{folder}: tensors of type {sorted(unknown)}, only {sorted(DTYPES)} are read. Is it quantised?")
  for name, want in expected.items():
    if (have := found[name].shape) != want:
      raise ValueError(f"{folder}: {name} has shape {have}, {CONFIG} makes it {want}: the two are of different models.")
