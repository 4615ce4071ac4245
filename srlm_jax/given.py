"""A user's data files, opened and checked before the first stage of a run, not hours later when a stage reads them."""

from collections.abc import Collection, Mapping

from etils import epath
from ml_collections import config_dict

from srlm_jax import classes, eft, embedding, oasst, records, templates
from srlm_jax.stages import seed


def check(settings: config_dict.ConfigDict, paths: Mapping[str, epath.Path], stages: Collection[str]) -> None:
  """ValueError, naming the file, where a stage that is to run would refuse one of the files that it reads.

  Args:
    settings: of the run.
    paths: the files that are needed and that no earlier stage makes, by setting ("data.trees").
    stages: that are to run.
  """
  roles = {"trees": "data.trees", "heldout_trees": "data.heldout_trees", "eval_prompts": "data.eval_prompts"}
  roles["validation"] = "select.path"
  if "data.trees" in paths:
    seed.read(settings, {role: paths[key] for role, key in roles.items() if key in paths})
  else:  # The world is still to write its trees, and what is given beside them is read alone.
    if "data.heldout_trees" in paths:
      oasst.read_trees(paths["data.heldout_trees"])
    for key in ("data.eval_prompts", "select.path"):
      if key in paths:
        list(records.read_prompts(paths[key]))
  if "data.judgements" in paths:
    eft.annotated(paths["data.judgements"], templates.load_rubric(settings.judge.rubric))
  if "data.pretrain" in paths:
    for _ in records.read_given(paths["data.pretrain"], records.Document, name=""):
      pass
  if "monitors.prompts" in paths:
    list(records.read_prompts(paths["monitors.prompts"]))
  if "analysis.vectors" in paths:
    embedding.load(paths["analysis.vectors"])
  check_forms(settings, stages)


def check_forms(settings: config_dict.ConfigDict, stages: Collection[str]) -> None:
  """ValueError for a template that asks a model which has not learnt it for no verdict in the form that is read."""
  c, either = settings, ("[[A]]", "[[B]]")
  if "eft" in stages and c.eft.writer == "baseline" and not c.world.enabled:  # Which judges before it learns to.
    templates.check_form("judge.rubric", c.judge.rubric, templates.load_rubric(c.judge.rubric).text, ("Score:",))
  asks = {
    "evaluate.pairwise": "evaluate" in stages and c.evaluate.grader in ("judge", "endpoint"),
    "select.pairwise": bool({"sft", "dpo"} & set(stages)) and c.select.judge not in ("none", "oracle"),
  }
  for key in (key for key, wanted in asks.items() if wanted):
    name = c[key.partition(".")[0]].pairwise
    templates.check_form(key, name, templates.load_pairwise(name).text, either)
  if "safety" in stages:
    templates.check_form("monitors.rubric", c.monitors.rubric, templates.load_rubric(c.monitors.rubric).text, either)
  if "classify" in stages and not c.world.enabled:
    text = classes.load_template(c.analysis.classes).text
    templates.check_form("analysis.classes", c.analysis.classes, text, ("Category:", "Complexity:", "Length:"))
