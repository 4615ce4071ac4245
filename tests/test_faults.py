"""The fault campaign: `pytest -m faults tests/test_faults.py -s`. What it tries, and what became of it, is a table.

SRLM_FAULTS_OUT=FOLDER keeps the table and what bad cases said; SRLM_FAULTS_SHARE=0.1 tries a tenth of all
(0.3: all kills, and 0.3 of the rest), SRLM_FAULTS_SEED draws other moments, files and bits, and
SRLM_FAULTS_PROGRAMS=FOLDER keeps the compiled programs.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time

import campaign
from campaign import Moment
import pytest

pytestmark = pytest.mark.faults

SEED = os.environ.get("SRLM_FAULTS_SEED", "0")
SHARE = float(os.environ.get("SRLM_FAULTS_SHARE", "1"))
TOGETHER = 2  # Processes at once.


@dataclasses.dataclass(frozen=True)
class Whole:
  """A run that nothing disturbed.

  Attributes:
    launcher: of it and of all others.
    workdir: of it.
    before: folder of copies of the work directory, one from before each step.
    steps: what each step took: {folder: {"seconds", "calls"}}.
    outcome: {step: digest}.
    result: the files that a run is made for.
  """

  launcher: campaign.Launcher
  workdir: pathlib.Path
  before: pathlib.Path
  steps: dict[str, dict[str, float]]
  outcome: dict[str, str]
  result: dict[str, str]

  def at(self, step: str) -> pathlib.Path:
    """The work directory as it was before a step."""
    return self.before / step.replace("/", "_")

  @functools.cached_property
  def reader(self) -> dict[str, str]:
    """{step: the first later step that is made from it; the report where none is}."""
    names = {digest: name for name, digest in self.outcome.items()}
    found = dict.fromkeys(self.outcome, "report")
    for step in reversed([name for name in self.steps if name != "report"]):
      inputs = json.loads((self.workdir / step / "stage.json").read_text())["inputs"]
      found.update({names[digest]: step for digest in inputs.values()})
    return found


@pytest.fixture(scope="module")
def table() -> Iterator[campaign.Table]:
  made = campaign.Table()
  yield made
  print(f"\n{made.markdown()}", *made.bad, sep="\n")
  if out := os.environ.get("SRLM_FAULTS_OUT"):
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    pathlib.Path(out, "faults.md").write_text(made.markdown())
    pathlib.Path(out, "bad.txt").write_text("\n\n".join(made.bad))


@pytest.fixture(autouse=True)
def nothing_is_lost_or_silent(table: campaign.Table) -> Iterator[None]:
  """Each test fails by what it adds to the table."""
  before = len(table.bad)
  yield
  assert not table.bad[before:], f"{len(table.bad) - before} faults\n" + "\n\n".join(table.bad[before:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
  """Runs twice: the first time programs are compiled, the second time says how long each step takes with them."""
  base = tmp_path_factory.mktemp("whole")
  prompts = [{"id": f"own-{number}", "text": f"Say owl {number} times.", "source": "ours"} for number in range(4)]
  (base / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
  programs = pathlib.Path(os.environ.get("SRLM_FAULTS_PROGRAMS", base / "programs"))
  launcher = campaign.Launcher(
    programs, arguments=(*campaign.SMALL, f"--config.monitors.prompts={base / 'prompts.jsonl'}")
  )
  first = dataclasses.replace(launcher, limit=3 * campaign.LIMIT).run(base / "first")
  assert first.code == 0, first.said[-3000:]
  again = launcher.run(base / "again", snapshots=base / "before")
  assert again.code == 0, again.said[-3000:]
  assert campaign.outcome(base / "first") == campaign.outcome(base / "again")
  shutil.rmtree(base / "first")
  assert len(again.steps) > 20 and set(again.steps) - {"report"} == set(campaign.outcome(base / "again"))
  return Whole(
    launcher,
    base / "again",
    base / "before",
    {name: dict(values) for name, values in again.steps.items()},
    campaign.outcome(base / "again"),
    campaign.result(base / "again"),
  )


def drawn(name: str) -> random.Random:
  return random.Random(f"{SEED} {name}")


def share(items: Sequence, rng: random.Random) -> list:
  """All of them, or the share that SRLM_FAULTS_SHARE asks for."""
  return rng.sample(list(items), max(1, round(SHARE * len(items)))) if SHARE < 1 else list(items)


def side_by_side(work: Callable[..., None], items: Sequence[tuple]) -> None:
  """Calls `work(*item)` for each item, two at once."""
  with futures.ThreadPoolExecutor(TOGETHER) as pool:
    for done in [pool.submit(work, *item) for item in items]:
      done.result()


def ended(whole: Whole, workdir: pathlib.Path, step: str) -> tuple[bool, campaign.Attempt]:
  """Goes on, without disturbance, to the end of a step; whether it made what the undisturbed run made."""
  if step != "report" and (workdir / step / "manifest.json").exists():  # What stopped the run came late.
    return made_the_same(whole, workdir, step), campaign.Attempt(0, "", None, {})
  attempt = whole.launcher.run(workdir, moment=None if step == "report" else Moment(step, ended=True))
  reached = attempt.code == 0 or attempt.fired is not None
  return reached and not attempt.hung and made_the_same(whole, workdir, step), attempt


def made_the_same(whole: Whole, workdir: pathlib.Path, step: str) -> bool:
  """Whether the step is committed, with the digest that it has in the undisturbed run."""
  if step == "report":
    return (workdir / "report" / "report.html").exists()
  path = workdir / step / "manifest.json"
  return path.exists() and json.loads(path.read_text(errors="replace")).get("digest") == whole.outcome[step]


# Kills

TRAINED = ("m0", "baseline", "m1", "m2")


def shards_done(workdir: pathlib.Path) -> dict[str, int]:
  """{finished shard: when it was written}."""
  done = (path.with_suffix("") for path in workdir.rglob("*-of-*.done"))
  return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in done if path.exists()}


def killed(whole: Whole, workdir: pathlib.Path, moments: Sequence[Moment], table: campaign.Table) -> None:
  """Kills a run again and again, each time going on; looks at what was done again, and compares the end."""
  places, lost = [], 0
  for moment in moments:
    if moment.step != "report" and (workdir / moment.step / "manifest.json").is_file():  # The one before came late.
      continue
    shards, states = shards_done(workdir), {step: campaign.saved(workdir, step) for step in TRAINED}
    attempt = whole.launcher.run(workdir, moment=moment)
    now = shards_done(workdir)
    anew = [name for name, when in shards.items() if now.get(name) != when]
    assert len(anew) <= 1, f"finished shards were made again: {anew}"  # One file that is no work: the world's classes.
    for step, after in campaign.began(attempt.said).items():
      assert after == states[step], f"{step} went on from step {after}, and not from the newest state: {states[step]}"
    if attempt.fired is None:
      assert attempt.code == 0, attempt.said[-3000:]
      break
    assert attempt.code == -signal.SIGKILL
    places.append(attempt.fired["step"])
    took, may = campaign.taken(workdir, attempt.fired)
    assert took <= may, f"{attempt.fired}: {took} training steps are to be done again, not {may}"
    lost = max(lost, took)
  same, last = ended(whole, workdir, "report")
  same &= campaign.outcome(workdir) == whole.outcome and campaign.result(workdir) == whole.result
  for place in places:
    table.add("kill -9", place, "survived" if same else "lost", last.said)
  print(f"\nat most {lost} training steps were done again after a kill")


def moments(whole: Whole, how: str, rng: random.Random) -> list[Moment]:
  """One in each step, at a random time of it or at a random change of a file; and more where states are saved."""
  found = []
  for step, took in whole.steps.items():
    if how == "time":
      found.append(Moment(step, seconds=rng.uniform(0, took["seconds"])))
      continue
    if step in TRAINED:
      found.append(Moment(step, call=rng.randint(1, 8), within="checkpoint-tmp"))  # While a state is being saved.
    else:
      found.append(Moment(step, call=rng.randint(1, int(took["calls"]))))
    found.append(Moment("", call=rng.randint(1, 3)))  # And again, as soon as it has begun to go on.
  return found


def test_kills_at_any_moment_lose_nothing(whole: Whole, table: campaign.Table, tmp_path: pathlib.Path) -> None:
  rng = drawn("kills")
  side_by_side(killed, [(whole, tmp_path / how, share_of(moments(whole, how, rng)), table) for how in ("time", "call")])
  counts = {place: row["tried"] for (kind, place), row in table.rows.items() if kind == "kill -9"}
  if SHARE > 0.25:
    assert sum(counts.values()) >= 50 and set(counts) >= set(whole.steps) - {"report"}, counts


def share_of(moments: list[Moment]) -> list[Moment]:
  """All of them, of small shares the first ones: a chain of kills stays a chain."""
  return moments if SHARE > 0.25 else moments[: max(2, round(SHARE * len(moments)))]


# Damaged files


def hurt(
  whole: Whole, source: pathlib.Path, path: str, damage: str, step: str, place: str, table: campaign.Table
) -> None:
  """Damages a file of a copy of `source` and goes on to the end of a step."""
  rng = drawn(f"{damage} {source.name} {path}")
  with tempfile.TemporaryDirectory(dir=whole.workdir.parent) as folder:
    workdir = pathlib.Path(folder) / "run"
    shutil.copytree(source, workdir)
    file = workdir / path
    before = file.read_bytes()
    bad = campaign.DAMAGES[damage](before, rng)
    file.write_bytes(bad)
    same, attempt = ended(whole, workdir, step)
    gone = not file.exists() or file.read_bytes() != bad
    if path.endswith("metrics.jsonl"):  # A line of the report is gone for good, and said; the weights are what counts.
      same |= (workdir / step / "fingerprints.json").exists() and (
        (workdir / step / "fingerprints.json").read_text() == (whole.workdir / step / "fingerprints.json").read_text()
      )
  verdict = campaign.judged(attempt, path, same, gone, place == "finished step" and len(bad) != len(before))
  table.add(
    f"{damage}, {place}", campaign.kind_of(path), verdict, f"{path} before {step}, code {attempt.code}\n{attempt.said}"
  )


def test_damaged_files_of_finished_steps_are_found(whole: Whole, table: campaign.Table) -> None:
  rng, items = drawn("finished"), []
  for _, path in sorted(campaign.kinds(whole.workdir, rng).items()):
    owner = max((step for step in whole.steps if path.startswith(f"{step}/")), key=len, default="")
    if not owner:  # Of no step: the lock, say.
      continue
    step = whole.reader.get(owner, "report")
    source = whole.workdir if owner == "report" else whole.at(step)
    items.append((whole, source, path, "one bit flipped", step, "finished step", table))
    if rng.random() < 0.15:
      torn = rng.choice(("cut at a byte", "emptied"))
      items.append((whole, source, path, torn, step, "finished step", table))
  side_by_side(hurt, share(items, rng))


HALF = ("m0", "baseline", "aift1/prompts", "aift1/responses", "aift1/judgements", "aift1/pairs", "m2", "eval/m1")


@pytest.fixture(scope="module")
def half_done(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
  """{step: a work directory in which it is begun}."""
  base, found = tmp_path_factory.mktemp("half"), {}

  def begin(step: str) -> None:
    workdir = base / step.replace("/", "_")
    shutil.copytree(whole.at(step), workdir)
    attempt = whole.launcher.run(workdir, moment=Moment(step, call=int(0.6 * whole.steps[step]["calls"])))
    assert attempt.fired is not None, attempt.said[-3000:]
    found[step] = workdir

  side_by_side(begin, [(step,) for step in share(HALF, drawn("half"))])
  return found


def test_damaged_files_of_begun_steps_are_found(
  whole: Whole, half_done: dict[str, pathlib.Path], table: campaign.Table
) -> None:
  rng, items = drawn("begun"), []
  for step, workdir in half_done.items():
    for _, path in sorted(campaign.kinds(workdir, rng, step).items()):
      if "checkpoint-tmp" in path or "/." in path:  # What a kill left, which nobody takes for whole.
        continue
      items.append((whole, workdir, path, "one bit flipped", step, "begun step", table))
      if rng.random() < 0.3:
        torn = rng.choice(("cut at a byte", "emptied"))
        items.append((whole, workdir, path, torn, step, "begun step", table))
  side_by_side(hurt, share(items, rng))


def test_damaged_programs_compile_again(whole: Whole, table: campaign.Table) -> None:
  """One bit in each compiled program at once, or a part of each missing: as a kill or a bad disk leaves them."""
  step = "aift1/responses"

  def spoiled(damage: str) -> None:
    rng = drawn(damage)
    with tempfile.TemporaryDirectory(dir=whole.workdir.parent) as folder:
      # A folder of its own, filled by the step itself: a program's key holds its folder's path, so that none is found
      # in a copy.
      programs = pathlib.Path(folder) / "programs"
      other = dataclasses.replace(whole, launcher=dataclasses.replace(whole.launcher, programs=programs))
      for name in ("fills", "reads"):
        shutil.copytree(whole.at(step), pathlib.Path(folder) / name)
      assert ended(other, pathlib.Path(folder) / "fills", step)[0]
      bad = {path: campaign.DAMAGES[damage](path.read_bytes(), rng) for path in programs.glob("*.program")}
      assert bad, "no program was kept"
      for path, data in bad.items():
        path.write_bytes(data)
      same, attempt = ended(other, pathlib.Path(folder) / "reads", step)
      told = [f"{path} is damaged" in attempt.said and path.read_bytes() != data for path, data in bad.items()]
    verdict = ("found" if same else "lost") if all(told) else "silent"
    said = f"{sum(told)} of {len(told)} were found\n{attempt.said}"
    table.add(f"{damage}, compiled programs", "all of them at once", verdict, said)

  side_by_side(spoiled, [(damage,) for damage in campaign.DAMAGES])


def test_a_changed_input_of_the_user_is_another_run(whole: Whole, table: campaign.Table) -> None:
  file = next(pathlib.Path(one.partition("=")[2]) for one in whole.launcher.arguments if "monitors.prompts" in one)
  before = file.read_bytes()
  try:
    for damage, change in campaign.DAMAGES.items():
      file.write_bytes(change(before, drawn(damage)))
      with tempfile.TemporaryDirectory(dir=whole.workdir.parent) as folder:
        workdir = pathlib.Path(folder) / "run"
        shutil.copytree(whole.workdir, workdir)
        attempt = whole.launcher.run(workdir)
      named = attempt.code == 2 and ("monitors.prompts" in attempt.said or str(file) in attempt.said)
      verdict = "found" if named else "silent" if attempt.code == 0 else "lost"
      table.add(f"{damage}, input file", "monitors.prompts", verdict, attempt.said)
  finally:
    file.write_bytes(before)


# Signals, locks, and what runs out


def stopped(whole: Whole, moment: Moment, code: int, kind: str, table: campaign.Table) -> None:
  """Sends a signal in a step; the run must end with the code, and go on to the same."""
  with tempfile.TemporaryDirectory(dir=whole.workdir.parent) as folder:
    workdir = pathlib.Path(folder) / "run"
    shutil.copytree(whole.at(moment.step), workdir)
    attempt = whole.launcher.run(workdir, moment=moment)
    same, last = ended(whole, workdir, moment.step)
  good = attempt.fired is not None and attempt.code == code and not attempt.hung and same
  said = f"code {attempt.code}\n{attempt.said[-700:]}\n{last.said[-700:]}"
  table.add(kind, moment.step, "survived" if good else "lost", said)


def test_a_run_that_is_told_to_stop_goes_on(whole: Whole, table: campaign.Table) -> None:
  rng, items = drawn("signals"), []
  for name, number, code in (("SIGTERM", signal.SIGTERM, 75), ("SIGINT", signal.SIGINT, 130)):
    for step in share(("m0", "baseline", "aift1/prompts", "aift1/judgements", "aift1/pairs", "m2", "eval/m2"), rng):
      calls = int(whole.steps[step]["calls"])
      items.append((whole, Moment(step, call=rng.randint(1, calls), signal=number), code, name, table))
    for step in share(("m0", "m1"), rng):
      moment = Moment(step, call=rng.randint(2, 10), within="states/", signal=number)
      items.append((whole, moment, code, f"{name} while a state is saved", table))
  side_by_side(stopped, items)


def test_a_second_run_in_a_work_directory_is_refused(
  whole: Whole, table: campaign.Table, tmp_path: pathlib.Path
) -> None:
  workdir, step = tmp_path / "run", "aift1/judgements"
  shutil.copytree(whole.at(step), workdir)
  place = tmp_path / "place"
  place.mkdir()
  held = Moment(step, call=2, signal=signal.SIGSTOP)
  first = whole.launcher.begin(workdir, str(place), moment=held)
  while first.is_alive() and '"fired"' not in ((place / "notes").read_text() if (place / "notes").exists() else ""):
    time.sleep(0.1)
  second = whole.launcher.run(workdir)
  first.kill()
  first.join()
  same, last = ended(whole, workdir, step)
  refused = second.code == 2 and str(workdir) in second.said
  verdict = ("survived" if same else "lost") if refused else "silent"
  table.add("a second run in the work directory", step, verdict, second.said + last.said)


def size(folder: pathlib.Path) -> int:
  """Bytes of a folder on a disk that gives out whole pages."""
  return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[Callable[[str], pathlib.Path]]:
  """Mounts a disk with these options, or mounts it anew; its folder."""
  place = tmp_path / "disk"
  place.mkdir()

  def mount(options: str) -> pathlib.Path:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    return place

  yield mount
  while os.path.ismount(place):
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("step", ["m0", "baseline", "aift1/responses", "aift1/pairs", "eval/m1"])
def test_a_full_disk_loses_nothing(
  whole: Whole, table: campaign.Table, small_disk: Callable[[str], pathlib.Path], step: str
) -> None:
  rng, start = drawn(f"disk {step}"), size(whole.at(step))
  added = size(whole.workdir / step)
  for part in share((0.2, 0.7), rng):
    workdir = small_disk(f"size={int(start + part * rng.uniform(0.7, 1) * added) // 4096 * 4096}") / "run"
    shutil.copytree(whole.at(step), workdir)
    attempt = whole.launcher.run(workdir, moment=Moment(step, ended=True))
    subprocess.run(["mount", "-o", "remount,size=1g", str(workdir.parent)], check=True)
    same, last = ended(whole, workdir, step)
    fits = attempt.fired is not None  # States that were deleted again took more room than is left in the end.
    verdict = "survived" if same and not attempt.hung and (fits or attempt.code in (2, 74)) else "lost"
    table.add("full disk", step, verdict, f"code {attempt.code}\n{attempt.said[-900:]}\n{last.said[-600:]}")
    subprocess.run(["umount", str(workdir.parent)], check=True)


def test_a_disk_that_cannot_be_written_is_said(
  whole: Whole, table: campaign.Table, small_disk: Callable[[str], pathlib.Path]
) -> None:
  step = "aift1/responses"
  workdir = small_disk("size=1g") / "run"
  shutil.copytree(whole.at(step), workdir)
  subprocess.run(["mount", "-o", "remount,ro", str(workdir.parent)], check=True)
  attempt = whole.launcher.run(workdir)
  subprocess.run(["mount", "-o", "remount,rw", str(workdir.parent)], check=True)
  same, last = ended(whole, workdir, step)
  verdict = "survived" if same and attempt.code in (2, 74) and str(workdir) in attempt.said else "lost"
  table.add("read-only disk", step, verdict, f"code {attempt.code}\n{attempt.said[-900:]}\n{last.said[-600:]}")


def test_a_process_without_memory_loses_nothing(whole: Whole, table: campaign.Table) -> None:
  def starved(step: str, room: int) -> None:
    with tempfile.TemporaryDirectory(dir=whole.workdir.parent) as folder:
      workdir = pathlib.Path(folder) / "run"
      shutil.copytree(whole.at(step), workdir)
      limits = {resource.RLIMIT_AS: room * 2**20}
      attempt = whole.launcher.run(workdir, moment=Moment(step, ended=True), limits=limits)
      same, last = ended(whole, workdir, step)
    if attempt.fired is None:  # Otherwise it was enough.
      said = f"{room} MiB: code {attempt.code}\n{attempt.said[-900:]}\n{last.said[-600:]}"
      kind = "out of memory, hung until told to stop" if attempt.hung else "out of memory"
      stops = attempt.code == 75 or not attempt.hung
      table.add(kind, step, "survived" if same and stops else "lost", said)

  rooms = (1800, 2200, 2600, 3000)
  side_by_side(starved, share([(step, room) for step in ("m1", "aift1/judgements") for room in rooms], drawn("memory")))
  assert SHARE < 1 or any(kind.startswith("out of memory") for kind, _ in table.rows), f"{rooms} MiB are enough"
