"""pairs: best against worst response, with the reference model's log-probs computed once (paper §2.4)."""

from collections import Counter
from collections.abc import Sequence
import json
import logging

import jax
from ml_collections import config_dict

from srlm_jax import artifacts, chat, modelstore, pairing, pairset, records, tokenizer

logger = logging.getLogger(__name__)


def _records(
  found: Sequence[tuple[pairing.Scored, pairing.Scored]], words: tokenizer.Tokenizer, chat_kind: str, longest: int
) -> tuple[list[records.PreferencePair], Counter[str]]:
  pairs, counts = [], Counter[str]()
  for (best, best_score), (worst, worst_score) in found:
    prompt = tuple(chat.chat_tokens(words, best.prompt, chat_kind))
    if len(prompt) + max(len(best.tokens), len(worst.tokens)) > longest:
      counts[f"pair left out: longer than {longest} tokens"] += 1
      continue
    pairs.append(
      records.PreferencePair(
        prompt_id=best.prompt_id,
        prompt=best.prompt,
        prompt_tokens=prompt,
        chosen=best.text,
        chosen_tokens=best.tokens,
        chosen_score=best_score,
        rejected=worst.text,
        rejected_tokens=worst.tokens,
        rejected_score=worst_score,
      )
    )
  return pairs, counts


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Writes pairs.jsonl, reference.jsonl and the training set. Inputs: "reference", "responses", "judgements"."""
  words = modelstore.load_tokenizer(out.inputs["reference"])
  modelstore.same_tokenizer(out.inputs["responses"], words)
  groups = pairing.by_prompt(
    out.inputs["responses"].read_shards("responses", records.Response),
    out.inputs["judgements"].read_shards("judgements", records.Judgement),
  )
  found, counts = pairing.pair_up(groups, settings.pairs.margin)
  pairs, left_out = _records(found, words, settings.chat, settings.model.max_length)
  counts += left_out
  logger.info("%s: %s", out.folder, dict(counts))
  if len(pairs) < max(settings.pairs.min_pairs, 1):
    raise ValueError(
      f"{out.folder}: {len(pairs)} preference pairs, pairs.min_pairs={settings.pairs.min_pairs} are needed: "
      f"{dict(counts)}. A judge that gives everything one score, or whose verdicts are unreadable, leaves no pairs: "
      "see its judgements."
    )
  out.write_records("pairs.jsonl", pairs)
  length = pairset.row_length(pairs, settings.model.max_length)
  rows = [pairset.pair_row(pair, length) for pair in pairs]
  model = modelstore.load(out.inputs["reference"], settings, mesh)
  reference = pairset.reference_logprobs(model, rows, settings.dpo.batch, settings.model.logits_chunk, mesh)
  lines = [
    json.dumps({"prompt_id": pair.prompt_id, "chosen": float(chosen), "rejected": float(rejected)})
    for pair, (chosen, rejected) in zip(pairs, reference, strict=True)
  ]
  out.write("reference.jsonl", "\n".join(lines) + "\n", len(lines))
  pairset.write(out.folder / "dataset", rows, reference)
  facts = {"counts": dict(counts), "pairs": len(pairs), "reference": out.inputs["reference"].digest(), "length": length}
  out.commit(facts)
