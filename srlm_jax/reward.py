"""How far a judge agrees with people's ranks (the paper's Tables 4 and 5): any judge, any judge prompt, any trees."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  digests,
  distributed,
  endpoint,
  findings,
  grading,
  metrics,
  modelstore,
  oasst,
  paper,
  records,
  rollout,
  tables,
  world,
)

logger = logging.getLogger(__name__)

Finished = Mapping[str, artifacts.Artifact]  # Folder name → artifact of the run.
Judged = tuple[list[records.Judgement], dict[str, Any]]  # What a judge says, and what is known about the judge.


def read_trees(path: epath.PathLike) -> list[records.RankedReplies]:
  """The prompts with two or more ranked replies of an Open Assistant file; ValueError where it has none."""
  trees, counts = oasst.read_trees(path)
  ranked = [one for tree in trees if (one := oasst.ranked_replies(tree))]
  if not ranked:
    raise ValueError(f"{path}: none of its {counts['trees']} trees has two ranked replies. Give another file.")
  return ranked


def candidates(ranked: Sequence[records.RankedReplies]) -> list[rollout.Candidate]:
  """The replies as what a judge is asked about; a reply's place among its siblings is its number."""
  return [
    rollout.Candidate(one.prompt_id, place, one.prompt, reply.text)
    for one in ranked
    for place, reply in enumerate(one.replies)
  ]


def facts(
  ranked: Sequence[records.RankedReplies], judgements: Sequence[records.Judgement], judging: rollout.Judging
) -> dict[str, Any]:
  """The five reward-model metrics against people's ranks, unreadable votes and the histogram of scores.

  Args:
    ranked: prompts with their ranked replies.
    judgements: of `candidates(ranked)`, in their order.
    judging: how they came about.
  """
  by_prompt: dict[str, list[float | None]] = {}
  for judgement in judgements:
    by_prompt.setdefault(judgement.prompt_id, []).append(judgement.score)
  ranks = [[float(reply.rank or 0) for reply in one.replies] for one in ranked]
  scores = [by_prompt[one.prompt_id] for one in ranked]
  rubric = judging.rubric
  estimates = metrics.reward_model_metrics(ranks, scores, top=rubric.high)
  flat = [judgement.score for judgement in judgements]
  return {
    "metrics": {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()},
    "votes": grading.reasons(judgements),
    "histogram": dataclasses.asdict(metrics.histogram(flat, rubric.low, rubric.high, 1 / judging.votes)),
  }


def table(found: Mapping[str, Any]) -> tables.Table:
  """What `run` found beside the paper's figures, the column with five grades included."""
  return findings.judging_table({found["name"]: {"judge": found}})


def run(
  settings: config_dict.ConfigDict,
  made: Finished,
  mesh: jax.sharding.Mesh,
  cache: epath.Path,
  name: str,
  rubric: str = "",
  trees: str = "",
) -> dict[str, Any]:
  """Measures one judge, as `srlm reward` does; in what it returns, of JSON, is all that the figures depend on.

  Args:
    settings: of the run; its section `judge` says how it is judged.
    made: the run's artifacts.
    mesh: of sampling.
    cache: the folder in which an endpoint's replies are kept.
    name: of a finished model of the run, "endpoint", or "oracle" (the tiny world's).
    rubric: another judge prompt than the configuration's; a name or a path.
    trees: a file of Open Assistant trees, in place of the run's held-out replies.

  Raises:
    ValueError: there is no such judge, rubric, or file, or nothing that people ranked.
  """
  chosen = rubric or settings.judge.rubric
  judging = rollout.judging({**settings.judge, "rubric": chosen})
  judge = _judge(settings, made, mesh, cache, name, judging)
  ranked, source = _replies(made, trees)
  replies = candidates(ranked)
  logger.info("%s judges %d replies to %d prompts of %s", name, len(replies), len(ranked), source["from"])
  judgements, who = judge(replies)
  return {
    **who,
    "rubric": {"name": chosen, "sha256": judging.rubric.digest},
    "replies": {**source, "prompts": len(ranked), "replies": len(replies)},
    "judging": {
      "method": judging.method,
      "votes": judging.votes,
      "min_votes": judging.min_votes,
      "sampling": dataclasses.asdict(judging.how),
      "seed": settings.seed,
    },
    **facts(ranked, judgements, judging),
    "paper": {"source": paper.SOURCE, "table": paper.JUDGING},
  }


def _replies(made: Finished, trees: str) -> tuple[list[records.RankedReplies], dict[str, Any]]:
  """What is judged, and where it comes from; of a file, how many of its prompts the run's models were trained on."""
  seed = made["seed"]
  if not trees:
    ranked = seed.read("ranked_heldout.jsonl", records.RankedReplies)
    if not ranked:
      raise ValueError(f"{seed.folder} holds no ranked replies back: give --trees=FILE.")
    return ranked, {"from": str(seed.folder), "sha256": seed.digest()}
  path = epath.Path(trees).expanduser()
  if not path.exists():
    raise ValueError(f"--trees={trees}: there is no such file.")
  ranked = read_trees(path)
  source: dict[str, Any] = {"from": str(path), "sha256": digests.file_sha256(path)}
  if seed.done:
    trained = [one.prompt for one in seed.read("ift.jsonl", records.SFTExample)]
    trained += [one.prompt for one in seed.read("ranked_train.jsonl", records.RankedReplies)]
    seen = {oasst.prompt_key(prompt) for prompt in trained}
    source["prompts trained on"] = sum(oasst.prompt_key(one.prompt) in seen for one in ranked)
    if source["prompts trained on"]:
      logger.warning(
        "%d of %d prompts of %s are among those that the run trains on: they are not held out",
        *(source["prompts trained on"], len(ranked), path),
      )
  return ranked, source


def _judge(
  settings: config_dict.ConfigDict,
  made: Finished,
  mesh: jax.sharding.Mesh,
  cache: epath.Path,
  name: str,
  judging: rollout.Judging,
) -> Callable[[Sequence[rollout.Candidate]], Judged]:
  """Who judges; what cannot is refused at once."""
  if name == "endpoint":
    asked = endpoint.connect(endpoint.terms(settings.endpoint), cache)
    return lambda replies: _by_endpoint(asked, replies, judging)
  if name == "oracle":
    if not settings.world.enabled:
      raise ValueError("--model=oracle knows the tiny world alone: name a model, or 'endpoint'.")
    if (judging.rubric.low, judging.rubric.high) != (0, 5):
      raise ValueError("--model=oracle scores from 0 to 5, and needs a judge prompt of that range.")
    return lambda replies: _by_oracle(replies, judging)
  models = [key for key, artifact in made.items() if (artifact.folder / "llama.json").exists()]
  if name not in models:
    raise artifacts.unknown(name, [*models, "endpoint", "oracle"], "finished model of this work directory")
  artifact = made[name]

  def by_model(replies: Sequence[rollout.Candidate]) -> Judged:
    with jax.set_mesh(mesh):
      judgements = rollout.judge(modelstore.speaker(artifact, settings, mesh), replies, judging)
    return judgements, {"name": name, "judge": name, "digest": artifact.digest()}

  return by_model


def _by_endpoint(asked: endpoint.Endpoint, replies: Sequence[rollout.Candidate], judging: rollout.Judging) -> Judged:
  """The endpoint's judgements; of several processes one asks, so that nothing is paid twice."""

  def work() -> list[dict[str, Any]]:
    return [one.model_dump(mode="json") for one in rollout.judge(asked, replies, judging)]

  judgements = [records.Judgement.model_validate(one) for one in distributed.first("ask the endpoint", work)]
  usage = dataclasses.asdict(asked.usage(rollout.questions(replies, judging), judging.how))
  return judgements, {"name": asked.terms.service.model, "judge": asked.terms.name, "usage": usage}


def _by_oracle(replies: Sequence[rollout.Candidate], judging: rollout.Judging) -> Judged:
  """The world's true scores, as if they were votes."""
  votes = [records.Vote(text="", score=float(world.oracle(one.instruction, one.response))) for one in replies]
  found = [rollout.tally(one, [vote], 1) for one, vote in zip(replies, votes, strict=True)]
  return found, {"name": "oracle", "judge": "the world's oracle"}
