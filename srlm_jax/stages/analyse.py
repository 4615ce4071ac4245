"""analyse: a model's duels and the lengths of its answers by what the instruction asks for (paper §3.2)."""

import json
import logging
from typing import Any

from ml_collections import config_dict

from srlm_jax import artifacts, classes, grading, records, strata

logger = logging.getLogger(__name__)


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict) -> None:
  """Writes strata.json. Inputs: "evaluation" of the model, "classes", and "against …", evaluations of others.

  A judge's duels are read from the evaluation; the oracle's, which it does not keep, are decided again.
  """
  evaluation, sorted_by = out.inputs["evaluation"], out.inputs["classes"]
  options = classes.Options(**{key: tuple(names) for key, names in sorted_by.manifest()["facts"]["options"].items()})
  known = strata.readable(sorted_by.read_shards("classes", records.PromptClass))
  answers = list(evaluation.read_shards("answers", records.Response))
  facts: dict[str, Any] = {"characters": strata.lengths(answers, known, options), "duels": {}, "without a class": {}}
  for role, other in sorted(out.inputs.items()):
    if not role.startswith("against "):
      continue
    name = role.removeprefix("against ")
    if settings.evaluate.grader == "oracle":
      found = grading.by_oracle(grading.align(answers, list(other.read_shards("answers", records.Response))))
    else:
      found = list(evaluation.read_shards(f"duels-{name}", records.Duel))
    facts["duels"][name], facts["without a class"][name] = strata.duels(found, known, options)
  out.write("strata.json", json.dumps(facts, indent=1))
  logger.info("%s: %s", out.folder, ", ".join(f"{name}: {len(known)} instructions" for name in classes.DIMENSIONS))
  out.commit(facts)
