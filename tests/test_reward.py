"""Agreement with people's ranks: four judges whose figures are known beforehand, and the command that measures one."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import random

from etils import epath
from loopback import Loopback, chat
import pytest
import tiny_model

from srlm_jax import artifacts, config, digests, main, modelstore, records, reward, rollout, sampling, steps, templates

REAL = os.environ.get("SRLM_REAL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="SRLM_REAL_DATA names no folder with en_100_tree.jsonl")


@dataclasses.dataclass(frozen=True)
class Known:
  """A judge that scores a reply by its rank among its siblings and their number, and not by its text."""

  score: Callable[[int, int, random.Random], float]
  ranks: dict[tuple[str, int], tuple[int, int]]

  def ask(self, questions: Sequence[rollout.Question], how: sampling.Sampling) -> list[list[rollout.Reply]]:
    found = []
    for one in questions:
      _, _, prompt, place = one.name.split(" ")
      score = self.score(*self.ranks[prompt, int(place)], random.Random(one.name))
      found.append([rollout.Reply(f"I know.\nScore: {score:.6f}", True)] * one.samples)
    return found


def measured(
  ranked: Sequence[records.RankedReplies], score: Callable[[int, int, random.Random], float]
) -> dict[str, dict]:
  """The metrics of a judge of that kind, asked through the judge prompt as any other."""
  order = {one.prompt_id: sorted(reply.rank for reply in one.replies) for one in ranked}
  ranks = {
    (one.prompt_id, place): (order[one.prompt_id].index(reply.rank), len(one.replies))
    for one in ranked
    for place, reply in enumerate(one.replies)
  }
  judging = rollout.Judging(templates.load_rubric("judge_additive"), 1, 1, sampling.Sampling())
  judgements = rollout.judge(Known(score, ranks), reward.candidates(ranked), judging)
  return reward.facts(ranked, judgements, dataclasses.replace(judging, votes=1))["metrics"]


@pytest.fixture(scope="module")
def real() -> list[records.RankedReplies]:
  return reward.read_trees(f"{REAL}/en_100_tree.jsonl")


@needs_real
def test_who_knows_the_ranks_agrees_with_them(real: list[records.RankedReplies]) -> None:
  found = measured(real, lambda place, count, _: 5 - 5 * place / (count - 1))
  for name in ("pairwise", "pairwise_strict", "exact_match", "spearman", "kendall", "five_best"):
    assert (found[name]["value"], found[name]["low"], found[name]["high"]) == pytest.approx((1, 1, 1)), name
  assert found["tie_rate"]["value"] == found["undefined"]["value"] == found["unreadable"]["value"] == 0
  assert len(real) > 80 and found["pairwise"]["count"] > 300


@needs_real
def test_who_turns_the_ranks_round_is_always_wrong(real: list[records.RankedReplies]) -> None:
  found = measured(real, lambda place, count, _: 5 * place / (count - 1))
  for name in ("pairwise", "pairwise_strict", "exact_match", "five_best"):
    assert found[name]["value"] == found[name]["high"] == 0, name
  assert found["spearman"]["value"] == pytest.approx(-1) and found["kendall"]["value"] == pytest.approx(-1)


@needs_real
def test_who_says_the_same_of_all_ties_and_has_no_correlation(real: list[records.RankedReplies]) -> None:
  found = measured(real, lambda place, count, _: 4.0)
  assert found["tie_rate"]["value"] == 1 and found["undefined"]["value"] == 1
  for name in ("pairwise", "spearman", "kendall", "five_best"):  # They rest on nothing, which is no 0.
    assert found[name]["value"] is None and found[name]["count"] == 0, name
  assert found["pairwise_strict"]["value"] == found["exact_match"]["value"] == 0
  assert found["spearman"]["left_out"] == len(real)


@needs_real
def test_who_guesses_is_right_half_of_the_time(real: list[records.RankedReplies]) -> None:
  found = measured(real, lambda place, count, rng: rng.uniform(0, 5))
  for name, chance in (("pairwise", 0.5), ("spearman", 0.0), ("kendall", 0.0)):
    assert found[name]["low"] < chance < found[name]["high"], name
  assert found["tie_rate"]["value"] < 0.01


def ranked(prompt: str, *texts: str) -> records.RankedReplies:
  replies = tuple(records.Reply(id=f"{prompt}{n}", text=text, rank=n) for n, text in enumerate(texts))
  return records.RankedReplies(prompt_id=prompt, prompt=f"{prompt} bird?", replies=replies)


class Run:
  """A work directory with held-out replies and one model, of which only the judging matters."""

  def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    self.folder, self.settings = epath.Path(folder), config.base()
    self.settings.judge.update(rubric="judge_tiny", votes=2)
    self.settings.judge.sampling.max_new = 40
    seed = artifacts.Artifact(self.folder / "seed", {}, {})
    seed.begin()
    held = [ranked("a", "crow crow", "crow", "stone"), ranked("b", "crow", "stone")]
    seed.write_records("ranked_heldout.jsonl", held)
    seed.write_records("ranked_train.jsonl", [ranked("c", "crow", "stone")])
    ift = [records.SFTExample(id="x", kind="ift", prompt="d  BIRD?", response="crow")]
    seed.write_records("ift.jsonl", ift)
    seed.commit({})
    model = artifacts.Artifact(self.folder / "m1", {}, {})
    model.begin()
    model.write("llama.json", "{}")
    model.commit({})
    self.made = {"seed": seed, "m1": model}
    self.actor = tiny_model.actor(lambda prompt, sample: f"Score: {min(2 * prompt.count('crow') + sample, 5)}")
    monkeypatch.setattr(modelstore, "speaker", lambda *_: self.actor)
    monkeypatch.setattr(steps, "plan", lambda *_: [])
    monkeypatch.setattr(steps, "artifacts_of", lambda *_: self.made)

  def reward(self, name: str, **more: str) -> dict:
    return reward.run(self.settings, self.made, tiny_model.one_device(), self.folder / "endpoint", name, **more)


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Run:
  return Run(tmp_path, monkeypatch)


def test_a_model_is_measured_on_the_held_out_replies(run: Run) -> None:
  found = run.reward("m1")
  assert found["metrics"]["pairwise"]["value"] == 1 and found["metrics"]["pairwise"]["count"] == 4
  assert found["votes"] == {"readable": 10}
  assert (found["judge"], found["digest"]) == ("m1", run.made["m1"].digest())
  assert found["rubric"] == {"name": "judge_tiny", "sha256": templates.load_rubric("judge_tiny").digest}
  assert found["replies"] == {
    "from": str(run.folder / "seed"), "sha256": run.made["seed"].digest(), "prompts": 2, "replies": 5
  }  # fmt: skip
  assert found["judging"]["votes"] == 2 and found["judging"]["sampling"]["temperature"] == 0.7
  assert json.loads(json.dumps(found))["metrics"] == found["metrics"]


def test_the_table_has_the_paper_s_figures_beside(run: Run) -> None:
  table = reward.table(run.reward("m1"))
  assert table.columns == ("", "M1", "SFT", "M1", "M2", "M3", "SFT, 5 grades")
  assert [cell.text for cell in table.rows[0]] == [
    "pairwise accuracy, %", "100.0", "65.1", "78.7", "80.4", "81.7", "26.6"
  ]  # fmt: skip


def test_another_judge_prompt_is_another_measurement(run: Run, tmp_path: pathlib.Path) -> None:
  (tmp_path / "mine.txt").write_text("# range: 0 5\nHow good? {instruction} {response} Mind the moon.")
  found = run.reward("m1", rubric=str(tmp_path / "mine.txt"))
  assert all("Mind the moon." in prompt for prompt in run.actor.asked) and len(run.actor.asked) == 5
  assert found["rubric"]["name"].endswith("mine.txt")
  with pytest.raises(ValueError, match="no template 'judge_six_bucket': name one of .*judge_five_bucket"):
    run.reward("m1", rubric="judge_six_bucket")


def tree(name: str, prompt: str, replies: Sequence[str]) -> str:
  root = {"message_id": name, "role": "prompter", "text": prompt, "lang": "en"}
  below = [
    {"message_id": f"{name}{rank}", "role": "assistant", "text": text, "lang": "en", "rank": rank}
    for rank, text in enumerate(replies)
  ]
  return json.dumps({"message_tree_id": name, "tree_state": "ready_for_export", "prompt": {**root, "replies": below}})


def test_trees_of_one_s_own_are_judged_and_those_trained_on_are_counted(
  run: Run, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  lines = [tree("t", "C Bird?", ["crow", "stone"]), tree("u", "d bird?", ["crow", "stone"]), tree("v", "e?", ["x"])]
  lines.append(tree("w", "f bird?", ["stone", "crow"]))
  (tmp_path / "trees.jsonl").write_text("\n".join(lines))
  found = run.reward("m1", trees=str(tmp_path / "trees.jsonl"))
  assert found["replies"]["prompts"] == 3 and found["replies"]["prompts trained on"] == 2
  assert "2 of 3 prompts" in caplog.text and "they are not held out" in caplog.text
  assert found["metrics"]["pairwise"]["value"] == pytest.approx(2 / 3)
  assert found["replies"]["sha256"] == digests.file_sha256(epath.Path(tmp_path / "trees.jsonl"))
  with pytest.raises(ValueError, match="--trees=/nowhere: there is no such file"):
    run.reward("m1", trees="/nowhere")
  (tmp_path / "few.jsonl").write_text(lines[2])
  with pytest.raises(ValueError, match=r"few\.jsonl: none of its 1 trees has two ranked replies"):
    run.reward("m1", trees=str(tmp_path / "few.jsonl"))


def test_a_run_that_held_no_replies_back_asks_for_a_file(run: Run) -> None:
  seed = run.made["seed"] = artifacts.Artifact(run.folder / "other", {}, {})
  seed.begin()
  seed.write_records("ranked_heldout.jsonl", [])
  seed.commit({})
  with pytest.raises(ValueError, match="/other holds no ranked replies back: give --trees=FILE"):
    run.reward("m1")


def test_an_endpoint_is_measured_and_paid_once(run: Run) -> None:
  loopback = Loopback(lambda body: chat("Score: 3"), path="/v1/chat/completions")
  try:
    run.settings.endpoint.update(url=loopback.url, model="judge-1", price_in=2.0)
    for _ in range(2):
      found = run.reward("endpoint")
      assert found["usage"] == {"replies": 10, "tokens_in": 1000, "tokens_out": 70, "uncounted": 0, "cost": 0.002}
  finally:
    loopback.shutdown()
    loopback.server_close()
  assert len(loopback.asked) == 10 and found["metrics"]["tie_rate"]["value"] == 1
  assert (found["name"], found["judge"]) == ("judge-1", f"judge-1 at {loopback.url}/v1")


def test_the_oracle_is_measured_in_its_world_alone(run: Run) -> None:
  with pytest.raises(ValueError, match="--model=oracle knows the tiny world alone"):
    run.reward("oracle")
  run.settings.world.enabled = True
  found = run.reward("oracle")
  assert found["judge"] == "the world's oracle" and found["metrics"]["tie_rate"]["value"] == 1
  with pytest.raises(ValueError, match="--model=oracle scores from 0 to 5"):
    run.reward("oracle", rubric="judge_five_bucket")


def test_an_unknown_judge_is_refused_with_those_that_are_there(run: Run) -> None:
  with pytest.raises(ValueError, match="'m2' is not a finished model .*Valid: m1, endpoint, oracle"):
    run.reward("m2")
  with pytest.raises(ValueError, match=r"endpoint\.url must be http"):
    run.reward("endpoint")


def test_the_command_prints_the_table_and_writes_all_of_it(
  run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  class Given:
    def __init__(self, value: str) -> None:
      self.value = value

  monkeypatch.setattr(main, "_OUT", Given(str(tmp_path / "new" / "m1.json")))
  monkeypatch.setattr(main, "_RUBRIC", Given(""))
  monkeypatch.setattr(main, "_TREES", Given(""))
  main.show_reward(run.settings, run.folder, "m1")
  shown = capsys.readouterr().out
  assert "### Agreement with people's ranks" in shown and "| pairwise accuracy, % | 100.0" in shown
  assert json.loads((tmp_path / "new" / "m1.json").read_text())["metrics"]["pairwise"]["value"] == 1
