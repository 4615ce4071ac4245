"""One run in a work directory at a time, on a disk that holds what it writes; logs of bounded size."""

from collections.abc import Iterator
import errno
import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

from etils import epath
import filelock
import pytest
import tiny_model

from srlm_jax import artifacts, checkpoint, config, main, modelstore, room, steps, workdir

ROOT = pathlib.Path(__file__).parents[1]
HOLD = (
  "import sys\nfrom etils import epath\nfrom srlm_jax import workdir\n"
  "with workdir.locked(epath.Path(sys.argv[1]), 'srlm all'):\n  print('held', flush=True)\n  sys.stdin.read()\n"
)


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "run"
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as other:
    assert other.stdout.readline() == "held\n"
    with pytest.raises(
      ValueError, match=rf"run is in use by another run: pid {other.pid} on \S+ since \S+Z \(srlm all\)"
    ):
      with workdir.locked(epath.Path(folder), "srlm judge"):
        pass
    with workdir.locked(epath.Path(folder / "outside"), "srlm evaluate mt-bench"):  # A part has a lock of its own.
      pass
    other.send_signal(signal.SIGKILL)
  for _ in range(2):  # The kernel gives it back at a kill, and we at the end.
    with workdir.locked(epath.Path(folder), "srlm judge"):
      assert json.loads((folder / "lock.json").read_text())["what"] == "srlm judge"


def test_where_nothing_can_be_locked_it_is_said(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  def acquire(self, timeout):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
  with caplog.at_level("WARNING", "srlm_jax"), workdir.locked(epath.Path(tmp_path / "run"), "srlm judge"):
    pass
  assert "a second run in it would not be noticed" in caplog.text


class Leased:
  """A lease's object, and what others write while somebody waits for it."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path, self.waited, self.events = epath.Path(path), [], []

  def wait(self, seconds: float) -> None:
    self.waited.append(seconds)
    if self.events:
      event = self.events.pop(0)
      if event is None:
        self.path.unlink()
      elif event:
        self.path.write_text(event)

  def lease(self, token: str) -> workdir.Lease:
    lost = self.waited.append
    return workdir.Lease(self.path, {"token": token, "pid": 1}, lost, self.wait)


@pytest.fixture
def leased(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leased]:
  monkeypatch.setattr(workdir, "BEAT", 3600)  # Its thread never beats by itself here.
  yield Leased(tmp_path / "lock.json")


def test_a_lease_is_taken_shown_and_given_back(leased: Leased) -> None:
  lease = leased.lease("mine")
  assert lease.take() is None and leased.waited == [2]
  before = leased.path.read_text()
  assert lease.beat() and leased.path.read_text() != before  # So that others see that it lives.
  lease.release()
  assert not leased.path.exists()


def test_a_lease_whose_holder_lives_is_refused(leased: Leased) -> None:
  leased.path.write_text('{"token": "theirs", "beat": 1}')
  leased.events = ["", '{"token": "theirs", "beat": 2}']
  assert leased.lease("mine").take() == '{"token": "theirs", "beat": 2}' and leased.waited == [3600, 3600]


@pytest.mark.parametrize(("events", "watched"), [([], workdir.BEATS), (["", None], 2)])
def test_a_lease_whose_holder_was_killed_or_ends_is_taken_over(leased: Leased, events: list, watched: int) -> None:
  leased.path.write_text("torn {")
  leased.events = events
  lease = leased.lease("mine")
  assert lease.take() is None and '"mine"' in leased.path.read_text()
  assert leased.waited == [3600] * watched + [2]
  lease.release()


def test_of_two_that_take_a_lease_at_once_one_is_refused(leased: Leased) -> None:
  leased.events = ['{"token": "theirs"}']  # While ours waits to read it back.
  assert leased.lease("mine").take() == '{"token": "theirs"}'


def test_a_lease_that_another_one_took_ends_the_run(leased: Leased) -> None:
  lease = leased.lease("mine")
  assert lease.take() is None
  leased.path.write_text('{"token": "theirs"}')
  assert not lease.beat() and leased.waited[-1] == '{"token": "theirs"}'
  lease.release()
  assert leased.path.exists()  # It is not ours to delete.


def test_no_error_of_a_store_ends_the_signs_of_life(leased: Leased, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(workdir, "BEAT", 0.01)
  lease, write = leased.lease("mine"), workdir.storage.write
  errors = [OSError("Forbidden: for now"), FileNotFoundError("no such bucket, for now"), RuntimeError("?")]
  shown = threading.Event()

  def failing(path: epath.Path, text: str) -> None:
    if lease._beats > 1 and errors:
      raise errors.pop()
    write(path, text)
    if not errors:
      shown.set()

  monkeypatch.setattr(workdir.storage, "write", failing)
  assert lease.take() is None and shown.wait(60)
  lease.release()


def test_a_lease_that_cannot_be_given_back_is_no_end_of_a_run(
  leased: Leased, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  lease = leased.lease("mine")
  assert lease.take() is None
  monkeypatch.setattr(workdir, "_read", lambda path: 1 / 0)
  lease.release()
  assert "lock.json could not be deleted" in caplog.text


def test_what_cannot_be_written_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  workdir.check_writable(epath.Path(tmp_path / "new" / "run"))
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"file/run: \S+file is a file"):
    workdir.check_writable(epath.Path(tmp_path / "file" / "run"))
  monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)  # Root may write everything.
  with pytest.raises(ValueError, match=f"run cannot be written: {tmp_path} is read-only, or another user's"):
    workdir.check_writable(epath.Path(tmp_path / "run"))
  with pytest.raises(ValueError, match=r"file/run cannot be made \(Not a directory\)\. Give another --workdir\."):
    with workdir.locked(epath.Path(tmp_path / "file" / "run"), "srlm all"):  # As below /proc, which looks writable.
      pass


def test_in_an_object_store_nothing_is_written_into_an_artifact(store: object) -> None:
  place = epath.Path("gs://bucket/run")
  (place / "m1" / "stage.json").write_text("{}")
  workdir.check_out(place / "export", folder=True)
  workdir.check_out(place / "page.html")
  with pytest.raises(ValueError, match="--out=gs://bucket/run/m1/hf: gs://bucket/run/m1 is a run's own"):
    workdir.check_out(place / "m1" / "hf", folder=True)
  with pytest.raises(ValueError, match="--out=gs://bucket/run holds what runs have made"):
    workdir.check_out(place, folder=True)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
  usage = shutil.disk_usage("/")._replace(free=size)
  monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage)


def test_the_room_that_70b_takes_is_known_before_it_starts(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  settings = config.base()
  settings.base.kind, settings.base.size = "random", "llama2_70b"
  planned = steps.plan(settings, epath.Path(tmp_path / "run"), None)
  made = steps.artifacts_of(planned, epath.Path(tmp_path / "run"))
  needs = room.needed(settings, epath.Path(tmp_path / "run"), planned, made)
  weights = 4 * 68_976_648_192  # float32; Llama 2 70B has so many parameters.
  models = {f"the weights of {name}": weights for name in ("m0", "baseline", "m1", "m2", "m3")}
  assert needs == {
    **models, "train states": 3 * 3 * weights, "candidates": 2 * weights, "what is there already": 0
  }  # fmt: skip
  free(monkeypatch, sum(needs.values()))
  workdir.check_room(epath.Path(tmp_path / "run"), needs)
  free(monkeypatch, sum(needs.values()) - 1)
  with pytest.raises(
    ValueError, match=r"will write about 4,111\.3\d GiB more \(256\.96 for the weights of m0, .* has 4,111"
  ):
    workdir.check_room(epath.Path(tmp_path / "run"), needs)


@pytest.mark.parametrize(
  ("changes", "states", "candidates"),
  [
    ({}, 3, 2),  # The data will say how many steps there are.
    ({"sft.steps": 900, "dpo.steps": 900}, 3, 2),
    ({"sft.steps": 500, "dpo.steps": 100}, 2, 2),  # After 200 and 400 steps, candidates and states alike.
    ({"sft.steps": 200, "dpo.steps": 200}, 0, 2),  # The last step saves weights alone.
    ({"sft.steps": 500, "dpo.steps": 100, "select.every": 250}, 3, 2),
    ({"sft.steps": 199, "dpo.steps": 199}, 0, 0),
    ({"sft.steps": 199}, 3, 2),
    ({"sft.steps": 199, "dpo.method": "positive_only"}, 0, 0),
    ({"sft.steps": 199, "dpo.steps": 199, "dpo.save_every": 100}, 1, 0),
    ({"sft.steps": 500, "dpo.steps": 100, "select.judge": "none"}, 2, 0),
    ({"sft.steps": 100, "dpo.steps": 100, "base.kind": "pretrain", "pretrain.steps": 300}, 1, 0),
  ],
)
def test_a_short_training_saves_fewer_states(
  tmp_path: pathlib.Path, changes: dict[str, object], states: int, candidates: int
) -> None:
  settings, place = config.base(), epath.Path(tmp_path)
  settings.base.kind, settings.base.size = "random", "smoke"
  settings.update_from_flattened_dict(changes)
  planned = steps.plan(settings, place, None)
  needs = room.needed(settings, place, planned, steps.artifacts_of(planned, place))
  own = needs["the weights of m1"]
  assert (needs["train states"], needs["candidates"]) == (states * 3 * own, candidates * own)


def test_what_goes_while_it_is_counted_takes_no_room(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  for name in ("kept", "gone"):
    (tmp_path / name).write_bytes(b"12345")
  kind = type(epath.Path(tmp_path))
  look = kind.stat

  def stat(path: epath.Path):
    if path.name == "gone":
      (tmp_path / "gone").unlink(missing_ok=True)
    return look(path)

  monkeypatch.setattr(kind, "stat", stat)
  assert room._size(epath.Path(tmp_path)) == 5
  assert room._size(epath.Path(tmp_path / "none")) == 0


def test_what_is_there_already_takes_no_room_again(tmp_path: pathlib.Path) -> None:
  settings, place = config.base(), epath.Path(tmp_path)
  settings.base.kind, settings.base.size = "random", "smoke"
  planned = steps.plan(settings, place, None)
  made = steps.artifacts_of(planned, place)
  todo = [step for step in planned if step.folder in ("m1", "m2", "seed")]
  before = room.needed(settings, place, todo, made)
  assert list(before)[:2] == ["the weights of m1", "the weights of m2"]
  (tmp_path / "m1" / "states" / "4").mkdir(parents=True)
  (tmp_path / "m1" / "states" / "4" / "x").write_bytes(b"x" * 1000)
  assert sum(before.values()) - sum(room.needed(settings, place, todo, made).values()) == 1000
  made["m0"].begin()
  modelstore.save(made["m0"], tiny_model.model(), tiny_model.words(), {})  # Now its own shape counts.
  own = room.needed(settings, place, todo, made)["the weights of m1"]
  assert own == room.weights(tiny_model.CONFIG) != before["the weights of m1"]


def test_a_saved_training_takes_no_more_than_was_reckoned(tmp_path: pathlib.Path) -> None:
  model = tiny_model.model()
  checkpoint.save_model(epath.Path(tmp_path), model)
  taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
  assert taken <= 1.2 * room.weights(model.config) + 50_000  # Random float32 hardly compresses; the rest is metadata.


def test_a_refused_run_leaves_no_work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  settings = config.base()
  settings.base.kind, settings.base.size = "random", "llama2_70b"
  planned = [step for step in steps.plan(settings, epath.Path(tmp_path / "run"), None) if step.folder == "m0"]
  monkeypatch.setattr(steps, "plan", lambda *_: planned)
  monkeypatch.setattr(steps, "check_start", lambda *_: None)
  free(monkeypatch, 10**9)
  with pytest.raises(ValueError, match=r"256\.96 GiB more .*, and its disk has 0\.93 GiB free"):
    main.run_steps(settings, epath.Path(tmp_path / "run"), "all")
  assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock", "lock.json", "logs"}
  assert "its disk has 0.93 GiB free" in (tmp_path / "run" / "logs" / "srlm-0.log").read_text()
  monkeypatch.setattr(main, "_run_step", lambda *_: None)
  main.run_steps(settings, epath.Path(tmp_path / "run"), "all", check_room=False)


def test_a_second_run_is_refused_before_it_looks_at_what_the_first_one_writes(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  place = epath.Path(tmp_path / "run")
  one = artifacts.Artifact(place / "a", {}, {})
  one.begin()
  one.write("x.txt", "x")
  one.commit({})
  (place / "a" / "x.txt").unlink()
  monkeypatch.setattr(steps, "plan", lambda *_: [steps.Step("a", "judge", {}, {}, lambda out: None)])
  monkeypatch.setattr(steps, "check_start", lambda *_: None)
  with workdir.locked(place, "the first"), pytest.raises(ValueError, match=r"in use by another run.*\(the first\)"):
    main.run_steps(config.base(), place, "all")
  with pytest.raises(ValueError, match="x.txt is missing"):
    main.run_steps(config.base(), place, "all")


def test_a_run_holds_the_lock_and_writes_its_log(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  place = epath.Path(tmp_path / "run")

  def run(out: artifacts.Artifact) -> None:
    if out.name != "report":
      with pytest.raises(ValueError, match="in use by another run"):
        main.run_steps(config.base(), place, "judge")
      main.run_steps(config.base(), place, "report")  # It may be looked at meanwhile.
      raise RuntimeError("a bug")

  monkeypatch.setattr(
    steps, "plan", lambda *_: [steps.Step("a", "judge", {}, {}, run), steps.Step("report", "report", {}, {}, run)]
  )
  monkeypatch.setattr(steps, "check_start", lambda *_: None)
  monkeypatch.setattr(room, "needed", lambda *_: {})
  monkeypatch.setattr(logging.getLogger("srlm_jax"), "level", logging.INFO)
  with pytest.raises(RuntimeError, match="a bug"):
    main.run_steps(config.base(), place, "all")
  log = (tmp_path / "run" / "logs" / "srlm-0.log").read_text()
  assert "[1/2] a: stage judge" in log and "Traceback" in log and "RuntimeError: a bug" in log


def test_logs_have_a_bounded_size(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(workdir, "LOG_BYTES", 1000)
  ours = logging.getLogger("srlm_jax")
  before = list(ours.handlers)
  with workdir.logs(epath.Path(tmp_path)):
    for number in range(200):
      ours.error("message %d of two hundred", number)
  files = sorted(path.name for path in (tmp_path / "logs").iterdir())
  assert files == ["srlm-0.log", *(f"srlm-0.log.{n}" for n in range(1, workdir.LOG_FILES + 1))]
  assert all(path.stat().st_size <= 1000 for path in (tmp_path / "logs").iterdir()) and ours.handlers == before
  assert "message 199 " in (tmp_path / "logs" / "srlm-0.log").read_text()


def test_in_an_object_store_a_run_holds_a_lease(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(workdir, "BEAT", 0.01)
  monkeypatch.setattr(workdir, "BEATS", 10_000)  # Waits for as long as it takes to see the holder's next beat.
  place = epath.Path("gs://bucket/run")
  with workdir.locked(place, "srlm all"), workdir.logs(place):
    with pytest.raises(
      ValueError, match=r"gs://bucket/run is in use by another run: pid \d+ on \S+ since .* \(srlm all\)"
    ):
      with workdir.locked(place, "srlm all"):
        pass
    assert [path.name for path in place.iterdir()] == ["lock.json"]  # And no log.
  assert not (place / "lock.json").exists()
