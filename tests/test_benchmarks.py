"""The benchmarks run, and say what they measured; how fast is for them to say, on a quiet machine."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch, the peer, is not installed: '.[torch]'")
@pytest.mark.parametrize("workload", ["answers", "judging"])
def test_rollouts_are_compared_over_the_same_tokens(workload: str) -> None:
  small = ["--prompts=4", "--median=6", "--rounds=1", "--slots=8"]
  done = subprocess.run(
    [sys.executable, "benchmarks/rollouts.py", f"--workload={workload}", *small],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["prompts"] == 4 and found["tokens"] >= 4 * 4 * found["samples"]
  assert found["ours tokens/s"] > 0 and found["transformers tokens/s"] > 0 and 0 < found["slot use"] <= 1
