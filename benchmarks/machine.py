"""What the machine itself can do, measured: the limits that the other files' figures are shares of."""

from collections.abc import Callable
import time

import jax
import jax.numpy as jnp


def seconds(run: Callable[[], object], times: int = 5) -> float:
  """The best time of a jitted call, compiled before; on an accelerator of ten calls that queue up behind each other."""
  each = 1 if jax.default_backend() == "cpu" else 10
  jax.block_until_ready(run())
  found = []
  for _ in range(times):
    began = time.perf_counter()
    jax.block_until_ready([run() for _ in range(each)])
    found.append((time.perf_counter() - began) / each)
  return min(found)


def bandwidth(size: int = 0) -> float:
  """Bytes read from memory in a second, by a sum over `size` bytes; 0: half a GiB, 4 GiB on an accelerator."""
  size = size or (2**29 if jax.default_backend() == "cpu" else 2**32)
  array = jnp.ones(size // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return size / seconds(lambda: total(array))


def matmul_peak(dtype: str = "float32", size: int = 0) -> float:
  """FLOPs in a second of a matmul of two [size, size] matrices; 0: 2048, 8192 on an accelerator."""
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  one = jax.random.normal(jax.random.key(0), (size, size), dtype)  # Ones would need less power, and run faster.
  product = jax.jit(jnp.dot)
  return 2 * size**3 / seconds(lambda: product(one, one))
