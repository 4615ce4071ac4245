"""Writing files whole, on a local disk and in an object store: a reader finds all of a file or none of it."""

from collections.abc import Iterator
import errno
import os

from etils import epath
import fsspec

# A listing that was kept would hide what other processes have written since.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

PART = ".part"  # Ends the name of a file that is not whole yet.
GCSFS_MARK = b"--==0=="


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path lies in an object store (gs://…), where an upload is whole or is not there."""
  return "://" in os.fspath(path)


def write(path: epath.PathLike, data: str | bytes) -> None:
  """Writes a file whole and durably, in place of an older one; its folder must be there.

  Locally it is written beside the final name, synced to the disk and renamed, and the renaming is synced, too: after a
  loss of power there is the old file or the new one.  In an object store it is one upload of the final object, which
  the store does whole or not at all; the store's client tries again what may be tried again.

  Raises:
    OSError: the disk is full or cannot be written; nothing of `data` has the final name. It is the same where a store
      fails, with the errors of its client.
  """
  raw = data.encode() if isinstance(data, str) else data
  if is_remote(path):
    _write_remote(os.fspath(path), raw)
  else:
    _write_local(os.fspath(path), raw)


def _write_remote(path: str, raw: bytes) -> None:
  system, name = fsspec.core.url_to_fs(path)
  if not path.startswith("gs://"):
    system.pipe_file(name, raw)
    return
  from gcsfs import retry  # Here, as only the extra gcs has it.

  # A small upload is one message of parts; data that holds the mark between them would end early, so it goes apart.
  size = {"chunksize": len(raw)} if GCSFS_MARK in raw else {}
  try:
    system.pipe_file(name, raw, consistency="md5", **size)
  except retry.ChecksumError as error:
    system.rm_file(name)
    raise OSError(errno.EIO, f"what the store received is not what was sent ({error})", path) from error


def _write_local(path: str, raw: bytes) -> None:
  folder, name = os.path.split(path)
  beside = os.path.join(folder, f".{name}{PART}")
  try:
    with open(beside, "wb") as file:
      file.write(raw)
      file.flush()
      os.fsync(file.fileno())
    os.replace(beside, path)
  except OSError:
    if os.path.exists(beside):  # It may fill the disk.
      os.remove(beside)
    raise
  _sync_folder(folder or ".")


def _sync_folder(folder: str) -> None:
  """Makes the names in a folder durable, where the file system can."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network file systems sync no folders.
      raise
  finally:
    os.close(handle)


def sizes(folder: epath.PathLike) -> dict[str, int]:
  """{path below a folder: bytes} of all files there; a store is asked for one listing, however many there are.

  Raises:
    OSError: a local folder is not there, or one of it cannot be listed.
  """
  place = os.fspath(folder)
  if is_remote(place):
    system, place = fsspec.core.url_to_fs(place)
    found = {path: int(entry["size"]) for path, entry in system.find(place, detail=True).items()}
  else:
    found = dict(_sizes(place))
  return {os.path.relpath(path, place): size for path, size in found.items() if not path.endswith("/")}  # A folder.


def _sizes(folder: str) -> Iterator[tuple[str, int]]:
  for entry in os.scandir(folder):
    if entry.is_dir():
      yield from _sizes(entry.path)
    else:
      yield entry.path, entry.stat().st_size


def clean(folder: epath.PathLike) -> None:
  """Deletes what writes that were killed left below a folder."""
  if is_remote(folder):  # Nothing is written beside its final name there.
    return
  for root, _, names in os.walk(folder):
    for name in names:
      if name.startswith(".") and name.endswith(PART):
        os.remove(os.path.join(root, name))
