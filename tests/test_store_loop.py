"""The whole loop of the tiny world in an object store that fails now and then: the artifacts of a run on a disk."""

from collections.abc import Iterator, Sequence

from etils import epath
import fake_gcs
import pytest
import test_loop
from test_loop import one_device, run  # noqa: F401  # Fixtures.

from srlm_jax import digests, main


def below(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    yield from below(path) if path.is_dir() else (path,)


def files(names: Sequence[str]) -> list[str]:
  """All but those of weights, which Orbax names at random."""
  return sorted(name for name in names if "/weights/" not in name)


@pytest.mark.slow
def test_a_run_in_a_store_is_the_run_on_a_disk(
  store: fake_gcs.Store,
  run: epath.Path,  # noqa: F811
) -> None:
  store.weather = 97
  workdir = epath.Path("gs://bucket/run")
  main.run_steps(test_loop.smoke(), workdir, "all")
  assert store.counts.total() > 1000
  wanted = test_loop.outcome(run)
  for name, value in wanted.items():
    if isinstance(name, str):  # An artifact; the rest are their files.
      assert digests.unseal((workdir / name / "manifest.json").read_bytes())["digest"] == value, name
  assert "M3" in (workdir / "report" / "report.html").read_text()
  assert files(store.names("bucket", "run/")) == files([f"run/{path.relative_to(run)}" for path in below(run)])
