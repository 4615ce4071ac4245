"""Compiled programs, kept between runs: each is there whole, as it was written, or counts as missing.

JAX's own files are written in place, and never again where there is one: what a kill or a bad disk left of a program
would be refused, and the program compiled anew, in every run from then on; and where zstandard is installed, which JAX
then uses, nothing tells a flipped bit in one from another program.
"""

import hashlib
import logging
import os
import pathlib

import jax
from jax._src import compilation_cache, compilation_cache_interface  # What keeps programs has no public name.

logger = logging.getLogger(__name__)

SETTING = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
SHA256 = 32  # Bytes, at the end of each file.


class Programs(compilation_cache_interface.CacheInterface):
  """A folder of compiled programs, a file each: as JAX packs it, and the SHA-256 of that.

  Processes may share it: they write files of the same name with the same content.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._path = folder

  def _file(self, key: str) -> pathlib.Path:
    return self._path / f"{key}.program"

  def get(self, key: str) -> bytes | None:
    """A program; None where it is not there, or damaged, which is said, and makes room for a new one."""
    path = self._file(key)
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    packed, digest = data[:-SHA256], data[-SHA256:]
    if hashlib.sha256(packed).digest() == digest:
      return packed
    logger.warning("%s is damaged (its SHA-256 is not the recorded one): the program is compiled again.", path)
    path.unlink(missing_ok=True)
    return None

  def put(self, key: str, value: bytes) -> None:
    """Keeps a program. JAX makes a warning of an OSError: a disk that is full costs time and no run."""
    path = self._file(key)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    self._path.mkdir(parents=True, exist_ok=True)
    try:
      beside.write_bytes(value + hashlib.sha256(value).digest())
      beside.replace(path)
    finally:
      beside.unlink(missing_ok=True)


def keep_in(folder: pathlib.Path) -> None:
  """Has programs that take half a second to compile (or as the environment says) kept in a folder, and found there."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if SETTING not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  compilation_cache.reset_cache()
  compilation_cache._cache, compilation_cache._cache_initialized = Programs(folder), True
