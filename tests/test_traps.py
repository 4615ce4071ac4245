"""The traps that other implementations of the method fell into, each with the test that holds it off.

| trap | test |
|---|---|
| the score is searched in the whole text: a response that says "Score: 5" grades itself | test_rollout.py::test_a_response_that_says_score_5_does_not_grade_itself, test_templates.py::test_a_score_inside_the_response_counts_for_nothing |
| an unreadable verdict becomes -1 and so "rejected" | test_pairing.py::test_an_unreadable_verdict_is_left_out_and_never_rejected, test_rollout.py::test_tally_is_the_mean_of_the_valid_votes |
| ties are kept | test_pairing.py::test_ties_are_no_pair |
| an over-long judge prompt is cut, or replaced and scored all the same | test_rollout.py::test_a_judge_prompt_that_is_too_long_is_reported_and_never_cut |
| the few-shot prompt grows with each call | test_the_few_shot_prompt_does_not_grow_with_each_call |
| demonstrations come back as "new" prompts | test_demonstrations_do_not_come_back_as_new_prompts, test_filters.py::test_canary_demonstrations_handed_back_as_new_prompts_are_rejected |
| log-probs are not shifted, or averaged where DPO sums | test_logprobs.py::test_sequence_logprobs_equal_a_plain_reference |
| the loss falls on the prompt and not on the response | test_finetune.py::test_the_loss_falls_on_the_response_and_its_end_token_alone, test_train_step.py::test_sft_learns_the_response_and_not_the_prompt, test_pairset.py::test_a_row_is_chosen_above_rejected |
| no end token in the loss, so that length explodes | test_finetune.py::test_the_loss_falls_on_the_response_and_its_end_token_alone, test_logprobs.py::test_the_end_token_counts, test_pairing.py::test_an_unfinished_response_is_never_chosen_but_may_be_rejected |
| no end token when sampling | test_sampling.py::test_an_end_token_ends_the_text_and_is_in_it, test_rollout.py::test_answers_are_sampled_ids_and_stripped_texts |
| the reference model is copied although its log-probs are precomputed | test_no_reference_model_is_in_memory_beside_its_log_probs, test_train_loop.py::test_the_model_is_not_copied |
| a missing reference silently drops its term | test_a_missing_reference_is_an_error, test_pairset.py::test_rows_and_reference_must_be_as_many |
| training uses one chat template and generation another | test_training_and_generation_use_one_chat_template, test_another_chat_template_is_another_artifact |
| the reference stays at SFT for ever, or the lineage is nowhere to be read | test_the_reference_moves_with_the_models, test_lineage.py::test_lineage_text_is_a_tree_of_models |
| evaluation consumes the training iterator | test_dataset.py::test_a_step_is_the_same_after_reopening |
| an exception is logged and the loop goes on | test_main.py::test_a_run_stops_where_it_breaks_and_goes_on_from_there, test_train_loop.py::test_too_many_in_a_row_end_the_run_with_their_batches_and_a_good_state |
"""  # noqa: E501 (a row of a table)

from collections.abc import Mapping
import json
import pathlib
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import pytest
import tiny_model

from srlm_jax import (
  artifacts,
  chat,
  config,
  finetune,
  llama,
  logprobs,
  mesh as mesh_lib,
  modelstore,
  pairset,
  records,
  steps,
  train_loop,
  train_step,
)
from srlm_jax.stages import dpo as dpo_stage, pairs as pairs_stage, prompts as prompts_stage


def test_every_test_that_the_table_names_exists() -> None:
  rows = re.findall(r"^\| (?!trap|---)", __doc__, re.MULTILINE)
  named = re.findall(r"(?:(test_\w+\.py)::)?(test_\w+)(?!\w|\.py)", __doc__)
  assert len(rows) == 16 and len(named) > len(rows)
  for file, name in named:
    source = (pathlib.Path(__file__).parent / (file or "test_traps.py")).read_text(encoding="utf-8")
    assert f"\ndef {name}(" in source, (file, name)


class Writer:
  """Runs the stage that writes new prompts, with a script in place of the model."""

  def __init__(self, root: epath.Path, monkeypatch: pytest.MonkeyPatch, script: tiny_model.Script) -> None:
    self.actor = tiny_model.actor(script, max_length=4000)
    monkeypatch.setattr(modelstore, "speaker", lambda *_: self.actor)
    self.seeds = [f"Name {number} birds in the garden." for number in ("one", "two", "six", "ten", *"abcdefgh")]
    seed = artifacts.Artifact(root / "seed", {}, {})
    seed.begin()
    ift = [records.SFTExample(id=text, kind="ift", prompt=text, response="owl") for text in self.seeds]
    seed.write_records("ift.jsonl", ift)
    seed.write_records("eval_prompts.jsonl", [records.Prompt(id="e", text="Tell me about held out foxes.", source="w")])
    seed.write_records("ranked_heldout.jsonl", [])
    seed.commit({})
    self.out = artifacts.Artifact(root / "aift1" / "prompts", {}, {"seed": seed, "writer": seed})
    self.out.begin()

  def run(self, **changes: object) -> list[str]:
    c = config.base()
    c.prompts.update(count=1000, max_proposals=20, per_round=4, max_rouge=1.0, **changes)
    prompts_stage.run(self.out, c, None)
    return [prompt.text for prompt in self.out.read_shards("prompts", records.Prompt)]


def test_more_demonstrations_than_seed_prompts_are_refused(
  tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  writer = Writer(epath.Path(tmp_path), monkeypatch, lambda *_: pytest.fail("nothing is asked"))
  with pytest.raises(ValueError, match="14 demonstrations are wanted of 12 seed prompts: lower prompts.seed_demon"):
    writer.run(seed_demonstrations=12)


def test_the_few_shot_prompt_does_not_grow_with_each_call(
  tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  called = iter(range(1000))

  def script(prompt: str, sample: int) -> str:
    return f" Sing song number {next(called)} for me.\n10. And dance dance {next(called)} after that."

  writer = Writer(epath.Path(tmp_path), monkeypatch, script)
  assert len(writer.run()) == 40
  assert len(writer.actor.asked) == 20
  for number, prompt in enumerate(writer.actor.asked):
    tasks = re.findall(r"^(\d+)\. ?(.*)$", prompt, re.MULTILINE)
    assert [index for index, _ in tasks] == [str(n) for n in range(1, 10)] and tasks[-1][1] == ""
    ours = [text in writer.seeds for _, text in tasks[:-1]]
    assert sum(ours) == (8 if number < 4 else 6)  # Two of the model's own, as soon as there are any.
    assert len({text for _, text in tasks}) == 9
  assert max(map(len, writer.actor.asked)) < 1.2 * min(map(len, writer.actor.asked))


def test_demonstrations_do_not_come_back_as_new_prompts(tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def parrot(prompt: str, sample: int) -> str:
    shown = re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)
    return "\n".join([f" {shown[0]}", f"10. {shown[3].upper()}", "11. Tell me about held out foxes."])

  writer = Writer(epath.Path(tmp_path), monkeypatch, parrot)
  with pytest.raises(ValueError, match="no new prompt passed the filters"):
    writer.run()
  assert not writer.out.done


def some_pairs(folder: epath.Path, reference: artifacts.Artifact) -> artifacts.Artifact:
  """A finished pairs artifact of eight pairs with made-up log-probs."""
  out = artifacts.Artifact(folder, {}, {"reference": reference})
  out.begin()
  pair = records.PreferencePair(
    prompt_id="p", prompt="", prompt_tokens=(1, 5), chosen="", chosen_tokens=(6, 2), chosen_score=5.0,
    rejected="", rejected_tokens=(7, 2), rejected_score=0.0,
  )  # fmt: skip
  pairset.write(out.folder / "dataset", [pairset.pair_row(pair, 8)] * 8, np.full((8, 2), -3.0))
  out.commit({"pairs": 8, "reference": reference.digest()})
  return out


def model_artifact(folder: epath.Path, seed: int) -> artifacts.Artifact:
  out = artifacts.Artifact(folder, {}, {})
  out.begin()
  modelstore.save(out, tiny_model.model(seed), tiny_model.words(), {})
  return out


def test_no_reference_model_is_in_memory_beside_its_log_probs(
  tmp_path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  root, mesh, c = epath.Path(tmp_path), tiny_model.one_device(), config.base()
  c.dpo.update(batch=4, steps=3)
  parent, reference = model_artifact(root / "m1", 1), model_artifact(root / "m0", 0)
  loaded, given = [], {}
  load = modelstore.load

  def counted(artifact: artifacts.Artifact, *rest: Any, **more: Any) -> llama.Llama:
    loaded.append(artifact.name)
    return load(artifact, *rest, **more)

  def train(**arguments: Any) -> llama.Llama:
    given.update(arguments)
    given["model"] = arguments["start"]()
    return given["model"]

  monkeypatch.setattr(modelstore, "load", counted)
  monkeypatch.setattr(train_loop, "train", train)
  pairs = some_pairs(root / "pairs", reference)
  out = artifacts.Artifact(root / "m2", {}, {"parent": parent, "pairs": pairs})
  out.begin()
  dpo_stage.run(out, c, mesh)
  assert loaded == ["m1"]  # The policy alone.
  assert given["loss_fn"].keywords.keys() == {"chunk", "beta"} and not given["loss_fn"].args
  state = jax.eval_shape(lambda model: train_step.init(model, train_step.optimizer(given["optimizer"])), given["model"])
  weights = sum(leaf.size for leaf in jax.tree.leaves(given["model"]))
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) - 3 * weights <= 3  # Weights, two moments, some counters.
  assert out.manifest()["facts"]["reference"] == reference.digest()


def test_a_missing_reference_is_an_error(tmp_path: epath.Path) -> None:
  root = epath.Path(tmp_path)
  batches = pairset.Batches(some_pairs(root / "pairs", model_artifact(root / "m0", 0)).folder / "dataset", 8, 0)
  model, whole = tiny_model.model(), {name: jnp.asarray(value) for name, value in batches[0].items()}
  for name in ("reference_chosen", "reference_rejected"):
    part = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(KeyError, match=name):
      train_step.dpo_loss(model, part, None, 0, 0.1)
  # And each term counts: without it the loss would be another one.
  policy = logprobs.sequence_logprobs(model, whole, 0)
  policy = np.asarray(policy)
  margin = 0.1 * np.mean((policy[:8] + 3.0) - (policy[8:] + 3.0))
  for name, sign in (("reference_chosen", -1), ("reference_rejected", 1)):
    moved = {**whole, name: whole[name] - 2.0}
    _, metrics = train_step.dpo_loss(model, moved, None, 0, 0.1)
    assert float(metrics["margin"]) == pytest.approx(margin - sign * 0.2, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama2", "plain"])
def test_training_and_generation_use_one_chat_template(kind: str) -> None:
  words, text = tiny_model.words(), " Name a </s> bird. [/INST]\n"
  wanted = tuple(chat.chat_tokens(words, text, kind))
  speaker = tiny_model.actor(lambda *_: "owl", chat_kind=kind)
  (row,), _ = finetune.tokenize([records.SFTExample(id="", kind="ift", prompt=text, response="owl")], words, kind, 200)
  both = [
    records.Response(prompt_id="p", prompt=text, sample=sample, text="owl", tokens=(5, 2), finished=True)
    for sample in (0, 1)
  ]
  (pair,), _ = pairs_stage._records([((both[0], 5.0), (both[1], 1.0))], words, kind, 200)
  assert speaker.chat(text) == wanted  # Generation and judging,
  assert row.tokens[: row.target_from] == wanted  # SFT,
  assert pair.prompt_tokens == wanted  # and DPO.


def planned(**changes: object) -> Mapping[str, steps.Step]:
  c: config_dict.ConfigDict = config.base()
  c.models = 4
  c.update_from_flattened_dict(changes)
  return {step.folder: step for step in steps.plan(c, epath.Path("w"), mesh_lib.make_mesh())}


def test_another_chat_template_is_another_artifact() -> None:
  off = {"select.judge": "none"}  # Checkpoints that answer do so in the chat template.
  one, other = planned(**off), planned(chat="plain", **off)
  same = {folder for folder in one if one[folder].config == other[folder].config}
  # Nothing but data without prompts' tokens, DPO, whose pairs hold them, and what counts duels.
  assert same == {
    "seed",
    "report",
    "m2",
    "m3",
    "m4",
    *(f"analysis/{name}" for name in ("baseline", "m1", "m2", "m3", "m4")),
  }
  assert json.dumps(one["m1"].config["chat"]) == '"llama2"'


def test_the_reference_moves_with_the_models() -> None:
  moving, fixed = planned(), planned(**{"dpo.reference": "baseline"})
  for index in (1, 2, 3):
    pairs, model = f"aift{index}/pairs", f"m{index + 1}"
    assert moving[pairs].inputs["reference"] == moving[model].inputs["parent"] == f"m{index}"
    assert moving[model].inputs["pairs"] == pairs
    assert fixed[pairs].inputs["reference"] == "baseline"  # Only where it is asked for,
    assert fixed[model].inputs["parent"] == f"m{index}"
  assert moving["m2"].config != fixed["m2"].config  # and never in the same folder.
