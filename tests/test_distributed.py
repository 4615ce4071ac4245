"""Several processes: they agree, read what lies in parts, and end together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]

TOGETHER = """
import jax, jax.numpy as jnp, numpy as np
from srlm_jax import distributed, endings, mesh
with distributed.session():
  who = jax.process_index()
  assert (jax.process_count(), jax.device_count()) == (2, 4)
  assert distributed.agree("a value", {"who": who}) == {"who": 0}
  assert distributed.gather("values", f"by {who}") == ["by 0", "by 1"]
  rows = jax.sharding.NamedSharding(mesh.make_mesh(), mesh.spec(("batch",)))
  array = distributed.place(np.arange(8.0), rows)
  assert not array.is_fully_addressable
  np.testing.assert_array_equal(np.asarray(distributed.whole(array * 2)), np.arange(8.0) * 2)
  distributed.barrier("done")
  try:  # Each waits for a moment for what the other does not do.
    if distributed.writes():
      distributed.barrier("the other", 0.1)
    else:
      distributed.NEVER = 1
      distributed.agree("the first", 1)
  except endings.PeerLost as error:
    print(distributed.name(), distributed.writes(), error)
"""
SHARED_OUT = """
import pathlib, sys, time
import jax
from etils import epath
from srlm_jax import artifacts, distributed, mesh, records, steps, config
with distributed.session():
  settings = config.base()
  settings.generation.mesh.tensor = 2
  own = steps.sampling_mesh(settings, mesh.make_mesh())
  assert dict(own.shape) == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 2} and distributed.apart(own)
  settings.generation.mesh.tensor = 4  # More than a process has.
  assert not distributed.apart(steps.sampling_mesh(settings, mesh.make_mesh()))
  out = artifacts.Artifact(epath.Path(sys.argv[1]), {"seed": 0}, {})
  out.begin()
  items = [records.Prompt(id=f"p{n}", text=f"Say {n}.", source="s") for n in range(10)]
  out.write_records("prompts-00001-of-00005.jsonl", items[2:4])
  loaded = []
  def work(tool, part):
    assert out.has("prompts-00001-of-00005.jsonl") and distributed.writes()
    time.sleep(3 * jax.process_index() * (part[0].id == "p4"))
    return [one.model_copy(update={"source": f"{tool} {jax.process_index()}"}) for one in part]
  artifacts.map_shards(out, "prompts", items, 2, own, lambda: "by", work)
  print([one.source for one in out.read_shards("prompts", records.Prompt)])
  artifacts.map_shards(out, "prompts", items, 2, own, lambda: 1 / 0, work)
  out.commit({})
"""
WEIGHTS = """
import json, pathlib, sys
import jax
from etils import epath
from srlm_jax import artifacts, checkpoint, convert, distributed, mesh, modelstore
sys.path.insert(0, "tests")
import tiny_model
with distributed.session():
  place = epath.Path(sys.argv[1])
  whole = mesh.make_mesh()
  model = checkpoint.init_model(tiny_model.CONFIG, whole, 0)
  assert not jax.tree.leaves(model)[0].is_fully_addressable
  wanted = checkpoint.fingerprints(model)
  checkpoint.save_model(place, model)
  own = mesh.make_mesh(data=1, fsdp=1, tensor=2, devices=jax.local_devices())
  crossed = mesh.make_mesh(fsdp=2, tensor=2, devices=[jax.devices()[n] for n in (0, 2, 1, 3)])
  for devices in (mesh.make_mesh(fsdp=2, tensor=2), crossed, own):
    assert checkpoint.fingerprints(checkpoint.load_model(place, devices, model.config)) == wanted
    with jax.set_mesh(whole):
      other = mesh.moved(model, devices)
    assert checkpoint.fingerprints(other) == wanted
    assert jax.tree.leaves(other)[0].is_fully_addressable == (devices is own)
  for _ in range(2):  # What is committed is what all processes have written.
    made = artifacts.Artifact(place / "m1", {}, {})
    made.begin()
    if not made.done:
      modelstore.save(made, model, tiny_model.words(), {})
  assert {name.split("/")[0] for name in made.manifest()["weights"]} >= {"ocdbt.process_0", "ocdbt.process_1"}
  store = checkpoint.StateStore(place / "states")
  for step in (2, 4):
    store.save(step, model)
  store.close()
  step, state = checkpoint.StateStore(place / "states").restore(model)
  assert step == 4 and checkpoint.fingerprints(state) == wanted
  if distributed.writes():  # What process 1 has written, and alone reads.
    for path in (place / "states" / "4" / "state" / "ocdbt.process_1" / "d").iterdir():
      path.write_bytes(b"torn")
  distributed.barrier("damaged")
  step, state = checkpoint.StateStore(place / "states").restore(model)
  assert step == 2 and checkpoint.fingerprints(state) == wanted
  convert.export_hf(model, place / "hf", max_shard=4000)
  distributed.barrier("exported")
  assert checkpoint.fingerprints(convert.import_hf(place / "hf", whole)) == wanted
  print("equal")
"""
FAILING = """
from srlm_jax import distributed
with distributed.session():
  distributed.barrier("begin")
  if not distributed.writes():
    raise ValueError("the data are bad")
  distributed.barrier("the other")
"""
FAILING_FIRST = """
from srlm_jax import distributed
def work():
  raise ValueError("the disk is full")
with distributed.session():
  distributed.first("write", work)
"""
STOPPED = """
import time
from srlm_jax import distributed
with distributed.session():
  print("here", flush=True)
  time.sleep(300)
"""
STUCK = """
import time
from srlm_jax import distributed
with distributed.session():
  distributed.progress("asleep")
  if distributed.writes():
    distributed.barrier("the other")
  time.sleep(300)
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


def start(code: str, place: pathlib.Path, **more: str) -> list[subprocess.Popen]:
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
  processes = []
  for number in range(2):
    own = {**os.environ, **settings, **more, "SRLM_PROCESS": str(number)}
    with (place / f"{number}.out").open("w") as out, (place / f"{number}.err").open("w") as err:
      words = [sys.executable, "-c", code, str(place / "work")]
      processes.append(subprocess.Popen(words, cwd=ROOT, env=own, stdout=out, stderr=err))
  return processes


def end(code: str, place: pathlib.Path, **more: str) -> tuple[list[int], list[str], list[str]]:
  """Exit codes, last lines of the output and errors of two processes."""
  codes = [process.wait(timeout=120) for process in start(code, place, **more)]
  said = [(place / f"{number}.out").read_text().splitlines() for number in (0, 1)]
  return codes, [lines[-1] if lines else "" for lines in said], [(place / f"{n}.err").read_text() for n in (0, 1)]


def test_two_processes_agree_and_read_what_lies_in_parts(tmp_path: pathlib.Path) -> None:
  codes, said, errors = end(TOGETHER, tmp_path)
  assert codes == [0, 0], errors
  assert said[0].startswith("process 0 of 2 True process 1 did not come to 'the other' in 0.1 s (")
  assert said[1].startswith("process 1 of 2 False process 0 did not finish 'the first': ")


def test_shards_are_shared_out_and_finished_ones_are_not_done_again(tmp_path: pathlib.Path) -> None:
  codes, said, errors = end(SHARED_OUT, tmp_path)
  assert codes == [0, 0], errors
  assert said[0] == said[1] == str(["by 0"] * 2 + ["s"] * 2 + ["by 1"] * 2 + ["by 0"] * 2 + ["by 1"] * 2)


def test_weights_are_written_and_read_in_parts(tmp_path: pathlib.Path) -> None:
  codes, said, errors = end(WEIGHTS, tmp_path)
  assert codes == [0, 0], errors
  assert said == ["equal", "equal"]


def test_a_process_that_fails_ends_the_other_with_its_reason(tmp_path: pathlib.Path) -> None:
  for code, who, reason in ((FAILING, 1, "ValueError: the data are bad"), (FAILING_FIRST, 0, "the disk is full")):
    place = tmp_path / str(who)
    place.mkdir()
    codes, _, errors = end(code, place)
    assert codes == [1, 1]  # What it met, the others would meet again: 75 would start them in vain.
    assert reason in errors[who] and f"process {who} ended: " in errors[1 - who] and reason in errors[1 - who]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_ends_the_other_with_75(tmp_path: pathlib.Path, frozen: int) -> None:
  processes = start(STOPPED, tmp_path, SRLM_SILENT_SECONDS="8")
  until = time.monotonic() + 60
  while any("here" not in (tmp_path / f"{number}.out").read_text() for number in (0, 1)):
    assert time.monotonic() < until, (tmp_path / "0.err").read_text()
    time.sleep(0.2)
  processes[frozen].send_signal(signal.SIGSTOP)
  try:
    assert processes[1 - frozen].wait(timeout=60) == 75
  finally:
    processes[frozen].kill()
    processes[frozen].wait()
  assert f"process {frozen}" in (tmp_path / f"{1 - frozen}.err").read_text()


def test_what_the_environment_lacks_is_said() -> None:
  done = subprocess.run(
    [sys.executable, "-c", "from srlm_jax import distributed\nwith distributed.session(): pass"],
    cwd=ROOT, env={**os.environ, "SRLM_PROCESSES": "2"}, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2 and "SRLM_PROCESSES=2 needs SRLM_COORDINATOR and SRLM_PROCESS" in done.stderr


def test_where_nobody_gets_anywhere_all_end_and_say_where_they_are(tmp_path: pathlib.Path) -> None:
  codes, _, errors = end(STUCK, tmp_path, SRLM_STUCK_SECONDS="6")
  assert codes == [75, 75]
  assert any("no process has got anywhere for" in error and "1: 'asleep'" in error for error in errors)


def test_a_killed_process_ends_the_other_with_75(tmp_path: pathlib.Path) -> None:
  processes = start(WAITING, tmp_path)
  until = time.monotonic() + 60
  while any("here" not in (tmp_path / f"{number}.out").read_text() for number in (0, 1)):
    assert time.monotonic() < until, (tmp_path / "0.err").read_text()
    time.sleep(0.2)
  processes[1].send_signal(signal.SIGKILL)
  assert [process.wait(timeout=60) for process in processes] == [75, -signal.SIGKILL]
  assert "process 1" in (tmp_path / "0.err").read_text()


def test_alone_it_does_nothing() -> None:
  from srlm_jax import distributed

  assert distributed.writes() and not distributed.name()
  assert distributed.agree("x", [1]) == [1] and distributed.gather("x", 1) == [1]
  distributed.barrier("nobody")


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  from srlm_jax import distributed

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(RuntimeError, match="2 processes that do not know each other: set SRLM_PROCESSES=auto"):
    distributed.agree("x", 1)
  with distributed.alone():
    assert distributed.agree("x", 1) == 1
