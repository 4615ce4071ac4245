"""Hugging Face Llama folders to our model and back, bit by bit and without torch.

Their projections are matrices (out, in), one per layer; ours are stacked over the layers and keep heads apart.  Import
reads for each device its own part, and both ways one tensor at a time passes through the host: its memory need hold no
more than that beside what the devices hold.
"""

import collections
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import json
import math
from typing import Any

from etils import epath
from flax import nnx
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import distributed, hf_files, llama, mesh as mesh_lib, tokenizer

CODES = {name: code for code, name in hf_files.DTYPES.items()}
HEAD = "lm_head.weight"
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")  # Fields of config.json that a model alone does not know.


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one of our parameters lies in a Hugging Face folder.

  Attributes:
    name: of their tensor, or of each layer's, {} being the layer.
    dims: for each of its dimensions those of ours that it merges, outermost first (a layer's, the stacking left out).
  """

  name: str
  dims: tuple[tuple[int, ...], ...]

  @property
  def stacked(self) -> bool:
    """Whether each layer has a tensor of its own."""
    return "{}" in self.name

  @property
  def order(self) -> tuple[int, ...]:
    """Our dimensions in the order of theirs."""
    return tuple(dim for group in self.dims for dim in group)

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Their shape, given ours (of one layer)."""
    return tuple(math.prod(ours[dim] for dim in group) for group in self.dims)


LAYOUTS = {
  "embedding": Layout("model.embed_tokens.weight", ((0,), (1,))),
  "layers.attention_norm": Layout("model.layers.{}.input_layernorm.weight", ((0,),)),
  "layers.q": Layout("model.layers.{}.self_attn.q_proj.weight", ((1, 2, 3), (0,))),
  "layers.k": Layout("model.layers.{}.self_attn.k_proj.weight", ((1, 2), (0,))),
  "layers.v": Layout("model.layers.{}.self_attn.v_proj.weight", ((1, 2), (0,))),
  "layers.o": Layout("model.layers.{}.self_attn.o_proj.weight", ((3,), (0, 1, 2))),
  "layers.ffw_norm": Layout("model.layers.{}.post_attention_layernorm.weight", ((0,),)),
  "layers.gate": Layout("model.layers.{}.mlp.gate_proj.weight", ((1,), (0,))),
  "layers.up": Layout("model.layers.{}.mlp.up_proj.weight", ((1,), (0,))),
  "layers.down": Layout("model.layers.{}.mlp.down_proj.weight", ((1,), (0,))),
  "norm": Layout("model.norm.weight", ((0,),)),
  "head": Layout(HEAD, ((1,), (0,))),
}


def _map_params(model: llama.Llama, change: Callable[[str, nnx.Param], Any]) -> llama.Llama:
  """The model with each parameter's array replaced by change("layers.q", parameter)."""

  def one(path: tuple[Any, ...], param: nnx.Param) -> Any:
    return param.replace(change(".".join(part.name for part in path), param))

  return jax.tree_util.tree_map_with_path(one, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _params(model: llama.Llama) -> dict[str, nnx.Param]:
  """{"layers.q": parameter, …} in the order of LAYOUTS."""
  found: dict[str, nnx.Param] = {}
  _map_params(model, found.__setitem__)
  return {name: found[name] for name in LAYOUTS if name in found}


# Import


def _read_part(tensor: Any, layout: Layout, shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
  """A block of one of our parameters (of one layer), from just the rows and columns of their tensor that hold it."""
  slices, sizes, rest = [], [], []
  for first, *inner in layout.dims:
    start, stop = bounds[first]
    step = math.prod(shape[dim] for dim in inner)
    slices.append(slice(start * step, stop * step))
    sizes += [stop - start, *(shape[dim] for dim in inner)]
    rest += [slice(None), *(slice(*bounds[dim]) for dim in inner)]
  block = tensor[tuple(slices)].reshape(sizes)[tuple(rest)]
  return block.transpose(np.argsort(layout.order))


def _not_finite(array: np.ndarray) -> int:
  """How many numbers are NaN or infinite, by their bits: the exponent's are all set."""
  kind = f"uint{8 * array.dtype.itemsize}"
  exponent = np.asarray(np.inf, array.dtype).view(kind)
  return int(np.count_nonzero(array.view(kind) & exponent == exponent))


def _place(
  tensor: Any,
  layout: Layout,
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding: jax.sharding.Sharding,
  count: Callable[[int], None],
) -> jax.Array:
  """A tensor as one of our parameters (or a layer of one), each device's part read alone.

  `count` receives of each part how many numbers are NaN or infinite.
  """

  @functools.cache  # Devices that hold the same part, as over the "data" axis, read it once.
  def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    with np.errstate(over="ignore"):  # _check_numbers says what a narrower type cannot hold.
      found = _read_part(tensor, layout, shape, bounds).astype(dtype, copy=False)
    count(_not_finite(found))
    return found

  def place(index: tuple[slice, ...] | None) -> np.ndarray:
    return part(tuple(along.indices(size)[:2] for along, size in zip(index or (), shape, strict=True)))

  return jax.make_array_from_callback(shape, sharding, place)


def _load(
  tensors: Mapping[str, Any],
  layout: Layout,
  param: nnx.Param,
  sharding: jax.sharding.Sharding,
  counted: collections.Counter[str],
) -> jax.Array:
  """One of our parameters; a stacked one grows on its devices, so that the host holds no more than a layer of it.

  `counted` receives for each of their tensors how many of the numbers that this process read are not finite.
  """
  shape, dtype = param.shape, param.dtype

  def place(name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    distributed.progress(f"read {name}")
    return _place(tensors[name], layout, shape, dtype, sharding, lambda count: counted.update({name: count}))

  if not layout.stacked:
    return place(layout.name, shape, sharding)
  return mesh_lib.stack_layers(
    lambda index, of_layer: place(layout.name.format(index), shape[1:], of_layer), shape, dtype, sharding
  )


def import_hf(
  folder: epath.PathLike, mesh: jax.sharding.Mesh | None = None, dtype: jax.typing.DTypeLike | None = None
) -> llama.Llama:
  """The Llama of a local Hugging Face folder, from safetensors alone.

  Args:
    folder: config.json and model.safetensors, or its shards and their index.
    mesh: over which the parameters are split; without one they go to the first device.
    dtype: of the parameters and of computation; by default that of the tensors (the widest of several).

  Raises:
    ValueError: weights in pickles, a model that is no Llama, damaged files, missing or unknown tensors, wrong shapes or
      types, or numbers that are NaN or infinite.
  """
  folder = epath.Path(folder)
  abstract, tensors = described(folder, dtype)
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = dict.fromkeys(LAYOUTS, one)
  else:
    where = {name: sharding.get_value() for name, sharding in _params(mesh_lib.shardings(abstract, mesh)).items()}
  counted: collections.Counter[str] = collections.Counter()
  model = _map_params(abstract, lambda name, param: _load(tensors, LAYOUTS[name], param, where[name], counted))
  _check_numbers(folder, counted, abstract.config.param_dtype)
  if abstract.config.tied and HEAD in tensors:
    _check_head(folder, tensors, model, where["embedding"])
  return model


def described(
  folder: epath.Path, dtype: jax.typing.DTypeLike | None = None
) -> tuple[llama.Llama, dict[str, hf_files.Tensor]]:
  """The model of a folder in the abstract, and its tensors by name: all that can be checked without reading tensors.

  Raises:
    ValueError: as `import_hf`, but for numbers that are not finite.
  """
  config = hf_files.read_config(folder)
  tensors = hf_files.tensors(folder)
  expected = _theirs(jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0))), config.param_dtype)
  hf_files.check(folder, tensors, {name: want.shape for name, want in expected.items()}, config.tied)
  widest = functools.reduce(jnp.promote_types, (jnp.dtype(hf_files.DTYPES[tensors[name].dtype]) for name in expected))
  kind = jnp.dtype(dtype or widest).name
  config = dataclasses.replace(config, dtype=kind, param_dtype=kind)
  return jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0))), tensors


def _check_numbers(folder: epath.Path, counted: Mapping[str, int], dtype: str) -> None:
  """ValueError where tensors have numbers that are NaN or infinite, of which `counted` says how many."""
  wrong = {name: count for name, count in sorted(counted.items()) if count}
  if wrong:
    some = ", ".join(f"{count} of {name}" for name, count in list(wrong.items())[:8])
    more = f" and of {len(wrong) - 8} more tensors" if len(wrong) > 8 else ""
    raise ValueError(
      f"{folder}: NaN or infinite numbers, as {dtype}: {some}{more}. Is the download damaged? Fetch the model again, "
      "or take a wider model.param_dtype."
    )


def _check_head(
  folder: epath.Path, tensors: Mapping[str, hf_files.Tensor], model: llama.Llama, sharding: jax.sharding.Sharding
) -> None:
  """ValueError where a folder says that its head is the embedding, and holds another one."""
  embedding = model.embedding[...]
  same = tensors[HEAD].shape == embedding.shape and tensors[HEAD].dtype in hf_files.DTYPES
  if same:
    head = _place(tensors[HEAD], LAYOUTS["embedding"], embedding.shape, embedding.dtype, sharding, lambda count: None)
    same = bool(jax.device_get(jax.jit(jnp.array_equal)(head, embedding)))
  if not same:
    raise ValueError(
      f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but {HEAD} is another one: set it "
      "to false if the model was trained so."
    )


# Export


def _sources(model: llama.Llama) -> dict[str, tuple[Layout, nnx.Param, int | None]]:
  """Each of their tensors by name: our parameter that it comes from, its layout, and the layer where it is stacked."""
  return {
    LAYOUTS[name].name.format(layer): (LAYOUTS[name], param, layer)
    for name, param in _params(model).items()
    for layer in (range(model.config.layers) if LAYOUTS[name].stacked else (None,))
  }


def _theirs(model: llama.Llama, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
  """Names and shapes of a model's tensors in a Hugging Face folder."""
  return {
    name: jax.ShapeDtypeStruct(layout.shape(param.shape[layout.stacked :]), dtype)
    for name, (layout, param, _) in _sources(model).items()
  }


def _whole(param: nnx.Param, layer: int | None) -> jax.Array:
  """One of our tensors, to be read by any process; all of them must take part."""
  # A copy of what is not stacked, too: numpy's view of an array lives as long as the array, here as the model.
  array = param[...].copy() if layer is None else mesh_lib.layer_of(param[...], layer)
  return jax.block_until_ready(distributed.whole(array))  # Processes that write nothing would run ahead.


def _on_host(layout: Layout, array: jax.Array, dtype: np.dtype) -> np.ndarray:
  """One of our tensors as theirs."""
  ours = np.asarray(array)
  return np.ascontiguousarray(ours.transpose(layout.order).reshape(layout.shape(ours.shape)), dtype)


def _header(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
  """The beginning of a safetensors file, which the tensors follow in this order.

  The library writes a file only from all of its tensors at once, and to a local disk.
  """
  fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors.items():
    begin, end = end, end + tensor.size * tensor.dtype.itemsize
    fields[name] = {"dtype": CODES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": (begin, end)}
  text = json.dumps(fields, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # So that the tensors are aligned.
  return len(text).to_bytes(8, "little") + text


def _config_json(config: llama.LlamaConfig, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
  """config.json that transformers 5 and older ones read alike."""
  scaling: dict[str, Any] | None = None
  if config.rope_scaling:
    scaling = {
      "rope_type": "llama3",
      "factor": config.rope_scaling.factor,
      "low_freq_factor": config.rope_scaling.low_freq_factor,
      "high_freq_factor": config.rope_scaling.high_freq_factor,
      "original_max_position_embeddings": config.rope_scaling.original_max_length,
    }
  return {
    "architectures": ["LlamaForCausalLM"],
    **hf_files.FIXED,
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.ffw,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tied,
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
    "torch_dtype": dtype,
    "dtype": dtype,
    **carried,
  }


def _carry(config: llama.LlamaConfig, source: epath.Path, folder: epath.Path) -> dict[str, Any]:
  """Copies tokenizer files into an export; returns the fields of config.json that go with them."""
  words = tokenizer.load(source)
  if words.vocab_size > config.vocab_size:
    raise ValueError(
      f"the tokenizer in {source} has {words.vocab_size} tokens, the model's embedding {config.vocab_size} rows: "
      "name the folder of the model's own tokenizer."
    )
  words.save(folder)
  fields: dict[str, Any] = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
  for name in ("generation_config.json", "config.json"):  # Llama 3 has several end tokens, which only these files list.
    if (source / name).exists():
      stated = json.loads((source / name).read_text())
      fields |= {key: stated[key] for key in CARRIED if stated.get(key) is not None}
  return fields


def export_hf(
  model: llama.Llama,
  folder: epath.PathLike,
  tokenizer_folder: epath.PathLike | None = None,
  max_shard: int | str = "5GB",
  dtype: jax.typing.DTypeLike | None = None,
) -> None:
  """Writes a model as a Hugging Face folder: model.safetensors, or shards with their index, and config.json last.

  In several processes all must call it; process 0 writes.

  Args:
    model: any `Llama`, on whatever mesh.
    folder: made where missing; it must not hold weights yet.
    tokenizer_folder: a SentencePiece or Hugging Face tokenizer's, whose files are copied beside the weights, and
      generation_config.json with them.
    max_shard: most bytes of one file.
    dtype: to store; by default the parameters' own, bit by bit.
  """
  folder = epath.Path(folder)
  writes = distributed.writes()
  if writes:
    if held := sorted(path.name for path in folder.glob("*.safetensors")):
      raise ValueError(f"{folder} already holds weights ({held[0]}, …): export into an empty folder, or delete them.")
    folder.mkdir(parents=True, exist_ok=True)
  stored = jnp.dtype(dtype or model.config.param_dtype)
  if stored.name not in CODES:
    raise ValueError(f"dtype is {stored.name!r}: a Llama's weights are stored as one of {sorted(CODES)}. Choose one.")
  carried = _carry(model.config, epath.Path(tokenizer_folder), folder) if tokenizer_folder and writes else {}
  theirs = _theirs(model, stored)
  plan = huggingface_hub.split_state_dict_into_shards_factory(
    theirs,
    get_storage_size=lambda tensor: tensor.size * tensor.dtype.itemsize,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard,
  )
  sources = _sources(model)
  for file, names in plan.filename_to_tensors.items():
    names = sorted(names)
    with (folder / file).open("wb") if writes else contextlib.nullcontext() as out:
      if out:
        out.write(_header({name: theirs[name] for name in names}))
      for name in names:
        layout, param, layer = sources[name]
        ours = _whole(param, layer)
        if out:
          out.write(_on_host(layout, ours, stored).view(np.uint8))
  if not writes:
    return
  if plan.is_sharded:
    index = {"metadata": plan.metadata | {"format": "pt"}, "weight_map": plan.tensor_to_filename}
    (folder / hf_files.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
  config = _config_json(model.config, stored.name, carried)
  (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
