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

import jax  # noqa: E402
import pytest  # noqa: E402

pytest_plugins = ["error_list"]


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
  """Compiled programs hold memory maps, of which a process may have some 65,000: the suite has more."""
  yield
  jax.clear_caches()
