"""A Hugging Face Llama through our sampler: the same greedy tokens as transformers, and the same bytes out again."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors import safe_open

from srlm_jax import convert, generator, sampling

torch = pytest.importorskip("torch", reason="torch (the extra of that name) is what this compares with")


def tensors(folder: pathlib.Path) -> dict[str, bytes]:
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    with safe_open(path, framework="numpy") as file:
      found.update({name: file.get_tensor(name).tobytes() for name in file.keys()})
  return found


def test_greedy_tokens_of_generate_and_a_byte_identical_way_back(tmp_path: pathlib.Path) -> None:
  import transformers

  torch.manual_seed(0)
  settings = transformers.LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,  # Sharp enough that greedy tokens are no coin tosses.
    bos_token_id=1,
    eos_token_id=2,
  )
  theirs = transformers.LlamaForCausalLM(settings).eval()
  theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB")
  assert len(list((tmp_path / "in").glob("*.safetensors"))) >= 2

  model = convert.import_hf(tmp_path / "in")
  engine = generator.Generator(model, 2, sampling.Sampling(0.0, 1.0, 24), rows=3, max_prompt=64, seed=0)
  rng = np.random.default_rng(0)
  prompts = [tuple(rng.integers(3, 97, size).tolist()) for size in (1, 5, 17, 40, 40)]
  requests = [generator.Request(str(index), prompt, 1) for index, prompt in enumerate(prompts)]
  ours = {request.name: completions[0].tokens for request, completions in engine.generate(requests)}
  for index, prompt in enumerate(prompts):
    with torch.no_grad():
      out = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert ours[str(index)] == tuple(out[0, len(prompt) :].tolist())

  convert.export_hf(model, tmp_path / "out", max_shard="60KB")
  assert tensors(tmp_path / "out") == tensors(tmp_path / "in")
  assert jax.tree.leaves(model)[0].dtype == np.float32
