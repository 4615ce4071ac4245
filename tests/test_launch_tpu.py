"""launch/tpu.py against tests/fake_gcloud, whose workers are folders where the commands really run."""

import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
PLACE = ["--name=pod", "--project=my-project", "--zone=us-east5-a"]
KIND = ["--type=v5p-16", "--version=v2-alpha-tpuv5"]
QUICK = ["--poll=0.2", "--log-poll=0.05", "--backoff=0.05", "--settle=0.6", "--ssh-retries=1", "--wait=20"]
ARGUMENTS = ["all", "--config=configs/tiny.py", "--workdir=gs://bucket/run"]
SETUP = """echo "setup $*" >>~/setups
mkdir -p "$VENV/bin"
printf '#!/bin/sh\\nexec bash "$FAKE_GCLOUD/srlm" "$@"\\n' >"$VENV/bin/srlm"
chmod +x "$VENV/bin/srlm"
"""
# For programs: waits until the logs of the first slice have been followed for some time.
WATCHED = """cd $FAKE_GCLOUD
until [ $(grep -c follow calls.jsonl) -ge $(ls -d homes/*.1.* | wc -l) ]; do sleep 0.05; done
sleep 0.3; """


class Cloud:
  """A repository with the launcher, a fake cloud beside it, and the program that its workers run."""

  def __init__(self, folder: pathlib.Path):
    self.repo, self.state, self.path = folder / "repo", folder / "cloud", folder / "path"
    self.logs = self.repo / "runs" / "logs" / "pod"
    (self.repo / "launch").mkdir(parents=True)
    (self.repo / "constraints").mkdir()
    self.state.mkdir()
    self.path.mkdir()
    for name in ("tpu.py", "tpu_slice.py", "tpu_worker.sh"):
      shutil.copy(ROOT / "launch" / name, self.repo / "launch")
    (self.repo / "launch" / "setup.sh").write_text(SETUP)
    (self.repo / "constraints" / "py{}{}.txt".format(*sys.version_info)).write_text("jax==1\n")
    (self.repo / ".gitignore").write_text("/runs/\n__pycache__/\n")
    (self.path / "gcloud").symlink_to(ROOT / "tests" / "fake_gcloud")
    (self.path / "python3").symlink_to(sys.executable)
    self.git("init", "-q")
    self.commit()
    self.plan()
    self.program("echo step $WORKER")

  def git(self, *words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(self.repo), *who, *words], check=True)

  def commit(self) -> None:
    self.git("add", ".")
    self.git("commit", "-qm", "x")

  def plan(self, workers: int = 1, creates: tuple[str, ...] = ("active",)) -> None:
    (self.state / "plan.json").write_text(json.dumps({"workers": workers, "creates": creates}))

  def program(self, text: str) -> None:
    (self.state / "srlm").write_text(text)

  def command(self, action: str, *options: str, arguments: list[str] = ARGUMENTS) -> dict:
    tail = [*KIND, *QUICK, *options, "--", *arguments] if action == "run" else [*QUICK, *options]
    env = os.environ | {"PATH": f"{self.path}:{os.environ['PATH']}", "FAKE_GCLOUD": str(self.state)}
    env |= {"FAKE_PYTHON": str(self.path / "python3"), "SECRET": "hush hush"}
    return {"args": [sys.executable, "-S", str(self.repo / "launch" / "tpu.py"), action, *PLACE, *tail], "env": env}

  def call(self, action: str, *options: str, **more) -> subprocess.CompletedProcess:
    pipes = {"capture_output": True, "text": True, "timeout": 40}
    return subprocess.run(**self.command(action, *options, **more), **pipes, check=False)

  def log(self, worker: int) -> str:
    """The local log, without the lines that name the runs."""
    return re.sub(r"===== run .* =====\n", "", (self.logs / f"worker-{worker}.log").read_text())

  def calls(self) -> list[list[str]]:
    path = self.state / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def count(self, word: str) -> int:
    """How many calls were `queued-resources WORD`, `tpu-vm WORD` or a worker's WORD."""
    return sum(word in call[:2] or f"tpu_worker.sh {word}" in " ".join(call) for call in self.calls())

  def slices(self) -> dict:
    return json.loads((self.state / "cloud.json").read_text())["slices"]

  def home(self, worker: int, generation: int = 1, node: str = "pod") -> pathlib.Path:
    return self.state / "homes" / f"{node}.{generation}.{worker}"

  def wait_for(self, done, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
      assert time.monotonic() < deadline
      time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  for path in made.state.glob("homes/*/srlm/run/pid"):
    try:
      os.killpg(int(path.read_text()), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
      pass


def test_two_workers_run_to_success(cloud):
  cloud.plan(workers=2)
  done = cloud.call("run", "--spot")
  assert done.returncode == 0, done.stderr
  assert (cloud.log(0), cloud.log(1)) == ("step 0\n", "step 1\n")
  assert done.stdout == "step 0\n"  # The first worker's log, live; the other's in its file alone.
  assert cloud.slices()["pod"]["state"] == "ACTIVE"  # Kept: --delete was not given.
  assert cloud.slices()["pod"]["spot"]
  assert (cloud.home(0) / "setups").read_text() == "setup tpu,gcs\n"
  assert not cloud.count("delete")


def test_an_existing_slice_is_reused_and_gets_another_commit(cloud):
  assert cloud.call("run").returncode == 0
  cloud.git("commit", "-q", "--allow-empty", "-m", "y")
  assert cloud.call("run", arguments=["stages"]).returncode == 0
  assert (cloud.count("create"), cloud.count("install"), cloud.count("start")) == (1, 2, 2)
  refused = cloud.call("run", "--type=v5p-32")
  assert refused.returncode == 2
  assert "exists as" in refused.stderr


def test_creation_that_fails_then_succeeds(cloud):
  cloud.plan(creates=("refused", "FAILED", "active"))
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  assert cloud.count("create") == 3
  assert "no more capacity" in done.stderr  # What create itself said,
  assert '"message": "no capacity"' in done.stderr  # and what the failed request says.


def test_creation_that_never_succeeds(cloud):
  cloud.plan(creates=("FAILED",))
  done = cloud.call("run", "--max-restarts=1")
  assert done.returncode == 75
  assert cloud.count("create") == 2
  assert "no restarts left" in done.stderr


def test_a_request_that_stays_in_the_queue(cloud):
  cloud.plan(creates=("WAITING_FOR_RESOURCES",))
  done = cloud.call("run", "--wait=0.5")
  assert done.returncode == 75
  assert "stays in the queue" in done.stderr
  assert cloud.slices()["pod"]["state"] == "WAITING_FOR_RESOURCES"


def test_a_mistake_is_not_repeated(cloud):
  cloud.plan(creates=("denied",))
  done = cloud.call("run")
  assert done.returncode == 2
  assert "PERMISSION_DENIED" in done.stderr
  assert cloud.count("create") == 1


def test_preemption_recreates_and_resumes(cloud):
  cloud.plan(workers=2)
  taken = f"{WATCHED} touch preempt; sleep 60"
  cloud.program(f"echo step $GENERATION; if [ $GENERATION = 1 ]; then {taken}; fi")
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  assert (cloud.count("create"), cloud.count("delete")) == (2, 1)
  assert cloud.log(1).splitlines()[-1] == "step 2"
  assert (cloud.logs / "worker-1.log").read_text().count("===== run") == 2


def test_preemption_with_no_restarts_left(cloud):
  cloud.program("touch $FAKE_GCLOUD/preempt; sleep 60")
  assert cloud.call("run", "--max-restarts=0").returncode == 75
  assert cloud.count("create") == 1


def test_a_lost_worker(cloud):
  cloud.plan(workers=2)
  cloud.program(f"echo on; if [ $GENERATION = 1 ]; then {WATCHED}" + " touch $FAKE_GCLOUD/lost-1-1; sleep 60; fi")
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  assert "worker 1: lost" in done.stderr
  assert (cloud.count("create"), cloud.count("delete")) == (2, 1)


def test_code_75_resumes_on_the_same_slice(cloud):
  cloud.plan(workers=2)
  stale = "[ ! -e ~/libtpu_lockfile ] || exit 9; touch ~/libtpu_lockfile"  # What a killed process leaves.
  cloud.program(f"{stale}; [ $WORKER = 0 ] || exit 0; echo x >>~/tries; [ $(wc -l <~/tries) = 2 ] || exit 75")
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  assert (cloud.count("create"), cloud.count("install"), cloud.count("start")) == (1, 2, 4)


def test_code_75_for_ever(cloud):
  cloud.program("exit 75")
  assert cloud.call("run", "--max-restarts=1").returncode == 75
  assert cloud.count("start") == 2
  assert cloud.slices()["pod"]["state"] == "ACTIVE"


def test_another_code_stops_at_once_with_the_end_of_the_log(cloud):
  cloud.plan(workers=2)
  cloud.program("if [ $WORKER = 1 ]; then seq 100; echo 'it broke'; exit 3; fi; sleep 60")
  began = time.monotonic()
  done = cloud.call("run")
  assert done.returncode == 3
  assert time.monotonic() - began < 15
  assert "100\nit broke" in done.stderr
  assert "\n50\n" not in done.stderr
  assert cloud.count("start") == 2
  assert (cloud.home(0) / "srlm/run/exit").read_text() == "143\n"  # The other worker was ended.


def test_the_reason_wins_over_its_consequence(cloud):
  cloud.plan(workers=2)
  cloud.program("if [ $WORKER = 1 ]; then exit 75; fi; sleep 0.2; exit 4")
  assert cloud.call("run").returncode == 4


def test_arguments_and_environment_arrive_intact_and_values_are_not_shown(cloud):
  odd = ["all", "--config.a=two  spaces", "it's", 'say "hi"', "$HOME `id` \\n; exit 9", "*", "", "ü"]
  cloud.program('printf \'%s\\n\' "$@"; echo "${#SECRET} $OTHER"; pwd')
  done = cloud.call("run", "--env=SECRET", "--env=OTHER=it's new", arguments=odd)
  assert done.returncode == 0, done.stderr
  assert cloud.log(0).split("\n")[:-1] == [*odd, "9 it's new", f"{cloud.home(0)}/srlm/code"]
  everything = done.stderr + json.dumps(cloud.calls()) + cloud.call("run", "--env=SECRET", "--dry-run").stdout
  assert "hush" not in everything
  for path in [*cloud.logs.rglob("*"), *cloud.home(0).rglob("*")]:
    assert not path.is_file() or b"hush" not in path.read_bytes(), path


def test_a_dropped_connection_loses_and_repeats_nothing(cloud):
  cloud.plan(workers=2)
  cloud.program('for i in $(seq 400); do echo "line $i of $WORKER"; sleep 0.002; done; printf "no newline"')
  (cloud.state / "drop-1").touch()
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  assert not (cloud.state / "drop-1").exists()
  for worker in (0, 1):
    expected = [f"line {i} of {worker}" for i in range(1, 401)] + ["no newline"]
    assert cloud.log(worker).splitlines() == expected
  assert done.stdout == cloud.log(0)


def test_of_a_long_log_the_end_is_kept_and_what_is_lost_is_said(cloud):
  script = cloud.repo / "launch" / "tpu_worker.sh"
  script.write_text(script.read_text().replace("60000000", "20000").replace("sleep 10", "sleep 0.05"))
  cloud.commit()
  cloud.program("""echo begin
until [ -e $FAKE_GCLOUD/fill ]; do sleep 0.05; done
seq 100000
until [ -e $FAKE_GCLOUD/go ]; do sleep 0.05; done
echo end""")

  def watch_until(line: str) -> None:
    watching = subprocess.Popen(**cloud.command("run"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    cloud.wait_for(lambda: (cloud.logs / "worker-0.log").exists() and f"{line}\n" in cloud.log(0))
    watching.kill()
    watching.wait()

  watch_until("begin")
  (cloud.state / "fill").touch()  # While nobody follows.
  run = cloud.home(0) / "srlm" / "run"
  size = len("begin\n" + "".join(f"{number}\n" for number in range(1, 100_001)))
  cloud.wait_for(lambda: (run / "gone").exists() and int((run / "gone").read_text()) == size - 20_000)
  assert (run / "log").stat().st_size == size and (run / "log").stat().st_blocks * 512 < 40_000
  watch_until("100000")
  (cloud.state / "go").touch()
  done = cloud.call("run")  # It finds its place behind what is lost.
  assert done.returncode == 0, done.stderr
  text = (cloud.logs / "worker-0.log").read_text()
  head, tail = re.split(rf"\n===== run .* from byte {size - 20_000} =====\n", text)
  assert head.endswith("=====\nbegin\n") and len(tail) == 20_000 + len("end\n")
  assert tail.endswith("\n99999\n100000\nend\n") and done.stdout == "end\n"
  assert cloud.count("start") == 1


def test_the_same_command_joins_a_program_that_still_runs(cloud):
  cloud.plan(workers=2)
  cloud.program("echo begin; while [ ! -e $FAKE_GCLOUD/go ]; do sleep 0.05; done; echo end")
  before = signal.signal(
    signal.SIGINT, signal.default_int_handler
  )  # A background shell has it ignored, by children too.
  first = subprocess.Popen(**cloud.command("run"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
  signal.signal(signal.SIGINT, before)
  cloud.wait_for(lambda: (cloud.logs / "worker-1.log").exists() and "begin" in cloud.log(1))
  cloud.wait_for(lambda: "begin" in cloud.log(0))
  assert "another launcher watches" in cloud.call("run").stderr
  first.send_signal(signal.SIGINT)
  _, said = first.communicate(timeout=20)
  assert first.returncode == 130
  assert b"the same command joins it" in said
  other = cloud.call("run", arguments=["report"])
  assert other.returncode == 2
  assert "another program runs" in other.stderr
  (cloud.state / "go").touch()
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  assert "joining run" in done.stderr
  assert cloud.count("start") == 2
  assert (cloud.log(0), cloud.log(1)) == ("begin\nend\n", "begin\nend\n")


def test_stop_ends_the_program_and_down_the_slice(cloud):
  cloud.program("sleep 60")
  first = subprocess.Popen(**cloud.command("run", "--max-restarts=0"), stderr=subprocess.DEVNULL)
  cloud.wait_for(lambda: (cloud.home(0) / "srlm/run/id").exists())
  assert cloud.call("stop").returncode == 0
  assert first.wait(timeout=20) == 75  # Ended from outside: may be resumed.
  assert (cloud.home(0) / "srlm/run/exit").read_text() == "143\n"
  assert cloud.call("down").returncode == 0
  assert cloud.slices() == {}
  assert cloud.call("down").returncode == 0  # There is none: nothing to do.


def test_several_slices_deleted_after_success(cloud):
  cloud.plan(workers=2)
  done = cloud.call("run", "--slices=2", "--delete")
  assert done.returncode == 0, done.stderr
  create = next(call for call in cloud.calls() if "create" in call)
  assert {"--node-count=2", "--node-prefix=pod"} <= set(create)
  assert [cloud.log(worker) for worker in range(4)] == ["step 0\n", "step 1\n", "step 0\n", "step 1\n"]
  assert "pod-1, worker 1" in (cloud.logs / "worker-3.log").read_text()
  assert cloud.slices() == {}  # --delete.


def test_dry_run_prints_the_commands_and_calls_nothing(cloud):
  done = cloud.call("run", "--dry-run", "--spot", "--delete", "--create-flag=--network=my net", arguments=["it's"])
  assert done.returncode == 0, done.stderr
  assert cloud.calls() == []
  assert not cloud.logs.exists()
  printed = collections.Counter(re.findall(r"^gcloud compute tpus (\S+ \w+)", done.stdout, re.MULTILINE))
  assert printed == {
    "queued-resources describe": 2, "queued-resources create": 1, "queued-resources delete": 1,
    "tpu-vm describe": 1, "tpu-vm scp": 1, "tpu-vm ssh": 5,
  }  # fmt: skip
  assert "'--network=my net'" in done.stdout
  started = next(line for line in done.stdout.splitlines() if "tpu_worker.sh start" in line)
  echoed = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {started}"], text=True)
  assert "it'\"'\"'s" in echoed  # What remains is the quoting for the worker's shell.
  assert cloud.call("down", "--dry-run").stdout.count("gcloud") == 2


def test_uncommitted_changes(cloud):
  (cloud.repo / "new.txt").write_text("x")
  done = cloud.call("run")
  assert done.returncode == 2
  assert "new.txt" in done.stderr
  assert cloud.calls() == []
  cloud.plan(creates=("denied",))
  assert "without these changes" not in cloud.call("run", "--allow-dirty").stderr
  assert cloud.count("create") == 1
  with tarfile.open(cloud.logs / "srlm_code.tar.gz") as code:
    assert "launch/tpu.py" in code.getnames()
    assert "new.txt" not in code.getnames()


@pytest.mark.parametrize(
  "flag", ["--name=a;b", "--zone=x", "--type=v5p", "--version=$(id)", "--env=1X", "--env=UNSET_"]
)
def test_names_are_checked(cloud, flag):
  done = cloud.call("run", flag)
  assert done.returncode == 2
  assert flag.split("=")[0] in done.stderr
  assert cloud.calls() == []


def test_an_old_python_is_replaced_by_a_newer_one(cloud):
  """A python3 without our pins: uv brings one. Both are stand-ins."""
  (cloud.state / "bin").mkdir()
  uv = 'echo "uv $*" >>~/said; [ "$2" != find ] || echo /opt/python3.12'
  python = f"""#!/bin/bash
case "$*" in
  -c*) echo py310.txt ;;
  "-m pip"*) echo "$*" >>~/said; mkdir -p uv/bin; printf '#!/bin/bash\\n%s\\n' '{uv}' >uv/bin/uv; chmod +x uv/bin/uv ;;
esac
"""
  (cloud.state / "bin" / "python3").write_text(python)
  (cloud.state / "bin" / "python3").chmod(0o755)
  (cloud.repo / "launch" / "setup.sh").write_text(SETUP + 'echo "$PYTHON" >>~/said\n')
  cloud.commit()
  done = cloud.call("run")
  assert done.returncode == 0, done.stderr
  said = (cloud.home(0) / "said").read_text().splitlines()
  assert re.fullmatch(r"-m pip install --quiet --target=uv uv==[0-9.]+", said[0])
  assert said[1:] == ["uv python install --quiet 3.12", "uv python find 3.12", "/opt/python3.12"]


def test_the_jobset_resumes_on_the_same_codes():
  manifest = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
  assert manifest["kind"] == "JobSet"
  (replicated,) = manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["backoffLimit"] == 0
  assert job["completions"] == job["parallelism"]
  assert pod["restartPolicy"] == "Never"
  codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
  launcher = (ROOT / "launch" / "tpu.py").read_text()
  resumed = [75, *map(int, re.search(r"RESUME = \(AGAIN, ([0-9, ]+)\)", launcher)[1].split(", "))]
  assert codes == [{"containerName": "srlm", "operator": "NotIn", "values": resumed}]
  (fatal,) = manifest["spec"]["failurePolicy"]["rules"]
  assert fatal["action"] == "FailJobSet"
  assert fatal["onJobFailureReasons"] == ["PodFailurePolicy"]
