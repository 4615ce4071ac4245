import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import test_distributed

from srlm_jax import convert, distributed, hf_files, llama, mesh, tokenizer

CONFIG = llama.LlamaConfig(
  vocab_size=48, embed=16, layers=3, heads=4, kv_heads=2, head_dim=8, ffw=24, max_length=64, rope_theta=500.0
)
SCALING = llama.RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=32)


def make(config: llama.LlamaConfig = CONFIG) -> llama.Llama:
  """A model whose every number is another."""
  random = np.random.RandomState(0)
  shapes = jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of all safetensors files in a folder."""
  found: dict[str, np.ndarray] = {}
  for path in folder.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(path)
  return found


def change(folder: pathlib.Path, **fields: Any) -> None:
  """Sets fields of config.json; None takes one out."""
  path = folder / "config.json"
  merged = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))


def rewrite(folder: pathlib.Path, **tensors: np.ndarray | None) -> None:
  """Sets tensors of model.safetensors, __ in a name being a dot; None takes one out."""
  merged = tensors_of(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
  kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
  safetensors.numpy.save_file(kept, folder / "model.safetensors")


@pytest.fixture
def exported(tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder that we wrote, in one file."""
  convert.export_hf(make(), tmp_path / "exported")
  return tmp_path / "exported"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a small SentencePiece model."""
  folder = tmp_path_factory.mktemp("tokenizer")
  sentences = ["the cat sat on the mat", "a dog ran over the hill", "say a word three times"] * 20
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_prefix=str(folder / "tokenizer"),
    vocab_size=40,
    minloglevel=2,
    hard_vocab_limit=False,
  )
  return folder


# Against transformers


def transformers_folder(folder: pathlib.Path, dtype: str, max_shard: str, **changes: Any) -> Any:
  """A random model of transformers, saved; skips where torch is missing."""
  torch = pytest.importorskip("torch", reason="needs torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
  config = transformers.LlamaConfig(**sizes, intermediate_size=48, initializer_range=0.3, **changes)
  model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # Norm scales begin as ones, which would hide a mix-up.
      parameter += torch.randn_like(parameter) * 0.1
  model.save_pretrained(folder, max_shard_size=max_shard)
  return model


@pytest.mark.parametrize(
  ("dtype", "max_shard", "tied"), [("float32", "60KB", False), ("bfloat16", "35KB", True), ("float16", "1GB", False)]
)
def test_round_trip_is_exact(dtype: str, max_shard: str, tied: bool, tmp_path: pathlib.Path) -> None:
  source, target = tmp_path / "source", tmp_path / "target"
  transformers_folder(source, dtype, max_shard, tie_word_embeddings=tied)
  assert len(list(source.glob("*.safetensors"))) == (1 if max_shard == "1GB" else 2)
  model = convert.import_hf(source)
  assert model.config.param_dtype == dtype and model.config.tied == tied
  convert.export_hf(model, target, max_shard=max_shard)
  before, after = tensors_of(source), tensors_of(target)
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape, name
    assert after[name].tobytes() == tensor.tobytes(), name
  if max_shard != "1GB":
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert len(set(index["weight_map"].values())) == len(list(target.glob("*.safetensors"))) >= 2


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_transformers_reads_our_export(scaling: llama.RopeScaling | None, tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch", reason="needs torch")
  transformers = pytest.importorskip("transformers")
  ours = make(dataclasses.replace(CONFIG, rope_scaling=scaling))
  convert.export_hf(ours, tmp_path, max_shard="20KB")
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values()), info
  assert theirs.dtype == torch.float32
  tokens = np.random.RandomState(1).randint(0, 48, (2, 40))
  with torch.no_grad():
    expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
  places = jnp.broadcast_to(jnp.arange(40), (2, 40))
  logits = jax.jit(lambda model, t: model.logits(model(t, places, jnp.ones_like(t))))(ours, jnp.asarray(tokens))
  np.testing.assert_allclose(logits, expected, atol=1e-4)


# Without torch


def test_export_then_import_gives_the_same_model(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
  assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
  model = convert.import_hf(exported)
  assert model.config == CONFIG
  assert jax.tree.structure(model) == jax.tree.structure(make())
  jax.tree.map(np.testing.assert_array_equal, model, make())


def test_heads_and_dimensions_lie_as_transformers_has_them(exported: pathlib.Path) -> None:
  model, tensors = make(), tensors_of(exported)
  # Query head 3 is the second one (group 1) that shares kv head 1; its rows are 24 to 31 of q_proj.
  q = tensors["model.layers.2.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(q[24:32], model.layers.q[...][2, :, 1, 1].T)
  k = tensors["model.layers.2.self_attn.k_proj.weight"]
  np.testing.assert_array_equal(k[8:16], model.layers.k[...][2, :, 1].T)
  o = tensors["model.layers.1.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(o[:, 24:32], model.layers.o[...][1, 1, 1].T)
  np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], model.layers.down[...][0].T)
  np.testing.assert_array_equal(tensors["lm_head.weight"], model.head[...].T)
  np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], model.embedding[...])


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)], ids=str)
def test_import_onto_a_mesh(sizes: dict[str, int], exported: pathlib.Path) -> None:
  devices = mesh.make_mesh(**sizes)
  model = convert.import_hf(exported, devices)
  expected = mesh.shardings(make(), devices)
  jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding or pytest.fail(str(sharding)), model, expected)
  jax.tree.map(np.testing.assert_array_equal, model, make())
  again = exported.with_name("again")
  convert.export_hf(model, again)
  assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


TOGETHER = """
import os, pathlib, jax
from srlm_jax import convert, distributed, mesh
folder = pathlib.Path({folder!r})
with distributed.session():
  model = convert.import_hf(folder, mesh.make_mesh(fsdp=2, tensor=2))
  assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(model.layers.q))
  convert.export_hf(model, folder.with_name("again") if distributed.writes() else "/dev/null/nothing is written here")
"""


def test_two_processes_read_their_parts_and_write_the_whole(exported: pathlib.Path) -> None:
  processes = test_distributed.start(TOGETHER.format(folder=str(exported)), exported.parent)
  assert [process.wait(timeout=120) for process in processes] == [0, 0], (exported.parent / "0.err").read_text()
  again = exported.with_name("again")
  assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_files_are_as_the_library_writes_them(exported: pathlib.Path) -> None:
  written = safetensors.numpy.save(tensors_of(exported), {"format": "pt"})
  assert (exported / "model.safetensors").read_bytes() == written


class Spy:
  """A tensor that notes how much is read of it."""

  def __init__(self, array: np.ndarray) -> None:
    self.array, self.read = array, []

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    self.read.append(self.array[index].size)
    return self.array[index]


def test_each_device_part_is_read_alone_and_once(exported: pathlib.Path) -> None:
  spies = {name: Spy(array) for name, array in tensors_of(exported).items()}
  devices = mesh.make_mesh(data=2, fsdp=2, tensor=2)
  model = make()
  shardings = mesh.shardings(model, devices)
  sharding = shardings.layers.q.get_value()
  loaded = convert._load(spies, convert.LAYOUTS["layers.q"], model.layers.q, sharding, collections.Counter())
  np.testing.assert_array_equal(loaded, model.layers.q[...])
  for layer in range(CONFIG.layers):  # Four parts, each for two devices: a quarter of the tensor, once.
    spy = spies[f"model.layers.{layer}.self_attn.q_proj.weight"]
    assert spy.read == [spy.array.size // 4] * 4


def test_an_import_can_be_left_between_any_two_tensors(exported: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  places: list[str] = []
  monkeypatch.setattr(distributed, "progress", places.append)
  convert.import_hf(exported)
  assert sorted(places) == sorted(f"read {name}" for name in tensors_of(exported))


def test_dtypes(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
  model = convert.import_hf(exported, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
  assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
  np.testing.assert_array_equal(model.layers.q[...], make().layers.q[...].astype(jnp.bfloat16))
  convert.export_hf(make(), tmp_path / "half", dtype="bfloat16")
  assert {tensor.dtype.name for tensor in tensors_of(tmp_path / "half").values()} == {"bfloat16"}
  assert hf_files.read_config(tmp_path / "half").param_dtype == "bfloat16"
  jax.tree.map(np.testing.assert_array_equal, convert.import_hf(tmp_path / "half"), model)


def test_the_widest_of_mixed_dtypes_is_kept(exported: pathlib.Path) -> None:
  half = make().norm[...].astype(jnp.bfloat16)
  rewrite(exported, model__norm__weight=np.asarray(half))
  model = convert.import_hf(exported)
  assert model.config.param_dtype == "float32"
  np.testing.assert_array_equal(model.norm[...], half.astype(jnp.float32))


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_old_and_new_configs_say_the_same(scaling: llama.RopeScaling | None, tmp_path: pathlib.Path) -> None:
  config = dataclasses.replace(CONFIG, rope_scaling=scaling, tied=True, dtype="bfloat16", param_dtype="bfloat16")
  convert.export_hf(make(config), tmp_path)
  assert hf_files.read_config(tmp_path) == config
  both = json.loads((tmp_path / "config.json").read_text())
  assert both["rope_parameters"]["rope_theta"] == both["rope_theta"] == 500.0
  change(tmp_path, rope_parameters=None, dtype=None)
  assert hf_files.read_config(tmp_path) == config  # As transformers 4 writes it.
  (tmp_path / "config.json").write_text(json.dumps(both))
  change(tmp_path, rope_theta=None, rope_scaling=None, torch_dtype=None)
  assert hf_files.read_config(tmp_path) == config  # As transformers 5 writes it.


def test_defaults_of_old_configs(exported: pathlib.Path) -> None:
  absent = ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype")
  change(exported, **dict.fromkeys(absent))
  config = hf_files.read_config(exported)
  assert (config.kv_heads, config.head_dim, config.rope_theta, config.param_dtype) == (4, 4, 10000.0, "float32")


def test_tokenizer_and_generation_config_are_carried(tokenizer_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  convert.export_hf(make(), tmp_path / "one", tokenizer_folder)
  model_bytes = (tokenizer_folder / "tokenizer.model").read_bytes()
  assert (tmp_path / "one" / "tokenizer.model").read_bytes() == model_bytes
  fields = json.loads((tmp_path / "one" / "config.json").read_text())
  assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
  # From a model's folder: its own end tokens, and how it generates, too.
  change(tmp_path / "one", eos_token_id=[2, 7])
  (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
  tokenizer.load(tmp_path / "one").save(epath.Path(tmp_path / "kept"))  # As an artifact keeps them.
  convert.export_hf(make(), tmp_path / "three", tmp_path / "kept")
  assert json.loads((tmp_path / "three" / "config.json").read_text())["eos_token_id"] == [2, 7]
  convert.export_hf(make(), tmp_path / "two", tmp_path / "one")
  assert json.loads((tmp_path / "two" / "config.json").read_text())["eos_token_id"] == [2, 7]
  assert (tmp_path / "two" / "generation_config.json").read_text() == '{"eos_token_id": [2, 7]}'
  assert (tmp_path / "two" / "tokenizer.model").read_bytes() == model_bytes


def test_what_is_no_parameter_is_ignored(exported: pathlib.Path) -> None:
  rewrite(exported, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float64))
  jax.tree.map(np.testing.assert_array_equal, convert.import_hf(exported), make())


# Refusals


def test_pickles_are_refused(exported: pathlib.Path) -> None:
  (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*safetensors"):
    convert.import_hf(exported)


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (
      dict(model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None),
      r"2 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight",
    ),
    (
      dict(model__layers__3__input_layernorm__weight=np.ones(16, np.float32)),
      r"1 tensors that a Llama has not: model\.layers\.3\.input_layernorm\.weight",
    ),
    (dict(lm_head__weight=np.ones((16, 48), np.float32)), r"lm_head\.weight has shape \(16, 48\).*\(48, 16\)"),
    (dict(model__norm__weight=np.ones(16, np.int8)), "I8"),
  ],
)
def test_wrong_tensors_are_refused(tensors: dict[str, Any], message: str, exported: pathlib.Path) -> None:
  rewrite(exported, **tensors)
  with pytest.raises(ValueError, match=message):
    convert.import_hf(exported)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(model_type="mistral"), "model_type is 'mistral'"),
    (dict(attention_bias=True), "attention_bias is True"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn'"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope type 'linear'"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 4.0}), "does not state low_freq_factor, high_freq_factor"),
    (dict(num_hidden_layers=None), "does not state num_hidden_layers"),
  ],
)
def test_other_models_are_refused(fields: dict[str, Any], message: str, exported: pathlib.Path) -> None:
  change(exported, **fields)
  with pytest.raises(ValueError, match=message):
    hf_files.read_config(exported)


def test_incomplete_folders_are_refused(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=r"config\.json is missing"):
    convert.import_hf(tmp_path)
  convert.export_hf(make(), tmp_path / "sharded", max_shard="20KB")
  first = min((tmp_path / "sharded").glob("*.safetensors"))
  first.unlink()
  with pytest.raises(ValueError, match=f"names files that are missing: {first.name}"):
    convert.import_hf(tmp_path / "sharded")
  os.remove(tmp_path / "sharded" / "model.safetensors.index.json")
  with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
    convert.import_hf(tmp_path / "sharded")
  with pytest.raises(ValueError, match="local disk"):
    hf_files.weight_files(epath.Path("gs://bucket/model"))


def test_export_refuses(exported: pathlib.Path, tokenizer_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="already holds weights"):
    convert.export_hf(make(), exported)
  with pytest.raises(ValueError, match=r"dtype is 'int8'.*bfloat16"):
    convert.export_hf(make(), tmp_path / "integers", dtype="int8")
  small = make(dataclasses.replace(CONFIG, vocab_size=8))
  with pytest.raises(ValueError, match=r"tokens, the model's embedding 8 rows"):
    convert.export_hf(small, tmp_path / "small", tokenizer_folder)
