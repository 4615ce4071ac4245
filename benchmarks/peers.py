"""The peers of rollouts.py: transformers' generate and llama.cpp, each as a function from work to seconds.

Every continuation has a length of its own, the same for all: a peer is told to end it there. Peers are not imported
where they are not installed (`pip install -e '.[bench]'`).
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

EOS, PAD = 2, 0
HOW = dict(temperature=0.7, top_p=0.9)


@dataclasses.dataclass(frozen=True)
class Work:
  """Prompts, and the length of every continuation of each."""

  prompts: list[tuple[int, ...]]
  lengths: np.ndarray  # int [prompts, samples]

  @property
  def longest(self) -> int:
    """Tokens of the longest continuation."""
    return int(self.lengths.max())

  def part(self, count: int) -> "Work":
    """The first prompts alone."""
    return Work(self.prompts[:count], self.lengths[:count])


def transformers(model: Any, work: Work, rows: int) -> float:
  """Seconds of generate, with a KV cache, left padding and num_return_sequences, prompts sorted by length.

  Args:
    model: a LlamaForCausalLM.
    work: what to generate.
    rows: continuations in a batch.
  """
  import torch
  from transformers import LogitsProcessor, LogitsProcessorList

  class Ends(LogitsProcessor):
    """The end token at each row's length, and not before."""

    def __init__(self, lengths: np.ndarray, start: int) -> None:
      self.lengths, self.start = torch.as_tensor(lengths, device=model.device), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
      ended = input_ids.shape[1] - self.start >= self.lengths - 1
      scores[:, EOS] = torch.where(ended, 1e9, -torch.inf)
      return scores

  order = sorted(range(len(work.prompts)), key=lambda number: len(work.prompts[number]))
  samples = work.lengths.shape[1]
  size, drawn = max(rows // samples, 1), 0
  began = time.perf_counter()
  for start in range(0, len(order), size):
    batch = order[start : start + size]
    width = max(len(work.prompts[number]) for number in batch)
    ids = torch.full((len(batch), width), PAD)
    for row, number in enumerate(batch):
      ids[row, width - len(work.prompts[number]) :] = torch.as_tensor(work.prompts[number])
    lengths = work.lengths[batch].reshape(-1)
    with torch.inference_mode():
      out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=(ids != PAD).long().to(model.device),
        do_sample=True,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=int(lengths.max()),
        eos_token_id=EOS,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([Ends(lengths, width)]),
        **HOW,
      )
    drawn += int((out[:, width:] != PAD).sum())  # Waits for the device.
  took = time.perf_counter() - began
  assert drawn <= work.lengths.sum() and drawn > 0.99 * work.lengths.sum()  # Token 0 may be drawn as a word.
  return took


def write_gguf(model: Any, path: pathlib.Path) -> None:
  """A LlamaForCausalLM as llama.cpp reads it: float32, without a vocabulary."""
  import gguf

  config, weights = model.config, model.state_dict()
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
  writer.add_vocab_size(config.vocab_size)
  writer.add_tokenizer_model("none")
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
  for name, tensor in weights.items():
    array = tensor.detach().float().numpy()
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
      if part in name:  # llama.cpp turns neighbouring features, Hugging Face those half a head apart.
        array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


class LlamaCpp:
  """llama.cpp through its Python package's low-level calls: slots filled again, a prompt's cache copied.

  The package's own `Llama` decodes one text at a time, which is slower.
  """

  def __init__(self, path: pathlib.Path, slots: int, places: int, threads: int) -> None:
    """Loads a GGUF file.

    Args:
      path: the file.
      slots: continuations decoded at once.
      places: the longest prompt and continuation together, in tokens.
      threads: of the processor.
    """
    import llama_cpp

    self.lib = llama_cpp
    self.silent = llama_cpp.llama_log_callback(lambda *_: None)  # Held, as the library goes on calling it.
    llama_cpp.llama_log_set(self.silent, None)
    llama_cpp.llama_backend_init()
    self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    how = llama_cpp.llama_context_default_params()
    how.n_ctx, how.n_seq_max = slots * (-(-places // 256) * 256), slots
    how.n_batch = how.n_ubatch = 2048
    how.n_threads = how.n_threads_batch = threads
    self.context = llama_cpp.llama_init_from_model(self.model, how)
    self.memory = llama_cpp.llama_get_memory(self.context)
    self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
    self.slots = slots

  def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
    """Computes (token, position, slot, whether its logits are wanted)."""
    self.batch.n_tokens = len(entries)
    for place, (token, position, slot, wanted) in enumerate(entries):
      self.batch.token[place], self.batch.pos[place] = token, position
      self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, slot
      self.batch.logits[place] = wanted
    if self.lib.llama_decode(self.context, self.batch):
      raise RuntimeError("llama_decode failed.")

  def _sampler(self, greedy: bool) -> Any:
    lib = self.lib
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    parts = (
      [lib.llama_sampler_init_greedy()]
      if greedy
      else [
        lib.llama_sampler_init_temp(HOW["temperature"]),
        lib.llama_sampler_init_top_p(HOW["top_p"], 1),
        lib.llama_sampler_init_dist(0),
      ]
    )
    for part in parts:
      lib.llama_sampler_chain_add(chain, part)
    return chain

  def generate(self, work: Work, greedy: bool = False) -> list[tuple[int, int, list[int]]]:
    """(prompt, sample, tokens) of every continuation."""
    lib, chain = self.lib, self._sampler(greedy)
    lib.llama_memory_clear(self.memory, True)
    queue = _samples(work)
    held: dict[int, tuple[int, int, list[int]]] = {}
    done = []
    more = True
    while more or held:
      for slot in range(self.slots if more else 0):
        if slot in held:
          continue
        entry = next(queue, None)
        if entry is None:
          more = False
          break
        number, sample = entry
        tokens = work.prompts[number]
        twin = next((other for other, (prompt, _, _) in held.items() if prompt == number), None)
        lib.llama_memory_seq_rm(self.memory, slot, -1, -1)
        if twin is None:
          begin = 0
        else:  # The last token goes through the model again, for its logits.
          lib.llama_memory_seq_cp(self.memory, twin, slot, -1, -1)
          lib.llama_memory_seq_rm(self.memory, slot, len(tokens) - 1, -1)
          begin = len(tokens) - 1
        last = len(tokens) - 1
        self._decode([(tokens[place], place, slot, place == last) for place in range(begin, last + 1)])
        held[slot] = number, sample, [lib.llama_sampler_sample(chain, self.context, -1)]
      for slot in [
        slot for slot, (number, sample, drawn) in held.items() if len(drawn) >= work.lengths[number, sample]
      ]:
        done.append(held.pop(slot))
      if held and not (more and len(held) < self.slots):
        slots = list(held)
        self._decode([(held[s][2][-1], len(work.prompts[held[s][0]]) + len(held[s][2]) - 1, s, True) for s in slots])
        for place, slot in enumerate(slots):
          held[slot][2].append(lib.llama_sampler_sample(chain, self.context, place))
    lib.llama_sampler_free(chain)
    return done

  def run(self, work: Work) -> Callable[[], float]:
    """What generates the work and gives the seconds that it took."""

    def once() -> float:
      began = time.perf_counter()
      texts = self.generate(work)
      took = time.perf_counter() - began
      assert sum(len(tokens) for _, _, tokens in texts) == work.lengths.sum()
      return took

    return once


def _samples(work: Work) -> Iterator[tuple[int, int]]:
  for number in sorted(range(len(work.prompts)), key=lambda number: len(work.prompts[number])):
    for sample in range(work.lengths.shape[1]):
      yield number, sample
