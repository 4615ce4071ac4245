"""embed: the map of IFT, EFT and AIFT prompts: their vectors by t-SNE (the paper's figure of instructions)."""

from collections import Counter
from collections.abc import Iterator
import json
import logging

from etils import epath
import jax
from ml_collections import config_dict
import numpy as np

from srlm_jax import artifacts, chat, distributed, embedding, modelstore, records, tsne

logger = logging.getLogger(__name__)

NEIGHBOURS = 10  # Of which it is counted of what kind they are.


def _kinds(inputs: dict[str, artifacts.Artifact]) -> Iterator[tuple[str, list[str]]]:
  """The texts of each kind of prompt, by its name as it is shown."""
  yield "IFT", [one.prompt for one in inputs["seed"].read("ift.jsonl", records.SFTExample)]
  if "eft" in inputs:
    yield "EFT", [one.prompt for one in inputs["eft"].read("eft.jsonl", records.SFTExample)]
  for role in sorted((role for role in inputs if role.startswith("aift")), key=lambda role: (len(role), role)):
    yield role.upper(), [one.text for one in inputs[role].read_shards("prompts", records.Prompt)]


def sampled(kind: str, texts: list[str], points: int, seed: int) -> list[records.Prompt]:
  """At most `points` of the texts, drawn by the seed, in their order; an id is the kind and the place in its file."""
  places = np.random.default_rng(seed).permutation(len(texts))[:points]
  return [records.Prompt(id=f"{kind}-{place:06d}", text=texts[place], source=kind) for place in sorted(places.tolist())]


def run(
  out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, vectors: epath.Path | None
) -> None:
  """Writes prompts.jsonl and map.json. Inputs: "seed", "eft", "aift…", and "model" where no file brings the vectors."""
  section = settings.analysis
  prompts = [
    prompt for kind, texts in _kinds(out.inputs) for prompt in sampled(kind, texts, section.points, settings.seed)
  ]
  out.write_records("prompts.jsonl", prompts)
  if vectors:
    found = embedding.from_file(vectors, [prompt.id for prompt in prompts])
  else:
    model = out.inputs["model"]
    words = modelstore.load_tokenizer(model)
    tokens = {prompt.id: chat.chat_tokens(words, prompt.text, settings.chat) for prompt in prompts}
    longest = settings.model.max_length
    given, prompts = prompts, [prompt for prompt in prompts if len(tokens[prompt.id]) <= longest]
    if len(prompts) < len(given):
      logger.info("%s: %d prompts left out: longer than %d tokens", out.folder, len(given) - len(prompts), longest)
    found = embedding.of_model(
      modelstore.load(model, settings, mesh),
      [tokens[prompt.id] for prompt in prompts],
      settings.generation.rows,
      longest,
      mesh,
    )
  kinds = [prompt.source for prompt in prompts]

  def drawn() -> dict[str, object]:
    places, divergence = tsne.layout(found, section.perplexity, settings.seed)
    return {
      "points": [[kind, round(x, 3), round(y, 3)] for kind, (x, y) in zip(kinds, places.tolist(), strict=True)],
      "divergence": round(divergence, 4),
      "neighbours": tsne.neighbours(found, kinds, NEIGHBOURS, settings.seed),
    }

  made = distributed.first(f"the map in {out.folder}", drawn)
  out.write("map.json", json.dumps({"ids": [prompt.id for prompt in prompts], **made}))
  facts = {
    "vectors": vectors.name if vectors else f"mean-pooled final hidden states of {out.inputs['model'].name}",
    "kinds": list(dict.fromkeys(kinds)),  # In this order; a manifest sorts the keys of all else.
    "prompts": dict(Counter(kinds)),
    "dimensions": found.shape[1],
    "divergence": made["divergence"],
    "neighbours": made["neighbours"],
    "nearest": NEIGHBOURS,
  }
  logger.info("%s: %s", out.folder, facts)
  out.commit(facts)
