"""A user's files are opened before the first stage, and one that cannot be used stops the run there."""

import json
import pathlib

from etils import epath
from ml_collections import config_dict
import numpy as np
import pytest
import tiny_model

from srlm_jax import config, given, main, records, steps, templates, world_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
  folder = epath.Path(tmp_path_factory.mktemp("world"))
  world_files.write_world(folder, 0, world_files.Sizes(50, 50, 50, 50, 0.5, 60, 40, 20, (3, 4), 50, 40, 20))
  return folder


def settings() -> config_dict.ConfigDict:
  c = config.base()
  c.eft.writer = "annotators"
  c.select.prompts = 4
  return c


def paths(files: epath.Path) -> dict[str, epath.Path]:
  """Every file that a run may read, all of them good."""
  prompts = [records.Prompt(id=name, text=f"Say {name}.", source="mine") for name in ("one", "two")]
  mine = files / "mine.jsonl"
  mine.write_text(records.dumps(prompts))
  np.savez(files / "vectors.npz", ids=["a"], vectors=[[1.0, 2.0]])
  return {
    "data.trees": files / "trees.jsonl",
    "data.heldout_trees": files / "heldout_trees.jsonl",
    "data.eval_prompts": files / "heldout_prompts.jsonl",
    "data.judgements": files / "judgements.jsonl",
    "data.pretrain": files / "pretrain.jsonl",
    "select.path": mine,
    "monitors.prompts": mine,
    "analysis.vectors": files / "vectors.npz",
  }


def test_good_files_pass(files: epath.Path) -> None:
  given.check(settings(), paths(files), ())


@pytest.mark.parametrize(
  "key",
  [
    *("data.trees", "data.heldout_trees", "data.eval_prompts", "data.judgements", "data.pretrain", "select.path"),
    *("monitors.prompts", "analysis.vectors"),
  ],
)
def test_each_file_is_read_to_its_end(files: epath.Path, tmp_path: pathlib.Path, key: str) -> None:
  good = paths(files)
  bad = epath.Path(tmp_path / good[key].name)
  bad.write_bytes(good[key].read_bytes()[:-20])
  with pytest.raises(ValueError, match=f"{bad}.*(not JSON|not an .npz)"):
    given.check(settings(), good | {key: bad}, ())


@pytest.mark.parametrize("key", ["data.heldout_trees", "data.eval_prompts", "select.path"])
@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "holds nothing|no message trees|no tree"),
    ('{"id": "a"}\n'.encode("utf-16"), "this is UTF-16"),
    (
      b'{"id": "a", "text": "x", "source": "x"}\n' * 2,
      "line 2: the id 'a' is on line 1, too|not an Open Assistant tree",
    ),
  ],
)
def test_where_the_world_is_to_write_the_trees_the_other_files_are_read_all_the_same(
  tmp_path: pathlib.Path, key: str, content: bytes, message: str
) -> None:
  path = tmp_path / "mine.jsonl"
  path.write_bytes(content)
  c = config.base()
  c.world.enabled, c.data.trees, c.select.judge = True, "world/trees.jsonl", "oracle"
  c.update_from_flattened_dict({key: str(path)})
  workdir = epath.Path(tmp_path / "run")
  planned = [step for step in steps.plan(c, workdir, None) if step.folder in ("world", "seed")]
  with pytest.raises(ValueError, match=f"(?s){path}.*({message})"):
    steps.check_start(c, workdir, tiny_model.one_device(), planned)


def test_a_damaged_file_is_said_and_not_that_it_is_another_one(
  files: epath.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  c, workdir = config.base(), epath.Path(tmp_path / "run")
  c.world.enabled, c.data.trees, c.select.judge = True, "world/trees.jsonl", "none"
  c.data.eval_prompts = str(tmp_path / "mine.jsonl")
  (tmp_path / "mine.jsonl").write_text(records.dumps([records.Prompt(id="a", text="x", source="x")]))
  plan = steps.plan
  monkeypatch.setattr(steps, "plan", lambda *given: [step for step in plan(*given) if step.folder in ("world", "seed")])
  [_, seed] = steps.artifacts_of(steps.plan(c, workdir, None), workdir).values()
  [world] = seed.inputs.values()
  world.begin()
  world.commit({})
  seed.begin()
  (tmp_path / "mine.jsonl").write_text("")
  with pytest.raises(ValueError, match=r"mine.jsonl holds nothing: write one Prompt a line"):
    main.run_steps(c, workdir, "seed")


def test_a_prompt_that_is_learnt_and_measured_by_is_refused(files: epath.Path) -> None:
  c = settings()
  good = paths(files)
  first = json.loads(good["data.trees"].read_text().split("\n")[0])
  taught = records.Prompt(id="x", text=first["prompt"]["text"], source="x")
  measured = files / "measured.jsonl"
  measured.write_text(records.dumps([taught]))
  with pytest.raises(ValueError, match=r"held-out prompt\(s\) are also trained on"):
    given.check(c, good | {"data.eval_prompts": measured}, ())


@pytest.mark.parametrize(
  ("changes", "stage", "message"),
  [
    ({"judge.rubric": "judge_tiny", "eft.writer": "baseline"}, "eft", "judge.rubric=judge_tiny: the template never"),
    ({"evaluate.pairwise": "PATH"}, "evaluate", r"evaluate.pairwise=.*: the template never says '\[\[A\]\]'"),
    ({"select.pairwise": "PATH"}, "sft", r"select.pairwise=.*: the template never says '\[\[A\]\]'"),
    ({"monitors.rubric": "judge_additive"}, "safety", r"monitors.rubric=judge_additive: the template never says"),
    ({"analysis.classes": "PATH"}, "classify", "analysis.classes=.*: the template never says 'Category:'"),
  ],
)
def test_a_template_that_asks_for_no_verdict_is_refused(
  tmp_path: pathlib.Path, changes: dict[str, str], stage: str, message: str
) -> None:
  templates._load.cache_clear()
  own = {
    "evaluate": "{instruction} {response_a} {response_b}",
    "sft": "{instruction} {response_a} {response_b}",
    "classify": "# categories: a; b\n# lengths: c; d\n{instruction} {categories} {lengths}",
  }
  path = tmp_path / "mine.txt"
  path.write_text(own.get(stage, "x"))
  c = config.base()
  c.update_from_flattened_dict({key: value.replace("PATH", str(path)) for key, value in changes.items()})
  with pytest.raises(ValueError, match=message):
    given.check(c, {}, {stage})
  given.check(c, {}, set())  # No stage asks by it.
  given.check(config.base(), {}, {"eft", "evaluate", "sft", "dpo", "safety", "classify"})


def test_what_a_killed_world_left_is_not_checked(tmp_path: pathlib.Path) -> None:
  c, workdir = config.base(), epath.Path(tmp_path)
  c.world.enabled, c.data.trees, c.select.judge = True, "world/trees.jsonl", "none"
  planned = {step.folder: step for step in steps.plan(c, workdir, None)}
  mesh = tiny_model.one_device()
  steps.check_start(c, workdir, mesh, [planned["seed"]])  # The seed stage says that the world is to be made first.
  (tmp_path / "world").mkdir()
  (tmp_path / "world" / "trees.jsonl").write_text('{"message_tree_id": "cut o')
  steps.check_start(c, workdir, mesh, [planned["world"], planned["seed"]])
  with pytest.raises(ValueError, match="trees.jsonl, line 1, character 21: not JSON"):  # Finished, and damaged since.
    steps.check_start(c, workdir, mesh, [planned["seed"]])


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: pathlib.Path) -> None:
  c = config.base()
  c.data.trees = str(tmp_path)
  with pytest.raises(ValueError, match=rf"data\.trees={tmp_path}: this is a folder. Name the file in it"):
    steps.read_files(c, epath.Path("run"))


def test_a_run_stops_before_its_first_stage(files: epath.Path, tmp_path: pathlib.Path) -> None:
  c = config.base()
  c.base.kind, c.base.size, c.select.judge, c.prompts.writer = "random", "smoke", "none", "m0"
  c.tokenizer = str(files / "tokenizer.model")
  c.data.trees = str(tmp_path / "trees.jsonl")
  (tmp_path / "trees.jsonl").write_text("{}\n")
  with pytest.raises(ValueError, match="trees.jsonl, line 1: not an Open Assistant tree: message_tree_id"):
    main.run_steps(c, epath.Path(tmp_path / "run"), "all")
  assert not (tmp_path / "run").exists()
