"""Folders of models that are damaged, that lie, or that are of something else: refused by name, and nothing is run."""

from collections.abc import Callable
import json
import os
import pathlib
import re
from typing import Any

from etils import epath
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_convert import change, make, rewrite, tensors_of

from srlm_jax import convert, hf_files, mesh

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """A model in one file."""
  convert.export_hf(make(), tmp_path / "one")
  return tmp_path / "one"


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
  """A model in several files, with their index."""
  convert.export_hf(make(), tmp_path / "many", max_shard="20KB")
  return tmp_path / "many"


def refused(folder: pathlib.Path) -> str:
  """What the folder is refused with, before a tensor is read."""
  with pytest.raises(ValueError) as caught:
    convert.described(epath.Path(folder))
  assert str(folder) in str(caught.value)
  return str(caught.value)


def edit_index(folder: pathlib.Path, edit: Callable[[dict[str, str]], Any]) -> None:
  """Changes the weight_map of an index."""
  path = folder / hf_files.INDEX
  index = json.loads(path.read_text())
  edit(index["weight_map"])
  path.write_text(json.dumps(index))


def edit_header(folder: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> None:
  """Changes the header of model.safetensors and leaves the bytes behind it."""
  path = folder / hf_files.WEIGHTS
  content = path.read_bytes()
  length = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + length])
  edit(header)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


# config.json


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is no JSON"),
    (b"{", "is no JSON"),
    (b"\xff\xfe{}", "is no JSON"),
    (b"[" * 100_000, "is no JSON"),
    (b'["llama"]', "holds no JSON object but a list"),
    (b"{}", "does not state vocab_size, hidden_size"),
  ],
)
def test_a_config_that_is_none(content: bytes, message: str, folder: pathlib.Path) -> None:
  (folder / "config.json").write_bytes(content)
  assert message in refused(folder)


def test_a_config_of_gigabytes_is_not_read(folder: pathlib.Path) -> None:
  with (folder / "config.json").open("r+b") as file:
    file.truncate(10 * 2**30)  # A hole: it takes no room.
  assert "has 10737418240 bytes" in refused(folder)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    *((dict(num_hidden_layers=value), f"num_hidden_layers is {value!r}") for value in (10**9, 0, -1, True, "3", 3.0)),
    (dict(vocab_size=10**12), "vocab_size is 1000000000000, it must be a whole number from 1 to 4194304"),
    (dict(num_attention_heads=3), "heads=3 must be a multiple of kv_heads=2"),
    (dict(head_dim=7), "head_dim=7 must be even"),
    (dict(rope_parameters=None, rope_scaling=None, rope_theta=-1.0), "rope_theta is -1.0"),
    (dict(rope_parameters="yes"), "rope scaling is 'yes'"),
    (dict(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    (dict(dtype="float8_e4m3fn"), "dtype is 'float8_e4m3fn', only float32, bfloat16, float16 are read"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    (
      dict(
        rope_parameters={
          **dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0),
          "original_max_position_embeddings": 32,
        }
      ),
      "high_freq_factor=1.0 of its rope scaling must be above low_freq_factor=4.0",
    ),
  ],
)
def test_sizes_that_no_llama_has(fields: dict[str, Any], message: str, folder: pathlib.Path) -> None:
  change(folder, **fields)
  assert message in refused(folder)


def test_code_that_a_folder_brings_is_never_run(folder: pathlib.Path) -> None:
  (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
  change(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
  convert.import_hf(folder)
  assert not (folder / "ran").exists()
  for path in (pathlib.Path(hf_files.__file__).parent).rglob("*.py"):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"trust_remote_code\s*=\s*True|\bpickle\b|torch\.load|allow_pickle\s*=\s*True", text), path
    for call in re.findall(r"from_pretrained\([^)]*\)", text):
      assert "trust_remote_code=False" in call, f"{path}: {call}"


# The index


@pytest.mark.parametrize(
  "name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.safetensors", "a.bin", ""]
)
def test_an_index_that_points_elsewhere(name: str, sharded: pathlib.Path) -> None:
  (sharded.parent / "outside.safetensors").write_bytes(next(sharded.glob("*.safetensors")).read_bytes())
  edit_index(sharded, lambda files: files.update({NORM: name}))
  assert f"names {name!r}, which is no safetensors file beside it" in refused(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(content: str, sharded: pathlib.Path) -> None:
  (sharded / hf_files.INDEX).write_text(content)
  assert "has no weight_map" in refused(sharded)


def test_an_index_and_files_that_differ(sharded: pathlib.Path) -> None:
  files = sorted(path.name for path in sharded.glob("*.safetensors"))
  other = next(name for name in files if name != json.loads((sharded / hf_files.INDEX).read_text())["weight_map"][NORM])
  edit_index(sharded, lambda found: found.update({NORM: other}))
  assert f"names another file than the one that holds {NORM}" in refused(sharded)


def test_a_tensor_that_lies_in_two_files(sharded: pathlib.Path) -> None:
  first, second, *_ = sorted(sharded.glob("*.safetensors"))
  name, tensor = next(iter(safetensors.numpy.load_file(first).items()))
  safetensors.numpy.save_file({**safetensors.numpy.load_file(second), name: tensor}, second)
  assert f"{name} lie in {second}, and in another file, too" in refused(sharded)


def test_a_missing_file(sharded: pathlib.Path) -> None:
  last = max(sharded.glob("*.safetensors"))
  last.unlink()
  assert f"names files that are missing: {last.name}" in refused(sharded)


# Files of tensors


def test_a_file_cut_short_at_any_place(folder: pathlib.Path) -> None:
  path = folder / hf_files.WEIGHTS
  content = path.read_bytes()
  for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    assert "is no safetensors file, or cut short or damaged" in refused(folder)


@pytest.mark.parametrize(
  "edit",
  [
    lambda header: header[NORM].update(data_offsets=[0, 2**40]),
    lambda header: header[NORM].update(data_offsets=[64, 0]),
    lambda header: header[NORM].update(data_offsets=[0, 64]),  # Inside another tensor.
    lambda header: header[NORM].update(data_offsets=[-1, 63]),
    lambda header: header[NORM].update(shape=[2**62, 2**62]),
    lambda header: header[NORM].update(shape=[17]),
    lambda header: header[NORM].update(dtype="F99"),
    lambda header: header.update({NORM: []}),
  ],
)
def test_a_header_that_lies(edit: Callable[[dict[str, Any]], Any], folder: pathlib.Path) -> None:
  edit_header(folder, edit)
  assert "is no safetensors file, or cut short or damaged" in refused(folder)


def test_a_header_of_absurd_length(folder: pathlib.Path) -> None:
  path = folder / hf_files.WEIGHTS
  path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
  assert "is no safetensors file" in refused(folder)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float64, ml_dtypes.float8_e4m3fn, np.bool_])
def test_other_types_of_numbers(kind: Any, folder: pathlib.Path) -> None:
  rewrite(folder, model__norm__weight=np.ones(16, kind))
  assert "only ['BF16', 'F16', 'F32'] are read. Is it quantised?" in refused(folder)


def test_a_file_that_is_cut_after_it_was_checked(folder: pathlib.Path) -> None:
  found = hf_files.tensors(epath.Path(folder))
  os.truncate(folder / hf_files.WEIGHTS, 1000)
  with pytest.raises(ValueError, match="is no safetensors file, or cut short or damaged"):
    found[NORM][(slice(0, 4),)]


# Numbers


@pytest.mark.parametrize("sizes", [None, dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_numbers_that_are_none_are_counted_where_they_lie(sizes: dict[str, int] | None, folder: pathlib.Path) -> None:
  names = ("model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", NORM)
  wrong = {name: tensors_of(folder)[name].copy() for name in names}
  wrong[names[0]][3, 4], wrong[names[0]][20, 1], wrong[names[1]][7], wrong[names[2]][0] = (
    np.nan,
    np.inf,
    -np.inf,
    np.nan,
  )
  rewrite(folder, **{name.replace(".", "__"): tensor for name, tensor in wrong.items()})
  with pytest.raises(ValueError) as caught:
    convert.import_hf(folder, mesh.make_mesh(**sizes) if sizes else None)
  assert str(caught.value) == (
    f"{folder}: NaN or infinite numbers, as float32: 2 of {names[0]}, 1 of {names[1]}, 1 of {NORM}. Is the download "
    "damaged? Fetch the model again, or take a wider model.param_dtype."
  )


def test_numbers_that_a_narrow_type_cannot_hold(folder: pathlib.Path) -> None:
  rewrite(folder, model__norm__weight=np.full(16, 1e6, np.float32))
  convert.import_hf(folder, dtype="bfloat16")
  with pytest.raises(ValueError, match=f"as float16: 16 of {NORM}"):
    convert.import_hf(folder, dtype="float16")


def test_a_head_that_is_said_to_be_the_embedding_and_is_not(folder: pathlib.Path) -> None:
  change(folder, tie_word_embeddings=True)
  with pytest.raises(ValueError, match="config.json ties the head to the embedding .*, but lm_head.weight is another"):
    convert.import_hf(folder)
  rewrite(folder, lm_head__weight=tensors_of(folder)["model.embed_tokens.weight"])
  model = convert.import_hf(folder)
  assert model.config.tied
  np.testing.assert_array_equal(jax.device_get(model.embedding[...]), tensors_of(folder)["lm_head.weight"])
  rewrite(folder, lm_head__weight=np.zeros((47, 16), np.float32))
  with pytest.raises(ValueError, match="but lm_head.weight is another"):
    convert.import_hf(folder)
