"""Fuzzing: a few inputs for each target in every run, and by -m faults a campaign of hypothesis and atheris.

The campaign prints a table; with SRLM_FAULTS_OUT=FOLDER it is written there, too (fuzz.md).
"""

from collections.abc import Callable
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

from fuzz_draw import Draw
import fuzz_targets
import hypothesis
from hypothesis import strategies
import pytest

SLOWER = {"overrides": 20, "blind_page": 5, "turns": 3, "tokens": 3, "page": 2}  # Of these so many times fewer inputs.
DEFAULT, HYPOTHESIS, ATHERIS = 4_000, 50_000, 60_000  # Inputs of all targets together.
HERE = pathlib.Path(__file__).parent


def share(total: int) -> dict[str, int]:
  """How many inputs each target gets of a total."""
  weights = {target.__name__: 1 / SLOWER.get(target.__name__, 1) for target in fuzz_targets.TARGETS}
  return {name: -int(-total * weight // sum(weights.values())) for name, weight in weights.items()}


def by_hypothesis(target: Callable[[Draw], None], count: int) -> tuple[int, int]:
  """Runs a target on so many inputs; how many there were, and how many of them met documented errors."""
  inputs = refused = 0

  @hypothesis.settings(
    max_examples=count,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
  )
  @hypothesis.given(strategies.binary(min_size=8, max_size=400))
  def run(data: bytes) -> None:
    nonlocal inputs, refused
    draw = Draw(data)
    inputs += 1
    target(draw)
    refused += draw.refused > 0

  run()
  return inputs, refused


@pytest.mark.parametrize("target", fuzz_targets.TARGETS, ids=lambda target: target.__name__)
def test_a_few_inputs(target: Callable[[Draw], None]) -> None:
  by_hypothesis(target, share(DEFAULT)[target.__name__])


def test_the_same_bytes_are_the_same_input() -> None:
  data = bytes(range(256)) * 2
  assert [Draw(data).text(longest=99) for _ in range(2)] == [Draw(data).text(longest=99)] * 2
  assert Draw(b"").text() == "" and Draw(b"").edited([b"whole"]) == b"whole"


def test_a_finding_is_a_failure() -> None:
  """Hypothesis reports what gets out of a target, and an error without a message is none that is documented."""

  def broken(draw: Draw) -> None:
    assert "<script" not in draw.text(longest=20)

  with pytest.raises(AssertionError):
    by_hypothesis(broken, 2000)
  for wrong in (ValueError(), ValueError("no path"), TypeError("x")):
    with pytest.raises((AssertionError, TypeError)):
      Draw(b"").read(functools.partial(_raise, wrong), "/a/path")


def _raise(error: Exception) -> None:
  raise error


def _told(engine: str, rows: dict[str, tuple[int, int, int]], seconds: float) -> str:
  """The table of an engine's campaign, printed and appended to fuzz.md."""
  total = [sum(column) for column in zip(*rows.values(), strict=True)]
  lines = [
    f"| {name} | {' | '.join(f'{one:,}' for one in row)} |" for name, row in {**rows, "all": tuple(total)}.items()
  ]
  head = f"{time.strftime('%Y-%m-%d')}, {engine}, {seconds / 60:.1f} minutes\n\n"
  text = f"{head}| target | inputs | documented errors | crashes |\n|---|---|---|---|\n" + "\n".join(lines) + "\n\n"
  print(f"\n{text}")
  if folder := os.environ.get("SRLM_FAULTS_OUT"):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with pathlib.Path(folder, "fuzz.md").open("a", encoding="utf-8") as file:
      file.write(text)
  return text


@pytest.mark.faults
def test_a_campaign_of_hypothesis() -> None:
  started, rows = time.monotonic(), {}
  counts = share(HYPOTHESIS)
  for target in fuzz_targets.TARGETS:
    inputs, refused = by_hypothesis(target, counts[target.__name__])
    rows[target.__name__] = (inputs, refused, 0)  # A crash ends the test with the input that makes it.
  _told("hypothesis", rows, time.monotonic() - started)
  assert sum(inputs for inputs, _, _ in rows.values()) >= 0.9 * HYPOTHESIS  # It stops where a target has no more.


@pytest.mark.faults
def test_a_campaign_of_atheris(tmp_path: pathlib.Path) -> None:
  if not importlib.util.find_spec("atheris"):
    pytest.skip("atheris is not installed: pip install -e '.[faults]'")
  started = time.monotonic()
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
  work = [f"{name}={count}" for name, count in share(ATHERIS).items()]
  done = subprocess.run(
    [sys.executable, HERE / "fuzz_atheris.py", tmp_path, *work], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
  found = {path.stem: json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))}
  rows = {name: (one["inputs"], one["documented errors"], one["crashes"]) for name, one in found.items()}
  text = _told("atheris", rows, time.monotonic() - started)
  assert not any(one["crashes"] for one in found.values()), "\n".join(
    f"{n}: {one['first']}" for n, one in found.items()
  )
  assert rows.keys() == share(1).keys() and sum(row[0] for row in rows.values()) >= ATHERIS, text
