"""Supervised examples as rows: what the loss falls on, and what is left out."""

from etils import epath
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import pytest
import tiny_model

from srlm_jax import artifacts, batching, chat, checkpoint, config, finetune, logprobs, modelstore, records


def example(prompt: str, response: str, kind: str = "ift") -> records.SFTExample:
  return records.SFTExample(id="e", kind=kind, prompt=prompt, response=response)


@pytest.mark.parametrize("kind", ["llama2", "plain"])
def test_the_loss_falls_on_the_response_and_its_end_token_alone(kind: str) -> None:
  words = tiny_model.words()
  texts = [("Name a bird.", "A crow."), ("Say owl twice: owl owl.", "owl owl")]
  tokenized, _ = finetune.tokenize([example(*both) for both in texts], words, kind, 100)
  for pack in (False, True):
    rows = batching.pack(tokenized, 100, pack)
    assert len(rows) == (1 if pack else 2)
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    mask = np.asarray(logprobs.target_mask(batch["targets"], batch["segments"]))
    predicted = np.asarray(batch["tokens"])[:, 1:][mask].tolist()  # What the trainer asks the model to predict.
    assert predicted == [token for _, response in texts for token in (*words.encode(response), words.eos_id)]


def test_a_row_is_the_chat_prompt_the_response_and_the_end() -> None:
  words = tiny_model.words()
  (row,), _ = finetune.tokenize([example("Name a bird.", "A </s> crow.")], words, "llama2", 100)
  prompt = chat.chat_tokens(words, "Name a bird.", "llama2")
  assert row.tokens == (*prompt, *words.encode("A </s> crow."), words.eos_id) and row.target_from == len(prompt)
  assert row.tokens.count(words.bos_id) == row.tokens.count(words.eos_id) == 1


def test_what_is_too_long_is_left_out_and_counted_and_never_cut() -> None:
  words = tiny_model.words()
  short, long = example("Name a bird.", "A crow."), example("Name a bird.", "owl " * 50, "eft")
  length = len(finetune.tokenize([short], words, "llama2", 100)[0][0].tokens)
  rows, counts = finetune.tokenize([short, long, short], words, "llama2", length)  # It just fits.
  assert [len(row.tokens) for row in rows] == [length, length]
  assert counts == {"ift given": 2, "eft given": 1, f"eft left out: longer than {length} tokens": 1}
  rows, counts = finetune.tokenize([short], words, "llama2", length - 1)
  assert not rows and counts[f"ift left out: longer than {length - 1} tokens"] == 1


def settings() -> config_dict.ConfigDict:
  c = config.base()
  c.model.update(max_length=64, dtype="float32", remat="none", dropout=0.0, logits_chunk=0)
  c.sft.update(lr=1e-2, end_lr=1e-3, batch=4, epochs=20)
  return c


def test_finetuning_learns_and_commits(tmp_path: epath.Path) -> None:
  root, c, mesh = epath.Path(tmp_path), settings(), tiny_model.one_device()
  parent = artifacts.Artifact(root / "m0", {}, {})
  parent.begin()
  modelstore.save(parent, checkpoint.init_model(tiny_model.CONFIG, mesh, 0), tiny_model.words(), {})
  out = artifacts.Artifact(root / "m1", {}, {"parent": parent})
  out.begin()
  examples = [example("Name a bird.", "A crow."), example("Say owl.", "owl")] * 4 + [example("long", "owl " * 99)]
  (out.folder / "dataset").mkdir()  # Half of one, from a run that was stopped.
  (out.folder / "dataset" / "half").write_text("x")
  finetune.finetune(out, parent, examples, c, mesh)
  facts = out.manifest()["facts"]
  assert (facts["rows"], facts["steps"], facts["tokenizer"]) == (8, 40, tiny_model.words().digest)
  assert facts["counts"] == {"ift given": 9, "ift left out: longer than 64 tokens": 1}
  assert len((out.folder / "metrics.jsonl").read_text().splitlines()) == 40
  before, after = (modelstore.load(artifact, c, mesh) for artifact in (parent, out))
  rows = batching.pack(finetune.tokenize(examples[:1], tiny_model.words(), c.chat, 64)[0], 64, False)
  batch = {name: jnp.asarray(value)[None] for name, value in rows[0].items()}
  first, second = (float(logprobs.sequence_logprobs(model, batch, 0)[0]) for model in (before, after))
  assert second > first + 10


def test_no_example_that_fits_is_an_error(tmp_path: epath.Path) -> None:
  root, c, mesh = epath.Path(tmp_path), settings(), tiny_model.one_device()
  parent = artifacts.Artifact(root / "m0", {}, {})
  parent.begin()
  modelstore.save(parent, checkpoint.init_model(tiny_model.CONFIG, mesh, 0), tiny_model.words(), {})
  out = artifacts.Artifact(root / "m1", {}, {"parent": parent})
  out.begin()
  with pytest.raises(ValueError, match="no training example to write"):
    finetune.finetune(out, parent, [example("long", "owl " * 99)], c, mesh)
  assert not out.done
