"""Prepared training sets: TFDS array_record datasets of fixed-shape rows, read through grain in a seeded order."""

from collections.abc import Mapping, Sequence

from etils import epath
import grain
import numpy as np
import tensorflow_datasets as tfds

from srlm_jax import batching, distributed

Row = Mapping[str, np.ndarray]


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
    for index, row in enumerate(self._rows):
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
  Rows(rows, data_dir=str(folder), file_format="array_record").download_and_prepare()


def batches(folder: epath.PathLike, size: int, seed: int) -> grain.MapDataset:
  """Batches of `size` rows as a random-access sequence: item k is the batch of step k.

  Every epoch is shuffled anew from `seed`, without end, so that a resumed run reads from its step on with no iterator
  state to restore.  A batch may span two epochs: every row is seen once an epoch, none is dropped.
  """
  source = tfds.builder_from_directory(str(next(epath.Path(folder).glob("rows/*")))).as_data_source("train")
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(size)


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
  return tfds.builder_from_directory(str(next(epath.Path(folder).glob("rows/*")))).info.splits["train"].num_examples
