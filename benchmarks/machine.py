"""What the machine itself can do, measured: the limits that the other files' figures are shares of."""

from collections.abc import Callable
import time

import jax
import jax.numpy as jnp


def seconds(run: Callable[[], object], times: int = 5) -> float:
  """The best time of a jitted call, compiled before."""
  jax.block_until_ready(run())
  found = []
  for _ in range(times):
    began = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - began)
  return min(found)


def bandwidth(size: int = 2**29) -> float:
  """Bytes read from memory in a second, by a sum over `size` bytes."""
  array = jnp.ones(size // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return size / seconds(lambda: total(array))


def matmul_peak(dtype: str = "float32", size: int = 2048) -> float:
  """FLOPs in a second of a matmul of two [size, size] matrices."""
  one = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.dot)
  return 2 * size**3 / seconds(lambda: product(one, one))
