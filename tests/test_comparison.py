"""The comparison of runs: its figures, what it leaves out, runs that are not done, and what it refuses."""

from collections.abc import Callable
import pathlib
import re
from typing import Any

from absl import app, flags
from absl.testing import flagsaver
from etils import epath
import made_run
import pytest
import test_report

from srlm_jax import comparison, digests, main


def edit(folder: epath.Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
  """Changes the manifest of a made artifact in place."""
  path = folder / name / "manifest.json"
  manifest = digests.unseal(path.read_text())
  change(manifest)
  path.write_text(digests.sealed(manifest))


def two_runs(folder: epath.Path) -> list[comparison.Run]:
  """A whole run, and a shorter one of another configuration whose M1 is not measured yet."""
  long, short = made_run.whole_run(folder / "long"), made_run.whole_run(folder / "short")
  long.start("canaries/m2", model="m2").commit({"all": {"above": 0.125, "score": 1.0}})
  long.start("safety/m2", model="m2").commit({"refused_share": 0.5, "complied_share": None})
  for name in ("m2", "eval/m2", "eval/m1"):
    (short.folder / name / "manifest.json").unlink()

  def other(manifest: dict[str, Any]) -> None:
    manifest["config"] |= {"sft.lr": 0.1, "judge.rubric (SHA-256)": "c" * 64, "only.here": 1}
    manifest["made"]["seconds"], manifest["facts"]["steps"] = 75.0, 9

  edit(short.folder, "m1", other)
  edit(
    long.folder, "m1", lambda manifest: manifest["config"].update({"sft.lr": 0.3, "judge.rubric (SHA-256)": "d" * 64})
  )
  return [comparison.read(run.folder, name) for run, name in ((long, "runs/long"), (short, "runs/short"))]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> comparison.Comparison:
  return comparison.compare(two_runs(epath.Path(tmp_path_factory.mktemp("two"))))


def rows_of(found: comparison.Comparison) -> dict[str, dict[str, list[str]]]:
  """Table → first cell → the others, each with what stands behind it."""
  return {
    table.name: {cells[0].text: [f"{cell.text} {cell.small}".strip() for cell in cells[1:]] for cells in table.rows}
    for section in found.sections
    for table in section.tables
  }


def test_only_settings_that_differ_are_shown(found: comparison.Comparison) -> None:
  assert rows_of(found)["differences"] == {"judge.rubric (SHA-256)": ["d" * 12, "c" * 12], "sft.lr": ["0.3", "0.1"]}


def test_figures_stand_side_by_side_and_models_that_a_run_lacks_are_dashes(found: comparison.Comparison) -> None:
  rows = rows_of(found)
  assert rows["oracle"] == {
    "SFT baseline": ["2.00 [1.90, 2.10]"] * 2,
    "M1": ["2.50 [2.40, 2.60]", "–"],
    "M2": ["3.50 [3.40, 3.60]", "–"],
  }
  assert rows["pairwise"]["M2"] == ["82.0 [72.0, 92.0]", "–"]
  assert rows["duels"] == {
    "M1 over SFT baseline": ["30.0 : 25.0 net +5.0 [−10.0, +20.0]", "–"],
    "M2 over M1": ["48.0 : 13.1 net +34.9 [+30.1, +39.8]", "–"],
    "M2 over SFT baseline": ["60.0 : 10.0 net +50.0 [+40.0, +60.0]", "–"],
  }
  assert rows["growth"] == {"M1": ["× 1.25", "–"], "M2": ["× 1.40", "–"]}
  assert rows["cut"]["SFT baseline"] == ["50.0", "50.0"] and rows["full"]["SFT baseline"] == ["6.2", "6.2"]
  assert rows["canaries"] == {"M2": ["12.5", "–"]} and rows["refused"] == {"M2": ["50.0", "–"]}
  assert "complied" not in rows  # No run has it.


def test_sizes_times_and_what_is_not_done(found: comparison.Comparison) -> None:
  rows = rows_of(found)
  assert rows["sizes"]["pairs for M2"] == ["3", "3"] and rows["sizes"]["M1: steps"] == ["3", "9"]
  assert rows["times"]["m1"][1].startswith("1 min 15 s ")
  assert rows["times"]["m2"][1] == "–" and rows["times"]["m0"][0].split()[-1] == rows["times"]["m0"][1].split()[-1]
  assert rows["runs"]["not done yet"] == ["nothing that is known of", "eval/m1, eval/m2, m2"]
  assert rows["runs"]["models"] == ["M0, SFT baseline, M1, M2", "M0, SFT baseline, M1"]


def test_curves_lie_over_each_other(found: comparison.Comparison) -> None:
  drawn = next(section for section in found.sections if section.name == "curves").plots
  losses, margins, _ = (plot.svg for plot in drawn)
  assert [title in losses for title in ("M0", "SFT baseline", "M1", "M2")] == [True, True, True, False]
  assert "var(--c1)" in losses and "var(--c2)" in losses
  assert "M2" in margins and "var(--c1)" in margins and "var(--c2)" not in margins  # The short run has no M2.


def test_page_and_markdown_say_the_same(found: comparison.Comparison) -> None:
  page = test_report.Page(comparison.html(found))
  shown = [[[" ".join(cell.split()) for cell in row] for row in rows] for rows in page.tables.values()]
  assert shown == list(test_report.markdown_tables(comparison.markdown(found)))
  anchors = {fields.get("id") for _, fields in page.tags}
  links = {fields["href"] for tag, fields in page.tags if tag == "a"}
  assert len(links) > 6 and {link[1:] for link in links} <= anchors


def test_names_and_settings_are_escaped(tmp_path: pathlib.Path) -> None:
  folder = epath.Path(tmp_path)
  two_runs(folder)
  edit(folder / "long", "m1", lambda manifest: manifest["config"].update({"sft.lr": made_run.EVIL}))
  runs = [comparison.read(folder / "long", f"$x_ {made_run.EVIL}"), comparison.read(folder / "short", "_short")]
  found = comparison.compare(runs)
  page = test_report.Page(comparison.html(found))
  assert {"script", "img"} & {tag for tag, _ in page.tags} == set()
  assert not [name for _, fields in page.tags for name in fields if name.startswith("on")]
  assert sum(made_run.EVIL in text for text in page.texts) >= 5  # Heads of tables and the legend.
  assert "<script" not in comparison.markdown(found)


def test_a_report_says_what_a_run_still_lacks(tmp_path: pathlib.Path) -> None:
  run = made_run.whole_run(epath.Path(tmp_path))
  made = run.artifact()
  made.folder.mkdir()  # A report has no stage.json: it is made anew at every call.
  made.commit({"missing": ["m2", "aift2/prompts"]})  # It was made before M2 was.
  assert comparison.read(run.folder, "one").waiting == ("aift2/prompts",)


def test_a_run_of_which_nothing_is_finished_is_shown(tmp_path: pathlib.Path) -> None:
  begun = made_run.Run(epath.Path(tmp_path) / "begun")
  begun.start("m0")
  whole = made_run.whole_run(epath.Path(tmp_path) / "whole")
  rows = rows_of(comparison.compare([comparison.read(begun.folder, "begun"), comparison.read(whole.folder, "whole")]))
  assert rows["runs"]["not done yet"][0] == "m0" and rows["runs"]["models"][0] == "–"
  assert rows["oracle"]["M2"] == ["–", "3.50 [3.40, 3.60]"]


def test_what_cannot_be_compared_is_refused(tmp_path: pathlib.Path) -> None:
  folder = epath.Path(tmp_path)
  runs = two_runs(folder)
  with pytest.raises(ValueError, match="needs two runs or more, got 1"):
    comparison.compare(runs[:1])
  with pytest.raises(ValueError, match="names a run twice: runs/long, runs/long"):
    comparison.compare([runs[0], runs[0]])
  with pytest.raises(ValueError, match="nowhere is no work directory of a run"):
    comparison.read(folder / "nowhere", "nowhere")
  edit(folder / "long", "m1", lambda manifest: manifest.update(format=1))
  with pytest.raises(ValueError, match="long/m1 has artifact format 1, this version reads"):
    comparison.read(folder / "long", "long")
  (folder / "long" / "m1" / "manifest.json").write_text("{")
  with pytest.raises(ValueError, match="manifest.json is damaged"):
    comparison.read(folder / "long", "long")


def test_the_command_writes_the_page_and_its_markdown(tmp_path: pathlib.Path) -> None:
  two_runs(epath.Path(tmp_path))
  flags.FLAGS.mark_as_parsed()
  runs = [str(tmp_path / "long"), f"{tmp_path / 'short'}/"]
  with flagsaver.flagsaver(runs=runs, out=str(tmp_path / "new" / "compare.html")):
    main.main(["srlm", "compare"])
  assert "2 runs compared" in (tmp_path / "new" / "compare.html").read_text()
  assert "### Settings that differ" in (tmp_path / "new" / "compare.md").read_text()
  with flagsaver.flagsaver(runs=runs, out="compare.txt"):
    with pytest.raises(SystemExit, match=re.escape("srlm compare: --out=compare.txt: the page's name must end")):
      main.main(["srlm", "compare"])
  with flagsaver.flagsaver(runs=[], out="compare.html"), pytest.raises(app.UsageError, match="compare needs --runs"):
    main.main(["srlm", "compare"])
