"""The report, from artifacts written by hand: its tables, what it escapes, and what it says of unfinished runs."""

from collections.abc import Iterator
import dataclasses
import html.parser
import json
import re
from typing import Any

from etils import epath
import made_run
from ml_collections import config_dict
import pytest

from srlm_jax import artifacts, config, report, selection
from srlm_jax.stages import report as stage


def tiny_settings() -> config_dict.ConfigDict:
  settings = config.base()
  settings.evaluate.grader = "oracle"
  settings.judge.votes = 1
  return settings


class Page(html.parser.HTMLParser):
  """The tables of a page by their anchors, all its texts, and its tags with attributes."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.tables: dict[str, list[list[str]]] = {}
    self.texts: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self._rows: list[list[str]] | None = None
    self._in_cell = self._over = False
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    fields = dict(attrs)
    self.tags.append((tag, fields))
    if tag == "figure":
      self._rows = self.tables.setdefault(fields["id"], []) if "id" in fields else None
    if tag == "tr":
      self._over = fields.get("class") == "over"
    if self._rows is not None and tag == "tr" and not self._over:
      self._rows.append([])
    if self._rows is not None and tag in ("td", "th") and not self._over:
      self._rows[-1].append("")
      self._in_cell = True

  def handle_endtag(self, tag: str) -> None:
    if tag in ("td", "th"):
      self._in_cell = False

  def handle_data(self, data: str) -> None:
    self.texts.append(data)
    if self._in_cell and self._rows:
      self._rows[-1][-1] += data


def markdown_tables(text: str) -> Iterator[list[list[str]]]:
  """The tables of a Markdown text, without their rulers, unescaped."""
  for block in text.split("\n\n"):
    lines = [line for line in block.splitlines() if line.startswith("|")]
    if lines:
      cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if not line.startswith("| ---")]
      yield [[html.unescape(re.sub(r"\\(.)", r"\1", cell)).strip() for cell in row] for row in cells]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, Any]]:
  """report.html, report.md and the committed facts of a whole run."""
  run = made_run.whole_run(tmp_path_factory.mktemp("whole"))
  stage.run(run.artifact(), tiny_settings(), run.steps())
  made = artifacts.Artifact(run.folder / "report", {"seed": 0}, run.made)
  return made.read_text("report.html"), made.read_text("report.md"), made.manifest()["facts"]


def test_every_table_is_there_with_equal_figures_in_both_forms(written: tuple[str, str, dict[str, Any]]) -> None:
  page, text, _ = written
  found = Page(page).tables
  assert set(found) == {
    *(
      "claims",
      "following",
      "duels",
      "judging",
      "votes",
      "expected",
      "pairs",
      "oracle-pairs",
      "monitors",
      "health",
      "sizes",
      "deviations",
      "models",
    ),
    *(f"counts-{part}" for part in ("seed", "eft", "fine-tuning", "prompts", "responses", "judgements", "pairs")),
  }
  shown = [[[" ".join(cell.split()) for cell in row] for row in rows] for rows in found.values()]
  plain = [[[cell.removesuffix(" (paper)") for cell in row] for row in rows] for rows in markdown_tables(text)]
  assert plain == shown
  assert all(len(rows) > 1 for rows in shown)


def test_spikes_and_skipped_steps_are_shown_and_warned_of(tmp_path: epath.Path) -> None:
  run = made_run.Run(epath.Path(tmp_path))
  rows = [{"step": step, "loss": 1 + 0.01 * (step % 7), "skipped": float(step == 30)} for step in range(1, 61)]
  rows[29]["loss"], rows[39]["loss"] = None, 9.0
  run.model("m0", {"kind": "pretrain"}, rows)
  found = report.collect(run.made, config.base(), [], "run")
  section = next(one for one in found.sections if one.name == "training")
  assert [cell.text for cell in section.tables[0].rows[0]][1:4] == ["60", "1", "1"]
  assert any("the loss of step 40 is 9" in warning for warning in found.warnings)
  assert "Dotted lines" in section.plots[0].caption


def test_figures_stand_beside_the_paper_s(written: tuple[str, str, dict[str, Any]]) -> None:
  found = Page(written[0]).tables
  rows = {
    name: {row[0]: [" ".join(cell.split()) for cell in row[1:]] for row in table} for name, table in found.items()
  }
  assert rows["judging"]["pairwise accuracy, %"] == [
    *("50.0 [40.0, 60.0]", "80.0 [70.0, 90.0]", "82.0 [72.0, 92.0]"),
    *("65.1", "78.7", "80.4", "81.7", "26.6"),
  ]
  assert rows["duels"]["M2 over M1"] == [
    *("48.0", "38.9", "13.1", "+34.9 [+30.1, +39.8]", "2 on 2 prompts", "0"),
    *("55.5", "32.8", "11.7"),
  ]
  assert rows["following"]["M1"] == [
    *("2.50 [2.40, 2.60]", "50.0", "75.0", "25.0", "20.0", "30.0", "6.2", "1 of 2", "1,092")
  ]
  assert rows["sizes"]["IFT examples"] == ["7", "3,200"]
  assert rows["sizes"]["pairs for M2"] == ["3", "3,964"]
  assert rows["counts-pairs"]["no pair: all scores equal"] == ["2"]
  assert rows["counts-fine-tuning"]["eft left out: longer than 9 tokens"] == ["0", "5"]


def test_claims_follow_from_the_intervals(written: tuple[str, str, dict[str, Any]]) -> None:
  verdicts = {row[0]: row[3].removeprefix("●") for row in Page(written[0]).tables["claims"]}
  assert verdicts["M1 answers no worse than SFT baseline (win : loss, %)"] == "no difference seen"
  assert verdicts["M1 judges better than SFT baseline (pairwise accuracy, %)"] == "yes"
  assert verdicts["M2 answers better than M1 (win : loss, %)"] == "yes"
  assert verdicts["M2 judges better than M1 (pairwise accuracy, %)"] == "open: the intervals overlap"
  assert verdicts["M2's answers are longer than M1's (characters)"] == "yes, × 1.40"


def test_texts_of_models_are_escaped(written: tuple[str, str, dict[str, Any]]) -> None:
  page = Page(written[0])
  assert "script" not in {tag for tag, _ in page.tags}
  assert "img" not in {tag for tag, _ in page.tags}
  assert not [name for _, fields in page.tags for name in fields if name.startswith("on")]
  # Answers, votes, EFT prompts and unreadable votes all show the text itself.
  assert sum(made_run.EVIL in text for text in page.texts) >= 3 + 6 + 1 + 3
  assert "<script" not in written[1]


def test_nothing_is_fetched(written: tuple[str, str, dict[str, Any]]) -> None:
  page = Page(written[0])
  assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"} == set()
  for _, fields in page.tags:
    for name in ("src", "href", "xlink:href", "srcset", "action"):
      assert (fields.get(name) or "#").startswith("#")
  assert not re.search(r"url\((?!#)|@import", written[0])
  anchors = {fields.get("id") for _, fields in page.tags}
  assert {fields["href"][1:] for tag, fields in page.tags if tag == "a"} <= anchors


def test_the_committed_facts_hold_the_headline(written: tuple[str, str, dict[str, Any]]) -> None:
  facts = written[2]
  assert facts["headline"]["models"]["m2"] == {"oracle": 3.5, "pairwise": 0.82, "characters": 35.0}
  assert facts["headline"]["duels"]["m2 over m1"]["win"] == 0.48
  assert facts["summary"][0] == "M1 < M2 in oracle quality: yes (2.50 → 3.50 of 5)."
  assert facts["missing"] == []


def test_a_partial_run_gives_a_report(tmp_path: epath.Path) -> None:
  whole = made_run.whole_run(tmp_path)
  for name in ("eval/m2", "m2", "aift1/pairs", "aift1/judgements"):
    (whole.folder / name / "manifest.json").unlink()
  fresh = {name: dataclasses.replace(made) for name, made in whole.made.items()}
  out = artifacts.Artifact(whole.folder / "report", {"seed": 0}, fresh)
  stage.run(out, tiny_settings(), whole.steps())
  text = out.read_text("report.md")
  assert "> Not done yet: aift1/judgements, aift1/pairs, m2, eval/m2." in text
  assert "M1 over SFT baseline" in text and "M2 over" not in text
  whole.made["m2"].commit({"steps": 1, "parameters": 1, "tokenizer": "ab", "pairs": 3})
  stage.run(dataclasses.replace(out), tiny_settings(), whole.steps())  # More is done now: the report is made anew.
  assert json.loads((out.folder / "manifest.json").read_text())["facts"]["missing"] == [
    *("aift1/judgements", "aift1/pairs", "eval/m2")
  ]


def test_the_choice_of_checkpoints_is_shown(tmp_path: epath.Path) -> None:
  run = made_run.whole_run(tmp_path)
  curve = [selection.trial(step, step - 200, [[outcome]] * 4, 0) for step, outcome in ((200, 1), (400, -1))]
  run.made["m1"].manifest()["facts"]["selection"] = selection.facts(curve, 1, 600, "writer")
  found = report.collect(run.made, tiny_settings(), [], "run")
  (section,) = (section for section in found.sections if section.name == "selection")
  assert "M1: training stopped at step 400 of 600; the model is that of step 200 (judge: writer)." in section.text
  page = Page(report.html(found))
  assert [row[:3] for row in page.tables["checkpoints"][1:]] == [["M1", "200", "0"], ["M1", "400", "200"]]
  assert "M1: win − loss, %" in section.plots[0].svg


def test_nothing_finished_gives_a_report_that_says_so(tmp_path: epath.Path) -> None:
  run = made_run.Run(tmp_path)
  stage.run(run.artifact(), config.base(), run.steps("m0", "seed"))
  assert "Not done yet: m0, seed." in run.artifact().read_text("report.html")


def test_without_an_oracle_its_tables_are_left_out(tmp_path: epath.Path) -> None:
  run = made_run.whole_run(tmp_path)
  settings = tiny_settings()
  settings.evaluate.grader = "judge"
  found = report.collect(run.made, settings, [], "run")
  names = {table.name for section in found.sections for table in section.tables}
  assert "oracle-pairs" not in names and "pairs" in names
  assert all(answer.truth is None for exchange in found.heldout for answer in exchange.answers)


def test_another_configuration_is_refused(tmp_path: epath.Path) -> None:
  run = made_run.whole_run(tmp_path)
  run.made["m1"] = dataclasses.replace(run.made["m1"], config={"seed": 1})
  with pytest.raises(ValueError, match="was made with another configuration:\n  seed: 0 there, 1 here"):
    stage.run(run.artifact(), tiny_settings(), run.steps())


def test_deviations_are_the_settings_that_differ() -> None:
  settings = config.base()
  settings.name = "a name is no deviation"
  assert report.deviations_table(settings).rows == ()
  settings.dpo.beta, settings.sft.epochs, settings.generation.rows = 0.2, 3, 8
  rows = [[cell.text for cell in row] for row in report.deviations_table(settings).rows]
  assert rows == [
    ["dpo.beta", "paper", "0.1", "0.2"],
    ["sft.epochs", "ours", "2", "3"],
    ["generation.rows", "machine", "64", "8"],
  ]
  settings.reasons = {"dpo": {"beta": "because <it> must"}}
  rows = [[cell.text for cell in row] for row in report.deviations_table(settings).rows]
  assert rows[0] == ["dpo.beta", "paper", "0.1", "0.2", "because <it> must"]


def test_the_kinds_of_settings_name_settings_that_exist() -> None:
  known = artifacts.flatten(config.base().to_dict())
  for prefix in (*report.UNSTATED, *report.MACHINE):
    assert any(key == prefix or (prefix.endswith(".") and key.startswith(prefix)) for key in known), prefix


def test_time_is_the_sum_of_the_stages(tmp_path: epath.Path) -> None:
  run = made_run.whole_run(tmp_path)
  for made in run.made.values():
    made.manifest()["made"]["seconds"] = 30.0
  facts = dict(report.run_facts(run.made, tiny_settings(), 14))
  assert facts["time"] == "6 min 30 s"  # Thirteen of them.
  assert facts["steps done"] == "13 of 14"
