"""The command line: what it refuses, what it shows, and that a run stops where it breaks and goes on from there."""

from collections.abc import Iterator, Sequence
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import types

from absl import app, flags, logging as absl_logging
from absl.testing import flagsaver
from etils import epath
import jax
from jax.experimental import topologies
import pytest
import tiny_model

from srlm_jax import artifacts, commands, config, endings, human_eval, main, modelstore, records, steps, templates
from srlm_jax.stages import report as report_stage

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = f"{ROOT / 'configs' / 'tiny.py'}:smoke"


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
  """Flags and logging as they were: main sets up both for a whole program."""
  ours, verbosity = logging.getLogger("srlm_jax"), absl_logging.get_verbosity()
  kept = ours.handlers, ours.propagate, ours.level
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver():
    yield
  ours.handlers, ours.propagate = kept[:2]
  ours.setLevel(kept[2])
  absl_logging.set_verbosity(verbosity)


def srlm(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "srlm_jax.main", *arguments],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_stages_are_shown() -> None:
  found = srlm("stages", f"--config={SMOKE}", "--config.models=2")
  assert found.returncode == 0, found.stderr
  rows = [re.split(r"\s{2,}", line.strip()) for line in found.stdout.splitlines()]
  assert [row[0] for row in rows] == [
    "world", "m0", "seed", "baseline", "eval/baseline", "canaries/baseline", "eft", "m1", "eval/m1", "canaries/m1",
    "aift1/prompts", "aift1/responses", "aift1/judgements", "aift1/pairs", "m2", "eval/m2", "canaries/m2",
    "analysis/classes", "analysis/baseline", "analysis/m1", "analysis/m2", "analysis/map-m2", "report",
  ]  # fmt: skip
  assert rows[0][1:] == ["world", "from nothing"] and rows[7][1:] == ["sft", "from m0, seed, eft"]
  assert rows[14][1:] == ["dpo", "from m1, aift1/pairs"]


def test_a_misspelt_stage_ends_the_program_with_a_suggestion() -> None:
  found = srlm("jugde", f"--config={SMOKE}", "--workdir=nowhere")
  assert found.returncode == 2 and not (ROOT / "nowhere").exists()
  output = found.stdout + found.stderr
  assert "'jugde' is not a stage. Did you mean 'judge'?" in output and "Traceback" not in output
  assert "usage: srlm STAGE --config=FILE" in output


WRONG_FLAGS = {
  "--config=configs/nowhere.py": "srlm: --config: [Errno 2] No such file or directory: 'configs/nowhere.py'",
  "--config=configs/tiny.py:smoker": "srlm: configs/tiny.py:smoker: the variants are none and 'smoke'.",
  "--config.dpoo.beta=1": """srlm: the configuration has no key 'dpoo'. Did you mean "dpo" instead of "dpoo"?""",
  "--config.dpo.betta=1": """srlm: the configuration has no key 'betta'. Did you mean "beta" instead of "betta"?""",
  "--config.nonsense=1": "srlm: the configuration has no key 'nonsense'.",
  "--config.dpo.learning_rate=1": "srlm: the configuration has no key 'learning_rate'.",
  "--config=configs": "srlm: --config: [Errno 21] Is a directory: 'configs'",
  "--config=": "srlm: --config: Path to config file is an empty string.",
  "--config=README.md": "srlm: --config: README.md, line 31: invalid character '…' (U+2026). It must be a Python file.",
  "--config.judge.votes=2.5": "srlm: flag --config.judge.votes=2.5: invalid literal for int() with base 10: '2.5'",
  "--config.dpo.beta=x": "srlm: flag --config.dpo.beta=x: could not convert string to float: 'x'",
  "--wrokdir=w": "srlm: Unknown command line flag 'wrokdir'. Did you mean: workdir ?",
}


def test_a_wrong_flag_ends_the_program_in_a_sentence_and_help_is_none() -> None:
  each = (  # A process for each, of one that has imported everything already: flags are read once in a process.
    "import os, sys\nfrom absl import app\nfrom srlm_jax import main\n"
    "app.define_help_flags()\n"
    "smoke, *wrong = sys.argv[1:]\n"
    "for flag in wrong:\n"
    "  if not (child := os.fork()):\n"
    "    file = [] if flag.startswith('--config=') else [f'--config={smoke}']\n"
    "    sys.argv = ['srlm', 'stages', *file, flag]\n"
    "    main._parse(sys.argv)\n"
    "  print('code', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)\n"
  )
  flags = [*WRONG_FLAGS, "--help"]
  done = subprocess.run([sys.executable, "-c", each, SMOKE, *flags], cwd=ROOT, capture_output=True, text=True)
  said = [line for line in done.stderr.splitlines() if line.startswith(("srlm: ", "code "))]
  assert said == [*(line for message in WRONG_FLAGS.values() for line in (message, "code 2")), "code 0"]


PRINTS = """
import os, sys
from srlm_jax import main
read, write = os.pipe()
os.close(read)
full = os.open("/dev/full", os.O_WRONLY)

def run(name, nowhere, stream, *arguments):
  if not (child := os.fork()):
    os.dup2(nowhere, stream)
    sys.argv = ["srlm", *arguments]
    main.run()
  print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)

smoke = "--config=configs/tiny.py:smoke", "--compilation_cache="
for name, nowhere in (("pipe", write), ("full", full)):
  run(f"{name}, help", nowhere, 1, "--help")
  run(f"{name}, stages", nowhere, 1, "stages", *smoke)
  run(f"{name}, error in a flag", nowhere, 2, "stages", "--config=nowhere.py")
  run(f"{name}, error in a stage", nowhere, 2, "report", "--workdir=/nowhere", *smoke)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_where_nobody_can_read_what_is_printed(unbuffered: str) -> None:
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": unbuffered}
  done = subprocess.run([sys.executable, "-c", PRINTS], cwd=ROOT, env=environment, capture_output=True, text=True)
  full = "the disk is full: [Errno 28] No space left on device. Make room. The same command goes on from here."
  assert done.stderr.splitlines() == [
    *("pipe, help 141", "pipe, stages 141", "pipe, error in a flag 2", "pipe, error in a stage 2"),
    *(f"srlm: {full}", "full, help 74", f"srlm stages: {full}", "full, stages 74"),
    *("full, error in a flag 2", "full, error in a stage 2"),
  ]


@pytest.mark.parametrize(
  ("argv", "values", "message"),
  [
    ([], {}, "exactly one stage is wanted, got none"),
    (["judge", "pairs"], {}, "exactly one stage is wanted, got judge pairs"),
    (["judge"], {}, "--config is missing: a file such as configs/tiny.py"),
    (["judge"], {"config": SMOKE}, "--workdir is missing"),
    (["judge"], {"config": SMOKE, "workdir": ""}, "--workdir is missing"),
    (["judge"], {"config": SMOKE, "workdir": "w", "compilation_cache": __file__}, "is a file: name a folder, or"),
    (["plan"], {"config": SMOKE}, "plan needs --topology"),
    (["human-eval"], {"config": SMOKE, "workdir": "w", "model": "m2"}, "human-eval needs --model and --against"),
    (["human-eval-read"], {"key": "page.key.json"}, "human-eval-read needs --key"),
    (["evaluation"], {}, "'evaluation' is not a stage. Did you mean 'evaluate'?"),
    (["export"], {"config": SMOKE, "workdir": "w", "model": "m1"}, "export needs --model, a finished model, and --out"),
    (["reward"], {"config": SMOKE, "workdir": "w"}, "reward needs --model: a finished model, endpoint, or"),
    (["evaluate", "mtbench"], {}, "'evaluate mtbench' is not a stage. Did you mean 'evaluate mt-bench'?"),
    (["evaluate", "mt-bench", "m2"], {}, "exactly one stage is wanted, got evaluate mt-bench m2"),
    (["evaluate", "mt-bench"], {"config": SMOKE, "workdir": "x"}, "evaluate mt-bench needs --model and --prompts: MT"),
    (
      ["export", "alpaca-eval"],
      {"config": SMOKE, "workdir": "x", "model": "m1", "prompts": "x"},
      "needs --out: answer",
    ),
  ],
)
def test_what_is_missing_is_said(argv: list[str], values: dict[str, str], message: str) -> None:
  with flagsaver.as_parsed(**values), pytest.raises(app.UsageError, match=re.escape(message)):
    main.main(["srlm", *argv])


@pytest.mark.parametrize("stage", main._READERS)
def test_what_reads_a_run_refuses_a_folder_without_one(stage: str, tmp_path: pathlib.Path) -> None:
  key, page = str(tmp_path / "page.key.json"), str(tmp_path / "page.html")
  values = {"model": "m1", "against": "m0", "out": page, "prompts": key, "key": key, "votes": key}
  (tmp_path / "empty").mkdir()
  for name in ("empty", "nowhere"):
    told = f"srlm {stage}: {tmp_path / name} is no work directory of a run (no folder in it has a stage.json): give its"
    with flagsaver.as_parsed(config=SMOKE, workdir=str(tmp_path / name), compilation_cache="", **values):
      with pytest.raises(endings.Ended, match=re.escape(told)) as ended:
        main.main(["srlm", *stage.split()])
    assert ended.value.code == endings.REFUSED
  assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_an_error_in_the_configuration_is_one_sentence(tmp_path: pathlib.Path) -> None:
  for stage in ("all", "stages"):
    with flagsaver.as_parsed(config=SMOKE, workdir=str(tmp_path), compilation_cache=""):
      flags.FLAGS["config"].value.prompts.writer = "nobody"
      with pytest.raises(SystemExit, match=f"srlm {stage}: 'nobody' is not a prompts.writer"):
        main.main(["srlm", stage])


def test_a_stage_that_the_configuration_lacks_is_an_error(tmp_path: pathlib.Path) -> None:
  with flagsaver.as_parsed(config=str(ROOT / "configs" / "m1.py"), workdir=str(tmp_path), compilation_cache=""):
    with pytest.raises(SystemExit, match="srlm dpo: this configuration has no such step"):
      main.main(["srlm", "dpo"])


THERE = {"base.path": __file__, "prompts.path": __file__, "data.trees": __file__}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, r"base\.path is not set: give --config\.base\.path=PATH\."),
    ({"base.path": "/nowhere"}, r"base\.path=/nowhere: there is no such file or folder\."),
    ({"base.path": __file__}, r"prompts\.path is not set: give .* Its model judges checkpoints, too"),
    ({"base.path": __file__, "prompts.writer": "m0"}, r"prompts\.path is not set: .* \(select\.judge; 'none' makes no"),
    ({**THERE, "select.path": "/nowhere"}, r"select\.path=/nowhere: there is no such file"),
    ({**THERE, "data.trees": ""}, r"data\.trees is not set"),
    ({**THERE, "eft.writer": "annotators"}, r"data\.judgements is not set"),
    ({**THERE, "base.kind": "random"}, r"tokenizer is not set"),
    ({**THERE, "sft.batch": 12}, r"sft\.batch=12 does not divide among 8 devices"),
    ({**THERE, "evaluate.grader": "oracle"}, r"evaluate\.grader='oracle' grades the tiny world alone"),
  ],
)
def test_what_a_run_lacks_is_said_before_any_work(
  changes: dict[str, object], message: str, tmp_path: pathlib.Path
) -> None:
  settings = config.base()
  settings.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    main.run_steps(settings, epath.Path(tmp_path / "run"), "all")
  assert not (tmp_path / "run").exists()


def test_the_content_of_a_file_is_part_of_the_configuration(tmp_path: pathlib.Path) -> None:
  settings, rubric = config.base(), tmp_path / "mine.txt"
  settings.judge.rubric, settings.data.trees = str(rubric), str(tmp_path / "trees.jsonl")

  def configs(text: str) -> dict[str, dict]:
    templates._load.cache_clear()
    rubric.write_text(f"{text} {{instruction}} {{response}}")
    (tmp_path / "trees.jsonl").write_text(text)
    return {step.folder: step.config for step in steps.plan(settings, epath.Path("w"), None)}

  one, two = configs("one"), configs("two")
  assert {folder for folder in one if one[folder] != two[folder]} == {
    *("seed", "eft", "aift1/judgements", "aift2/judgements"),
    *(f"{stage}/{name}" for stage in ("eval", "canaries") for name in ("baseline", "m1", "m2", "m3")),
  }


def test_export_says_how_to_serve_the_model(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  saved = artifacts.Artifact(epath.Path(tmp_path / "m1"), {}, {})
  saved.begin()
  modelstore.save(saved, tiny_model.model(), tiny_model.words(), {})
  monkeypatch.setattr(steps, "plan", lambda *_: [])
  monkeypatch.setattr(steps, "artifacts_of", lambda *_: {"m1": saved})
  caplog.set_level(logging.INFO, logger="srlm_jax")
  main.export(config.base(), epath.Path(tmp_path), "m1", str(tmp_path / "out"))
  name = f"m1-{saved.digest()[:12]}"
  assert caplog.messages[-1].endswith(
    f": vllm serve {tmp_path}/out --served-model-name {name} --generation-config vllm"
  )
  with pytest.raises(ValueError, match=r"'m9' is not a finished model of this work directory\..* Valid: m1"):
    main.export(config.base(), epath.Path(tmp_path), "m9", str(tmp_path / "other"))
  assert not (tmp_path / "other").exists()
  monkeypatch.setattr(steps, "plan", lambda *_: [steps.Step("m2", "dpo", {}, {}, lambda out: None)])
  (tmp_path / "eval" / "m1").mkdir(parents=True)
  (tmp_path / "eval" / "m1" / "stage.json").write_text("{}")
  (tmp_path / "file").write_text("")
  before = sorted(tmp_path.rglob("*"))
  for name, message in {
    ".": rf"--out={tmp_path} holds what runs have made \({tmp_path}/eval/m1, …\): name a new folder, there or else",
    "eval": rf"--out={tmp_path}/eval holds what runs have made",
    "m1": rf"--out={tmp_path}/m1: {tmp_path}/m1 is a run's own, and nothing else may write there. Give another --out",
    "m1/weights/hf": rf"--out={tmp_path}/m1/weights/hf: {tmp_path}/m1 is a run's own",
    "m2": rf"--out={tmp_path}/m2: {tmp_path}/m2 is a run's own",  # It is still to be made.
    "file": rf"{tmp_path}/file: {tmp_path}/file is a file\. Give another --out",
  }.items():
    with pytest.raises(ValueError, match=message):
      main.export(config.base(), epath.Path(tmp_path), "m1", str(tmp_path / name))
  assert sorted(tmp_path.rglob("*")) == before
  main.export(config.base(), epath.Path(tmp_path), "m1", str(tmp_path / "an export"))
  assert f": vllm serve '{tmp_path}/an export' --served-model-name" in caplog.messages[-1]


@pytest.mark.parametrize(
  ("stage", "suffix"), [("reward", "json"), ("compare", "html"), ("human-eval", "html"), ("export alpaca-eval", "json")]
)
def test_no_command_writes_into_an_artifact(
  stage: str, suffix: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  names = ("eval/m1", "eval/m2", "report")
  planned = [steps.Step(name, "report" if name == "report" else "evaluate", {}, {}, lambda out: None) for name in names]
  monkeypatch.setattr(steps, "plan", lambda *_: planned)
  for name in names[:2]:
    made = artifacts.Artifact(epath.Path(tmp_path / name), {}, {})
    made.begin()
    made.commit({})
  (tmp_path / f"folder.{suffix}").mkdir()
  values = {"model": "m1", "against": "m2", "prompts": __file__, "runs": str(tmp_path), "workdir": str(tmp_path)}
  for out, message in {
    f"eval/m1/x.{suffix}": f"--out=OUT: {tmp_path}/eval/m1 is a run's own, and nothing else may write there.",
    f"report/x.{suffix}": f"--out=OUT: {tmp_path}/report is a run's own",
    f"folder.{suffix}": "--out=OUT is a folder: name a file in it.",
  }.items():
    place = str(tmp_path / out)
    with flagsaver.as_parsed(config=SMOKE, out=place, compilation_cache="", **values):
      with pytest.raises(endings.Ended, match=re.escape(f"srlm {stage}: {message.replace('OUT', place)}")) as ended:
        main.main(["srlm", *stage.split()])
    assert ended.value.code == endings.REFUSED


def test_stages_of_a_file_in_place_of_a_folder_are_none(tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"file/run: .*/file is a file\. Give another --workdir\."):
    main.show_steps(config.base(), epath.Path(tmp_path / "file" / "run"))


def test_a_plan_that_cannot_be_made_names_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
  settings = config.base()
  settings.base.size = "llama2_8b"
  with flagsaver.flagsaver(topology="v5p:2x2x1"), pytest.raises(ValueError, match="'llama2_8b' is not a model size"):
    main.show_plan(settings)
  settings.base.size, settings.mesh.tensor = "llama2_7b", 3
  four = types.SimpleNamespace(devices=jax.devices()[:4])
  monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: four)  # Without libtpu.
  monkeypatch.setattr(os, "environ", dict(os.environ))  # What libtpu is told there.
  known = r"do not multiply to the 4 devices.* that is known to do is --config=FILE:llama2_7b,v5p:2x2x1\."
  with flagsaver.flagsaver(topology="v5p:2x2x1"), pytest.raises(ValueError, match=known):
    main.show_plan(settings)
  with (
    flagsaver.flagsaver(topology="v5p:2x2x2"),
    pytest.raises(ValueError, match=r"or set one of the last three to -1\.$"),
  ):
    main.show_plan(settings)


def test_two_words_run_a_command_on_a_finished_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  ran = []
  command = commands.COMMANDS["evaluate mt-bench"]
  monkeypatch.setitem(commands.COMMANDS, "evaluate mt-bench", dataclasses.replace(command, run=ran.append))
  monkeypatch.chdir(tmp_path)
  saved = artifacts.Artifact(epath.Path(tmp_path / "m1"), {}, {})
  saved.begin()
  modelstore.save(saved, tiny_model.model(), tiny_model.words(), {})
  evaluation = steps.Step("eval/m1", "evaluate", {}, {}, lambda out: None)
  monkeypatch.setattr(steps, "plan", lambda *_: [steps.Step("m1", "sft", {}, {}, lambda out: None), evaluation])
  (tmp_path / "question.jsonl").write_text("")
  values = {"config": SMOKE, "workdir": str(tmp_path), "model": "m1", "prompts": "question.jsonl"}
  with flagsaver.as_parsed(**values, compilation_cache=""):
    main.main(["srlm", "evaluate", "mt-bench"])
    [run] = ran
    assert (run.model, list(run.models), run.workdir) == ("m1", ["m1"], epath.Path(tmp_path))
    assert run.files == {"prompts": epath.Path(tmp_path / "question.jsonl")}  # Its whole path: Orbax takes no other.
  with flagsaver.as_parsed(**{**values, "model": "m3"}, compilation_cache=""):
    with pytest.raises(SystemExit, match="srlm evaluate mt-bench: 'm3' is not a finished model .* Valid: m1"):
      main.main(["srlm", "evaluate", "mt-bench"])


def test_every_stage_is_listed_and_belongs_to_some_step() -> None:
  text = main.usage()
  assert all(
    re.search(rf"^  {name} ", text, re.MULTILINE) for name in ("all", "stages", *steps.STAGES, *commands.COMMANDS)
  )
  both = [config.base(), config.base()]
  both[1].world.enabled, both[1].monitors.prompts = True, "prompts.jsonl"
  planned = [step.stage for c in both for step in steps.plan(c, epath.Path("w"), None)]
  assert set(planned) == set(steps.STAGES)


class Run:
  """Three steps in a row, each writing its name; `fail` breaks one of them, `ran` says which were run."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self.ran: list[str] = []
    self.fail = ""
    self.votes = 3
    monkeypatch.setattr(steps, "plan", lambda *_: self.plan())

  def plan(self) -> Sequence[steps.Step]:
    def run(out: artifacts.Artifact) -> None:
      self.ran.append(out.name)
      if out.name == self.fail:
        raise RuntimeError("out of memory")
      if out.name != "report":
        out.write("x.txt", out.name)
        out.commit({})

    return [
      steps.Step("a", "responses", {"votes": 3}, {}, run),
      steps.Step("b", "judge", {"votes": self.votes}, {"responses": "a"}, run),
      steps.Step("c", "pairs", {"votes": 3}, {"judgements": "b"}, run),
      steps.Step("report", "report", {}, {"a": "a", "b": "b", "c": "c"}, run),
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
  return Run(monkeypatch)


def test_a_run_stops_where_it_breaks_and_goes_on_from_there(run: Run, tmp_path: pathlib.Path) -> None:
  place = epath.Path(tmp_path)
  run.fail = "b"
  with pytest.raises(RuntimeError, match="out of memory"):
    main.run_steps(config.base(), place, "all")
  assert run.ran == ["a", "b"] and not (place / "c").exists()
  run.fail = ""
  main.run_steps(config.base(), place, "all")
  assert run.ran == ["a", "b", "b", "c", "report"]
  main.run_steps(config.base(), place, "all")
  assert run.ran[5:] == ["report"]  # Made anew at every call; the others are done.


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  def interrupted(*_: object) -> None:
    raise KeyboardInterrupt

  monkeypatch.setattr(main, "run_steps", interrupted)
  with flagsaver.as_parsed(config=SMOKE, workdir=str(tmp_path), compilation_cache=""):
    with pytest.raises(SystemExit) as stopped:
      main.main(["srlm", "all"])
  assert stopped.value.code == 130


@pytest.mark.parametrize(
  ("error", "code", "message"),
  [
    (FloatingPointError("the loss is nan"), 4, "srlm all: the loss is nan"),
    (OSError(errno.ENOSPC, "No space left on device"), 74, "srlm all: the disk is full: [Errno 28] No space left"),
    (MemoryError(), 3, "srlm all: out of memory (MemoryError.) In sampling"),
    (endings.Terminated("SIGTERM"), 75, "srlm all: SIGTERM. The same command goes on from here."),
  ],
)
def test_each_end_has_its_code_and_one_line(
  error: BaseException,
  code: int,
  message: str,
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  def broken(*_: object) -> None:
    raise error

  monkeypatch.setattr(main, "run_steps", broken)
  for debug in (False, True):
    with (
      flagsaver.as_parsed(config=SMOKE, workdir=str(tmp_path), compilation_cache=""),
      flagsaver.flagsaver(debug=debug),
    ):
      with pytest.raises(endings.Ended) as ended:
        main.main(["srlm", "all"])
    told = capsys.readouterr().err
    assert ended.value.code == code and ("Traceback" in told) == debug
    assert [line for line in told.splitlines() if line.startswith("srlm ")][0].startswith(message)


def test_a_bug_shows_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  monkeypatch.setattr(main, "run_steps", lambda *_: {}["nothing"])
  with flagsaver.as_parsed(config=SMOKE, workdir=str(tmp_path), compilation_cache=""), pytest.raises(KeyError):
    main.main(["srlm", "all"])


def test_one_stage_alone(run: Run, tmp_path: pathlib.Path) -> None:
  place = epath.Path(tmp_path)
  with pytest.raises(ValueError, match=r"/a is not finished .*run its stage first"):
    main.run_steps(config.base(), place, "judge")
  main.run_steps(config.base(), place, "responses")
  main.run_steps(config.base(), place, "judge")
  assert run.ran == ["a", "b"]


def test_configurations_are_checked_before_any_work(run: Run, tmp_path: pathlib.Path) -> None:
  place = epath.Path(tmp_path)
  main.run_steps(config.base(), place, "all")
  (place / "a" / "manifest.json").unlink()  # The first step is to do again.
  run.votes, run.ran = 5, []
  with pytest.raises(ValueError, match="(?s)/b was made with another configuration.*votes: 3 there, 5 here"):
    main.run_steps(config.base(), place, "all")
  assert not run.ran


def test_what_is_finished_is_verified_before_any_work(run: Run, tmp_path: pathlib.Path) -> None:
  place = epath.Path(tmp_path)
  main.run_steps(config.base(), place, "all")
  (place / "a" / "manifest.json").unlink()  # The first step is to do again.
  stored = (place / "b" / "manifest.json").read_text()
  (place / "b" / "manifest.json").write_text(stored.replace('"seconds"', '"sesonds"'))
  run.ran = []
  with pytest.raises(ValueError, match=r"/b/manifest.json is damaged .*: delete .*/b and run its stage again"):
    main.run_steps(config.base(), place, "all")
  assert not run.ran


@pytest.mark.parametrize(
  ("damage", "wrong"), [("cut", "is damaged .it has"), ("gone", "is missing"), ("more", "was not")]
)
@pytest.mark.parametrize("stage", ["all", "report"])
def test_weights_that_nothing_loads_are_verified_before_any_work(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stage: str, damage: str, wrong: str
) -> None:
  ran: list[str] = []

  def train(out: artifacts.Artifact) -> None:
    modelstore.save(out, tiny_model.model(), tiny_model.words(), {})

  planned = [
    steps.Step("m1", "sft", {}, {}, train),
    steps.Step("report", "report", {}, {"m1": "m1"}, lambda out: ran.append(out.name)),
  ]
  monkeypatch.setattr(steps, "plan", lambda *_: planned)
  place = epath.Path(tmp_path)
  main.run_steps(config.base(), place, "all")
  main.run_steps(config.base(), place, stage)
  assert ran == ["report"] * 2
  largest = max((tmp_path / "m1/weights").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
  if damage == "gone":
    largest.unlink()
  elif damage == "cut":
    largest.write_bytes(largest.read_bytes()[:-100])
  else:
    largest = largest.with_name(f"{largest.name} (copy)")
    largest.write_bytes(b"")
  with pytest.raises(ValueError, match=rf"{re.escape(str(largest))} {wrong}.*: delete .*/m1 and run its stage again"):
    main.run_steps(config.base(), place, stage)
  assert ran == ["report"] * 2
  with pytest.raises(ValueError, match=re.escape(str(largest))):
    main.export(config.base(), place, "m1", str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_states_are_shown(run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  place = epath.Path(tmp_path)
  run.fail = "b"
  with pytest.raises(RuntimeError):
    main.run_steps(config.base(), place, "all")
  capsys.readouterr()
  main.show_steps(config.base(), place)
  assert [line.split("from")[0].split(maxsplit=2)[2].strip() for line in capsys.readouterr().out.splitlines()] == [
    "done", "begun", "to do", "to do",
  ]  # fmt: skip


def test_a_blind_page_is_written_and_its_votes_are_read(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  made = {}
  for name, text in (("m1", "worse"), ("m2", "better")):
    made[f"eval/{name}"] = artifacts.Artifact(epath.Path(tmp_path / "eval" / name), {}, {})
    made[f"eval/{name}"].begin()
    answers = [
      records.Response(prompt_id=f"p{n}", prompt=f"Task {n}", sample=k, text=text, tokens=(2,), finished=True)
      for n in range(4)
      for k in (0, 1)
    ]
    made[f"eval/{name}"].write_records("answers-00000-of-00001.jsonl", answers)
    made[f"eval/{name}"].commit({})
  monkeypatch.setattr(steps, "plan", lambda *_: [])
  monkeypatch.setattr(steps, "artifacts_of", lambda *_: made)
  place, page, settings = epath.Path(tmp_path), epath.Path(tmp_path / "new" / "page.html"), config.base()
  commands.human_page(settings, place, ("m2", "m1"), 3, page)
  key = human_eval.read_key(page.with_suffix(".key.json"))
  assert len(key.items) == 3 and "better" in page.read_text()
  with pytest.raises(ValueError, match=r"page\.html is there already"):
    commands.human_page(settings, place, ("m2", "m1"), 3, page)
  with pytest.raises(ValueError, match="'m3' is not a model that this work directory has evaluated"):
    commands.human_page(settings, place, ("m3", "m1"), 3, place / "other.html")
  with pytest.raises(ValueError, match="--model and --against are both m1"):
    commands.human_page(settings, place, ("m1", "m1"), 3, place / "other.html")
  votes = {
    "format": "srlm human evaluation votes 1",
    "page": key.page,
    "annotator": "Ann",
    "votes": {item.id: item.model for item in key.items},
  }
  (place / "votes.json").write_text(json.dumps(votes))
  monkeypatch.setattr(commands, "absolute", epath.Path)
  with flagsaver.as_parsed(
    key=str(page.with_suffix(".key.json")), votes=str(place / "votes.json"), workdir=str(place), compilation_cache=""
  ):
    main.main(["srlm", "human-eval-read"])
  assert "| win, % | 100.0" in capsys.readouterr().out
  found = report_stage.human_evaluations(place)
  assert list(found) == ["analysis/human-m2-m1"]
  assert found["analysis/human-m2-m1"].manifest()["facts"]["win"]["value"] == 1.0
