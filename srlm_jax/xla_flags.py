"""What XLA is told on NVIDIA GPUs: to read the kernels of a layer where they lie."""

from collections.abc import MutableMapping
import importlib.util

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# A loop over stacked layers first copies each layer's kernels out of the stack, for every token that is decoded, unless
# a matmul is cuBLAS's, and of one kernel alone: those that share an input would be joined in memory.
GPU = {
  "xla_gpu_enable_dynamic_slice_fusion": "true",
  "xla_gpu_enable_triton_gemm": "false",
  "xla_gpu_dot_merger_threshold_mb": "0",
}


def with_gpu_flags(given: str) -> str:
  """These flags, and those of GPU that they do not name; a file's name, which XLA takes in their place, stays alone."""
  if given.strip() and not given.strip().startswith("-"):
    return given
  named = {flag.split("=", 1)[0].lstrip("-") for flag in given.split()}
  return " ".join([*given.split(), *(f"--{name}={value}" for name, value in GPU.items() if name not in named)])


def prepare(environment: MutableMapping[str, str]) -> None:
  """Adds them to XLA_FLAGS where JAX can use NVIDIA GPUs. Call it before JAX's first use of a device."""
  if any(importlib.util.find_spec(name) for name in PLUGINS):
    environment["XLA_FLAGS"] = with_gpu_flags(environment.get("XLA_FLAGS", ""))
