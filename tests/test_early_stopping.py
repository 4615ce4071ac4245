"""Early stopping: it stops where a checkpoint loses, commits the bits of the one before, and goes on after any kill."""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.util
import json
import pathlib
from typing import Any

from etils import epath
import jax
import loopback
from ml_collections import config_dict
import numpy as np
import pytest
import tiny_model

from srlm_jax import (
  artifacts,
  checkpoint,
  config,
  early_stopping,
  grading,
  llama,
  main,
  mesh as mesh_lib,
  modelstore,
  records,
  rollout,
  steps,
  train_loop,
  train_step,
)

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 7
OPTIMIZER = train_step.OptimizerConfig(lr=1e-2, end_lr=1e-3, steps=STEPS, warmup=2)


def settings(**changes: object) -> config_dict.ConfigDict:
  c = config.base()
  c.model.update(max_length=96, dtype="float32", remat="none", dropout=0.1, logits_chunk=0)
  c.generation.update(shard=2, rows=8)
  c.select.update(judge="oracle", every=2, **changes)
  c.select.sampling.update(max_new=8)
  return c


class Batches:
  """Eight random rows a step."""

  def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(3, 320, (8, 12)).astype(np.int32)
    ones = np.ones((8, 12), np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12)).copy()
    return {"tokens": tokens, "segments": ones, "positions": positions, "targets": ones}


weights = functools.cache(tiny_model.model)


class Stage:
  """A stage's artifact with its parent and three validation prompts; `asked` are the steps that were to be trained."""

  def __init__(self, root: epath.Path) -> None:
    self.mesh, self.asked = tiny_model.one_device(), list[int | None]()
    self.where = early_stopping.Where(self.mesh, root / "endpoint")
    parent = artifacts.Artifact(root / "m0", {}, {})
    parent.begin()
    modelstore.save(parent, tiny_model.model(9), tiny_model.words(), {})
    seed = artifacts.Artifact(root / "seed", {}, {})
    seed.begin()
    three = [records.Prompt(id=f"p{number}", text=f"Say owl {number}.", source="oasst") for number in range(3)]
    seed.write_records("validation.jsonl", three)
    seed.commit({})
    self.out = artifacts.Artifact(root / "m1", {}, {"parent": parent, "seed": seed})

  def made_up(self, until: int | None = None, folder: epath.Path | None = None) -> llama.Llama:
    """Weights that depend on the step alone, in place of training."""
    self.asked.append(until)
    return weights(STEPS if until is None else until)

  def trained(self, until: int | None = None, folder: epath.Path | None = None) -> llama.Llama:
    self.asked.append(until)
    c = settings()
    return train_loop.train(
      config=modelstore.model_config(self.out.inputs["parent"], c, train=True),
      start=functools.partial(modelstore.load, self.out.inputs["parent"], c, self.mesh, train=True),
      loss_fn=functools.partial(train_step.sft_loss, chunk=0),
      optimizer=OPTIMIZER,
      batches=Batches(),
      mesh=self.mesh,
      folder=folder or self.out.folder,
      seed=3,
      save_every=3,
      until=until,
    )

  def run(
    self,
    worse: Sequence[int],
    train: Callable[..., llama.Llama] | None = None,
    c: config_dict.ConfigDict | None = None,
    on: bool = True,
  ) -> dict[str, object]:
    """Trains with a referee for whom the candidates of the steps `worse` lose; returns the facts."""
    self.out.begin()

    def duel(_: None, pairs: Sequence[grading.Pair], against: str) -> list[records.Duel]:
      before = int(against.removeprefix("m1 "))
      step = min(before + 2, STEPS)
      outcome = -1 if step in worse else 1
      return [records.Duel(prompt_id=one.prompt_id, sample=0, outcome=outcome) for one, _ in pairs]

    who = early_stopping.Referee("oracle", lambda: None, duel, self.mesh)
    work = train or self.made_up
    where = self.where if on else None
    early_stopping.commit(
      self.out, tiny_model.words(), work, STEPS, {"rows": 5}, c or settings(), self.mesh, where, who
    )
    return self.out.manifest()["facts"]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """Models answer with the name of their folder; the list collects which of them were loaded to answer."""
  loaded: list[str] = []

  def speaker(artifact: artifacts.Artifact, *_: object) -> rollout.Speaker:
    artifact.manifest()
    loaded.append(artifact.name)
    return tiny_model.actor(lambda *_: artifact.name)

  monkeypatch.setattr(modelstore, "speaker", speaker)
  return loaded


def bits(model: llama.Llama) -> dict[str, int]:
  return checkpoint.fingerprints(model)


def saved_bits(artifact: artifacts.Artifact) -> dict[str, int]:
  return json.loads(artifact.read_text("fingerprints.json"))


def test_it_stops_at_the_first_that_loses_and_commits_the_one_before(tmp_path: epath.Path, scripted: list[str]) -> None:
  stage = Stage(epath.Path(tmp_path))
  facts = stage.run(worse=[6])
  assert stage.asked == [2, 4, 6]
  assert saved_bits(stage.out) == bits(tiny_model.model(4))
  assert bits(modelstore.load(stage.out, settings(), stage.mesh)) == bits(tiny_model.model(4))
  assert (facts["steps"], facts["rows"]) == (4, 5)
  chosen = facts["selection"]
  assert (chosen["chosen"], chosen["stopped"], chosen["planned"], chosen["judge"]) == (4, True, 7, "oracle")
  assert [(one["step"], one["against"], one["win"], one["lost"]) for one in chosen["curve"]] == [
    (2, 0, 1.0, False), (4, 2, 1.0, False), (6, 4, 0.0, True),
  ]  # fmt: skip
  assert scripted == ["000002", "m0", "000004", "000006"]  # Each answers once.
  assert not (stage.out.folder / "candidates").exists()


def test_answers_and_duels_are_kept_in_the_stage_s_folder(tmp_path: epath.Path, scripted: list[str]) -> None:
  stage = Stage(epath.Path(tmp_path))
  stage.run(worse=[4])
  answers = list(stage.out.read_shards("answers-000002", records.Response))
  assert [(one.prompt_id, one.text) for one in answers] == [(f"p{number}", "000002") for number in range(3)]
  assert {one.text for one in stage.out.read_shards("answers-000000", records.Response)} == {"m0"}
  assert [one.outcome for one in stage.out.read_shards("duels-000004", records.Duel)] == [-1] * 3
  files = stage.out.manifest()["files"]
  assert {"answers-000002-00000-of-00002.jsonl", "duels-000004-00001-of-00002.jsonl", "verdict-000004.json"} <= set(
    files
  )


def test_where_none_loses_the_last_is_the_model(tmp_path: epath.Path, scripted: list[str]) -> None:
  stage = Stage(epath.Path(tmp_path))
  facts = stage.run(worse=[])
  assert stage.asked == [2, 4, 6, 7] and saved_bits(stage.out) == bits(tiny_model.model(7))
  assert (facts["steps"], facts["selection"]["chosen"], facts["selection"]["stopped"]) == (7, 7, False)


def test_a_first_that_loses_leaves_the_parent(tmp_path: epath.Path, scripted: list[str]) -> None:
  stage = Stage(epath.Path(tmp_path))
  facts = stage.run(worse=[2])
  assert facts["steps"] == facts["selection"]["chosen"] == 0
  assert saved_bits(stage.out) == saved_bits(stage.out.inputs["parent"])


def test_patience_goes_on_past_a_loss_and_does_not_train_the_loser_again(
  tmp_path: epath.Path, scripted: list[str]
) -> None:
  stage = Stage(epath.Path(tmp_path))
  facts = stage.run(worse=[4, 6], c=settings(patience=2))
  assert stage.asked == [2, 4, 6] and facts["selection"]["chosen"] == 2
  assert saved_bits(stage.out) == bits(tiny_model.model(2))


def test_candidates_that_cannot_be_chosen_are_deleted(
  tmp_path: epath.Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  stage, there = Stage(epath.Path(tmp_path)), []
  real = early_stopping._Contest.keep

  def keep(self: early_stopping._Contest, step: int, last: int) -> None:
    there.append([])
    for work in (lambda: None, lambda: real(self, step, last)):
      work()
      there[-1].append(sorted(int(path.name) for path in (stage.out.folder / "candidates").iterdir()))

  monkeypatch.setattr(early_stopping._Contest, "keep", keep)
  stage.run(worse=[6])
  assert there == [[[2], [2]], [[2, 4], [4]], [[4, 6], [4]]]


def test_without_a_choice_it_trains_to_the_end_and_commits_that(tmp_path: epath.Path, scripted: list[str]) -> None:
  off = Stage(epath.Path(tmp_path) / "off")
  facts = off.run(worse=[2], on=False)
  assert off.asked == [None] and saved_bits(off.out) == bits(tiny_model.model(7)) and not scripted
  assert facts["steps"] == 7 and "selection" not in facts
  assert not list(off.out.folder.glob("answers-*"))
  short, c = Stage(epath.Path(tmp_path) / "short"), settings()
  c.select.every = 8  # More than there are steps.
  short.run(worse=[7], c=c)
  assert short.asked == [None] and short.out.digest() == off.out.digest()


class Kills:
  """Interrupts once behind each file, and once before and behind each commit, saved model and deletion."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self.done: list[str] = []
    for owner, name in (
      (artifacts.Artifact, "write"),
      (artifacts.Artifact, "commit"),
      (checkpoint, "save_model"),
      (early_stopping._Contest, "keep"),
    ):
      monkeypatch.setattr(owner, name, self.guard(getattr(owner, name), name))

  def guard(self, work: Callable[..., object], name: str) -> Callable[..., object]:
    def guarded(*args: object, **kwargs: object) -> object:
      what = [
        getattr(arg, "folder", arg) for arg in args if isinstance(arg, artifacts.Artifact | str | int | epath.Path)
      ]
      if name != "write":
        self.once(f"before {name} {what}")
      found = work(*args, **kwargs)
      self.once(f"after {name} {what}")
      return found

    return guarded

  def once(self, place: str) -> None:
    if place not in self.done:
      self.done.append(place)
      raise KeyboardInterrupt(place)

  def until_done(self, run: Callable[[], object]) -> None:
    for _ in range(400):
      try:
        run()
        return
      except KeyboardInterrupt:
        continue
    raise AssertionError("it never ends")


def test_killed_between_any_two_parts_it_ends_the_same(
  tmp_path: epath.Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  whole, killed = Stage(epath.Path(tmp_path) / "whole"), Stage(epath.Path(tmp_path) / "killed")
  whole.run(worse=[6])
  kills = Kills(monkeypatch)

  def run() -> None:
    killed.out = artifacts.Artifact(killed.out.folder, {}, killed.out.inputs)
    killed.out.begin()
    if not killed.out.done:
      killed.run(worse=[6])

  kills.until_done(run)
  assert len(kills.done) > 40
  assert killed.out.digest() == whole.out.digest() and saved_bits(killed.out) == bits(tiny_model.model(4))
  assert set(killed.asked) == {2, 4, 6} and killed.asked == sorted(killed.asked)  # Training never goes back.


def test_answers_of_the_parent_that_were_damaged_are_made_again(tmp_path: epath.Path, scripted: list[str]) -> None:
  stage = Stage(epath.Path(tmp_path))
  stage.run(worse=[6])
  digest = stage.out.digest()
  (stage.out.folder / "manifest.json").unlink()  # As if it had been killed before its end.
  (stage.out.folder / "answers-000000-00000-of-00002.jsonl").write_text("damaged")
  stage.out = artifacts.Artifact(stage.out.folder, {}, stage.out.inputs)
  stage.run(worse=[6])
  assert stage.out.digest() == digest


def test_real_training_is_the_same_in_pieces_and_after_kills(
  tmp_path: epath.Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  root = epath.Path(tmp_path)
  plain, pieces, killed = Stage(root / "plain"), Stage(root / "pieces"), Stage(root / "killed")
  plain.run(worse=[], train=plain.trained, on=False)
  pieces.run(worse=[], train=pieces.trained)
  assert plain.asked == [None] and pieces.asked == [2, 4, 6, 7]
  assert saved_bits(pieces.out) == saved_bits(plain.out)
  assert (pieces.out.folder / "metrics.jsonl").read_text() == (plain.out.folder / "metrics.jsonl").read_text()
  assert not (pieces.out.folder / "states").exists()
  places = []

  def stop_once(self: train_loop.Watch, step: int, metrics: object) -> None:
    see(self, step, metrics)
    if step in (3, 5) and step not in places:
      places.append(step)
      raise KeyboardInterrupt

  see = train_loop.Watch.see
  monkeypatch.setattr(train_loop.Watch, "see", stop_once)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      killed.run(worse=[6], train=killed.trained)
  killed.run(worse=[6], train=killed.trained)
  assert killed.out.manifest()["facts"]["steps"] == 4
  wanted = Stage(root / "wanted")
  assert saved_bits(killed.out) == bits(wanted.trained(until=4))
  with pytest.raises(
    ValueError, match=r"states is at step 4, and the weights after step 2 are gone: delete .*m1 to tr"
  ):
    wanted.trained(until=2)


@pytest.mark.parametrize(
  ("damaged", "asked"),
  [
    ("answers-000002-00000-of-00002.jsonl", [2, 4, 6, 2, 6]),  # Its weights are gone, and training is past them.
    ("duels-000002-00000-of-00002.jsonl", [2, 4, 6, 6]),
    ("verdict-000002.json", [2, 4, 6, 6]),
    ("candidates/000004/manifest.json", [2, 4, 6, 6, 4]),
  ],
)
def test_what_a_trial_rests_on_is_made_again_without_all_of_the_training(
  tmp_path: epath.Path, scripted: list[str], damaged: str, asked: list[int]
) -> None:
  whole, stage = Stage(epath.Path(tmp_path) / "whole"), Stage(epath.Path(tmp_path) / "stopped")
  whole.run(worse=[6], train=whole.trained)

  def stopped(until: int | None = None) -> llama.Llama:
    model = stage.trained(until)
    if until == 6:
      raise KeyboardInterrupt
    return model

  with pytest.raises(KeyboardInterrupt):
    stage.run(worse=[6], train=stopped)
  folder = stage.out.folder
  assert not (folder / "candidates" / "000002").exists() and train_loop.past(folder, 4)
  if damaged.startswith("candidates"):
    (folder / damaged).parent.rmtree()
  else:
    (folder / damaged).write_text("damaged")
  stage.out = artifacts.Artifact(folder, {}, stage.out.inputs)
  stage.run(worse=[6], train=stage.trained)
  assert stage.asked == asked
  assert stage.out.digest() == whole.out.digest()
  assert not (folder / "states").exists() and not (folder / "candidates").exists()


def test_a_model_of_the_run_answers_and_judges(tmp_path: pathlib.Path) -> None:
  """With real samplers; such a model's verdicts cannot be read, so nothing is lost."""
  stage, c = Stage(epath.Path(tmp_path)), settings()
  template = tmp_path / "short.txt"
  template.write_text("{instruction}\nFirst: {response_a}\nSecond: {response_b}\n")
  c.model.max_length, c.select.every = 128, STEPS
  c.select.update(judge="parent", pairwise=str(template))
  c.select.verdict.update(max_new=8)
  stage.out.inputs["judge"] = stage.out.inputs["parent"]
  stage.out.begin()
  early_stopping.commit(stage.out, tiny_model.words(), stage.made_up, STEPS, {}, c, stage.mesh, stage.where)
  found = stage.out.manifest()["facts"]["selection"]
  assert (found["chosen"], found["curve"][0]["unreadable"], found["curve"][0]["win"]) == (7, 3, None)
  answers = {step: list(stage.out.read_shards(f"answers-{step:06d}", records.Response)) for step in (0, 7)}
  assert all(len(one) == 3 for one in answers.values()) and answers[0] != answers[7]
  duels = list(stage.out.read_shards("duels-000007", records.Duel))
  assert len(duels) == 3 and all(all(one.verdicts) for one in duels)  # The judge's own words, in both orders.


def test_the_oracle_judges_without_a_model(tmp_path: epath.Path) -> None:
  stage = Stage(epath.Path(tmp_path))
  who = early_stopping.referee(stage.out, settings(), stage.where)
  text = "Count from 3 to 5."
  one, other = (
    records.Response(prompt_id="p", prompt=text, sample=0, text=answer, tokens=(2,), finished=True)
    for answer in ("Sure! numbers: 3 4 5.", "no")
  )
  assert [duel.outcome for duel in who.duel(who.load(), [(one, other), (other, one)], "m1 0")] == [1, -1]


def test_an_endpoint_judges_and_is_asked_once(tmp_path: epath.Path, scripted: list[str]) -> None:
  def reply(body: dict[str, Any]) -> loopback.Reply:
    shown = body["messages"][-1]["content"].split("<response>")
    return loopback.chat(f"So: [[{'A' if shown[1] > shown[2] else 'B'}]]")  # The one of more steps; "m0" above all.

  server = loopback.Loopback(reply, path="/v1/chat/completions")
  stage, c = Stage(epath.Path(tmp_path)), settings(patience=2)
  c.select.judge = "endpoint"
  c.endpoint.update(url=server.url, model="judge-1")

  def run() -> dict[str, Any]:
    stage.out = artifacts.Artifact(stage.out.folder, {}, stage.out.inputs)
    stage.out.begin()
    early_stopping.commit(stage.out, tiny_model.words(), stage.made_up, STEPS, {}, c, stage.mesh, stage.where)
    return stage.out.manifest()["facts"]["selection"]

  found = run()
  assert found["judge"] == f"judge-1 at {server.url}/v1" and found["chosen"] == 7
  assert [one["net"]["value"] for one in found["curve"]] == [-1.0, 1.0, 1.0, 1.0]
  assert len(server.asked) == 4 * 3 * 2
  for path in [*stage.out.folder.glob("duels-*"), *stage.out.folder.glob("verdict-*"), *stage.out.folder.glob("mani*")]:
    path.unlink()
  assert run() == found and len(server.asked) == 4 * 3 * 2
  server.shutdown()
  server.server_close()


def planned(**changes: object) -> dict[str, steps.Step]:
  c = config.base()
  c.update_from_flattened_dict(changes)
  return {step.folder: step for step in steps.plan(c, epath.Path("w"), tiny_model.one_device())}


def test_the_plan_names_who_judges() -> None:
  trained = ("baseline", "m1", "m2", "m3")
  for name, judges in {
    "writer": ["writer"] * 4,
    "parent": ["m0", "m0", "m1", "m2"],
    "m0": ["m0"] * 4,
    "endpoint": [None] * 4,
  }.items():
    made = planned(**{"select.judge": name})
    assert [made[folder].inputs.get("judge") for folder in trained] == judges
    assert all(made[folder].inputs["seed"] == "seed" for folder in trained)
    assert made["m2"].config["select.judge"] == name and made["seed"].config["select.prompts"] == 253
  order = list(planned(**{"prompts.writer": "m0"}))
  assert order.index("writer") < order.index("baseline")  # There although it writes no prompts.
  off = planned(**{"select.judge": "none"})
  assert off["m2"].inputs == {"parent": "m1", "pairs": "aift1/pairs"}
  assert not [key for step in off.values() for key in step.config if key.startswith("select.")]


def test_validation_prompts_of_one_s_own_are_part_of_the_seed_data(tmp_path: epath.Path) -> None:
  path = epath.Path(tmp_path) / "mine.jsonl"
  found = []
  for text in ("one", "two"):
    path.write_text(text)
    found.append(planned(**{"select.path": str(path)}))
  assert {folder for folder in found[0] if found[0][folder].config != found[1][folder].config} == {"seed"}


@pytest.mark.slow
def test_the_tiny_world_with_a_choice(tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """The smoke run to M2, each training judged by the oracle; stopped and started again in between."""
  spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config("smoke")
  c.models = 2
  c.select.update(judge="oracle", every=4, prompts=12)
  c.sft.update(min_steps=10, epochs=1)
  mesh, workdir = tiny_model.one_device(), epath.Path(tmp_path / "run")
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda **_: mesh)
  main.run_steps(c, workdir, "all")
  page = (workdir / "report" / "report.html").read_text()
  assert "Each checkpoint against the one before it" in page
  seed = json.loads((workdir / "seed" / "manifest.json").read_text())["facts"]
  assert seed["validation"] == 12
  for name in ("baseline", "m1", "m2"):
    facts = json.loads((workdir / name / "manifest.json").read_text())["facts"]
    curve = facts["selection"]["curve"]
    assert [one["step"] for one in curve][:2] == [4, 8][: len(curve)] and curve[0]["against"] == 0
    assert facts["steps"] == facts["selection"]["chosen"] and all(one["comparisons"] == 12 for one in curve)
    assert not (workdir / name / "candidates").exists()
  digest = json.loads((workdir / "m2" / "manifest.json").read_text())["digest"]
  jax.clear_caches()
  for path in ("m2/manifest.json", "m2/verdict-000004.json", "m2/verdict-000004.json.done"):
    (workdir / path).unlink()
  main.run_steps(c, workdir, "dpo")  # Its answers and duels are still there; only what was taken away is made again.
  assert json.loads((workdir / "m2" / "manifest.json").read_text())["digest"] == digest
