"""Files written whole: in which order, and what a failure leaves."""

import errno
import os

from etils import epath
import fake_gcs
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


def test_sizes_are_of_all_files_below_a_folder(root: epath.Path) -> None:
  (root / "a" / "b").mkdir(parents=True)
  (root / "a" / "empty").mkdir()
  for name, text in (("one", ""), ("b/two", "naïve"), ("../other", "x")):
    (root / "a" / name).write_text(text)
  os.symlink(root / "a" / "b", root / "a" / "linked")
  assert storage.sizes(root / "a") == {"one": 0, "b/two": 6, "linked/two": 6}
  with pytest.raises(FileNotFoundError):
    storage.sizes(root / "nothing")


def test_only_what_killed_writes_left_is_cleaned_away(root: epath.Path) -> None:
  (root / "deep").mkdir()
  for name in (".a.part", "deep/.b.part", "a.part", ".hidden", "deep/c"):
    (root / name).write_text("x")
  storage.clean(root)
  left = {str(path.relative_to(root)) for folder in (root, root / "deep") for path in folder.iterdir()}
  assert left == {"deep", "a.part", ".hidden", "deep/c"}


PLACE = epath.Path("gs://bucket/run/m1")


@pytest.mark.parametrize("data", ["naïve\n", b"", b"\n--==0==\nContent-Type: x\n\ny\n--==0==--", b"x" * 2_000_000])
def test_an_object_is_written_whole(store: fake_gcs.Store, data: str | bytes) -> None:
  storage.write(PLACE / "a", "older")
  storage.write(PLACE / "a", data)
  assert (PLACE / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
  assert store.names("bucket") == ["run/m1/a"]
  assert not store.counts["copy"] and not store.counts["delete"]  # Renaming would be a copy.
  storage.clean(PLACE)


@pytest.mark.parametrize(
  "fault",
  [
    fake_gcs.Fault("insert", "a$", times=3, status=503),
    fake_gcs.Fault("insert", "a$", times=2, torn=True),
    fake_gcs.Fault("insert", "a$", times=1, status=429),
    fake_gcs.Fault("insert", "a$", seconds=1),
  ],
)
def test_what_may_be_tried_again_is(store: fake_gcs.Store, fault: fake_gcs.Fault) -> None:
  store.faults.append(fault)
  storage.write(PLACE / "a", "text" * 1000)
  assert fault.times == 0 and (PLACE / "a").read_text() == "text" * 1000


@pytest.mark.parametrize("how", [{"status": 503}, {"torn": True}, {"status": 403}, {"status": 507}])
def test_a_store_that_fails_for_good_keeps_the_old_object(store: fake_gcs.Store, how: dict[str, object]) -> None:
  storage.write(PLACE / "a", "old")
  store.faults.append(fake_gcs.Fault("insert", "a$|b$", times=float("inf"), **how))
  for name in ("a", "b"):
    with pytest.raises(Exception) as error:  # Each client has its own.
      storage.write(PLACE / name, "new")
    assert isinstance(error.value, OSError) or type(error.value).__module__.split(".")[0] in ("gcsfs", "aiohttp")
  assert store.names("bucket") == ["run/m1/a"] and (PLACE / "a").read_text() == "old"


def test_what_the_store_received_wrongly_is_taken_away(store: fake_gcs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
  put = store.put
  monkeypatch.setattr(store, "put", lambda bucket, name, data, kind: put(bucket, name, data[:-1] + b"?", kind))
  with pytest.raises(OSError, match="is not what was sent"):
    storage.write(PLACE / "a", "text")
  assert store.names("bucket") == []


def test_a_read_that_breaks_off_is_tried_again(store: fake_gcs.Store) -> None:
  storage.write(PLACE / "a", "text" * 1000)
  store.faults += [fake_gcs.Fault("get", "a$", torn=True), fake_gcs.Fault("get", "a$", status=500)]
  assert (PLACE / "a").read_text() == "text" * 1000
  assert not any(fault.times for fault in store.faults)


def test_what_another_process_wrote_is_seen(store: fake_gcs.Store) -> None:
  storage.write(PLACE / "a", "x")
  assert [path.name for path in PLACE.iterdir()] == ["a"] and not (PLACE / "b").exists()
  store.put("bucket", "run/m1/b", b"of another process")
  assert (PLACE / "b").exists(), "listings are kept"
  assert sorted(path.name for path in PLACE.iterdir()) == sorted(path.name for path in PLACE.glob("*")) == ["a", "b"]
