"""Prepared training sets: TFDS array_record datasets of fixed-shape rows, read through grain in a seeded order.

`digests.json` is written last and beside them: sealed, with the SHA-256 of each file, all of which are checked before a
row is read.  array_record reads local files alone: in an object store a set is made on the local disk and uploaded, and
downloaded to be read.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import io
import tempfile
from typing import SupportsIndex
import weakref

from etils import epath
import grain
import numpy as np
import tensorflow_datasets as tfds

from srlm_jax import batching, digests, distributed, interruption, storage

Row = Mapping[str, np.ndarray]

PAPER = "digests.json"


class Rows(tfds.core.GeneratorBasedBuilder):
  """One split, `train`, of rows that all have the same fields, shapes and dtypes."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, rows: Sequence[Row], **kwargs: object) -> None:
    self._rows = rows
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      name: tfds.features.Tensor(shape=value.shape, dtype=value.dtype.type) if value.shape else value.dtype.type
      for name, value in self._rows[0].items()
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, object]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> object:
    for index, row in enumerate(interruption.each(self._rows)):
      yield index, dict(row)


def write(folder: epath.PathLike, rows: Sequence[Row]) -> None:
  """Prepares a dataset of `rows`, in their order, in place of what `folder` held; ValueError where there is none."""
  if not rows:
    raise ValueError(f"no training example to write to {folder}: the stage before left none, see its counts.")
  distributed.first(f"write {folder}", lambda: _write(epath.Path(folder), rows))


def _write(folder: epath.Path, rows: Sequence[Row]) -> None:
  if folder.exists():  # Cheap to prepare again, and never half of one.
    folder.rmtree()
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as place:
    local = epath.Path(place) if storage.is_remote(folder) else folder
    with contextlib.redirect_stdout(io.StringIO()):  # It speaks of downloading, and nothing is.
      Rows(rows, data_dir=str(local), file_format="array_record").download_and_prepare()
    found = {str(path.relative_to(local)): digests.file_sha256(path) for path in _files(local)}
    if storage.is_remote(folder):
      for name in found:
        storage.write(folder / name, (local / name).read_bytes())
  storage.write(folder / PAPER, digests.sealed({"sha256": found}, indent=1))


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    yield from _files(path) if path.is_dir() else (path,)


def _check(folder: epath.Path, local: epath.Path) -> None:
  """Checks all files of a written dataset, which are copied to `local`, if that is another place.

  Raises:
    ValueError: a file is missing or damaged.
  """
  remedy = f"delete {folder.parent} and run its stage again"
  try:
    wanted = digests.unseal((folder / PAPER).read_bytes())["sha256"]
  except FileNotFoundError as error:
    raise ValueError(f"{folder} is no whole training set (it has no {PAPER}): {remedy}.") from error
  except ValueError as error:
    raise ValueError(f"{folder / PAPER} is damaged ({error}): {remedy}.") from error
  for name, digest in wanted.items():
    if not (folder / name).exists():
      raise ValueError(f"{folder / name} is missing: {remedy}.")
    if local != folder:
      (local / name).parent.mkdir(parents=True, exist_ok=True)
      (local / name).write_bytes((folder / name).read_bytes())
    if digests.file_sha256(local / name) != digest:
      raise ValueError(f"{folder / name} is damaged (its SHA-256 is not the recorded one): {remedy}.")


class _Source:
  """The rows of a checked dataset in their order; a copy on the local disk lives as long as it."""

  def __init__(self, folder: epath.Path) -> None:
    local = folder
    if storage.is_remote(folder):
      copy = tempfile.TemporaryDirectory()
      weakref.finalize(self, copy.cleanup)
      local = epath.Path(copy.name)
    _check(folder, local)
    (version,) = local.glob("rows/*")
    self._rows = tfds.builder_from_directory(str(version)).as_data_source("train")

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: SupportsIndex) -> Row:
    return self._rows[index]


def batches(folder: epath.PathLike, size: int, seed: int) -> grain.MapDataset:
  """Batches of `size` rows as a random-access sequence: item k is the batch of step k.

  Every epoch is shuffled anew from `seed`, without end, so that a resumed run reads from its step on with no iterator
  state to restore.  A batch may span two epochs: every row is seen once an epoch, none is dropped.

  Raises:
    ValueError: a file of the dataset is missing or damaged.
  """
  return grain.MapDataset.source(_Source(epath.Path(folder))).seed(seed).shuffle().repeat().batch(size)


class Compact:
  """Batches of rows with one example each, laid into as few and as short rows as hold them (`batching.compact`)."""

  def __init__(self, source: grain.MapDataset, unit: int, places: bool) -> None:
    """Compacts what `source` gives.

    Args:
      source: of batches.
      unit: what the number of rows must be a multiple of, to divide among the devices.
      places: whether a batch says where its targets are (`batching.with_places`): on one device, in one part.
    """
    self._source, self._unit, self._places = source, unit, places

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    batch = batching.compact(self._source[step], self._unit)
    return batching.with_places(batch) if self._places else batch


def count(folder: epath.PathLike) -> int:
  """Number of rows of a written dataset."""
  return len(_Source(epath.Path(folder)))
