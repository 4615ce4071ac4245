"""Early stopping as in the paper (§3.1.2): each checkpoint's answers meet those of the checkpoint before it.

A checkpoint's weights are a candidate: a model artifact below the stage's own folder, loaded as any other. While
candidates answer and are judged, no train state is in memory. It lies on the disk, and the next piece of training
restores it, just as after a kill; the model is read in parts and moved to the mesh of sampling, as in every stage that
samples. So nothing needs more memory than it would in a stage of its own, and whatever is stopped goes on from its
files:

| below the stage's folder | what it holds |
|---|---|
| candidates/000200 | the weights after 200 steps, until they can no longer be chosen |
| answers-000200-… | their answers to the validation prompts |
| duels-000200-… | these against the answers of the candidate before |
| verdict-000200.json | the outcome; written last, it says that the candidate is done with |
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import logging
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  config as config_lib,
  distributed,
  endpoint,
  grading,
  health,
  llama,
  mesh as mesh_lib,
  modelstore,
  records,
  rollout,
  sampling as sampling_lib,
  selection,
  templates,
  tokenizer,
  train_loop,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Where:
  """Where a choice among checkpoints takes place.

  Attributes:
    sampling: the mesh on which candidates, and a judge that is a model of the run, answer.
    cache: the folder in which an endpoint's replies are kept.
  """

  sampling: jax.sharding.Mesh
  cache: epath.Path


@dataclasses.dataclass(frozen=True)
class Referee:
  """Who decides between two answers.

  Attributes:
    name: in words.
    load: gives what decides, a judge model say; called where there is something to decide.
    duel: (that, answers side by side, name of the second side) → their duels.
    mesh: where it does so.
  """

  name: str
  load: Callable[[], Any]
  duel: Callable[[Any, Sequence[grading.Pair], str], Sequence[records.Duel]]
  mesh: jax.sharding.Mesh


def referee(out: artifacts.Artifact, settings: config_dict.ConfigDict, where: Where) -> Referee:
  """The referee that `settings.select.judge` names: the oracle, an endpoint, or the model that is the input "judge"."""
  section = settings.select
  if section.judge == "oracle":
    return Referee("oracle", lambda: None, lambda _, pairs, against: grading.by_oracle(pairs), where.sampling)
  template, how = templates.load_pairwise(section.pairwise), sampling_lib.Sampling(**section.verdict)
  mesh = where.sampling
  load: Callable[[], rollout.Judge]
  if section.judge == "endpoint" or settings.server.url:  # It computes elsewhere: processes share the shards out.
    mesh = mesh_lib.make_mesh(devices=jax.local_devices())
  if section.judge == "endpoint":
    terms = endpoint.terms(settings.endpoint)
    name, load = terms.name, functools.partial(endpoint.connect, terms, where.cache)
  else:
    name, load = str(section.judge), functools.partial(modelstore.speaker, out.inputs["judge"], settings, mesh)

  def duel(judge: Any, pairs: Sequence[grading.Pair], against: str) -> Sequence[records.Duel]:
    return grading.by_judge(judge, pairs, against, template, how)

  return Referee(name, load, duel, mesh)


@dataclasses.dataclass(frozen=True)
class _Contest:
  """The candidates of one training; see `commit` for the fields."""

  out: artifacts.Artifact
  words: tokenizer.Tokenizer
  train: Callable[..., llama.Llama]
  settings: config_dict.ConfigDict
  sampling: jax.sharding.Mesh
  who: Referee

  def candidate(self, step: int) -> artifacts.Artifact:
    """The model after `step` steps, trained and saved where it is not there yet; 0 is the parent."""
    if not step:
      return self.out.inputs["parent"]
    found = artifacts.Artifact(self.out.folder / modelstore.CANDIDATES / f"{step:06d}", {"step": step}, {})
    found.begin()
    if not found.done:  # Where training is past it, as after damage, it is trained once more, beside.
      beside = {"folder": found.folder} if train_loop.past(self.out.folder, step) else {}
      modelstore.save(found, self.train(until=step, **beside), self.words, {"step": step})
    return found

  def answers(self, step: int) -> list[records.Response]:
    """A candidate's answers to the validation prompts, sampled where they are not there yet."""
    own = self.settings.copy_and_resolve_references()
    own.server.url = ""  # No server has these weights.
    how = sampling_lib.Sampling(**own.select.sampling)
    prompts, stem = self.out.inputs["seed"].read("validation.jsonl", records.Prompt), f"answers-{step:06d}"

    def load() -> rollout.Speaker:
      return modelstore.speaker(self.candidate(step), own, self.sampling)

    def work(speaker: rollout.Speaker, part: Sequence[records.Prompt]) -> list[records.Response]:
      return rollout.answer(speaker, part, 1, how)

    with jax.set_mesh(self.sampling):
      artifacts.map_shards(self.out, stem, prompts, own.generation.shard, self.sampling, load, work)
    return list(self.out.read_shards(stem, records.Response))

  def duels(self, step: int, against: int) -> list[records.Duel]:
    """A candidate's answers against those of the one before it, decided where they are not yet."""
    pairs, stem = grading.align(self.answers(step), self.answers(against)), f"duels-{step:06d}"

    def work(judge: Any, part: Sequence[grading.Pair]) -> Sequence[records.Duel]:
      return self.who.duel(judge, part, f"{self.out.name} {against}")

    with jax.set_mesh(self.who.mesh):
      artifacts.map_shards(self.out, stem, pairs, self.settings.generation.shard, self.who.mesh, self.who.load, work)
    return list(self.out.read_shards(stem, records.Duel))

  def decided(self, step: int) -> bool:
    """Whether a candidate's trial is over, and what it rests on is there."""
    parts = (f"answers-{step:06d}", f"duels-{step:06d}")
    return self.out.has(_verdict(step)) and all(self.out.complete(stem) for stem in parts)

  def trial(self, step: int, against: int) -> selection.Trial:
    """A candidate against the one before it; read where it is decided already."""
    name = _verdict(step)
    if not self.decided(step):
      if not self.out.complete(f"answers-{step:06d}"):
        self.candidate(step)  # Here, on the mesh of training.
      made = selection.trial(step, against, *grading.grouped(self.duels(step, against)))
      self.out.write(name, json.dumps(dataclasses.asdict(made)))
    return selection.Trial(**json.loads(self.out.read_text(name)))

  def keep(self, step: int, last: int) -> None:
    """Deletes the weights of the candidates up to `last` but for those of `step`; a run that goes on has later ones."""

    def delete() -> None:
      folder = self.out.folder / modelstore.CANDIDATES
      for path in list(folder.iterdir()) if folder.exists() else []:
        if int(path.name) != step and int(path.name) <= last:
          path.rmtree()

    distributed.first(f"keep candidate {step} of {self.out.folder}", delete)


def _verdict(step: int) -> str:
  return f"verdict-{step:06d}.json"


def commit(
  out: artifacts.Artifact,
  words: tokenizer.Tokenizer,
  train: Callable[..., llama.Llama],
  steps: int,
  facts: Mapping[str, Any],
  settings: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  where: Where | None = None,
  who: Referee | None = None,
) -> None:
  """Trains, chooses among the checkpoints, and commits the chosen weights with the facts of the choice.

  Args:
    out: the stage's artifact; of its inputs "parent", "seed" and, where a model of the run decides, "judge" are read.
    words: the model's tokenizer.
    train: trains to the end, or with `until=step` so far, going on from the state that is saved (`train_loop.train`),
      in another `folder=` if told so.
    steps: of the whole training.
    facts: of the training, for the manifest.
    settings: the whole configuration.
    mesh: of training.
    where: the choice takes place; None where there is none: the last weights are the model.
    who: decides; by default whom `settings.select.judge` names.
  """
  limits = config_lib.frozen(health.Limits, settings.health)
  points = selection.candidates(settings.select.every, steps)
  if where is None or not points:
    model = train()
    modelstore.save(out, model, words, {**facts, **train_loop.facts(out.folder, limits), "steps": steps})
    return
  section = settings.select
  contest = _Contest(out, words, train, settings, where.sampling, who or referee(out, settings, where))
  trials: list[selection.Trial] = []
  for step in points:
    trials.append(contest.trial(step, trials[-1].step if trials else 0))
    chosen, stop = selection.decide(trials, section.patience)
    contest.keep(chosen, step)
    logger.info("%s: %s: %s", out.folder, selection.sentence(trials[-1]), "lost" if trials[-1].lost else "not lost")
    if stop:
      break
  contest.answers(0)  # Where a run went on, they may have been damaged, and deleted; verdicts that stand ask for none.
  logger.info("%s: of %d candidates that of step %d is the model", out.folder, len(trials), chosen)
  model = modelstore.load(contest.candidate(chosen), settings, mesh, train=True)
  made = selection.facts(trials, section.patience, steps, contest.who.name)
  watched = train_loop.facts(out.folder, limits)
  modelstore.save(out, model, words, {**facts, **watched, "steps": chosen, "selection": made})
