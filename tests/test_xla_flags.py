"""Flags for NVIDIA GPUs: added where they count, never against the user's own, and known to this JAX."""

import os
import subprocess
import sys

import pytest

from srlm_jax import xla_flags


def test_own_flags_stay_and_win() -> None:
  assert xla_flags.with_gpu_flags("").split() == [f"--{name}={value}" for name, value in xla_flags.GPU.items()]
  own = "--xla_gpu_enable_triton_gemm=true --xla_force_host_platform_device_count=2"
  found = xla_flags.with_gpu_flags(own).split()
  assert found[:2] == own.split() and len(found) == 2 + len(xla_flags.GPU) - 1
  assert xla_flags.with_gpu_flags("/etc/xla.flags") == "/etc/xla.flags"


@pytest.mark.parametrize("installed", [True, False])
def test_only_where_jax_has_a_plugin_for_them(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(xla_flags, "PLUGINS", ("jax_no_such_plugin", "jax" if installed else "jax_none_either"))
  environment = {"HOME": "/root"}
  xla_flags.prepare(environment)
  assert ("XLA_FLAGS" in environment) == installed


def test_this_jax_knows_them() -> None:
  """XLA ends the process over a flag that it does not know."""
  work = "import jax.numpy as jnp; print(int(jnp.ones(3).sum()))"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.with_gpu_flags("")}
  done = subprocess.run([sys.executable, "-c", work], env=environment, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
