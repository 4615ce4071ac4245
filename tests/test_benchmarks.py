"""The benchmarks run, and say what they measured; how fast is for them to say, on a quiet machine."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def call(name: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, f"benchmarks/{name}.py", *arguments],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )


def run(name: str, *arguments: str) -> dict[str, Any]:
  """What a benchmark's last line says."""
  done = call(name, *arguments)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch, the peer, is not installed: '.[torch]'")
@pytest.mark.parametrize("workload", ["answers", "judging"])
def test_rollouts_are_compared_over_the_same_tokens(workload: str) -> None:
  peers = ["transformers", *(["llama.cpp"] if importlib.util.find_spec("llama_cpp") else [])]
  small = ["--prompts=4", "--median=6", "--rounds=1", "--slots=8", f"--peers={','.join(peers)}"]
  found = run("rollouts", f"--workload={workload}", *small)
  assert found["prompts"] == 4 and found["tokens"] >= 4 * 4 * found["samples"]
  assert (
    found["ours tokens/s"] > 0 and all(found[f"{peer} tokens/s"] > 0 for peer in peers) and 0 < found["slot use"] <= 1
  )


@pytest.mark.slow
def test_ours_is_measured_without_peers() -> None:
  found = run("rollouts", "--prompts=4", "--median=6", "--rounds=1", "--slots=8", "--peers=")
  assert found["ours tokens/s"] > 0 and found["memory GB/s"] > 0 and found["matmul GFLOP/s"] > 0
  assert 0 < found["matmuls alone, % of our time"] < 100


@pytest.mark.slow
def test_what_a_prompt_costs_is_shared_by_its_samples() -> None:
  found = run("rollouts", "--workload=sharing", "--prompts=4", "--median=8", "--rounds=1")
  assert found["ms a sample, N = 8"] < found["ms a sample, N = 1"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL, the peer, is not installed: '.[bench]'")
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_training_is_compared_over_the_same_updates(method: str) -> None:
  small = ["--model=tiny", "--length=64", "--batch=2", "--warm=2", "--steps=2", "--rounds=2"]
  found = run("training", f"--method={method}", *small)
  assert found["losses compared"] == 7 and max(found["largest loss difference"].values()) < 1e-4
  assert {"ours", "TRL"} < set(found["lines"]) and all(line["tokens/s"] > 0 for line in found["lines"].values())


@pytest.mark.slow
def test_training_is_measured_without_peers() -> None:
  small = ["--model=1b", "--layers=1", "--length=32", "--batch=1", "--warm=2", "--steps=1", "--rounds=1"]
  found = run("training", "--method=dpo", *small)
  assert set(found["lines"]) == {"ours", "ours, with the reference's pass"}
  assert 0 < found["lines"]["ours"]["of its peak"] < 1 and found["compilations while timed"] == 0


@pytest.mark.slow
def test_memory_is_read_over_batches_and_steps() -> None:
  small = ["--batches=20", "--steps=20", "--save_every=5", "--embed=16"]
  found = run("memory", *small, "--within=100000")  # So few are a warm-up.
  assert [(row["loop"], row["of"], row["batches"]) for row in found["rows"]] == [
    (loop, of, 20) for loop in ("answers", "judging", "training") for of in ("host", "device")
  ]
  assert found["flat"] and all(row["MiB"]["4th"] > 0 for row in found["rows"] if row["of"] == "host")


@pytest.mark.slow
def test_memory_that_grows_is_said() -> None:
  done = call("memory", "--batches=20", "--loops=answers", "--embed=16", "--within=-100000")
  assert done.returncode == 1 and not json.loads(done.stdout.splitlines()[-1])["flat"]
