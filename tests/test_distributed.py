"""Several processes: they agree, read what lies in parts, and end together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]

TOGETHER = """
import jax, jax.numpy as jnp, numpy as np
from srlm_jax import distributed, mesh
with distributed.session():
  who = jax.process_index()
  assert (jax.process_count(), jax.device_count()) == (2, 4)
  assert distributed.agree("a value", {"who": who}) == {"who": 0}
  rows = jax.sharding.NamedSharding(mesh.make_mesh(), mesh.spec(("batch",)))
  array = distributed.place(np.arange(8.0), rows)
  assert not array.is_fully_addressable
  np.testing.assert_array_equal(np.asarray(distributed.whole(array * 2)), np.arange(8.0) * 2)
  distributed.barrier("done")
  print(distributed.name(), distributed.writes())
"""
WAITING = """
import sys, time
from srlm_jax import distributed
with distributed.session():
  print("here", flush=True)
  if distributed.writes():
    distributed.barrier("the other", 60)
  time.sleep(60)
"""


def start(code: str, place: pathlib.Path) -> list[subprocess.Popen]:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  settings = {
    **{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "SRLM_PROCESSES": "2"},
    **{
      "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      "SRLM_COORDINATOR": f"127.0.0.1:{port}",
      "SRLM_SILENT_SECONDS": "15",
    },
  }
  return [
    subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env={**os.environ, **settings, "SRLM_PROCESS": str(number)},
      stdout=(place / f"{number}.out").open("w"),
      stderr=(place / f"{number}.err").open("w"),
    )
    for number in range(2)
  ]


def test_two_processes_agree_and_read_what_lies_in_parts(tmp_path: pathlib.Path) -> None:
  codes = [process.wait(timeout=120) for process in start(TOGETHER, tmp_path)]
  assert codes == [0, 0], (tmp_path / "0.err").read_text() + (tmp_path / "1.err").read_text()
  assert [(tmp_path / f"{n}.out").read_text().splitlines()[-1] for n in (0, 1)] == [
    "process 0 of 2 True",
    "process 1 of 2 False",
  ]


def test_a_killed_process_ends_the_other_with_75(tmp_path: pathlib.Path) -> None:
  processes = start(WAITING, tmp_path)
  until = time.monotonic() + 60
  while any("here" not in (tmp_path / f"{number}.out").read_text() for number in (0, 1)):
    assert time.monotonic() < until, (tmp_path / "0.err").read_text()
    time.sleep(0.2)
  processes[1].send_signal(signal.SIGKILL)
  assert processes[0].wait(timeout=60) == 75
  assert "process 1" in (tmp_path / "0.err").read_text()


def test_alone_it_does_nothing() -> None:
  from srlm_jax import distributed

  assert distributed.writes() and not distributed.name()
  assert distributed.agree("x", [1]) == [1]
  distributed.barrier("nobody")
