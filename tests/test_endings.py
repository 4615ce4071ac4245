"""Exit codes: real errors of the disk, of memory and of the libraries, and what they say."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import pathlib
import resource
import subprocess
import sys

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from srlm_jax import artifacts, checkpoint, dataset, distributed, endings, records

ROOT = pathlib.Path(__file__).parents[1]


def raised(work: Callable[[], object]) -> BaseException:
  with pytest.raises(BaseException) as found:  # Of any kind: its kind is what is tested.
    work()
  return found.value


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
  """No file may grow beyond `size` bytes: EFBIG, which a process can have without a disk of its own."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_this_package_refuses_is_2(tmp_path: pathlib.Path) -> None:
  (tmp_path / "prompts.jsonl").write_text('{"id": 1}\n')
  error = raised(lambda: list(records.read(tmp_path / "prompts.jsonl", records.Prompt)))
  code, message = endings.of(error)
  assert code == endings.REFUSED and message.startswith(f"{tmp_path / 'prompts.jsonl'}, line 1: not a Prompt")
  error = raised((tmp_path / "nowhere.jsonl").read_text)
  assert isinstance(error, FileNotFoundError) and endings.of(error) == (endings.REFUSED, str(error))
  error = raised((tmp_path / "prompts.jsonl").mkdir)
  assert isinstance(error, FileExistsError) and endings.of(error) == (endings.REFUSED, str(error))


def refuse() -> None:
  raise ValueError(
    "line 3: 'No space left on device' is not a prompt."  # On a line of its own, as long messages are.
  )


def test_a_value_error_that_no_raise_of_ours_made_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
  assert endings.of(raised(refuse))[0] == endings.STORAGE  # This file is no part of the package,
  monkeypatch.setattr(endings, "_PACKAGE", pathlib.Path(__file__).resolve().parent)  # but now it is.
  # A disk's words in a message of our own mean nothing: it may quote anybody's text.
  assert endings.of(raised(refuse)) == (endings.REFUSED, "line 3: 'No space left on device' is not a prompt.")
  for work in (
    lambda: jax.lax.broadcast_shapes((2, 3), (4,)),
    lambda: jax.vmap(lambda x, y: x)(jnp.ones(3), jnp.ones(4)),  # JAX hides its frames.
    lambda: np.zeros(3).reshape(7),
    lambda: int("x"),
  ):
    error = raised(work)
    assert isinstance(error, ValueError)
    assert endings.of(error) == (endings.BUG, f"ValueError: {endings.first_line(error)}")


@pytest.mark.parametrize("variant", ["", "raised in a group"])
def test_a_full_disk_is_74_whoever_writes(tmp_path: pathlib.Path, variant: str) -> None:
  place = epath.Path(tmp_path)
  weights = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(200_000), jnp.float32)}
  rows = [{"x": np.random.default_rng(seed).integers(0, 2**31, 100_000).astype(np.int32)} for seed in range(3)]

  def write_artifact() -> None:
    artifact = artifacts.Artifact(place / "a", {}, {})
    artifact.begin()
    artifact.write("x.txt", "y" * 300_000)

  def save_at_once() -> None:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(place / "weights", weights)
      checkpointer.wait_until_finished()

  def save_in_the_background() -> None:
    store = checkpoint.StateStore(place / "states")
    store.save(1, weights)
    store.close()

  def log() -> None:
    with (place / "metrics.jsonl").open("w") as file:
      file.write("x" * 300_000)
      file.flush()

  works = (write_artifact, save_at_once, save_in_the_background, lambda: dataset.write(place / "rows", rows), log)
  for work in works:
    with small_disk(100_000):
      error = raised(work)
    if variant:
      error = ExceptionGroup("several", [RuntimeError("of a thread"), error])
    code, message = endings.of(error)
    assert code == endings.STORAGE and message.startswith("the disk is full: "), (work, repr(error))
    assert message.endswith("Make room. The same command goes on from here.")


def test_a_full_disk_is_74_where_tidying_up_after_it_fails(tmp_path: pathlib.Path) -> None:
  def write() -> None:
    try:
      raise OSError(errno.ENOSPC, "No space left on device", "/data/run/m1.tmp")
    finally:
      (tmp_path / "m1.tmp").unlink()

  error = raised(write)
  assert isinstance(error, FileNotFoundError)
  code, message = endings.of(error)
  assert code == endings.STORAGE and message.startswith("the disk is full: ") and "/data/run/m1.tmp" in message


def test_a_failing_disk_is_74() -> None:
  for number in (errno.EIO, errno.EROFS, errno.ESTALE):
    code, message = endings.of(OSError(number, "it failed", "/data/run/m1"))
    assert code == endings.STORAGE and "/data/run/m1" in message and "failed" in message
  error = RuntimeError("INTERNAL: Failed to write: Input/output error [os_error_code='5']")
  try:
    raise error
  except RuntimeError:
    assert endings.of(error)[0] == endings.STORAGE
  assert endings.of(ConnectionResetError(errno.ECONNRESET, "reset"))[0] == endings.STORAGE


def test_no_compiled_program_is_lost_to_a_full_disk(tmp_path: pathlib.Path) -> None:
  """The cache of compiled programs is no part of a run: where it cannot be written, the run goes on."""
  code = (
    "import resource, jax\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
    f"jax.config.update('jax_compilation_cache_dir', {str(tmp_path / 'xla')!r})\n"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
    "print(jax.jit(lambda x: x * 3)(jax.numpy.ones(4)).sum())\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "12.0\n"), done.stderr
  assert "Error writing persistent compilation cache entry" in done.stderr


def test_memory_is_3_and_says_what_to_lower() -> None:
  for work in (
    lambda: jax.jit(lambda: jnp.ones((1 << 42,), jnp.float32))(),
    lambda: np.ones(1 << 50, np.float64),
    lambda: bytearray(1 << 60),
  ):
    code, message = endings.of(raised(work))
    assert code == endings.MEMORY and "lower config.generation.rows" in message and "out of memory (" in message


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (KeyboardInterrupt(), 130),
    (endings.Terminated(), 75),
    (endings.PeerLost("process 1 is gone."), 75),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo all-reduce failed"), 75),
    (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such thing"), 1),
    (FloatingPointError("the loss of step 3 is nan"), 4),
    (KeyError("x"), 1),
    (AssertionError(), 1),
    (PermissionError(errno.EACCES, "Permission denied", "/data"), 2),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
  ],
)
def test_the_rest(error: BaseException, code: int) -> None:
  assert endings.of(error)[0] == code


def test_a_stop_is_a_stop_whatever_it_interrupted() -> None:
  for stop, code in ((KeyboardInterrupt, 130), (endings.Terminated, 75)):
    try:
      try:
        raise OSError(errno.ENOSPC, "No space left on device")
      except OSError:
        raise stop from None
    except stop as error:
      assert endings.of(error)[0] == code


def test_the_table_in_the_docstring_has_every_code() -> None:
  told = [
    int(line.split("|")[1]) for line in endings.__doc__.splitlines() if line.startswith("| ") and "code" not in line
  ]
  names = "DONE BUG REFUSED MEMORY DIVERGED STORAGE AGAIN INTERRUPTED UNREAD"
  assert told == [getattr(endings, name) for name in names.split()]
  assert distributed.LOST == endings.AGAIN
