"""The launcher of a pod on one machine: restarts of a fake srlm; and the whole loop, killed in every stage."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def pod(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ["launch/local_pod.sh", *arguments], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
  )


def fake(place: pathlib.Path, body: str) -> dict[str, str]:
  """An environment whose srlm is a few lines of bash; $tries is how often this process was started before."""
  (place / "bin").mkdir()
  (place / "bin" / "python").symlink_to(sys.executable)
  srlm = place / "bin" / "srlm"
  count = f"{place}/tries-$SRLM_PROCESS"
  srlm.write_text(
    f"#!/usr/bin/env bash\ntries=$(cat {count} 2>/dev/null || echo 0)\necho $((tries + 1)) >{count}\n{body}\n"
  )
  srlm.chmod(0o755)
  return {"VENV": str(place), "LOGS": str(place / "logs")}


def starts(place: pathlib.Path) -> list[int]:
  return [int((place / f"tries-{number}").read_text()) for number in (0, 1)]


def test_every_process_knows_the_pod_and_keeps_a_log(tmp_path: pathlib.Path) -> None:
  told = 'echo "$* $SRLM_PROCESS/$SRLM_PROCESSES ${SRLM_COORDINATOR%:*} $XLA_FLAGS"'
  done = pod("2", "4", "all", "--x=1", **fake(tmp_path, told), XLA_FLAGS="--xla_more=1")
  flags = "--xla_more=1 --xla_force_host_platform_device_count=4"
  assert (done.returncode, done.stdout.strip()) == (0, f"all --x=1 0/2 127.0.0.1 {flags}")
  assert (tmp_path / "logs" / "1.log").read_text().strip() == f"all --x=1 1/2 127.0.0.1 {flags}"


@pytest.mark.parametrize("loss", ["exit 75", "kill -9 $$"])
def test_a_lost_process_has_all_started_again(tmp_path: pathlib.Path, loss: str) -> None:
  done = pod("2", "1", "all", **fake(tmp_path, f"if ((SRLM_PROCESS == 1 && tries < 2)); then {loss}; fi"))
  assert done.returncode == 0 and starts(tmp_path) == [3, 3]
  assert done.stderr.count("all are started again") == 2


def test_what_the_others_would_wait_for_ends_them(tmp_path: pathlib.Path) -> None:
  began = time.monotonic()
  done = pod("2", "1", "all", **fake(tmp_path, "if ((SRLM_PROCESS == 1)); then exit 3; fi; exec sleep 100"))
  assert done.returncode == 3 and starts(tmp_path) == [1, 1]
  assert time.monotonic() - began < 60


def test_a_stopped_process_is_killed(tmp_path: pathlib.Path) -> None:
  body = "if ((tries)); then exit 0; fi; if ((SRLM_PROCESS == 1)); then kill -STOP $$; fi; exit 75"
  done = pod("2", "1", "all", **fake(tmp_path, body))
  assert done.returncode == 0 and starts(tmp_path) == [2, 2]


def test_told_to_stop_it_gives_its_processes_time_to_end(tmp_path: pathlib.Path) -> None:
  body = (
    f"trap 'sleep 3; echo saved >{tmp_path}/saved-$SRLM_PROCESS; exit 75' TERM; touch {tmp_path}/here-$SRLM_PROCESS\n"
  )
  settings = fake(tmp_path, body + "while :; do sleep 0.1; done")
  running = subprocess.Popen(["launch/local_pod.sh", "2", "1", "all"], cwd=ROOT, env={**os.environ, **settings})
  while not all((tmp_path / f"here-{number}").exists() for number in (0, 1)):
    assert running.poll() is None
    time.sleep(0.1)
  running.send_signal(signal.SIGTERM)
  assert running.wait() == 75 and starts(tmp_path) == [1, 1]
  assert all((tmp_path / f"saved-{number}").exists() for number in (0, 1))


def test_it_gives_up(tmp_path: pathlib.Path) -> None:
  done = pod("2", "1", "all", **fake(tmp_path, "exit 75"), RETRIES="1")
  assert done.returncode == 75 and starts(tmp_path) == [2, 2]
  assert "a process was lost again (exit code 75) after 1 new starts" in done.stderr


def test_numbers_are_asked_for(tmp_path: pathlib.Path) -> None:
  done = pod("all", "--config=configs/tiny.py", **fake(tmp_path, "exit 0"))
  assert done.returncode == 2 and "give the number of processes and of devices" in done.stderr


def kill_in_every_stage(logs: pathlib.Path, over: threading.Event, killed: list[str]) -> None:
  """Kills a process, each in its turn, a moment after a step of training or of the loop has begun the first time."""
  others = r"world|seed|eft|eval/(baseline|m1)|report"
  while not over.wait(0.05):
    said = (logs / "0.log").read_text() if (logs / "0.log").exists() else ""
    step = ([""] + re.findall(r"\] (\S+): stage ", said))[-1]
    if step and step not in killed and not re.fullmatch(others, step):
      time.sleep(0.3 * len(killed) % 2)
      pids = (logs / "pids").read_text().split()
      with contextlib.suppress(ProcessLookupError):  # It may have ended just now.
        os.kill(int(pids[len(killed) % len(pids)]), signal.SIGKILL)
        killed.append(step)


def shas(workdir: pathlib.Path) -> dict[tuple[str, str], str]:
  """{(folder, file): SHA-256} of what is committed, without the reports, and expected scores with what is made of them.

  Those are real numbers, rounded: over two devices their last bit is another one than over four.
  """
  found = {}
  for path in workdir.rglob("manifest.json"):
    for name, facts in json.loads(path.read_text())["files"].items():
      if path.parent.name != "report" and not name.startswith("expected-") and name != "metrics.json":
        found[str(path.parent.relative_to(workdir)), name] = facts["sha256"]
  return found


def expected(folder: pathlib.Path) -> dict[tuple[str, int], float]:
  """{(prompt, sample): expected score} of an evaluation."""
  lines = [json.loads(line) for path in folder.glob("expected-*.jsonl") for line in path.read_text().splitlines()]
  return {(line["prompt_id"], line["sample"]): line["score"] for line in lines}


@pytest.mark.slow
def test_two_processes_give_what_one_gives_whatever_is_killed(tmp_path: pathlib.Path) -> None:
  venv = pathlib.Path(sys.executable).parents[1]
  call = ["all", "--config=configs/tiny.py:smoke", "--config.models=2", "--config.sft.min_steps=80"]
  # The closer looks are shards and single files as those of the loop are; each restart takes a quarter of a minute.
  call += ["--config.monitors.canary_prompts=0", "--config.analysis.classes=", "--config.analysis.points=0"]
  runs = {name: tmp_path / name for name in ("one", "two")}
  one = pod("1", "4", *call, f"--workdir={runs['one']}", VENV=str(venv), LOGS=str(tmp_path / "logs1"))
  assert one.returncode == 0, one.stdout[-2000:] + one.stderr[-2000:]
  over, killed, logs = threading.Event(), [], tmp_path / "logs2"
  killer = threading.Thread(target=kill_in_every_stage, args=(logs, over, killed))
  killer.start()
  two = pod("2", "2", *call, f"--workdir={runs['two']}", VENV=str(venv), LOGS=str(logs), RETRIES="40")
  over.set()
  killer.join()
  assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]
  loop = {"prompts", "responses", "judgements", "pairs"}  # A stage of a moment may end before it is killed.
  assert set(killed) >= {"m0", "baseline", "m1", "m2", "eval/m2", *(f"aift1/{part}" for part in loop)}
  assert two.stderr.count("all are started again") >= len(killed) - 1  # The last kill may come after the end.
  for name in ("pairs.jsonl", "reference.jsonl"):
    same = [(run / "aift1" / "pairs" / name).read_text() for run in runs.values()]
    assert same[0] == same[1] and same[0]
  for model in ("m0", "baseline", "m1", "m2"):
    for name in ("fingerprints.json", "metrics.jsonl"):
      assert (runs["one"] / model / name).read_text() == (runs["two"] / model / name).read_text(), (model, name)
  made, again = (shas(run) for run in runs.values())
  assert made == again and len({folder for folder, _ in made}) >= 13
  for model in ("baseline", "m1", "m2"):
    one, two = (expected(run / "eval" / model) for run in runs.values())
    assert one.keys() == two.keys() and len(one) > 50
    assert all(two[key] == pytest.approx(score, abs=1.5e-4) for key, score in one.items())
