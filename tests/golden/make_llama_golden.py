"""Makes llama.npz: tiny random Llamas and what transformers computes with them, for machines without torch.

Run by hand where torch and transformers are installed: `python tests/golden/make_llama_golden.py`.  For each case the
file holds its config.json, its weights under their Hugging Face names, token ids, their logits, and a greedy
continuation of the first row.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

SIZES = dict(
  vocab_size=48,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=24,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,  # Small, so that the few frequencies of a head of 8 fall on all three sides of the scaling.
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
CASES = {
  "llama2": transformers.LlamaConfig(**SIZES, head_dim=8),
  "llama3": transformers.LlamaConfig(**SIZES, head_dim=8, rope_parameters=LLAMA3, tie_word_embeddings=True),
}


def compute(config: transformers.LlamaConfig, seed: int) -> dict[str, np.ndarray]:
  """Everything of one case; weights are large enough that attention is far from uniform."""
  random = np.random.RandomState(seed)
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      scale = 0.4 if parameter.ndim == 2 else 0.2
      values = random.standard_normal(tuple(parameter.shape)) * scale + (parameter.ndim == 1)
      parameter.copy_(torch.tensor(values, dtype=torch.float32))
  tokens = random.randint(3, config.vocab_size, (2, 24))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
    prompt = torch.tensor(tokens[:1])
    # No token ends it, so that all twelve steps are compared.
    greedy = model.generate(
      prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
  out = {f"weights/{name}": value.numpy() for name, value in model.state_dict().items()}
  if config.tie_word_embeddings:
    out.pop("weights/lm_head.weight")
  return out | {
    "config": np.array(json.dumps(config.to_dict())),
    "tokens": tokens.astype(np.int32),
    "logits": logits,
    "greedy": greedy[0, tokens.shape[1] :].numpy().astype(np.int32),
  }


def main() -> None:
  arrays = {
    f"{case}/{name}": array for case, config in CASES.items() for name, array in compute(config, len(case)).items()
  }
  path = pathlib.Path(__file__).with_name("llama.npz")
  np.savez_compressed(path, **arrays)
  print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
  main()
