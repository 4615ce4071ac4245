"""lm-eval tasks with data of their own, of each kind of request; nothing is fetched."""

import json
import pathlib
from typing import Any

import tiny_model
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CHOICES = [
  {
    "question": f"The quick brown {one} jumps over the lazy dog. Say owl",
    "choices": ["owl", "twice: owl", one],
    "label": n % 3,
  }
  for n, one in enumerate(("fox", "crow", "bird", "User", "dog", "five points", "jumps over"))
]
CHOICES.append({"question": "Name a bird. " * 12, "choices": ["A crow.", "It is fine.\nScore: 4", "no"], "label": 0})
TEXTS = [{"text": "Count to 5: 0 1 2 3 4 5."}, {"text": " ".join(tiny_model.TEXT * 2)}, {"text": "Say </s> twice."}]
ASKED = [
  {"question": "Count to 5:", "answer": "0 1 2"},
  {"question": "Review the response", "answer": "five"},
  {"question": "Say owl " * 25, "answer": "owl"},
  {"question": "Name", "answer": "A crow"},
]
METRIC = "  - {{metric: {}, aggregation: {}, higher_is_better: {}}}\n"
FILES = {
  "own_choice": (
    CHOICES,
    "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: label\ndoc_to_choice: '{{choices}}'\n"
    "fewshot_split: test\nmetric_list:\n"
    + METRIC.format("acc", "mean", "true")
    + METRIC.format("acc_norm", "mean", "true"),
  ),
  "own_text": (
    TEXTS,
    "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
    + METRIC.format("word_perplexity", "weighted_perplexity", "false")
    + METRIC.format("bits_per_byte", "bits_per_byte", "false"),
  ),
  "own_answer": (
    ASKED,
    "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['o', 'Score'], max_gen_toks: 12, do_sample: false, temperature: 0.0}\nmetric_list:\n"
    + METRIC.format("exact_match", "mean", "true"),
  ),
  "own_short_answer": (
    ASKED,
    "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 5}\nmetric_list:\n" + METRIC.format("exact_match", "mean", "true"),
  ),
}
GROUP = """group: own_group
task: [own_answer, own_short_answer]
aggregate_metric_list:
  - {metric: exact_match, weight_by_size: true}
metadata: {version: 2}
"""
NAMES = tuple(FILES)


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes all tasks and their data into a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, (documents, rest) in FILES.items():
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
    head = (
      f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1.5}}\n"
      f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n"
    )
    (folder / f"{name}.yaml").write_text(head + rest, encoding="utf-8")
  (folder / "own_group.yaml").write_text(GROUP, encoding="utf-8")
  return folder


def tokenizer_folder(folder: pathlib.Path) -> pathlib.Path:
  """A Hugging Face tokenizer that begins texts with its begin token and gives us and transformers the same ids."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=318, initial_alphabet=alphabet, special_tokens=["<|begin|>", "<|end|>"], show_progress=False
  )
  bpe.train_from_iterator(tiny_model.TEXT * 20, trainer)
  bpe.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
  folder.mkdir(parents=True)
  bpe.save(str(folder / "tokenizer.json"))
  settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|end|>"}))
  return folder
