"""The whole loop on the smoke variant of the tiny world: undisturbed, interrupted in every stage, and in a store."""

import importlib.util
import json
import pathlib

from etils import epath
import fake_gcs
import pytest
import tiny_model

from srlm_jax import artifacts, digests, main, mesh as mesh_lib, records, steps, train_loop, world, world_judges

ROOT = pathlib.Path(__file__).parents[1]
LOOP = ("prompts", "responses", "judge", "pairs", "dpo")


def smoke():
  spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config("smoke")


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Of the eight virtual devices one does here: sharding has its own tests, and eight on two cores are slow."""
  with pytest.MonkeyPatch.context() as patch:
    mesh = tiny_model.one_device()
    patch.setattr(mesh_lib, "make_mesh", lambda **_: mesh)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
  """An undisturbed run; while the stages of the loop are at work, the oracle and the world's judges raise."""
  workdir = epath.Path(tmp_path_factory.mktemp("loop") / "run")
  real = steps.plan

  def guarded(settings, folder, mesh):
    return [guard(step) for step in real(settings, folder, mesh)]

  def guard(step):
    if step.stage not in LOOP:
      return step

    def work(out):
      with pytest.MonkeyPatch.context() as patch:
        for module, name in (
          (world, "oracle"),
          (world, "oracle_detail"),
          (world, "check"),
          (world_judges, "judgement"),
        ):
          patch.setattr(module, name, forbidden)
        step.run(out)

    return steps.dataclasses.replace(step, run=work)

  def forbidden(*args, **kwargs):
    raise AssertionError("the loop read the world's ground truth")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps, "plan", guarded)
    main.run_steps(smoke(), workdir, "all")
  return workdir


def outcome(workdir):
  """What two runs must share: every artifact's digest (the bits of weights and data), pairs, log-probs and losses."""
  found = {}
  for aift in ("aift1", "aift2"):
    for name in ("pairs.jsonl", "reference.jsonl"):
      found[aift, name] = (workdir / aift / "pairs" / name).read_text()
  for model in ("m0", "baseline", "m1", "m2", "m3"):
    found[model, "metrics"] = [
      json.loads(line) for line in (workdir / model / "metrics.jsonl").read_text().splitlines()
    ]
  for manifest in pathlib.Path(workdir).rglob("manifest.json"):
    if manifest.parent.name != "report":  # It holds the time of its making.
      found[str(manifest.parent.relative_to(workdir))] = json.loads(manifest.read_text())["digest"]
  return found


def test_every_step_is_committed_and_the_report_is_there(run):
  for folder in ("world", "m0", "seed", "baseline", "eft", "m1", "aift1/pairs", "m2", "aift2/pairs", "m3", "eval/m3"):
    assert (run / folder / "manifest.json").exists(), folder
  page = (run / "report" / "report.html").read_text()
  assert "M3" in page and "<script" not in page


def test_pairs_are_the_models_own_answers_best_against_worst(run):
  pairs = list(records.read(run / "aift1" / "pairs" / "pairs.jsonl", records.PreferencePair))
  responses = [
    one
    for path in sorted((run / "aift1" / "responses").glob("responses-*.jsonl"))
    for one in records.read(path, records.Response)
  ]
  texts = {(one.prompt_id, one.tokens) for one in responses}
  assert pairs
  for pair in pairs:
    assert pair.chosen_score > pair.rejected_score
    assert (pair.prompt_id, pair.chosen_tokens) in texts and (pair.prompt_id, pair.rejected_tokens) in texts


def test_new_prompts_are_new_and_never_held_out(run):
  def texts(path, kind, field):
    return {getattr(one, field).lower() for one in records.read(path, kind)}

  first, second = (
    [
      one.text
      for path in sorted((run / aift / "prompts").glob("prompts-*.jsonl"))
      for one in records.read(path, records.Prompt)
    ]
    for aift in ("aift1", "aift2")
  )
  seeds = texts(run / "seed" / "ift.jsonl", records.SFTExample, "prompt")
  heldout = texts(run / "seed" / "eval_prompts.jsonl", records.Prompt, "text")
  heldout |= texts(run / "seed" / "ranked_heldout.jsonl", records.RankedReplies, "prompt")
  new = [text.lower() for text in first + second]
  assert first and second and len(set(new)) == len(new)
  assert not set(new) & (seeds | heldout)


def test_both_ways_to_score_are_measured(run):
  facts = json.loads((run / "eval" / "m3" / "manifest.json").read_text())["facts"]
  texts = [path.read_text() for path in (run / "eval" / "m3").glob("expected-*.jsonl")]
  scored = [json.loads(line) for text in texts for line in text.splitlines()]
  assert len(scored) == sum(facts["judge"]["votes"].values()) / 3 and len({one["score"] for one in scored}) > 20
  assert 0 <= facts["expected"]["metrics"]["pairwise"]["value"] <= 1


def test_dpo_starts_at_log_2(run):
  for model in ("m2", "m3"):
    first = json.loads((run / model / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_the_lineage_names_parent_and_reference(run):
  m2 = json.loads((run / "m2" / "manifest.json").read_text())
  m1 = json.loads((run / "m1" / "manifest.json").read_text())
  assert m2["inputs"]["parent"] == m1["digest"] == m2["facts"]["reference"]
  m3 = json.loads((run / "m3" / "manifest.json").read_text())
  assert m3["inputs"]["parent"] == m2["digest"] == m3["facts"]["reference"]


def test_a_finished_run_is_skipped(run, monkeypatch):
  monkeypatch.setattr(train_loop, "train", lambda **_: pytest.fail("a finished stage was run again"))
  before = outcome(run)
  main.run_steps(smoke(), run, "all")
  assert outcome(run) == before


def test_another_configuration_is_refused_with_the_keys(run):
  settings = smoke()
  settings.dpo.beta = 0.2
  settings.judge.votes = 5
  with pytest.raises(ValueError, match=r"judge\.votes: 3 there, 5 here"):
    main.run_steps(settings, run, "all")
  settings = smoke()
  settings.dpo.beta = 0.2
  with pytest.raises(ValueError, match=r"dpo\.beta: 0\.1 there, 0\.2 here"):
    main.run_steps(settings, run, "dpo")


@pytest.mark.slow
def test_interrupted_in_every_stage_it_ends_with_the_same_pairs(run, tmp_path, monkeypatch):
  """Ctrl-C once in each step: at its second file, after some training steps, or at its commit."""
  workdir, interrupted = epath.Path(tmp_path / "run"), []
  write, commit, see = artifacts.Artifact.write, artifacts.Artifact.commit, train_loop.Watch.see

  def stop_once(place):
    if place not in interrupted:
      interrupted.append(place)
      raise KeyboardInterrupt(place)

  def stopping_write(self, name, text, count=None):
    write(self, name, text, count)
    if "-00001-of-" in name:
      stop_once(str(self.folder))

  def stopping_commit(self, facts, folders=()):
    stop_once(str(self.folder))
    commit(self, facts, folders)

  def stopping_see(self, step, metrics):
    see(self, step, metrics)
    if step == 6 or step == 120:
      stop_once(f"{self.folder} step {step}")

  monkeypatch.setattr(artifacts.Artifact, "write", stopping_write)
  monkeypatch.setattr(artifacts.Artifact, "commit", stopping_commit)
  monkeypatch.setattr(train_loop.Watch, "see", stopping_see)
  for _ in range(100):
    try:
      main.run_steps(smoke(), workdir, "all")
      break
    except KeyboardInterrupt:
      continue
  assert len(interrupted) > 25
  assert outcome(workdir) == outcome(run)


def below(folder):
  for path in folder.iterdir():
    yield from below(path) if path.is_dir() else (path,)


def comparable(names):
  """Orbax names the files of weights at random; locks and logs are not the same in a store."""
  return sorted(name for name in names if "/weights/" not in name and not name.startswith(("run/lock", "run/logs/")))


@pytest.mark.slow
def test_in_a_store_that_fails_now_and_then_it_is_the_run_on_a_disk(store: fake_gcs.Store, run):
  store.weather = 97
  workdir = epath.Path("gs://bucket/run")
  main.run_steps(smoke(), workdir, "all")
  assert store.counts.total() > 1000
  for name, value in outcome(run).items():
    if isinstance(name, str):  # An artifact; the rest are their files.
      assert digests.unseal((workdir / name / "manifest.json").read_bytes())["digest"] == value, name
  assert "M3" in (workdir / "report" / "report.html").read_text()
  names = [f"run/{path.relative_to(run)}" for path in below(run)]
  assert comparable(store.names("bucket", "run/")) == comparable(names)
