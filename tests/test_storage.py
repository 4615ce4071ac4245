"""Files written whole: in which order, and what a failure leaves."""

import errno
import os

from etils import epath
import pytest

from srlm_jax import storage


@pytest.fixture
def root(tmp_path: epath.Path) -> epath.Path:
  return epath.Path(tmp_path)


def test_text_and_bytes_are_written_in_place_of_what_was_there(root: epath.Path) -> None:
  for data in ("naïve\n", b"\x00\xff", "", "x" * 3_000_000):
    storage.write(root / "a", data)
    assert (root / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
  assert [path.name for path in root.iterdir()] == ["a"]
  with pytest.raises(FileNotFoundError):
    storage.write(root / "nowhere" / "a", "x")


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
  root: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  steps, sync, replace = [], os.fsync, os.replace

  def fsync(handle: int) -> None:
    steps.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), (root / "a").exists()))
    sync(handle)

  def rename(here: str, there: str) -> None:
    steps.append(("rename", os.path.basename(here), os.path.getsize(here)))
    replace(here, there)

  monkeypatch.setattr(os, "fsync", fsync)
  monkeypatch.setattr(os, "replace", rename)
  storage.write(root / "a", "abc")
  assert steps == [("fsync", ".a.part", False), ("rename", ".a.part", 3), ("fsync", root.name, True)]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_beside_it(
  root: epath.Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
  storage.write(root / "a", "old")

  def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, call, fail)
  with pytest.raises(OSError, match="No space left"):
    storage.write(root / "a", "new and longer")
  assert (root / "a").read_text() == "old"
  assert [path.name for path in root.iterdir()] == ["a"]


def test_a_full_disk_is_no_half_file(root: epath.Path) -> None:
  """/dev/full takes no byte: what is written there fails as on a full disk."""
  os.symlink("/dev/full", root / ".a.part")
  with pytest.raises(OSError, match="No space left"):
    storage.write(root / "a", "text")
  assert list(root.iterdir()) == []


def test_a_file_system_that_syncs_no_folders_is_used_as_it_is(
  root: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  sync = os.fsync

  def fsync(handle: int, number: int = errno.EINVAL) -> None:
    if os.path.isdir(f"/proc/self/fd/{handle}"):
      raise OSError(number, "not here")
    sync(handle)

  monkeypatch.setattr(os, "fsync", fsync)
  storage.write(root / "a", "text")
  assert (root / "a").read_text() == "text"
  monkeypatch.setattr(os, "fsync", lambda handle: fsync(handle, errno.EIO))
  with pytest.raises(OSError, match="not here"):
    storage.write(root / "b", "text")


def test_only_what_killed_writes_left_is_cleaned_away(root: epath.Path) -> None:
  (root / "deep").mkdir()
  for name in (".a.part", "deep/.b.part", "a.part", ".hidden", "deep/c"):
    (root / name).write_text("x")
  storage.clean(root)
  left = {str(path.relative_to(root)) for folder in (root, root / "deep") for path in folder.iterdir()}
  assert left == {"deep", "a.part", ".hidden", "deep/c"}
