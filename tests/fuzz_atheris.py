"""Runs all targets under atheris, each in a process of its own: python fuzz_atheris.py FOLDER TARGET=INPUTS …

libFuzzer chooses the bytes by what of our modules they make run. Each target leaves FOLDER/NAME.json: how many inputs,
how many of them met documented errors, and the first exceptions that got out, with their bytes.
"""

import json
import os
import pathlib
import random
import sys
import traceback

import atheris

with atheris.instrument_imports(include=["srlm_jax"]):
  import fuzz_targets

from fuzz_draw import Draw


def fuzz(name: str, runs: int, folder: pathlib.Path) -> None:
  """Fuzzes one target; ends the process."""
  target = getattr(fuzz_targets, name)
  target(Draw(b""))  # What it imports and makes once takes longer than an input may, on a busy machine.
  found = {"inputs": 0, "documented errors": 0, "crashes": 0, "first": []}

  def once(data: bytes) -> None:
    draw = Draw(data)
    try:
      target(draw)
    except Exception:  # noqa: BLE001 (whatever gets out of a target is a finding)
      found["crashes"] += 1
      found["first"] = [*found["first"], [data.hex(), traceback.format_exc()]][:3]
    found["inputs"] += 1
    found["documented errors"] += draw.refused > 0
    if found["inputs"] % 100 == 0 or found["inputs"] >= runs:
      (folder / f"{name}.json").write_text(json.dumps(found))

  corpus = folder / f"{name}.corpus"
  corpus.mkdir()
  for seed in range(8):  # To begin with; libFuzzer begins with one byte.
    (corpus / str(seed)).write_bytes(random.Random(seed).randbytes(40 * (seed + 1)))
  options = [f"-runs={runs}", "-seed=1", "-max_len=400", "-len_control=0", "-timeout=90", f"-artifact_prefix={folder}/"]
  atheris.Setup([name, *options, str(corpus)], once)
  atheris.Fuzz()


def main(folder: pathlib.Path, work: dict[str, int]) -> int:
  """Forks a process for each target, two at a time; how many of them did not end well."""
  waiting, running, failed = list(work.items()), dict[int, str](), 0
  while waiting or running:
    while waiting and len(running) < 2:
      name, runs = waiting.pop(0)
      process = os.fork()
      if not process:
        with (folder / f"{name}.log").open("wb") as log:
          os.dup2(log.fileno(), 1)
          os.dup2(log.fileno(), 2)
        fuzz(name, runs, folder)
        os._exit(0)
      running[process] = name
    process, status = os.wait()
    print(running.pop(process), "ended with", os.waitstatus_to_exitcode(status), flush=True)
    failed += status != 0
  return failed


if __name__ == "__main__":
  pairs = (argument.split("=") for argument in sys.argv[2:])
  sys.exit(main(pathlib.Path(sys.argv[1]), {name: int(runs) for name, runs in pairs}))
