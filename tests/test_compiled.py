"""Compiled programs between runs: damaged ones are said and made again, once."""

from collections.abc import Iterator
import logging
import pathlib

import jax
from jax._src import compilation_cache
import jax.numpy as jnp
import pytest

from srlm_jax import compiled


@pytest.fixture
def kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
  """A folder in which every program is kept, in place of the tests' own."""
  before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
  monkeypatch.setenv(compiled.SETTING, "0")
  compiled.keep_in(tmp_path / "programs")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  yield tmp_path / "programs"
  jax.config.update("jax_compilation_cache_dir", before[0])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
  compilation_cache.reset_cache()


def double(value: int) -> int:
  """By a program that is compiled, or found in the folder, at each call."""
  jax.clear_caches()
  return int(jax.jit(lambda x: x * 2)(jnp.int32(value)))


def test_a_program_is_kept_and_found(kept: pathlib.Path) -> None:
  assert double(3) == 6
  made = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
  assert made and all(path.name.endswith(".program") for path in made)
  assert double(4) == 8 and {path: path.stat().st_mtime_ns for path in kept.iterdir()} == made


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_program_is_said_once_and_made_again(
  kept: pathlib.Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
  assert double(3) == 6
  whole = {path: path.read_bytes() for path in kept.iterdir()}
  for path, data in whole.items():
    flipped = data[:40] + bytes([data[40] ^ 8]) + data[41:]
    path.write_bytes({"flipped": flipped, "cut": data[: len(data) // 2], "empty": b""}[damage])
  with caplog.at_level(logging.WARNING, "srlm_jax.compiled"):
    assert double(4) == 8
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(whole) and all(any(str(path) in line for line in said) for path in whole)
    assert set(kept.iterdir()) == set(whole) and double(5) == 10
  assert len(caplog.records) == len(said)


def test_a_folder_that_cannot_be_written_costs_no_run(kept: pathlib.Path) -> None:
  kept.write_text("a file")
  with pytest.warns(UserWarning, match="Error (writing|reading) persistent compilation cache"):
    assert double(3) == 6
