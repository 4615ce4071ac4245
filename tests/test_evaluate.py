"""The evaluate stage's judges: who decides the duels, what the facts say of it, and that a kill costs nothing twice."""

from collections.abc import Iterator
import json
import pathlib
from typing import Any

from etils import epath
from loopback import Loopback, Reply, chat
from ml_collections import config_dict
import pytest
import tiny_model

from srlm_jax import artifacts, config, findings, modelstore, records, steps
from srlm_jax.stages import evaluate

PROMPTS = 6


def settings(**changes: Any) -> config_dict.ConfigDict:
  c = config.base()
  c.judge.update(rubric="judge_tiny", votes=1)
  c.judge.sampling.max_new = c.evaluate.sampling.max_new = 40
  c.generation.shard = 4
  c.evaluate.pairwise = "pairwise"
  c.update_from_flattened_dict(changes)
  return c


def likes_crows(body: dict[str, Any]) -> Reply:
  text = body["messages"][0]["content"]
  a, b = text.split("Assistant B:")
  return chat("[[A]]" if "crow" in a.split("Assistant A:")[1] else "[[B]]" if "crow" in b else "[[C]]")


class Work:
  """A seed and another model's answers; the evaluated model, and a judge, say what a script says."""

  def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    self.folder = epath.Path(folder)
    seed = artifacts.Artifact(self.folder / "seed", {}, {})
    seed.begin()
    prompts = [records.Prompt(id=f"p{n}", text=f"Name bird {n}.", source="w") for n in range(PROMPTS)]
    seed.write_records("eval_prompts.jsonl", prompts)
    replies = tuple(records.Reply(id=f"r{n}", text=text, rank=n) for n, text in enumerate(("crow", "stone")))
    seed.write_records(
      "ranked_heldout.jsonl", [records.RankedReplies(prompt_id="h", prompt="A bird?", replies=replies)]
    )
    seed.commit({})
    other = artifacts.Artifact(self.folder / "eval" / "baseline", {}, {})
    other.begin()
    answers = [
      records.Response(prompt_id=one.id, prompt=one.text, sample=0, text="stone", tokens=(2,), finished=True)
      for one in prompts
    ]
    other.write_records("answers-00000-of-00001.jsonl", answers)
    other.commit({})
    self.inputs = {"seed": seed, "against baseline": other}
    self.speakers: list[str] = []
    monkeypatch.setattr(modelstore, "speaker", self.speaker)
    monkeypatch.setattr(evaluate, "_expects", lambda *_: False)

  def model(self, name: str) -> artifacts.Artifact:
    if name not in self.inputs:
      made = artifacts.Artifact(self.folder / name, {}, {})
      made.begin()
      made.commit({})
      self.inputs[name] = made
    return self.inputs[name]

  def speaker(self, artifact: artifacts.Artifact, *_: object) -> tiny_model.Actor:
    self.speakers.append(artifact.name)

    def script(prompt: str, sample: int) -> str:
      if "Assistant B:" in prompt:
        return "[[A]]" if "crow" in prompt.split("Assistant A:")[1].split("Assistant B:")[0] else "[[B]]"
      if "<response>" in prompt:
        return f"Score: {5 if 'crow' in prompt else 1}"
      return "A crow." if int(prompt.split("bird ")[1][0]) % 3 else "A stone."

    return tiny_model.actor(script, max_length=2000)

  def run(self, c: config_dict.ConfigDict, **inputs: str) -> dict[str, Any]:
    roles = {"model": self.model("m1"), **{role: self.model(name) for role, name in inputs.items()}}
    kept = {role: one for role, one in self.inputs.items() if role == "seed" or role.startswith("against ")}
    out = artifacts.Artifact(self.folder / "eval" / "m1", {"grader": c.evaluate.grader}, {**kept, **roles})
    out.begin()
    evaluate.run(out, c, tiny_model.one_device(), self.folder / "endpoint")
    return json.loads((out.folder / "manifest.json").read_text())["facts"]


@pytest.fixture
def work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Work:
  return Work(tmp_path, monkeypatch)


@pytest.fixture
def loopback() -> Iterator[Loopback]:
  one = Loopback(likes_crows, path="/v1/chat/completions")
  yield one
  one.shutdown()
  one.server_close()


def behind(loopback: Loopback) -> config_dict.ConfigDict:
  changes = {"url": loopback.url, "model": "judge-1", "concurrency": 1, "retries": 0, "price_out": 1000.0}
  return settings(**{"evaluate.grader": "endpoint", **{f"endpoint.{key}": value for key, value in changes.items()}})


def test_an_endpoint_decides_and_the_facts_say_so(work: Work, loopback: Loopback) -> None:
  facts = work.run(behind(loopback))
  duel = facts["duels"]["baseline"]
  assert duel["judge"] == f"judge-1 at {loopback.url}/v1"
  assert (duel["win"], duel["tie"], duel["loss"]) == pytest.approx((4 / 6, 2 / 6, 0))
  assert duel["net"]["low"] < 4 / 6 < duel["net"]["high"]
  assert len(loopback.asked) == 12
  assert work.speakers == ["m1"]  # No model judges.


def test_a_kill_costs_nothing_twice(work: Work, loopback: Loopback) -> None:
  c = behind(loopback)

  def dies(body: dict[str, Any]) -> Reply:
    return likes_crows(body) if len(loopback.asked) <= 5 else (400, {}, {"error": {"message": "no more credit"}})

  loopback.reply = dies
  with pytest.raises(ValueError, match="400.*no more credit"):
    work.run(c)
  assert len(loopback.asked) in (6, 7)
  loopback.reply, before = likes_crows, len(loopback.asked)
  facts = work.run(c)
  assert len(loopback.asked) == before + 12 - 5
  # Of all verdicts, those of the stopped process included.
  used = {"replies": 12, "tokens_in": 1200, "tokens_out": 84, "uncounted": 0, "cost": 0.084}
  assert facts["endpoint"] == {**used, "asked": 12}


@pytest.mark.parametrize("where", ["m1", "/weights/judge"])
def test_a_model_of_the_run_or_another_one_decides(work: Work, where: str) -> None:
  facts = work.run(settings(**{"evaluate.judge": where}), judge="judge" if "/" in where else "m1")
  assert facts["duels"]["baseline"]["judge"] == where and "endpoint" not in facts
  assert work.speakers == ["m1", "judge" if "/" in where else "m1"]
  assert facts["duels"]["baseline"]["win"] == pytest.approx(4 / 6)


def test_none_decides_nothing(work: Work) -> None:
  assert "duels" not in work.run(settings(**{"evaluate.grader": "none"}))


def planned(**changes: Any) -> dict[str, steps.Step]:
  c = config.base()
  c.update_from_flattened_dict(changes)
  return {step.folder: step for step in steps.plan(c, epath.Path("/w"), None)}


def test_a_judge_from_outside_is_imported_once_like_the_writer() -> None:
  found = planned(**{"evaluate.judge": "/weights/judge"})
  assert found["judge"].stage == "base" and found["judge"].config["base.path"] == "/weights/judge"
  assert found["judge"].config["base.kind"] == "hf" and found["writer"].config["base.path"] == ""
  judged = {name: step.inputs.get("judge") for name, step in found.items() if step.stage == "evaluate"}
  assert judged == {"eval/baseline": None, "eval/m1": "judge", "eval/m2": "judge", "eval/m3": "judge"}
  order = list(found)
  assert order.index("judge") < order.index("eval/m1")
  assert "judge" not in planned()


def test_the_endpoint_is_part_of_what_it_decides_alone() -> None:
  one = planned(**{"evaluate.grader": "endpoint", "endpoint.url": "https://a", "endpoint.model": "x"})
  two = planned(**{"evaluate.grader": "endpoint", "endpoint.url": "https://a", "endpoint.model": "y"})
  cheap = planned(
    **{"evaluate.grader": "endpoint", "endpoint.url": "https://a", "endpoint.model": "x", "endpoint.retries": 9}
  )
  decided = {"eval/m1", "eval/m2", "eval/m3", "analysis/classes"}
  assert {name for name in one if one[name].config != two[name].config} == decided
  assert all(one[name].config == cheap[name].config for name in one)


@pytest.mark.parametrize(
  ("changes", "workdir", "message"),
  [
    ({"evaluate.grader": "endpoint"}, "/w", r"endpoint\.url must be http"),
    ({"evaluate.grader": "endpoint", "endpoint.url": "https://a"}, "/w", r"endpoint\.model is not set"),
    (
      {"evaluate.grader": "endpoint", "endpoint.url": "https://a", "endpoint.model": "x"},
      "gs://bucket/w",
      r"gs://bucket/w/endpoint is remote.*--config\.endpoint\.cache=FOLDER",
    ),
    ({"evaluate.judge": "/nowhere/judge"}, "/w", r"evaluate\.judge=/nowhere/judge: there is no such file or folder"),
    ({"evaluate.grader": "endpoints"}, "/w", "'endpoints' is not a evaluate.grader. Did you mean 'endpoint'"),
  ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_any_work(
  changes: dict[str, Any], workdir: str, message: str
) -> None:
  c = config.base()
  c.update_from_flattened_dict({"base.path": __file__, "prompts.path": __file__, "data.trees": __file__, **changes})
  mesh = tiny_model.one_device()
  with pytest.raises(ValueError, match=message):
    todo = steps.plan(c, epath.Path(workdir), mesh)
    steps.check_start(c, epath.Path(workdir), mesh, todo)


def test_the_report_s_duels_name_the_judge() -> None:
  net = {"value": 0.1, "low": 0.0, "high": 0.2, "count": 2, "left_out": 0}
  found = {"win": 0.2, "tie": 0.7, "loss": 0.1, "net": net, "prompts": 2, "comparisons": 2, "unreadable": 0}
  spent = {"replies": 4, "tokens_in": 1200, "tokens_out": 84, "uncounted": 0, "cost": 0.5}
  facts = {"duels": {"m1": {**found, "judge": "judge-1 at https://host/v1"}}, "endpoint": spent}
  note = findings.duels_table({"m2": facts}, "endpoint").note
  assert "Decided by judge-1 at https://host/v1, each pair in both orders" in note
  assert "4 verdicts of the endpoint: 1,200 tokens in, 84 out, cost 0.50." in note
  facts = {"duels": {"m1": {**found, "judge": "m1"}}}
  assert "Decided by M1, each pair in both orders" in findings.duels_table({"m2": facts}, "judge").note
