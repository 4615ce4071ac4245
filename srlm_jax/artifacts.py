"""Artifacts: the folders through which the stages hand each other their results.

A folder holds `stage.json` (written first: what it is made from), its shards (each written whole, then a small `.done`
beside it with records, bytes and SHA-256), and `manifest.json` (written last: its presence is the only commit). What an
artifact is made from is its configuration, its inputs' digests and the version of the code: a folder made from others
is refused, never mixed.

All three papers are sealed (`digests.sealed`), and what is damaged is found before it is used: in a folder that is not
finished it is deleted, with a warning, and made again (`begin`); a finished one is refused (`verify`).  Of a model's
weights the manifest holds the files' names and sizes, too. No artifact's digest covers these: Orbax names its files at
random, and other devices write others.

Of several processes all make the same calls, and process 0 alone looks at what is there and writes: a written file is
there for all of them once the call returns.  Shards alone may be shared out (`map_shards`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import functools
import json
import logging
import time
from typing import Any, TypeVar

from etils import epath
import jax

from srlm_jax import digests, distributed, interruption, records, storage, version

logger = logging.getLogger(__name__)

WEIGHTS = "weights"  # Folder of a model's weights, and what the manifest calls the sizes of its files.
FORMAT = 4  # Of the files described here; a change makes older folders refused, by name.


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} → {"a.b": 1}; sequences become JSON lists."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = json.loads(json.dumps(value))
  return flat


class Damaged(ValueError):
  """A written file is not there as it was written."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """One folder of the work directory.

  Attributes:
    folder: where it lies.
    config: the part of the configuration that decides its content, flat.
    inputs: the artifacts that it is made from, by role.
  """

  folder: epath.Path
  config: dict[str, Any]
  inputs: dict[str, "Artifact"]

  @property
  def name(self) -> str:
    """The folder's last part."""
    return self.folder.name

  def identity(self) -> dict[str, Any]:
    """What it is made from, as stage.json holds it."""
    return {
      "format": FORMAT,
      "code": version.VERSION,
      "config": self.config,
      "inputs": {role: artifact.digest() for role, artifact in self.inputs.items()},
    }

  @property
  def done(self) -> bool:
    """Whether it is committed."""
    return distributed.first(f"look at {self.folder}", (self.folder / "manifest.json").exists)

  def _paper(self, name: str) -> dict[str, Any]:
    """What stage.json or manifest.json holds; ValueError where it is damaged, FileNotFoundError where there is none."""
    path = self.folder / name
    data = path.read_bytes()
    try:
      plain = digests.parsed(data)
      if "seal" not in plain and plain["format"] in range(1, FORMAT):  # Older formats have no seals.
        return plain
      return digests.unseal(data)
    except (ValueError, TypeError, KeyError) as error:  # Neither JSON nor UTF-8; another JSON; another seal.
      raise ValueError(f"{path} is damaged ({error}): {self._remedy}.") from error

  @functools.cached_property
  def _manifest(self) -> dict[str, Any]:
    try:
      return self._paper("manifest.json")
    except FileNotFoundError as error:
      raise ValueError(f"{self.folder} is not finished (it has no manifest.json): run its stage first.") from error

  def manifest(self) -> dict[str, Any]:
    """The committed manifest; ValueError where there is none or it is damaged."""
    return self._manifest

  def digest(self) -> str:
    """Of the committed content: file digests and identity, not the time of making."""
    return self.manifest()["digest"]

  @property
  def _remedy(self) -> str:
    return f"delete {self.folder} and run its stage again"

  @functools.cached_property
  def _problem(self) -> str:
    return distributed.first(f"verify {self.folder}", self._find_problem)

  def verify(self) -> None:
    """ValueError, naming the file, where one that the manifest lists is missing or is not as it was written.

    All of them are read, once a process: they are text and small. Of a model's weights, which are large, the names and
    sizes of the files are compared; their bits are where they are loaded.
    """
    if self._problem:
      raise ValueError(f"{self._problem}: {self._remedy}.")

  def _find_problem(self) -> str:
    """What is wrong with the files of a committed folder; "" where nothing is."""
    files = self.manifest()["files"]
    if "fingerprints.json" in files and (problem := self._find_problem_of_weights()):
      return problem
    for name, entry in interruption.each(files.items()):
      path, done = self.folder / name, self.folder / f"{name}.done"
      for one in (path, done) if "records" in entry else (path,):  # Folders that are committed whole have no `.done`.
        if not one.exists():
          return f"{one} is missing"
      if digests.file_sha256(path) != entry["sha256"]:
        return f"{path} is damaged (its SHA-256 is not the recorded one)"
      try:
        if "records" in entry and self._entry(name) != entry:
          return f"{done} is damaged (the manifest says something else)"
      except Damaged as error:
        return str(error)
    return ""

  def _find_problem_of_weights(self) -> str:
    folder = self.folder / WEIGHTS
    if not folder.exists():
      return f"{folder} is missing"
    found = storage.sizes(folder)
    wanted = self.manifest().get(WEIGHTS, found)  # Once there were manifests without it.
    for name in sorted({*wanted, *found}):
      if name not in found:
        return f"{folder / name} is missing"
      if name not in wanted:
        return f"{folder / name} was not written with these weights (if it is yours, moving it away is enough)"
      if found[name] != wanted[name]:
        return f"{folder / name} is damaged (it has {found[name]} bytes, not the recorded {wanted[name]})"
    return ""

  def check_config(self) -> None:
    """ValueError, naming the keys, where the folder was begun with another configuration or by another version."""
    if (self.folder / "stage.json").exists():
      self._check_identity("stage.json")

  def _check_identity(self, paper: str) -> None:
    found = self._paper(paper)
    if found["format"] != FORMAT:
      raise ValueError(
        f"{self.folder} has artifact format {found['format']}, this version writes {FORMAT}: use a new --workdir."
      )
    if found["code"] != version.VERSION:
      raise ValueError(
        f"{self.folder} was made by srlm_jax {found['code']}, this is {version.VERSION}: use that version, or a new "
        "--workdir."
      )
    theirs, ours = found["config"], self.config
    changed = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if changed:
      lines = "\n".join(f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in changed)
      raise ValueError(
        f"{self.folder} was made with another configuration:\n{lines}\n"
        "Use those values, another --workdir, or delete the folder to make it again."
      )

  def begin(self) -> None:
    """Creates the folder and its stage.json, or checks that an existing one was begun from the same things.

    All inputs are verified first, and the folder itself, if it is finished; in one that is not, what is damaged is
    deleted, so that it is made again.
    """
    self.check_config()
    identity = self.identity()
    for paper in ("manifest.json", "stage.json"):
      if distributed.first(f"look at {self.folder / paper}", (self.folder / paper).exists):
        self._check_identity(paper)
        self._check_inputs(self._paper(paper)["inputs"], identity["inputs"])
    for artifact in self.inputs.values():
      artifact.verify()
    if self.done:
      self.verify()
      return
    distributed.first(f"begin {self.folder}", lambda: self._begin(identity))

  def _check_inputs(self, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    changed = sorted(role for role in {*found, *wanted} if found.get(role) != wanted.get(role))
    if changed:
      sources = ", ".join(f"{role} ({self.inputs[role].folder})" if role in self.inputs else role for role in changed)
      raise ValueError(
        f"{self.folder} was made from other inputs: {sources} changed since. Delete {self.folder} (and what follows "
        "from it) to make it again."
      )

  def _begin(self, identity: Mapping[str, Any]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    storage.clean(self.folder)
    storage.write(self.folder / "stage.json", digests.sealed(identity, indent=2))
    for done in sorted(self.folder.glob("*.done")):
      name = done.name.removesuffix(".done")
      if not self._has(name):
        done.unlink()  # First: without it the file is none.
        (self.folder / name).unlink(missing_ok=True)

  def commit(self, facts: Mapping[str, Any], folders: Sequence[str] = ()) -> None:
    """Writes manifest.json: digests of all shards and of the files in `folders`, and `facts` for people and reports.

    What other processes write must be there when they call this: process 0 looks after the last one has come.
    """
    distributed.barrier(f"commit {self.folder}")
    distributed.first(f"commit {self.folder}", lambda: self._commit(facts, folders))

  def _commit(self, facts: Mapping[str, Any], folders: Sequence[str]) -> None:
    files = {}
    for done in sorted(self.folder.glob("*.done")):
      name = done.name.removesuffix(".done")
      self.read_text(name)  # What is committed is what lies there.
      files[name] = self._entry(name)
    for folder in folders:
      for path in sorted(_files(self.folder / folder)):
        data = path.read_bytes()
        files[str(path.relative_to(self.folder))] = {"bytes": len(data), "sha256": digests.sha256(data)}
    identity = self.identity()
    content = {"identity": identity, "files": {name: entry["sha256"] for name, entry in files.items()}}
    manifest = {
      **identity,
      "digest": digests.sha256(json.dumps(content, sort_keys=True).encode()),
      "files": files,
      "facts": dict(facts),
      "made": {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": self._seconds(),
        "jax": jax.__version__,
      },
    }
    if "fingerprints.json" in files:  # They stand for the weights' content.
      manifest[WEIGHTS] = storage.sizes(self.folder / WEIGHTS)
    storage.write(self.folder / "manifest.json", digests.sealed(manifest, indent=2))

  def _seconds(self) -> float:
    """Since the session that finishes it began it: stage.json is written then."""
    path = self.folder / "stage.json"
    return round(time.time() - path.stat().mtime, 1) if path.exists() else 0.0

  def write(self, name: str, text: str, count: int | None = None) -> None:
    """Writes one file whole, then its `.done`."""
    distributed.first(f"write {self.folder / name}", lambda: self._write(name, text, count))

  def _write(self, name: str, text: str, count: int | None) -> None:
    data = text.encode()
    storage.write(self.folder / name, data)
    entry = {"records": count, "bytes": len(data), "sha256": digests.sha256(data)}
    storage.write(self.folder / f"{name}.done", digests.sealed(entry))

  def write_records(self, name: str, items: Sequence[records.Record]) -> None:
    """Writes a JSON Lines file of records."""
    self.write(name, records.dumps(items), len(items))

  def has(self, name: str) -> bool:
    """Whether a file is complete and undamaged; a damaged one is warned of."""
    return distributed.first(f"look at {self.folder / name}", lambda: self._has(name))

  def _has(self, name: str) -> bool:
    if not (self.folder / f"{name}.done").exists():
      return False
    try:
      self._read_bytes(name)
    except Damaged as error:
      logger.warning("%s: it counts as missing", error)
      return False
    return True

  def _entry(self, name: str) -> dict[str, Any]:
    """What a file's `.done` says; Damaged where it is not as it was written."""
    path = self.folder / f"{name}.done"
    try:
      return digests.unseal(path.read_bytes())
    except ValueError as error:
      raise Damaged(f"{path} is damaged ({error})") from error

  def _read_bytes(self, name: str) -> bytes:
    """The content of a written file; Damaged where it is not there as it was written."""
    interruption.check()
    path = self.folder / name
    try:
      entry, data = self._entry(name), path.read_bytes()
    except FileNotFoundError as error:
      raise Damaged(f"{path} is missing or was never finished") from error
    if digests.sha256(data) != entry["sha256"]:
      raise Damaged(f"{path} is damaged (its SHA-256 is not the recorded one)")
    return data

  def read_text(self, name: str) -> str:
    """The content of a written file; ValueError where it differs from its digest."""
    return self._checked(name).decode()

  def _checked(self, name: str) -> bytes:
    try:
      return self._read_bytes(name)
    except Damaged as error:
      raise ValueError(f"{error}: {self._remedy}.") from error

  def read(self, name: str, kind: type[records.R]) -> list[records.R]:
    """The records of one written file, which is read once, for its digest and for them."""
    return list(records.read(self.folder / name, kind, self._checked(name)))

  def read_shards(self, stem: str, kind: type[records.R]) -> Iterator[records.R]:
    """The records of all shards of `stem`, in order."""
    for name in self.shards(stem):
      yield from self.read(name, kind)

  def shards(self, stem: str) -> list[str]:
    """The names of the shards of `stem`, in order: those that the manifest lists, or that are finished so far."""
    if (self.folder / "manifest.json").exists():  # A shard that is gone must be missed.
      return sorted(name for name in self.manifest()["files"] if fnmatch.fnmatchcase(name, f"{stem}-*.jsonl"))
    return sorted(path.name.removesuffix(".done") for path in self.folder.glob(f"{stem}-*.jsonl.done"))

  def complete(self, stem: str) -> bool:
    """Whether all shards of `stem` are there."""
    names = distributed.first(f"list {self.folder / stem}", lambda: self.shards(stem))
    return bool(names) and names[0] == f"{stem}-00000-of-{len(names):05d}.jsonl"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  """All files below a folder."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


Item = TypeVar("Item")
Tool = TypeVar("Tool")


def map_shards(
  out: Artifact,
  stem: str,
  items: Sequence[Item],
  size: int,
  mesh: jax.sharding.Mesh,
  load: Callable[[], Tool],
  work: Callable[[Tool, Sequence[Item]], Sequence[records.Record]],
) -> None:
  """Works through `items` in shards of `size`, each written when done; finished shards are not done again.

  Args:
    out: gets the files STEM-00000-of-00012.jsonl and so on.
    stem: of their names.
    items: what is worked on; processes on meshes of their own share the shards out, all others do each together.
    size: items of a shard.
    mesh: of the work.
    load: gives what the work needs (a model, say); called once, by all processes, and only if a shard is missing.
    work: the records of one shard.

  Raises:
    OSError: a shard that was written is not there.
  """
  total = -(-len(items) // size)
  names = [f"{stem}-{index:05d}-of-{total:05d}.jsonl" for index in range(total)]
  missing = distributed.first(
    f"look at {out.folder / stem}", lambda: [index for index, name in enumerate(names) if not out._has(name)]
  )
  if not missing:
    return
  tool = load()
  apart = distributed.apart(mesh)
  mine = missing[jax.process_index() :: jax.process_count()] if apart else missing
  started, fresh = time.monotonic(), 0
  with distributed.alone() if apart else contextlib.nullcontext():
    for number, index in enumerate(mine, 1):
      interruption.check()
      part = items[index * size : (index + 1) * size]
      out.write_records(names[index], work(tool, part))
      fresh += len(part)
      rate = fresh / (time.monotonic() - started)
      logger.info(
        "%s: %s, shard %d of %d%s, %.1f a second, %.0f s left",
        out.folder,
        stem,
        number,
        len(mine),
        f" of this process ({len(missing)} of all)" if apart else "",
        rate,
        (len(mine) - number) * size / rate,
      )
  distributed.barrier(f"all of {out.folder / stem}")
  lost = distributed.first(f"list {out.folder / stem}", lambda: sorted({*names} - {*out.shards(stem)}))
  if lost:  # Whoever made it wrote it, too, and heard of no failure.
    raise OSError(errno.EIO, f"{out.folder / lost[0]} was written, and is not there")


def unknown(name: str, valid: Sequence[str], what: str) -> ValueError:
  """The error for a name that is not one of `valid`, with the nearest one."""
  near = difflib.get_close_matches(name, valid, 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return ValueError(f"{name!r} is not a {what}.{hint} Valid: {', '.join(valid)}.")
