"""Eight CPU devices for every test; programs compile quickly rather than run quickly, and are kept between runs."""

import os
import pathlib

# Before anything imports jax: it reads them once.  Level 0 compiles three times as fast, and tests' arrays are tiny.
flags = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
os.environ["XLA_FLAGS"] = flags.strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")  # XLA's threads: a collective blocks one until all eight devices are there.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "srlm_jax" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from collections.abc import Iterator  # noqa: E402
import importlib.util  # noqa: E402
import types  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

if TYPE_CHECKING:
  import fake_gcs

pytest_plugins = ["error_list"]


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
  """Compiled programs hold memory maps, of which a process may have some 65,000: the suite has more."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def _one_store() -> Iterator["fake_gcs.Store"]:
  """The clients keep the address that they met first, so that there is one store in a process."""
  if not importlib.util.find_spec("gcsfs"):  # Not imported: that reads the environment.
    pytest.skip("object stores need the extra gcs")
  import fake_gcs

  with fake_gcs.serving(os.environ.__setitem__) as store:
    yield store


@pytest.fixture
def store(_one_store: "fake_gcs.Store", monkeypatch: pytest.MonkeyPatch) -> Iterator["fake_gcs.Store"]:
  """An empty object store in which nothing fails yet, behind gs://; the client waits no seconds between its tries."""
  monkeypatch.setattr("gcsfs.retry.random", types.SimpleNamespace(random=lambda: -1e9))
  yield _one_store
  _one_store.clear()
