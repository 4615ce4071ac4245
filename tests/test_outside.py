"""Benchmarks from outside: what a command is refused, and how the report shows the figures beside the paper's."""

import dataclasses
import json
from typing import Any

from etils import epath
import made_run
import pytest
import tiny_model

from srlm_jax import artifacts, config, outside, report, tables


def run_of(made: made_run.Run, model: str = "m2", **files: epath.Path) -> outside.Run:
  models = {name: made.made[name] for name in ("m0", "baseline", "m1", "m2")}
  return outside.Run(config.base(), made.folder, tiny_model.one_device(), models, model, files, made.folder)


def alpaca(win_rate: float, **more: Any) -> dict[str, Any]:
  return {
    **{"annotators": "weighted_alpaca_eval_gpt4_turbo", "reference": "gpt4_1106_preview", "instructions": 805},
    **{"judged": 803, "unreadable": 2, "win_rate": win_rate, "length_controlled_winrate": None, "avg_length": 1181},
    **more,
  }


def rated(value: float) -> dict[str, Any]:
  one = made_run.estimate(value, value - 0.5, value + 0.5)
  parts = ("all", "hard", "rest", "turn 1", "turn 2")
  categories = {"math": {"turn 1": one, "turn 2": made_run.estimate(None)}, made_run.EVIL: {"turn 1": one}}
  return {"judge": "m1", "asked": 160, "unreadable": 3, "means": dict.fromkeys(parts, one), "categories": categories}


@pytest.fixture
def made(tmp_path: epath.Path) -> made_run.Run:
  return made_run.whole_run(tmp_path)


def cells(table: tables.Table) -> list[list[str]]:
  return [[f"{cell.text} {cell.small}".strip() for cell in row] for row in table.rows]


def test_a_model_and_files_that_are_not_there_are_refused(made: made_run.Run, tmp_path: epath.Path) -> None:
  with pytest.raises(
    ValueError, match=r"'m3' is not a finished model of this work directory. Valid: m0, baseline, m1, m2"
  ):
    run_of(made, "m3")
  for flag in ("prompts", "references"):
    with pytest.raises(ValueError, match=rf"--{flag}=/nowhere: there is no such file"):
      run_of(made, **{flag: epath.Path("/nowhere")})
  assert run_of(made, out=epath.Path("/nowhere")).read == {}


def test_an_artifact_is_known_by_model_sampling_and_files(made: made_run.Run, tmp_path: epath.Path) -> None:
  path = epath.Path(tmp_path) / "prompts.json"

  def identity(text: str, model: str = "m2", **changes: Any) -> dict[str, Any]:
    path.write_text(text)
    run = run_of(made, model, prompts=path, references=path)
    run.settings.update(changes)
    found = run.artifact("x/answers", {"sampling": {"top_p": 0.9}}, ("prompts",))
    assert found.folder == made.folder / "outside" / "x" / "answers"
    return found.identity()

  one = identity("a")
  assert one == identity("a")
  assert one["config"]["sampling.top_p"] == 0.9 and "references (SHA-256)" not in one["config"]
  others = [identity("b"), identity("a", "m1"), identity("a", seed=1), identity("a", chat="plain")]
  assert one not in others and len({json.dumps(other) for other in others}) == 4


def test_figures_stand_beside_the_paper_s(made: made_run.Run) -> None:
  outside.save(run_of(made, "m1"), "alpaca_eval", alpaca(8.5))
  outside.save(run_of(made, "m2"), "alpaca_eval", alpaca(14.254, length_controlled_winrate=12.0))
  outside.save(run_of(made, "m2"), "mt_bench", rated(6.5))
  found = {table.name: table for table in outside.report_tables(made.made)}
  assert list(found) == ["alpaca-eval", "mt-bench", "mt-bench-categories"]
  judge = "weighted_alpaca_eval_gpt4_turbo, against gpt4_1106_preview"
  assert cells(found["alpaca-eval"]) == [
    ["M1", "8.50", "–", "1,181", "803 of 805", judge, "9.9", "1,092"],
    ["M2", "14.25", "12.00", "1,181", "803 of 805", judge, "15.4", "1,552"],
  ]
  mean = "6.50 [6.00, 7.00]"
  assert cells(found["mt-bench"]) == [["M2", *[mean] * 5, "3 of 160", "m1", "7.01", "4.05", "8.79"]]
  assert cells(found["mt-bench-categories"]) == [["math", mean, "–"], [made_run.EVIL, mean, "–"]]


def test_the_report_has_them_only_where_they_are(made: made_run.Run) -> None:
  settings = config.base()
  settings.evaluate.grader = "oracle"
  assert report._outside(made.made) == ()
  outside.save(run_of(made, "m2"), "mt_bench", rated(6.5))
  whole = report.collect(made.made, settings, [], "run")
  assert "outside" in [section.name for section in whole.sections]
  assert "6.50 \\[6.00, 7.00\\]" in report.markdown(whole) and "<script>alert" not in report.html(whole)


def test_figures_of_an_older_model_are_left_out_and_named(made: made_run.Run) -> None:
  outside.save(run_of(made, "m2"), "alpaca_eval", alpaca(14.0))
  newer = dataclasses.replace(made.made["m2"], config={"seed": 1})
  newer.commit({"steps": 1})
  found, older = outside.load({**made.made, "m2": dataclasses.replace(newer)}, "alpaca_eval")
  assert (found, older) == ({}, ["m2"])
  assert outside.alpaca_eval_table(found, older).note.endswith("Left out, as an older model's: M2.")


def test_a_damaged_file_is_said(made: made_run.Run) -> None:
  path = outside.save(run_of(made, "m2"), "mt_bench", rated(6.5))
  assert json.loads(path.read_text())["digest"] == artifacts.Artifact.digest(made.made["m2"])
  for changed in ("{", path.read_text().replace("6.5", "9.5", 1)):
    path.write_text(changed)
    with pytest.raises(ValueError, match=r"m2\.json is damaged .*delete it, and run the benchmark again"):
      list(outside.report_tables(made.made))
  path.write_text("[" * 5000)
  with pytest.raises(ValueError, match=r"m2\.json is damaged .*delete it, and run the benchmark again"):
    list(outside.report_tables(made.made))
