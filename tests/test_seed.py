"""The seed stage: what it refuses, and that the compared models learn from the same IFT."""

import importlib.util
import pathlib

from etils import epath
import pytest

from srlm_jax import artifacts, records, world_files
from srlm_jax.stages import base, seed, world

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def smoke():
  spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config("smoke")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp("world"))
  sizes = world_files.Sizes(50, 50, 50, 50, 0.5, 60, 40, 20, (3, 4), 50, 40, 20)
  world_files.write_world(folder, 0, sizes)
  return folder


def run(settings, files, folder, **changes):
  names = ("trees", "heldout_trees", "eval_prompts")
  where = {
    **{name: files / f"{name}.jsonl" for name in names},
    "eval_prompts": files / "heldout_prompts.jsonl",
    **changes,
  }
  out = artifacts.Artifact(epath.Path(folder), {}, {})
  out.begin()
  seed.run(out, settings, where)
  return out


def test_without_eft_ift_is_the_same(smoke, files, tmp_path):
  one = run(smoke, files, tmp_path / "one")
  smoke.eft.enabled = False
  two = run(smoke, files, tmp_path / "two")
  smoke.eft.enabled = True
  assert one.read_text("ift.jsonl") == two.read_text("ift.jsonl")


def test_given_evaluation_prompts_take_no_trees(smoke, files, tmp_path):
  counts = run(smoke, files, tmp_path / "run").manifest()["facts"]["counts"]
  assert not counts.get("eval/kept") and counts["held out: trees"] == 20


def test_validation_prompts_are_there_where_checkpoints_are_compared(smoke, files, tmp_path):
  off = run(smoke, files, tmp_path / "off")
  assert not off.has("validation.jsonl") and "validation" not in off.manifest()["facts"]
  smoke = smoke.copy_and_resolve_references()
  smoke.select.update(judge="oracle", prompts=4)
  on = run(smoke, files, tmp_path / "on")
  prompts = on.read("validation.jsonl", records.Prompt)
  assert len(prompts) == on.manifest()["facts"]["validation"] == 4
  used = {one.prompt for one in on.read("ift.jsonl", records.SFTExample)}
  used |= {one.prompt for one in on.read("ranked_train.jsonl", records.RankedReplies)}
  used |= {one.text for one in on.read("eval_prompts.jsonl", records.Prompt)}
  assert not {one.text for one in prompts} & used


def test_checkpoints_are_not_chosen_by_the_prompts_that_measure(smoke, files, tmp_path):
  smoke = smoke.copy_and_resolve_references()
  smoke.select.update(judge="oracle", prompts=4)
  chosen = run(smoke, files, tmp_path / "one").read("validation.jsonl", records.Prompt)
  path = epath.Path(tmp_path / "measure.jsonl")
  path.write_text(records.dumps([records.Prompt(id="x", text=chosen[0].text.upper(), source="mine")]))
  two = run(smoke, files, tmp_path / "two", eval_prompts=path)
  assert [one.text for one in two.read("validation.jsonl", records.Prompt)] == [one.text for one in chosen[1:]]
  assert two.manifest()["facts"]["counts"]["validation prompts left out: held out for evaluation"] == 1
  with pytest.raises(ValueError, match=r"1 prompt\(s\) are also held out for evaluation.*Remove them from one side"):
    run(smoke, files, tmp_path / "three", eval_prompts=path, validation=path)
  smoke.select.prompts = 1
  path.write_text(records.dumps([records.Prompt(id="x", text=chosen[-1].text, source="mine")]))
  with pytest.raises(ValueError, match="no tree is left for select.prompts=1, by which .* or select.judge='none'"):
    run(smoke, files, tmp_path / "four", eval_prompts=path)


def test_validation_prompts_of_one_s_own(smoke, files, tmp_path):
  smoke = smoke.copy_and_resolve_references()
  smoke.select.update(judge="oracle", prompts=1)
  path = epath.Path(tmp_path / "mine.jsonl")
  path.write_text(records.dumps([records.Prompt(id=text, text=text, source="mine") for text in ("Say 1.", "Say 2.")]))
  on = run(smoke, files, tmp_path / "on", validation=path)
  assert [one.text for one in on.read("validation.jsonl", records.Prompt)] == ["Say 1."]
  taught = on.read("ift.jsonl", records.SFTExample)[0].prompt
  path.write_text(records.dumps([records.Prompt(id="x", text=taught.upper(), source="mine")]))
  with pytest.raises(ValueError, match=r"1 held-out prompt\(s\) are also trained on"):
    run(smoke, files, tmp_path / "again", validation=path)
  path.write_text("")
  with pytest.raises(ValueError, match="mine.jsonl holds nothing: write one Prompt a line"):
    run(smoke, files, tmp_path / "empty", validation=path)


def test_prompt_ids_must_differ(smoke, files, tmp_path):
  both = [records.Prompt(id="x", text=text, source="mine") for text in ("Say 1.", "Say 2.")]
  (tmp_path / "mine.jsonl").write_text(records.dumps(both))
  with pytest.raises(ValueError, match="mine.jsonl, line 2: the id 'x' is on line 1, too: give every line its own"):
    run(smoke, files, tmp_path / "run", eval_prompts=epath.Path(tmp_path / "mine.jsonl"))


def test_a_misspelt_size_of_the_world_is_refused(smoke, tmp_path):
  smoke = smoke.copy_and_resolve_references()
  smoke.world = dict(enabled=True, ift_tree=5)
  with pytest.raises(ValueError, match="'ift_tree' is not a size of the world .* Did you mean 'ift_trees'?"):
    world.run(artifacts.Artifact(epath.Path(tmp_path), {}, {}), smoke)


def test_a_judge_prompt_without_room_for_a_response_is_refused(smoke, tmp_path):
  smoke = smoke.copy_and_resolve_references()
  smoke.judge.rubric = "judge_five_bucket"
  with pytest.raises(ValueError, match="judge.rubric=judge_five_bucket is .* leaves 128 for it and a response"):
    world.run(artifacts.Artifact(epath.Path(tmp_path), {}, {}), smoke)


def test_pretraining_documents(files, tmp_path):
  words = base.tokenizer.load(files / "tokenizer.model")
  path = epath.Path(tmp_path / "some.jsonl")
  path.write_text(
    '{"text": "crow\u2028owl"}\n\n{"prompt": "say owl", "response": "owl"}\n{"text": "' + "owl " * 99 + '"}\n'
  )
  examples, too_long = base._documents(path, words, "llama2", 64)
  assert (len(examples), too_long) == (2, 1)
  path.write_text('{"text": "crow"}\n{"prompt": "say owl"}\n')
  with pytest.raises(ValueError, match='some.jsonl, line 2: not a Document: .*give either "text" or both'):
    base._documents(path, words, "llama2", 64)
