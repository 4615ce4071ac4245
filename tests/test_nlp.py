"""The NLP benchmarks: their file, what is not done again, and the table beside the paper's."""

import functools
import json
import pathlib
from typing import Any

from etils import epath
import jax
import lm_eval_tasks
import made_run
from ml_collections import config_dict
import pytest
import tiny_model

from srlm_jax import (
  artifacts,
  config,
  digests,
  llama,
  mesh as mesh_lib,
  modelstore,
  nlp,
  nlp_results,
  paper,
  report,
  tables,
)


def how(**changes: Any) -> nlp_results.How:
  fields = dict(shots=0, chat="", add_bos=True, limit=0, max_length=128, lm_eval="0.4.13", seed=0)
  return nlp_results.How(**{**fields, **changes})


def result(metrics: dict[str, float | None], **changes: Any) -> nlp_results.Result:
  asked = how(**changes)
  return nlp_results.Result(how=asked, shots=asked.shots, documents=9, version="1.0", metrics=metrics)


PIQA = {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.625, "acc_norm_stderr,none": 0.0123}
GSM8K = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": None, "exact_match,flexible-extract": 0.5}


def rows(table: tables.Table) -> list[list[str]]:
  return [[f"{cell.text} {cell.small}".strip() for cell in row] for row in table.rows]


def test_the_table_stands_beside_the_paper_s() -> None:
  tasks = {"own": result({"word_perplexity,none": 12.5}), "gsm8k": result(GSM8K, shots=8), "piqa": result(PIQA)}
  other = {"piqa": result(PIQA | {"acc_norm,none": 0.5}, chat="llama2", limit=100)}
  measured = {
    "m1": nlp_results.Results(model="m1", digest="a", tasks=tasks),
    "m2": nlp_results.Results(model="m2", digest="b", tasks=other),
  }
  table = nlp_results.table(measured, ["m3"])
  assert table.columns[1:4] == ("metric", "M1", "M2") and table.paper == (4, 5, 6, 7, 8)
  assert rows(table) == [
    ["PIQA 0-shot", "acc_norm", "62.5 ± 1.2", "–", "82.8", "82.6", "82.9", "81.9", "80.8"],
    [
      *("PIQA 0-shot, chat template llama2, the first 100 documents", "acc_norm", "–", "50.0 ± 1.2"),
      *("82.8", "82.6", "82.9", "81.9", "80.8"),
    ],
    ["GSM8K 8-shot", "exact_match, strict-match", "25.0", "–", "56.8", "50.7", "60.3", "59.3", "57.7"],
    ["own 0-shot", "word_perplexity", "12.500", "–", "–", "–", "–", "–", "–"],
  ]
  assert table.note.endswith("Left out, as they are an older model's: M3.")


def test_the_paper_s_tasks_have_shots_and_titles() -> None:
  assert list(paper.NLP) == list(nlp_results.TITLES) and set(paper.NLP) == set(config.base().nlp.tasks)
  assert {task for task, shots in config.base().nlp.tasks.items() if shots} == {"gsm8k", "mmlu"}
  assert all(list(known) == ["m0", "baseline", "m1", "m2", "m3"] for known in paper.NLP.values())


def test_the_report_shows_the_models_own_results_alone(tmp_path: pathlib.Path) -> None:
  run = made_run.whole_run(tmp_path)

  def names() -> set[str]:
    found = report.collect(run.made, config.base(), [], "run")
    return {table.name for section in found.sections for table in section.tables}

  assert "nlp" not in names()
  model = run.made["m1"]
  nlp_results.write(model, nlp_results.Results(model="m1", digest=model.digest(), tasks={"piqa": result(PIQA)}))
  nlp_results.write(run.made["m2"], nlp_results.Results(model="m2", digest="other", tasks={"piqa": result(PIQA)}))
  assert "nlp" in names()
  (table,) = nlp_results.report_tables(run.made)
  assert table.columns[2:4] == ("M1", "Llama 2 70B") and rows(table)[0][2] == "62.5 ± 1.2"
  assert "older model's: M2." in table.note
  assert nlp_results.read(model).tasks["piqa"].metrics == PIQA and nlp_results.read(run.made["m2"]).tasks == {}
  written = nlp_results.path(model).read_text()
  nlp_results.path(model).write_text(written.replace("0.625", "0.725", 1))
  assert nlp_results.path(model).read_text() != written
  with pytest.raises(ValueError, match=r"m1\.json is damaged \(its content does not fit its seal\): delete it"):
    nlp_results.read(model)
  nlp_results.path(model).write_text(digests.sealed({"model": "m1", "digest": 3}))
  with pytest.raises(ValueError, match=r"m1\.json cannot be used \(digest: .*delete it"):
    report.collect(run.made, config.base(), [], "run")


def settings_for(folder: pathlib.Path) -> config_dict.ConfigDict:
  settings = config.base()
  settings.model.max_length, settings.model.dtype = tiny_model.CONFIG.max_length, "float32"
  settings.nlp.include_path, settings.nlp.rows = str(folder), 8
  settings.nlp.tasks = config_dict.ConfigDict({"own_choice": 1, "own_group": 0})
  settings.mesh.fsdp, settings.mesh.tensor, settings.mesh.data = 2, 2, 2
  return settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[artifacts.Artifact, pathlib.Path]:
  """A model of a work directory, and a folder of tasks."""
  pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[eval]'")
  root = tmp_path_factory.mktemp("nlp")
  return made(root, tiny_model.model()), lm_eval_tasks.write(root / "tasks")


def made(root: pathlib.Path, weights: llama.Llama) -> artifacts.Artifact:
  artifact = artifacts.Artifact(epath.Path(root / "m1"), {}, {})
  artifact.begin()
  modelstore.save(artifact, weights, tiny_model.words(), {})
  return artifact


def test_a_run_writes_its_results_and_goes_on_from_them(
  saved: tuple[artifacts.Artifact, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
  model, folder = saved
  settings = settings_for(folder)
  mesh = mesh_lib.make_mesh(**settings.mesh)
  calls: list[tuple[list[str], int | None]] = []
  ask = nlp._evaluate

  def evaluate(lm: Any, manager: Any, tasks: list[str], shots: int | None, settings: Any) -> Any:
    calls.append((tasks, shots))
    return ask(lm, manager, tasks, shots, settings)

  monkeypatch.setattr(nlp, "_evaluate", evaluate)
  with jax.set_mesh(mesh):
    nlp.run(model, settings, mesh)
    assert calls == [(["own_choice"], 1), (["own_group"], 0)]
    tasks = json.loads(nlp_results.path(model).read_text())["tasks"]
    assert nlp_results.path(model) == model.folder.parent / "outside" / "nlp" / "m1.json"
    choice, group = tasks["own_choice"], tasks["own_group"]
    assert (choice["shots"], choice["documents"], choice["version"]) == (1, len(lm_eval_tasks.CHOICES), "1.5")
    assert 0 <= choice["metrics"]["acc,none"] <= 1 and choice["metrics"]["acc_stderr,none"] > 0
    assert group["parts"].keys() == {"own_answer", "own_short_answer"} and group["documents"] == 8
    assert "exact_match,none" in group["metrics"] and group["version"] == "2"
    monkeypatch.setattr(nlp, "_model", lambda *_: pytest.fail("all is there already"))
    assert nlp.run(model, settings, mesh).tasks.keys() == tasks.keys()
    monkeypatch.undo()
    monkeypatch.setattr(nlp, "_evaluate", evaluate)
    settings.nlp.limit = 2
    found = nlp.run(model, settings, mesh, ["own_choice", "own_text"])
  assert calls[2:] == [(["own_choice"], 1), (["own_text"], None)]  # Asked in another way; a task with shots of its own.
  assert found.tasks["own_choice"].documents == found.tasks["own_text"].documents == 2
  assert found.tasks["own_group"].documents == 8 and found.tasks["own_text"].metrics["word_perplexity,none"] > 1


def test_other_weights_are_asked_again(saved: tuple[artifacts.Artifact, pathlib.Path], tmp_path: pathlib.Path) -> None:
  other = made(tmp_path, tiny_model.model(1))
  before = nlp_results.Results(model="m1", digest=saved[0].digest(), tasks={"piqa": result(PIQA)})
  nlp_results.write(other, before)
  assert nlp_results.read(other).tasks == {}
  nlp_results.write(other, before.model_copy(update={"digest": other.digest()}))
  assert nlp_results.read(other).tasks.keys() == {"piqa"}


def test_changed_tasks_of_one_s_own_are_others(tmp_path: pathlib.Path) -> None:
  settings = config.base()
  settings.nlp.include_path = str(tmp_path)
  (tmp_path / "mine.yaml").write_text("task: mine")
  one = nlp.how_to_ask(settings, "mine")
  assert one == nlp.how_to_ask(settings, "mine") != nlp.how_to_ask(config.base(), "mine")
  (tmp_path / "mine.yaml").write_text("task: mine # other")
  assert one != nlp.how_to_ask(settings, "mine")


@pytest.mark.parametrize(
  ("changes", "tasks", "message"),
  [
    ({"nlp.include_path": "/nowhere"}, ["own_choice"], "nlp.include_path=/nowhere: there is no such folder"),
    ({"nlp.rows": 0}, ["own_choice"], "nlp.rows=0, limit=0"),
    ({"nlp.limit": -1}, ["own_choice"], "limit=-1"),
    ({"nlp.tasks": config_dict.ConfigDict()}, [], "no tasks: name some with --tasks"),
  ],
)
def test_what_cannot_be_asked_is_said_before_any_work(
  changes: dict[str, Any], tasks: list[str], message: str, saved: tuple[artifacts.Artifact, pathlib.Path]
) -> None:
  settings = settings_for(saved[1])
  for key, value in changes.items():
    setattr(settings.nlp, key.removeprefix("nlp."), value)
  with pytest.raises(ValueError, match=message):
    nlp.run(saved[0], settings, mesh_lib.make_mesh(), tasks)


@pytest.mark.slow  # It reads all tasks that lm-eval brings.
def test_the_paper_s_tasks_are_lm_eval_s_and_others_are_refused(saved: tuple[artifacts.Artifact, pathlib.Path]) -> None:
  manager = nlp.task_manager("", list(config.base().nlp.tasks))
  assert set(config.base().nlp.tasks) <= set(manager.all_tasks)
  with pytest.raises(ValueError, match="'arc_esay' is not a task of lm-eval. Did you mean 'arc_easy'"):
    nlp.task_manager("", ["arc_esay"])
  with pytest.raises(ValueError, match="'ai2_arc' is a tag of lm-eval"):
    nlp.task_manager("", ["ai2_arc"])


def test_a_name_that_is_no_task_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """With tasks of one's own alone: lm-eval's thousands take long to read."""
  tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install -e '.[eval]'")
  monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
  folder = lm_eval_tasks.write(tmp_path / "tasks")
  with (folder / "own_text.yaml").open("a") as file:
    file.write("tag: own_tag\n")
  with pytest.raises(
    ValueError, match="'own_txet' is not a task of lm-eval. Did you mean 'own_text'.* `lm-eval ls tasks`"
  ):
    nlp.task_manager(str(folder), ["own_text", "own_txet"])
  with pytest.raises(ValueError, match="'own_tag' is a tag of lm-eval, not a task: name the tasks that it stands for"):
    nlp.task_manager(str(folder), ["own_tag"])


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(nlp.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"lm-eval, which is not installed: pip install -e '\.\[eval\]'"):
    nlp.check(config.base(), [])


def test_data_that_cannot_be_fetched_is_one_message(
  saved: tuple[artifacts.Artifact, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
  import lm_eval

  def offline(**_: Any) -> None:
    raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)")

  monkeypatch.setattr(lm_eval, "simple_evaluate", offline, raising=False)
  with pytest.raises(ValueError, match="the data of own_choice could not be fetched .*HF_HOME.*nlp.include_path"):
    nlp._evaluate(None, None, ["own_choice"], 0, settings_for(saved[1]))
