"""The stages of the analysis: classes by a judge or the world, strata, the map; and how the report shows them."""

import json
import pathlib

from etils import epath
import jax
import numpy as np
import pytest
import tiny_model

from srlm_jax import artifacts, classes, config, finegrained, grading, modelstore, records, sampling, tables
from srlm_jax.stages import analyse, classify, embed

TEMPLATE = classes.Template(
  "Sort: {instruction} ({categories}; {lengths})", classes.Options(("a", "b"), ("short", "long")), "digest"
)
HOW = sampling.Sampling(temperature=0.0, top_p=1.0, max_new=40)


def prompt(name: str, text: str) -> records.Prompt:
  return records.Prompt(id=name, text=text, source="mine")


def test_each_prompt_is_asked_about_once_and_what_cannot_be_read_has_a_reason() -> None:
  def script(asked: str, sample: int) -> str | None:
    assert sample == 0
    if "fox" in asked:
      return None  # Cut by the length limit.
    return "No idea." if "dog" in asked else "Category: b\nComplexity: 3\nLength: short"

  judge = tiny_model.actor(script, max_length=200)
  prompts = [prompt("p0", "owl"), prompt("p1", "fox"), prompt("p2", "dog"), prompt("p3", "owl " * 300)]
  found = classify.ask(judge, prompts, TEMPLATE, HOW)
  assert [(one.prompt_id, one.category, one.complexity, one.length, one.reason) for one in found] == [
    ("p0", "b", 3, "short", ""),
    ("p1", None, None, None, "unfinished"),
    ("p2", None, None, None, "no_category"),
    ("p3", None, None, None, "too_long"),
  ]
  assert len(judge.asked) == 3 and any("Sort: owl (a, b; short, long)" in one for one in judge.asked)


class Run:
  """A work directory of the tiny world with two evaluated models."""

  TEXTS = ("Count from 3 to 5.", "Give me two birds.", "Count from 1 to 4 then give me two fish.")
  RIGHT = ("Sure! numbers: 3 4 5.", "Sure! birds: crow owl.", "Sure! numbers: 1 2 3 4. fish: cod eel.")

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = epath.Path(folder)
    self.settings = config.base()
    self.settings.world.enabled, self.settings.evaluate.grader = True, "oracle"
    self.made: dict[str, artifacts.Artifact] = {}
    seed = self.start("seed")
    seed.write_records("eval_prompts.jsonl", [prompt(f"p{n}", text) for n, text in enumerate(self.TEXTS)])
    example = [records.SFTExample(id=f"i{n}", kind="ift", prompt=f"Say {n}.", response="x") for n in range(9)]
    seed.write_records("ift.jsonl", example)
    seed.commit({})
    eft = self.start("eft")
    judged = [records.SFTExample(id="e", kind="eft", prompt=f"Judge {n} " * 3 * n, response="x") for n in range(1, 7)]
    eft.write_records("eft.jsonl", judged)
    eft.commit({})
    aift = self.start("aift1/prompts")
    aift.write_records("prompts-00000-of-00001.jsonl", [prompt(f"n{n}", f"Count to {n}.") for n in range(7)])
    aift.commit({})
    self.evaluate("baseline", ("Tea.", "Tea.", "Tea."))
    self.evaluate("m1", (self.RIGHT[0], "Tea.", self.RIGHT[2]))

  def start(self, name: str, **inputs: str) -> artifacts.Artifact:
    roles = {role.replace("_", " "): self.made[other] for role, other in inputs.items()}
    self.made[name] = artifacts.Artifact(self.folder / name, {}, roles)
    self.made[name].begin()
    return self.made[name]

  def evaluate(self, name: str, answers: tuple[str, ...]) -> None:
    made = self.start(f"eval/{name}")
    items = [
      records.Response(prompt_id=f"p{n}", prompt=self.TEXTS[n], sample=0, text=text, tokens=(2,), finished=True)
      for n, text in enumerate(answers)
    ]
    made.write_records("answers-00000-of-00001.jsonl", items)
    made.commit({})

  def analyse(self) -> None:
    classify.run(self.start("analysis/classes", seed="seed"), self.settings, tiny_model.one_device())
    for name, inputs in {"baseline": {}, "m1": {"against_baseline": "eval/baseline"}}.items():
      out = self.start(f"analysis/{name}", evaluation=f"eval/{name}", classes="analysis/classes", **inputs)
      analyse.run(out, self.settings)

  def facts(self, name: str) -> dict:
    return self.made[name].manifest()["facts"]


def test_the_world_s_own_classes_and_the_oracle_s_duels(tmp_path: pathlib.Path) -> None:
  run = Run(tmp_path)
  run.analyse()
  assert run.facts("analysis/classes")["counts"] == {"readable": 3}
  duels = run.facts("analysis/m1")["duels"]["baseline"]
  assert {name: (one["win"], one["tie"]) for name, one in duels["category"].items()} == {
    "list": (0.0, 1.0),
    "count": (1.0, 0.0),
    "list and count": (1.0, 0.0),
  }
  assert list(duels["complexity"]) == ["2", "3", "6"] and duels["length"]["one part"]["win"] == 0.5
  assert run.facts("analysis/baseline")["duels"] == {}
  assert run.facts("analysis/baseline")["characters"]["category"]["count"]["mean"] == 4.0
  assert json.loads(run.made["analysis/m1"].read_text("strata.json")) == run.facts("analysis/m1")


def test_a_judge_s_duels_are_read_from_the_evaluation(tmp_path: pathlib.Path) -> None:
  run = Run(tmp_path)
  out = run.start("eval/m2")
  for name in ("answers", "duels-baseline"):
    kind = records.Response if name == "answers" else records.Duel
    items = list(run.made["eval/m1"].read_shards("answers", records.Response))
    if kind is records.Duel:
      items = [records.Duel(prompt_id=f"p{n}", sample=0, outcome=outcome) for n, outcome in enumerate((-1, None, 0))]
    out.write_records(f"{name}-00000-of-00001.jsonl", items)
  out.commit({})
  run.settings.evaluate.grader = "judge"
  classify.run(run.start("analysis/classes", seed="seed"), run.settings, tiny_model.one_device())
  made = run.start("analysis/m2", evaluation="eval/m2", classes="analysis/classes", against_baseline="eval/baseline")
  analyse.run(made, run.settings)
  duels = run.facts("analysis/m2")["duels"]["baseline"]["category"]
  assert (duels["count"]["loss"], duels["list"]["unreadable"], duels["list and count"]["tie"]) == (1.0, 1, 1.0)


@pytest.fixture
def mapped(tmp_path: pathlib.Path) -> Run:
  """With M1, whose states make the map."""
  run = Run(tmp_path)
  modelstore.save(run.start("m1"), tiny_model.model(), tiny_model.words(), {})
  run.settings.model.update(dtype="float32", max_length=64, remat="none")
  run.settings.analysis.points = 6
  run.settings.generation.rows = 8
  return run


def make_map(run: Run, name: str, vectors: epath.Path | None = None) -> artifacts.Artifact:
  inputs = {"seed": "seed", "eft": "eft", "aift1": "aift1/prompts", **({} if vectors else {"model": "m1"})}
  out = run.start(name, **inputs)
  mesh = tiny_model.one_device()
  with jax.set_mesh(mesh):
    embed.run(out, run.settings, mesh, vectors)
  return out


def test_the_map_is_of_all_kinds_and_equal_on_every_run(mapped: Run) -> None:
  out = make_map(mapped, "analysis/map-m2")
  facts, found = out.manifest()["facts"], json.loads(out.read_text("map.json"))
  # The longest EFT prompts do not fit 64 tokens.
  assert facts["prompts"]["IFT"] == facts["prompts"]["AIFT1"] == 6 and 0 < facts["prompts"]["EFT"] < 6
  assert len(found["points"]) == len(found["ids"]) == sum(facts["prompts"].values())
  assert found["ids"][0].startswith("IFT-0000") and facts["dimensions"] == 16
  assert facts["vectors"] == "mean-pooled final hidden states of m1"
  again = make_map(mapped, "analysis/map-again")
  assert again.read_text("map.json") == out.read_text("map.json")


def test_another_encoder_s_vectors_need_no_model(mapped: Run) -> None:
  mapped.settings.analysis.points = 100
  names = [f"IFT-{n:06d}" for n in range(9)] + [f"EFT-{n:06d}" for n in range(6)] + [f"AIFT1-{n:06d}" for n in range(7)]
  path = mapped.folder / "mine.npz"
  np.savez(path, ids=names, vectors=np.random.default_rng(0).normal(size=(22, 8)))
  out = make_map(mapped, "analysis/map-m2-mine", path)
  assert out.manifest()["facts"]["prompts"] == {"IFT": 9, "EFT": 6, "AIFT1": 7}
  assert out.manifest()["facts"]["vectors"] == "mine.npz"
  assert [one.id for one in out.read("prompts.jsonl", records.Prompt)] == names


def test_a_sample_depends_on_the_seed_alone() -> None:
  texts = [str(n) for n in range(100)]
  one = embed.sampled("IFT", texts, 10, 0)
  assert one == embed.sampled("IFT", texts, 10, 0) != embed.sampled("IFT", texts, 10, 1)
  assert all(item.id == f"IFT-{int(item.text):06d}" for item in one) and len({item.id for item in one}) == 10
  assert len(embed.sampled("IFT", texts, 1000, 0)) == 100


def test_the_report_shows_what_is_there(mapped: Run) -> None:
  assert finegrained.parts(mapped.made) == []
  mapped.analyse()
  make_map(mapped, "analysis/map-m2")
  human = mapped.start("analysis/human-m1-baseline")
  estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 2, "left_out": 0}
  human.commit(
    {
      **{name: estimate for name in ("win", "tie", "loss", "net")},
      **{"model": "m1", "against": "baseline", "prompts": 3, "voted": 2, "no majority": 1},
      "answers": {name: mapped.made[f"eval/{name}"].digest() for name in ("m1", "baseline")},
      "agreement": {"pairwise": 0.5, "pairs": 2, "kappa": None},
      "annotators": [{"annotator": "A <b>", "win": 1, "tie": 0, "loss": 1, "left": 1}],
    }
  )
  found = {part.name: part for part in finegrained.parts(mapped.made)}
  assert list(found) == ["strata", "map", "human"]
  shown = {table.name: table for part in found.values() for table in part.tables}
  by_category = {row[0].text: row[1:] for row in shown["duels-category"].rows}
  assert shown["duels-category"].columns == ("", "instructions", "M1 over SFT baseline")
  assert by_category["count"][1].text == "100.0 : 0.0 : 0.0" and by_category["count"][1].small == "+100.0"
  assert [row[0].text for row in shown["lengths-length"].rows] == ["one part", "two parts"]
  assert shown["lengths-category"].columns == ("", "SFT baseline", "M1")
  assert shown["neighbours-m2"].columns == ("", "prompts", "IFT, %", "EFT, %", "AIFT1, %")
  assert shown["human-m1-baseline"].title == "M1 over SFT baseline"
  for part in found.values():
    for svg, caption in part.plots:
      assert svg.startswith("<svg ") and "var(--c1)" in svg and "data:" not in svg and caption
    for table in part.tables:
      assert tables.markdown(table).startswith("### ")


def test_other_answers_make_a_human_evaluation_stale(mapped: Run) -> None:
  facts = {"model": "m1", "against": "baseline", "answers": {"m1": "old"}, "annotators": [], "prompts": 1, "voted": 0}
  facts |= {name: None for name in ("win", "tie", "loss", "net")}
  mapped.start("analysis/human-m1-baseline").commit(
    {**facts, "no majority": 0, "agreement": {"pairwise": None, "pairs": 0, "kappa": None}}
  )
  [part] = finegrained.parts(mapped.made)
  assert part.tables[0].title == "M1 over SFT baseline, by answers that are no longer those of this run"


def test_oracle_duels_are_those_of_grading(tmp_path: pathlib.Path) -> None:
  """The whole of the strata is what the evaluate stage would have found."""
  run = Run(tmp_path)
  run.analyse()
  ours, theirs = (
    list(run.made[f"eval/{name}"].read_shards("answers", records.Response)) for name in ("m1", "baseline")
  )
  outcomes, _ = grading.grouped(grading.by_oracle(grading.align(ours, theirs)))
  wins = sum(outcome == 1 for group in outcomes for outcome in group)
  for strata in run.facts("analysis/m1")["duels"]["baseline"].values():
    assert round(sum(one["win"] * one["comparisons"] for one in strata.values())) == wins == 2
